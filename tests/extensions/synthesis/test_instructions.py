"""Self-instruct: seeds, lists, filters, rounds, and counts that add up."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from align.data.rows import Message, user
from align.errors import UserError
from align.extensions.synthesis.config import InstructionsTask
from align.extensions.synthesis.instructions import (
    Nearest,
    Pool,
    Seed,
    make_instructions,
    parse_list,
    read_seeds,
    rouge_words,
    seeds_from_prompts,
)
from align.extensions.synthesis.selection import Ledger
from align.inference.requests import Answer

SEEDS = [
    Seed(f"Explain topic {word} in plain words")
    for word in ("alpha", "beta", "gamma", "delta", "one", "two", "three", "four")
]


def _task(**settings: Any) -> InstructionsTask:
    return InstructionsTask(**{"type": "instructions", "count": 5, "max_requests": 1, "at_once": 1} | settings)


def _make(
    *answers: Answer | str, task: InstructionsTask | None = None, seeds: list[Seed] | None = None
) -> tuple[list[str], Ledger, list[list[Message]]]:
    ledger, left, request = Ledger(), list(answers), []  # type: ignore[var-annotated]

    def ask(conversations: list[list[Message]], first: int) -> list[Answer]:
        assert first == len(request)
        request.extend(conversations)
        inputs = [left.pop(0) for _ in conversations]
        return [Answer(entry) if isinstance(entry, str) else entry for entry in inputs]

    rows, records = make_instructions(task or _task(), seeds or SEEDS, ask, 7, ledger)
    assert len(records) == len(request)
    return [row["prompt"][0]["content"] for row in rows], ledger, request


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("9. Do one thing.\n10. Do another.", ["Do one thing.", "Do another."]),
        ("Sure!\n\nTask 9: First\nTask 10: Second", ["First", "Second"]),
        ("9) First\n\n10) Second\n", ["First", "Second"]),
        ("**9.** First\n**10.** *Second*", ["First", "Second"]),
        ("9. Sort these:\n  b\n  a\n10. Next", ["Sort these:\nb\na", "Next"]),
        ("9. Improve this list:\n1. milk\n2. eggs\n10. Next", ["Improve this list:\n1. milk\n2. eggs", "Next"]),
        ("9.\n10. Only this", ["Only this"]),
        ("*9. First\n- 10. Second\n• 11) Third", ["First", "Second", "Third"]),
        ("9. 1. 1. First\n10. 2. Second\n11. 3.5 is a number", ["First", "Second", "3.5 is a number"]),
        ("In 2024. there was no list", []),
        ("No list at all", []),
        ("", []),
    ],
)
def test_numbered_lists(text: str, items: list[str]) -> None:
    assert list(parse_list(text)) == items


def test_each_filter_counts_what_it_drops() -> None:
    answer = "\n".join(
        f"{number}. {text}"
        for number, text in enumerate(
            [
                "Too short now",
                "word " * 151,
                "Describe what the Image above shows",
                "Describe what imagery a poet may use",
                "Go to the shop and buy some bread",
                "Write a program that adds two numbers",
                "- begins with a sign, does it",
                "Explain topic alpha in very plain words",
                "Invent a name for a bakery",
                "This one would come too late",
                "Cut off in the mid",
            ],
            9,
        )
    )
    instructions, ledger, _ = _make(Answer(answer, finished=False), task=_task(count=2))
    assert instructions == ["Describe what imagery a poet may use", "Invent a name for a bakery"]
    actual = ledger.to_json()["candidates"]
    assert actual["in"] == 11 and actual["out"] == 2
    assert actual["dropped"] == {
        "begins with a phrase of the blacklist": 1,
        "begins with a sign": 1,
        "cut off at max_tokens": 1,
        "fewer than 4 words": 1,
        "holds a word of the blacklist": 2,
        "more than 150 words": 1,
        "more than count": 1,
        "not novel": 1,
    }
    # 6 common words of 7 and 6
    assert actual["examples"]["not novel"][0]["detail"] == {
        "similarity": round(2 * 6 / 13, 4),
        "nearest": "Explain topic alpha in plain words",
    }


def test_the_boundary_of_novelty_is_kept() -> None:
    # 7 common words of 10 and 10: exactly 0.7, which is not more than 0.7
    seeds = [Seed("a b c d e f g h i j"), *SEEDS]
    instructions, *_ = _make("9. a b c d e f g x y z", seeds=seeds)
    assert instructions == ["a b c d e f g x y z"]
    instructions, *_ = _make("9. a b c d e f g h y z", seeds=seeds)
    assert instructions == []


def test_novelty_counts_within_one_answer() -> None:
    instructions, ledger, _ = _make("9. Plan a trip to the northern coast\n10. Plan a trip to the southern coast")
    assert instructions == ["Plan a trip to the northern coast"]
    assert ledger.to_json()["candidates"]["dropped"] == {"not novel": 1}


def test_answers_without_a_list_are_counted() -> None:
    answers = [
        Answer("I cannot"), Answer(" "), Answer("x", refused=True), Answer("", error="status 400"),
        "9. Name five birds that cannot fly",
    ]  # fmt: skip
    instructions, ledger, _ = _make(*answers, task=_task(max_requests=5, at_once=2))
    actual = ledger.to_json()["requests"]
    assert actual["dropped"] == {
        "empty answer": 1, "no numbered list in the answer": 1, "refused by the endpoint": 1, "request failed": 1,
    }  # fmt: skip
    assert (actual["in"], actual["out"], len(instructions)) == (5, 1, 1)


def test_later_rounds_show_what_earlier_ones_made() -> None:
    task = _task(
        max_requests=4, at_once=2, made_examples=2, seed_examples=3, per_request=2, prompt="{first}-{last}|{tasks}"
    )
    answers = ["1. Name five birds that cannot fly", "1. List three uses of vinegar at home", "nothing", "nothing"]
    instructions, _, request = _make(*answers, task=task)
    texts = [conversation[0]["content"] for conversation in request]
    assert all(text.startswith("6-7|1. ") and text.count("\n") == 4 for text in texts)
    assert not any(entry in text for entry in instructions for text in texts[:2])
    assert all(entry in text for entry in instructions for text in texts[2:])
    assert texts[0] != texts[1]
    again = _make(*answers, task=task)
    assert again[2] == request


def test_it_stops_at_count() -> None:
    instructions, _, request = _make(
        "9. Name five birds that cannot fly", "9. List three uses of vinegar", task=_task(count=1, max_requests=2)
    )
    assert len(instructions) == len(request) == 1


def test_seeds_with_an_input_are_compared_with_but_not_shown(tmp_path: Path) -> None:
    records = [
        {
            "instruction": "Translate the sentence into French",
            "instances": [{"input": "Good day", "output": "Bonjour"}],
        },
        {"instruction": " Name a color ", "instances": [{"input": "", "output": "Red"}]},
        {"instruction": "Sum up the text", "input": "Once upon a time"},
        {"instruction": "Tell a\u2028joke"},  # no end of a line of JSON
    ]
    path = tmp_path / "seeds.jsonl"
    path.write_text("\n".join(json.dumps(entry, ensure_ascii=False) for entry in records) + "\n\n")
    seeds = read_seeds(path)
    assert [entry.shown for entry in seeds] == [False, True, False, True]
    assert seeds[1].text == "Name a color"
    instructions, _, request = _make("9. Translate the sentence into French", seeds=[*SEEDS, *seeds])
    assert instructions == [] and "French" not in request[0][0]["content"]


@pytest.mark.parametrize("line", ["{", "[]", '{"instruction": 5}', '{"instruction": " "}', '{"instruct": "x"}'])
def test_a_bad_seed_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text(f'{{"instruction": "Tell a joke"}}\n{line}\n')
    with pytest.raises(UserError, match=r"seeds\.jsonl:2: "):
        read_seeds(path)


def test_seeds_from_prompts_are_single_questions() -> None:
    rows = [{"prompt": [user("One")]}, {"prompt": [{"role": "system", "content": "s"}, user("Two")]}]
    assert seeds_from_prompts(rows) == [Seed("One")]


def test_too_few_seeds() -> None:
    with pytest.raises(UserError, match=r"3 of 4 stand alone, without an input; each request shows 8"):
        _make("", seeds=[*SEEDS[:3], Seed("x", shown=False)])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"prompt": "no place"}, "needs {tasks}"),
        ({"prompt": "{tasks} {other}"}, "needs {tasks}"),
        ({"prompt": "{tasks} {"}, "cannot be filled in"),
        ({"min_words": 9, "max_words": 8}, "min_words 9 is more than max_words 8"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        _task(**settings)


def test_the_papers_seeds(shared_data: Path) -> None:
    seeds = read_seeds(shared_data / "self-instruct" / "seed_tasks.jsonl")
    assert len(seeds) == 175 and sum(seed.shown for seed in seeds) == 50


def _pool(*texts: str) -> Pool:
    pool = Pool()
    for text in texts:
        pool.add(text)
    return pool


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        # the longest common subsequence is "police the gunman" without "kill(ed)": 3 of 4 and 4 words
        ("police killed the gunman", "police kill the gunman", 2 * 3 / (4 + 4)),
        # "the gunman" or "police", whichever: 2 of 4 and 4 words
        ("police killed the gunman", "the gunman kill police", 2 * 2 / (4 + 4)),
        # order counts, places do not: "a c e" of 5 and 3 words
        ("a b c d e", "a c e", 2 * 3 / (5 + 3)),
        # capitals and signs do not count; "write a poem about the sea" whole, in 6 and 8 words
        ("Write a poem about the sea.", "write, a POEM about the deep blue sea!", 2 * 6 / (6 + 8)),
        # repeated words count as often as both have them: "a a" of 3 and 2 words
        ("a a a", "a a", 2 * 2 / (3 + 2)),
        ("same words", "same words", 1.0),
    ],
)
def test_rouge_l_by_hand(left: str, right: str, expected: float) -> None:
    for first, second in ((left, right), (right, left)):
        nearest = _pool(first).nearest(second)
        assert nearest is not None
        assert nearest.similarity == pytest.approx(expected, abs=1e-12)
        assert nearest.text == first


def test_nothing_in_common_or_nothing_there() -> None:
    assert Pool().nearest("anything") is None
    assert _pool("one two").nearest("three four") is None
    assert _pool("!?").nearest("...") is None
    assert len(_pool("a", "b", "!?")) == 3


def test_words() -> None:
    assert rouge_words("It's 3.5% of self_made") == ["it", "s", "3", "5", "of", "self", "made"]
    assert rouge_words("ÄPFEL und crème") == ["äpfel", "und", "crème"]
    assert rouge_words("写一首诗 about 海") == ["写", "一", "首", "诗", "about", "海"]


def _longest_common(first: list[str], others: list[list[str]]) -> np.ndarray:
    """The textbook table, for each of the others at once: a row of it is (others, words + 1)."""
    width = max(map(len, others))
    words = np.array([text + [""] * (width - len(text)) for text in others])
    row = np.zeros((len(others), width + 1), dtype=int)
    for word in first:
        row[:, 1:] = np.maximum(row[:, 1:], row[:, :-1] + (words == word))
        row = np.maximum.accumulate(row, axis=1)
    return row[:, -1]


def test_the_nearest_of_many_is_found() -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choices("abcdefghij", k=rng.randint(1, 90))) for _ in range(300)]
    others = texts[:250]
    pool = _pool(*others)
    lengths = np.array([len(text.split()) for text in others])
    for text in texts[250:]:
        words = text.split()
        similarities = 2 * _longest_common(words, [other.split() for other in others]) / (len(words) + lengths)
        nearest = pool.nearest(text)
        assert nearest is not None
        assert nearest.similarity == pytest.approx(similarities.max())
        assert similarities[others.index(nearest.text)] == pytest.approx(nearest.similarity)


def test_more_words_than_one_byte_holds() -> None:
    pool = _pool(*(f"word{number} and" for number in range(70_000)))
    assert pool.nearest("word69999 and") == Nearest(1.0, "word69999 and")
    assert pool.nearest("word69999 or") == Nearest(0.5, "word69999 and")
