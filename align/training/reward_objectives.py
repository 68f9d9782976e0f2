"""Objectives of reward models: pairs, scores of answers, or labels of steps. Rows, trainer and metrics of each.

The stage (``align.stages.reward``) has what all three share. ``rows.py`` encodes pairs; single answers, with one number
per answer or one per step, are encoded here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from align.config.own_function import OwnFunction
from align.data.rows import is_finished
from align.errors import UserError, with_article
from align.methods.call import Method
from align.methods.contract import SCORES, check
from align.models.chat.render import render_answered
from align.models.reward import Steps, tokenize_steps
from align.pipeline.context import StageContext
from align.store.artifacts import Kind
from align.training import held_out, reward_trainer
from align.training.input_checks import check_encoded
from align.training.reward_trainer import NumberCollator, NumberReward, PairReward, RewardCollator
from align.training.rows import TOO_LONG, Encoded, Row, encode_conversations, number_rows, read_splits

if TYPE_CHECKING:
    from align.config.stages.reward import RewardConfig


@dataclass(frozen=True)
class Scale:
    """Standardizes targets: subtracts ``mean`` and divides by ``deviation``."""

    mean: float = 0.0
    deviation: float = 1.0

    def __call__(self, target: float) -> float:
        return (target - self.mean) / self.deviation


class Objective(ABC):
    """Encoded splits, trainer and metrics of one objective."""

    lint: ClassVar[Literal["reward", "kto"]]
    """Kind of stage whose rules the linter applies to the rows."""
    kinds: ClassVar[tuple[Kind, ...]]
    """Kinds of data that it can train on."""
    steps: Steps | None = None
    """Splits answers into steps; None if steps have no scores."""

    def __init__(self, context: StageContext, tokenizer: Any) -> None:
        self.config: RewardConfig = context.config
        self.tokenizer = tokenizer
        self.context = context
        self.stored_rows: dict[str, list[Row]] = {}
        self.splits: dict[str, Encoded] = {}
        data = context.artifact("data")
        if data.kind not in self.kinds:
            raise UserError(
                f"{context.name}: objective {self.config.objective} learns from {' or '.join(self.kinds)}, and data "
                f"points at '{data.stage}', {with_article(data.kind)}. Change one of them."
            )
        splits = read_splits(context)
        if "test" not in splits:
            raise UserError(
                f"{context.name}: the test split of '{data.stage}' is empty, and a reward model's accuracy is measured "
                "on it; write a test_size above 0 in its recipe."
            )
        for split, stored in splits.items():
            rows = self.stored_rows[split] = self.rows(stored, split)
            self.splits[split] = encoded = self.encode(rows)
            check_encoded(context, encoded, len(rows), split)

    @property
    def center_rewards(self) -> float | None:
        """trl's coefficient for centered rewards."""
        return None

    @abstractmethod
    def rows(self, rows: list[Row], split: str) -> list[Row]:
        """Return the rows to train on from a split's stored rows."""

    @abstractmethod
    def encode(self, rows: list[Row]) -> Encoded:
        """Encode rows to token ids."""

    @abstractmethod
    def sequences(self, row: dict[str, Any]) -> list[list[int]]:
        """Return the token ids of an encoded row's answers."""

    @abstractmethod
    def trainer(self, **options: Any) -> Any:
        """Return the trainer for the rows."""

    @abstractmethod
    def held_out(self, trainer: Any, split: str) -> dict[str, float]:
        """Return the scores on a held-out split."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return metrics that need no training; ``test_pairs`` is the number of pairs behind ``accuracy``."""

    def save(self, folder: Path) -> None:
        """Write the settings that scoring needs, in addition to the weights."""
        if self.steps is not None:
            self.steps.write(folder)


class Pairs(Objective):
    """Bradley-Terry."""

    lint = "reward"
    kinds = (Kind.PREFERENCES,)

    def __init__(self, context: StageContext, tokenizer: Any) -> None:
        loss = context.config.loss
        self.own_loss: Method | None = None
        if isinstance(loss, OwnFunction):
            self.own_loss = Method.own(loss, f"{context.name}.loss")
        super().__init__(context, tokenizer)
        self.sources: list[Row] = []
        if self.own_loss is not None:
            self.sources = number_rows(self.splits)
            check(self.own_loss, SCORES, f"{context.name}.loss", self.sources)

    @property
    def center_rewards(self) -> float | None:
        return self.config.center_rewards or None

    def rows(self, rows: list[Row], split: str) -> list[Row]:
        return rows

    def encode(self, rows: list[Row]) -> Encoded:
        encoded = encode_conversations(self.tokenizer, rows, self.config.max_length)
        if self.config.margin:
            # The margin is a column of the rows: trl's loss subtracts it from the score difference.
            add_margins(encoded, self.config.margin, self.context.name)
        return encoded

    def sequences(self, row: dict[str, Any]) -> list[list[int]]:
        return [row["chosen_ids"], row["rejected_ids"]]

    def trainer(self, **options: Any) -> Any:
        if self.own_loss is None:
            trainer = PairReward(**options)
            trainer.label_smoothing = self.config.label_smoothing
            return trainer
        trainer = PairReward(data_collator=RewardCollator(self.tokenizer.pad_token_id), **options)
        trainer.pair_loss, trainer.sources = self.own_loss, self.sources
        return trainer

    def held_out(self, trainer: Any, split: str) -> dict[str, float]:
        return held_out.pairs(trainer, self.splits[split], self.tokenizer.pad_token_id)

    def facts(self) -> dict[str, Any]:
        train = self.splits["train"]
        test = self.splits["test"]
        return {"pairs": len(train.rows), "test_pairs": len(test.rows), **held_out.pair_facts(test)}


class Regression(Objective):
    """Scores of single answers."""

    lint = "kto"
    kinds: ClassVar[tuple[Kind, ...]] = (Kind.PREFERENCES, Kind.INSTRUCTIONS, Kind.UNPAIRED)
    scale = Scale()

    def rows(self, rows: list[Row], split: str) -> list[Row]:
        answers = scored_answers(rows)
        if split == "train":
            # The scale comes from the training rows only, which are the first split.
            scale = scale_of(answers, self.context.name)
            self.scale = scale if self.config.score_loss == "mse" else self.scale
        if self.config.score_loss == "bce":
            targets = [row["target"] for row in answers if row["target"] is not None]
            out_of_range = [target for target in targets if not 0 <= target <= 1]
            if out_of_range:
                raise UserError(
                    f"{self.context.name}: score_loss is bce, which needs scores from 0 to 1, and "
                    f"{len(out_of_range)} of {len(answers)} {split} answers have others, such as "
                    f"{out_of_range[0]:g}. Set `score_loss: mse`."
                )
        return answers

    def encode(self, rows: list[Row]) -> Encoded:
        return encode_scored(self.tokenizer, rows, self.config.max_length, self.scale)

    def sequences(self, row: dict[str, Any]) -> list[list[int]]:
        return [row["input_ids"]]

    def trainer(self, **options: Any) -> Any:
        trainer = NumberReward(data_collator=NumberCollator(self.tokenizer.pad_token_id), **options)
        trainer.score_loss = self.config.loss_of_numbers
        trainer.label_smoothing = self.config.label_smoothing
        return trainer

    def held_out(self, trainer: Any, split: str) -> dict[str, float]:
        return reward_trainer.numbers(trainer, self.splits[split])

    def facts(self) -> dict[str, Any]:
        train = self.splits["train"]
        test = self.splits["test"]
        targets = [float(row["targets"][0]) for row in test.rows]
        # The number of pairs depends on the targets only.
        better, _ = reward_trainer.disjoint_pairs(targets, targets)
        scale = {"score_mean": self.scale.mean, "score_deviation": self.scale.deviation}
        return {"answers": len(train.rows), "test_answers": len(test.rows), "test_pairs": len(better), **scale}


class Process(Regression):
    """Labels of the steps of answers."""

    kinds = (Kind.UNPAIRED,)

    def __init__(self, context: StageContext, tokenizer: Any) -> None:
        steps = context.config.steps
        self.steps = Steps(steps.separator, steps.aggregate)
        super().__init__(context, tokenizer)

    def rows(self, rows: list[Row], split: str) -> list[Row]:
        return stepwise_answers(rows, self.config.steps.separator, self.context.name)

    def encode(self, rows: list[Row]) -> Encoded:
        return encode_steps(self.tokenizer, rows, self.config.max_length, self.config.steps.separator)

    def held_out(self, trainer: Any, split: str) -> dict[str, float]:
        return reward_trainer.steps(trainer, self.splits[split])

    def facts(self) -> dict[str, Any]:
        train = self.splits["train"]
        test = self.splits["test"]
        marks = [float(target >= 0.5) for row in test.rows for target in row["targets"]]
        better, _ = reward_trainer.disjoint_pairs(marks, marks)
        steps = sum(len(row["targets"]) for row in train.rows)
        return {
            "answers": len(train.rows),
            "steps_marked": steps,
            "test_answers": len(test.rows),
            "test_pairs": len(better),
            "test_wrong_steps": 1 - sum(marks) / len(marks),
        }


OBJECTIVES: dict[str, type[Objective]] = {"pairs": Pairs, "regression": Regression, "process": Process}


def prepare(context: StageContext, tokenizer: Any) -> Objective:
    """Return the objective of ``context.config``. Raises ``UserError`` for data that it cannot train on."""
    return OBJECTIVES[context.config.objective](context, tokenizer)


def add_margins(encoded: Encoded, factor: float, stage: str) -> None:
    """Set each pair's margin to ``factor`` times its score difference; 0 if the difference is negative or unknown.

    Raises ``UserError`` if no pair has two scores.
    """
    scored_pairs = 0
    for row, source in zip(encoded.rows, encoded.sources, strict=True):
        chosen = source.get("chosen_score")
        rejected = source.get("rejected_score")
        scored = chosen is not None and rejected is not None
        scored_pairs += scored
        row["margin"] = factor * max(0.0, chosen - rejected) if scored else 0.0  # type: ignore[operator,assignment]
    if encoded.rows and not scored_pairs:
        raise UserError(
            f"{stage}: margin is {factor:g}, and none of the {len(encoded.rows)} pairs has chosen_score and "
            "rejected_score. Use pairs of scored answers, or remove margin."
        )


NO_SCORE = "skipped: no score"
OTHER_STEPS = "skipped: its numbers of steps and labels differ"


def scored_answers(rows: Sequence[Row]) -> list[Row]:
    """Return one row with ``completion`` and ``target`` per answer.

    A pair has two answers (``chosen_score``, ``rejected_score``); another row has ``score``, or ``label`` as 1 or 0.
    The same answer to the same prompt is used once, so rows sampled into several pairs do not count twice.
    """
    answers: dict[str, Row] = {}
    for row in rows:
        for answer, target, has_end in _answers(row):
            single = {
                name: value for name, value in row.items() if name not in ("chosen", "rejected", "label", "score")
            }
            # Two answers are the same with equal prompt, text, end and tools.
            key = repr((row["prompt"], answer, has_end, row.get("tools")))
            answers.setdefault(key, {**single, "completion": answer, "target": target, "completion_finished": has_end})
    return list(answers.values())


def _answers(row: Row) -> list[tuple[Any, float | None, bool]]:
    if row.get("chosen") is not None:
        return [(row[side], row.get(f"{side}_score"), is_finished(row, side)) for side in ("chosen", "rejected")]
    label = row.get("label")
    target = row.get("score") if label is None else float(label)
    return [(row["completion"], target, is_finished(row, "completion"))]


def scale_of(rows: Sequence[Row], stage: str) -> Scale:
    """Return mean and standard deviation of the rows' targets. Raises ``UserError`` for no or equal targets."""
    targets = [row["target"] for row in rows if row["target"] is not None]
    if not targets:
        raise UserError(
            f"{stage}: objective is regression, and none of the {len(rows)} training answers has a score. It is read "
            "from chosen_score and rejected_score of pairs, from score of instructions (a `score` step writes it), or "
            "from label of unpaired rows."
        )
    # Not deviation == 0: the mean of equal scores may be off by rounding.
    if min(targets) == max(targets):
        raise UserError(
            f"{stage}: all {len(targets)} training answers have the score {targets[0]:g}: nothing to learn."
        )
    mean = sum(targets) / len(targets)
    deviation = math.sqrt(sum((target - mean) ** 2 for target in targets) / len(targets))
    return Scale(mean, deviation)


def encode_scored(tokenizer: Any, rows: Sequence[Row], max_length: int, scale: Scale) -> Encoded:
    """Encode ``input_ids`` (prompt and answer) and ``targets``, a list with a number; skip rows that are too long."""
    out = Encoded()
    for row in rows:
        if row["target"] is None:
            out.count(NO_SCORE)
            continue
        ids = render_answered(tokenizer, row)
        if len(ids) > max_length:
            out.count(TOO_LONG, len(ids))
            continue
        out.add({"input_ids": ids, "places": [len(ids) - 1], "targets": [scale(row["target"])]}, len(ids), row)  # type: ignore[list-item, dict-item]
    return out


def stepwise_answers(rows: Sequence[Row], separator: str, stage: str) -> list[Row]:
    """Return rows whose ``completion`` joins their steps by ``separator``. Raises ``UserError`` for no steps."""
    answers = [
        {**row, "completion": [{"role": "assistant", "content": separator.join(s["content"] for s in row["steps"])}]}
        for row in rows
        if row.get("steps")
    ]
    if not answers:
        raise UserError(
            f"{stage}: objective is process, and none of the {len(rows)} rows has steps. Build them with a recipe of "
            "kind unpaired and format stepwise (prompt, completions, labels)."
        )
    return answers


def encode_steps(tokenizer: Any, rows: Sequence[Row], max_length: int, separator: str) -> Encoded:
    """Encode ``input_ids``, ``places`` (each step's last token) and ``targets`` (each step's label, 0 to 1)."""
    out = Encoded()
    for row in rows:
        has_end = is_finished(row, "completion")
        ids, places = tokenize_steps(
            tokenizer, row["prompt"], row["completion"], separator, finished=has_end, tools=row.get("tools")
        )
        targets = [float(step["label"]) for step in row["steps"] if step["content"].strip()]
        if len(places) != len(targets):
            out.count(OTHER_STEPS)
            continue
        if len(ids) > max_length:
            out.count(TOO_LONG, len(ids))
            continue
        out.add({"input_ids": ids, "places": places, "targets": targets}, len(ids), row)  # type: ignore[dict-item]
    return out
