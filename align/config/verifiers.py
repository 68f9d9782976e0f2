"""Fields of a verifier: a program, or a judge with criteria, that checks an answer against its row. Torch-free.

A verifier is an entry of ``score:`` and of ``metrics:``, and the ``score`` of an environment with functions.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from align.config.base import Config
from align.config.endpoint import RewardJudge
from align.store.fingerprint import canonical

VERSION = 4
"""Increased when an answer gets another verdict than before; part of the key of every stage with a verifier."""
PROGRAMS = ("math", "number", "choice", "exact", "contains", "regex", "json_schema", "ifeval", "code")
"""Fields that name a program."""
VERIFIERS = (*PROGRAMS, "criteria")
"""Fields of which a verifier has exactly one. A judge decides on ``criteria``, and a program on each of the others."""
CRITERIA_VERSION = 1
"""Increased when a judge of criteria is asked or read in another way than before; part of keys with ``criteria``."""
UNREADABLE, NO_ANSWER, SATISFIED = "unreadable", "no_answer", "satisfied"
"""Metrics of ``criteria``."""
FAILED = "failed"
"""Metric of a function with ``on_error``: 1 for a response whose calls all failed, else 0."""
CODE_FIELDS = ("language", "memory_mb", "packages", "tolerance", "sandbox")
"""Fields that only ``code`` reads."""


class SandboxConfig(Config):
    """Command that isolates a program, or the permission to run it without isolation. The level is not in the key."""

    command: list[str] | None = Field(None, min_length=1)
    """Command before Python's: ``[docker, run, --rm, -i, --network=none, python:3.11-slim, timeout, '60']``."""
    unsafe: bool = False
    """Run programs without isolation if there is neither bubblewrap nor Landlock: only for programs you trust."""

    @model_validator(mode="after")
    def _check_single_way(self) -> Self:
        if self.command is not None and self.unsafe:
            raise ValueError("has command and unsafe; a program runs in one way. Remove one of them.")
        return self


class Criterion(Config):
    """One criterion that a judge decides on, with yes or no."""

    criterion: str = Field(pattern=r"\S")
    """A statement about the response that is true or false. ``{row[answer]}`` quotes a column of the row."""
    weight: float = 1.0
    """Weight of a satisfied criterion in the score. A negative weight is a penalty."""
    name: str | None = Field(None, pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")
    """Name of a metric that is 1 for a response that satisfies the criterion, else 0."""


def _read_criterion(value: Any) -> Any:
    return {"criterion": value} if isinstance(value, str) else value


def _check_criteria(criteria: list[Criterion]) -> list[Criterion]:
    if all(criterion.weight <= 0 for criterion in criteria):
        raise ValueError("no criterion has a positive weight, so no response could score above 0; give one to some.")
    names = [criterion.name for criterion in criteria if criterion.name is not None]
    for name in names:
        if name in (UNREADABLE, NO_ANSWER, SATISFIED, "std", "length_correlation") or name.endswith("_square"):
            raise ValueError(f"the name '{name}' is taken by another metric; set another `name`.")
        if names.count(name) > 1:
            raise ValueError(f"two criteria are called '{name}'; set another `name` for one of them.")
    return criteria


Criteria = Annotated[
    list[Annotated[Criterion, BeforeValidator(_read_criterion)]], Field(min_length=1), AfterValidator(_check_criteria)
]
"""Criteria that are the same for all rows; each is a text or a block."""


class VerifierFields(Config):
    """One verifier with its limits, all optional: a subclass says if there must be one."""

    math: str | None = Field(None, min_length=1)
    """Column with a mathematical expression, compared by math-verify (``align-pipeline[verify]``)."""
    number: str | None = Field(None, min_length=1)
    """Column with a number. Here and below, ``checks.answer`` is the entry ``answer`` of the JSON in ``checks``."""
    choice: str | None = Field(None, min_length=1)
    """Column with the letter of the right choice."""
    exact: str | None = Field(None, min_length=1)
    """Column with the whole answer, compared as it is except for space around it."""
    contains: str | None = Field(None, min_length=1)
    """Column with a text, or a list of texts, that must all occur in the answer as whole words, in any case."""
    regex: str | None = Field(None, min_length=1)
    """Regular expression that must occur in the answer; ``\\A`` and ``\\Z`` bind it to the beginning and the end."""
    json_schema: str | dict[str, Any] | None = None
    """JSON schema, or a column with one; the answer must be JSON, by itself or in a fenced block."""
    ifeval: str | None = Field(None, min_length=1)
    """Column with ``instruction_id_list`` and ``kwargs`` as IFEval has them; the score is the share followed."""
    code: str | None = Field(None, min_length=1)
    """Column with the tests of a program: asserts, or inputs and outputs."""
    criteria: str | Criteria | None = None
    """Column with a list of criteria and their weights, or a list that all rows share. ``judge`` decides on each."""
    judge: RewardJudge | None = None
    """OpenAI-compatible server that decides on ``criteria``."""
    language: Literal["python"] = "python"
    """Language of the program that ``code`` runs."""
    seconds: float = Field(5.0, gt=0, le=3600)
    """Time for one answer: wall-clock time of a comparison; processor time of a program, whose wall-clock time is
    limited to twice as much."""
    memory_mb: int = Field(512, ge=64, le=1_048_576)
    """Address space of a program of ``code``, in MiB."""
    packages: list[str] = Field(default_factory=list)
    """Packages that programs of ``code`` and their tests may import, such as ``numpy``, each with what it needs."""
    tolerance: float | None = Field(None, gt=0, le=1)
    """Difference that a number in an output of ``code`` may have, absolutely or relative to the expected number. Whole
    numbers must be equal."""
    sandbox: SandboxConfig | None = None
    """Isolation of the programs of ``code``; by default bubblewrap, else Landlock."""

    verifier_fields: ClassVar[frozenset[str]] = frozenset({*PROGRAMS, *CODE_FIELDS, "seconds"})

    @field_validator("regex")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is no regular expression: {error}.") from None
        return pattern

    @field_validator("packages")
    @classmethod
    def _check_packages(cls, packages: list[str]) -> list[str]:
        for name in packages:
            if not name.isidentifier():
                raise ValueError(f"'{name}' is no name of a package; write the name that `import` has, such as numpy.")
        return packages

    @model_validator(mode="after")
    def _check_fields_used(self) -> Self:
        for name in self.changed("seconds", *CODE_FIELDS):
            if self.verifier is None:
                raise ValueError(f"{name} is for a verifier ({', '.join(PROGRAMS)}), and there is none; remove it.")
            if self.verifier == "criteria":
                raise ValueError(f"{name} is for a program, and a judge decides on criteria; remove it.")
            if name in CODE_FIELDS and self.verifier != "code":
                raise ValueError(f"{name} is for code, and this is {self.verifier}; remove it.")
        return self

    @model_validator(mode="after")
    def _check_judge(self) -> Self:
        if self.criteria is None:
            return self
        if self.judge is None:
            raise ValueError("criteria need a judge; write `judge: {endpoint: {url: ..., model: ...}}`.")
        if self.judge.rubric is not None:
            raise ValueError("judge.rubric is for grades, and the criteria say what counts; remove it.")
        return self

    @property
    def verifier(self) -> str | None:
        """Kind of the verifier: ``math``; None without one."""
        return next((name for name in VERIFIERS if getattr(self, name) is not None), None)

    def verifier_identity(self) -> dict[str, Any]:
        """Return everything that a verdict depends on; the sandbox is not part of it."""
        kind = self.verifier
        assert kind is not None
        if self.criteria is not None:
            assert self.judge is not None
            criteria: Any = self.criteria
            if not isinstance(self.criteria, str):
                criteria = [item.model_dump() for item in self.criteria]
            return {"criteria": criteria, "judge": self.judge.identity(), "version": CRITERIA_VERSION}
        identity = {kind: getattr(self, kind), "seconds": self.seconds, "version": VERSION}
        if kind != "code":
            return identity
        # Only what is set: a field with its default leaves the key as it was.
        changed = {name: getattr(self, name) for name in self.changed("packages", "tolerance")}
        return identity | {"memory_mb": self.memory_mb} | changed


class EnvironmentVerifier(VerifierFields):
    """A verifier that scores the last turn of an episode."""

    @model_validator(mode="after")
    def _check_single_verifier(self) -> Self:
        kinds = [name for name in VERIFIERS if getattr(self, name) is not None]
        if len(kinds) != 1:
            listed = f"has {' and '.join(kinds)}" if kinds else "has no verifier"
            raise ValueError(f"{listed}; write exactly one of {', '.join(VERIFIERS)}.")
        if self.judge is not None and self.criteria is None:
            raise ValueError("judge is for criteria, and there are none; remove it, or write `criteria`.")
        if self.judge is not None and self.judge.max_cost is not None:
            raise ValueError(
                "judge.max_cost counts in stages, and not in an environment; remove it, or write the criteria under "
                "the stage's `score`."
            )
        return self

    @property
    def label(self) -> str:
        """Name in messages."""
        return str(self.verifier)

    def identity(self) -> str:
        """Return everything that the score depends on, as JSON."""
        return canonical(self.verifier_identity())
