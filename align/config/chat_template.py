"""Fields that set variables of a chat template, such as a model's thinking switch. Torch-free."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator

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
