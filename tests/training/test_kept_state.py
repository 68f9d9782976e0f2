"""A stage that continues a finished one: the weights of one run of as many steps, or the error that says why not."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from align.data.rows import read_rows, write_rows
from align.errors import UserError
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind
from align.training.kept_state import STABLE, OwnSettings, UnknownState, pack, unpack
from align.training.order import GroupedOrder
from align.training.row_history import Continuation, ContinuedOrder, passed_rows
from align.training.stopping import VALIDATION_LOSS, BestSoFar
from tests.support.training import aimed_stages
from tests.support.training.harness import events, losses, rows
from tests.support.training.killed_stage import Killed, dying
from tests.support.training.training_stages import FULL, make_stage

LORA = {"method": "lora", "rank": 4, "dropout": 0.1}
FIELDS = {"scheduler": "constant", "save_steps": 100, "epochs": 3}


def run(context: StageContext) -> dict[str, Any]:
    return STAGES[context.config.__class__.__name__.removesuffix("Config").lower()].runner()(context)


def stage(kind: str, root: Path, model: Path, tuning: dict[str, Any], **fields: Any) -> StageContext:
    return make_stage(kind, root, model, tuning, **{**FIELDS, **fields})


def continuing(
    first: StageContext, kind: str, root: Path, model: Path, change: dict[str, Any] | None = None, **fields: Any
) -> StageContext:
    """Return the context of a stage that continues the finished stage of ``first``, with the settings of ``change``."""
    tuning = first.config.tuning.model_dump()
    source = "first" if change is None else {"stage": "first", "change": change}
    context = stage(kind, root, model, tuning, continue_from=source, **fields | (change or {}))
    return dataclasses.replace(context, inputs={**context.inputs, "continue_from": finished(first, kind)})


def finished(first: StageContext, kind: str) -> Artifact:
    """Return the artifact of a stage that has run: the folder that the runner would publish."""
    makes = Kind.REWARD if kind == "reward" else Kind.POLICY
    return Artifact("first", makes, first.output, {"key": "first", "metrics": {}, "outputs": {}})


def weights(context: StageContext) -> dict[str, torch.Tensor]:
    return load_file(context.output / "model" / "model.safetensors")


def assert_equal_weights(first: StageContext, second: StageContext) -> None:
    expected, actual = weights(first), weights(second)
    assert expected.keys() == actual.keys()
    assert all(expected[name].equal(actual[name]) for name in expected)


WAYS = {
    "sft-lora": ("sft", LORA, {}, 6),
    "sft-full": ("sft", FULL, {"weight_decay": 0.1, "ema": 0.9}, 5),
    "reward": ("reward", LORA, {}, 6),
    "dpo": ("dpo", FULL, {}, 7),
    "inverse_sqrt": ("sft", FULL, {"scheduler": "inverse_sqrt"}, 6),
    "best": ("sft", FULL, {"keep": "best", "eval_steps": 2}, 6),
}
QUICK = ("sft-lora", "sft-full", "reward", "dpo")
"""The others are slow tests."""


@pytest.mark.parametrize("way", [pytest.param(way, marks=() if way in QUICK else pytest.mark.slow) for way in WAYS])
def test_more_steps_equal_all_steps_at_once(way: str, tiny_model: Path, tmp_path: Path) -> None:
    kind, tuning, fields, split = WAYS[way]
    steps = {"max_steps": 11} | fields
    at_once = stage(kind, tmp_path / "at_once", tiny_model, tuning, **steps)
    run(at_once)
    first = stage(kind, tmp_path / "first", tiny_model, tuning, **{**steps, "max_steps": split})
    assert run(first)["state_bytes"] == sum(
        file.stat().st_size for file in (first.output / "state").glob("*.safetensors")
    )
    more = continuing(first, kind, tmp_path / "more", tiny_model, **steps)
    metrics = run(more)
    assert (metrics["steps"], metrics["continued_from_step"], metrics["resumed_from_step"]) == (11, split, 0)
    assert losses(first) | losses(more) == losses(at_once)
    assert min(losses(more)) == split + 1
    assert_equal_weights(at_once, more)


VALIDATION_LOSSES = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.0, 10: 2.0}
"""By step: step 4 is the best one, and a patience of 2 ends the run at step 8."""


@pytest.mark.parametrize("split", [4, 6])
def test_continued_stage_keeps_the_same_best_step(
    split: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stage ends at the best evaluation, or at the first one that waits for a better one."""
    watching = BestSoFar.watching

    def watching_script(self: BestSoFar, validation: Any) -> Any:
        def scripted() -> dict[str, float]:
            return {**validation(), VALIDATION_LOSS: VALIDATION_LOSSES[int(self.trainer.state.global_step)]}

        return watching(self, scripted)

    monkeypatch.setattr(BestSoFar, "watching", watching_script)
    fields = {"keep": "best", "early_stopping": {"patience": 2}, "eval_steps": 2, "max_steps": 10}
    at_once = stage("sft", tmp_path / "at_once", tiny_model, LORA, **fields)
    first = stage("sft", tmp_path / "first", tiny_model, LORA, **fields | {"max_steps": split})
    expected, first_metrics = run(at_once), run(first)
    assert (expected["best_step"], expected["steps"], expected["stopped_early"]) == (4, 8, True)
    assert (first_metrics["best_step"], first_metrics["stopped_early"]) == (4, False)
    more = continuing(first, "sft", tmp_path / "more", tiny_model, **fields)
    metrics = run(more)
    for name in ("best_step", "best_validation_loss", "steps", "stopped_early"):
        assert metrics[name] == expected[name], name
    assert_equal_weights(at_once, more)


@pytest.mark.parametrize("scheduler", ["constant", "wsd"])
def test_a_tokenizer_with_several_templates_keeps_a_state(scheduler: str, tiny_model: Path, tmp_path: Path) -> None:
    """Its templates are a folder in each checkpoint, which resuming does not read."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    shutil.copyfile(model / "chat_template.jinja", model / "additional_chat_templates" / "rag.jinja")
    context = stage("sft", tmp_path / "sft", model, LORA, max_steps=3, scheduler=scheduler)
    run(context)
    assert (context.checkpoints / "checkpoint-3" / "additional_chat_templates").is_dir()
    assert (context.output / "state" / "trainer.json").is_file()
    assert all(file.is_file() for file in (context.output / "state").iterdir())


class Changes(TrainerCallback):
    """Changes the optimizer of a run after a step, as somebody would by hand."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step != self.step:
            return
        scheduler = kwargs["lr_scheduler"]
        scheduler.base_lrs = [2 * rate for rate in scheduler.base_lrs]
        for group in kwargs["optimizer"].param_groups:
            group["lr"] *= 2
            group["weight_decay"] *= 3


@pytest.mark.parametrize(("scheduler", "tuning"), [("constant", LORA), ("inverse_sqrt", FULL)])
def test_changed_rate_equals_training_continued_by_hand(
    scheduler: str, tuning: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight decay and the peak rate change; the optimizer's averages, random numbers and rows are the same."""
    fields = {"max_steps": 9, "scheduler": scheduler, "weight_decay": 0.25, "warmup_ratio": 0.0}
    by_hand = stage("sft", tmp_path / "by_hand", tiny_model, tuning, **fields)
    with monkeypatch.context() as patch:
        patch.setattr("align.training.fit.continuing_callbacks", lambda context, trainer: [Changes(4)])
        run(by_hand)
    first = stage("sft", tmp_path / "first", tiny_model, tuning, **fields | {"max_steps": 4})
    run(first)
    change = {"learning_rate": 2 * first.config.learning_rate, "weight_decay": 0.75}
    more = continuing(first, "sft", tmp_path / "more", tiny_model, change=change, **fields)
    with pytest.raises(Killed):
        run(dying(more, 7))
    metrics = run(more)  # from its own checkpoint
    assert_equal_weights(by_hand, more)
    assert losses(more) == {step: loss for step, loss in losses(by_hand).items() if step > 4}
    assert metrics["changed"].keys() == change.keys()
    (event,) = events(more, "change")
    assert event["step"] == 4 and "weight_decay" in event["text"]
    unchanged = continuing(first, "sft", tmp_path / "unchanged", tiny_model, change={}, **fields)
    assert "changed" not in run(unchanged) and not events(unchanged, "change")
    at_once = stage("sft", tmp_path / "at_once", tiny_model, tuning, **fields)
    run(at_once)
    assert_equal_weights(at_once, unchanged)


def test_early_stopped_stage_waits_again_after_a_change(tiny_model: Path, tmp_path: Path) -> None:
    fields = {"early_stopping": {"patience": 1, "min_improvement": 100.0}, "eval_steps": 2, "max_steps": 12}
    first = stage("sft", tmp_path / "first", tiny_model, LORA, **fields, save_steps=2)
    assert run(first)["steps"] == 4  # nothing improves by 100
    more = continuing(first, "sft", tmp_path / "more", tiny_model, change={"learning_rate": 1e-4}, **fields)
    metrics = run(more)
    assert metrics["continued_from_step"] == 2 and metrics["steps"] >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", aimed_stages.KINDS)
def test_every_kind_continues_in_the_middle_of_a_pass(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    fields = {"scheduler": "constant", "epochs": 3, "save_steps": 100}
    runner = STAGES[kind].runner()
    at_once = aimed_stages.make_stage(kind, tmp_path / "at_once", tiny_model, max_steps=7, **fields)
    runner(at_once)
    first = aimed_stages.make_stage(kind, tmp_path / "first", tiny_model, max_steps=3, **fields)
    runner(first)
    plain = aimed_stages.make_stage(kind, tmp_path / "more", tiny_model, max_steps=7, continue_from="first", **fields)
    more = dataclasses.replace(plain, inputs={**plain.inputs, "continue_from": finished(first, kind)})
    assert runner(more)["continued_from_step"] == 3
    assert_equal_weights(at_once, more)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "kto"])
def test_more_rows_begin_a_pass_where_rows_depend_on_one_another(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Packs are made of all texts, and kto's micro-batches of all answers."""
    runner, fields = STAGES[kind].runner(), {"scheduler": "constant", "epochs": 2, "save_steps": 100}
    first = aimed_stages.make_stage(kind, tmp_path / "first", tiny_model, max_steps=2, **fields)
    runner(first)
    plain = aimed_stages.make_stage(kind, tmp_path / "more", tiny_model, max_steps=5, continue_from="first", **fields)
    file = tmp_path / "more" / "data" / "train.parquet"
    more_rows = read_rows(file)
    write_rows(file, [*more_rows, *({**row, "id": f"again-{row['id']}"} for row in reversed(more_rows[:10]))])
    more = dataclasses.replace(plain, inputs={**plain.inputs, "continue_from": finished(first, kind)})
    assert runner(more)["steps"] == 5


def test_killed_continued_stage_resumes_from_its_own_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    at_once = stage("sft", tmp_path / "at_once", tiny_model, LORA, max_steps=11)
    run(at_once)
    first = stage("sft", tmp_path / "first", tiny_model, LORA, max_steps=4)
    run(first)
    more = continuing(first, "sft", tmp_path / "more", tiny_model, max_steps=11, save_steps=3)
    with pytest.raises(Killed):
        run(dying(more, 5))  # before its first own checkpoint
    with pytest.raises(Killed):
        run(dying(more, 8))
    metrics = run(more)
    assert (metrics["resumed_from_step"], metrics["continued_from_step"]) == (6, 4)
    assert_equal_weights(at_once, more)


@given(st.data())
def test_order_split_anywhere_passes_the_same_rows(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    plain = GroupedOrder([1 + row % 5 for row in range(count)], 2, 4, seed=3)
    stop = data.draw(st.integers(0, 4 * count))
    split = data.draw(st.integers(0, stop))
    assert passed_rows(plain, 0, split) | passed_rows(plain, split, stop) == passed_rows(plain, 0, stop)
    # Where a run goes on with other rows: new ones first, then each row once per pass.
    new = data.draw(st.lists(st.integers(0, count - 1), unique=True))
    order = ContinuedOrder(plain, Continuation(new, split))
    sequence = []
    for epoch in range(split // count, split // count + 3):
        order.set_epoch(epoch)
        sequence += list(order)
        assert len(order) == count
    continued = sequence[split % count :]
    assert continued[: len(new)] == new
    assert sorted(continued[len(new) : len(new) + count]) == list(range(count))


def test_wsd_goes_on_from_before_its_decay(tiny_model: Path, tmp_path: Path) -> None:
    """6 steps decay in the last 2, 12 in the last 4: the 2 decayed steps are run again at the full rate."""
    wsd = {"scheduler": "wsd", "decay_ratio": 1 / 3}
    at_once = stage("sft", tmp_path / "at_once", tiny_model, FULL, max_steps=12, **wsd)
    run(at_once)
    first = stage("sft", tmp_path / "first", tiny_model, FULL, max_steps=6, **wsd)
    run(first)
    assert json.loads((first.output / "state" / "trainer_state.json").read_text())["global_step"] == 4
    more = continuing(first, "sft", tmp_path / "more", tiny_model, max_steps=12, **wsd)
    assert run(more)["continued_from_step"] == 4
    assert (more.checkpoints / STABLE / "trainer_state.json").is_file()
    assert_equal_weights(at_once, more)


def test_step_after_finished_cosine_has_the_longer_cosine_rate(tiny_model: Path, tmp_path: Path) -> None:
    """The optimizer's state says 0, the end of the shorter schedule; half a cosine over 10 steps is 1/2 at the 5th."""
    fields = {"scheduler": "cosine", "warmup_ratio": 0.0}
    first = stage("sft", tmp_path / "first", tiny_model, FULL, max_steps=5, **fields)
    run(first)
    more = continuing(first, "sft", tmp_path / "more", tiny_model, max_steps=10, **fields)
    run(more)
    rates = {event["step"]: event["learning_rate"] for event in events(more, "metrics") if "learning_rate" in event}
    assert rates[6] == pytest.approx(3e-3 / 2)


def test_continued_stage_has_its_own_rate_and_save_steps() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    scheduler.last_epoch, optimizer.param_groups[0]["lr"] = 3, 0.0  # as after loading a finished schedule's state
    arguments = TrainingArguments(save_steps=7, max_steps=10, report_to=[])
    state = TrainerState(save_steps=100)
    OwnSettings().on_train_begin(arguments, state, TrainerControl(), lr_scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == 0.25
    assert state.save_steps == 7


def test_new_rows_come_first_and_then_all_rows(tiny_model: Path, tmp_path: Path) -> None:
    first = stage("sft", tmp_path / "first", tiny_model, LORA, epochs=1)  # 40 rows in 5 steps
    run(first)
    more = continuing(first, "sft", tmp_path / "more", tiny_model, epochs=1)
    write_rows(tmp_path / "more" / "data" / "train.parquet", [*rows(40), *rows(24, start=100)])
    metrics = run(more)
    # One pass over 64 rows is 8 steps, of which 5 are done; the 24 new rows fill the other 3.
    assert metrics["steps"] == 8
    assert any("24 of 64 rows are new" in event["message"] for event in events(more, "note"))
    trained = load_file(more.output / "state" / "rows.safetensors")
    assert len(trained["trained"]) == 64
    assert set(trained["first"].tolist()) == set(range(40, 64))
    # A third stage on the same rows goes on in that order: all rows again.
    third = continuing(more, "sft", tmp_path / "third", tiny_model, epochs=2)
    shutil.copytree(tmp_path / "more" / "data", tmp_path / "third" / "data", dirs_exist_ok=True)
    assert run(third)["steps"] == 16
    at_once = continuing(first, "sft", tmp_path / "at_once", tiny_model, epochs=2)
    shutil.copytree(tmp_path / "more" / "data", tmp_path / "at_once" / "data", dirs_exist_ok=True)
    run(at_once)
    assert_equal_weights(at_once, third)


def test_stages_that_have_nothing_to_continue_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    first = stage("sft", tmp_path / "first", tiny_model, LORA, max_steps=3)
    run(first)
    with pytest.raises(UserError, match=r"to end after 3 steps, and 'first' has done 3.*`max_steps: null` lifts it"):
        run(continuing(first, "sft", tmp_path / "same", tiny_model, max_steps=3))
    (first.output / "state" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="no seal|not what was written"):
        run(continuing(first, "sft", tmp_path / "damaged", tiny_model, max_steps=5))
    shutil.rmtree(first.output / "state")
    with pytest.raises(UserError, match="'first' kept no trainer's state to continue from. `--rebuild first`"):
        run(continuing(first, "sft", tmp_path / "none", tiny_model, max_steps=5))


def test_keep_state_decides_and_says_what_it_leaves_out(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = stage("sft", tmp_path / "never", tiny_model, LORA, max_steps=1)
    never = dataclasses.replace(plain, runtime=plain.runtime.model_copy(update={"keep_state": False}))
    assert run(never)["state_bytes"] == 0 and not (never.output / "state").exists()
    monkeypatch.setattr("align.training.kept_state.LARGEST_STATE", 1000)
    large = stage("sft", tmp_path / "large", tiny_model, LORA, max_steps=1)
    assert run(large)["state_bytes"] == 0
    assert any("which would need 0." in event["message"] for event in events(large, "note"))
    decayed = stage("sft", tmp_path / "decayed", tiny_model, LORA, max_steps=4, scheduler="wsd")
    assert run(decayed)["state_bytes"] == 0 and not (decayed.checkpoints / STABLE).exists()
    assert any("which would need 0." in event["message"] for event in events(decayed, "note"))
    kept = dataclasses.replace(
        stage("sft", tmp_path / "kept", tiny_model, LORA, max_steps=1),
        runtime=plain.runtime.model_copy(update={"keep_state": True}),
    )
    assert run(kept)["state_bytes"] > 1000


def test_a_kept_state_holds_no_pickle(tiny_model: Path, tmp_path: Path) -> None:
    first = stage("sft", tmp_path / "first", tiny_model, LORA, max_steps=2)
    run(first)
    names = {file.name for file in (first.output / "state").iterdir()}
    assert names >= {"adapter_model.safetensors", "trainer.safetensors", "trainer.json", "state.json"}
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".txt"}


def test_packed_states_read_back_as_they_were(tmp_path: Path) -> None:
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3).bfloat16()}, 2: {}},
        "param_groups": [{"lr": 1 / 3, "betas": (0.9, 0.999), "params": [0, 2], "fused": None}],
        "numpy": ("MT19937", np.arange(4, dtype=np.uint32), 1, 0, 0.0),
    }
    before, packed, after = (tmp_path / name for name in ("before", "packed", "after"))
    for folder in (before, packed, after):
        folder.mkdir()
    torch.save(state, before / "optimizer.pt")
    pack(before, packed)
    unpack(packed, after)
    with safe_globals():
        loaded = torch.load(after / "optimizer.pt", weights_only=True)
    assert loaded["param_groups"] == state["param_groups"] and list(loaded["state"]) == [0, 2]
    assert loaded["state"][0]["exp_avg"].equal(state["state"][0]["exp_avg"])
    assert loaded["state"][0]["exp_avg"].dtype == torch.bfloat16
    assert loaded["numpy"][1].tolist() == [0, 1, 2, 3] and loaded["numpy"][1].dtype == np.uint32
    torch.save({"odd": {1, 2}}, before / "optimizer.pt")
    with pytest.raises(UnknownState, match="optimizer/odd is a set"):
        pack(before, packed)
    (packed / "trainer.json").write_text(json.dumps({"../outside.pt": 1}))
    with pytest.raises(UnknownState, match="is not a file of a checkpoint"):
        unpack(packed, after)
