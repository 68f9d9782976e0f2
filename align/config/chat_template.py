"""Fields that set variables of a chat template, such as the thinking switch, and ``thinking_budget``. Torch-free."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

TemplateValue = bool | int | float | str
"""Value of a template's variable."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SET_BY_ALIGN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})
"""Variables that every rendering sets itself."""


def _spell_switch(value: Any) -> Any:
    """Return ``on`` or ``off`` for the booleans as which YAML reads these words."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _check_names(variables: dict[str, TemplateValue]) -> dict[str, TemplateValue]:
    for name in variables:
        if not NAME.fullmatch(name):
            raise ValueError(f"'{name}' is not the name of a template's variable")
        if name in SET_BY_ALIGN:
            raise ValueError(f"'{name}' is set by every rendering; remove it")
    return variables


Thinking = Annotated[Literal["on", "off"] | None, BeforeValidator(_spell_switch)]
"""``thinking: on`` or ``off``."""
TemplateVariables = Annotated[dict[str, TemplateValue], AfterValidator(_check_names)]
"""``chat_template_kwargs``, as vLLM and transformers call them."""
TEMPLATE_FIELDS = frozenset({"thinking", "chat_template_kwargs"})
"""Fields of a stage that sets variables of a chat template. Keys omit them while they are not set."""
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
