"""An Ollama ``Modelfile`` for a GGUF file: where the file is, tokens that end an answer, sampling, and the template.

Ollama does not run the Jinja template inside a GGUF file. It compares the text with the texts of a list; within 99
edits it uses its own Go template of that name, and otherwise only the prompt (``template/template.go`` in Ollama). So
the checkpoint's template is translated: it is rendered for several conversations, and if the texts between the messages
depend on their roles only, a Go template writes the same texts. Other templates are not translated, and the Modelfile
says so. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MODELFILE = "Modelfile"
SYSTEM = "QSYSTEMQ"
USERS = ("QUSERONEQ", "QUSERTWOQ", "QUSERTHREEQ")
ANSWERS = ("QANSWERONEQ", "QANSWERTWOQ")
"""Messages of the conversations that are rendered; none is in a template."""
PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Field of generation_config.json → parameter of Ollama."""
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
"""Values that leave the model's distribution as it is."""
UNTRANSLATED = (
    "# The chat template is more than a text for each role, so it has no TEMPLATE here. Ollama does not run the Jinja\n"
    "# template inside the GGUF file: unless it recognizes the template, it sends the prompt without one. Write a\n"
    "# TEMPLATE, or serve the file with `llama-server --jinja -m FILE`, which runs the checkpoint's own template."
)
TRANSLATED = (
    "# The checkpoint's chat template as a Go template. It was compared for conversations in which user and assistant\n"
    "# take turns, with and without a system message; tools and thoughts are not part of it."
)


@dataclass(frozen=True)
class Turns:
    """The texts between the messages of a conversation that ends with a user's message."""

    start: str
    """Before the first user's message, if there is no system message."""
    answer: str
    """From a user's message to the assistant's."""
    user: str
    """From an assistant's message to the user's."""
    prompt: str
    """Behind the last message: the beginning of the answer."""
    system: tuple[str, str] | None
    """Before a system message, and from it to the user's; None if the template refuses one."""


def read_turns(tokenizer: Any) -> Turns | None:
    """Return the texts of a chat template; None if they depend on more than the roles.

    Special tokens at the beginning that the engine adds itself are removed by ``go_template``.
    """
    first, second, third = ({"role": "user", "content": text} for text in USERS)
    answers = [{"role": "assistant", "content": text} for text in ANSWERS]
    talk = [first, answers[0], second, answers[1], third]
    plain = _between(tokenizer, talk)
    single = _between(tokenizer, [first])
    if plain is None or single is None:
        return None
    turns = Turns(plain[0], plain[1], plain[2], plain[5], None)
    expected = [turns.start, turns.answer, turns.user, turns.answer, turns.user, turns.prompt]
    if plain != expected or single != [turns.start, turns.prompt]:
        return None
    with_system = _between(tokenizer, [{"role": "system", "content": SYSTEM}, *talk])
    if with_system is None:
        return turns
    turns = Turns(turns.start, turns.answer, turns.user, turns.prompt, (with_system[0], with_system[1]))
    return turns if with_system == [*with_system[:2], *expected[1:]] else None


def _between(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[str] | None:
    """Return the texts before, between and behind messages; None if the template refuses or repeats them."""
    from jinja2 import TemplateError

    from align.errors import UserError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    except (TemplateError, UserError):
        return None
    parts = []
    for message in messages:
        before, found, text = text.partition(message["content"])
        if not found or any(other["content"] in before for other in messages):
            return None
        parts.append(before)
    return None if any(message["content"] in text for message in messages) else [*parts, text]


def go_template(turns: Turns, added: str) -> str | None:
    """Return the texts as a Go template for Ollama; None for texts that neither Go nor a Modelfile can hold.

    ``added`` is the text of the token that the engine puts before every prompt; empty for none.
    """
    texts = [turns.start, turns.answer, turns.user, turns.prompt, *(turns.system or ())]
    if any(mark in text for text in texts for mark in ("{{", "}}", '"""')):
        return None
    start = turns.start.removeprefix(added)
    branches = f'{{{{ if eq .Role "user" }}}}{{{{ if eq $i 0 }}}}{start}{{{{ end }}}}{{{{ .Content }}}}'
    branches += f'{{{{ else if eq .Role "assistant" }}}}{turns.answer}{{{{ .Content }}}}{turns.user}'
    if turns.system is not None:
        before, behind = turns.system
        branches += f'{{{{ else if eq .Role "system" }}}}{before.removeprefix(added)}{{{{ .Content }}}}{behind}'
    return f"{{{{ range $i, $_ := .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{turns.prompt}"


def modelfile(gguf: str, ends: Iterable[str], generation: Mapping[str, Any], template: str | None) -> str:
    """Return the text of a Modelfile.

    Args:
        gguf: Name of the file next to the Modelfile.
        ends: Texts of the tokens that end an answer.
        generation: Fields of generation_config.json; the sampling defaults of the checkpoint.
        template: The Go template, or None.
    """
    lines = [f"FROM ./{gguf}", ""]
    lines += [f'PARAMETER stop "{text}"' for text in ends if '"' not in text]
    lines += [f"PARAMETER {name} {value}" for name, value in _sampling(generation).items()]
    lines.append("")
    if template is None:
        return "\n".join([*lines, UNTRANSLATED, ""])
    return "\n".join([*lines, TRANSLATED, f'TEMPLATE """{template}"""', ""])


def _sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return Ollama's parameters for the sampling defaults of a checkpoint; none if it has no defaults."""
    stated = {name: generation[field] for field, name in PARAMETERS.items() if generation.get(field) is not None}
    if generation.get("do_sample") is False:
        return {"temperature": 0}
    if not stated and not generation.get("do_sample"):
        return {}
    # Without these Ollama would use its own defaults, among them a temperature of 0.8.
    return NEUTRAL | stated
