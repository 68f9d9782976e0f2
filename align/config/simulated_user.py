"""The block ``user:`` of an environment: a model that plays the user, and what it is told. Torch-free.

Leaves out the conversations (``align.environments.simulated_user``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from align.config.base import Config, stage_input
from align.config.endpoint import EndpointConfig
from align.config.recipe.templates import MissingValue, parse_template
from align.errors import UserError, shorten
from align.store.artifacts import GENERATORS

BLOCK, USER, MODEL = "environment", "user", "model"
USER_INPUT = f"{BLOCK}.{USER}.{MODEL}"
"""Name of the user's checkpoint among a stage's inputs."""


class SimulatedUserConfig(Config):
    """A model that plays the user. Exactly one field of model and endpoint is set."""

    model: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint speaks as the user, by transformers in the stage's own process."""
    endpoint: EndpointConfig | None = None
    """OpenAI-compatible server that speaks as the user."""
    prompt: str = Field(pattern=r"\S")
    """System message of the user's model: who it is and what it wants. ``{goal}`` quotes a column of the row; a brace
    is written twice."""
    stop: str | None = Field(None, pattern=r"\S")
    """Text by which the user ends the conversation, as the prompt tells it to: ``###STOP###``. What follows it is
    dropped. Null: the user never ends it."""
    opens: bool = False
    """The user speaks first. The policy sees only the system messages of the row's prompt, or of the messages that
    ``reset`` returns."""
    max_tokens: int = Field(256, ge=1)
    """Most tokens of an answer. One that is cut off there fails its episode."""
    temperature: float = Field(1.0, ge=0, le=5)
    """Sampling temperature of the user; 0 is greedy."""
    max_cost: float | None = Field(None, gt=0)
    """Stop before the endpoint costs more in all, by its prices; raise it and run again to continue."""

    @field_validator("prompt")
    @classmethod
    def _is_template(cls, prompt: str) -> str:
        parse_template(prompt)
        return prompt

    @model_validator(mode="after")
    def _has_one_model(self) -> Self:
        if (self.model is None) == (self.endpoint is None):
            have = "both are" if self.model else "neither is"
            raise ValueError(f"either model or endpoint speaks as the user; {have} set.")
        if self.max_cost is not None and (self.endpoint is None or self.endpoint.price_input is None):
            raise ValueError("max_cost needs endpoint.price_input and endpoint.price_output.")
        return self

    @property
    def label(self) -> str:
        """Name of the user's model in messages."""
        return str(self.model) if self.endpoint is None else f"{self.endpoint.model} at {self.endpoint.url}"

    def identity(self) -> dict[str, Any]:
        """Return all that answers depend on, but for a checkpoint: that is an input of the stage."""
        settings = self.model_dump(exclude={"model", "endpoint", "max_cost"})
        return settings if self.endpoint is None else settings | {"endpoint": self.endpoint.identity()}

    def system_message(self, row: Mapping[str, Any], place: str) -> str:
        """Return the prompt for a row. Raises ``UserError``, which begins with ``place``, for a column it lacks."""
        try:
            return parse_template(self.prompt).render(row)
        except MissingValue as error:
            columns = ", ".join(sorted(shorten(str(name)) for name in row))
            raise UserError(
                f"{place}.prompt: row {row.get('id', '')}: {error}. A recipe keeps a column with `keep`; the row has "
                f"{columns}."
            ) from None


def rename_user_stage(block: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """Return a block with an ``environment``, as the YAML has it, with the stage of its user renamed."""
    environment = block.get(BLOCK)
    user = environment.get(USER) if isinstance(environment, dict) else None
    if not isinstance(environment, dict) or not isinstance(user, dict) or not isinstance(user.get(MODEL), str):
        return block
    return {**block, BLOCK: {**environment, USER: {**user, MODEL: rename(user[MODEL])}}}
