"""Statistics of a set: agreement, consistency, gold, comparisons by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from align.extensions.annotation.report import agreement, compare, first_answers, make_report, report_lines
from align.store.annotations import Answer, Pair
from tests.support.refusals import Refused

MESSAGES = [{"role": "user", "content": "Hi"}]


def pair(name: str, **fields: Any) -> Pair:
    return Pair(id=name, prompt=MESSAGES, a="x", b="y", **fields)


def answer(name: str, value: int | str, annotator: str = "ann", time: int = 0, **fields: Any) -> Answer:
    """Return a verdict from -2 to 2; 0 is a tie."""
    verdict = {0: "tie", 1: "better", 2: "much_better"}[abs(int(value))]
    preferred = None if value == 0 else ("a" if int(value) > 0 else "b")
    values = {"left": "a", "seconds": 2.0, "verdict": verdict, "preferred": preferred, **fields}
    return Answer(id=f"{time:04d}{annotator}{name}", pair=name, annotator=annotator, time=f"{time:04d}", **values)


def test_alpha_is_krippendorffs_on_a_worked_table() -> None:
    # Two annotators, verdicts 1 and -1 only, so the ordinal distance is 0 or one constant and alpha is the nominal:
    # 1 - (n - 1) * disagreements / (n_1 * n_-1) over n = 8 values, with 2 disagreeing entries (one pair, both orders)
    # per coincidence: observed 2 / 8, expected 2 * 5 * 3 / (8 * 7).
    firsts = []
    for name, values in {"p": (1, 1), "q": (1, 1), "r": (-1, -1), "s": (1, -1)}.items():
        firsts += [answer(name, values[0]), answer(name, values[1], "bob")]
    alpha = agreement(firsts, resamples=200)
    assert alpha is not None
    assert alpha.value == pytest.approx(1 - (2 / 8) / (2 * 5 * 3 / (8 * 7)))
    assert alpha.n == 4 and alpha.low < alpha.value < alpha.high <= 1


def test_alpha_needs_two_annotators_and_two_values() -> None:
    assert agreement([answer("p", 1), answer("q", -1)]) is None
    assert agreement([answer("p", 1), answer("p", 1, "bob")]) is None


def test_missing_package_is_named_with_its_extra(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(lambda: agreement([answer("p", 1), answer("p", -1, "bob")]))


def test_consistency_and_gold_count_the_right_answers() -> None:
    pairs = {"p": pair("p"), "q": pair("q"), "g": pair("g", gold="b"), "h": pair("h", gold="tie")}
    answers = [
        answer("p", 2, time=1),
        answer("q", 1, time=2),
        answer("g", -1, time=3),
        answer("h", 1, time=4),
        # Better and much better prefer the same side, so this is consistent; q's second verdict is not.
        answer("p", 1, time=5, repeat=True),
        answer("q", 0, time=6, repeat=True, seconds=8.0),
    ]
    report = make_report(pairs, answers)
    line = report.annotators["ann"]
    assert (line.consistency.value, line.consistency.n) == (0.5, 2)
    assert (line.gold.value, line.gold.n) == (0.5, 2)
    assert (line.answers, line.seconds) == (6, 2.0)
    assert report.verdicts == {"much_better": 1, "better": 3}
    assert len(first_answers(answers)) == 4


def test_comparison_counts_each_pair_once_by_its_first_answer() -> None:
    pairs = {
        "p": pair("p", systems=("new", "old")),
        "q": pair("q", systems=("old", "new")),
        "r": pair("r", systems=("new", "old")),
        "g": pair("g", systems=("new", "old"), gold="a"),
        "s": pair("s", systems=("new", "old")),
    }
    firsts = [
        answer("p", 1, time=1),
        answer("p", -1, "bob", time=2),
        answer("q", 2, time=3),
        answer("r", 0, time=4),
        answer("g", 1, time=5),
        answer("s", 1, time=6, active=True),
    ]
    (line,) = compare(pairs, firsts)
    # p: new wins; q: a is old, so new loses; r: a tie. Gold and active pairs do not count.
    assert (line.name, line.share, line.n, line.ties) == ("new better than old", 0.5, 3, 1)
    assert line.decision == "open"


def test_clear_result_may_stop_and_agreement_with_a_model_counts() -> None:
    pairs = {}
    answers = []
    for number in range(60):
        name = f"p{number:02d}"
        pairs[name] = pair(name, systems=("new", "old"), scores={"rm": (1.0, 0.0)})
        answers.append(answer(name, 1, time=number, left="a" if number % 2 else "b"))
    report = make_report(pairs, answers, {"ann": {"answers": 60, "first": "2026-12-01T", "last": "2026-12-01T"}})
    decisions = {line.name: (line.share, line.decision) for line in report.comparisons}
    assert decisions == {"new better than old": (1.0, "clear"), "annotators agree with rm": (1.0, "clear")}
    assert report.may_stop
    assert report.left.value == 0.5
    assert report.strengths is not None and report.strengths.systems["new"].low > 0
    assert "every comparison is decided: you may stop" in report_lines(report)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["may_stop"] is True


def test_level_is_divided_by_the_comparisons_of_all_pairs() -> None:
    names = [f"p{number}" for number in range(12)]
    one = {name: pair(name, systems=("new", "old")) for name in names}
    answers = [answer(name, 1, time=place) for place, name in enumerate(names)]
    (alone,) = compare(one, answers)
    # Pairs of other systems that nobody has answered yet already widen the interval.
    more = {f"o{number}": pair(f"o{number}", systems=("new", f"x{number}")) for number in range(5)}
    (with_others,) = compare({**one, **more}, answers)
    assert with_others.low < alone.low


def test_empty_set_has_a_report() -> None:
    report = make_report({"p": pair("p")}, [])
    assert report.answered == 0 and not report.may_stop and report.comparisons == []
    assert report_lines(report)[0] == "0 of 1 pairs answered"
