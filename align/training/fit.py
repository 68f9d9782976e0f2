"""Run a prepared trainer: held-out scores before and after, progress, checkpoints, resume.

A stage's config adds callbacks and loss terms to trl's loop. Its callbacks are added before ``fit``'s own, so they
see a step before the held-out rows are scored, and a checkpoint before it is marked complete. Such a callback may have
``facts()``, which become metrics of the stage; ``scores()``, which join the held-out scores; and ``scoring()``, a
context in which the model has the weights that will be its result.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.config.runtime.launch import rank
from align.config.stages.training import TrainingFields
from align.config.tuning import FullTuning
from align.data.rows import has_rows
from align.models.checkpoints.sharding import is_sharded
from align.models.compute.processes import all_gather, broadcast, trim_malloc, untrimmed_heap
from align.models.tuning.apply import notice, parameter_counts
from align.pipeline.context import StageContext
from align.store.json_files import write_text_atomically
from align.training.averaging import AverageWeights
from align.training.checkpoints import MarkCheckpoints, last_complete, read_state, write_state
from align.training.continued_rows import continue_rows, continuing_callbacks, keep_trained_state
from align.training.forgetting import KLToStart, PullToStart, make_replay
from align.training.held_out import divergence_alarm
from align.training.kept_state import change_facts, continued_facts, refuse_no_steps, restore_checkpoint
from align.training.progress import ReportProgress, no_learning, report_scores
from align.training.stopping import VALIDATION, BestSoFar, StopOnRequest, best_so_far, wait_again
from align.training.tracking import follow
from align.training.unfreezing import OpenLayers, schedule_layers

if TYPE_CHECKING:
    from align.training.task_evaluations import EvaluateTasks

SECONDS_FILE = "training_seconds.txt"
"""In a checkpoint's folder: the seconds of training up to it."""

LOSSES_COMPARED = 4
"""Logged losses in a fifth of a run from which on their mean says something."""
LEAST_GAIN = 0.05
MOST_LOST = 0.6
"""A loss that fell by a 20th of its start and then lost six tenths of that gain raises a warning."""
Scores = dict[str, float]
HeldOut = Callable[[str], Scores]
"""Scores the rows of a split, ``test`` or ``validation``, with the trainer's current model."""


def fit(trainer: Any, context: StageContext, held_out: HeldOut, before: bool = True) -> dict[str, Any]:
    """Train, or continue from the last complete checkpoint, and return the stage's metrics.

    ``held_out`` of the ``test`` split becomes ``test_<name>_before`` (unless ``before`` is False) and
    ``test_<name>_after``; an empty split gives no scores. If the config chooses a checkpoint, the ``validation`` split
    is scored during training, and the ``test`` split only with the chosen weights. ``tokens`` counts the real tokens of
    the whole run. ``training_seconds`` is the time of its steps over all attempts, without steps that a kill threw
    away; ``tokens_per_second`` is their quotient.
    """

    def warn(text: str) -> None:
        context.warn(f"{context.name}: {text}")

    is_tested = has_rows(context.artifact("data").split("test"))

    def gathered(split: str) -> Scores:
        return all_gather(held_out(split))[0] if is_tested or split != "test" else {}

    trainer.memory.notify = lambda text: context.note(f"{context.name}: {text}")
    trainer.report_scored = lambda done, total: context.phase(f"scoring {done}/{total} held-out rows")
    refuse_no_steps(context, trainer.args.max_steps)
    # A stage that continues another starts from the other stage's state if it has no checkpoint itself.
    checkpoint = broadcast(lambda: last_complete(context.checkpoints, warn) or restore_checkpoint(context, wait_again))
    trainer.continuation = continue_rows(context, trainer)
    with follow(context, trainer, _step_of(checkpoint) + 1 if checkpoint else 0):
        # Decisions that follow from the scores, such as when to stop, must be the same in all processes.
        return _fit(trainer, context, gathered, before, checkpoint)


def _note_memory(context: StageContext, trainer: Any, extras: Sequence[Any]) -> None:
    """Note the memory that training needs."""
    precision = context.precision
    max_trained = next((extra.most for extra in extras if isinstance(extra, OpenLayers)), None)
    low = precision == "bfloat16"  # ``Prepared`` rounds activations between layers then
    text = notice(trainer.model, context.config.tuning, precision, low_residual=low, max_trained=max_trained)
    context.note(f"{text}; {trainer.memory.describe()}")


def _fit(
    trainer: Any, context: StageContext, held_out: HeldOut, before: bool, checkpoint: Path | None
) -> dict[str, Any]:
    extras = extra_callbacks(context, trainer)
    _note_memory(context, trainer, extras)
    # A resumed run uses the scores of the test rows from before the first attempt's training.
    score_before = scored_with(extras, partial(held_out, "test") if before else dict)
    scores_before = _score_before(context, score_before) if before or has_scores(extras) else {}

    # The order of the callbacks matters: extras change weights, then come the held-out scores, the best weights so far,
    # and the seconds, which must be in the checkpoint when its marker is written. Stopping is last.
    for callback in extras:
        trainer.add_callback(callback)
    score_test = scored_with(extras, partial(held_out, "test"))
    score_in_training = score_test
    best = best_so_far(context, trainer)
    chooses_by_loss = best is not None and context.config.best_metric is None
    if best is not None and chooses_by_loss:
        score_in_training = scored_with(extras, best.watching(lambda: _with_prefix(held_out("validation"))))
    progress = ReportProgress(context, score_in_training, context.config.eval_steps, scores_last=chooses_by_loss)
    trainer.add_callback(progress)
    tasks = _add_tasks(context, trainer, extras, best)
    if best is not None:
        trainer.add_callback(best)
    extras = [*extras, *(callback for callback in (tasks, best) if callback is not None)]
    clock = _add_last_callbacks(context, trainer, checkpoint)
    if tasks is not None and checkpoint is None:
        tasks.evaluate(0)  # a resumed run has these scores in its checkpoint
    if checkpoint is not None:
        context.note(f"resuming from {checkpoint}")
    with _untrimmed_heap_for(trainer):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # The time of evaluations on tasks is a separate number.
    seconds = clock.seconds() - (0.0 if tasks is None else tasks.evaluations.seconds)
    if tasks is not None:
        tasks.evaluate(trainer.state.global_step, is_required=context.config.best_metric is not None)
    if best is not None:
        # The last step may be the best one, even if no evaluation was due there.
        if chooses_by_loss and best.scored_step < trainer.state.global_step:
            report_scores(context, trainer.state.global_step, score_in_training())
        best.restore()
    _release_optimizer(trainer)
    state_bytes = keep_trained_state(context, trainer)
    context.phase("scoring held-out rows")
    scores_after = score_test()
    context.log(trainer.state.global_step, **{f"test_{name}": value for name, value in scores_after.items()})

    metrics = {
        **_facts_of_run(trainer),
        **_starts(context, checkpoint),
        "training_seconds": seconds,
        "tokens_per_second": _timed_tokens(trainer, clock, checkpoint) / seconds,
        "state_bytes": state_bytes,
        **_first_and_last_loss(context, trainer),
        **divergence_alarm(context, trainer.state.global_step, scores_before, scores_after),
    }
    for extra in extras:
        metrics |= getattr(extra, "facts", dict)()
    metrics |= {f"test_{name}_before": value for name, value in scores_before.items()}
    return metrics | {f"test_{name}_after": value for name, value in scores_after.items()}


def _add_tasks(
    context: StageContext, trainer: Any, extras: Sequence[TrainerCallback], best: BestSoFar | None
) -> EvaluateTasks | None:
    """Add the callback that evaluates the stage's tasks, if it has any; ``best`` may choose by their metric."""
    if context.config.evaluate is None:
        return None
    # Imported late, because most stages have no tasks.
    from align.training.task_evaluations import EvaluateTasks

    tasks = EvaluateTasks(context, trainer, partial(resulting_weights, extras))
    name = context.config.best_metric
    if best is not None and name is not None:
        best.lower_is_better = tasks.evaluations.tasks.better[name] == "lower"
        tasks.on_scores = lambda scores, step: best.consider(scores[name], step)
    trainer.add_callback(tasks)
    return tasks


def _facts_of_run(trainer: Any) -> dict[str, Any]:
    """Return the steps, tokens and parameters of a run."""
    trained, total = parameter_counts(trainer.model)
    return {
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "tokens": int(trainer.state.num_input_tokens_seen),
        **trainer.memory.facts(),
        "trainable_parameters": trained,
        "parameters": total,
    }


def _first_and_last_loss(context: StageContext, trainer: Any) -> dict[str, Any]:
    """Return the first and the last training loss, if there are steps; warn of a loss that rose, and of no learning."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    _warn_of_lost_progress(context, losses)
    facts = no_learning(context, trainer.state.log_history)
    return {"loss_first": losses[0], "loss_last": losses[-1], **facts} if losses else {}


def _timed_tokens(trainer: Any, clock: TrainingClock, checkpoint: Path | None) -> int:
    """Return the tokens whose seconds are known: an old checkpoint may have none, and then counts no tokens either."""
    tokens = int(trainer.state.num_input_tokens_seen)
    return tokens if clock.is_complete else tokens - _tokens_in(checkpoint)


def _warn_of_lost_progress(context: StageContext, losses: Sequence[float]) -> None:
    """Warn if the means of the loss over five parts of a run fell and then rose again.

    The model has then lost what it had learned. Held-out accuracy may hide it: a reward model whose training broke off
    ranks pairs by differences near zero.
    """
    count = len(losses) // 5
    if count < LOSSES_COMPARED:
        return
    # Four parts begin at the first loss, the fifth ends at the last one. What the division leaves over is in between.
    first, *others = (sum(losses[index * count : (index + 1) * count]) / count for index in range(4))
    lowest = min(first, *others)
    last = sum(losses[-count:]) / count
    gained = first - lowest
    if gained > LEAST_GAIN * abs(first) and last - lowest > MOST_LOST * gained:
        context.warn(
            f"{context.name}: the loss fell from {first:.4g} to {lowest:.4g} and rose to {last:.4g} again (means of "
            f"{count} logged steps). What was learned is lost; lower learning_rate ({context.config.learning_rate:g})."
        )


def _untrimmed_heap_for(trainer: Any) -> AbstractContextManager[None]:
    """Return a context in which glibc keeps the memory of gradients from step to step.

    It applies only if most weights are trained on a CPU. Full SFT ran in 0.82 of its time, and LoRA did not run faster
    (docs/performance.md).
    """
    trained, total = parameter_counts(trainer.model)
    is_due = trainer.args.device.type == "cpu" and trained > total / 2
    return untrimmed_heap() if is_due else contextlib.nullcontext()


def _release_optimizer(trainer: Any) -> None:
    """Free gradients and AdamW's averages, three times the trained weights, before the work after the last step.

    Their last values are in the last checkpoint. A partitioned optimizer belongs to its wrapper and stays.
    """
    if is_sharded(trainer.model) or trainer.is_deepspeed_enabled or trainer.optimizer is None:
        return
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.optimizer.state.clear()
    trim_malloc()


def _add_last_callbacks(context: StageContext, trainer: Any, checkpoint: Path | None) -> TrainingClock:
    """Add the callbacks after a step's scores: clock, checkpoints' markers, kept states, stopping. Return the clock."""
    clock = TrainingClock(checkpoint)
    for callback in (clock, MarkCheckpoints(), *continuing_callbacks(context, trainer), StopOnRequest(context)):
        trainer.add_callback(callback)
    return clock


def _starts(context: StageContext, checkpoint: Path | None) -> dict[str, Any]:
    """Return the steps of the checkpoint that a stage resumed from and of the stage that it continues, with changes."""
    continued = continued_facts(context)
    continued_step = 0 if continued is None else continued.steps
    # The restored state of another stage is also a checkpoint. Only a later step means that this stage was killed.
    resumed_step = _step_of(checkpoint)
    return {
        "resumed_from_step": resumed_step if resumed_step > continued_step else 0,
        "continued_from_step": continued_step,
        **change_facts(context),
    }


class TrainingClock(TrainerCallback):
    """Counts seconds of training and stores them with each checkpoint, so a resumed run continues the count.

    Steps that a kill threw away are run again and count once: tokens over these seconds are the speed of training. The
    record's ``seconds`` is the time of the whole stage, lost work included.
    """

    def __init__(self, resumed: Path | None) -> None:
        """Start to count; ``resumed`` is the checkpoint that training continues from."""
        file = None if resumed is None else resumed / SECONDS_FILE
        self.is_complete = file is None or file.is_file()
        """False if the checkpoint has no seconds; the time before it then counts as 0."""
        self.seconds_before = 0.0
        if file is not None and self.is_complete:
            self.seconds_before = float(file.read_text(encoding="utf-8"))
        self.start = time.perf_counter()

    def seconds(self) -> float:
        """Return the seconds so far."""
        return self.seconds_before + time.perf_counter() - self.start

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            write_text_atomically(folder / SECONDS_FILE, f"{self.seconds():.3f}")


def _with_prefix(scores: Scores) -> Scores:
    return {f"{VALIDATION}{name}": value for name, value in scores.items()}


def _score_before(context: StageContext, held_out: Callable[[], Scores]) -> Scores:
    """Score the held-out rows before training; a resumed attempt reads the scores of the first attempt.

    The model still has its initial weights: no checkpoint is loaded yet.
    """
    context.phase("scoring held-out rows")
    file = context.checkpoints / "before.json"
    # The first process reads for all, so no process scores while another waits for training.
    stored = broadcast(lambda: read_state(file))
    if stored is not None:
        return stored
    scores = held_out()
    context.log(0, **{f"test_{name}": value for name, value in scores.items()})
    if rank() == 0:
        write_state(file, scores)
    return scores


def _step_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("checkpoint-"))


def _tokens_in(checkpoint: Path | None) -> int:
    if checkpoint is None:
        return 0
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state.get("num_input_tokens_seen", 0))


def extra_callbacks(context: StageContext, trainer: Any) -> list[TrainerCallback]:
    """Create the callbacks of ``context.config``, once, from the initial model before a checkpoint is loaded."""
    config: TrainingFields = context.config
    tuning = config.tuning
    callbacks: list[TrainerCallback] = []
    if isinstance(tuning, FullTuning):
        # The trainer reads it when it creates the optimizer, which is later.
        trainer.layer_decay = tuning.layer_decay
        if tuning.scheduled:
            callbacks.append(schedule_layers(context, trainer, tuning))
    # After the schedule has frozen weights and before the first step: the anchor is the model as it is now.
    if config.anchor is not None and config.anchor.to == "l2":
        callbacks.append(PullToStart(trainer.model, config.anchor.weight))
    if config.anchor is not None and config.anchor.to == "kl":
        low = context.precision == "bfloat16"
        trainer.terms = [*trainer.terms, KLToStart(trainer, config.anchor.weight, low)]
    if config.replay is not None:
        replay = make_replay(context, trainer)
        callbacks.append(replay)
        if config.replay_fraction:
            trainer.terms = [*trainer.terms, replay]
    if config.ema is not None:
        callbacks.append(AverageWeights(trainer.model, config.ema))
    return callbacks


def has_scores(callbacks: Sequence[TrainerCallback]) -> bool:
    """Return True if a callback has its own scores."""
    return any(hasattr(callback, "scores") for callback in callbacks)


def scored_with(callbacks: Sequence[TrainerCallback], held_out: Callable[[], Scores]) -> Callable[[], Scores]:
    """Return a function that joins ``held_out`` with the callbacks' ``scores()``, under the resulting weights.

    Those weights are in the model inside ``resulting_weights``.
    """

    def scored() -> Scores:
        with resulting_weights(callbacks):
            scores = dict(held_out())
            for callback in callbacks:
                if hasattr(callback, "scores"):
                    scores |= callback.scores()
            return scores

    return scored


@contextlib.contextmanager
def resulting_weights(callbacks: Sequence[TrainerCallback]) -> Iterator[None]:
    """Enter the ``scoring()`` contexts of all callbacks, which for example swap in averaged weights."""
    with contextlib.ExitStack() as weights:
        for callback in callbacks:
            if hasattr(callback, "scoring"):
                weights.enter_context(callback.scoring())
        yield
