"""Every property of an own loss, broken once; shipped losses keep all but those that compare a micro-batch's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from align.errors import UserError
from align.methods.call import FunctionFailed, Method
from align.methods.contract import ANSWERS, PAIRS, SCORES, TOKENS, Form, check, sample_pairs, violations
from align.methods.losses import PAIR_LOSSES, POLICY_LOSSES, bradley_terry
from align.methods.records import AnswerTokens, PairLogprobs, PairScores, ResponseTokens
from align.rl.objectives.policy import PolicyLoss
from tests.support.rl.policy_losses import make_tokens

FIELDS = {"beta": 0.1, "label_smoothing": 0.1, "discopop_tau": 0.05}


def test_shipped_losses_keep_the_contract() -> None:
    broken = {
        name: {broken for broken, _ in violations(Method(loss), PAIRS, (), **FIELDS)}
        for name, loss in PAIR_LOSSES.items()
    }
    # The AOT losses sort the micro-batch, and the SFT term is a mean over its tokens.
    batch = {"aot": {"order", "micro-batch"}, "aot_unpaired": {"order", "micro-batch"}, "sft": {"micro-batch"}}
    assert {name: names for name, names in broken.items() if names} == batch
    assert not list(violations(Method(bradley_terry), SCORES, (), **FIELDS))


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_shipped_policy_losses_keep_the_contract(name: str) -> None:
    options = {"high": 0.2} if name == "cispo" else {"low": 0.2, "high": 0.2}
    assert not list(violations(Method(POLICY_LOSSES[name], options), TOKENS, ()))


def own(function: Callable[..., Any]) -> Method:
    return Method(function, path="my_methods:loss")


def compares_the_batch(pairs: PairLogprobs) -> torch.Tensor:
    return -(pairs.margins - pairs.margins.mean())


def sees_the_order(pairs: PairLogprobs) -> torch.Tensor:
    return -pairs.margins * torch.arange(1.0, len(pairs) + 1)


def changes_its_input(pairs: PairLogprobs) -> torch.Tensor:
    pairs.ref_chosen_logprobs.zero_()
    return -pairs.margins


def reads_padding(pairs: PairLogprobs) -> torch.Tensor:
    return -pairs.margins + pairs.chosen_token_logprobs.exp().sum(dim=1) - pairs.chosen_mask.sum(dim=1)


def rounds(pairs: PairLogprobs) -> torch.Tensor:
    return -(pairs.margins * 1e7 + 1e12 - 1e12)


def has_no_gradient_at_all(pairs: PairLogprobs) -> torch.Tensor:
    return pairs.margins * 0


def has_an_infinite_gradient(pairs: PairLogprobs) -> torch.Tensor:
    return -(pairs.margins - pairs.margins.detach()).abs().sqrt()


@pytest.mark.parametrize(
    ("function", "name", "problem"),
    [
        (compares_the_batch, "micro-batch", "items one by one"),
        (sees_the_order, "order", "items in another order: the loss of item"),
        (changes_its_input, "inputs", "changes ref_chosen_logprobs in place"),
        (reads_padding, "mask", "chosen_token_logprobs changed outside the mask"),
        (rounds, "dtype", "float32 instead of float64"),
        (has_no_gradient_at_all, "gradient", "is 0 everywhere"),
        (has_an_infinite_gradient, "gradient", "the gradient of chosen_logprobs is"),
    ],
)
def test_broken_property_is_named(function: Callable[..., Any], name: str, problem: str) -> None:
    with pytest.raises(UserError) as error:
        check(own(function), PAIRS, "stages.dpo.loss")
    assert str(error.value).startswith(f"stages.dpo.loss: my_methods:loss fails the check '{name}': ")
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda pairs: 1.0, "returned a float; return a tensor of shape (6,)"),
        (lambda pairs: -pairs.margins.mean(), "of shape (); return (6,); align takes the mean"),
        (lambda pairs: pairs.chosen_token_logprobs, "of shape (6, 7); return (6,)"),
        (lambda pairs: pairs.margins > 0, "of type torch.bool"),
        (lambda pairs: -pairs.margins.detach(), "no gradient"),
        (lambda pairs: pairs.margins.log(), "losses must be finite"),
        (lambda pairs: (-pairs.margins, 3), "its metrics are a int"),
        (lambda pairs: (-pairs.margins, {"a b": 1.0}), "a metric called 'a b'"),
        (lambda pairs: (-pairs.margins, {"m": float("nan")}), "nan as the metric 'm'"),
        (
            lambda pairs: (-pairs.margins, {"m": torch.ones(2, 3)}),
            "'m' is a tensor of shape (2, 3); return a number, or",
        ),
        (lambda pairs: (-pairs.margins, {"m": "high"}), "'high' as the metric 'm'"),
        (lambda pairs: pairs.nothing, "AttributeError"),
    ],
)
def test_wrong_result_is_refused_before_training(function: Callable[..., Any], problem: str) -> None:
    with pytest.raises(UserError) as error:
        check(own(function), PAIRS, "dpo.loss")
    assert problem in str(error.value)
    assert "on synthetic numbers" in str(error.value)


@pytest.mark.parametrize(
    ("form", "function"),
    [
        (SCORES, lambda pairs: -(pairs.chosen_scores - pairs.rejected_scores - pairs.margins)),
        (ANSWERS, lambda tokens: -tokens.logprobs * torch.where(tokens.position < 2, 2.0, 1.0)),
    ],
)
def test_losses_of_scores_and_tokens_are_checked(form: Form, function: Callable[..., Any]) -> None:
    check(own(function), form, "loss")
    with pytest.raises(UserError, match="changes "):
        check(own(lambda items: [tensor.zero_() for tensor in vars(items).values() if hasattr(tensor, "zero_")]
                  and function(items)), form, "loss")  # fmt: skip


def test_check_shows_rows_of_the_stage() -> None:
    def loss(pairs: PairLogprobs) -> torch.Tensor:
        return -pairs.margins * torch.tensor([row["weight"] for row in pairs.rows])

    check(own(loss), PAIRS, "loss", [{"id": "a", "weight": 1.0}, {"id": "b", "weight": 2.0}])
    with pytest.raises(UserError, match="KeyError: 'weight', rows a, a, a and 3 more"):
        check(own(loss), PAIRS, "loss", [{"id": "a"}])


def test_failure_names_line_rows_and_step() -> None:
    def fails(pairs: PairLogprobs) -> torch.Tensor:
        raise ZeroDivisionError("no margin")

    record = sample_pairs()
    with pytest.raises(FunctionFailed) as error:
        own(fails)(record, (6,), "at step 3")
    line = fails.__code__.co_firstlineno + 1
    assert str(error.value) == (
        f"my_methods:loss (test_contract.py:{line}): ZeroDivisionError: no margin, at step 3, rows synthetic-0, "
        "synthetic-1, synthetic-2 and 3 more"
    )


def test_options_come_before_the_stages_fields() -> None:
    def loss(pairs: PairScores, beta: float, label_smoothing: float) -> torch.Tensor:
        return pairs.chosen_scores * beta + label_smoothing

    scores = PairScores(torch.ones(2), torch.zeros(2), torch.zeros(2))
    result = Method(loss, {"beta": 3.0})(
        scores, (2,), fields={"beta": 0.1, "label_smoothing": 0.5, "discopop_tau": 1.0}
    )
    assert result.values.tolist() == [3.5, 3.5]


def test_position_counts_learned_tokens() -> None:
    mask = torch.tensor([[False, True, False, True], [True, True, True, False]])
    assert AnswerTokens(torch.zeros(2, 4), mask).position.tolist() == [[0, 0, 0, 1], [0, 1, 2, 2]]


def test_metrics_of_tokens_are_averaged_over_the_mask() -> None:
    mask = torch.tensor([[True, False], [True, True]])

    def loss(tokens: AnswerTokens) -> tuple[torch.Tensor, dict[str, Any]]:
        token = torch.tensor([[1.0, 9.0], [2.0, 3.0]])
        return -tokens.logprobs, {"token": token, "item": torch.tensor([1.0, 3.0]), "number": 4}

    result = own(loss)(AnswerTokens(torch.zeros(2, 2, requires_grad=True), mask), (2, 2))
    assert result.means(mask) == {"token": 2.0, "item": 2.0, "number": 4.0}
    # Without a learned token there is nothing to average.
    assert "token" not in result.means(torch.zeros_like(mask))


def test_metric_of_the_only_response_counts_if_it_is_learned() -> None:
    def loss(tokens: ResponseTokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return -tokens.new_logprobs, {"response": torch.tensor([7.0])}

    nothing = torch.zeros(1, 1)
    for is_learned in (True, False):
        mask = torch.tensor([[is_learned]])
        tokens = make_tokens(nothing.clone().requires_grad_(), nothing, nothing, mask)
        total, count = PolicyLoss(own(loss), "token")(tokens, 1.0).others["response"]
        assert (float(total), count) == ((7.0, 1) if is_learned else (0.0, 0))
