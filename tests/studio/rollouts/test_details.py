"""Facets, means, the answers to a prompt and the tokens of a row, and the words that differ between two answers."""

import itertools
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.store.rollouts import make_table
from align.studio.rollouts.details import ADDED, MAX_WORDS, REMOVED, SAME, RolloutDetails, diff_words
from align.studio.rollouts.filters import RolloutFilter
from align.studio.rollouts.parquet_reader import ParquetReader
from align.studio.rollouts.queries import RolloutTable
from tests.support.stored_rollouts import write_rollouts


def details_of(folder: Path, rows: list[dict[str, Any]]) -> RolloutDetails:
    write_rollouts(make_table(rows), folder / "000001.parquet", {})
    return RolloutDetails(RolloutTable(ParquetReader(folder), lambda: folder))


def row(update: int | None, index: int, **columns: Any) -> dict[str, Any]:
    return {"update": update, "round": 0, "index": index, "group": 0, "prompt_id": "p", "prompt": "question", **columns}


def test_facets_name_what_the_stage_has(tmp_path: Path) -> None:
    rows = [
        row(
            3,
            0,
            score=1.0,
            scores={"math": 1.0, "math_unequal": 1.0},
            reasons={"math": "unequal"},
            stop="finished",
            turns=2,
        ),
        row(4, 1, score=0.0, scores={"style": 1.0, "math": 0.0}, reasons={"math": "unequal", "style": "crashed"}),
        row(9, 0, kl=1.0, scores={}),
    ]
    facets = details_of(tmp_path, rows).facets()
    assert facets["parts"] == ["math", "style"]
    assert facets["reasons"] == {"unequal": 2, "crashed": 1}
    assert facets["stops"] == {"finished": 1}
    assert (facets["rows"], facets["first_update"], facets["last_update"]) == (3, 3, 9)
    assert facets["columns"] == {"score": 2, "gold": 0, "kl": 1, "turns": 1, "thought_tokens": 0, "split": 0}


def test_means_are_those_of_the_rows_that_meet_conditions(tmp_path: Path) -> None:
    rows = [
        row(1, 0, score=1.0, kl=1.0, tokens=2, finished=True, scores={"math": 1.0}),
        row(1, 1, score=2.0, kl=3.0, tokens=4, finished=False),
        row(1, 2, score=math.nan, tokens=6, finished=True),
        row(2, 0, score=9.0, tokens=100, finished=True),
    ]
    points = details_of(tmp_path, rows).means(RolloutFilter(max_tokens=50, response_words="ignored"), ["math"])
    assert points == [
        {
            "first_update": 1,
            "last_update": 1,
            "rows": 3,
            "score": 1.5,
            "kl": 2.0,
            "tokens": 4.0,
            "finished": pytest.approx(2 / 3),
            "parts": {"math": 1.0},
        }
    ]


def test_means_of_many_updates_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.studio.rollouts.details.MAX_POINTS", 5)
    points = details_of(tmp_path, [row(update, 0, score=1.0) for update in range(3, 40)]).means(RolloutFilter())
    assert len(points) == 5
    assert sum(point["rows"] for point in points) == 37
    assert points[0]["first_update"] == 3
    assert points[-1]["last_update"] == 39
    assert all(a["last_update"] + 1 == b["first_update"] for a, b in itertools.pairwise(points))


def test_prompt_shows_updates_and_what_changed(tmp_path: Path) -> None:
    rows = [
        row(update, index, response=f"answer {update} {index}", score=index) for update in (1, 4, 6) for index in (0, 1)
    ]
    content = details_of(tmp_path, [*rows, row(4, 2, prompt_id="other", response="no")]).prompt("p")
    assert [(each["update"], each["rows"], each["score"]) for each in content["updates"]] == [
        (1, 2, 0.5),
        (4, 2, 0.5),
        (6, 2, 0.5),
    ]
    assert content["chosen"] == [1, 4, 6]
    assert [answer["response"] for answer in content["answers"]] == [each["response"] for each in rows]
    assert "pieces" not in content["answers"][0]
    # Sample 1 of update 4 is compared with sample 1 of update 1.
    assert content["answers"][3]["pieces"] == [(SAME, "answer "), (REMOVED, "1 "), (ADDED, "4 "), (SAME, "1")]


def test_prompt_shows_chosen_updates_and_another_base(tmp_path: Path) -> None:
    details = details_of(tmp_path, [row(update, 0, response=f"a {update}") for update in range(1, 30)])
    assert details.prompt("p")["chosen"] == [1, 5, 9, 13, 17, 21, 25, 29]
    content = details.prompt("p", [2, 7, 9, 1000], "first")
    assert content["chosen"] == [2, 7, 9]
    assert content["answers"][2]["pieces"] == [(SAME, "a "), (REMOVED, "2"), (ADDED, "9")]
    assert "pieces" not in details.prompt("p", [2, 7], "none")["answers"][1]


def test_prompt_of_a_stage_without_updates(tmp_path: Path) -> None:
    rows = [row(None, index, split="train", response=f"a {index}") for index in range(3)]
    content = details_of(tmp_path, rows).prompt("p")
    assert [answer["id"] for answer in content["answers"]] == ["-train-0-0-0", "-train-0-0-1", "-train-0-0-2"]


def test_row_has_tokens_numbers_and_its_group(tmp_path: Path) -> None:
    numbers = [0.1, math.nan, -math.inf]
    rows = [
        row(
            1,
            0,
            response="a b",
            tokens=3,
            token_ids=[5, 6, 7],
            token_texts=["a", " b", ""],
            token_kl=numbers,
            score=0.5,
        ),
        row(1, 1, score=math.nan),
        row(2, 0, score=3.0),
    ]
    found = details_of(tmp_path, rows).row("1--0-0-0")
    assert found is not None
    assert found["token_texts"] == ["a", " b", ""]
    assert found["token_kl"] == [0.1, "nan", "-inf"]
    assert found["group_rows"] == [{"id": "1--0-0-0", "score": 0.5}, {"id": "1--0-0-1", "score": "nan"}]
    assert "gold" not in found
    json.dumps(found, allow_nan=False)


def test_row_of_an_episode_is_a_conversation(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>sum</think>I add."},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "<script>alert(4)</script>"},
    ]
    call = {"turn": 0, "name": "add", "arguments": {"a": 2}, "result": "4", "error": ""}
    episode = row(1, 0, messages=messages, calls=[call], turns=2, stop="finished", tokens=9)
    found = details_of(tmp_path, [episode]).row("1--0-0-0")
    assert found is not None
    entries = found["conversation"]["entries"]
    assert [entry["text"] for entry in entries if entry["policy"]][-1] == "<script>alert(4)</script>"
    assert entries[0]["calls"][0]["name"] == "add"


@pytest.mark.parametrize("identity", ["", "1", "1--0-0-0-", "9--0-0-0", "x--0-0-0", "1-'-0-0-0", "99999999999--0-0-0"])
def test_row_that_is_not_stored_is_none(tmp_path: Path, identity: str) -> None:
    assert details_of(tmp_path, [row(1, 0)]).row(identity) is None


def test_tokens_beyond_the_limit_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.studio.rollouts.details.MAX_TOKENS", 2)
    found = details_of(tmp_path, [row(1, 0, tokens=5, token_ids=[1, 2, 3, 4, 5])]).row("1--0-0-0")
    assert found is not None
    assert (found["token_ids"], found["tokens_omitted"]) == ([1, 2], 3)


# ---- words that differ

words = st.text(st.sampled_from("ab .\n<é"), max_size=30)


@settings(max_examples=200, deadline=None)
@given(before=words, after=words)
def test_pieces_make_up_both_texts(before: str, after: str) -> None:
    pieces = diff_words(before, after)
    assert pieces is not None
    assert "".join(text for kind, text in pieces if kind != REMOVED) == after
    # White space is not compared, so it is that of the later text.
    assert "".join("".join(text.split()) for kind, text in pieces if kind != ADDED) == "".join(before.split())


def test_equal_texts_have_no_changes() -> None:
    assert diff_words("a  b.", "a b.") == [(SAME, "a b.")]
    assert diff_words("a b", "a c b") == [(SAME, "a "), (ADDED, "c "), (SAME, "b")]


def test_repeated_words_are_compared_in_time() -> None:
    """A collapsed policy repeats a word for its whole response; difflib needs a minute for these."""
    generator = random.Random(0)
    began = time.perf_counter()
    diff_words("a " * 4000, "a b " * 2000)
    diff_words(" ".join(generator.choices("abcdef", k=4000)), " ".join(generator.choices("abcdef", k=4000)))
    assert time.perf_counter() - began < 2
    assert diff_words("a " * (MAX_WORDS + 1), "a") is None
