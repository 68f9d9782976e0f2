"""Variables of a chat template, such as ``enable_thinking``, stored as defaults in the template itself. Torch-free.

A setting is written in front of the template's text, in Jinja. Every program that renders the checkpoint's template
then uses it: training, engines, judges, vLLM, llama.cpp and transformers. A request that passes the variable overrides
it. Excluded: where the settings come from (``align.config.chat_template``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, Self

from align.config.chat_template import SET_BY_ALIGN, TemplateValue
from align.config.validation import hint_nearest
from align.data.final_answers import KNOWN, Marks
from align.errors import UserError

SWITCHES = ("enable_thinking", "thinking")
"""Variables that turn thoughts on and off: Qwen3, SmolLM3, GLM and Gemma; DeepSeek V3.1 and Granite."""
STORED = re.compile(r"\{#- chat_template_kwargs (?P<settings>\{.*?\}) -#\}[^\n]*\n")
"""The line of the settings, with a comment that has them as JSON."""
OF_TRANSFORMERS = SET_BY_ALIGN | {"raise_exception", "strftime_now", "pad_token", "unk_token", "namespace", "range"}
"""Variables and functions that no user sets."""
QUESTION = [{"role": "user", "content": "a"}]
THOUGHT = "A thought of mine."
ANSWER = "An answer of mine."
"""Texts by which the marks of thoughts are looked for."""
MARK = re.compile(r"[<\[◁【][^\s<>\[\]◁▷【】]+[>\]▷】]")
"""A mark of a chat template: text in brackets without white space."""
TOKENS = {"bos_token": "", "eos_token": ""}

THOUGHT_ROWS = "thought_rows"
"""Metric of a stage that trains on answers: the number of rows whose answer has a thought."""

State = Literal["on", "off"]


@dataclass(frozen=True)
class TemplateSettings:
    """Settings of a chat template, as a stage's config has them."""

    thinking: State | None = None
    variables: Mapping[str, TemplateValue] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Any) -> Self:
        """Return the settings of a stage or block with the fields ``thinking`` and ``chat_template_kwargs``."""
        return cls(config.thinking, config.chat_template_kwargs)

    def __bool__(self) -> bool:
        return self.thinking is not None or bool(self.variables)

    @property
    def thinking_state(self) -> State | None:
        """The state that these settings ask for; None if they have no thinking switch."""
        values = [self.variables[name] for name in SWITCHES if isinstance(self.variables.get(name), bool)]
        if self.thinking is None and values:
            return "on" if values[0] else "off"
        return self.thinking

    def apply(self, tokenizer: Any, prefix: str = "") -> None:
        """Store the settings in the tokenizer's template, in place.

        Raises ``UserError``, whose field follows ``prefix``, for a variable that the template does not read, and for
        ``thinking`` if it has no switch.
        """
        if not self:
            return
        template = tokenizer.chat_template
        if isinstance(template, str):
            tokenizer.chat_template = self.write(template, prefix)
        else:
            # A tokenizer may have several templates by name, of which only some read the variable.
            default = self.resolve(template["default"], prefix)
            tokenizer.chat_template = {name: store(text, default) for name, text in template.items()}

    def write(self, template: str, prefix: str = "") -> str:
        """Return ``template`` with the settings stored in it. Raises ``UserError`` as :meth:`apply` does."""
        return store(template, self.resolve(template, prefix))

    def resolve(self, template: str, prefix: str = "") -> dict[str, TemplateValue]:
        """Return the template's variables with their values. Raises ``UserError`` as :meth:`apply` does."""
        names = template_variables(template)
        variables = f"Its variables are {', '.join(names)}." if names else "It has no variables."
        for name in self.variables:
            if name not in names:
                raise UserError(
                    f"{prefix}chat_template_kwargs: the chat template does not read '{name}'."
                    f"{hint_nearest(name, names)} {variables}"
                )
        values = dict(self.variables)
        if self.thinking is not None:
            switch = thinking_switch(template)
            if switch is None:
                raise UserError(
                    f"{prefix}thinking: the chat template has no switch for thoughts ({', '.join(SWITCHES)}). "
                    f"{variables} Set one of them in chat_template_kwargs, or remove thinking."
                )
            values[switch] = self.thinking == "on"
        if self.thinking_state == "on" and find_marks(template) is None and KNOWN.search(template) is None:
            field = "chat_template_kwargs" if self.thinking is None else "thinking"
            raise UserError(
                f"{prefix}{field}: thinking is on, and the chat template does not show where a thought ends: it writes "
                "no thought of an answer, and has no known mark such as </think>. Thoughts would be scored and learned "
                "as answers. Set `thinking: off`, or name a template that writes thoughts between marks in the model "
                "stage's chat_template."
            )
        return values


def stored_settings(template: str | Mapping[str, str]) -> dict[str, TemplateValue]:
    """Return the settings that a template has stored; of several templates by name, the default's."""
    line = STORED.search(_default(template))
    settings: dict[str, TemplateValue] = {} if line is None else json.loads(line["settings"])
    return settings


def without_settings(template: str) -> str:
    """Return the template without its stored settings."""
    return STORED.sub("", template, count=1)


def store(template: str, values: Mapping[str, TemplateValue]) -> str:
    """Return the template with more settings stored; a value replaces an earlier one."""
    settings = stored_settings(template) | dict(values)
    if not settings:
        return template
    text = json.dumps(settings).replace("#", "\\u0023")  # '#}' would end the comment
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in settings.items()
    )
    # Jinja removes the line break after the last tag, as transformers sets it up. The template starts a line as before.
    return f"{{#- chat_template_kwargs {text} -#}}{defaults}\n{without_settings(template)}"


def _literal(value: TemplateValue) -> str:
    return json.dumps(value).replace("#", "\\u0023")


@lru_cache(maxsize=64)
def template_variables(template: str) -> list[str]:
    """Return the variables that a template reads and users may set; none for a template that cannot be parsed."""
    from jinja2 import TemplateError, meta, nodes

    from align.models.chat.chat_template import template_environment

    environment = template_environment()
    try:
        tree = environment.parse(without_settings(template))
    except TemplateError:
        return []
    # A variable that the template assigns is its own, unless the template asks if a user has set it.
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    tests: Iterator[Any] = tree.find_all((nodes.Test, nodes.Filter))
    questions = [test.node for test in tests if test.name in ("defined", "undefined", "default")]
    tested = {node.name for node in questions if isinstance(node, nodes.Name)}
    names = meta.find_undeclared_variables(tree) - (assigned - tested)
    return sorted(names - OF_TRANSFORMERS - environment.globals.keys())


def thinking_switch(template: str) -> str | None:
    """Return the variable that turns thoughts on and off; None if no variable changes the prompt."""
    for name in SWITCHES:
        if name in template_variables(template):
            prompts = [_prompt(template, {name: value}) for value in (True, False)]
            if prompts[0] != prompts[1]:
                return name
    return None


def thinking_state(tokenizer: Any) -> State | None:
    """Return whether the tokenizer's template asks for thoughts; None if it has no switch."""
    return template_state(_default(tokenizer.chat_template))


def _default(template: str | Mapping[str, str]) -> str:
    """Return the template, or the default of several by name."""
    return template if isinstance(template, str) else template["default"]


@lru_cache(maxsize=64)
def template_state(template: str) -> State | None:
    """Return whether a template asks for thoughts; None if it has no switch."""
    switch = thinking_switch(template)
    if switch is None:
        return None
    # A template has its own default, which differs between families.
    return "on" if _prompt(template, {}) == _prompt(template, {switch: True}) else "off"


def _prompt(template: str, variables: Mapping[str, TemplateValue]) -> str | None:
    """Return a short prompt; None if the template refuses it."""
    return _render(template, QUESTION, {**variables, "add_generation_prompt": True})


def _render(template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, TemplateValue]) -> str | None:
    """Return a conversation's text; None if the template refuses it."""
    from jinja2 import TemplateError

    from align.models.chat.chat_template import render_text

    try:
        return render_text(template, messages=messages, **TOKENS, **variables)
    except TemplateError:
        return None


def tokenizer_marks(tokenizer: Any) -> Marks | None:
    """Return the marks of thoughts in a tokenizer's chat template; None if it shows none."""
    template = getattr(tokenizer, "chat_template", None)
    return find_marks(_default(template)) if template else None


@lru_cache(maxsize=64)
def find_marks(template: str) -> Marks | None:
    """Return the marks that a template writes around a thought; None if it writes no thought in a final answer."""
    # A template may write thoughts only if they are switched on.
    candidates = (_find_marks(template, variables) for variables in ({}, dict.fromkeys(SWITCHES, True)))
    return next((marks for marks in candidates if marks is not None), None)


def _find_marks(template: str, variables: Mapping[str, TemplateValue]) -> Marks | None:
    answer = {"role": "assistant", "content": ANSWER}
    thoughts = dict.fromkeys(("reasoning_content", "thinking", "reasoning"), THOUGHT)
    prompt = _prompt(template, variables) or ""
    plain = _render(template, [*QUESTION, answer], variables) or ""
    # 1. Render an answer with a thought. The text around the thought has its marks.
    before, thought, after = (_render(template, [*QUESTION, answer | thoughts], variables) or "").rpartition(THOUGHT)
    between, answered, _ = after.partition(ANSWER)
    mark = MARK.search(between)
    closing = between.strip() if mark is None else mark[0]
    if not (thought and answered and closing):
        return None
    # 2. The opening mark follows the generation prompt, or is its end.
    own = before.removeprefix(prompt) if before.startswith(prompt) else ""
    openings = MARK.findall(before)
    opening = own.strip() or (openings[-1] if openings else "")
    if not opening:
        return None
    # 3. Some templates begin an answer with a header, after a thought and without.
    header = plain.removeprefix(prompt).partition(ANSWER)[0].strip() if plain.startswith(prompt) else ""
    is_header = between.endswith(header) and closing not in header
    return Marks(opening, closing, between, header if is_header else "", before.startswith(prompt) and not own.strip())
