"""What a reward model learns from: pairs, scores of answers, or marks on their steps. Rows, trainer, measures of each.

The stage (``align.stages.reward``) does what all three share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from align.errors import UserError
from align.models.steps import Steps
from align.pipeline.context import StageContext
from align.store.artifacts import Kind
from align.training import held_out, reward_held_out
from align.training.input_checks import check_encoded
from align.training.reward_trainer import NumberCollator, NumberReward, PairReward
from align.training.rows import Encoded, Row, encode_conversations, read_splits
from align.training.scored_rows import (
    Scale,
    encode_scored,
    encode_steps,
    scale_of,
    scored_answers,
    stepwise_answers,
)

if TYPE_CHECKING:
    from align.config.stages.reward import RewardConfig


class Objective(ABC):
    """Encoded splits of one objective and what is done with them."""

    lint: ClassVar[Literal["reward", "kto"]]
    """As what the linter looks at the rows."""
    kinds: ClassVar[tuple[Kind, ...]]
    """Data it can learn from."""
    steps: Steps | None = None
    """How answers are cut into steps, where each has a score."""

    def __init__(self, context: StageContext, tokenizer: Any) -> None:
        self.config: RewardConfig = context.config
        self.tokenizer, self.context = tokenizer, context
        self.given: dict[str, list[Row]] = {}
        self.splits: dict[str, Encoded] = {}
        data = context.artifact("data")
        if data.kind not in self.kinds:
            raise UserError(
                f"{context.name}: objective {self.config.objective} learns from {' or '.join(self.kinds)}, and data "
                f"points at '{data.stage}', a {data.kind}. Change one of them."
            )
        for split, stored in read_splits(context).items():
            rows = self.given[split] = self.rows(stored, split)
            self.splits[split] = encoded = self.encode(rows)
            check_encoded(context.name, encoded, len(rows), split, self.config.max_length, context.warn)

    @property
    def center_rewards(self) -> float | None:
        """trl's coefficient."""
        return None

    @abstractmethod
    def rows(self, rows: list[Row], split: str) -> list[Row]:
        """What is learned from a split's rows."""

    @abstractmethod
    def encode(self, rows: list[Row]) -> Encoded:
        """Their token ids."""

    @abstractmethod
    def sequences(self, row: dict[str, Any]) -> list[list[int]]:
        """The token ids of an encoded row's answers."""

    @abstractmethod
    def trainer(self, **given: Any) -> Any:
        """The trainer that takes the rows."""

    @abstractmethod
    def held_out(self, trainer: Any, split: str) -> dict[str, float]:
        """Scores on a held-out split."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Metrics that need no training; ``test_pairs`` is what ``accuracy`` rests on."""

    def save(self, folder: Path) -> None:
        """Write beside the weights what reading a score needs."""
        if self.steps is not None:
            self.steps.write(folder)


class Pairs(Objective):
    """Bradley-Terry."""

    lint = "reward"
    kinds = (Kind.PREFERENCES,)

    @property
    def center_rewards(self) -> float | None:
        return self.config.center_rewards or None

    def rows(self, rows: list[Row], split: str) -> list[Row]:
        return rows

    def encode(self, rows: list[Row]) -> Encoded:
        encoded = encode_conversations(self.tokenizer, rows, self.config.max_length)
        if self.config.margin:
            add_margins(encoded, self.config.margin, self.context.name)
        return encoded

    def sequences(self, row: dict[str, Any]) -> list[list[int]]:
        return [row["chosen_ids"], row["rejected_ids"]]

    def trainer(self, **given: Any) -> Any:
        made = PairReward(**given)
        made.label_smoothing = self.config.label_smoothing
        return made

    def held_out(self, trainer: Any, split: str) -> dict[str, float]:
        return held_out.pairs(trainer, self.splits[split], self.tokenizer.pad_token_id)

    def facts(self) -> dict[str, Any]:
        train, test = self.splits["train"], self.splits["test"]
        return {"pairs": len(train.rows), "test_pairs": len(test.rows), **held_out.pair_facts(test)}


class Regression(Objective):
    """Scores of single answers."""

    lint = "kto"
    kinds: ClassVar[tuple[Kind, ...]] = (Kind.PREFERENCES, Kind.INSTRUCTIONS, Kind.UNPAIRED)
    scale = Scale()

    def rows(self, rows: list[Row], split: str) -> list[Row]:
        found = scored_answers(rows)
        if split == "train":
            scale = scale_of(found, self.context.name)
            self.scale = scale if self.config.score_loss == "mse" else self.scale
        if self.config.score_loss == "bce":
            odd = [row["target"] for row in found if row["target"] is not None and not 0 <= row["target"] <= 1]
            if odd:
                raise UserError(
                    f"{self.context.name}: score_loss is bce, which takes scores from 0 to 1, and {len(odd)} of "
                    f"{len(found)} {split} answers have others, such as {odd[0]:g}. Take `score_loss: mse`."
                )
        return found

    def encode(self, rows: list[Row]) -> Encoded:
        return encode_scored(self.tokenizer, rows, self.config.max_length, self.scale)

    def sequences(self, row: dict[str, Any]) -> list[list[int]]:
        return [row["input_ids"]]

    def trainer(self, **given: Any) -> Any:
        made = NumberReward(data_collator=NumberCollator(self.tokenizer.pad_token_id), **given)
        made.score_loss, made.label_smoothing = self.config.loss_of_numbers, self.config.label_smoothing
        return made

    def held_out(self, trainer: Any, split: str) -> dict[str, float]:
        return reward_held_out.numbers(trainer, self.splits[split])

    def facts(self) -> dict[str, Any]:
        train, test = self.splits["train"], self.splits["test"]
        targets = [float(row["targets"][0]) for row in test.rows]
        better, _ = reward_held_out.disjoint_pairs(targets, targets)
        scale = {"score_mean": self.scale.mean, "score_deviation": self.scale.deviation}
        return {"answers": len(train.rows), "test_answers": len(test.rows), "test_pairs": len(better), **scale}


class Process(Regression):
    """Marks on the steps of answers."""

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
        return reward_held_out.steps(trainer, self.splits[split])

    def facts(self) -> dict[str, Any]:
        train, test = self.splits["train"], self.splits["test"]
        marks = [float(target >= 0.5) for row in test.rows for target in row["targets"]]
        better, _ = reward_held_out.disjoint_pairs(marks, marks)
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
    """The rows of ``context.config.objective``. Raises ``UserError`` for data it cannot learn from."""
    return OBJECTIVES[context.config.objective](context, tokenizer)


def add_margins(encoded: Encoded, factor: float, stage: str) -> None:
    """Give each pair ``factor`` times what its chosen side's score is ahead; 0 where it is behind or not known.

    Raises ``UserError`` where no pair has two scores.
    """
    known = 0
    for row, source in zip(encoded.rows, encoded.sources, strict=True):
        chosen, rejected = source.get("chosen_score"), source.get("rejected_score")
        scored = chosen is not None and rejected is not None
        known += scored
        row["margin"] = factor * max(0.0, chosen - rejected) if scored else 0.0  # type: ignore[operator,assignment]
    if encoded.rows and not known:
        raise UserError(
            f"{stage}: margin is {factor:g}, and none of the {len(encoded.rows)} pairs has chosen_score and "
            "rejected_score. Take pairs of scored answers, or leave margin out."
        )
