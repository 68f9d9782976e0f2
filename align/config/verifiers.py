"""Fields of a verifier: a program that compares an answer with a column of its row. Torch-free.

A verifier is an entry of ``score:`` and of ``metrics:``, and the ``score`` of an environment with functions.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.config.base import Config
from align.store.fingerprint import canonical

VERSION = 1
"""Increased when an answer gets another verdict than before; part of the key of every stage with a verifier."""
VERIFIERS = ("math", "number", "choice", "exact", "contains", "regex", "json_schema", "ifeval", "code")
"""Fields of which a verifier has exactly one."""
CODE_FIELDS = ("language", "memory_mb", "sandbox")
"""Fields that only ``code`` reads."""


class SandboxConfig(Config):
    """Command that isolates a program, or the permission to run it without isolation. The level is not in the key."""

    command: list[str] | None = Field(None, min_length=1)
    """Command before that of Python: ``[docker, run, --rm, -i, --network=none, python:3.11-slim, timeout, '60']``."""
    unsafe: bool = False
    """Run programs without isolation if there is neither bubblewrap nor Landlock: only for programs you trust."""

    @model_validator(mode="after")
    def _check_single_way(self) -> Self:
        if self.command is not None and self.unsafe:
            raise ValueError("has command and unsafe; a program runs in one way. Remove one of them.")
        return self


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
    language: Literal["python"] = "python"
    """Language of the program that ``code`` runs."""
    seconds: float = Field(5.0, gt=0, le=3600)
    """Time for one answer: wall-clock time of a comparison; processor time of a program, whose wall-clock time is
    limited to twice as much."""
    memory_mb: int = Field(512, ge=64, le=1_048_576)
    """Address space of a program of ``code``, in MiB."""
    sandbox: SandboxConfig | None = None
    """Isolation of the programs of ``code``; by default bubblewrap, else Landlock."""

    verifier_fields: ClassVar[frozenset[str]] = frozenset({*VERIFIERS, *CODE_FIELDS, "seconds"})

    @field_validator("regex")
    @classmethod
    def _check_pattern(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"is no regular expression: {error}.") from None
        return pattern

    @model_validator(mode="after")
    def _check_fields_used(self) -> Self:
        for name in self.changed("seconds", *CODE_FIELDS):
            if self.verifier is None:
                raise ValueError(f"{name} is for a verifier ({', '.join(VERIFIERS)}), and there is none; remove it.")
            if name in CODE_FIELDS and self.verifier != "code":
                raise ValueError(f"{name} is for code, and this is {self.verifier}; remove it.")
        return self

    @property
    def verifier(self) -> str | None:
        """Kind of the verifier: ``math``; None without one."""
        return next((name for name in VERIFIERS if getattr(self, name) is not None), None)

    def verifier_identity(self) -> dict[str, Any]:
        """Return everything that a verdict depends on; the sandbox is not part of it."""
        kind = self.verifier
        assert kind is not None
        identity = {kind: getattr(self, kind), "seconds": self.seconds, "version": VERSION}
        return identity | {"memory_mb": self.memory_mb} if kind == "code" else identity


class EnvironmentVerifier(VerifierFields):
    """A verifier that scores the last turn of an episode."""

    @model_validator(mode="after")
    def _check_single_verifier(self) -> Self:
        kinds = [name for name in VERIFIERS if getattr(self, name) is not None]
        if len(kinds) != 1:
            listed = f"has {' and '.join(kinds)}" if kinds else "has no verifier"
            raise ValueError(f"{listed}; write exactly one of {', '.join(VERIFIERS)}.")
        return self

    @property
    def label(self) -> str:
        """Name in messages."""
        return str(self.verifier)

    def identity(self) -> str:
        """Return everything that the score depends on, as JSON."""
        return canonical(self.verifier_identity())
