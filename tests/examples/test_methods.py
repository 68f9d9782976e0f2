"""Every loss of ``examples/methods.py``: the contract, and one update worked by hand."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch

from align.methods.call import Method
from align.methods.contract import ANSWERS, PAIRS, SCORES, check, response_form
from align.methods.records import AnswerTokens, PairLogprobs, PairScores, ResponseTokens
from examples import methods

FORMS = {PairLogprobs: PAIRS, PairScores: SCORES, AnswerTokens: ANSWERS}
LOSSES = {
    name: function
    for name, function in vars(methods).items()
    if inspect.isfunction(function) and function.__module__ == methods.__name__ and not name.startswith("_")
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_keeps_the_contract(name: str) -> None:
    function = LOSSES[name]
    kind = inspect.get_annotations(function, eval_str=True)[next(iter(inspect.signature(function).parameters))]
    method = Method(function, path=f"examples.methods:{name}")
    check(method, FORMS.get(kind) or response_form(method), "loss", beta=0.1)
    assert "arXiv" in (function.__doc__ or "") or name in ("cdpo", "score_hinge")
    assert len(inspect.getsource(function).splitlines()) <= 30


# Two responses of two tokens: advantages 1 and -1, ratios 1.5 and 0.5 as well as 2 and 1.
OLD = torch.log(torch.tensor([[0.2, 0.4], [0.1, 0.5]]))
NEW = torch.log(torch.tensor([[0.3, 0.2], [0.2, 0.5]]))
RESPONSES = ResponseTokens(
    new_logprobs=NEW,
    logprobs=OLD,
    sampler_logprobs=OLD,
    ref_logprobs=OLD,
    advantages=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
    entropy=torch.tensor([[0.5, 2.0], [1.0, 0.1]]),
    mask=torch.ones(2, 2, dtype=torch.bool),
    group=torch.tensor([0, 0]),
)
# One pair: log-ratios 0.5 and -1.5 over 2 and 4 tokens.
PAIR = PairLogprobs(
    chosen_logprobs=torch.tensor([-2.0]),
    rejected_logprobs=torch.tensor([-4.0]),
    ref_chosen_logprobs=torch.tensor([-2.5]),
    ref_rejected_logprobs=torch.tensor([-2.5]),
    chosen_token_logprobs=torch.full((1, 4), -1.0),
    rejected_token_logprobs=torch.full((1, 4), -1.0),
    chosen_mask=torch.tensor([[True, True, False, False]]),
    rejected_mask=torch.ones(1, 4, dtype=torch.bool),
)
WORSE = PairLogprobs(**{**vars(PAIR), "ref_chosen_logprobs": torch.tensor([-1.5])})  # chosen log-ratio -0.5
TOKENS = AnswerTokens(torch.log(torch.tensor([[0.5, 0.25]])), torch.ones(1, 2, dtype=torch.bool))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize(
    ("name", "record", "options", "expected"),
    [
        ("gpg", RESPONSES, {}, [[-math.log(0.3), -math.log(0.2)], [math.log(0.2), math.log(0.5)]]),
        ("sapo", RESPONSES, {}, [[-4 * sigmoid(0.5), -4 * sigmoid(-0.5)],
                                 [4 / 1.05 * sigmoid(1.05), 4 / 1.05 * sigmoid(0.0)]]),
        # One of two tokens: of the first response the second (ratio 0.5), of the second the first (2).
        ("high_entropy", RESPONSES, {"share": 0.2}, [[0, -0.5], [2, 0]]),
        # Ratios of the responses: 0.75, which does not matter above the mean, and 2, capped at 1.
        ("topr", RESPONSES, {}, [-math.log(0.06), math.log(0.1)]),
        ("kimi", RESPONSES, {"tau": 0.2}, [-math.log(0.06) + 0.1 * math.log(0.75) ** 2,
                                           math.log(0.1) + 0.1 * math.log(2) ** 2]),
        # log 1.5 = 0.405 is cut to 0.4 and log 0.5 kept; for a negative advantage log 2 and 0 are kept.
        ("gmpo", RESPONSES, {}, [-math.exp((0.4 + math.log(0.5)) / 2), math.exp(math.log(2) / 2)]),
        ("cdpo", PAIR, {"beta": 0.5, "flipped": 0.25}, [-0.75 * math.log(sigmoid(1)) - 0.25 * math.log(sigmoid(-1))]),
        ("dpop", PAIR, {"beta": 0.5}, [-math.log(sigmoid(1))]),
        # The chosen answer lost 0.5 nats: the margin of 1 falls by 2 x 0.5.
        ("dpop", WORSE, {"beta": 0.5, "weight": 2.0}, [-math.log(sigmoid(0))]),
        ("simper", PAIR, {}, [math.exp(-1) - math.exp(-1)]),
        ("score_hinge", PairScores(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.0]), torch.zeros(2)), {}, [0.5, 0]),
        ("focal", TOKENS, {"gamma": 2.0}, [[-0.25 * math.log(0.5), -0.5625 * math.log(0.25)]]),
        ("dft", TOKENS, {}, [[-0.5 * math.log(0.5), -0.25 * math.log(0.25)]]),
    ],
)  # fmt: skip
def test_loss_equals_hand_computation(name: str, record: Any, options: dict[str, float], expected: list[Any]) -> None:
    assert torch.allclose(LOSSES[name](record, **options), torch.tensor(expected, dtype=torch.float32), atol=1e-6)


def test_weights_without_gradient_have_none() -> None:
    logprobs = TOKENS.logprobs.clone().requires_grad_()
    methods.dft(AnswerTokens(logprobs, TOKENS.mask)).sum().backward()
    assert logprobs.grad is not None
    # The derivative of -p log p with p held is -p.
    assert torch.allclose(logprobs.grad, torch.tensor([[-0.5, -0.25]]))
