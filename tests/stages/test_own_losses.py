"""Own losses in dpo, reward and sft: an own function equal to the shipped loss trains the same weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from align.config.own_function import OwnFunction
from align.config.stages.preference import DpoConfig
from align.config.stages.reward import RewardConfig
from align.config.stages.sft import SftConfig
from align.config.validation import validate
from align.errors import UserError
from align.methods.call import FunctionFailed
from align.pipeline.registry import STAGES
from align.store.artifacts import Kind
from tests.support.training.harness import context, data_artifact, events, losses, rows

MODULE = """
import torch
from torch.nn.functional import logsigmoid

def my_dpo(pairs, beta, power=1.0):
    assert [row["prompt"] for row in pairs.rows]
    return -logsigmoid(beta * pairs.margins) ** power, {"own_margin": pairs.margins.mean()}

def my_pairwise(pairs):
    return -logsigmoid(pairs.chosen_scores - pairs.rejected_scores)

seen = set()

def by_length(tokens, early=1.0):
    seen.update((row["id"], int(mask.sum())) for row, mask in zip(tokens.rows, tokens.mask))
    return -tokens.logprobs * early

def fails_later(pairs):
    if len(pairs) == 8:
        raise RuntimeError("eight pairs")
    return -logsigmoid(0.1 * pairs.margins)
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_losses.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_losses", raising=False)


STAGE = {"learning_rate": 1e-3, "max_steps": 3, "batch_size": 8, "max_length": 128, "precision": "float32"}
KINDS: dict[str, tuple[type[Any], dict[str, Any], Kind, str]] = {
    "dpo": (DpoConfig, {"policy": "model"}, Kind.PREFERENCES, "policy"),
    "reward": (RewardConfig, {"model": "model"}, Kind.PREFERENCES, "model"),
    "sft": (SftConfig, {"model": "model"}, Kind.INSTRUCTIONS, "model"),
}


def trained(kind: str, root: Path, model: Path, **fields: Any) -> tuple[list[float], Any]:
    """Return the losses of three steps and the stage's context."""
    config_class, inputs, makes, field = KINDS[kind]
    config = config_class(**inputs, data="data", **STAGE | fields)
    stage = context(root, config, model, data_artifact(root / "data", makes), field)
    STAGES[kind].runner()(stage)
    return [losses(stage)[step] for step in sorted(losses(stage))], stage


@pytest.mark.parametrize(
    ("kind", "loss", "fields"),
    [
        ("dpo", "own_losses:my_dpo", {}),
        ("dpo", "own_losses:my_dpo", {"micro_batch_size": 2}),
        ("reward", "own_losses:my_pairwise", {}),
        ("sft", "own_losses:by_length", {}),
        ("sft", "own_losses:by_length", {"packing": True, "max_length": 64}),
        ("sft", "own_losses:by_length", {"padding_free": True}),
    ],
)
def test_own_loss_trains_as_the_shipped_loss(
    kind: str, loss: str, fields: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    shipped, _ = trained(kind, tmp_path / "shipped", tiny_model, **fields)
    own, stage = trained(kind, tmp_path / "own", tiny_model, loss={"function": loss}, **fields)
    assert own == pytest.approx(shipped, rel=1e-6)
    if kind == "sft":
        # An answer is the prompt's word, so its number of tokens shows that each row came with its own tokens.
        expected = {(row["id"], len(row["completion"][0]["content"]) + 1) for row in rows(40)}
        assert len(expected & sys.modules["own_losses"].seen) >= 24
    if kind == "dpo":
        assert all("own_margin" in event for event in events(stage, "metrics") if "loss" in event)


def test_options_change_the_loss(tiny_model: Path, tmp_path: Path) -> None:
    one, _ = trained("sft", tmp_path / "one", tiny_model, loss={"function": "own_losses:by_length"})
    two, _ = trained("sft", tmp_path / "two", tiny_model, loss={"function": "own_losses:by_length", "early": 2.0})
    assert two[0] == pytest.approx(2 * one[0], rel=1e-5)


def test_failing_loss_names_step_and_rows(tiny_model: Path, tmp_path: Path) -> None:
    problem = r"own_losses:fails_later \(own_losses.py:\d+\): RuntimeError: eight pairs, at step 1, rows \d+, "
    with pytest.raises(FunctionFailed, match=problem):
        trained("dpo", tmp_path, tiny_model, loss={"function": "own_losses:fails_later"}, max_steps=20, eval_rows=4)


BASE = {"policy": "sft", "data": "data", "learning_rate": 1e-5}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("sigmiod", "dpo.loss: should be 'sigmoid', "),
        ("sigmiod", "Did you mean 'sigmoid'?"),
        ({"function": "no path"}, "dpo.loss.function: "),
        ({"margin": 1}, "dpo.loss.function: this key is required and missing."),
    ],
)
def test_misspelled_loss_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        validate(DpoConfig, BASE | {"loss": loss}, "p.yaml: dpo")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("own_losses:my_dop", "own_losses has no function 'my_dop'. Did you mean 'my_dpo'?"),
        ({"function": "own_losses:my_dpo", "pwer": 1}, "loss: my_dpo has no argument 'pwer'. Did you mean 'power'?"),
        ("no_module:loss", "there is no module 'no_module'"),
    ],
)
def test_plan_checks_function_and_options(loss: Any, message: str, tmp_path: Path) -> None:
    config = validate(DpoConfig, BASE | {"loss": loss}, "p.yaml: dpo")
    with pytest.raises(UserError) as error:
        config.identities(tmp_path)
    assert message in str(error.value)


def test_source_of_the_loss_is_part_of_the_key(tmp_path: Path) -> None:
    config = validate(DpoConfig, BASE | {"loss": "own_losses:my_dpo"}, "dpo")
    assert isinstance(config.loss, OwnFunction)
    before = config.identities(tmp_path)
    (tmp_path / "own_losses.py").write_text(MODULE.replace("power=1.0", "power=2.0"), encoding="utf-8")
    assert config.identities(tmp_path) != before
    assert validate(DpoConfig, BASE, "dpo").identities(tmp_path) == {}
    # The record holds the block, and it is read back from there.
    assert validate(DpoConfig, config.model_dump(mode="json"), "dpo") == config


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("dpo", {"label_smoothing": 0.1}, "label_smoothing is of the shipped losses"),
        ("reward", {"label_smoothing": 0.1}, "label_smoothing is of bradley_terry"),
        ("reward", {"objective": "regression"}, "loss is for pairs, and objective is regression"),
        ("sft", {"trainer": {"loss_type": "dft"}}, "trainer.loss_type is another loss than the own function"),
    ],
)
def test_fields_of_shipped_losses_are_refused(kind: str, fields: dict[str, Any], message: str) -> None:
    config_class, inputs, _, _ = KINDS[kind]
    settings = inputs | {"data": "data", "learning_rate": 1e-5, "loss": "own_losses:my_dpo"} | fields
    with pytest.raises(UserError, match=message):
        validate(config_class, settings, "p")
