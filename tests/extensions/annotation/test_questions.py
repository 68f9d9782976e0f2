"""The order of questions: overlap, hidden duplicates, gold questions, active choice."""

from __future__ import annotations

from typing import Any

import pytest

from align.extensions.annotation.questions import GAP, Question, QuestionQueue, rank_pairs
from align.store.annotations import Answer, Pair, Settings, pair_id
from tests.support.refusals import Refused


def make_pairs(count: int, **fields: Any) -> dict[str, Pair]:
    pairs = {}
    for number in range(count):
        prompt = [{"role": "user", "content": f"Question {number}"}]
        name = pair_id(prompt, "yes", "no")
        pairs[name] = Pair(id=name, prompt=prompt, a="yes", b="no", **fields)
    return pairs


def reply(question: Question, annotator: str, number: int) -> Answer:
    return Answer(
        id=f"{annotator}{number:04d}",
        pair=question.pair.id,
        annotator=annotator,
        time=f"{number:06d}",
        left=question.left,
        verdict="tie",
        repeat=question.repeat,
    )


def answer_all(queue: QuestionQueue, others: list[Answer]) -> list[Question]:
    """Answer until nothing is left, and return the questions; the answers are appended to ``others``."""
    asked = []
    while (question := queue.next(others)) is not None:
        asked.append(question)
        others.append(reply(question, queue.annotator, len(others)))
    return asked


def test_second_annotator_gets_only_the_shared_pairs() -> None:
    pairs, settings = make_pairs(200), Settings(overlap=0.3, duplicates=0.0)
    answers: list[Answer] = []
    first = QuestionQueue("s", pairs, settings, "ann")
    assert len(answer_all(first, answers)) == 200
    second = QuestionQueue("s", pairs, settings, "bob")
    assert second.count(answers)[0] == 0
    shared = answer_all(second, answers)
    # 200 pairs at 0.3: 60, and the hash is within five standard deviations (6.5) of it.
    assert 28 < len(shared) < 92
    assert {question.pair.id for question in shared} == {name for name, pair in pairs.items() if first.is_shared(pair)}
    assert second.count(answers) == (len(shared), len(shared))


def test_overlap_bounds_share_none_or_all() -> None:
    pairs = make_pairs(30)
    for overlap, expected in ((0.0, 0), (1.0, 30)):
        answers: list[Answer] = []
        settings = Settings(overlap=overlap, duplicates=0.0)
        answer_all(QuestionQueue("s", pairs, settings, "ann"), answers)
        assert len(answer_all(QuestionQueue("s", pairs, settings, "bob"), answers)) == expected


def test_order_is_the_same_after_a_resume() -> None:
    pairs, settings = make_pairs(60), Settings(duplicates=0.3)
    whole = answer_all(QuestionQueue("s", pairs, settings, "ann"), [])
    answers: list[Answer] = []
    resumed = []
    for _ in whole:
        question = QuestionQueue("s", dict(reversed(pairs.items())), settings, "ann").next(answers)
        assert question is not None
        resumed.append(question)
        answers.append(reply(question, "ann", len(answers)))
    assert resumed == whole
    other = answer_all(QuestionQueue("s", pairs, settings, "bob"), [])
    assert [question.pair.id for question in other] != [question.pair.id for question in whole]


def test_duplicates_are_flipped_and_far_from_the_first() -> None:
    asked = answer_all(QuestionQueue("s", make_pairs(100), Settings(duplicates=0.3), "ann"), [])
    repeats = [place for place, question in enumerate(asked) if question.repeat]
    assert 15 <= len(repeats) <= 45
    places = {question.pair.id: place for place, question in enumerate(asked) if not question.repeat}
    for place in repeats:
        question = asked[place]
        assert question.left != asked[places[question.pair.id]].left
    gaps = [place - places[asked[place].pair.id] for place in repeats if place < 100]
    assert min(gaps) > GAP
    assert len({asked[place].pair.id for place in repeats}) == len(repeats)


def test_sides_are_balanced_between_pairs() -> None:
    asked = answer_all(QuestionQueue("s", make_pairs(400), Settings(duplicates=0.0), "ann"), [])
    lefts = sum(question.left == "a" for question in asked)
    assert 150 < lefts < 250
    assert asked[0].texts == (("yes", "no") if asked[0].left == "a" else ("no", "yes"))


def test_gold_questions_come_every_few_questions() -> None:
    gold = {name: pair.model_copy(update={"gold": "a"}) for name, pair in make_pairs(4).items()}
    pairs = {**make_pairs(40), **gold}
    asked = answer_all(QuestionQueue("s", pairs, Settings(duplicates=0.0, gold_every=5), "ann"), [])
    assert [place for place, question in enumerate(asked) if question.pair.gold] == [4, 9, 14, 19]
    assert not any(question.active for question in asked)


def with_scores(scores: list[dict[str, tuple[float, float]]]) -> dict[str, Pair]:
    pairs = list(make_pairs(len(scores)).values())
    return {pair.id: pair.model_copy(update={"scores": values}) for pair, values in zip(pairs, scores, strict=True)}


def test_closeness_asks_the_smallest_margin_first() -> None:
    pairs = with_scores([{"r": (0.0, 3.0)}, {"r": (1.0, 1.1)}, {}, {"r": (2.0, 1.0)}])
    settings = Settings(order="closeness", duplicates=0.0)
    asked = answer_all(QuestionQueue("s", pairs, settings, "ann"), [])
    names = list(pairs)
    assert [question.pair.id for question in asked] == [names[1], names[3], names[0], names[2]]
    assert all(question.active for question in asked)


def test_disagreement_asks_models_that_contradict_first() -> None:
    pairs = with_scores(
        [
            {"r": (1.0, 0.0), "q": (1.0, 0.0)},
            {"r": (1.0, 0.0), "q": (0.0, 1.0)},
            # Scores of s are a hundred times those of r, so margins count in units of each model's typical margin.
            {"r": (1.0, 0.0), "s": (100.0, 0.0)},
            {"r": (5.0, 0.0)},
        ]
    )
    ranks = rank_pairs(list(pairs.values()), "disagreement", "s")
    # Margins (1, 1), (1, -1) and (1, 1) in units of 1, 1 and 100: spreads 0, 1 and 0.
    assert list(ranks.values()) == pytest.approx([0.0, -1.0, 0.0, float("inf")])


@pytest.mark.parametrize("order", ["closeness", "disagreement"])
def test_order_by_scores_without_scores_is_refused(refused: Refused, order: Any) -> None:
    refused(lambda: QuestionQueue("s", make_pairs(3), Settings(order=order), "ann"))


def test_skipped_pairs_wait_for_another_session() -> None:
    pairs = make_pairs(3)
    queue = QuestionQueue("s", pairs, Settings(duplicates=0.0), "ann")
    first = queue.next([])
    assert first is not None
    second = queue.next([], {first.pair.id})
    assert second is not None and second.pair.id != first.pair.id
    assert queue.next([], set(pairs)) is None
