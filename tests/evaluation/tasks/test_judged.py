"""Judged tasks: their settings and records, how systems answer them, and the real MT-Bench questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.stages.evaluation.tasks import JudgedConfig
from align.data.rows import Message
from align.evaluation.tasks import build_task, task_identities
from align.evaluation.tasks.records import record_source
from tests.support.evaluation.judged_harness import Scripted, answers_of, make_task, task_inputs, write_lines
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.refusals import Refused

REWARD = {"reward": True}


@pytest.fixture
def fake() -> Any:
    server = FakeChat(lambda body: completion("[[5]]"))
    yield server
    server.stop()


def _at(fake: FakeChat) -> dict[str, Any]:
    return {"endpoint": {"url": fake.url, "model": "good-model"}}


def _echo(prompt: list[Message], sample: int) -> str:
    return f"{len(prompt)}:{prompt[-1]['content'][:20]}:{sample}"


# ---- MT-Bench --------------------------------------------------------------------------------------------------------


def _mt_bench(shared_data: Path, fake: FakeChat, warnings: list[str], references: bool = True, **config: Any) -> Any:
    folder = shared_data / "mt-bench"
    more = {"references_files": [str(folder / "reference_answer_gpt-4.jsonl")]} if references else {}
    settings = {"preset": "mt_bench", "files": [str(folder / "question.jsonl")], "judge": _at(fake), **more, **config}
    return build_task("mt", JudgedConfig(**settings), task_inputs(shared_data, warnings))


def test_the_real_questions_with_their_references(shared_data: Path, fake: FakeChat) -> None:
    warnings: list[str] = []
    task = _mt_bench(shared_data, fake, warnings)
    assert len(task.items) == 80 and task.turns == 2 and warnings == []
    assert [item.id for item in task.items] == [str(number) for number in range(81, 161)]
    assert all(len(item.data["later"]) == 1 for item in task.items)
    assert {item.source for item in task.items} == {
        "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
    }  # fmt: skip
    with_references = [item for item in task.items if item.data["references"]]
    assert {item.source for item in with_references} == {"math", "reasoning", "coding"} and len(with_references) == 30
    assert with_references[0].data["references"][0].startswith("If you have just overtaken the second person")
    assert list(task.metrics) == ["score", "turn1", "turn2"] and task.primary == "score"
    assert task.settings()["references"] == 30 and task.settings()["mode"] == "grade"
    assert list(task.settings()["data"]["files"]) == ["question.jsonl"]


def test_record_references_are_default_and_missing_ones_warn(shared_data: Path, fake: FakeChat) -> None:
    warnings: list[str] = []
    task = _mt_bench(shared_data, fake, warnings, references=False)
    assert sum(bool(item.data["references"]) for item in task.items) == 29  # 123 has none
    assert not any(item.data["references"] for item in task.items if item.source in ("stem", "roleplay"))
    assert len(warnings) == 1 and "1 questions of math, reasoning and coding have no reference" in warnings[0]


def test_categories_have_own_temperature_and_turns_continue(shared_data: Path, fake: FakeChat) -> None:
    task = _mt_bench(shared_data, fake, [])
    system = Scripted("sft", _echo)
    answers = task.respond(system)
    for item, samples in zip(task.items, answers, strict=True):
        ((first, second),) = samples
        assert first.prompt == item.prompt and first.response.text.startswith("1:")
        assert second.prompt == [
            *item.prompt, {"role": "assistant", "content": first.response.text},
            {"role": "user", "content": item.data["later"][0]},
        ]  # fmt: skip
        assert second.response.text.startswith("3:")
    temperatures = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
    category = {item.prompt[0]["content"]: item.source for item in task.items}
    assert len(system.asked) == 160
    for prompt, sampling in system.asked:
        assert sampling.temperature == temperatures.get(category[prompt[0]["content"]], 0.0)
        assert sampling.max_tokens == 1024 and sampling.n == 1
        assert sampling.seed == 5 + (len(prompt) > 1)  # another turn, other luck
    message = task.settings()["sampling"]["temperature"]
    assert message["roleplay"] == 0.7 and message["math"] == 0.0 and message["stem"] == 0.1


def test_a_temperature_of_ones_own_goes_for_all(shared_data: Path, fake: FakeChat) -> None:
    task = _mt_bench(shared_data, fake, [], temperature=0.3, max_items=10)
    system = Scripted("sft", _echo)
    task.respond(system)
    assert {sampling.temperature for _, sampling in system.asked} == {0.3}


def test_the_hub_form_of_mt_bench(tmp_path: Path, fake: FakeChat) -> None:
    records = [
        {"prompt_id": 7, "category": "math", "prompt": ["2 + 2?", "And 3?"], "reference": ["4", "5"]},
        {"prompt_id": 8, "category": "odd", "prompt": ["Hi", "Bye"], "reference": []},
    ]
    task = make_task(tmp_path, records=records, preset="mt_bench", judge=_at(fake))
    assert [item.id for item in task.items] == ["7", "8"]
    data = {"later": ["And 3?"], "references": ["4", "5"], "output": None}
    assert {name: task.items[0].data[name] for name in data} == data
    assert task.config.sampling_temperature("odd") == 0.7  # FastChat's for what it does not know
    config = JudgedConfig(preset="mt_bench", judge=_at(fake), revision="0" * 40)
    assert record_source(config).dataset == "HuggingFaceH4/mt_bench_prompts"  # type: ignore[union-attr]


def test_best_of_n_has_n_whole_conversations(tmp_path: Path, fake: FakeChat) -> None:
    records = [
        {"question_id": 1, "category": "math", "turns": ["One?", "Two?"]},
        {"question_id": 2, "category": "math", "turns": ["Three?", "Four?"]},
    ]
    task = make_task(tmp_path, records=records, preset="mt_bench", judge=_at(fake))
    best = Scripted("best", _echo, best_of=3)
    answers = task.respond(best)
    assert len(best.asked) == 2 + 6  # each of the N conversations goes on once
    for samples in answers:
        assert len(samples) == 3
        for number, (first, second) in enumerate(samples):
            assert first.response.text.endswith(f":{number}")
            assert second.prompt[1]["content"] == first.response.text
    assert len({str(second.prompt) for samples in answers for _, second in samples}) == 6


def test_questions_of_one_and_of_several_turns_together(tmp_path: Path, fake: FakeChat) -> None:
    records = [
        {"question_id": 1, "category": "math", "turns": ["One?"]},
        {"question_id": 2, "category": "math", "turns": ["A?", "B?", "C?"]},
    ]
    task = make_task(tmp_path, records=records, preset="mt_bench", judge=_at(fake))
    short, long = (samples[0] for samples in task.respond(Scripted("sft", _echo)))
    assert [len(short), len(long)] == [1, 3]
    assert [message["role"] for message in long[2].prompt] == ["user", "assistant", "user", "assistant", "user"]
    assert list(task.metrics) == ["score", "turn1", "turn2", "turn3"]


# ---- other records ---------------------------------------------------------------------------------------------------


def test_alpaca_eval_records(tmp_path: Path) -> None:
    records = [
        {"dataset": "koala", "instruction": "Say hi", "output": "Hi!", "generator": "m"},
        {"dataset": "vicuna", "instruction": "Add", "input": "1 2", "output": "3", "generator": "m"},
    ]
    task = make_task(tmp_path, records=records, preset="alpaca_eval", judge=REWARD)
    assert [item.source for item in task.items] == ["koala", "vicuna"]
    assert [item.prompt[0]["content"] for item in task.items] == ["Say hi", "Add\n\n1 2"]
    assert [item.data["output"] for item in task.items] == ["Hi!", "3"]
    assert task.config.judging_mode == "compare" and list(task.metrics) == ["win_rate"]
    system = Scripted("sft", _echo)
    answers_of(task, system)
    assert {sampling.temperature for _, sampling in system.asked} == {0.0}


def test_rows_with_messages(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    task = make_task(tmp_path, records=[{"id": "a", "prompt": prompt}, {"question": "Why?"}], judge=REWARD)
    assert task.items[0].prompt == prompt and task.items[0].source == "judge-it"
    assert task.items[1].prompt == [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize(
    "record",
    [
        {"text": "x"},
        {"prompt": " "},
        {"turns": ["a", " "]},
        {"turns": []},
        {"prompt": [{"role": "assistant", "content": "x"}]},
        {"prompt": 3},
        {"turns": ["a"], "reference": [None]},
    ],
)
def test_records_that_hold_no_question(refused: Refused, tmp_path: Path, record: dict[str, Any]) -> None:
    refused(make_task, tmp_path, records=[record], judge=REWARD)


def test_what_presets_and_opponents_need_of_records(refused: Refused, tmp_path: Path, fake: FakeChat) -> None:
    refused(lambda: make_task(tmp_path, records=[{"turns": ["a"]}], preset="mt_bench", judge=_at(fake)))
    refused(make_task, tmp_path, records=[{"instruction": "a"}], against="file", judge=REWARD)
    refused(make_task, tmp_path, records=[{"instruction": "a", "output": None}], against="file", judge=REWARD)
    refused(make_task, tmp_path, records=[{"turns": ["a", "b"], "output": "x"}], against="file", judge=REWARD)
    assert make_task(tmp_path, records=[{"turns": ["a"], "output": "x"}], against="file", judge=REWARD).turns == 1


def test_references_that_do_not_fit(refused: Refused, tmp_path: Path, fake: FakeChat) -> None:
    questions = [{"question_id": 1, "turns": ["a"], "category": "math"}]

    def build(*references: dict[str, Any]) -> Any:
        path = write_lines(tmp_path / "references.jsonl", references)
        return make_task(tmp_path, records=questions, preset="mt_bench", judge=_at(fake), references_files=[path])

    refused(build, {"question_id": 9, "reference": "x"})
    refused(build, {"question_id": 1, "choices": []})
    refused(build, {"question_id": 1, "answer": "x"})
    refused(build, {"reference": "x"})
    assert build({"question_id": 1, "reference": "x"}, {"question_id": 9, "reference": "y"}).items[0].data[
        "references"
    ] == ["x"]


@pytest.mark.parametrize(
    "settings",
    [
        {"judge": {}},
        {"judge": {"reward": True, "endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"}}},
        {"judge": {"reward": True, "rubric": "x"}},
        {"judge": REWARD, "mode": "grade"},
        {"judge": REWARD, "preset": "mt_bench"},
        {"judge": REWARD, "references_files": ["x"]},
        {"judge": {"endpoint": {"url": "http://127.0.0.1:1/v1", "model": "m"}}, "mode": "grade", "against": "base"},
        {"judge": REWARD, "preset": "arena"},
    ],
)
def test_settings_that_contradict(refused: Refused, settings: dict[str, Any]) -> None:
    refused(JudgedConfig, files=["q.jsonl"], **settings)


def test_alpaca_eval_has_no_place_on_the_hub_that_could_be_read(refused: Refused) -> None:
    refused(JudgedConfig, preset="alpaca_eval", judge=REWARD, revision="0" * 40)


def test_the_judge_and_the_files_contents_enter_the_key(refused: Refused, tmp_path: Path) -> None:
    files = [write_lines(tmp_path / "q.jsonl", [{"prompt": "a"}])]
    references = [write_lines(tmp_path / "r.jsonl", [{"id": "1", "reference": "a"}])]

    def identities(**judge: Any) -> dict[str, str]:
        positions = {"url": "https://judge.example/v1", "model": "m", **judge.pop("at", {})}
        config = JudgedConfig(files=files, judge={"endpoint": positions, **judge}, references_files=references)
        return task_identities(config, tmp_path)

    before = identities()
    assert sorted(before) == ["judge", "q.jsonl", "references: r.jsonl"] and "key" not in before["judge"]
    assert identities(at={"concurrency": 3, "key_variable": "X"}, max_unreadable=0.3) == before
    assert identities(rubric="Short.")["judge"] != before["judge"]
    assert identities(at={"model": "n"})["judge"] != before["judge"]
    write_lines(tmp_path / "r.jsonl", [{"id": "1", "reference": "b"}])
    assert identities()["references: r.jsonl"] != before["references: r.jsonl"]
    refused(
        lambda: task_identities(
            JudgedConfig(
                files=files,
                judge={"endpoint": {"url": "https://j.example/v1", "model": "m"}},
                references_files=["none.jsonl"],
            ),
            tmp_path,
        )
    )


def test_nothing_listening_is_a_warning_at_the_start(tmp_path: Path, fake: FakeChat) -> None:
    warnings: list[str] = []
    fake.stop()
    files = [write_lines(tmp_path / "q.jsonl", [{"prompt": "a"}])]
    build_task("t", JudgedConfig(files=files, judge=_at(fake)), task_inputs(tmp_path, warnings))
    assert len(warnings) == 1 and "tasks.t.judge.endpoint" in warnings[0]
