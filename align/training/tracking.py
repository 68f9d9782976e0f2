"""Experiment trackers: the curves of a stage, as the report has them, to what ``runtime.report_to`` names.

The integrations are transformers' own, the ones its ``report_to`` starts. A Trainer would feed them its raw logs: PPO's
points under optimizer steps instead of updates, no held-out scores, every name with ``train/`` before it. So they are
taken out of its hands and told what the stage tells its event file, under the same names and steps. One run per stage;
a killed and resumed stage goes on with its run. Left out: uploading checkpoints (``align export --push`` does that).
"""

from __future__ import annotations

import copy
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.config.user_paths import user_path
from align.errors import UserError
from align.pipeline.context import StageContext
from align.training.state_files import read_state, write_state

IDENTITY = "tracking.json"
"""File beside the stage's checkpoints' folder that keeps the run's identity between attempts."""


def tracking_options(context: StageContext) -> dict[str, Any]:
    """``report_to``, ``run_name`` and ``project`` for ``TrainingArguments``; call it before a Trainer is built.

    Sets the environment variables by which the integrations choose project, group and folder. What the user has set
    there stays, except for what makes a resumed stage go on with its run.
    """
    names = list(context.runtime.report_to)
    if not names or int(os.environ.get("RANK", "0")):  # of several processes the first one speaks
        return {"report_to": "none"}
    os.environ.pop("MLFLOW_RUN_ID", None)
    os.environ.update(_environment(context, _identity(context)))
    return {"report_to": names, "run_name": context.name, "project": _project(context)}


@contextmanager
def follow(context: StageContext, trainer: Any, first_step: int) -> Iterator[None]:
    """Within it, the trackers that ``trainer`` was built with hear every ``context.log``.

    ``first_step`` is the first point that is still to come: 0, or the one after the checkpoint that a resumed stage
    goes on from. Raises ``UserError`` when a tracker cannot start. One that fails later is warned of and left out: a
    run of hours does not end for it.
    """
    callbacks = _taken_from(trainer) if context.runtime.report_to else []
    if not callbacks or not trainer.is_world_process_zero():
        yield
        return
    with _running(context, callbacks, trainer.args, trainer.model, first_step):
        yield


def track_result(context: StageContext, values: Mapping[str, float | None], settings: Mapping[str, Any]) -> None:
    """One run with final values, for a stage without a Trainer; ``settings`` are shown as the run's configuration.

    A tracker that cannot start is warned of: the stage has its result already.
    """
    options = tracking_options(context)
    if options["report_to"] == "none":
        return
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    arguments = _Arguments(context, options, settings)
    callbacks = [made() for made in get_reporting_integration_callbacks(options["report_to"])]
    try:
        with _running(context, callbacks, arguments, None, 0) as runs:
            runs.log(0, {name: value for name, value in values.items() if value is not None})
    except UserError as error:
        context.warn(str(error))


def scorecard_values(card: Mapping[str, Any]) -> dict[str, float | None]:
    """A scorecard's estimates and the ends of their intervals: ``ppo/gold``, ``ppo/gold/low``, ``ppo/gold/high``."""
    return {
        f"{system}/{metric}{end and '/'}{end}": estimate[end or "value"]
        for system, per in card["estimates"].items()
        for metric, estimate in per.items()
        for end in ("", "low", "high")
    }


class _Arguments:
    """What the integrations read of ``TrainingArguments``, for a stage that has none."""

    trackio_space_id = trackio_bucket_id = hub_private_repo = None
    trackio_static_space_id = False

    def __init__(self, context: StageContext, options: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.run_name, self.project = options["run_name"], options["project"]
        self.output_dir = str(context.checkpoints)
        self._settings = dict(settings)

    def to_dict(self) -> dict[str, Any]:
        return dict(self._settings)

    def to_json_string(self) -> str:
        return json.dumps(self._settings, indent=2, default=str)


class _Runs:
    """One run in each tracker."""

    def __init__(self, context: StageContext, callbacks: list[Any], arguments: Any) -> None:
        from transformers import TrainerControl

        self.context, self.callbacks, self.control = context, callbacks, TrainerControl()
        self.arguments = {callback: self._own_arguments(callback, arguments) for callback in callbacks}

    def _own_arguments(self, callback: Any, arguments: Any) -> Any:
        """trackio knows a run by its name alone: there it carries the identity, and the group reaches ``init``."""
        if _name(callback) != "trackio":
            return arguments
        callback._trackio = _Grouped(callback._trackio, _group(self.context))
        own = copy.copy(arguments)
        own.run_name = f"{self.context.name}-{_identity(self.context)['id']}"
        return own

    def begin(self, model: Any, first_step: int) -> None:
        from transformers import TrainerState

        self.first_step = first_step
        for callback in self.callbacks:
            if _name(callback) == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                # Points that a killed attempt wrote beyond its last checkpoint come again: the old ones are hidden.
                folder = _folder(self.context) / self.context.pipeline / self.context.group / self.context.name
                callback.tb_writer = SummaryWriter(log_dir=str(folder), purge_step=first_step)
            try:
                callback.on_train_begin(self.arguments[callback], TrainerState(), self.control, model=model)
            except Exception as error:  # every tracker has errors of its own
                raise UserError(
                    f"runtime.report_to: {_name(callback)} cannot start: {_safe(error)}. Log in to it, have it work "
                    "offline (WANDB_MODE=offline; no MLFLOW_TRACKING_URI), or leave it out."
                ) from None
        _remember(self.context, self.callbacks)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from transformers import TrainerState

        if step < self.first_step:  # a resumed PPO validates its checkpoint once more: the run has that point
            return
        for callback in list(self.callbacks):
            state = TrainerState(global_step=step)
            with self._warned_of(callback):
                callback.on_log(self.arguments[callback], state, self.control, logs=dict(metrics))

    def end(self, failed: bool) -> None:
        from transformers import TrainerState

        for callback in list(self.callbacks):
            with self._warned_of(callback):
                if failed and _name(callback) == "mlflow":
                    callback._ml_flow.end_run("FAILED")
                callback.on_train_end(self.arguments[callback], TrainerState(), self.control)
                if _name(callback) == "wandb":
                    callback._wandb.finish(exit_code=int(failed))

    @contextmanager
    def _warned_of(self, callback: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.callbacks.remove(callback)
            self.context.warn(
                f"{self.context.name}: {_name(callback)} failed and gets nothing more from this stage: {_safe(error)}. "
                "The report has every curve."
            )


class _Grouped:
    """The module trackio, whose ``init`` is told the group: transformers' integration leaves it out."""

    def __init__(self, module: Any, group: str) -> None:
        self._module, self._group = module, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def init(self, **given: Any) -> Any:
        return self._module.init(**given, group=self._group)


@contextmanager
def _running(
    context: StageContext, callbacks: list[Any], arguments: Any, model: Any, first_step: int
) -> Iterator[_Runs]:
    _keep_names()
    runs, failed = _Runs(context, callbacks, arguments), True
    follower = runs.log
    try:
        runs.begin(model, first_step)
        context.followers.append(follower)
        yield runs
        failed = False
    finally:
        if follower in context.followers:
            context.followers.remove(follower)
        runs.end(failed)


def _keep_names() -> None:
    """Have transformers' integrations leave names as they are: ``loss`` and ``test_loss``, as on the report's page.

    Theirs are ``train/loss`` and ``test/loss``, and not in all of them.
    """
    import transformers.integrations.integration_utils as module

    module.rewrite_logs = dict  # type: ignore[assignment]


def _taken_from(trainer: Any) -> list[Any]:
    """The integrations among a Trainer's callbacks, which it no longer calls itself."""
    found = [one for one in trainer.callback_handler.callbacks if _name(one) in trainer.args.report_to]
    for callback in found:
        trainer.remove_callback(callback)
    return found


def _name(callback: Any) -> str:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return next((name for name, made in INTEGRATION_TO_CALLBACK.items() if type(callback) is made), "")


def _project(context: StageContext) -> str:
    return context.runtime.tracking.project or context.pipeline or "align"


def _group(context: StageContext) -> str:
    return f"{context.pipeline}-{context.group}"


def _folder(context: StageContext) -> Path:
    return user_path(context.runtime.tracking.folder).resolve()


def _environment(context: StageContext, identity: Mapping[str, str]) -> dict[str, str]:
    project, group, folder = _project(context), _group(context), _folder(context)
    own = {"group": group, "pipeline": context.pipeline, "stage": context.name}
    found = {"WANDB_RUN_GROUP": group, "WANDB_RUN_ID": identity["id"], "WANDB_RESUME": "allow"}
    found["MLFLOW_TAGS"] = json.dumps(json.loads(os.environ.get("MLFLOW_TAGS") or "{}") | own)
    if "mlflow" in identity:
        found["MLFLOW_RUN_ID"] = identity["mlflow"]
    usual = {
        "WANDB_PROJECT": project,
        "MLFLOW_EXPERIMENT_NAME": project,
        "WANDB_DIR": str(folder),
        "TRACKIO_DIR": str(folder / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    chosen = {"WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"} if context.runtime.tracking.project else set()
    return found | {name: value for name, value in usual.items() if name in chosen or name not in os.environ}


def _identity(context: StageContext) -> dict[str, str]:
    """Of this stage's run: made by its first attempt, found by the next ones, gone once the stage is finished."""
    path = context.checkpoints.with_name(IDENTITY)
    known = read_state(path)
    if known is not None:
        return known
    made = {"id": secrets.token_hex(6)}
    write_state(path, made)
    return made


def _remember(context: StageContext, callbacks: list[Any]) -> None:
    """mlflow chooses a run's identity itself: note it, so that a resumed stage finds the run."""
    for callback in callbacks:
        if _name(callback) == "mlflow":
            noted = _identity(context) | {"mlflow": callback._ml_flow.active_run().info.run_id}
            write_state(context.checkpoints.with_name(IDENTITY), noted)


def _safe(error: Exception) -> str:
    """An error's first line, without what the environment keeps secret."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    for name, value in os.environ.items():
        if len(value) >= 6 and any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSWORD")):
            text = text.replace(value, "***")
    return f"{type(error).__name__}: {text}".rstrip(".")
