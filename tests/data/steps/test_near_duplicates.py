"""Near-duplicates of rows: what counts as near, who stays, what the ledger is told, and that equal rows always go."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from align.config.recipe.step_settings import ExactDuplicatesStep, NearDuplicatesStep
from align.data.rows import Row, assistant
from align.data.steps.step_kinds import start_step
from align.errors import UserError
from tests.support.data.steps.tables import context, decide, kept, row

TEXT = " ".join(f"word{number}" for number in range(60))


def step(**inputs: Any) -> NearDuplicatesStep:
    return NearDuplicatesStep(type="near_duplicates", **inputs)


def edited(text: str, *places: int) -> str:
    words = text.split()
    for place in places:
        words[place] = "edit"
    return " ".join(words)


def test_a_near_duplicate_goes_and_says_what_stands_for_it() -> None:
    rows = [row("other", "short"), row("Tell me", TEXT), row("Tell me", edited(TEXT, 30)), row("tell me!", TEXT)]
    verdict = decide(step(), rows)
    assert kept(verdict) == [0, 1]
    assert verdict.instead is not None and verdict.instead.tolist() == [-1, -1, 1, 1]
    reasons = [verdict.reasons[code] for code in verdict.code[2:]]
    assert reasons == ["near-duplicate of an earlier row", "duplicate of an earlier row"]
    assert verdict.notes["clusters"] == 1 and verdict.notes["largest_cluster"] == 3
    json.dumps(verdict.notes)


def test_the_threshold_is_of_jaccard_similarity() -> None:
    # an edit inside a text of 60 words changes 5 of 56 shingles: 51 / 61 = 0.84; six edits leave (56 - 30) / 86 = 0.30
    rows = [row("p", TEXT), row("p", edited(TEXT, 30)), row("p", edited(TEXT, 5, 15, 25, 35, 45, 55))]
    assert kept(decide(step(of="reply"), rows)) == [0, 2]
    assert kept(decide(step(of="reply", threshold=0.97), rows)) == [0, 1, 2]
    assert kept(decide(step(of="reply", threshold=0.2), rows)) == [0]


def test_short_questions_that_differ_in_a_word_are_different() -> None:
    rows = [row("What is 3 plus 4?"), row("What is 3 plus 5?"), row("what is 3 plus 4")]
    assert kept(decide(step(of="prompt"), rows)) == [0, 1]


def test_a_long_prompt_is_compared_without_its_system_turn_and_its_reply() -> None:
    system = {"role": "system", "content": " ".join(f"rule{number}" for number in range(500))}
    rows = [{**row(text, reply)} for text, reply in ((TEXT, "yes"), (edited(TEXT, 3), "no"), ("unlike", "yes"))]
    rows = [{**result_row, "prompt": [system, *result_row["prompt"]]} for result_row in rows]
    assert kept(decide(step(of="prompt"), rows)) == [0, 2]


def test_changing_places_makes_another_pair() -> None:
    good, bad = TEXT, " ".join(f"other{number}" for number in range(60))

    def pair(chosen: str, rejected: str) -> Row:
        return row("p", None, chosen=[assistant(chosen)], rejected=[assistant(rejected)])

    rows = [pair(good, bad), pair(bad, good), pair(edited(good, 9), bad)]
    assert kept(decide(step(), rows, kind="preferences")) == [0, 1]
    labeled = [row("p", TEXT, label=True), row("p", TEXT, label=False)]
    assert kept(decide(step(of="reply"), labeled, kind="unpaired")) == [0, 1]


def test_rows_dropped_before_stand_for_none() -> None:
    rows = [row("p", TEXT), row("p", edited(TEXT, 30)), row("p", edited(TEXT, 31))]
    verdict = decide(step(), rows, alive=[False, True, True])
    assert verdict.code.tolist() == [-1, -1, 0]
    assert verdict.instead is not None and verdict.instead[2] == 1


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from(["prompt", "reply", "row"]))
def test_shards_change_nothing_and_equal_rows_always_go(seed: int, cut: int, of: Any) -> None:
    rng = random.Random(seed)
    texts = [" ".join(rng.choice("abcdefgh") for _ in range(rng.choice([0, 1, 3, 30]))) for _ in range(12)]
    texts += [edited(text, 0) if text and rng.random() < 0.5 else text.upper() + "." for text in texts]
    rows = [row(rng.choice(texts), rng.choice(texts)) for _ in range(40)]
    decisions = decide(step(of=of), rows)
    parted = decide(step(of=of), rows, cut=cut)
    assert decisions.code.tolist() == parted.code.tolist()
    exact = decide(ExactDuplicatesStep(type="exact_duplicates", of=of), rows)
    assert set(kept(decisions)) <= set(kept(exact))


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        step(threshold=70)
    with pytest.raises(UserError, match="no reply; write 'of: prompt'"):
        start_step(step(of="reply"), context(kind="prompts"))


def test_notes_give_the_error_of_the_estimate() -> None:
    notes = decide(step(threshold=0.8, permutations=256), [row("p", TEXT)]).notes
    assert notes["standard_error"] == 0.025  # sqrt(0.8 * 0.2 / 256)
    assert notes["chance_to_look_at_a_pair_at_the_threshold"] >= 0.95
    assert notes["bands"] * notes["rows_per_band"] <= 256


def test_rows_that_are_read_back_decide_between_close_rows() -> None:
    """A template of 75 words in 100: 0.6 alike, though some estimates say 0.7."""
    rng = random.Random(2)
    shared = [f"shared{number}" for number in range(75)]
    texts = [" ".join([*shared, *(f"w{rng.randrange(5000)}" for _ in range(25))]) for _ in range(300)]
    copy = " ".join([*texts[7].split()[:85], *(f"own{number}" for number in range(15))])  # 85 of 115: not sure either
    rows = [row("p", text) for text in [*texts, copy]]
    verdict = decide(step(of="reply", shingle=1), rows)
    assert kept(verdict) == list(range(300))
    assert verdict.instead is not None and verdict.instead[300] == 7
    assert verdict.notes["pairs_compared_exactly"] > 100
    dropped_before = decide(step(of="reply", shingle=1), rows, alive=[False] * 5 + [True] * 296)
    assert kept(dropped_before) == list(range(300))
