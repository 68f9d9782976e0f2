"""The field ``thinking_budget`` of stages that sample. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

ThinkingBudget = Annotated[int | None, Field(ge=1)]
"""Type of the field: tokens after which a thought is closed by force; None for no limit."""


def check_thinking_budget(budget: int | None, max_tokens: int, place: str) -> None:
    """Raise ``ValueError`` if a budget can never close a thought before the limit of a response, ``place``."""
    if budget is not None and budget >= max_tokens:
        raise ValueError(
            f"thinking_budget {budget} leaves no room for an answer in {place} {max_tokens}; lower it, or raise "
            f"{place}."
        )


def response_limit(config: Any) -> tuple[str, int]:
    """Return the field with the most tokens of a response, or of a turn in an environment, and its value."""
    if config.environment is None:
        return "max_tokens", config.max_tokens
    return "turn_max_tokens", turn_limit(config.environment)


def turn_limit(environment: Any) -> int:
    """Return the most tokens of a turn in an environment."""
    return int(environment.turn_max_tokens or environment.max_tokens)


def check_stage_budget(config: Any) -> None:
    """Raise ``ValueError`` if a stage's ``thinking_budget`` leaves no room for an answer in a response or a turn."""
    place, limit = response_limit(config)
    check_thinking_budget(config.thinking_budget, limit, place)
