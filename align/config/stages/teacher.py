"""The teachers of a distill stage: stages, servers, and the student itself with a privileged prompt. Torch-free."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from align.config.base import Config, stage_input
from align.config.endpoint import EndpointConfig
from align.store.artifacts import GENERATORS

PROVIDER_TOP_K = 20
"""Most log-probabilities of a token that providers return."""


class TeacherConfig(Config):
    """A teacher: exactly one of ``stage``, ``endpoint`` and ``self``."""

    stage: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint is the teacher."""
    endpoint: EndpointConfig | None = None
    """Server that returns log-probabilities of given tokens: vLLM, or a provider's completions."""
    self: bool = False
    """The student before training is the teacher; it needs ``system``."""
    system: str | None = Field(None, pattern=r"\S")
    """System message that only the teacher reads, before the row's own. ``{row[answer]}`` quotes a column that the
    recipe keeps."""
    api: Literal["vllm", "completions"] = "vllm"
    """``vllm`` sends token ids and reads ``prompt_logprobs``. ``completions`` sends text with ``echo`` and
    ``logprobs``."""
    tokens: Literal["same", "aligned"] = "same"
    """``same`` refuses a teacher with another vocabulary. ``aligned`` compares only tokens with equal text at the same
    place in both tokenizations; the record counts all others."""
    match: str | None = None
    """Value of ``teacher_column`` in the rows of this teacher, if there are several."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        sources = [name for name in ("stage", "endpoint", "self") if getattr(self, name)]
        if len(sources) != 1:
            shown = f"has {' and '.join(sources)}" if sources else "has none of stage, endpoint and self"
            raise ValueError(f"{shown}; a teacher is exactly one of them.")
        if self.self and self.system is None:
            raise ValueError("self without system is the student itself, so there is nothing to learn; set system.")
        if self.api != "vllm" and self.endpoint is None:
            raise ValueError("api is for an endpoint; remove it.")
        if self.tokens == "aligned" and (self.self or (self.endpoint is not None and self.api == "vllm")):
            reason = "the student's own tokens" if self.self else "token ids to the server"
            remedy = "remove it" if self.self else "set `api: completions`, which sends text"
            raise ValueError(f"tokens: aligned is for another tokenizer, and this teacher reads {reason}; {remedy}.")
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that distributions depend on; a stage is an input of the distill stage."""
        settings = self.model_dump(exclude={"stage", "endpoint"}) | {"stage": self.stage is not None}
        return settings | ({} if self.endpoint is None else self.endpoint.identity())


def check_teachers(teachers: list[TeacherConfig], column: str | None, top_k: int | None, temperature: float) -> None:
    """Raise ``ValueError`` for teachers that do not fit the settings of their stage."""
    values = [teacher.match for teacher in teachers]
    if len(teachers) > 1 and column is None:
        raise ValueError("several teachers need teacher_column, the column of the rows that chooses among them.")
    if column is not None and (None in values or len(set(values)) < len(values)):
        raise ValueError(f"each teacher needs its own `match`, a value of the column '{column}'.")
    if column is None and values != [None]:
        raise ValueError("match is for several teachers; remove it, or set teacher_column.")
    if top_k is None:
        raise ValueError("top_k null compares full distributions, which needs `teacher: STAGE`; set top_k.")
    endpoints = [teacher for teacher in teachers if teacher.endpoint is not None]
    if endpoints and temperature != 1:
        raise ValueError(
            f"temperature {temperature:g} needs logits; servers return log-probabilities at temperature 1. Set "
            "temperature: 1.0."
        )
    if top_k > PROVIDER_TOP_K and any(teacher.api == "completions" for teacher in endpoints):
        raise ValueError(
            f"top_k {top_k} is more than providers return for a token (at most {PROVIDER_TOP_K}, some 5); write "
            f"top_k: {PROVIDER_TOP_K}."
        )
