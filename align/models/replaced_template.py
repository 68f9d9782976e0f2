"""Compare a model stage's ``chat_template`` with the tokenizer's own template, which it replaces. Torch-free.

Both are rendered for one conversation. A difference before the first user turn, such as another system prompt, does not
count: the turns are the format that the model has learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config.hub_commits import small_file
from align.config.stages.model import ModelConfig
from align.models.chat.named_templates import read_template
from align.models.checkpoints.files import read_optional
from align.models.checkpoints.folder_checks import SETTINGS, TEMPLATE
from align.models.checkpoints.source import Origin, resolve

FIRST, ANSWER, SECOND = "Qanat", "Zephyrus", "Xylem"
PROBE = [
    {"role": "user", "content": FIRST},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": SECOND},
    {"role": "assistant", "content": "Vortex"},
]


def explain_replacement(config: ModelConfig, base: Path) -> str | None:
    """Return a warning if ``chat_template`` writes turns unlike the tokenizer's own template; None if it does not.

    None also if the tokenizer's files are not on this machine.
    """
    folder = None if config.chat_template is None else _tokenizer_folder(config, base)
    if config.chat_template is None or folder is None:
        return None
    settings = read_optional(folder / SETTINGS)
    own = _own_template(folder, settings)
    if own is None:
        return None
    before = _turns(own, settings)
    after = _turns(read_template(config.chat_template, base), settings)
    if before is None or after is None or before == after:
        return None
    return (
        f"chat_template: {config.chat_template} replaces the chat template of '{config.source}', and writes turns in "
        f"another format: {_shown(after)} instead of {_shown(before)}. The model has to learn the new format. "
        "Remove chat_template to keep its own."
    )


def _tokenizer_folder(config: ModelConfig, base: Path) -> Path | None:
    """Return the folder with the settings of the source's tokenizer, if this machine has it."""
    source = resolve(config.source, config.revision, base)
    if source.origin in (Origin.FOLDER, Origin.ADAPTER):
        return source.path
    if source.origin is not Origin.HUB or source.revision is None:
        return None
    settings = small_file(source.name, source.revision, SETTINGS)
    return None if settings is None else settings.parent


def _own_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None


def _turns(template: str, settings: Mapping[str, Any]) -> str | None:
    """Return the rendering of two turns from the first user's text on; None for a template that cannot render them."""
    # Imported late, because jinja2 is needed only if there are two templates.
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from align.models.chat.chat_template import with_limits

    tokens = {name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token")}
    # The settings of transformers' own environment.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        text = with_limits(environment.from_string)(template).render(
            messages=PROBE, add_generation_prompt=False, **tokens
        )
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
