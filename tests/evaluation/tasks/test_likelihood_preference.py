"""A policy's preferences: by hand, beside a plain loop, and which pairs are read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from align.config.stages.evaluation.tasks import PreferenceConfig
from align.config.validation import validate
from align.data.rows import assistant, user
from align.evaluation.scorecard import SystemInfo
from align.evaluation.tasks import build_task, task_identities
from align.evaluation.tasks import likelihood as module
from align.evaluation.tasks.base import TaskInputs
from align.evaluation.tasks.likelihood import PreferenceTask
from align.models.built_in import make_tiny_tokenizer
from tests.support.evaluation.tasks.readers import ModelReader, RuleReader
from tests.support.refusals import Refused


def pair(chosen: str, rejected: str, **more: Any) -> dict[str, Any]:
    row = {
        "id": f"{chosen}-{rejected}",
        "source": "made",
        "prompt": [user("Which?")],
        "chosen": [assistant(chosen)],
        "rejected": [assistant(rejected)],
        "checks": "",
    }
    return {**row, **more}


def task_inputs(base: Path, pairs: Any = (), messages: list[str] | None = None) -> TaskInputs:
    return TaskInputs(0, base, list(pairs), False, "float32", (messages if messages is not None else []).append, print)


def test_sum_and_per_token_by_hand() -> None:
    # Tokens are bytes, and the end of the turn is one more: "ab" has 3, "abcdef" 7.
    logprobs = {"ab": -3.0, "abcdef": -4.2, "xy": -6.0}
    reader = RuleReader(lambda context, answer: logprobs[answer.removesuffix("<|im_end|>")])
    task = PreferenceTask("prefers", [pair("ab", "abcdef"), pair("abcdef", "ab"), pair("abcdef", "xy")])
    measured = task.read(reader)
    assert measured.values["acc"] == [[1.0], [0.0], [1.0]]
    assert measured.values["acc_norm"] == [[0.0], [1.0], [1.0]]  # -3/3 = -1 against -4.2/7 = -0.6, and -6/3 = -2
    assert measured.notes == {"ties": 0, "inputs_cut": 0, "answers_encoded_apart": 0}
    assert task.primary == "acc" and list(task.metrics) == ["acc", "acc_norm"]


def test_a_tie_is_wrong_and_counted() -> None:
    measured = PreferenceTask("prefers", [pair("ab", "cd")]).read(RuleReader(lambda context, answer: -1.5))
    assert measured.values == {"acc": [[0.0]], "acc_norm": [[0.0]]}
    assert measured.notes["ties"] == 1


def test_both_sides_are_rendered_and_only_finished_answers_end() -> None:
    reader = RuleReader(lambda context, answer: -1.0)
    PreferenceTask("prefers", [pair("ab", "cd", rejected_finished=False)]).read(reader)
    context = "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    assert reader.asked == [(context, "ab<|im_end|>"), (context, "cd")]


def test_a_system_s_prompt_stands_before_both() -> None:
    reader = RuleReader(lambda context, answer: -1.0, SystemInfo("p", "sft", "prompted", "k", "Be brief."))
    PreferenceTask("prefers", [pair("ab", "cd")]).read(reader)
    assert {context for context, _ in reader.asked} == {
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    }


def test_a_policy_s_preferences_are_those_of_a_plain_loop(tiny_model: Path) -> None:
    reader = ModelReader(tiny_model)
    words = ["yes", "no", "maybe so", "never", "of course not", "ok"]
    task = PreferenceTask("prefers", [pair(a, b) for a in words for b in words if a != b])
    measured = task.read(reader)
    context = reader.tokenizer.encode("<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n")
    ids = {word: reader.tokenizer.encode(f"{word}<|im_end|>") for word in words}
    sums = {word: reader.by_plain_loop(context, ids[word]) for word in words}
    for item, [acc], [norm] in zip(task.items, measured.values["acc"], measured.values["acc_norm"], strict=True):
        chosen, rejected = item.data["chosen"], item.data["rejected"]
        assert acc == float(sums[chosen] > sums[rejected])
        assert norm == float(sums[chosen] / len(ids[chosen]) > sums[rejected] / len(ids[rejected]))
    assert sum(value for [value] in measured.values["acc"]) == 15, "of every two words one is likelier"


def test_answers_are_encoded_separately_if_template_has_no_cut() -> None:
    reader = RuleReader(lambda context, answer: -1.0)
    reader.tokenizer.chat_template = reader.tokenizer.chat_template.replace(
        "{{ '\\n<|im_start|>assistant\\n' }}", "{{ '\\n<|im_start|>assistant\\n<think>\\n' }}"
    )
    measured = PreferenceTask("prefers", [pair("ab", "cd")]).read(reader)
    assert measured.notes["answers_encoded_apart"] == 2
    assert [answer for _, answer in reader.asked] == ["ab<|im_end|>", "cd<|im_end|>"]


def test_what_does_not_fit_is_cut_and_counted() -> None:
    reader = RuleReader(lambda context, answer: -1.0)
    reader.max_length = 26  # the prompt has 25 tokens
    measured = PreferenceTask("prefers", [pair("ab", "c" * 50)]).read(reader)
    assert measured.notes["inputs_cut"] == 2
    assert len(make_tiny_tokenizer().encode("".join(reader.asked[0]))) == 27, "the last token is no input"
    assert reader.asked[0][1] == "ab<|im_end|>"
    assert reader.asked[1][1] == "c" * 26


def test_what_was_read_is_kept_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 2)
    rows = [pair("a", "b"), pair("c", "d"), pair("e", "f")]
    reader = RuleReader(lambda context, answer: -float(ord(answer[0])))
    first = PreferenceTask("prefers", rows).read(reader)
    assert first.values["acc"] == [[1.0]] * 3
    assert reader.computed == ["prefers-0", "prefers-2"]
    assert PreferenceTask("prefers", rows).read(reader) == first
    assert len(reader.computed) == 2
    unfinished = [*rows[:2], {**rows[2], "chosen_finished": False}]
    PreferenceTask("prefers", unfinished).read(reader)
    assert reader.computed[2:] == ["prefers-2"]


def test_the_stage_s_pairs_are_the_default(tmp_path: Path) -> None:
    rows = [pair("a", "bb"), pair("ccc", "d"), pair("ee", "ff"), pair("a", "bb")]
    task = build_task("prefers", PreferenceConfig(), task_inputs(tmp_path, rows))
    assert [item.data["chosen"] for item in task.items] == ["a", "ccc", "ee", "a"]
    assert [item.id for item in task.items][3] == "a-bb-2"
    assert task.settings() == {"data": "the stage's pairs", "chosen_is_shorter": 2.5 / 4}
    assert len(build_task("prefers", PreferenceConfig(max_items=2), task_inputs(tmp_path, rows)).items) == 2


def test_files_are_spelled_as_in_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        {"prompt": "Which?", "chosen": "this", "rejected": "that"},
        {"prompt": "Same?", "chosen": "same", "rejected": "same"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    messages: list[str] = []
    config = PreferenceConfig(files=["a.jsonl"])
    task = build_task("prefers", config, task_inputs(tmp_path, messages=messages))
    assert [(item.prompt, item.source) for item in task.items] == [([user("Which?")], "a.jsonl")]
    assert messages == ["prefers: 1 records are left out: chosen equals rejected (1)"]
    assert capsys.readouterr().out.startswith("prefers: format preferences: ")
    assert task.settings()["files"] == task_identities(config, tmp_path)
    renamed = [{"ask": "Which?", "good": "this", "bad": "that"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(record) + "\n" for record in renamed))
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad"}
    task = build_task("prefers", PreferenceConfig(files=["b.jsonl"], columns=columns), task_inputs(tmp_path))
    assert task.items[0].data == {"chosen": "this", "rejected": "that"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "?", "responses": [{"content": "a", "score": 1}, {"content": "b", "score": 2}]},
        {"prompt": "?", "chosen": "same", "rejected": "same"},
        {"prompt": "?", "chosen": "x"},
    ],
)  # fmt: skip
def test_records_that_are_no_pairs_are_explained(refused: Refused, tmp_path: Path, record: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    refused(lambda: build_task("prefers", PreferenceConfig(files=["a.jsonl"]), task_inputs(tmp_path)))


def test_a_broken_record_is_an_error_with_its_line(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "?", "chosen": "x", "rejected": "y"}\n{"prompt"\n')
    refused(lambda: build_task("prefers", PreferenceConfig(files=["a.jsonl"]), task_inputs(tmp_path)))


def test_pairs_with_tools_are_left_out_and_said(refused: Refused, tmp_path: Path) -> None:
    calling = {**pair("e", "f"), "chosen": [{**assistant("e"), "tool_calls": "[{}]"}]}
    rows = [pair("a", "b"), pair("c", "d", tools="[{}]"), calling, pair(" ", "g")]
    messages: list[str] = []
    task = build_task("prefers", PreferenceConfig(), task_inputs(tmp_path, rows, messages))
    assert [item.data["chosen"] for item in task.items] == ["a"]
    assert messages == ["prefers: 3 of 4 pairs are left out: tools, several turns, or no words"]
    refused(lambda: build_task("prefers", PreferenceConfig(), task_inputs(tmp_path, rows[1:2])))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_pairs_of_several_turns_are_left_out_and_said(tmp_path: Path, side: str) -> None:
    talk = pair("a", "b") | {side: [assistant("One."), user("And?"), assistant("Two.")]}
    messages: list[str] = []
    task = build_task("prefers", PreferenceConfig(), task_inputs(tmp_path, [pair("c", "d"), talk], messages))
    assert [item.data["chosen"] for item in task.items] == ["c"]
    assert messages == ["prefers: 1 of 2 pairs are left out: tools, several turns, or no words"]


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset": "a/b"},
        {"split": "test"},
        {"dataset": "a/b", "revision": "0" * 40, "header": ["chosen", "rejected"]},
        {"dataset": "a/b", "revision": "0" * 40, "records": "data"},
        {"format": "hh_rlhf"},
        {"columns": {"chosen": "better"}},
        {"header": ["chosen", "rejected"]},
        {"options": {"ignore": ["note"]}},
        {"files": ["a"], "split": "test"},
        {"files": ["a"], "format": "hh_rhlf"},
    ],
)
def test_settings_that_cannot_be_meant_are_explained(refused: Refused, settings: dict[str, Any]) -> None:
    refused(validate, PreferenceConfig, settings, "e.yaml: tasks.prefers")


def test_numbers_that_are_none_are_refused(refused: Refused) -> None:
    refused(lambda: PreferenceTask("prefers", [pair("a", "b")]).read(RuleReader(lambda context, answer: math.nan)))


def test_hh_rlhf_by_a_rule(shared_data: Path) -> None:
    [file] = sorted((shared_data / "hh-rlhf").glob("*helpful*"))[:1]
    messages: list[str] = []
    config = PreferenceConfig(files=[str(file)], max_items=100)
    task = build_task("hh", config, task_inputs(Path(), messages=messages))
    assert len(task.items) == 100
    assert all(item.prompt[-1]["role"] == "user" for item in task.items)
    reader = RuleReader(lambda context, answer: -float(len(answer)))  # prefers what is shorter
    right = sum(value for [value] in task.read(reader).values["acc"])
    chosen_shorter = sum(len(item.data["chosen"]) < len(item.data["rejected"]) for item in task.items)
    assert right == chosen_shorter
    assert 20 < chosen_shorter < 60, "in hh the chosen answer is the longer one, more often than not"
