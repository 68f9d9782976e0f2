"""GSM8K: which number counts, what serves as an example, and that no example is asked."""

from __future__ import annotations

import json
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from align.config.stages.evaluation.tasks import MAX_EXAMPLES, Gsm8kConfig
from align.data.final_answers import last_number, marked_number
from align.data.rows import normalized
from align.evaluation.tasks import task_identities
from align.evaluation.tasks.records import examples_source
from align.evaluation.tasks.sampled import Gsm8kTask
from tests.support.evaluation.tasks.respondents import NoModelContext, Scripted, answered, make_gsm8k_task
from tests.support.refusals import Refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(folder: Path, count: int, name: str = "train.jsonl", start: int = 0) -> str:
    """Problems whose answer is their number, with a note to the calculator."""
    lines = (
        json.dumps({"question": f"What is {n} times 1?", "answer": f"{n} * 1 = <<{n}*1={n}>>{n} apples.\n#### {n:,}"})
        for n in range(start, start + count)
    )
    (folder / name).write_text("".join(line + "\n" for line in lines))
    return name


@pytest.mark.parametrize(
    ("text", "last", "marked"),
    [
        ("The answer is 18.", "18", None),
        ("She has $1,234.50 left", "1234.5", None),
        ("It costs -$5", "-5", None),
        ("It costs $-5!", "-5", None),
        ("A loss of −7.", "-7", None),
        ("10-3", "3", None),
        ("(2)-3", "3", None),
        ("x = 10 - 3 = 7.00", "7", None),
        ("Between 4,5 and", "5", None),
        (".5 of them", ".5", None),
        ("so 18... really", "18", None),
        ("\\boxed{72}", "72", None),
        ("**72**", "72", None),
        ("no idea", None, None),
        ("", None, None),
        ("48 / 2 = 24\n#### 72", "72", "72"),
        ("#### $72", "72", "72"),
        ("####72", "72", "72"),
        ("#### 72\n\nQuestion: and 3?\n#### 4", "4", "72"),
        ("#### none\n#### 8", "8", "8"),
        ("####\n9", "9", None),
        ("#### -1,080.", "-1080", "-1080"),
    ],
)
def test_the_number_that_counts(text: str, last: str | None, marked: str | None) -> None:
    assert last_number(text) == (None if last is None else Decimal(last))
    assert marked_number(text) == (None if marked is None else Decimal(marked))


@for_all(
    value=st.decimals(min_value=-(10**9), max_value=10**9, places=3),
    commas=st.booleans(),
    zeros=st.integers(0, 3),
    sign=st.sampled_from(["-", "−"]),
    currency=st.sampled_from(["", "$", "before"]),
    before=st.sampled_from(["", "So it is ", "= ", "**", "(", "7 apples and then\n"]),
    after=st.sampled_from(["", ".", ",", " dollars.", "**", ")", "%", "\n", "..."]),
)
def test_a_number_is_found_however_it_is_spelled(
    value: Decimal, commas: bool, zeros: int, sign: str, currency: str, before: str, after: str
) -> None:
    plain = value.normalize()
    digits = f"{abs(plain):,f}" if commas else f"{abs(plain):f}"
    if zeros:
        digits += ("" if "." in digits else ".") + "0" * zeros
    minus = sign if plain < 0 else ""
    spelled = {"": minus, "$": f"{minus}$", "before": f"${minus}"}[currency] + digits
    assert last_number(before + spelled + after) == value
    assert marked_number(f"{before}\n#### {spelled}{after}\nthe end 1") == value


@for_all(st.text(alphabet="0123456789.,-$#% a\n−", max_size=60))
def test_any_text_gives_a_number_or_none(text: str) -> None:
    for actual in (last_number(text), marked_number(text)):
        assert actual is None or actual.is_finite()
    assert (last_number(text) is None) == (not any(sign.isdigit() for sign in text))


def test_long_answers_are_read_in_no_time() -> None:
    started = time.perf_counter()
    for piece in ("1,111", "9", "-$", "#### ", "1.1.", ",000"):
        last_number(piece * 20_000)
        marked_number(piece * 20_000)
    assert time.perf_counter() - started < 5


def test_lm_eval_filters_agree_except_documented_differences() -> None:
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    from lm_eval.api.metrics import exact_match_hf_evaluate

    strict = extraction.RegexFilter(r"#### (\-?[0-9\.\,]+)")
    flexible = extraction.RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)

    def theirs(filter: Any, text: str, gold: str) -> bool:
        (actual,) = filter.apply([[text]], [{}])
        ignored = [",", r"\$", "(?s).*#### ", r"\.$"]
        return bool(exact_match_hf_evaluate(actual, [f"so\n#### {gold}"], ignored, ignore_case=True)["exact_match"])

    def ours(text: str, gold: str) -> tuple[bool, bool]:
        return marked_number(text) == Decimal(gold), last_number(text) == Decimal(gold)

    for text in (
        "It is 18.",
        "18",
        "a 3 b $1,018 c",
        "-7",
        "x\n#### 18",
        "#### 1,018.",
        "#### -7",
        "none",
        "#### 18 or 3",
    ):
        for gold in ("18", "1018", "-7", "3"):
            assert ours(text, gold) == (theirs(strict, text, gold), theirs(flexible, text, gold)), (text, gold)
    for text in ("#### $18", "#### 18.00"):
        assert ours(text, "18")[0]
        assert not theirs(strict, text, "18")
    for text in ("it is 18.00", "18...", "that is 18. $."):
        assert ours(text, "18")[1]
        assert not theirs(flexible, text, "18")
    for text, gold, wrong in (("4,5", "5", "45"), ("10-3", "3", "-3")):
        assert ours(text, gold)[1]
        assert theirs(flexible, text, wrong)


def test_both_numbers_are_scored_and_their_absence_is_counted(tmp_path: Path) -> None:
    task = make_gsm8k_task(tmp_path, files=[write(tmp_path, 4, start=1000)], temperature=0.5, samples=2)
    answers = answered(
        task,
        [
            ["1,000 = 1000.0", "#### 1000"],
            ["#### 1001\n\nNext: 5", "hm"],
            ["1002 or 1003", " "],
            ["#### 1003", "x 1003"],
        ],
    )
    measured = task.score({"a": answers}, NoModelContext())["a"]
    assert measured.values["flexible"] == [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    assert measured.values["strict"] == [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    assert measured.notes == {"answers": 8, "cut_off": 0, "empty": 1, "no_number": 2, "no_marked_number": 5}
    assert measured.values["final"] == [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    thoughts = answered(task, [["<think>#### 1000</think> 7", "<think>#### 1000"], *[["", ""]] * 3])
    measured_thoughts = task.score({"a": thoughts}, NoModelContext())["a"]
    assert all(values[0] == [0.0, 0.0] for values in measured_thoughts.values.values()), "thoughts are not graded"
    assert measured_thoughts.notes["no_number"] == 7
    assert task.primary == "final"
    assert list(task.metrics) == list(measured.values)


def test_shots_are_turns_before_baseline_examples(tmp_path: Path) -> None:
    write(tmp_path, 20, "examples.jsonl", start=500)
    files = [write(tmp_path, 3)]
    task = make_gsm8k_task(tmp_path, files=files, examples_files=["examples.jsonl"], shots=2, suffix=" Think.")
    respondent = Scripted(lambda prompt: "#### 0", shots=3)
    answers = task.respond(respondent)
    request = respondent.prompts[0]
    assert [message["role"] for message in request] == ["user", "assistant", "user", "assistant", "user"]
    assert request[-1]["content"] == "What is 0 times 1? Think."
    number = request[0]["content"].split()[2]
    assert request[0]["content"] == f"What is {number} times 1? Think."
    assert request[1]["content"] == f"{number} * 1 = {number} apples.\n#### {number}", "without the calculator's notes"
    assert answers[0][0][0].prompt == request
    assert task.items[0].prompt == request[-1:]
    shown = {request[0]["content"], request[2]["content"]}
    assert len(respondent.examples) == 3
    assert not shown & {example.question for example in respondent.examples}
    assert task.examples(3) == respondent.examples
    assert len(task.examples(1000)) == 18
    assert make_gsm8k_task(tmp_path, files=files).examples(3) == []


def test_a_system_that_is_not_prompted_gets_no_examples(tmp_path: Path) -> None:
    task = make_gsm8k_task(
        tmp_path, files=[write(tmp_path, 3)], examples_files=[write(tmp_path, 20, "more.jsonl", start=50)]
    )
    respondent = Scripted(lambda prompt: "")
    task.respond(respondent)
    assert respondent.examples == []
    assert [len(prompt) for prompt in respondent.prompts] == [1, 1, 1]


def questions(task: Gsm8kTask) -> set[str]:
    return {normalized(item.prompt[0]["content"]) for item in task.items}


def test_no_example_is_asked_when_both_come_from_one_file(tmp_path: Path) -> None:
    name = write(tmp_path, 100)
    tasks = [make_gsm8k_task(tmp_path, seed, files=[name], examples_files=[name]) for seed in (0, 0, 1)]
    pools = [[example.question for example in task.examples(1000)] for task in tasks]
    assert len(pools[0]) == MAX_EXAMPLES
    assert pools[0] == pools[1] != pools[2]
    for task, pool in zip(tasks, pools, strict=True):
        assert len(task.items) == 100 - MAX_EXAMPLES
        assert not questions(task) & {normalized(question) for question in pool}
        assert task.settings()["left_out_as_examples"] == MAX_EXAMPLES
    few = make_gsm8k_task(tmp_path, files=[name], examples_files=[name], max_items=5)
    assert len(few.items) == 5
    assert [example.question for example in few.examples(1000)] == pools[0]
    small = make_gsm8k_task(tmp_path, files=[write(tmp_path, 6, "small.jsonl")], examples_files=["small.jsonl"])
    assert (len(small.items), len(small.examples(10))) == (3, 3)


def test_an_example_that_is_also_a_question_is_passed_over(tmp_path: Path) -> None:
    files = [write(tmp_path, 10, "test.jsonl")]
    write(tmp_path, 15, "train.jsonl", start=5)  # five of them are questions too, one spelled otherwise
    text = (tmp_path / "train.jsonl").read_text().replace("What is 5 times 1?", "what is 5  times 1")
    (tmp_path / "train.jsonl").write_text(text)
    task = make_gsm8k_task(tmp_path, files=files, examples_files=["train.jsonl"])
    assert len(task.items) == 10, "the benchmark stays whole"
    shown = {normalized(example.question) for example in task.examples(1000)}
    assert len(shown) == 10
    assert not shown & questions(task)


def test_shots_without_enough_examples_are_an_error(refused: Refused, tmp_path: Path) -> None:
    write(tmp_path, 3, "few.jsonl", start=50)
    refused(lambda: make_gsm8k_task(tmp_path, files=[write(tmp_path, 5)], examples_files=["few.jsonl"], shots=4))


@pytest.mark.parametrize(
    "settings",
    [
        {"files": ["a"], "shots": 2},
        {"files": ["a"], "examples_split": "train"},
        {"revision": COMMIT, "examples_split": "train", "examples_files": ["a"]},
    ],
)
def test_settings_that_contradict_each_other_are_refused(refused: Refused, settings: dict[str, Any]) -> None:
    refused(Gsm8kConfig, **settings)


def test_examples_of_the_hub_come_from_their_own_split() -> None:
    source = examples_source(Gsm8kConfig(revision=COMMIT, examples_split="train", shots=2))
    assert source is not None
    assert source.type == "hub"
    assert (source.dataset, source.config, source.split, source.revision) == ("openai/gsm8k", "main", "train", COMMIT)


def test_example_files_are_part_of_the_identity(tmp_path: Path) -> None:
    files = {"files": [write(tmp_path, 2)], "examples_files": [write(tmp_path, 2, "more.jsonl")]}
    config = Gsm8kConfig(**files)
    before = task_identities(config, tmp_path)
    assert set(before) == {"train.jsonl", "examples: more.jsonl"}
    assert make_gsm8k_task(tmp_path, **files).settings()["data"] == {
        "files": {"train.jsonl": before["train.jsonl"]},
        "examples": {"more.jsonl": before["examples: more.jsonl"]},
    }
    write(tmp_path, 3, "more.jsonl")
    assert task_identities(config, tmp_path)["examples: more.jsonl"] != before["examples: more.jsonl"]
    assert {"files", "examples_files"} <= Gsm8kConfig.identified


@pytest.mark.parametrize(
    "record",
    [
        {"question": "q"},
        {"question": "q", "answer": "It is 3."},
        {"question": "q", "answer": "It is 3.\n#### three"},
        {"question": [5], "answer": "#### 3"},
    ],
)
def test_incomplete_records_are_named_by_line(refused: Refused, tmp_path: Path, record: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q0", "answer": "#### 1"}\n' + json.dumps(record) + "\n")
    refused(make_gsm8k_task, tmp_path, files=["a.jsonl"])


def test_the_real_problems_have_answers_that_score_as_right(shared_data: Path) -> None:
    name = str(shared_data / "gsm8k/train.jsonl")
    task = make_gsm8k_task(Path(), files=[name], examples_files=[name], shots=4)
    assert len(task.items) == 7473 - MAX_EXAMPLES
    assert len(task.examples(8)) == 8
    solutions = {}
    for line in Path(name).read_text().splitlines():
        record = json.loads(line)
        solutions[record["question"].strip()] = record["answer"]
    answers = answered(task, [solutions[item.prompt[0]["content"]] for item in task.items])
    measured = task.score({"a": answers}, NoModelContext())["a"]
    assert all(value == [1.0] for values in measured.values.values() for value in values)
    assert all("<<" not in example.answer for example in task.examples(100))
