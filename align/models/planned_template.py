"""Render the chat template that a model stage will write, while its pipeline is planned. Torch-free.

A plan compares the template with the tokenizer's own, which it replaces, and refuses a stage whose environment has
tools that the template does not write. Templates that are not on this machine are checked only by the stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.hub_commits import small_file
from align.config.stages.inputs import ModelConfig
from align.data.final_answers import PAIRS, TAGS
from align.errors import UserError
from align.models.built_in import CHAT_TEMPLATE as TINY_TEMPLATE
from align.models.chat.named_templates import read_template, read_training_template, templates_with_tools
from align.models.chat.template_settings import TemplateSettings, thinking_switch
from align.models.checkpoints.files import read_optional
from align.models.checkpoints.folder_checks import SETTINGS, TEMPLATE, TOKENIZER
from align.models.checkpoints.source import BUILT_IN, Origin, resolve
from align.models.model_plan import known_vocabulary

FIRST = "Qanat"
ANSWER = "Zephyrus"
SECOND = "Xylem"
RESULT = "Vortex"
"""Rare words of the probes. All other text in a rendering is the template's."""
TURNS = [
    {"role": "user", "content": FIRST},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": SECOND},
    {"role": "assistant", "content": RESULT},
]
TOOL_USE = "tool_use"
"""Name of the template for tools in a tokenizer with several templates."""


@dataclass(frozen=True)
class PlannedTemplate:
    """A chat template with the settings of its tokenizer."""

    text: str
    settings: Mapping[str, Any]
    with_tools: str | None = None
    """The tokenizer's separate template for conversations with tools."""

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """Return the text of a conversation. Raises jinja2's ``TemplateError``."""
        # Imported late, because most pipelines replace no template and have no tools.
        from align.models.chat.chat_template import render_text

        text = self.with_tools if tools and self.with_tools else self.text
        tokens = {name: _token_text(self.settings.get(name)) for name in ("bos_token", "eos_token")}
        return render_text(text, messages=messages, tools=tools, add_generation_prompt=False, **tokens)


def explain_replacement(config: ModelConfig, base: Path) -> str | None:
    """Return a warning if ``chat_template`` writes turns unlike the tokenizer's own template; None if it does not.

    A difference before the first user turn, such as another system prompt, does not count: the turns are the format
    that the model has learned.
    """
    # The built-in models write ChatML. Most shipped pipelines name its template, and their plans then need no jinja2.
    if config.chat_template is None or (config.source in BUILT_IN and config.chat_template == "chatml"):
        return None
    current = _own_template(config, base)
    if current is None:
        return None
    before = _turns(current)
    after = _turns(PlannedTemplate(read_template(config.chat_template, base), current.settings))
    if before is None or after is None or before == after:
        return None
    return (
        f"chat_template: {config.chat_template} replaces the chat template of '{config.source}', and writes turns in "
        f"another format: {_shown(after)} instead of {_shown(before)}. The model has to learn the new format. "
        "Remove chat_template to keep its own."
    )


def check_settings(config: ModelConfig, base: Path, later: Any = None, prefix: str = "") -> None:
    """Raise ``UserError`` if a model stage's template does not read a variable, or has no switch for ``thinking``.

    Args:
        config: The model stage.
        base: Folder of the pipeline's file.
        later: Config of a later stage with settings; by default the model stage's own are checked.
        prefix: Place of the settings, before their field.
    """
    settings = TemplateSettings.of(config if later is None else later)
    template = _planned(config, base) if settings else None
    if template is not None:
        settings.resolve(template.text, prefix)


def writes_no_thoughts(config: ModelConfig, base: Path) -> bool:
    """Return True if a model stage's template is known, and has no mark of a thought."""
    template = _planned(config, base)
    marks = (*(f"{tag}>" for tag in TAGS), *PAIRS, *PAIRS.values(), "<|channel|>", "reasoning_content")
    return template is not None and not any(mark in template.text for mark in marks)


def has_thinking_switch(config: ModelConfig, base: Path) -> bool:
    """Return True if a model stage's template is known, and turns thoughts on and off."""
    template = _planned(config, base)
    return template is not None and thinking_switch(template.text) is not None


def token_counter(config: ModelConfig, base: Path) -> Callable[[Sequence[Mapping[str, Any]]], int] | None:
    """Return the function that counts a conversation's tokens; None if template or tokenizer are not on this machine.

    The function raises jinja2's ``TemplateError`` for a conversation that the template refuses.
    """
    template = _planned(config, base)
    source = resolve(config.source, config.revision, base)
    file = None if source.path is None else source.path / TOKENIZER
    if source.origin is Origin.HUB and source.revision is not None:
        file = small_file(source.name, source.revision, TOKENIZER)
    if template is None or file is None or not file.is_file():
        return None
    # transformers would load torch, which takes longer than to count.
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises the base class
        raise UserError(f"{file}: cannot be read as a tokenizer ({error}).") from None
    return lambda messages: len(tokenizer.encode(template.render(messages), add_special_tokens=False).ids)


def explain_missing_tools(config: ModelConfig, base: Path, names: Sequence[str]) -> str | None:
    """Return an error if a model stage's template does not write tools or their results; None if it does.

    Args:
        config: The model stage.
        base: Folder of the pipeline's file.
        names: Names of the environment's tools.
    """
    template = _planned(config, base)
    missing = None if template is None else _missing_part(template, names)
    if missing is None:
        return None
    fitting = ", ".join(templates_with_tools(known_vocabulary(config, base)))
    ours = f"one of align's that fits its tokens ({fitting}), or " if fitting else ""
    return f"the chat template has {missing}. Name another in chat_template: {ours}a Jinja file."


def _missing_part(template: PlannedTemplate, names: Sequence[str]) -> str | None:
    """Return the part of a conversation with tools that a template does not write; None if it writes all parts."""
    from jinja2 import TemplateError

    tools = [
        {
            "type": "function",
            "function": {"name": name, "description": "", "parameters": {"type": "object", "properties": {}}},
        }
        for name in names
    ]
    call = {"id": "call00000", "type": "function", "function": {"name": names[0], "arguments": {}}}
    result = {"role": "tool", "content": RESULT, "name": names[0], "tool_call_id": call["id"]}
    try:
        prompt = template.render(TURNS[:1], tools)
    except TemplateError:
        return None
    unwritten = [name for name in names if name not in prompt]
    if unwritten:
        return f"no place for tools, and the environment has {', '.join(unwritten)}"
    # Some templates write results only after calls in a field of their own, others only after calls in the text.
    for answer in ({"role": "assistant", "content": "", "tool_calls": [call]}, TURNS[1]):
        try:
            if RESULT in template.render([TURNS[0], answer, result], tools):
                return None
        except TemplateError:
            continue
    return "no place for the results of tools (the role 'tool')"


def _planned(config: ModelConfig, base: Path) -> PlannedTemplate | None:
    """Return the template that a model stage will write; None if it is not on this machine."""
    template = _own_template(config, base)
    if config.chat_template is None:
        return template
    return PlannedTemplate(read_template(config.chat_template, base), {} if template is None else template.settings)


def _own_template(config: ModelConfig, base: Path) -> PlannedTemplate | None:
    """Return the template of the source's tokenizer; None if it has none, or if it is not on this machine."""
    source = resolve(config.source, config.revision, base)
    if source.origin is Origin.TINY:
        return PlannedTemplate(TINY_TEMPLATE, {})
    if source.origin is Origin.EMBEDDED:
        # The training template writes what the model's own template does; the model itself is still in its wheel.
        return PlannedTemplate(read_training_template("smollm2"), {})
    folder = source.path
    if source.origin is Origin.HUB and source.revision is not None:
        file = small_file(source.name, source.revision, SETTINGS)
        folder = None if file is None else file.parent
    elif source.origin is Origin.GGUF:
        folder = None
    if folder is None:
        return None
    settings = read_optional(folder / SETTINGS)
    if (folder / TEMPLATE).is_file():
        text = (folder / TEMPLATE).read_text(encoding="utf-8", errors="replace")
        separate = folder / "additional_chat_templates" / f"{TOOL_USE}.jinja"
        with_tools = separate.read_text(encoding="utf-8", errors="replace") if separate.is_file() else None
        return PlannedTemplate(text, settings, with_tools)
    stored = settings.get("chat_template")
    if isinstance(stored, str):
        return PlannedTemplate(stored, settings)
    templates = {
        str(entry.get("name")): str(entry.get("template")) for entry in stored or [] if isinstance(entry, Mapping)
    }
    return PlannedTemplate(templates["default"], settings, templates.get(TOOL_USE)) if "default" in templates else None


def _turns(template: PlannedTemplate) -> str | None:
    """Return the rendering of two turns from the first user's text on; None for a template that cannot render them."""
    from jinja2 import TemplateError

    try:
        text = template.render(TURNS)
    except TemplateError:
        return None
    _, first, rest = text.partition(FIRST)
    return first + rest.rstrip() if first else None


def _shown(turns: str) -> str:
    """Return the text around the first answer, as Python writes it, with ``…`` for the answer."""
    around = turns.removeprefix(FIRST).partition(SECOND)[0]
    return repr(around.replace(ANSWER, "…"))


def _token_text(token: Any) -> str:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""
