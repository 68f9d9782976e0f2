"""Every fault, seeded into dialects, is found; and nothing else is said of the row or of its neighbors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import normalizers

from align.config.stages.lint import RULES
from align.data.rows import assistant, user
from align.lint.encodings import MASKED
from align.lint.linter import Options
from tests.support.lint import (
    dialects,
    seeds_rows,
    seeds_template,  # noqa: F401  (registers its seeds)
    seeds_tokens,  # noqa: F401  (registers its seeds)
)
from tests.support.lint.dialects import SPECS
from tests.support.lint.harness import SPOILT, alarms, all_answers, clean, encoded, instructions, look
from tests.support.lint.seeding import ROW, SEEDS, Case, Seed

CASES = [
    pytest.param(fault, seed, name, id=f"{name}-{seed.__name__}")
    for number, name in enumerate(SPECS)
    for fault, seed in SEEDS
    if number % 3 == 0 or seed.__module__ != seeds_rows.__name__
]
"""Faults of rows in every third dialect: their checks read the rows' texts. Other faults in every one."""


@pytest.mark.parametrize(("fault", "seed", "name"), CASES)
def test_the_seeded_fault_is_found_and_no_other(fault: str, seed: Seed, name: str) -> None:
    case = Case(name)
    findings = seed(case)
    assert fault in findings, sorted(findings)
    assert alarms(findings) <= {fault} | case.also
    if not case.everywhere:
        assert [findings[fault].count, findings[fault].examples[0].place.id] == [1, ROW]  # type: ignore[union-attr]
    json.dumps(findings[fault].to_json())


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "prompts"])
@pytest.mark.parametrize("name", SPECS)
def test_clean_rows_raise_no_alarm(name: str, stage: Any) -> None:
    rows = clean(60)
    if SPECS[name].system:
        for row in rows[::5]:
            row["prompt"] = [{"role": "system", "content": "Answer in one sentence."}, *row["prompt"]]
    findings = look(dialects.tokenizer_of(name), rows[:50], options=Options(stage), test=rows[50:])
    assert set(findings) == ({"unexpected-system-prompt"} if SPECS[name].injects else set())


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
@pytest.mark.parametrize("name", SPECS)
def test_cut_off_answer_without_end_raises_no_alarm(name: str, stage: Any) -> None:
    marks = dict.fromkeys(("completion_finished", "chosen_finished", "rejected_finished"), False)
    rows = [{**row, **(marks if index % 3 else {})} for index, row in enumerate(clean(12))]
    assert not alarms(look(dialects.tokenizer_of(name), rows, options=Options(stage)))


@pytest.mark.parametrize("name", SPECS)
def test_clean_masks_of_every_answer_raise_no_alarm(name: str) -> None:
    tokenizer = dialects.tokenizer_of(name)
    rows = instructions()
    findings = look(tokenizer, rows, all_answers(tokenizer, rows), options=replace(Options(), supervise="all"))
    assert not alarms(findings)


def test_every_rule_has_its_seed() -> None:
    # Packing and dropped rows are trl's own (test_trainer.py), as are a model's embeddings (test_embeddings.py). A mark
    # that is plain text, text before answers (test_genuine_templates.py) and tool calls (test_calls.py) are not in
    # every dialect.
    elsewhere = {"pack-leak", "rows-dropped", "no-rows-left", "untrained-token"}
    elsewhere |= {"turn-marker-in-content", "text-before-answer", "unreadable-call", "unknown-tool"}
    elsewhere |= {"wrong-arguments", "result-without-call"}
    assert {fault for fault, _ in SEEDS} == RULES.keys() - elsewhere


@pytest.mark.parametrize(("name", "mark"), [("llama-2", "[/INST]"), ("zephyr", "<|assistant|>"), ("vicuna", "USER:")])
def test_a_mark_of_a_turn_that_is_plain_text(name: str, mark: str) -> None:
    rows = instructions()
    rows[SPOILT]["prompt"][-1] = user(f"hello {mark} and so on")
    findings = look(dialects.tokenizer_of(name), rows)
    assert alarms(findings) == {"turn-marker-in-content"}
    assert findings["turn-marker-in-content"].examples[0].place.id == ROW  # type: ignore[union-attr]


def test_an_answer_that_calls_a_tool_and_a_tools_answer() -> None:
    call = json.dumps([{"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}])
    tool = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}])
    row = {**instructions(1)[0], "tools": tool, "completion": [{**assistant(""), "tool_calls": call}]}
    after = {**row, "prompt": [*row["prompt"], *row["completion"], {"role": "tool", "content": '{"rain": 1}'}],
             "completion": [assistant("It rains.")]}  # fmt: skip
    tokenizer = dialects.tokenizer_of("qwen-tools")
    for supervise in ("last", "all"):
        encoding = encoded(tokenizer, [row, after]) if supervise == "last" else all_answers(tokenizer, [row, after])
        assert not alarms(look(tokenizer, [row, after], encoding, options=Options(supervise=supervise)))
    encoding = encoded(tokenizer, [row])
    start = next(index for index, label in enumerate(encoding[0]["labels"]) if label != MASKED)
    encoding[0]["labels"][start : start + 12] = [MASKED] * 12
    assert alarms(look(tokenizer, [row], encoding)) == {"mask-shifted"}
    refused = look(dialects.tokenizer_of("chatml"), [row])  # a template without a place for tools
    assert alarms(refused) == {"template-refuses-row"}


def test_a_tokenizer_that_normalizes_is_no_fault() -> None:
    tokenizer = dialects.make(SPECS["llama-2"])
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("The ﬁrst ½ of the STORY is ﬁne.")]
    assert tokenizer.decode(tokenizer("ﬁrst ½", add_special_tokens=False)["input_ids"]) == "first 1⁄2"
    assert not alarms(look(tokenizer, rows))
    prepared = encoded(tokenizer, rows)
    start = next(index for index, label in enumerate(prepared[SPOILT]["labels"]) if label != MASKED)
    prepared[SPOILT]["labels"][start : start + 3] = [MASKED] * 3
    assert alarms(look(tokenizer, rows, prepared)) == {"mask-shifted"}


def test_a_tools_answer_may_be_wrapped() -> None:
    template = SPECS["qwen-tools"].template.replace("+ m['content'] + '\n</tool", "+ m['content'] | tojson + '\n</tool")
    tokenizer = dialects.make(SPECS["qwen-tools"], template=template)
    row = {**instructions(1)[0], "prompt": [user("Rain?"), assistant("I ask."), {"role": "tool", "content": 'a "b"'}]}
    assert '\\"b' in tokenizer.apply_chat_template(row["prompt"], tokenize=False)
    assert alarms(look(tokenizer, [row])) == {"result-without-call"}  # of the row, not of the template


def test_answers_that_a_stage_does_not_read_are_not_judged() -> None:
    rows = clean()
    rows[SPOILT]["rejected"] = [assistant("")]
    tokenizer = dialects.tokenizer_of("chatml")
    assert not alarms(look(tokenizer, rows))
    assert not alarms(look(tokenizer, rows, options=Options("prompts")))
    assert alarms(look(tokenizer, rows, options=Options("dpo"))) == {"empty-answer"}
