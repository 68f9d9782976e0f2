"""Settings of a template are its defaults, in every rendering, and a template without the variable refuses them."""

from __future__ import annotations

from typing import Any

import pytest

from align.models.chat.chat_template import render_text
from align.models.chat.template_settings import TemplateSettings, stored_settings, thinking_state, thinking_switch
from tests.support.chat_templates import THINKING
from tests.support.refusals import Refused

QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "Why?"}]
EMPTY = "<think>\n\n</think>\n\n"
EFFORT = (
    "{%- if effort is not defined %}{%- set effort = 'medium' %}{%- endif %}\n"
    "{{ effort }}{% for m in messages %}{% set role = m.role %}{{ role }}{% endfor %}"
)


class Tokenizer:
    def __init__(self, chat_template: Any) -> None:
        self.chat_template = chat_template


def prompt(template: str, **variables: Any) -> str:
    return render_text(template, messages=QUESTION, add_generation_prompt=True, **variables)


def test_thinking_off_is_default_of_stored_template() -> None:
    off = TemplateSettings("off").write(THINKING)
    assert prompt(off) == prompt(THINKING, enable_thinking=False)
    assert prompt(off).endswith(EMPTY)
    assert stored_settings(off) == {"enable_thinking": False}
    # A request's own value has precedence, as in vLLM.
    assert prompt(off, enable_thinking=True) == prompt(THINKING)
    assert TemplateSettings("on").write(off) == TemplateSettings("on").write(THINKING)


@pytest.mark.parametrize("before", ["", "\n", "\n\n  ", "  ", "text"])
def test_settings_keep_beginning_of_template(before: str) -> None:
    template = before + EFFORT
    for value in ("low", 'a"#}%}\n\u00e9', 3, 0.5, True):
        stored = TemplateSettings(None, {"effort": value}).write(template)
        assert prompt(stored) == prompt(template, effort=value)
        assert stored_settings(stored) == {"effort": value}


def test_thinking_state_follows_template_and_settings() -> None:
    assert thinking_state(Tokenizer(THINKING)) == "on"
    assert thinking_state(Tokenizer({"default": TemplateSettings("off").write(THINKING)})) == "off"
    assert thinking_state(Tokenizer(EFFORT)) is None
    assert thinking_switch(THINKING.replace("enable_thinking", "thinking")) == "thinking"
    # A variable that is read but changes no prompt is not a switch.
    assert thinking_switch(EFFORT.replace("effort", "thinking").replace("{{ thinking }}", "")) is None


def test_settings_change_every_named_template() -> None:
    tokenizer = Tokenizer({"default": THINKING, "tool_use": "tools" + THINKING})
    TemplateSettings("off").apply(tokenizer)
    assert all(prompt(text).endswith(EMPTY) for text in tokenizer.chat_template.values())
    unset = Tokenizer(THINKING)
    TemplateSettings().apply(unset)
    assert unset.chat_template == THINKING


@pytest.mark.parametrize(
    ("template", "settings"),
    [
        (EFFORT, TemplateSettings("off")),
        (EFFORT, TemplateSettings(None, {"efort": "low"})),
        (EFFORT, TemplateSettings(None, {"role": "low"})),
        ("plain", TemplateSettings(None, {"effort": "low"})),
    ],
)
def test_setting_without_variable_is_refused(refused: Refused, template: str, settings: TemplateSettings) -> None:
    refused(settings.write, template)
