"""Chat templates in bounds: hostile ones end with a reason, genuine ones write what they write in transformers."""

from __future__ import annotations

import json
import time
from importlib import resources
from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import _cached_compile_jinja_template as compile_plainly

from align.errors import UserError
from align.models import template_budget
from align.models.chat_template import bound_templates, compile_template
from align.models.loading import load_tokenizer
from align.models.render import render_prompt
from align.models.tiny import CHAT_TEMPLATE

LOOP = "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
LONG = "{% set b = 'x' * 10000000 %}"
HOSTILE = {
    "a huge range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "nested ranges": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "2000000 steps",
    ),
    "a range kept": ("{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}", "steps"),
    "a macro without end": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "without end"),
    "a loop without end": ("{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}", "without end"),
    "a text times a number": ("{{ 'x' * 10**10 }}", "characters"),
    "a text doubled": (LOOP + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "characters"),
    "a text added to itself": (LOOP + "{% set ns.x = ns.x + ns.x %}{% endfor %}", "characters"),
    "a block doubled": (
        LOOP + "{% set s %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = s %}{% endfor %}",
        "characters",
    ),
    "copies of a long text": (LONG + "{% for i in range(99999) %}{% set c = b[1:] %}{% endfor %}", "characters"),
    "a number squared": ("{% set ns = namespace(n=3) %}" + "{% set ns.n = ns.n * ns.n %}" * 20, "4096 bits"),
    "a power": ("{{ 9 ** 9999999 }}", "4096 bits"),
    "a list within itself": (LOOP + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}", "parts"),
    "a mapping within itself": (LOOP + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}", "parts"),
    "a width": ("{{ 'x'|center(10**10) }}", "passes center the number"),
    "a width of a method": ("{{ 'x'.ljust(10**10) }}", "passes ljust the number"),
    "a width in a format": ("{{ '{:>9999999999}'.format(1) }}", "width"),
    "a width in a format's argument": ("{{ '{:{}}'.format(1, 10**10) }}", "width"),
    "a width in a percent format": ("{{ '%9999999999d' % 1 }}", "width"),
    "a width in a date": ("{{ strftime_now('%9999999999Y') }}", "width"),
    "a replacement": (LONG + "{{ b|replace('x', b) }}", "characters"),
    "a replacement by a method": (LONG + "{{ b.replace('x', b) }}", "characters"),
    "joined by a long text": (LONG + "{{ b|join(b) }}", "characters"),
    "joined by a method": (LONG + "{{ b.join(b) }}", "characters"),
    "joined many times": ("{% set b = 'x' * 9**8 %}{{ ([b] * 999)|join }}{{ ([b] * 999)|select|join }}", "characters"),
    "formatted many times": (LONG + "{{ ('{0}' * 99999).format(b) }}", "characters"),
    "formatted by percent many times": (LONG + "{{ ('%(a)s' * 99999) % {'a': b} }}", "characters"),
    "translated": (LONG + "{{ b.translate({120: b}) }}", "characters"),
    "split": ("{{ ('x ' * 10**8).split()|length }}", "characters"),
    "a list of characters": ("{{ ('x' * 10**8)|list|length }}", "characters"),
    "lists added up": ("{% set l = [0] * 10**4 %}{{ ([l] * 99999)|sum(start=[])|length }}", "characters"),
    "bytes": ("{{ 'x'.encode() * 10**10 }}", "characters"),
    "bytes of a number": ("{{ (1).to_bytes(10**10, 'big') }}", "passes to_bytes the number"),
    "tags": ("{{ ('<' * 10**7)|safe|striptags }}", "No filter named 'striptags'"),
    "tags by a method": ("{{ (('<' * 10**7)|safe).striptags() }}", "calls striptags"),
    "comparisons": (
        "{% set a = 'x' * 9**8 %}{% set b = a ~ '' %}{% for i in range(99999) %}{{ a == b }}{% endfor %}",
        "steps",
    ),
    "an indent": ("{{ 'a\nb'|indent(10**10) }}", "passes indent the number"),
    "JSON's indent": ("{{ messages|tojson(indent=10**6) }}", "indents JSON"),
    "batches": ("{{ [1]|batch(10**10, 'x')|list }}", "passes batch the number"),
    "Python's insides": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a function's globals": ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    "a change of the messages": ("{{ messages.append(1) }}", "unsafe"),
    "another template": ("{% include 'x' %}", "loader"),
    "a namespace written out": ("{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}", "namespace"),
    "an error of Python's": ("{{ none + 1 }}", "TypeError"),
    "a division by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "broken syntax": ("{% for %}", "Expected an expression"),
    "a deep expression": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    "a long source": ("x" * 600_000, "600000 characters"),
}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "2 + 2? {{ x }} % {% y %}"},
    {"role": "assistant", "content": " 4\n"},
    {"role": "user", "content": "and Ünïcode \N{GRINNING FACE}?"},
]
CALLING = [
    MESSAGES[1],
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "id": "call00001", "function": {"name": "add", "arguments": {"a": 2, "b": [2, None]}}}
    ]},
    {"role": "tool", "content": "4", "tool_call_id": "call00001", "name": "add"},
    {"role": "assistant", "content": "4"},
]  # fmt: skip
PARAMETERS = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "array"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": PARAMETERS}}]


@pytest.mark.parametrize(("source", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_ends_with_a_reason(source: str, reason: str) -> None:
    with pytest.raises(TemplateError) as caught:
        compile_template(source).render(messages=MESSAGES)
    assert reason in str(caught.value)


def test_the_step_at_which_a_template_is_stopped_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_budget, "STEPS", 20_000)
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{{ note(i, j) }}{% endfor %}{% endfor %}"
    last = []
    for _ in range(2):
        pairs: list[tuple[int, int]] = []
        with pytest.raises(TemplateError, match="steps"):
            compile_template(source).render(note=lambda i, j, pairs=pairs: pairs.append((i, j)))
        last.append(pairs[-1])
    assert last[0] == last[1]


def genuine() -> dict[str, str]:
    """Templates of real models, as trl's wheel carries them, and the project's own."""
    folder = Path(str(resources.files("trl"))) / "chat_templates"
    templates = {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))}
    return {"tiny": CHAT_TEMPLATE} | templates


@pytest.mark.parametrize("name", genuine())
def test_a_genuine_template_writes_what_it_writes_in_transformers(name: str) -> None:
    source = genuine()[name]
    for messages, tools in ((MESSAGES, None), (MESSAGES[1:], None), (CALLING, TOOLS)):
        for prompt in (True, False):
            variables = {
                "messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt,
                "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
            }  # fmt: skip
            assert _outcome(compile_template, source, variables) == _outcome(compile_plainly, source, variables)


def _outcome(compiled, source, variables):  # type: ignore[no-untyped-def]
    try:
        return compiled(source).render(**variables)
    except Exception:
        return "refused"


def test_transformers_renders_in_bounds_and_marks_the_assistants_words_as_before(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    assert chat_template_utils._compile_jinja_template is compile_template
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    encoded = tokenizer.apply_chat_template(
        MESSAGES[1:3], return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    marked = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == " 4\n"


def test_a_template_out_of_bounds_is_the_users_error_and_named(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    for source, reason in (HOSTILE["a huge range"], HOSTILE["nested ranges"], HOSTILE["an error of Python's"]):
        tokenizer.chat_template = source
        with pytest.raises(UserError, match="chat template") as caught:
            render_prompt(tokenizer, [{"role": "user", "content": "a"}])
        assert reason in str(caught.value)
        assert "chat_template" in str(caught.value)


def test_counting_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some three times transformers' own time for a conversation of 400 turns, and far from every bound."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": f"turn {index} " * 20} for index in range(400)]
    source = CHAT_TEMPLATE
    monkeypatch.setattr(template_budget, "STEPS", 20_000)
    assert compile_template(source).render(messages=turns) == compile_plainly(source).render(messages=turns)

    def seconds(compiled) -> float:  # type: ignore[no-untyped-def]
        template, fastest = compiled(source), float("inf")
        for _ in range(7):
            start = time.thread_time()
            template.render(messages=turns)
            fastest = min(fastest, time.thread_time() - start)
        return fastest

    assert seconds(compile_template) < 8 * seconds(compile_plainly) + 0.001


def test_json_is_written_as_in_transformers() -> None:
    source = "{{ x|tojson }} {{ x|tojson(indent=2) }} {{ x|tojson(sort_keys=True, separators=(',', ':')) }}"
    variables = {"x": {"b": "<é>", "a": [1, None, True]}}
    assert compile_template(source).render(**variables) == compile_plainly(source).render(**variables)
    assert json.dumps(variables["x"], ensure_ascii=False) in compile_template(source).render(**variables)


def test_a_second_call_changes_nothing() -> None:
    bound_templates()
    bound_templates()
    assert chat_template_utils._compile_jinja_template is compile_template
