"""Answers that a judge grades or compares: MT-Bench, AlpacaEval, or any questions; by a reward model or an endpoint.

``grade`` asks an endpoint for 1 to 10, turn by turn; ``compare`` asks which of two systems' answers is better, in both
orders, where verdicts that differ are a tie. The questions to the judge are this project's own words, so the numbers
compare systems with each other, and with no published table. Left out: judges of a third kind (a checkpoint of the
pipeline can be served as an endpoint), and win rates weighted by a judge's probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.data.evaluation_sets import HUB
from align.errors import UserError
from align.evaluation.judges.judgments import EndpointJudge, look_for
from align.evaluation.tasks.base import Given, TaskConfig
from align.evaluation.tasks.judged_items import REFERENCED, make_items, read_references
from align.evaluation.tasks.reading import TaskData, TaskRecord
from align.store.fingerprint import canonical

if TYPE_CHECKING:
    from align.evaluation.tasks.judged_task import JudgedTask

Mode = Literal["grade", "compare"]
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
"""MT-Bench's sampling temperatures by category (FastChat, llm_judge/common.py)."""
OTHER_TEMPERATURE = 0.7
"""FastChat's for a category it does not know."""


class TaskJudge(EndpointJudge):
    """Who judges: ``{reward: true}``, the stage's reward model, or ``{endpoint: {...}}``."""

    reward: bool | Literal["second_reward"] = False
    """The stage's reward model (or its second one) prefers the answer it scores higher; it knows no order."""

    @model_validator(mode="after")
    def _one_judge(self) -> Self:
        if bool(self.reward) == (self.endpoint is not None):
            raise ValueError("name who judges: `reward: true` or `endpoint`, one of them")
        if self.reward:
            # compared with the defaults: a stage's process reads settings back with all of them written out
            fields = type(self).model_fields
            names = ("rubric", "max_tokens", "temperature", "seed")
            useless = sorted(name for name in names if getattr(self, name) != fields[name].get_default())
            if useless:
                raise ValueError(f"a reward model has no use for {', '.join(useless)}; drop it")
        return self

    @property
    def which(self) -> str | None:
        """The reward model that judges, as the stage calls it; None for an endpoint."""
        return ("second_reward" if self.reward == "second_reward" else "reward") if self.reward else None

    def identity(self) -> dict[str, Any]:
        """What verdicts depend on; the reward model itself is an input of the stage."""
        return {"reward": self.which} if self.reward else super().identity()


class JudgedConfig(TaskData, TaskConfig):
    """Settings of a judged task.

    Records have ``turns`` (MT-Bench), ``instruction`` with or without ``input`` and ``output`` (AlpacaEval), ``prompt``
    (text, turns or messages) or ``question``; ``category``, ``dataset`` or ``source`` names their category.
    """

    task: Literal["judged"] = "judged"
    preset: Literal["mt_bench", "alpaca_eval"] | None = None
    """``mt_bench``: graded, temperature by category, references for math, reasoning and coding. ``alpaca_eval``:
    compared."""
    mode: Mode | None = None
    """``grade``: 1 to 10 for each answer. ``compare``: which of two systems' answers is better; the default without a
    preset."""
    judge: TaskJudge
    """Who judges, and by which rubric."""
    against: Literal["reference", "base", "file", "all"] | None = None
    """Whom ``compare`` compares each system with: the stage's reference (the default), the base model, the ``output``
    of the records, or every other system."""
    references_files: list[str] | None = Field(None, min_length=1)
    """Files of reference answers for the judge, by ``question_id``; without, records' own ``reference`` is taken."""
    max_tokens: int = Field(1024, ge=1)
    """Longest answer to each turn; 1024 is FastChat's. What is longer is cut off there, and counted."""
    temperature: float | None = Field(None, ge=0)
    """Sampling temperature of the answers; by default 0, and with ``mt_bench`` what FastChat takes for the category."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the likeliest tokens that make up this much probability; 1 keeps all."""

    identified: ClassVar[frozenset[str]] = TaskData.identified | {"judge", "references_files"}

    @property
    def how(self) -> Mode:
        """Graded or compared."""
        return self.mode or ("grade" if self.preset == "mt_bench" else "compare")

    def usual(self) -> Mapping[str, str] | None:
        """The preset's place on the Hub, where it has one whose records are plain files."""
        return HUB.get(self.preset or "")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.how == "grade" and self.judge.reward:
            raise ValueError(
                "a reward model's scores are no grades from 1 to 10. Write `mode: compare`, or give the judge an "
                "endpoint"
            )
        if self.how == "grade" and self.against is not None:
            raise ValueError("against is whom `mode: compare` compares with, and this task grades; drop one of them")
        if self.references_files and self.judge.reward:
            raise ValueError("references_files are shown to an endpoint; a reward model reads none")
        return self

    def identities(self, base: Path) -> dict[str, str]:
        """Digests of the files, and what stands for the judge."""
        from align.data.source_configs import FilesSource
        from align.data.sources import identity

        found = super().identities(base)
        if self.references_files is not None:
            try:
                digests = identity(FilesSource(type="files", paths=self.references_files), base)
            except UserError as error:
                raise UserError(f"references_files: {error}") from None
            found |= {f"references: {name}": digest for name, digest in digests.items()}
        return found | {"judge": canonical(self.judge.identity())}

    def sampling_temperature(self, category: str) -> float:
        """Of the answers to a question of this category."""
        if self.temperature is not None:
            return self.temperature
        return TEMPERATURES.get(category, OTHER_TEMPERATURE) if self.preset == "mt_bench" else 0.0

    def build(self, name: str, given: Given) -> JudgedTask:
        """Read the questions; look whether the judge is there."""
        from align.evaluation.tasks.judged_contests import ComparedTask
        from align.evaluation.tasks.judged_grades import GradedTask

        which = self.judge.which
        if which is not None and not (given.has_reward if which == "reward" else given.has_second_reward):
            raise UserError(f"judge.reward: the stage was given no {which}; name a reward stage as `{which}`.")
        records = self.records(given.base, given.seed)
        self._check(records)
        references = None if self.references_files is None else read_references(self.references_files, given.base)
        only = REFERENCED if self.preset == "mt_bench" else None
        items = make_items(records, references, only, name)
        task = (GradedTask if self.how == "grade" else ComparedTask)(name, self, items, given)
        if self.judge.endpoint is not None:
            look_for(self.judge.endpoint, f"tasks.{name}.judge.endpoint", given.warn)
            lacking = [item for item in task.items if item.source in REFERENCED and not item.data["references"]]
            if self.preset == "mt_bench" and lacking:
                given.warn(
                    f"tasks.{name}: {len(lacking)} questions of math, reasoning and coding have no reference answer, "
                    "and judges are often wrong there; name references_files"
                )
        return task

    def _check(self, records: list[TaskRecord]) -> None:
        """What the preset and ``against`` need of every record."""
        for record in records:
            if self.preset == "mt_bench":
                record.text("category")
            if self.against == "file" and not isinstance(record["output"], str):
                raise record.wrong("output", "text: the answer that systems are compared with")
            if self.against == "file" and isinstance(record.get("turns"), list) and len(record["turns"]) > 1:
                raise UserError(
                    f"{record.where}: there are {len(record['turns'])} turns and one output; `against: file` compares "
                    "answers to single questions."
                )
