"""Trackers get what the event file gets: same names, steps and values, one run per stage, also across a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import align.runner.runner
from align import Pipeline
from align.cli.main import main
from align.config.runtime import Runtime
from align.errors import UserError
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.runner.runner import run_pipeline
from align.store.artifacts import Kind
from align.training import tracking
from align.training.checkpoints import read_state
from align.training.tracking import _safe, scorecard_values, track_result
from tests.support import toy
from tests.support.stages.evaluation_stage import context as evaluated
from tests.support.stages.evaluation_stage import inputs
from tests.support.training.harness import context, data_artifact, events

__all__ = ["evaluated", "inputs"]  # fixtures

SECRET = "key-that-nobody-may-see"


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    yield
    os.environ.clear()
    os.environ.update(before)


class Killed(BaseException):
    pass


class Dying(StageContext):
    """A context that kills the stage when step ``dies_at`` was reported."""

    dies_at = 0

    def progress(self, done: float, total: float, unit: str = "steps", **shown: Any) -> None:
        super().progress(done, total, unit, **shown)
        if done == self.dies_at and unit in ("steps", "updates"):
            raise Killed


def dying(plain: StageContext, step: int) -> StageContext:
    new_dying = Dying(**{field.name: getattr(plain, field.name) for field in fields(plain)})
    object.__setattr__(new_dying, "dies_at", step)
    return new_dying


def tracked(plain: StageContext, folder: Path, **more: Any) -> StageContext:
    runtime = Runtime(
        device="cpu", engine={"name": "transformers"}, report_to="tensorboard", tracking={"folder": str(folder)}
    )
    return replace(plain, runtime=runtime, pipeline="quick", group="0a1b2c3d", followers=[], **more)


def made(kind: str, root: Path, model: Path) -> StageContext:
    source = "policy" if kind == "dpo" else "model"
    config = STAGES[kind].config_class()(
        **{source: "model"}, data="data", learning_rate=1e-3, max_steps=5, batch_size=8, micro_batch_size=4,
        max_length=128, save_steps=2, eval_steps=3,
    )  # fmt: skip
    plain = context(root, config, model, data_artifact(root / "data", Kind.PREFERENCES), source)
    return tracked(plain, root / "tracking")


def made_ppo(root: Path, model: Path, **options: Any) -> StageContext:
    config = STAGES["ppo"].config_class()(
        policy="model", prompts="data", score="tests.support.stages.vowels:share",
        updates=4, rollout_batch=8, num_epochs=2,
        samples_per_prompt=2, max_tokens=8, learning_rate=1e-4, precision="float32", eval_updates=2, eval_prompts=4,
        **options,
    )  # fmt: skip
    data = data_artifact(root / "data", Kind.INSTRUCTIONS)
    plain = context(root, config, model, data, "policy")
    plain.inputs.update(prompts=data, reward=None, ptx=None)
    return tracked(plain, root / "tracking")


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Of every event file below ``folder``, as TensorBoard shows them; step → value by name."""
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    read.Reload()
    actual = {}
    for name in read.Tags()["scalars"]:
        points = read.Scalars(name)
        assert len({point.step for point in points}) == len(points), f"{name} has a step twice"
        actual[name] = {point.step: point.value for point in points}
    return actual


def reported(context: StageContext) -> dict[str, dict[int, float]]:
    """The report's curves: of a step that was reported twice the later report counts."""
    values: dict[str, dict[int, float]] = {}
    for event in events(context, "metrics"):
        for name, value in event.items():
            if name not in ("event", "time", "step"):
                values.setdefault(name, {})[event["step"]] = value
    return values


def same(observations: dict[str, dict[int, float]], expected: dict[str, dict[int, float]]) -> None:
    assert observations.keys() == expected.keys()
    for name, points in expected.items():
        assert observations[name] == pytest.approx(points, rel=1e-6, nan_ok=True), name  # the files hold float32


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_stage_s_curves_are_those_of_its_events(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    stage = made(kind, tmp_path, tiny_model)
    STAGES[kind].runner()(stage)
    (folder,) = (tmp_path / "tracking").glob("*/*/*")
    assert folder == tmp_path / "tracking" / "quick" / "0a1b2c3d" / "stage"
    expected = reported(stage)
    assert {"loss", "learning_rate", "grad_norm", "test_loss"} <= expected.keys()
    assert {3, 5} <= expected["test_loss"].keys() and expected["loss"].keys() == {1, 2, 3, 4, 5}
    same(curves(folder), expected)
    assert stage.followers == []


def test_ppo_points_stand_at_updates_not_at_optimizer_steps(tiny_model: Path, tmp_path: Path) -> None:
    stage = made_ppo(tmp_path, tiny_model)
    STAGES["ppo"].runner()(stage)
    expected = reported(stage)
    assert expected["score"].keys() == {1, 2, 3, 4} and expected["test_score"].keys() >= {2, 4}
    same(curves(tmp_path / "tracking/quick/0a1b2c3d/stage"), expected)


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_a_killed_stage_goes_on_with_its_run(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """Killed one step after a checkpoint: that step is reported twice, and the tracker shows the second one."""
    stage = made(kind, tmp_path, tiny_model) if kind == "sft" else made_ppo(tmp_path, tiny_model, save_updates=2)
    with pytest.raises(Killed):
        STAGES[kind].runner()(dying(stage, 3))
    first = read_state(tmp_path / tracking.IDENTITY)
    assert first is not None
    killed = reported(stage)["loss"]
    STAGES[kind].runner()(stage)
    assert read_state(tmp_path / tracking.IDENTITY) == first
    assert os.environ["WANDB_RUN_ID"] == first["id"] and os.environ["WANDB_RESUME"] == "allow"
    expected = reported(stage)
    assert list(killed) == [1, 2, 3] and max(expected["loss"]) > 3
    folder = tmp_path / "tracking/quick/0a1b2c3d/stage"
    assert len(list(folder.iterdir())) == 2, "two attempts, two files of one run"
    same(curves(folder), expected)


def test_a_stage_made_anew_hides_the_curve_of_before(tiny_model: Path, tmp_path: Path) -> None:
    for attempt in ("one", "two"):
        stage = tracked(made("sft", tmp_path / attempt, tiny_model), tmp_path / "tracking")
        STAGES["sft"].runner()(stage)
    same(curves(tmp_path / "tracking/quick/0a1b2c3d/stage"), reported(stage))


def test_without_report_to_nothing_is_written(tiny_model: Path, tmp_path: Path) -> None:
    stage = replace(made("sft", tmp_path, tiny_model), runtime=Runtime(device="cpu"))
    STAGES["sft"].runner()(stage)
    assert not list(tmp_path.rglob("events.out*")) and not (tmp_path / tracking.IDENTITY).exists()
    assert "WANDB_RUN_ID" not in os.environ


def test_no_file_holds_a_secret_of_the_environment(tiny_model: Path, tmp_path: Path) -> None:
    stage = made("sft", tmp_path, tiny_model)
    STAGES["sft"].runner()(stage)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any("events.out" in path.name for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_tracker_that_cannot_start_is_refused_without_secrets(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"no such user for {SECRET}\nand more")

    monkeypatch.setattr("transformers.integrations.integration_utils.TensorBoardCallback.on_train_begin", broken)
    stage = made("sft", tmp_path, tiny_model)
    with pytest.raises(UserError, match=r"report_to: tensorboard cannot start: RuntimeError: no such user for \*\*\*"):
        STAGES["sft"].runner()(stage)
    assert not stage.events.exists(), "nothing was computed"


def test_only_long_values_of_secret_names_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MY_API_KEY": "abcdef", "SHORT_TOKEN": "12345", "MY_PLACE": "springfield"}.items():
        monkeypatch.setenv(name, value)
    error = RuntimeError("abcdef in springfield has 12345")
    assert _safe(error) == "RuntimeError: *** in springfield has 12345"


def test_an_error_is_told_without_the_password_of_its_address() -> None:
    error = OSError("https://alice:hunter22@mlflow.example.com/api does not answer")
    assert _safe(error) == "OSError: https://***@mlflow.example.com/api does not answer"


def test_a_tracker_that_fails_later_is_left_out_with_one_warning(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("transformers.integrations.integration_utils.TensorBoardCallback.on_log", broken)
    stage = made("sft", tmp_path, tiny_model)
    metrics = STAGES["sft"].runner()(stage)
    assert metrics["steps"] == 5
    (warning,) = [event["message"] for event in events(stage, "warning") if "tensorboard" in event["message"]]
    assert "OSError: the disk is full" in warning


def test_a_scorecard_s_estimates_are_final_values(tmp_path: Path) -> None:
    estimate = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8, "method": "bootstrap"}
    sft = {"gold": estimate, "kl": {**estimate, "low": None}}
    card = {"estimates": {"sft": sft, "ppo": {"ifeval.loose": estimate}}}
    plain = StageContext("evaluate", None, {}, 1, Runtime(), tmp_path, tmp_path / "checkpoints", tmp_path / "e.jsonl")
    track_result(tracked(plain, tmp_path / "tracking"), scorecard_values(card), {"prompts": 8})
    assert curves(tmp_path / "tracking/quick/0a1b2c3d/evaluate") == {
        "sft/gold": {0: 0.5}, "sft/gold/low": {0: 0.25}, "sft/gold/high": {0: 0.75}, "sft/kl": {0: 0.5},
        "sft/kl/high": {0: 0.75}, "ppo/ifeval.loose": {0: 0.5}, "ppo/ifeval.loose/low": {0: 0.25},
        "ppo/ifeval.loose/high": {0: 0.75},
    }  # fmt: skip


def test_an_evaluation_s_scorecard_is_tracked(evaluated: StageContext, tmp_path: Path) -> None:
    evaluate = tracked(evaluated, tmp_path / "tracking")
    STAGES["evaluate"].runner()(evaluate)
    card = json.loads((evaluated.output / "scorecard.json").read_text())
    expected = {name: {0: value} for name, value in scorecard_values(card).items() if value is not None}
    assert f"{card['reference']}/{card['primary']}" in expected
    (folder,) = (tmp_path / "tracking/quick/0a1b2c3d").iterdir()
    same(curves(folder), expected)


def test_what_each_tracker_is_told_of_project_group_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "WANDB_DIR", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TAGS", '{"team": "nlp"}')
    monkeypatch.setenv("WANDB_DIR", "/elsewhere")
    plain = StageContext("sft", None, {}, 1, Runtime(), tmp_path, tmp_path / "checkpoints", tmp_path / "e.jsonl")
    stage = tracked(plain, tmp_path / "tracking")
    assert tracking.tracking_options(stage) == {"report_to": ["tensorboard"], "run_name": "sft", "project": "quick"}
    identity = read_state(tmp_path / tracking.IDENTITY)["id"]
    assert os.environ["WANDB_PROJECT"] == os.environ["MLFLOW_EXPERIMENT_NAME"] == "quick"
    assert os.environ["WANDB_RUN_GROUP"] == "quick-0a1b2c3d" and os.environ["WANDB_RUN_ID"] == identity
    assert os.environ["WANDB_DIR"] == "/elsewhere", "what the user set stays"
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/tracking/mlflow.db"
    assert os.environ["TRACKIO_DIR"] == f"{tmp_path}/tracking/trackio"
    assert json.loads(os.environ["MLFLOW_TAGS"]) == {
        "team": "nlp", "group": "quick-0a1b2c3d", "pipeline": "quick", "stage": "sft",
    }  # fmt: skip
    assert "MLFLOW_RUN_ID" not in os.environ


def test_tracker_that_is_not_installed_is_refused_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align.runner.runner, "is_installed", lambda name: name == "tensorboard")
    raw = toy.pipeline() | {"runtime": {"report_to": ["tensorboard", "wandb", "trackio"]}}
    with pytest.raises(UserError, match=r"report_to: wandb, trackio are not installed\. `pip install wandb trackio`"):
        run_pipeline(Pipeline(raw), store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("on", ["slurm", "ray"])
def test_so_it_is_where_a_cluster_makes_the_stages(
    on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(align.runner.runner, "is_installed", lambda name: False)
    (tmp_path / "p.yaml").write_text(json.dumps(toy.pipeline() | {"runtime": {"report_to": "wandb"}}))
    assert main(["run", str(tmp_path / "p.yaml"), "--on", on, "--store", str(tmp_path / "store")]) == 2
    assert "runtime.report_to: wandb is not installed." in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_folder_of_a_tracker_s_name_is_no_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb_like").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not align.runner.runner.is_installed("wandb_like") and align.runner.runner.is_installed("tensorboard")


def test_runtime_names_one_or_several_and_no_other(tmp_path: Path) -> None:
    assert Runtime(report_to="wandb").report_to == ["wandb"]
    assert Runtime(report_to=["mlflow", "mlflow"]).report_to == ["mlflow"]
    with pytest.raises(UserError, match=r"runtime\.report_to"):
        Pipeline(toy.pipeline() | {"runtime": {"report_to": ["comet"]}})


@pytest.mark.usefixtures("stages_in_process")
def test_stage_knows_its_pipeline_and_its_run(tmp_path: Path) -> None:
    def group(number: int, report_to: list[str]) -> tuple[str, str]:
        raw = toy.pipeline(two={"number": number, "crash": "user"}) | {"runtime": {"report_to": report_to}}
        with pytest.raises(UserError, match="empty after filtering"):
            run_pipeline(Pipeline(raw), store=tmp_path / "store")
        (newest,) = sorted(tmp_path.glob("store/*/*.partial/work.json"), key=os.path.getmtime)[-1:]
        work = json.loads(newest.read_text())
        return work["pipeline"], work["group"]

    first = group(2, [])
    assert first[0] == "toy" and len(first[1]) == 8
    assert group(2, ["tensorboard"]) == first, "the trackers are no part of a key"
    assert group(3, []) != first


def test_trainer_options_point_at_runtime() -> None:
    for name, place in (("report_to", "runtime.report_to"), ("project", "runtime.tracking.project")):
        with pytest.raises(ValueError, match=place):
            STAGES["sft"].config_class()(model="m", data="d", learning_rate=1e-3, trainer={name: "wandb"})
