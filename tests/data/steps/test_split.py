"""The end of every build: equal rows once, at most so many, each prompt on one side, and mixtures of training rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from align.config.recipe.step_settings import CapStep, MixStep
from align.data.rows import assistant, user
from align.data.steps.split import (
    ID_TAKEN,
    LEAKED,
    OVER_CAP,
    IdenticalStep,
    MaxRowsStep,
    SplitStep,
    UsableStep,
    group,
    hold_back,
    share,
)
from align.data.steps.step import start_step
from tests.support.data.steps.tables import context, decide, kept, row

QUESTIONS = st.lists(st.text("ab .!", min_size=1, max_size=4).filter(str.strip), min_size=1, max_size=40)


def split(rows, test_size=0.1, near=None, parts=("split", "split"), **more):
    return decide(SplitStep(test_size=test_size, near_duplicates=near, parts=parts), rows, **more)


def side(verdict, name):
    return [index for index in kept(verdict) if verdict.columns["_split"][index] == name]


def test_equal_rows_stay_once():
    rows = [row("a"), row("b"), row("A!"), row("a", "other"), row("b")]
    verdict = decide(IdenticalStep(), rows, cut=2)
    assert kept(verdict) == [0, 1, 3]
    assert verdict.instead.tolist() == [-1, -1, 0, -1, 1]
    # where the first is gone already, the next one stands for the others
    assert decide(IdenticalStep(), rows, alive=[False, True, True, True, True]).code[2] == -1


def pair(prompt: str, chosen: str, rejected: str, **fields):
    return row(prompt, None, chosen=[assistant(chosen)], rejected=[assistant(rejected)], **fields)


def test_rows_of_one_id_that_say_something_else_stay():
    """Two rounds of sampling name their pairs alike; ids longer than any limit may begin alike."""
    rounds = [pair("a", "yes", "no") | {"id": "a-0-1"}, pair("a", "yes!", "no") | {"id": "a-0-1"}]
    verdict = decide(IdenticalStep(), rounds)
    assert kept(verdict) == [0, 1]
    assert verdict.columns[ID_TAKEN].tolist() == [False, True]
    long = [row("a") | {"id": "x" * 60 + "1"}, row("b") | {"id": "x" * 60 + "2"}]
    assert kept(decide(IdenticalStep(), long)) == [0, 1]
    assert not decide(IdenticalStep(), long).columns


def test_equal_rows_under_different_ids_stay_once():
    rows = [pair("a", "yes", "no") | {"id": "first"}, pair("a", "yes", "no") | {"id": "second"}]
    rows += [pair("a", "no", "yes"), pair("a", "yes", "no", chosen_finished=False), pair("a", "yes", "no", checks="[]")]
    assert kept(decide(IdenticalStep(), rows)) == [0, 2, 3]


def test_at_most_so_many_rows_chosen_by_their_content():
    rows = [row(f"q{index}") for index in range(50)]
    some = {rows[index]["id"] for index in kept(decide(MaxRowsStep(rows=10), rows))}
    assert len(some) == 10
    assert some == {rows[::-1][index]["id"] for index in kept(decide(MaxRowsStep(rows=10), rows[::-1], cut=7))}
    assert {rows[index]["id"] for index in kept(decide(MaxRowsStep(rows=5), rows))} <= some
    assert some != {rows[index]["id"] for index in kept(decide(MaxRowsStep(rows=10), rows, seed=1))}


@given(QUESTIONS, st.floats(0.01, 0.99), st.integers(1, 9))
def test_no_prompt_on_both_sides_and_nothing_lost(questions, size, cut):
    rows = [row(question) for question in questions]
    verdict = split(rows, size, cut=cut)
    train, test = side(verdict, "train"), side(verdict, "test")
    assert sorted(train + test) == list(range(len(rows)))
    assert not {group(rows[index]) for index in train} & {group(rows[index]) for index in test}
    if len({group(result_row) for result_row in rows}) > 1:
        assert train and test


def test_a_side_depends_on_the_prompt_alone():
    rows = [row(f"question {index}") for index in range(1000)]
    tested = {group(rows[index]) for index in side(split(rows, 0.2, seed=3), "test")}
    assert 150 < len(tested) < 250
    fewer = rows[:300][::-1]
    assert {group(fewer[index]) for index in side(split(fewer, 0.2, seed=3), "test")} == {
        group(candidate) for candidate in fewer
    } & tested
    assert {group(rows[index]) for index in side(split(rows, 0.2, seed=4), "test")} != tested


def test_a_test_source_keeps_its_questions_out_of_training():
    rows = [*(row(f"q{index}", source=0) for index in range(10)), row("Q3!", "other", source=1), row("new", source=1)]
    verdict = split(rows, parts=("train", "test"))
    assert side(verdict, "train") == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert side(verdict, "test") == [10, 11]
    assert verdict.reasons[verdict.code[3]] == LEAKED
    # the same with a source that is divided: its row stays only where it was drawn for the test split
    verdict = split(rows, 0.5, parts=("split", "test"))
    assert (3 in side(verdict, "test")) or verdict.code[3] >= 0


BASE = "please write a short and friendly letter to my neighbor about the noise that the dog makes each morning"


def test_near_duplicates_of_a_prompt_are_on_its_side():
    rows = []
    for index in range(60):
        words = [f"{word}{index}" if place % 3 == 0 else word for place, word in enumerate(BASE.split())]
        rows += [row(" ".join(words)), row(" ".join([*words, "now"]))]
    sides = split(rows, 0.4, near=0.6).columns["_split"]
    assert (sides[::2] == sides[1::2]).all() and set(sides) == {"train", "test"}
    assert split(rows, 0.4, near=0.6).notes == {"prompts": 120, "clusters": 60, "largest_cluster": 2}
    apart = split(rows, 0.4).columns["_split"]
    assert (apart[::2] != apart[1::2]).any()


def test_prompts_of_one_template_stay_separate_clusters():
    """0.6 alike, which some estimates of 128 places put at 0.7: those alone would tie most prompts together."""
    draws = np.random.default_rng(0).integers(5000, size=(400, 25))
    shared = " ".join(f"w{place}" for place in range(79))
    rows = [row(shared + " " + " ".join(f"own{word}" for word in draw)) for draw in draws]
    assert split(rows, near=0.7).notes == {"prompts": 400, "clusters": 400, "largest_cluster": 1}


def test_a_near_duplicate_of_a_test_prompt_leaves_training():
    rows = [row(BASE, source=0), row("something else", source=0), row(f"{BASE} please", source=1)]
    assert side(split(rows, near=0.7, parts=("train", "test")), "train") == [1]
    assert side(split(rows, parts=("train", "test")), "train") == [0, 1]


def test_rows_that_no_trainer_could_use_are_dropped():
    step = start_step(UsableStep(), context())
    good, bad = row("a"), {**row("a"), "prompt": [user("a"), assistant("b")]}
    rows = step.apply([good, bad])
    assert rows[0] is good and rows[1].reason


def test_dead_rows_are_on_no_side_and_decide_nothing():
    rows = [row("a"), row("b"), row("c")]
    verdict = split(rows, 0.5, alive=[True, False, True])
    assert verdict.columns["_split"][1] == ""
    assert {verdict.columns["_split"][0], verdict.columns["_split"][2]} == {"train", "test"}
    assert np.array_equal(split([], 0.5).code, [])


def test_conversations_that_grow_from_one_question_stay_together() -> None:
    grown = {"id": "x", "prompt": [user("Hello, there"), assistant("hi"), user("more")]}
    assert group(grown) == group({"id": "y", "prompt": [{"role": "system", "content": "s"}, user("hello there!")]})


def test_a_draw_is_fixed_and_even() -> None:
    assert share("a", 1) == pytest.approx(0.2554167428112489, abs=1e-12)
    assert share("a", 1) != share("a", 2) != share("b", 1)
    draws = [share(str(number), 0) for number in range(2000)]
    assert all(0 <= draw < 1 for draw in draws) and 0.47 < sum(draws) / len(draws) < 0.53


def test_validation_holds_full_groups_and_at_most_a_fifth() -> None:
    rows = [
        {"id": f"{topic}-{number}", "prompt": [user(f"Question {topic}")]} for topic in range(50) for number in range(3)
    ]
    learned, validation = hold_back(rows, 24)
    assert len(validation) == 24 and len(learned) == 126
    assert not {group(row) for row in learned} & {group(row) for row in validation}
    assert [row for row in rows if row not in validation] == learned
    ids = {row["id"] for row in validation}
    assert {row["id"] for row in hold_back(rows[::-1], 24)[1]} == ids
    assert ids < {row["id"] for row in hold_back(rows, 10_000)[1]}
    assert len(hold_back(rows, 10_000)[1]) == 30  # 10 of 50 questions
    assert len(hold_back(rows, 1)[1]) == 3  # one question, though it has more rows
    assert hold_back(rows[:3], 9) == ([], rows[:3])
    assert hold_back([], 9) == ([], [])
    assert len(hold_back(rows[:6], 9)[1]) == 3


def test_a_question_of_most_rows_is_learned_whatever_its_draw() -> None:
    """As in chats that begin with one greeting. Whole questions are taken, so that one could be most of the split."""
    topics = [f"Question {number}" for number in range(20)]
    for common in topics:
        rows = [{"id": topic, "prompt": [user(topic)]} for topic in [*topics, *[common] * 80]]
        learned, validation = hold_back(rows, 512)
        assert {row["id"] for row in validation} <= set(topics) - {common}
        assert 1 <= len(validation) <= 4 and len(learned) + len(validation) == 100


ROWS = [row(f"a{i}", source=0) for i in range(8)] + [row(f"b{i}", source=1) for i in range(2)]
TRAIN = {"_split": np.array(["train"] * 10)}


def appearances(config, rows=ROWS, columns=TRAIN, **more):
    verdict = decide(MixStep(type="mix", **config), rows, columns=columns, **more)
    times = np.where(verdict.code < 0, verdict.times, 0)
    return [int(times[:8].sum()), int(times[8:].sum())], verdict


def test_weights_share_out_as_many_rows_as_there_were():
    # 10 rows at 1 : 1 are 5 each: 5/8 of an epoch and 2.5 epochs
    counts, verdict = appearances({"weights": {"a": 1, "b": 1}})
    assert counts == [5, 5]
    assert verdict.notes == {"epochs": {"a": 0.625, "b": 2.5}}
    assert sorted(verdict.times[8:]) == [2, 3]


def test_a_source_without_a_weight_is_left_out():
    assert appearances({"weights": {"a": 1}, "rows": 8})[0] == [8, 0]


def test_temperature():
    # sizes 8 and 2 under T = 2: sqrt 2.828 to 1.414, 2 to 1, of 9 rows 6 and 3
    assert appearances({"temperature": 2, "rows": 9})[0] == [6, 3]
    assert appearances({"temperature": 1})[0] == [8, 2]


def test_epochs():
    assert appearances({"epochs": {"a": 0.5, "b": 3}})[0] == [4, 6]
    assert appearances({"epochs": {"b": 1.5}})[0] == [8, 3]


def test_no_row_more_often_than_max_epochs():
    counts, verdict = appearances({"weights": {"a": 1, "b": 1}, "rows": 100, "max_epochs": 2})
    assert counts == [16, 4]
    assert verdict.notes["held at max_epochs"] == ["a", "b"]


def test_the_test_split_is_left_alone():
    columns = {"_split": np.array(["test", *["train"] * 8, "test"])}
    _, verdict = appearances({"epochs": {"a": 2, "b": 0}}, columns=columns)
    assert verdict.times.tolist() == [1, *[2] * 7, 0, 1]
    assert verdict.code.tolist() == [*[-1] * 8, 0, -1]


def test_shards_change_nothing_and_the_seed_does():
    config = {"weights": {"a": 1, "b": 1}}
    times = appearances(config)[1].times
    assert (times == appearances(config, cut=3)[1].times).all()
    assert any((times != appearances(config, seed=s)[1].times).any() for s in (1, 2, 3))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "one of weights, temperature and epochs; none given"),
        ({"weights": {"a": 1}, "temperature": 1}, "weights and temperature given"),
        ({"epochs": {"a": 1}, "rows": 3}, "epochs already say"),
        ({"weights": {"a": -1}}, "mix.weights.a is -1"),
        ({"weights": {"a": 0}}, "are all 0"),
    ],
)
def test_contradictions_are_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        MixStep(type="mix", **config)


def test_unknown_source(refused):
    refused(appearances, {"weights": {"aa": 1}})


CAPPED_ROWS = [row(f"a{i}", source=0) for i in range(10)] + [row(f"b{i}", source=1) for i in range(4)]


def test_each_source_has_its_own_limit():
    verdict = decide(CapStep(type="cap", each=5, sources={"b": 2}), CAPPED_ROWS)
    left = kept(verdict)
    assert (sum(index < 10 for index in left), sum(index >= 10 for index in left)) == (5, 2)
    assert verdict.reasons == [OVER_CAP]


def test_rows_that_are_dropped_already_do_not_count():
    alive = [index % 2 == 0 for index in range(14)]
    verdict = decide(CapStep(type="cap", each=4), CAPPED_ROWS, alive=alive)
    assert sum(alive[index] and index < 10 for index in kept(verdict)) == 4
    assert sum(alive[index] and index >= 10 for index in kept(verdict)) == 2


def test_the_seed_and_the_row_choose_not_the_order():
    config = CapStep(type="cap", each=5)
    chosen = {CAPPED_ROWS[index]["id"] for index in kept(decide(config, CAPPED_ROWS))}
    assert chosen == {CAPPED_ROWS[::-1][index]["id"] for index in kept(decide(config, CAPPED_ROWS[::-1], cut=3))}
    assert chosen != {CAPPED_ROWS[index]["id"] for index in kept(decide(config, CAPPED_ROWS, seed=1))}


def test_unknown_source_and_empty_cap(refused):
    refused(lambda: decide(CapStep(type="cap", sources={"bb": 2}), CAPPED_ROWS))
    refused(CapStep, type="cap")
    refused(CapStep, type="cap", sources={"a": 0})
