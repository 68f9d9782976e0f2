"""A stage that learns from its own samples is killed around its checkpoints and after its last update.

``ppo``, ``grpo``, ``rloo``, ``online_dpo`` and ``rejection`` end with the weights, metrics and curves of the run that
nobody killed, however many updates they were to make and whatever ends them early.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.config.runtime import Runtime
from align.data.rows import assistant, user, write_rows
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.rl import online_trainer
from align.rl.alarms import Alarm
from align.store.artifacts import Artifact, Kind
from tests.support.training.kills import Kill, assert_same, kills, run, run_killed

COMMON: dict[str, Any] = {
    "policy": "policy", "prompts": "prompts", "score": "tests.support.stages.vowels:share", "learning_rate": 1e-3,
    "rollout_batch": 8, "samples_per_prompt": 4, "updates": 5, "save_updates": 2, "num_epochs": 2,
    "num_mini_batches": 1, "max_tokens": 6,
    "max_prompt_tokens": 64, "precision": "float32", "scheduler": "linear", "tuning": {"method": "lora", "rank": 4},
}  # fmt: skip
CHECKPOINTS = (4, 8, 10)
"""Two optimizer steps an update."""
KINDS: dict[str, dict[str, Any]] = {
    "ppo": {"normalize_scores": True, "kl_controller": "adaptive", "kl_target": 0.1, "kl_horizon": 50},
    "grpo": {"zero_variance": "resample"},
    "rloo": {"whiten_advantages": True},
    "online_dpo": {"micro_batch_size": 2},
    "rejection": {"best": 2, "truncated": "learn"},
}
WAYS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "one-update": ({"updates": 1}, (2,)),
    "every-update": ({"updates": 3, "save_updates": 1}, (2, 4, 6)),
    "mini-batches": ({"num_epochs": 1, "num_mini_batches": 2, "micro_batch_size": 2}, CHECKPOINTS),
    "full": ({"tuning": {"method": "full"}}, CHECKPOINTS),
    "keep-best": ({"eval_updates": 1, "keep": "best"}, CHECKPOINTS),
    "validated-at-the-end": ({"eval_updates": 2}, CHECKPOINTS),
    "ahead": ({"max_staleness": 2}, CHECKPOINTS),
    "ptx": ({"ptx": "rows", "ptx_coef": 0.5, "ptx_rows": 2}, CHECKPOINTS),
    "critic-warmup": ({"critic_warmup_updates": 2}, CHECKPOINTS),
}


def make_stage(kind: str, root: Path, model: Path, **fields: Any) -> StageContext:
    """A context of ``kind``; the second with the same ``root`` goes on with the first one's checkpoints."""
    config = STAGES[kind].config_class()(**{**COMMON, **KINDS[kind], **fields})
    data = root / "data"
    for name in ("output", "checkpoints", "data", "policy"):
        (root / name).mkdir(parents=True, exist_ok=True)
    if not (root / "policy" / "model").exists():
        (root / "policy" / "model").symlink_to(model)
    rows = [
        {"id": str(n), "source": "t", "checks": "", "prompt": [user(f"say {'x' * n}")], "completion": [assistant("oa")]}
        for n in range(8)
    ]
    write_rows(data / "train.parquet", rows)
    write_rows(data / "test.parquet", rows[:3])
    inputs: dict[str, Any] = {
        "policy": Artifact("policy", Kind.POLICY, root / "policy", {}),
        "prompts": Artifact("prompts", Kind.PROMPTS, data, {}),
        "ptx": Artifact("rows", Kind.INSTRUCTIONS, data, {}) if "ptx" in fields else None,
        "reward": None,
    }
    runtime = Runtime.model_validate({"device": "cpu", "engine": {"name": "transformers"}, "threads": 1})
    return StageContext(kind, config, inputs, 5, runtime, root / "output", root / "checkpoints", root / "events.jsonl")


Check = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def check(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Check:
    """``check(kind, kills, **fields)``: a stage killed at each of them ends as the one that ran through.

    That one is made once for the same fields; its metrics are returned.
    """
    runs: dict[str, tuple[StageContext, dict[str, Any]]] = {}

    def killed(kind: str, sequence: list[Kill], **fields: Any) -> dict[str, Any]:
        name = f"{kind} {sorted(fields.items())}"
        if name not in runs:
            whole = make_stage(kind, tmp_path_factory.mktemp("whole"), tiny_model, **fields)
            runs[name] = whole, run(whole)
        whole, expected = runs[name]
        stage = make_stage(kind, tmp_path_factory.mktemp("killed"), tiny_model, **fields)
        assert_same(whole, stage, expected, run_killed(stage, sequence))
        responses = [(each.output / "completions.jsonl").read_text(encoding="utf-8") for each in (whole, stage)]
        assert responses[0] == responses[1]
        return expected

    return killed


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_killed_around_its_last_checkpoint_makes_no_more_updates(kind: str, check: Check) -> None:
    assert check(kind, [Kill("after", CHECKPOINTS[-1]), Kill("saved")])["updates"] == 5


@pytest.mark.parametrize("way", ["one-update", "keep-best", "ahead"])
def test_however_long_it_lasts_a_killed_stage_ends_where_the_whole_one_does(way: str, check: Check) -> None:
    fields, steps = WAYS[way]
    check("ppo", [Kill("unmarked", steps[-1]), Kill("after", steps[-1])], **fields)


def test_a_run_that_an_alarm_stops_stays_stopped_and_keeps_its_alarm(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alarm comes with the update whose checkpoint is written next."""

    def at_the_fourth(history: Any) -> list[Alarm]:
        return [Alarm("collapse", 4, "the policy says the same to everything")] if len(history) >= 4 else []

    monkeypatch.setattr(online_trainer, "alarms", at_the_fourth)
    metrics = check("ppo", [Kill("after", 8), Kill("trained"), Kill("saved")], on_alarm="stop", updates=8)
    assert metrics["updates"] == 4
    assert metrics["alarms"] == ["update 4: collapse"]
    assert metrics["stopped"].startswith("update 4: collapse")


def test_a_run_over_its_kl_budget_ends_there_again(check: Check) -> None:
    fields = {"kl_budget": 0.05, "updates": 12, "learning_rate": 1e-2}
    metrics = check("ppo", [Kill("after", 4), Kill("trained"), Kill("saved")], **fields)
    assert "over kl_budget" in metrics["stopped"]
    assert 2 <= metrics["updates"] < 12


@pytest.mark.slow
@pytest.mark.parametrize("kill", kills(CHECKPOINTS), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_kill_changes_nothing(kind: str, kill: Kill, check: Check) -> None:
    check(kind, [kill])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_kills_at_every_moment_change_nothing(way: str, check: Check) -> None:
    fields, steps = WAYS[way]
    check("ppo", kills(steps), **fields)
