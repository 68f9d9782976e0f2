"""The embedded dataset: right, balanced, bounded against hacking, and the same everywhere."""

from __future__ import annotations

import collections
import hashlib
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.recipe.source_settings import EMBEDDED_FAMILIES, EMBEDDED_MAX_ROWS
from align.data.checkers import gold
from align.data.families.embedded import FAMILIES, generate
from align.data.rows import prompt_key
from tests.support.refusals import Refused


def reply(row: dict) -> str:
    return row["completion"][0]["content"]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32))
def test_every_reference_reply_scores_one(seed: int) -> None:
    rows = generate(400, seed)
    wrong = [row for row, score in zip(rows, gold(rows, [reply(row) for row in rows]), strict=True) if score != 1.0]
    assert wrong == []


def test_the_largest_size_can_be_made_and_prompts_differ() -> None:
    rows = generate(EMBEDDED_MAX_ROWS, 1)
    assert len({prompt_key(row) for row in rows}) == len({row["id"] for row in rows}) == EMBEDDED_MAX_ROWS
    assert gold(rows, [reply(row) for row in rows]) == [1.0] * EMBEDDED_MAX_ROWS


def test_a_forbidden_word_is_not_asked_for() -> None:
    """Seed 79911 drew "Dear friend" beside "never say friend"."""
    for seed in (79911, *range(12)):
        rows = generate(1000, seed, ["combined"])
        assert gold(rows, [reply(row) for row in rows]) == [1.0] * 1000


def test_short_and_balanced() -> None:
    rows = generate(1000, 0)
    counts = collections.Counter(row["source"] for row in rows)
    assert len(counts) == len(FAMILIES) >= 12
    assert max(counts.values()) - min(counts.values()) <= 1
    prompts = sorted(len(row["prompt"][0]["content"].split()) for row in rows)
    replies = sorted(len(reply(row).split()) for row in rows)
    assert prompts[-1] <= 30 and replies[-1] <= 30


def test_digest_is_pinned() -> None:
    """A change here changes every cached key: bump ``embedded.VERSION`` with it."""
    text = json.dumps(generate(500, 17), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "2bb958e257ef2c4a"
    assert generate(50, 1) == generate(50, 1) != generate(50, 2)


def test_wrong_and_degenerate_replies() -> None:
    rows = generate(1000, 5)
    shuffled = [reply(row) for row in rows[1:] + rows[:1]]
    assert sum(gold(rows, shuffled)) / len(rows) < 0.1
    for degenerate in ("", " ", "\n", "...", "word " * 40):
        assert max(gold(rows, [degenerate] * len(rows))) == 0.0


def test_no_constant_reply_scores() -> None:
    rows = generate(500, 6)
    constants = {reply(row) for row in rows[:150]} | {"yes", "12", "{}", '"cats dogs trains and the moon. The end."'}
    assert max(sum(gold(rows, [constant] * 500)) / 500 for constant in constants) < 0.1
    # Everything at once: the guard's length limit bounds it.
    stuffed = "in my view cats dogs birds horses fish bees tea soup rain snow wind sun moon stars ocean rivers friend"
    assert sum(gold(rows, [f'"{stuffed}. Thank you."'] * 500)) / 500 < 0.35


def test_each_constraint_can_fail() -> None:
    """Every family has a reply that keeps the guard and breaks a constraint."""
    rows = generate(len(FAMILIES) * 8, 7)
    broken = set()
    for row in rows:
        text = reply(row)
        variants = [f"{text} Really, {text.swapcase()}", text.swapcase(), f"Well, {text} No", text.replace("*", "")]
        if min(gold([row] * 4, variants)) < 1:
            broken.add(row["source"].removeprefix("embedded/"))
    assert broken >= set(FAMILIES) - {"forbidden", "title", "keyword_twice", "keyword", "postscript", "few_words"}


def test_families_can_be_chosen(refused: Refused) -> None:
    assert {row["source"] for row in generate(10, 0, ["sort", "copy"])} == {"embedded/sort", "embedded/copy"}
    refused(generate, 1, 0, ["bulets"])
    refused(generate, 5000, 0, ["title"])


def test_the_recipe_knows_every_family_in_order() -> None:
    assert tuple(FAMILIES) == EMBEDDED_FAMILIES
