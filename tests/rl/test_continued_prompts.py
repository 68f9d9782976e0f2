"""A stage of rollouts that continues a finished one: the weights of one run of as many updates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from align.data.rows import assistant, user, write_rows
from align.errors import UserError
from align.models.loading import load_tokenizer
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.rl.prompts import Prompts
from align.rl.trainer import RLTrainer
from align.store.artifacts import Artifact, Kind
from align.training.row_history import Continuation
from tests.support.rl.stages import KINDS, make_stage
from tests.support.training.harness import events

FIELDS = {"scheduler": "constant", "save_updates": 100}


def stage(kind: str, root: Path, model: Path, **fields: Any) -> StageContext:
    return make_stage(kind, root, model, **{**FIELDS, **fields})


def train(context: StageContext) -> dict[str, Any]:
    """Run the stage whose kind has the context's config."""
    (kind,) = [kind for kind in KINDS if isinstance(context.config, STAGES[kind].config_class())]
    return STAGES[kind].runner()(context)


def continuing(
    first: StageContext, kind: str, root: Path, model: Path, change: dict[str, Any] | None = None, **fields: Any
) -> StageContext:
    source = "first" if change is None else {"stage": "first", "change": change}
    context = stage(kind, root, model, continue_from=source, **fields | (change or {}))
    artifact = Artifact("first", Kind.POLICY, first.output, {"key": "first", "metrics": {}, "outputs": {}})
    return dataclasses.replace(context, inputs={**context.inputs, "continue_from": artifact})


def assert_equal_weights(first: StageContext, second: StageContext) -> None:
    expected, actual = (load_file(context.output / "model" / "model.safetensors") for context in (first, second))
    assert expected.keys() == actual.keys()
    assert all(expected[name].equal(actual[name]) for name in expected)


FULL: dict[str, Any] = {"tuning": {"method": "full"}, "warmup_ratio": 0.0}
WAYS: dict[str, tuple[str, dict[str, Any], int]] = {
    **{kind: (kind, {}, 2) for kind in KINDS},
    "ppo-full": ("ppo", {**FULL, "num_mini_batches": 2}, 1),
    "ppo-best": ("ppo", {"eval_updates": 1, "keep": "best", "eval_prompts": 2}, 2),
}
QUICK = ("ppo", "grpo")
"""The others are slow tests."""


@pytest.mark.parametrize("way", [pytest.param(way, marks=() if way in QUICK else pytest.mark.slow) for way in WAYS])
def test_more_updates_equal_all_updates_at_once(way: str, tiny_model: Path, tmp_path: Path) -> None:
    kind, fields, split = WAYS[way]
    at_once = stage(kind, tmp_path / "at_once", tiny_model, updates=4, **fields)
    metrics_at_once = train(at_once)
    first = stage(kind, tmp_path / "first", tiny_model, updates=split, **fields)
    assert train(first)["state_bytes"] > 0
    more = continuing(first, kind, tmp_path / "more", tiny_model, updates=4, **fields)
    metrics = train(more)
    assert (metrics["updates"], metrics["continued_from_update"]) == (4, split)
    updates = [event["step"] for event in events(more, "metrics") if "score" in event]
    assert updates == list(range(split + 1, 5))
    assert metrics["tokens"] == metrics_at_once["tokens"]
    assert metrics["score_last"] == metrics_at_once["score_last"]
    assert_equal_weights(at_once, more)
    assert {file.suffix for file in (more.output / "state").iterdir()} <= {".json", ".safetensors"}


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_changed_settings_equal_training_continued_by_hand(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer's averages, the scale of scores, random numbers and prompts are those of the first stage."""
    sample = RLTrainer.sample

    def change_by_hand(self: Any, update: int) -> Any:
        if update == 2:
            self.kl_controller.value = 0.5
            self.lr_scheduler.base_lrs = [2 * rate for rate in self.lr_scheduler.base_lrs]
            for group in self.optimizer.param_groups:
                group["lr"] *= 2
            self.objective.config = self.objective.config.model_copy(update={"length_penalty": 0.01})
            parts = tuple(dataclasses.replace(part, weight=3.0) for part in self.sampler.scorer.parts)
            self.sampler.scorer = dataclasses.replace(self.sampler.scorer, parts=parts)
        return sample(self, update)

    # The critic's rate is then the policy's, and changes with it.
    fields = {"critic_learning_rate": None} if kind == "ppo" else {}
    by_hand = stage(kind, tmp_path / "by_hand", tiny_model, updates=4, **fields)
    with monkeypatch.context() as patch:
        patch.setattr(RLTrainer, "sample", change_by_hand)
        train(by_hand)
    first = stage(kind, tmp_path / "first", tiny_model, updates=2, **fields)
    train(first)
    change = {"kl_coef": 0.5, "learning_rate": 2e-3, "length_penalty": 0.01, "score_weight": 3.0}
    more = continuing(first, kind, tmp_path / "more", tiny_model, change=change, updates=4, **fields)
    metrics = train(more)
    assert_equal_weights(by_hand, more)
    assert metrics["changed"].keys() == change.keys()
    (event,) = events(more, "change")
    assert event["step"] == 2
    unchanged = continuing(first, kind, tmp_path / "unchanged", tiny_model, updates=4, **fields)
    train(unchanged)
    with pytest.raises(AssertionError):
        assert_equal_weights(unchanged, more)


def test_sampling_and_prompts_may_change_after_an_early_end(tiny_model: Path, tmp_path: Path) -> None:
    first = stage("ppo", tmp_path / "first", tiny_model, updates=9, save_updates=1, kl_budget=1e-9)
    metrics = train(first)
    assert "the KL to the reference is" in metrics["stopped"]
    change = {"kl_budget": None, "temperature": 0.7, "max_tokens": 4, "max_prompt_tokens": 60}
    more = continuing(first, "ppo", tmp_path / "more", tiny_model, change=change, updates=9, save_updates=1)
    assert (metrics["updates"] < 9, train(more).get("stopped")) == (True, None)
    lengths = [event["length"] for event in events(more, "metrics") if "length" in event]
    assert max(lengths) <= 4


def test_a_stage_without_an_update_left_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    first = stage("grpo", tmp_path / "first", tiny_model, updates=1)
    train(first)
    with pytest.raises(UserError, match=r"end after 1 updates, and 'first' has done 1. .* Raise updates\."):
        train(continuing(first, "grpo", tmp_path / "more", tiny_model, updates=1))


def test_validations_begin_and_end_with_any_part_of_a_run(tiny_model: Path, tmp_path: Path) -> None:
    first = stage("grpo", tmp_path / "first", tiny_model, updates=1)
    train(first)
    second = continuing(first, "grpo", tmp_path / "second", tiny_model, updates=2, eval_updates=1, eval_prompts=2)
    metrics = train(second)
    assert metrics["updates"] == 2 and metrics["seconds_validating"] > 0
    assert [event["step"] for event in events(second, "metrics") if "test_score" in event] == [1, 2]
    third = continuing(second, "grpo", tmp_path / "third", tiny_model, updates=3)
    assert train(third)["seconds_validating"] == metrics["seconds_validating"]


def test_new_prompts_come_first_and_then_all(tiny_model: Path, tmp_path: Path) -> None:
    """2 prompts an update; 2 of the 8 are done when 3 new ones are added."""
    first = stage("grpo", tmp_path / "first", tiny_model, updates=1)
    train(first)
    more = continuing(first, "grpo", tmp_path / "more", tiny_model, updates=3)
    old = [{"id": str(n), "source": "t", "checks": "", "prompt": [user(f"say {'x' * n}")]} for n in range(8)]
    new = [{"id": f"n{n}", "source": "t", "checks": "", "prompt": [user(f"sing {'y' * n}")]} for n in range(3)]
    rows = [{**row, "completion": [assistant("oa")]} for row in [*old, *new]]
    write_rows(tmp_path / "more" / "data" / "train.parquet", rows)
    train(more)
    history = load_file(more.output / "state" / "rows.safetensors")
    # 6 old prompts and 3 new ones had never been sampled from; 4 of these are done now, beside the first 2.
    assert len(history["first"]) == 9 and len(history["trained"]) == 6


def test_prompts_go_on_with_the_new_ones_and_then_in_epochs(tiny_model: Path) -> None:
    prompts = Prompts([{"prompt": "a" * n} for n in range(1, 6)], load_tokenizer(tiny_model), None)
    plain = [prompts.next(range(start, start + 3), 1) for start in (0, 3)]
    assert plain == [prompts.draw(0, 3, 1), prompts.draw(3, 3, 1)]
    prompts.continuation = Continuation([4, 2], start=6)
    assert prompts.next(range(6, 9), 1) == [4, 2, *prompts.draw(0, 1, 1)]
    assert prompts.next(range(9, 12), 1) == prompts.draw(1, 3, 1)
