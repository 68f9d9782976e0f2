"""A Modelfile writes the texts that the checkpoint's template writes, or says that it does not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from align.extensions.formats.ollama import go_template, modelfile, read_turns
from align.models.built_in import make_tiny_tokenizer
from align.models.loading import load_tokenizer

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ (first if loop.first else '') + message['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
LAST_TURN = (
    "{% for message in messages %}{% if loop.last %}!{% endif %}{{ message['role'] }}:{{ message['content'] }}"
    "{% endfor %}"
)


def tokenizer(template: str | None = None) -> Any:
    made = make_tiny_tokenizer()
    made.chat_template = template or made.chat_template
    return made


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """Render the part of Go's templates that a Modelfile here has: a loop, and branches by role and by number."""
    before, body, after = re.split(r"\{\{ range \$i, \$_ := \.Messages \}\}|\{\{ end \}\}\{\{ end \}\}", template)
    branches = dict(re.findall(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else if|\Z)', body, re.DOTALL))
    text = before
    for index, message in enumerate(messages):
        branch = branches[message["role"]]
        branch = re.sub(
            r"\{\{ if eq \$i 0 \}\}(.*?)\{\{ end \}\}", r"\1" if index == 0 else "", branch, flags=re.DOTALL
        )
        text += branch.replace("{{ .Content }}", message["content"])
    return text + after


@pytest.mark.parametrize("template", [None, GEMMA], ids=["chatml", "gemma"])
@pytest.mark.parametrize("has_system", [False, True])
def test_go_template_writes_the_template_s_text(template: str | None, has_system: bool) -> None:
    made = tokenizer(template)
    turns = read_turns(made)
    assert turns is not None
    written = go_template(turns, "")
    assert written is not None
    talk = [{"role": "system", "content": "Be brief."}] if has_system else []
    talk += [
        {"role": "user", "content": "What is {1 + 1}?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And <b>?"},
    ]
    expected = made.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert render_go(written, talk) == expected


def test_system_message_that_template_refuses_has_no_branch() -> None:
    turns = read_turns(tokenizer(NO_SYSTEM))
    assert turns is not None and turns.system is None
    assert '"system"' not in str(go_template(turns, ""))


def test_token_that_engine_adds_is_not_written_twice() -> None:
    turns = read_turns(tokenizer(GEMMA))
    assert turns is not None and turns.start.startswith("<|im_start|>")
    assert "<|im_start|>" not in str(go_template(turns, "<|im_start|>"))


def test_template_that_knows_positions_is_not_translated() -> None:
    assert read_turns(tokenizer(LAST_TURN)) is None


def test_text_that_go_would_read_as_action_is_not_translated() -> None:
    marked = "{% for message in messages %}{{ '{{' }}{{ message['content'] }}{% endfor %}"
    turns = read_turns(tokenizer(marked))
    assert turns is not None and go_template(turns, "") is None


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"do_sample": False}, ["temperature 0"]),
        ({}, []),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
            ["temperature 0.6", "top_k 0", "top_p 0.9", "min_p 0.0", "repeat_penalty 1.0"],
        ),
    ],
    ids=["greedy", "not stated", "sampling"],
)
def test_sampling_defaults_become_parameters(generation: dict[str, Any], expected: list[str]) -> None:
    text = modelfile("m.gguf", ["<|im_end|>", "<eot>"], generation, None)
    assert text.startswith("FROM ./m.gguf\n")
    parameters = re.findall(r"^PARAMETER (.*)$", text, re.MULTILINE)
    assert parameters == ['stop "<|im_end|>"', 'stop "<eot>"', *expected]
    assert "it has no TEMPLATE here" in text


def test_modelfile_has_the_translated_template(tiny_model: Path) -> None:
    turns = read_turns(load_tokenizer(tiny_model))
    assert turns is not None
    text = modelfile("m.gguf", ["<|im_end|>"], {}, go_template(turns, ""))
    assert 'TEMPLATE """{{ range $i, $_ := .Messages }}' in text and "no TEMPLATE" not in text
