"""Tool rows: calls that the template's format reads back raise no alarm, others are found."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.data.rows import assistant, user
from align.data.tool_calls import ToolCall
from align.lint.linter import Options
from align.lint.turns import argument_fault
from align.training.unpaired import unpair
from tests.support.environments.families import FAMILIES, TOOLS, make, tokenizer_of
from tests.support.lint.harness import alarms, look

RESULT_TURN = {"role": "tool", "content": "4"}
WITH_TOOLS = [name for name, family in FAMILIES.items() if family.tools]


def row(number: int, *turns: dict[str, Any], tools: list[dict[str, Any]] | None = TOOLS) -> dict[str, Any]:
    """A row whose last turn is learned."""
    row = {"id": f"row-{number}", "source": "test", "checks": "", "prompt": list(turns[:-1]), "completion": [turns[-1]]}
    return row | ({"tools": json.dumps(tools)} if tools else {})


def calling(*calls: dict[str, Any], text: str = "") -> dict[str, Any]:
    functions = [{"type": "function", "function": call} for call in calls]
    return {"role": "assistant", "content": text, "tool_calls": json.dumps(functions)}


def add(number: int, **arguments: Any) -> dict[str, Any]:
    return {"name": "add", "arguments": {"a": number, "b": 2, **arguments}}


def rows() -> list[dict[str, Any]]:
    """Rows that call, and rows that answer after a call."""
    made = []
    for number in range(6):
        asked, result = user(f"How much is {number} + 2?"), {"role": "tool", "content": str(number + 2)}
        made.append(row(number, asked, calling(add(number))))
        made.append(row(10 + number, asked, calling(add(number)), result, assistant(f"It is {number + 2}.")))
    return made


@pytest.mark.parametrize("name", WITH_TOOLS)
@pytest.mark.parametrize("stage", ["sft", "prompts"])
def test_calls_that_are_read_back_raise_no_alarm(name: str, stage: Any) -> None:
    findings = look(tokenizer_of(name), rows(), options=Options(stage))
    assert not {"unreadable-call", "unknown-tool", "template-refuses-row"} & findings.keys()
    assert alarms(findings) <= {"unexpected-system-prompt"}


@pytest.mark.parametrize("name", ["qwen2.5", "chatml-tools", "mistral", "olmo3"])
def test_a_tool_that_is_not_offered(name: str) -> None:
    spoilt = rows()
    spoilt[2]["completion"] = [calling({"name": "multiply", "arguments": {}})]
    finding = look(tokenizer_of(name), spoilt)["unknown-tool"]
    assert [finding.count, finding.examples[0].place.id] == [1, spoilt[2]["id"]]  # type: ignore[union-attr]
    assert finding.examples[0].excerpt == "completion: multiply, offered are add, look_up"
    spoilt[2].pop("tools")  # the tools may stand in a system message
    assert "unknown-tool" not in look(tokenizer_of(name), spoilt)


@pytest.mark.parametrize(
    ("turn", "excerpt"),
    [
        (calling({"name": "add"}), 'tool_calls: a call of add has no "arguments"'),
        (calling({"name": "add", "arguments": [1]}), '"arguments" that is a list'),
        (assistant('<tool_call>{"name": "add", "arguments": {}</tool_call>'), "A tool call is no valid JSON"),
        (assistant('Well: <tool_call>\n{"name": "add"}\n</tool_call>'), 'of add has no "arguments"'),
    ],
)
def test_a_call_that_cannot_be_read(turn: dict[str, Any], excerpt: str) -> None:
    spoilt = rows()
    spoilt[2]["completion"] = [turn]
    finding = look(make("chatml-tools"), spoilt)["unreadable-call"]
    assert [finding.count, finding.severity] == [1, "error"]
    assert excerpt in finding.examples[0].excerpt


def test_a_template_that_writes_calls_otherwise() -> None:
    """A call's arguments have another name than models of that format write."""
    tokenizer = make("chatml-tools")
    tokenizer.chat_template = tokenizer.chat_template.replace(""", "arguments": '""", """, "args": '""")
    finding = look(tokenizer, rows())["unreadable-call"]
    assert finding.count == 12  # each row has a call, in its prompt or its answer
    assert 'add({"a": 0, "b": 2}) is written as \'<tool_call>' in finding.examples[0].excerpt


@pytest.mark.parametrize(
    ("arguments", "excerpt"),
    [
        ({"a": 1}, "completion: add needs the argument 'b'."),
        ({"a": 1, "b": "2"}, "completion: add: the argument 'b' should be a"),
        ({"a": 1, "b": 2, "carry": 0}, "completion: add has no argument 'carry'."),
    ],
)
def test_arguments_of_another_schema_are_reported(arguments: dict[str, Any], excerpt: str) -> None:
    spoilt = rows()
    tools = json.loads(spoilt[2]["tools"])
    tools[0]["function"]["parameters"]["required"] = ["a", "b"]
    spoilt[2]["tools"] = json.dumps(tools)
    spoilt[2]["completion"] = [calling({"name": "add", "arguments": arguments})]
    finding = look(make("chatml-tools"), spoilt)["wrong-arguments"]
    assert [finding.count, finding.examples[0].place.id] == [1, spoilt[2]["id"]]  # type: ignore[union-attr]
    assert excerpt in finding.examples[0].excerpt


def test_loose_schemas_raise_no_alarm() -> None:
    call = ToolCall("f", {"a": "x", "b": None}, "")
    for parameters in (
        None,
        {},
        {"a": {"type": "str"}},  # without properties, as in xLAM
        {"properties": {"a": {"type": "STRING", "enum": None, "anyOf": None}}, "required": None},
        {"properties": {"a": {"type": ["string", "null"]}}, "required": "a"},
        {"properties": {"a": {"type": {"of": "string"}}}},
        {"properties": {"a": {"$ref": "#/x"}}},
    ):
        assert argument_fault({"name": "f", "parameters": parameters}, call) is None


@pytest.mark.parametrize(
    ("turns", "is_reported"),
    [
        ([user("How much?"), RESULT_TURN], True),
        ([user("How much?"), assistant("Wait a moment."), RESULT_TURN], True),
        ([user("How much?"), calling(add(2)), RESULT_TURN, RESULT_TURN], True),
        ([user("How much?"), calling(add(2), add(3)), RESULT_TURN, RESULT_TURN], False),
        ([user("How much?"), assistant('Action: {"name": "add"}'), RESULT_TURN], False),
    ],
)
def test_results_without_a_call_are_reported(turns: list[dict[str, Any]], is_reported: bool) -> None:
    spoilt = rows()
    spoilt[2] = row(2, *turns, assistant("It is 4."))
    findings = look(make("chatml-tools"), spoilt)
    assert ("result-without-call" in findings) == is_reported


def test_rows_without_tools_are_not_parsed() -> None:
    plain = [
        row(number, user(f"What is {number}?"), assistant(f"<tool_call>{number}"), tools=None) for number in range(4)
    ]
    assert "unreadable-call" not in look(make("chatml-tools"), plain)


def episodes() -> list[dict[str, Any]]:
    """Pairs of whole episodes: one that calls a tool and answers, one that answers at once."""
    made = []
    for number in range(6):
        pair = row(number, user(f"How much is {number} + 2?"), assistant(""))
        del pair["completion"]
        called = [calling(add(number)), {"role": "tool", "content": str(number + 2)}, assistant(f"It is {number + 2}.")]
        made.append(pair | {"chosen": called, "rejected": [assistant(f"Maybe {number + 7} or {number + 9}?")]})
    return made


@pytest.mark.parametrize("name", ["qwen2.5", "chatml-tools"])
@pytest.mark.parametrize("stage", ["sft", "dpo", "kto", "reward"])
def test_whole_episodes_raise_no_alarm(name: str, stage: Any) -> None:
    made = unpair(episodes()) if stage == "kto" else episodes()
    findings = look(tokenizer_of(name), made, options=Options(stage))
    assert alarms(findings) <= {"unexpected-system-prompt"}


@pytest.mark.parametrize("name", ["qwen2.5", "chatml-tools"])
def test_unreadable_call_in_unlearned_answer_is_ignored(name: str) -> None:
    rejected = episodes()
    for pair in rejected:
        pair["rejected"] = [assistant("<tool_call>{not json</tool_call>"), user("what?"), assistant("sorry")]
    assert "unreadable-call" not in look(tokenizer_of(name), rejected, options=Options("dpo"))
    assert "unreadable-call" not in look(tokenizer_of(name), unpair(rejected), options=Options("kto"))
    learned = [pair | {"chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in rejected]
    assert "unreadable-call" in look(tokenizer_of(name), learned, options=Options("dpo"))


def pair(number: int, chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> dict[str, Any]:
    prompt = [user("How much is 2 + 2?")]
    return {"id": f"row-{number}", "source": "test", "checks": "", "prompt": prompt, "tools": json.dumps(TOOLS),
            "chosen": chosen, "rejected": rejected}  # fmt: skip


def ask_tool(number: int, answer: str) -> list[dict[str, Any]]:
    """An episode: a call, its result, an answer."""
    return [calling(add(number)), {"role": "tool", "content": "4"}, assistant(answer)]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([calling(add(2))], [calling(add(3))]),
        (ask_tool(2, "It is 4."), ask_tool(3, "It is 4.")),
        (ask_tool(2, "It is 4."), [assistant("It is 4.")]),
    ],
    ids=["calls", "calls of earlier turns", "number of turns"],
)
def test_sides_that_call_differently_do_not_differ_in_case_alone(
    chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> None:
    findings = look(tokenizer_of("qwen2.5"), [pair(0, chosen, rejected)], options=Options("dpo"))
    assert "sides-differ-in-case-alone" not in findings and "chosen-equals-rejected" not in findings


def test_pairs_with_other_calls_do_not_contradict() -> None:
    first = pair(0, ask_tool(2, "It is 4."), ask_tool(3, "It is 5."))
    other_calls = pair(1, ask_tool(7, "It is 5."), ask_tool(8, "It is 4."))
    turned = pair(2, first["rejected"], first["chosen"])
    tokenizer, options = tokenizer_of("qwen2.5"), Options("dpo")
    assert "pairs-contradict" not in look(tokenizer, [first, other_calls], options=options)
    assert look(tokenizer, [first, turned], options=options)["pairs-contradict"].count == 1
