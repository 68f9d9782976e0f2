"""Tool calls: each format's own form is read, malformed calls are answered with a sentence, thoughts call nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.environment import TOOL_FORMATS
from align.data.tool_calls import FORMATS, ParsedTurn, detect_format, tool_call_format
from tests.support.refusals import Refused

ADD = ("add", {"a": 1, "b": [2.5, "x", None, True]})


def calls(turn: ParsedTurn) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of a turn without errors."""
    assert not turn.errors, turn.errors
    return [(call.name, call.arguments) for call in turn.calls]


def error(name: str, text: str) -> str:
    """The only error of a turn."""
    (message,) = tool_call_format(name).parse(text).errors
    return message


WRITTEN = {
    "hermes": 'Sure.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2.5, "x", null, true]}}\n</tool_call>',
    "smollm3": 'Sure.\n<code>add(a=1, b=[2.5, "x", None, True])</code>',
    "llama3": '<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": [2.5, "x", null, true]}}',
    "mistral": 'Sure.[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": [2.5, "x", null, true]}, "id": "c1"}]',
    "olmo3": 'Sure.<function_calls>add(a=1, b=[2.5, "x", null, true])</function_calls>',
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_call_in_each_format(name: str) -> None:
    turn = tool_call_format(name).parse(WRITTEN[name])
    assert calls(turn) == [ADD]
    assert turn.content == ("" if name == "llama3" else "Sure.")
    assert turn.calls[0].text in WRITTEN[name] and "add" in turn.calls[0].text


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_calls_nothing(name: str) -> None:
    for text in ("", " The sum is 3. ", '{"name": "Ada", "age": 3}', "[1, 2]", "a < b <code"):
        assert tool_call_format(name).parse(text) == ParsedTurn(text.strip())


def test_several_calls_of_a_turn() -> None:
    one, two = '{"name": "f", "arguments": {}}', '{"name": "g", "arguments": {"x": "</tool_call>"}}'
    expected = [("f", {}), ("g", {"x": "</tool_call>"})]
    hermes = tool_call_format("hermes")
    turn = hermes.parse(f"a<tool_call>{one}</tool_call>\nb\n<tool_call>{two}</tool_call>c")
    assert calls(turn) == expected and turn.content == "a\nb\nc"
    assert calls(hermes.parse(f"<tool_call>[{one}, {two}]</tool_call>")) == expected
    mistral = tool_call_format("mistral")
    assert calls(mistral.parse(f"[TOOL_CALLS] [{one}, {two}]")) == expected
    newer = 'Hm.[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g[CALL_ID]abc123def[ARGS]{"x": "</tool_call>"}'
    turn = mistral.parse(newer)
    assert calls(turn) == expected and turn.content == "Hm." and turn.calls[1].id == "abc123def"
    assert calls(mistral.parse('[TOOL_CALLS]g{"x": "</tool_call>"}')) == expected[1:]
    llama = tool_call_format("llama3")
    assert calls(llama.parse(f"{one}; {two}")) == expected
    olmo = tool_call_format("olmo3")
    assert calls(olmo.parse('<function_calls>f()\ng(x="</tool_call>")</function_calls>')) == expected
    assert calls(tool_call_format("smollm3").parse(f"<tool_call>{one}</tool_call>")) == expected[:1]


def test_other_ways_to_write_the_same_call() -> None:
    nested = {"function": {"name": "f", "arguments": json.dumps({"x": 1})}, "id": 7, "type": "function"}
    turn = tool_call_format("hermes").parse(f"<tool_call>{json.dumps(nested)}</tool_call>")
    assert calls(turn) == [("f", {"x": 1})] and turn.calls[0].id == "7"
    assert calls(tool_call_format("llama3").parse('<|python_tag|>search.call(query="Rome")')) == [
        ("search", {"query": "Rome"})
    ]
    assert calls(tool_call_format("llama3").parse('\n{"type": "function", "name": "f", "parameters": {}}')) == [
        ("f", {})
    ]


def test_thoughts_call_nothing() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    hermes = tool_call_format("hermes")
    assert calls(hermes.parse(f"<think>\nI could {call}</think>\n\nNo.")) == []
    assert calls(hermes.parse(f"I could {call}\n</think>\n\n{call}")) == [("f", {})]
    assert calls(hermes.parse(f"<think>never closed {call}")) == []
    # A tag in a call's text is no thought.
    assert calls(hermes.parse(f"<reasoning>I could {call}</reasoning> No.")) == []
    tagged = '<tool_call>{"name": "f", "arguments": {"x": "<think></think>"}}</tool_call>'
    assert calls(hermes.parse(tagged)) == [("f", {"x": "<think></think>"})]
    turn = hermes.parse(f"<think>hm</think>Yes.{call}")
    assert turn.content == "<think>hm</think>Yes."


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("hermes", '<tool_call>{"name": "f" "arguments": {}}</tool_call>', "is no valid JSON (Expecting ',' delimiter"),
        ("hermes", "<tool_call></tool_call>", "is no valid JSON"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "is not closed"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}, please</tool_call>', "is not closed after its JSON"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', 'has no "name"'),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', 'of f has no "arguments"'),
        ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', '"arguments" that is a list'),
        ("hermes", '<tool_call>"f"</tool_call>', "is a text, not an object"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', "NaN is no JSON number"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', "is no valid JSON (Out of range"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>', "half of a character"),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", "nested too deeply"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": ' + "1" * 5000 + "}}</tool_call>", "is no valid JSON"),
        ("llama3", '<|python_tag|>print("x")', "is no valid JSON"),
        ("llama3", '{"name": "f", "parameters": {}} and more', "text after a tool call"),
        ("llama3", '{"name": "f", "parameters": {', "is no valid JSON"),
        ("mistral", "[TOOL_CALLS] add 1 and 2", "is no valid JSON"),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}] so', "text after its JSON"),
        ("olmo3", "<function_calls>f(1)</function_calls>", "arguments without a name"),
        ("olmo3", "<function_calls>f(x=g())</function_calls>", "no plain value"),
        ("olmo3", "<function_calls>f" + ".a" * 600 + "(x=g())</function_calls>", "no plain value"),
        ("olmo3", "<function_calls>f" + "()" * 900 + "</function_calls>", "does not name a function"),
        ("olmo3", "<function_calls>f(x=</function_calls>", "no call in Python's syntax"),
        ("olmo3", "<function_calls>x = 1</function_calls>", "no call of a function"),
        ("olmo3", "<function_calls></function_calls>", "is empty"),
        ("olmo3", "<function_calls>f(x=1)", "is not closed"),
        ("olmo3", "<function_calls>" + "(" * 15_000 + "</function_calls>", "Python's syntax"),
        ("olmo3", "<function_calls>" + "x" * 30_000 + "</function_calls>", "over 20000 characters"),
        ("smollm3", "<code>import os</code>", "no call of a function"),
    ],
)
def test_a_malformed_call_says_what_is_wrong_and_how_to_write_it(name: str, text: str, message: str) -> None:
    sentence = error(name, text)
    assert message in sentence and sentence.endswith(".") and "write" in sentence
    assert tool_call_format(name).parse(text).content == ""


@pytest.mark.parametrize("name", [*FORMATS, r"regex:\[(?P<name>\w+)\|(?P<arguments>.*?)\]"])
@settings(max_examples=60, deadline=None)
@given(
    text=st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {', "}", "[TOOL_CALLS]", "[ARGS]", "<think>",
             "</think>", "<|python_tag|>", "<function_calls>", "</function_calls>", "f(", "x=1", ")", "<code>",
             "</code>", "[f|", "]", "[", "a ", "\n", '"', "\ud800", ";"]
        ),
        max_size=12,
    )
)  # fmt: skip
def test_no_text_raises(name: str, text: list[str]) -> None:
    turn = tool_call_format(name).parse("".join(text))
    assert all(isinstance(call.arguments, dict) for call in turn.calls)
    assert len(turn.content) <= len("".join(text))


def test_a_pattern_of_the_users() -> None:
    own = tool_call_format(r"regex:CALL (?P<name>\w+)(?: (?P<arguments>\{.*?\}))?;")
    turn = own.parse('Now CALL f {"x": 1}; then CALL g;')
    assert calls(turn) == [("f", {"x": 1}), ("g", {})] and turn.content == "Now  then"
    assert "one JSON object" in own.parse("CALL f {x};").errors[0]


@pytest.mark.parametrize(
    "name",
    [
        "hermess",
        "xml",
        "regex:(",
        "regex:(?P<name>x)",
        "regex:(?P<name>x?)(?P<arguments>y?)",
        "auto",
    ],
)
def test_a_format_that_cannot_be_used(refused: Refused, name: str) -> None:
    refused(tool_call_format, name, "{{ messages }}")


def test_a_pattern_that_searches_forever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.data.tool_calls.MATCH_SECONDS", 0.05)
    pattern = tool_call_format(r"regex:(?P<name>(?:\w|\w\w)+)!(?P<arguments>\{.*\})")
    assert calls(pattern.parse("f!{}")) == [("f", {})]
    turn = pattern.parse("a" * 60 + "!x" + "b" * 60 + "!{")
    assert turn.calls == [] and "could not be searched for tool calls" in turn.errors[0]


def test_formats_have_the_names_that_a_block_may_say() -> None:
    assert tuple(FORMATS) == TOOL_FORMATS


def test_the_template_shows_the_format() -> None:
    shown = {
        "hermes": "<tool_call>\n{{ tool_call.name }}",
        "llama3": '<|start_header_id|> \'Respond in the format {"name": function name, "parameters": …\'',
        "mistral": "[TOOL_CALLS]",
        "smollm3": "{% if xml_tools or python_tools %}<tool_call>",
        "olmo3": "<function_calls>",
    }
    assert {name: detect_format(text).name for name, text in shown.items()} == {name: name for name in FORMATS}
    assert detect_format("<|im_start|>") is None


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<|python_tag|>", "llama3"),
        ('<|python_tag|> {"parameters": {}}', "llama3"),
        ('<|start_header_id|> {"parameters": {}}', "llama3"),
        # Llama 3's first template calls nothing, and others call with a mapping of parameters.
        ("<|start_header_id|>", None),
        ('{"parameters": {}}', None),
        ("<|python_tag|><tool_call>", "hermes"),
    ],
)
def test_llama_3_is_its_tag_or_header_and_parameters(template: str, name: str | None) -> None:
    detected = detect_format(template)
    assert (detected and detected.name) == name
