"""The count of memory against real stages: a few cheap configurations here, all of them in the benchmark."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from align.config.tuning import LoraTuning, QloraTuning
from align.models.compute.model_types import architecture_of
from benchmarks.memory_plan import BILLION_CONFIGURATIONS, CONFIGURATIONS, counted
from benchmarks.memory_run import BILLION

TUNINGS = {"lora": LoraTuning(), "qlora": QloraTuning()}
REPOSITORY = Path(__file__).parents[2]


def test_there_are_enough_configurations_of_every_kind() -> None:
    assert len(CONFIGURATIONS) >= 12
    kinds = {
        (configuration.stage, configuration.fields["tuning"]["method"])
        for configuration in CONFIGURATIONS
        if configuration.stage != "sample"
    }
    assert kinds == {(stage, method) for stage in ("sft", "reward", "dpo", "ppo") for method in ("lora", "full")}
    assert {
        bool(configuration.fields.get("reward")) for configuration in CONFIGURATIONS if configuration.stage == "sample"
    } == {True, False}
    assert len({configuration.length for configuration in CONFIGURATIONS}) >= 5
    assert all(sum(counted(configuration).values()) < 4 * 2**30 for configuration in CONFIGURATIONS)


@pytest.mark.parametrize(("method", "most"), [("lora", 2.2), ("qlora", 0.7)])
def test_base_parameter_of_a_billion_costs_at_most(method: str, most: float) -> None:
    kinds = {c.stage: c for c in BILLION_CONFIGURATIONS if c.fields["tuning"]["method"] == method}
    assert set(kinds) == {"sft", "dpo", "ppo", "grpo"}
    model = architecture_of(BILLION)
    assert model.parameters == 1_100_048_384
    adapters = model.adapters(TUNINGS[method], "model")
    for configuration in kinds.values():
        assert (counted(configuration)["weights"] - 4 * adapters) / model.parameters <= most


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "ppo", "sample"])
def test_a_real_stage_holds_what_was_counted(stage: str) -> None:
    kind = "reward" if stage == "sample" else "lora"
    wanted = next(
        configuration for configuration in CONFIGURATIONS if configuration.label.startswith(f"{stage:<6} {kind}")
    )
    command = [sys.executable, "-m", "benchmarks.memory_plan", "--only", wanted.label]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "1 of 1 within 15%" in done.stdout
