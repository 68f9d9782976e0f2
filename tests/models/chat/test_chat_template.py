"""Chat templates within limits: hostile ones end with a reason, genuine ones render as in transformers."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils import chat_template_utils
from transformers.utils.chat_template_utils import _cached_compile_jinja_template as compile_plainly

from align.models.built_in import CHAT_TEMPLATE
from align.models.chat import chat_template
from align.models.chat.chat_template import TemplateOutOfBounds, limit_templates
from align.models.chat.render import render_prompt
from align.models.loading import load_tokenizer
from tests.support.refusals import Refused

LOOP = "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
LONG = "{% set b = 'x' * 10000000 %}"
NESTED = LOOP + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
LIMIT = "seconds|memory"
"""The machine's speed decides which limit is reached first."""
HOSTILE = {
    "a huge range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "nested ranges": (ENDLESS, LIMIT),
    "a range kept": ("{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}", LIMIT),
    "a macro without end": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "without end"),
    "a loop without end": ("{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}", "without end"),
    "a text times a number": ("{{ 'x' * 10**10 }}", LIMIT),
    "a text doubled": (LOOP + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}", LIMIT),
    "a text added to itself": (LOOP + "{% set ns.x = ns.x + ns.x %}{% endfor %}", LIMIT),
    "a block doubled": (LOOP + "{% set s %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = s %}{% endfor %}", LIMIT),
    "copies of a long text": (LONG + "{% for i in range(99999) %}{% set c = b[1:] %}{% endfor %}", LIMIT),
    "a power": ("{{ 9 ** 99999 }}", "4300 digits"),
    "a mapping within itself": (LOOP + "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}", LIMIT),
    "a width": ("{{ 'x'|center(10**10) }}", LIMIT),
    "a width of a method": ("{{ 'x'.ljust(10**10) }}", LIMIT),
    "a width in a format": ("{{ '{:>9999999999}'.format(1) }}", LIMIT),
    "a width in a format's argument": ("{{ '{:{}}'.format(1, 10**10) }}", LIMIT),
    "a width in a percent format": ("{{ '%9999999999d' % 1 }}", LIMIT),
    "a replacement": (LONG + "{{ b|replace('x', b) }}", LIMIT),
    "a replacement by a method": (LONG + "{{ b.replace('x', b) }}", LIMIT),
    "joined by a long text": (LONG + "{{ b|join(b) }}", LIMIT),
    "joined by a method": (LONG + "{{ b.join(b) }}", LIMIT),
    "joined many times": ("{% set b = 'x' * 9**8 %}{{ ([b] * 999)|join }}", LIMIT),
    "formatted many times": (LONG + "{{ ('{0}' * 99999).format(b) }}", LIMIT),
    "formatted by percent many times": (LONG + "{{ ('%(a)s' * 99999) % {'a': b} }}", LIMIT),
    "translated": (LONG + "{{ b.translate({120: b}) }}", LIMIT),
    "split": ("{{ ('x ' * 10**8).split()|length }}", LIMIT),
    "a list of characters": ("{{ ('x' * 10**8)|list|length }}", LIMIT),
    "bytes": ("{{ 'x'.encode() * 10**10 }}", LIMIT),
    "bytes of a number": ("{{ (1).to_bytes(10**10, 'big') }}", LIMIT),
    "comparisons": (
        "{% set a = 'x' * 9**8 %}{% set b = a ~ '' %}{% for i in range(99999) %}{{ a == b }}{% endfor %}",
        LIMIT,
    ),
    "an indent": ("{{ 'a\nb'|indent(10**10) }}", LIMIT),
    "JSON's indent": ("{{ messages|tojson(indent=10**9) }}", LIMIT),
    "batches": ("{{ [1]|batch(10**10, 'x')|list }}", LIMIT),
    "Python's insides": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a function's globals": ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    "a change of the messages": ("{{ messages.append(1) }}", "unsafe"),
    "another template": ("{% include 'x' %}", "loader"),
    "an error of Python's": ("{{ none + 1 }}", "TypeError"),
    "a division by zero": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "broken syntax": ("{% for %}", "Expected an expression"),
    "a deep expression": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
}
"""Templates and the reason of their refusal."""
UNINTERRUPTIBLE = (
    NESTED + "{% set m = namespace(x='x') %}{% for i in range(60) %}{% set m.x = [m.x, m.x] %}{% endfor %}"
) + "{{ ns.x == m.x }}"
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


@pytest.fixture(autouse=True)
def _limit_templates() -> None:
    limit_templates()


def compile_limited(source: str) -> Any:
    """Compile as transformers does in a process that has loaded a tokenizer."""
    return chat_template_utils._compile_jinja_template(source)


def use_small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let limits end a rendering soon; on a busy machine a genuine one may be ended as well."""
    monkeypatch.setattr(chat_template, "SECONDS", 0.3)
    monkeypatch.setattr(chat_template, "MEMORY", 256 << 20)


@pytest.mark.parametrize(("source", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_template_ends_with_reason(source: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == LIMIT:
        use_small_limits(monkeypatch)
    with pytest.raises(TemplateError, match=reason):
        compile_limited(source).render(messages=MESSAGES)


def test_endless_template_ends_in_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    template = compile_limited(ENDLESS)
    use_small_limits(monkeypatch)
    with ThreadPoolExecutor(1) as threads, pytest.raises(TemplateOutOfBounds, match="seconds"):
        threads.submit(template.render).result()


def test_limits_end_with_the_rendering() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    seen = []
    compile_limited("{{ note() }}").render(note=lambda: seen.append(resource.getrlimit(resource.RLIMIT_AS)[0]))
    assert 0 < seen[0] < 1 << 45
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 or signal.getitimer(signal.ITIMER_REAL)[0] > 1  # pytest's own


def test_template_stuck_in_c_ends_process() -> None:
    script = (
        "from transformers.utils import chat_template_utils as u; from align.models.chat import chat_template as c; "
        f"c.limit_templates(); template = u._compile_jinja_template({UNINTERRUPTIBLE!r}); "
        "c.SECONDS = 0.05; template.render()"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert process.returncode == -signal.SIGVTALRM
    assert "chat_template.py" in process.stderr


def genuine() -> dict[str, str]:
    """Templates of real models, as trl's wheel carries them, and the project's own."""
    folder = Path(str(resources.files("trl"))) / "chat_templates"
    templates = {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))}
    return {"tiny": CHAT_TEMPLATE} | templates


@pytest.mark.parametrize("name", genuine())
def test_genuine_template_writes_as_in_transformers(name: str) -> None:
    source = genuine()[name]
    for messages, tools in ((MESSAGES, None), (MESSAGES[1:], None), (CALLING, TOOLS)):
        for prompt in (True, False):
            variables = {
                "messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt,
                "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
            }  # fmt: skip
            assert _outcome(compile_limited, source, variables) == _outcome(compile_plainly, source, variables)


def _outcome(compiled, source, variables):  # type: ignore[no-untyped-def]
    try:
        return compiled(source).render(**variables)
    except Exception:
        return "refused"


def test_assistant_tokens_are_marked_as_before(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    encoded = tokenizer.apply_chat_template(
        MESSAGES[1:3], return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    marked = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == " 4\n"


def test_refused_template_is_user_error(refused: Refused, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tiny_model)
    for source, reason in (HOSTILE["a huge range"], HOSTILE["an error of Python's"], HOSTILE["nested ranges"]):
        tokenizer.chat_template = source
        if reason == LIMIT:
            use_small_limits(monkeypatch)
        refused(render_prompt, tokenizer, [{"role": "user", "content": "a"}])


def test_json_is_written_as_in_transformers() -> None:
    source = "{{ x|tojson }} {{ x|tojson(indent=2) }} {{ x|tojson(sort_keys=True, separators=(',', ':')) }}"
    variables = {"x": {"b": "<é>", "a": [1, None, True]}}
    assert compile_limited(source).render(**variables) == compile_plainly(source).render(**variables)
    assert json.dumps(variables["x"], ensure_ascii=False) in compile_limited(source).render(**variables)


def test_second_call_changes_nothing() -> None:
    limited = chat_template_utils._compile_jinja_template
    limit_templates()
    assert chat_template_utils._compile_jinja_template is limited
