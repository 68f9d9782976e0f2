"""Every way of fitting that folds into weights: it learns, and a killed stage goes on bit for bit.

Each stage has some of them here and the rest among the slow tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from align.config.options import peft_types
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Kind
from tests.support.models.tuning.tuning_cases import CASES, FEW, peft_case
from tests.support.training.harness import context, data_artifact, events, losses
from tests.support.training.killed_stage import Killed, dying

KILLED_AT, RESUMED_FROM, STEPS = 7, 6, 10
REWARD_RATES = {"peanut": 2e-2, "randlora": 1e-2, "waveft": 2e-2}
"""Learning rates for methods of peft with which ten steps of a reward model overshoot at 5e-2."""


def learning_rate(kind: str, tuning: dict[str, Any]) -> float:
    """Return a rate at which ten steps show that the tuning learns."""
    rate = 1e-2 if "lora" in tuning["method"] else 5e-2
    return REWARD_RATES.get(str(tuning.get("type")), rate) if kind == "reward" else rate


def made(kind: str, root: Path, model: Path, tuning: dict[str, Any]) -> StageContext:
    source = "policy" if kind == "dpo" else "model"
    config = STAGES[kind].config_class()(
        **{source: "model"},
        data="data",
        tuning=tuning,
        learning_rate=learning_rate(kind, tuning),
        epochs=2,
        batch_size=8,
        micro_batch_size=8,
        max_length=128,
        save_steps=3,
        precision="float32",
    )
    return context(root, config, model, data_artifact(root / "data", Kind.PREFERENCES), source)


def check(kind: str, name: str, model: Path, tmp_path: Path, left: float = 0.9) -> None:
    run, tuning = STAGES[kind].runner(), CASES.get(name) or peft_case(name)
    full, parts = (made(kind, tmp_path / part, model, tuning) for part in ("whole", "parts"))
    metrics = run(full)
    assert metrics["loss_last"] < left * metrics["loss_first"]
    assert 0 < metrics["trainable_parameters"] < metrics["parameters"]
    (output,) = events(full, "note")
    assert (
        f": {metrics['trainable_parameters']:,} of {metrics['parameters']:,} parameters are trained"
        in output["message"]
    )
    with pytest.raises(Killed):
        run(dying(parts, KILLED_AT))
    resumed = run(parts)
    assert (resumed["resumed_from_step"], resumed["steps"]) == (RESUMED_FROM, STEPS)
    assert losses(parts) == losses(full)
    expected, actual = (load_file(each.output / "model" / "model.safetensors") for each in (full, parts))
    assert expected.keys() == actual.keys()
    assert all(expected[key].equal(actual[key]) for key in expected)
    # what a checkpoint has beside the optimizer is the adapter, not the model
    adapter = full.checkpoints / "checkpoint-10" / "adapter_model.safetensors"
    assert adapter.is_file() and not (adapter.parent / "model.safetensors").exists()


SHORT = {"sft": ("pissa_dora", "loftq", "ia3", "vera"), "reward": ("nf4",), "dpo": ("olora",)}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in SHORT for name in SHORT[kind]])
def test_it_learns_and_resumes_bit_for_bit(kind: str, name: str, tiny_model: Path, tmp_path: Path) -> None:
    check(kind, name, tiny_model, tmp_path)


REST = [*CASES, *(kind for kind in peft_types() if kind not in FEW)]


@pytest.mark.slow
@pytest.mark.parametrize("name", REST)
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_so_does_every_other(kind: str, name: str, tiny_model: Path, tmp_path: Path) -> None:
    if name in SHORT[kind]:
        pytest.skip("has run")
    check(kind, name, tiny_model, tmp_path, 0.99)  # ten steps at one rate for all: some have hardly begun
