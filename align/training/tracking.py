"""Send a stage's curves, as in the report, to the experiment trackers in ``runtime.report_to``.

The integrations are transformers' own, as ``report_to`` starts them. A Trainer would send its raw logs: PPO's points
under optimizer steps instead of updates, no held-out scores, ``train/`` before every name. So they are removed from the
Trainer and receive what the stage writes to its event file, under the same names and steps. Each stage is one run,
which a killed and resumed stage continues. ``align export --push`` uploads checkpoints.
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

from transformers import TrainerControl, TrainerState

from align.config.user_paths import user_path
from align.errors import UserError, redact
from align.patches.transformers import keep_curve_names, replace_tracker_module, tracker_module
from align.pipeline.context import StageContext
from align.training.checkpoints import read_state, write_state

IDENTITY = "tracking.json"
"""File with the run's id for later attempts, next to the checkpoints' folder."""


def tracking_options(context: StageContext) -> dict[str, Any]:
    """Return ``report_to``, ``run_name`` and ``project`` for ``TrainingArguments``; call it before creating a Trainer.

    Sets the environment variables from which the integrations read project, group and folder. The user's own values
    stay, except for those by which a resumed stage continues its run.
    """
    names = list(context.runtime.report_to)
    if not names or int(os.environ.get("RANK", "0")):  # only the first process reports
        return {"report_to": "none"}
    # A stage that ran in this process before may have set it.
    os.environ.pop("MLFLOW_RUN_ID", None)
    os.environ.update(_environment(context, _identity(context)))
    return {"report_to": names, "run_name": context.name, "project": _project(context)}


@contextmanager
def follow(context: StageContext, trainer: Any, first_step: int) -> Iterator[None]:
    """Inside, the trackers of ``trainer`` receive every ``context.log``.

    ``first_step`` is the first point to come: 0, or the point after the checkpoint that a resumed stage continues from.
    Raises ``UserError`` when a tracker cannot start. A tracker that fails later is dropped with a warning, because it
    must not end a run of hours.
    """
    # The trainer must not call the trackers itself, or they would receive its values twice.
    callbacks = _remove_integrations(trainer) if context.runtime.report_to else []
    if not callbacks or not trainer.is_world_process_zero():
        yield
        return
    with _running(context, callbacks, trainer.args, trainer.model, first_step):
        yield


def track_result(context: StageContext, values: Mapping[str, float | None], settings: Mapping[str, Any]) -> None:
    """Log final values as one run, for a stage without a Trainer; ``settings`` are the run's configuration.

    A tracker that cannot start causes a warning only: the stage has its result already.
    """
    options = tracking_options(context)
    if options["report_to"] == "none":
        return
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    arguments = _Arguments(context, options, settings)
    callbacks = [integration() for integration in get_reporting_integration_callbacks(options["report_to"])]
    try:
        with _running(context, callbacks, arguments, None, 0) as runs:
            runs.log(0, {name: value for name, value in values.items() if value is not None})
    except UserError as error:
        context.warn(str(error))


def scorecard_values(card: Mapping[str, Any]) -> dict[str, float | None]:
    """Return a scorecard's estimates with their intervals: ``ppo/gold``, ``ppo/gold/low``, ``ppo/gold/high``."""
    values: dict[str, float | None] = {}
    for system, estimates in card["estimates"].items():
        for metric, estimate in estimates.items():
            values[f"{system}/{metric}"] = estimate["value"]
            values[f"{system}/{metric}/low"] = estimate["low"]
            values[f"{system}/{metric}/high"] = estimate["high"]
    return values


class _Arguments:
    """The fields of ``TrainingArguments`` that the integrations read, for a stage without a Trainer."""

    trackio_space_id = trackio_bucket_id = hub_private_repo = None
    trackio_static_space_id = False

    def __init__(self, context: StageContext, options: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        self.run_name = options["run_name"]
        self.project = options["project"]
        self.output_dir = str(context.checkpoints)
        self._settings = dict(settings)

    def to_dict(self) -> dict[str, Any]:
        return dict(self._settings)

    def to_json_string(self) -> str:
        return json.dumps(self._settings, indent=2, default=str)


class _Runs:
    """One run in each tracker."""

    def __init__(self, context: StageContext, callbacks: list[Any], arguments: Any) -> None:
        self.context = context
        self.callbacks = callbacks
        self.control = TrainerControl()
        self.arguments = {callback: self._arguments_for(callback, arguments) for callback in callbacks}

    def _arguments_for(self, callback: Any, arguments: Any) -> Any:
        """Return the arguments for an integration. trackio identifies a run by its name, so its name has the id."""
        if _name(callback) != "trackio":
            return arguments
        module = _TrackioWithGroup(tracker_module(callback, "trackio"), _group(self.context))
        replace_tracker_module(callback, "trackio", module)
        copied = copy.copy(arguments)
        copied.run_name = f"{self.context.name}-{_identity(self.context)['id']}"
        return copied

    def begin(self, model: Any, first_step: int) -> None:
        self.first_step = first_step
        for callback in self.callbacks:
            if _name(callback) == "tensorboard":
                from torch.utils.tensorboard import SummaryWriter

                # A resumed stage repeats the points after its checkpoint; purge_step hides the old points.
                folder = _folder(self.context) / self.context.pipeline / self.context.group / self.context.name
                callback.tb_writer = SummaryWriter(log_dir=str(folder), purge_step=first_step)
            try:
                callback.on_train_begin(self.arguments[callback], TrainerState(), self.control, model=model)
            except Exception as error:  # every tracker raises its own errors
                raise UserError(
                    f"runtime.report_to: {_name(callback)} cannot start: {_safe(error)}. Log in to it, have it work "
                    "offline (WANDB_MODE=offline; no MLFLOW_TRACKING_URI), or leave it out."
                ) from None
        # After the start, because mlflow knows its run's id only then.
        _remember(self.context, self.callbacks)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step < self.first_step:  # a resumed PPO validates its checkpoint again; the run has that point
            return
        for callback in list(self.callbacks):
            state = TrainerState(global_step=step)
            with self._drop_on_failure(callback):
                callback.on_log(self.arguments[callback], state, self.control, logs=dict(metrics))

    def end(self, failed: bool) -> None:
        for callback in list(self.callbacks):
            with self._drop_on_failure(callback):
                # End the run here, or on_train_end would record it as finished.
                if failed and _name(callback) == "mlflow":
                    tracker_module(callback, "mlflow").end_run("FAILED")
                callback.on_train_end(self.arguments[callback], TrainerState(), self.control)
                if _name(callback) == "wandb":
                    tracker_module(callback, "wandb").finish(exit_code=int(failed))

    @contextmanager
    def _drop_on_failure(self, callback: Any) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.callbacks.remove(callback)
            self.context.warn(
                f"{self.context.name}: {_name(callback)} failed and receives no more values: {_safe(error)}. "
                "The report has every curve."
            )


class _TrackioWithGroup:
    """The module trackio with the group as an argument of ``init``, which transformers' integration omits."""

    def __init__(self, module: Any, group: str) -> None:
        self._module = module
        self._group = group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def init(self, **kwargs: Any) -> Any:
        return self._module.init(**kwargs, group=self._group)


@contextmanager
def _running(
    context: StageContext, callbacks: list[Any], arguments: Any, model: Any, first_step: int
) -> Iterator[_Runs]:
    # Curves keep the names of the report's page: ``loss`` and ``test_loss``, not ``train/loss`` and ``test/loss``.
    keep_curve_names()
    runs = _Runs(context, callbacks, arguments)
    failed = True  # until the stage has ended normally
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


def _remove_integrations(trainer: Any) -> list[Any]:
    """Remove the integrations from a Trainer's callbacks and return them."""
    integrations = [
        callback for callback in trainer.callback_handler.callbacks if _name(callback) in trainer.args.report_to
    ]
    for callback in integrations:
        trainer.remove_callback(callback)
    return integrations


def _name(callback: Any) -> str:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return next(
        (name for name, callback_class in INTEGRATION_TO_CALLBACK.items() if type(callback) is callback_class), ""
    )


def _project(context: StageContext) -> str:
    return context.runtime.tracking.project or context.pipeline or "align"


def _group(context: StageContext) -> str:
    return f"{context.pipeline}-{context.group}"


def _folder(context: StageContext) -> Path:
    return user_path(context.runtime.tracking.folder).resolve()


def _environment(context: StageContext, identity: Mapping[str, str]) -> dict[str, str]:
    project = _project(context)
    group = _group(context)
    folder = _folder(context)
    tags = {"group": group, "pipeline": context.pipeline, "stage": context.name}
    environment = {"WANDB_RUN_GROUP": group, "WANDB_RUN_ID": identity["id"], "WANDB_RESUME": "allow"}
    # Add align's tags to the user's own.
    environment["MLFLOW_TAGS"] = json.dumps(json.loads(os.environ.get("MLFLOW_TAGS") or "{}") | tags)
    if "mlflow" in identity:
        environment["MLFLOW_RUN_ID"] = identity["mlflow"]
    defaults = {
        "WANDB_PROJECT": project,
        "MLFLOW_EXPERIMENT_NAME": project,
        "WANDB_DIR": str(folder),
        "TRACKIO_DIR": str(folder / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    overridden = {"WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"} if context.runtime.tracking.project else set()
    set_by_user = os.environ.keys() - overridden
    return environment | {name: value for name, value in defaults.items() if name not in set_by_user}


def _identity(context: StageContext) -> dict[str, str]:
    """Return the id of this stage's run, which the first attempt creates and later attempts read."""
    path = context.checkpoints.with_name(IDENTITY)
    stored = read_state(path)
    if stored is not None:
        return stored
    identity = {"id": secrets.token_hex(6)}
    write_state(path, identity)
    return identity


def _remember(context: StageContext, callbacks: list[Any]) -> None:
    """Store the id that mlflow chose for the run, so a resumed stage continues the run."""
    for callback in callbacks:
        if _name(callback) == "mlflow":
            identity = _identity(context) | {"mlflow": tracker_module(callback, "mlflow").active_run().info.run_id}
            write_state(context.checkpoints.with_name(IDENTITY), identity)


def _safe(error: Exception) -> str:
    """Return an error's first line without secrets of the environment and of addresses."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    for name, value in os.environ.items():
        if len(value) >= 6 and any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSWORD")):
            text = text.replace(value, "***")
    return f"{type(error).__name__}: {redact(text)}".rstrip(".")
