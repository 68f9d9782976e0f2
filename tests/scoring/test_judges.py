"""A judge as a reward: grades, its cache, its budget, and judges that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.endpoint import RewardJudge
from align.data.rows import user
from align.judges.client import JudgmentCaches, stage_judge
from align.scoring.judges import MIN_JUDGMENTS, GradeScorer
from tests.support.evaluation.judged_harness import endpoint
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.refusals import Refused

ROWS = [{"id": str(number), "prompt": [user(f"Question {number}")], "answer": f"key {number}"} for number in range(4)]
TEXTS = ["alpha", "bravo", "charlie", "delta"]


@pytest.fixture
def fake() -> Any:
    server = FakeChat(lambda body: completion("Fine.\n[[10]]"))
    yield server
    server.stop()


def judge(fake: FakeChat, folder: Path, shared: Path | None = None, processes: int = 1, **settings: Any) -> GradeScorer:
    config = RewardJudge(**endpoint(fake, **settings.pop("at", {})), **settings)
    backend = stage_judge(config, JudgmentCaches(folder, shared, print), "score[1]", processes)
    return GradeScorer(config, backend, "score[1]")


def by_text(**grades: str) -> Any:
    """Judge that answers by the response that it is shown last."""

    def reply(body: dict[str, Any]) -> Any:
        shown = body["messages"][-1]["content"].rpartition("the answer to grade")[2]
        return completion(next(text for word, text in grades.items() if word in shown))

    return reply


def test_grades_become_scores_from_0_to_1(fake: FakeChat, tmp_path: Path) -> None:
    fake.reply = by_text(alpha="[[1]]", bravo="[[10]]", charlie="[[5.5]]", delta="no idea")
    scored = judge(fake, tmp_path, reference="answer", rubric="Be strict.").score(ROWS, TEXTS)
    assert (scored.total, scored.metrics) == ([0.0, 1.0, 0.5, 0.0], {"unreadable": [0.0, 0.0, 0.0, 1.0]})
    prompts = sorted(fake.prompts())
    assert len(prompts) == 4
    assert all("Be strict." in prompt and "The reference answer is right" in prompt for prompt in prompts)
    assert {f"key {number}" for number in range(4)} == {
        word for word in (f"key {number}" for number in range(4)) for prompt in prompts if word in prompt
    }


def test_the_rubric_quotes_columns_of_the_row(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    judge(fake, tmp_path, rubric="The answer is {row[answer]}.").score(ROWS, TEXTS)
    assert all(any(f"The answer is key {number}." in prompt for prompt in fake.prompts()) for number in range(4))
    refused(lambda: judge(fake, tmp_path, rubric="The answer is {row[key]}.").score(ROWS, TEXTS))


def test_nothing_is_asked_twice(fake: FakeChat, tmp_path: Path) -> None:
    """Not in a batch, not after a kill, and not by another stage that shares the cache."""
    shared = tmp_path / "shared"
    first = judge(fake, tmp_path / "stage", shared)
    first.check()
    first.score(ROWS + ROWS, TEXTS + TEXTS)
    assert len(fake.bodies) == 1 + 4
    again = judge(fake, tmp_path / "stage", shared)
    again.check()
    assert again.score(ROWS, TEXTS).total == [1.0] * 4
    assert judge(fake, tmp_path / "other", shared).score(ROWS, TEXTS).total == [1.0] * 4
    assert len(fake.bodies) == 1 + 4
    assert again.judge.usage()["requests"] == 5 and again.judge.usage()["prompt_tokens"] == 50


def test_another_seed_asks_again(fake: FakeChat, tmp_path: Path) -> None:
    judge(fake, tmp_path).score(ROWS, TEXTS)
    judge(fake, tmp_path, seed=1).score(ROWS, TEXTS)
    assert len(fake.bodies) == 8


def test_requests_run_together_and_failures_are_retried(fake: FakeChat, tmp_path: Path) -> None:
    fake.delay = 0.05
    refused = [True]

    def reply(body: dict[str, Any]) -> Any:
        return (503, {}, {"Retry-After": "0"}) if refused and refused.pop() else completion("[[4]]")

    fake.reply = reply
    rows = [{"id": str(number), "prompt": [user(f"Question {number}")]} for number in range(12)]
    scores = judge(fake, tmp_path, at={"concurrency": 4, "retries": 1}).score(rows, ["text"] * 12).total
    assert scores == pytest.approx([1 / 3] * 12)
    assert len(fake.bodies) == 13 and 2 <= fake.most_under_way <= 4


def test_a_spent_budget_ends_the_run_and_a_higher_one_goes_on(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    prices = {"price_input": 1e6, "price_output": 1e6, "concurrency": 1}  # a token costs 1
    fake.reply = lambda body: completion("[[10]]", usage={"prompt_tokens": 400, "completion_tokens": 100})
    refused(lambda: judge(fake, tmp_path, at=prices, max_tokens=100, max_cost=2000.0).score(ROWS, TEXTS))
    assert 0 < len(fake.bodies) < 4
    richer = judge(fake, tmp_path, at=prices, max_tokens=100, max_cost=1e6)
    assert richer.score(ROWS, TEXTS).total == [1.0] * 4
    assert len(fake.bodies) == 4
    assert richer.judge.usage()["cost"] == 4 * 500.0


def test_processes_share_what_is_left_of_a_budget(fake: FakeChat, tmp_path: Path) -> None:
    prices = {"price_input": 1e6, "price_output": 1e6, "concurrency": 1}
    alone = judge(fake, tmp_path / "a", at=prices, max_tokens=100, max_cost=9000.0)
    alone.score(ROWS[:1], TEXTS[:1])
    assert alone.judge.client.budget.limit == 9000.0
    of_two = judge(fake, tmp_path / "a", processes=2, at=prices, max_tokens=100, max_cost=9000.0)
    of_two.score(ROWS[:1], TEXTS[:1])
    assert of_two.judge.client.budget.limit == 12 + (9000 - 12) / 2


def test_too_many_unreadable_grades_end_the_run_with_an_example(
    refused: Refused, fake: FakeChat, tmp_path: Path
) -> None:
    fake.reply = lambda body: completion("\x1b[31mnine")
    scorer = judge(fake, tmp_path, max_unreadable=0.1)
    # A few of a small batch are no share to speak of.
    assert scorer.score(ROWS[:3], TEXTS[:3]).total == [0.0] * 3
    assert 0.1 * MIN_JUDGMENTS < 4
    refused(scorer.score, ROWS, TEXTS)


def test_missing_reference_column_error_names_row_and_columns(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    rows = [{"id": "7", "prompt": [user("?")], "checks": ""}]
    refused(lambda: judge(fake, tmp_path, reference="answer").score(rows, ["x"]))
    assert not fake.bodies


def test_unusable_judge_is_error_before_start(
    refused: Refused, fake: FakeChat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    refused(judge, fake, tmp_path, at={"key_variable": "NO_SUCH_KEY"})
    fake.reply = lambda body: (400, {"error": {"message": "no chat here"}})
    refused(lambda: judge(fake, tmp_path / "b").check())
    fake.reply = lambda body: (503, {}, {"Retry-After": "0"})
    refused(lambda: judge(fake, tmp_path / "c", at={"retries": 1}).check())
    fake.stop()
    refused(lambda: judge(fake, tmp_path / "d").check())
