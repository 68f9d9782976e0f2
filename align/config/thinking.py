"""The field ``thinking_budget`` of stages that sample. Torch-free."""

from __future__ import annotations

from typing import Annotated

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
