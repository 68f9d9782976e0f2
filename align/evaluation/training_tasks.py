"""Tasks of evaluations on a model that is being trained: their items, and one measurement.

The model is one system. Tasks answer, play, read and score as in an ``evaluate`` stage, but with the live model, and no
result is kept on disk. No item may be a row of the ``test`` split of the stage's data.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.stages.evaluation.during_training import TrainingEvaluation
from align.config.validation import suggest
from align.data.rows import Message, Row, normalized, read_rows
from align.data.steps.split import hold_back
from align.environments.user_models import UserResources
from align.errors import UserError
from align.evaluation.answers import Answers, Episodes, Measured, RewardField
from align.evaluation.comparisons import Column, per_item
from align.evaluation.logprobs import LoadedModels
from align.evaluation.participants import Performer, Reader, Respondent
from align.evaluation.plan import build_tasks, check_checkpoints, check_systems
from align.evaluation.scorecard import SystemInfo
from align.evaluation.scoring import ResultCache, ScoringContext
from align.evaluation.systems import Policy, ResponseCache, Sampler, System
from align.evaluation.tasks.base import Task, TaskInputs
from align.evaluation.tasks.perplexity import SHOWN_CHARACTERS
from align.inference.engine import max_positions
from align.inference.protocol import RolloutEngine
from align.pipeline.context import StageContext

RewardScore = Callable[[Sequence[list[Message]], Sequence[str], Sequence[bool]], list[float]]
"""Prompts, answers and whether these are finished → the live reward model's scores."""
REWARD_METRICS: Mapping[str, str | None] = {"accuracy": "higher", "margin": None}
"""Metrics of ``reward_pairs``, with the better side."""


START_WORDS = 3
"""Words of a question from which on it is also found inside an item."""


@dataclass(frozen=True)
class LiveModel:
    """The model at one step: a policy with its engine, or a reward model's scores."""

    policy: Any = None
    """The transformers model, in eval mode."""
    engine: RolloutEngine | None = None
    score: RewardScore | None = None


class TrainingTasks:
    """The tasks of a training stage, checked against its model and its test rows."""

    def __init__(self, context: StageContext, tokenizer: Any, *, is_quiet: bool = False) -> None:
        """Read the items. Raises ``UserError`` for data that does not fit, and for items that are test rows."""
        self.context = context
        self.settings: TrainingEvaluation = context.config.evaluate
        self._messages: set[str] = set()
        warn = _ignore if is_quiet else self.warn_once
        inputs = TaskInputs(
            seed=context.seed,
            base=Path.cwd(),
            pairs=self._held_back_pairs() if self.settings.reads_stage_pairs else [],
            has_second_reward=False,
            precision=context.precision,
            warn=warn,
            note=_ignore if is_quiet else context.note,
        )
        source = context.artifact("policy" if "policy" in context.inputs else "model")
        policy = Policy(source.stage, source.model, context.name, tokenizer)
        self.system = System(SystemInfo(context.name, context.name, "checkpoint", context.name), policy)
        try:
            self.tasks = build_tasks(self.settings.tasks, inputs)
            check_systems(self.tasks, [self.system])
            self.max_length = min(self.settings.max_context, max_positions(source.model) or self.settings.max_context)
            check_checkpoints(self.tasks, [policy], self.max_length)
        except UserError as error:
            raise UserError(f"{context.name}: evaluate.{error}") from None
        self._check_rows("test")
        if not is_quiet:
            self._check_rows("train")
        self.better = self._directions()

    @property
    def samples(self) -> bool:
        """True if a task needs an engine."""
        return any(task.responds or task.plays for task in self.tasks)

    def measure(self, model: LiveModel) -> dict[str, float]:
        """Return the metrics of every task as ``task.metric``."""
        with tempfile.TemporaryDirectory(prefix="evaluation-", dir=self.context.checkpoints) as folder:
            return _Measurement(self, model, Path(folder)).run()

    def _directions(self) -> dict[str, str | None]:
        """Return the better side of every metric by name. Raises ``UserError`` for an unusable ``best_metric``."""
        better: dict[str, str | None] = {}
        for task in self.tasks:
            # The numbers of reward_pairs belong to no system, so the task has no metrics.
            metrics: Mapping[str, str | None] = {name: metric.better for name, metric in task.metrics.items()}
            better |= {f"{task.name}.{name}": side for name, side in (metrics or REWARD_METRICS).items()}
        name = self.settings.best_metric
        if name is not None and better.get(name) is None:
            usable = [metric for metric, side in better.items() if side is not None]
            reason = "has no better side" if name in better else "does not exist"
            raise UserError(
                f"{self.context.name}: evaluate.best_metric '{name}' {reason}; metrics are {', '.join(usable)}."
                f"{suggest(name, usable)}"
            )
        return better

    def _held_back_pairs(self) -> list[Row]:
        data = self.context.artifact("data")
        rows = hold_back(read_rows(data.split("train")), self.context.config.eval_rows)[1]
        if not all("chosen" in row for row in rows):
            raise UserError(
                f"{self.context.name}: evaluate: '{data.stage}' has no pairs for a preference task; name files."
            )
        return rows

    def _check_rows(self, split: str) -> None:
        """Refuse items that are test rows of the stage's data, or warn of items that are trained on."""
        data = self.context.artifact("data" if "data" in self.context.inputs else "prompts")
        questions = Questions(_question(row) for row in read_rows(data.split(split)))
        for task in self.tasks:
            # Pairs that are held back are in the file of the train split, and are not trained on.
            if split == "train" and getattr(self.settings.tasks[task.name], "reads_stage_pairs", False):
                continue
            texts = [normalized(item.prompt[-1]["content"].removesuffix(" …")) for item in task.items if item.prompt]
            count = sum(map(questions.are_in, texts))
            place = f"{self.context.name}: evaluate.tasks.{task.name}: {count} of {len(texts)} items are rows"
            if count and split == "test":
                raise UserError(
                    f"{place} of the test split of '{data.stage}', which training must not look at. Remove them from "
                    "the task's files."
                )
            if count:
                self.warn_once(
                    f"{place} that are trained on, so the numbers do not show how the model does on new ones."
                )

    def warn_once(self, message: str) -> None:
        """Show a warning that every evaluation repeats only once."""
        if message not in self._messages:
            self._messages.add(message)
            self.context.warn(message)


class _Measurement:
    """One evaluation of a live model."""

    def __init__(self, tasks: TrainingTasks, model: LiveModel, folder: Path) -> None:
        self.tasks = tasks
        self.model = model
        self.folder = folder
        self.context = tasks.context
        self.system = tasks.system
        self.results = ResultCache(folder, self.context.warn)
        self.scoring = _LiveScoring(self.context, self.results, model.score)

    def run(self) -> dict[str, float]:
        """Run every task and return its metrics."""
        values: dict[str, float] = {}
        for task in self.tasks.tasks:
            for name, value in self._run_task(task):
                values[f"{task.name}.{name}"] = value
        return values

    def _run_task(self, task: Task) -> Iterator[tuple[str, float]]:
        name = self.system.name
        measured: dict[str, Measured] = {}
        answers: dict[str, Answers] = {}
        episodes: dict[str, Episodes] = {}
        if task.responds:
            respondent = Respondent(self.system, self._sampler, self.tasks.max_length, self.tasks.warn_once)
            answers[name] = task.respond(respondent)
        if task.plays:
            episodes[name] = task.play(self._performer())
        if task.reads:
            models = LoadedModels([self.system.policy], self.model.policy.device, self.context.precision)
            # The model in training takes the place of a checkpoint that would be loaded.
            models.models[self.system.policy.key] = self.model.policy
            measured[name] = task.read(Reader(self.system, models, self.results, self.context.runtime))
        measured |= task.score(answers, self.scoring)
        if task.plays:
            measured |= task.score_episodes(episodes, self.scoring)
        if name in measured:
            yield from _estimates(measured[name])
        for report in task.extras().get("reward_models", []):
            yield "accuracy", float(report["as_labeled"]["value"])
            yield "margin", float(report["margin"]["value"])

    @property
    def _sampler(self) -> Sampler:
        engine = self.model.engine
        assert engine is not None, "a task needs an engine"
        return Sampler(
            [self.system.policy],
            self.context.runtime,
            lambda model_dir, runtime: engine,
            ResponseCache(self.folder / "responses", self.context.warn),
            warn=self.context.warn,
            progress=lambda done, total: None,  # the stage's progress counts its own steps
            precision=self.context.precision,
        )

    def _performer(self) -> Performer:
        return Performer(
            self.system,
            self._sampler,
            results=self.results,
            journals=self.folder / "episodes",
            max_length=self.tasks.max_length,
            users=UserResources(
                runtime=self.context.runtime,
                precision=self.context.precision,
                folder=self.folder,
                shared=None,
                warn=self.context.warn,
                on_hang=self.context.fail_at_once,
            ),
            warn=self.tasks.warn_once,
            note=_ignore,
        )


class _LiveScoring(ScoringContext):
    """Scores answers with the reward model that is being trained; reports no progress."""

    def __init__(self, context: StageContext, results: ResultCache, score: RewardScore | None) -> None:
        super().__init__(context, results, context.name, None, context.precision)
        self._score = score

    def reward_stage(self, field: RewardField = "reward") -> str | None:
        return self.context.name

    def reward_scores(
        self,
        prompts: Sequence[list[Message]],
        answers: Sequence[str],
        endings: Sequence[bool],
        field: RewardField = "reward",
        *,
        tools: Sequence[str | None] | None = None,
    ) -> list[float]:
        assert self._score is not None, "only tasks of a reward stage score with its model"
        return self._score(prompts, answers, endings)

    def progress(self, completed: float, total: float, unit: str) -> None:
        pass


def _estimates(measured: Measured) -> Iterator[tuple[str, float]]:
    """Yield the value of each metric as a scorecard has it, without its interval."""
    for name, values in measured.values.items():
        if name in measured.estimates:
            yield name, float(measured.estimates[name]["value"])
            continue
        column = Column(values, measured.weights.get(name))
        column = column.at(column.counted)
        means = per_item(column.values)
        weights = column.weights or [1.0] * len(means)
        if means:
            yield name, sum(value * weight for value, weight in zip(means, weights, strict=True)) / sum(weights)


class Questions:
    """Normalized questions of a split, looked up in the texts of items, which may add words around them."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = set(texts)
        self._by_start: dict[tuple[str, ...], list[str]] = {}
        for text in self._texts:
            words = text.split()
            # A question of fewer words may be a part of any other text by chance.
            if len(words) >= START_WORDS:
                self._by_start.setdefault(tuple(words[:START_WORDS]), []).append(text)

    def are_in(self, item: str) -> bool:
        """Return True if the normalized text is a question, or contains a question of several words."""
        if item in self._texts:
            return True
        words = item.split()
        # Only questions that begin with these words can begin at this place of the text.
        for start in range(len(words) - START_WORDS + 1):
            for question in self._by_start.get(tuple(words[start : start + START_WORDS]), ()):
                if f"{' '.join(words[start:])} ".startswith(f"{question} "):
                    return True
        return False


def _question(row: Mapping[str, Any]) -> str:
    """Return the normalized text by which a row of a split is compared with items."""
    if row.get("prompt"):
        return normalized(row["prompt"][-1]["content"])
    # Items of perplexity show the beginning of a document.
    return normalized(row.get("text", "")[:SHOWN_CHARACTERS])


def _ignore(message: str) -> None:
    """Drop a message that another pass over the same items shows."""
