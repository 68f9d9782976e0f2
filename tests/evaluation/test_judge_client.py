"""Asking a judge: kept answers, budgets, and judges that are gone or cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.endpoint import EndpointJudge
from align.data.rows import user
from align.errors import UserError
from align.evaluation.judge import PROBE_SIZE, JudgeClient, warn_if_unreachable
from align.judges.prompts import read_verdict
from tests.support.evaluation.judged_harness import FolderContext, endpoint
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.refusals import Refused


@pytest.fixture
def fake() -> Any:
    server = FakeChat(lambda body: completion("So: [[A]]"))
    yield server
    server.stop()


def _readable(text: str) -> bool:
    return read_verdict(text) is not None


def _ask(fake: FakeChat, bench: FolderContext, count: int = 40, groups: Any = None, **settings: Any) -> list[str]:
    index = settings.pop("at", {})
    config = EndpointJudge(**endpoint(fake, **index), **settings)
    questions = [[user(f"Question {number}")] for number in range(count)]
    judgments = JudgeClient(config, "mt", bench)
    replies = judgments.ask(questions, groups or ["sft"] * count, _readable)
    return [reply.text for reply in replies]


def _every(nth: int, otherwise: str) -> Any:
    """A judge that says something else to every nth question."""

    def reply(body: dict[str, Any]) -> Any:
        number = int(body["messages"][-1]["content"].split()[-1])
        return completion(otherwise if number % nth == nth - 1 else f"{number} [[B]]")

    return reply


def test_answers_keep_order_of_questions(fake: FakeChat, tmp_path: Path) -> None:
    fake.reply = lambda body: completion(body["messages"][-1]["content"] + " [[B]]")
    bench = FolderContext(tmp_path)
    replies = _ask(fake, bench, 50, at={"concurrency": 8})
    assert replies == [f"Question {number} [[B]]" for number in range(50)]
    assert len(fake.bodies) == 50
    assert bench.told[-1] == (50, 50, "judgments")
    body = fake.bodies[0]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.0, 512, "good-model")


def test_a_second_run_asks_nothing_and_another_seed_everything(fake: FakeChat, tmp_path: Path) -> None:
    for _ in range(2):
        _ask(fake, FolderContext(tmp_path))
    assert len(fake.bodies) == 40
    _ask(fake, FolderContext(tmp_path), seed=1)
    assert len(fake.bodies) == 80


def test_equal_questions_are_asked_once_but_all_counted(fake: FakeChat, tmp_path: Path) -> None:
    bench = FolderContext(tmp_path)
    judgments = JudgeClient(EndpointJudge(**endpoint(fake)), "mt", bench)
    assert len(judgments.ask([[user("The same")]] * 30, ["sft"] * 30, _readable)) == 30
    assert len(fake.bodies) == 1 and bench.told[-1] == (30, 30, "judgments")


def test_runs_share_judgments_where_there_is_a_place(fake: FakeChat, tmp_path: Path) -> None:
    for run in ("one", "two"):
        _ask(fake, FolderContext(tmp_path / run, shared=tmp_path / "shared"))
    assert len(fake.bodies) == 40


def test_unreadable_judge_stops_early_with_counts(fake: FakeChat, tmp_path: Path) -> None:
    fake.reply = lambda body: completion("\x1b[2J‮I like\nturtles")
    with pytest.raises(UserError) as caught:
        _ask(fake, FolderContext(tmp_path), 400)
    message = str(caught.value)
    assert f"in {PROBE_SIZE} of {PROBE_SIZE} judgments" in message and "400 wanted in all" in message
    assert f"{PROBE_SIZE} without a verdict in the form asked for" in message
    assert r"\u001b[2J\u202eI like\nturtles" in message and "\x1b" not in message and "‮" not in message
    assert "tasks.mt: the judge good-model" in message and "judge.seed: 1" in message
    assert len(fake.bodies) == PROBE_SIZE


def test_half_of_the_first_questions_ends_it_and_fewer_do_not(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    fake.reply = _every(2, "?")
    refused(lambda: _ask(fake, FolderContext(tmp_path / "half"), 100))
    assert len(fake.bodies) == PROBE_SIZE
    fake.reply = _every(3, "?")
    refused(lambda: _ask(fake, FolderContext(tmp_path / "third"), 100, seed=1))
    assert len(fake.bodies) == PROBE_SIZE + 100


def test_a_few_unreadable_ones_are_let_through(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    fake.reply = _every(10, "?")
    replies = _ask(fake, FolderContext(tmp_path))
    assert replies.count("?") == 4  # of 40: a tenth, which is what max_unreadable says
    refused(lambda: _ask(fake, FolderContext(tmp_path), max_unreadable=0.09))


def test_unreadable_answers_of_one_system_are_an_error(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    fake.reply = _every(20, "?")
    groups = ["ppo" if number % 20 == 19 else "sft" for number in range(100)]
    refused(lambda: _ask(fake, FolderContext(tmp_path), 100, groups=groups))


def test_why_verdicts_cannot_be_read_is_counted(fake: FakeChat, tmp_path: Path) -> None:
    answers = {
        0: completion("A is bet", finish_reason="length"),
        1: (400, {"error": {"message": "too long"}}),
        2: completion("", finish_reason="content_filter"),
        3: completion("Hm"),
    }
    fake.reply = lambda body: answers.get(int(body["messages"][-1]["content"].split()[-1]), completion("[[C]]"))
    with pytest.raises(UserError) as caught:
        _ask(fake, FolderContext(tmp_path), 10)
    message = str(caught.value)
    for reason in (
        "1 refused by the server", "1 cut off at judge.max_tokens", "1 declined by the judge", "1 without a verdict",
    ):  # fmt: skip
        assert reason in message
    assert '"A is bet"' in message


def test_lost_judge_reports_cached_judgments_and_resumes(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    def dying(body: dict[str, Any]) -> Any:
        return (503, {"error": "down"}) if len(fake.bodies) > 25 else completion("[[A]]")

    fake.reply = dying
    refused(lambda: _ask(fake, FolderContext(tmp_path), at={"concurrency": 1, "patience": 0}))
    request = fake.prompts()[:25]
    fake.reply, fake.bodies = (lambda body: completion("[[A]]")), []
    assert _ask(fake, FolderContext(tmp_path)) == ["[[A]]"] * 40
    assert len(fake.bodies) == 15 and not set(request) & set(fake.prompts())


def test_a_judge_that_never_was_there(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    fake.stop()
    refused(lambda: _ask(fake, FolderContext(tmp_path)))


def test_the_budget_holds_and_is_gone_on_with(refused: Refused, fake: FakeChat, tmp_path: Path) -> None:
    prices = {
        "price_input": 0.0,
        "price_output": 1_000_000,
        "concurrency": 1,
    }  # 1 a token: "So: [[A]]" is 2, and at most 5
    refused(lambda: _ask(fake, FolderContext(tmp_path), at=prices, max_tokens=5, max_cost=20))
    assert len(fake.bodies) == 8
    _ask(fake, FolderContext(tmp_path), at=prices, max_tokens=5, max_cost=100)
    assert len(fake.bodies) == 40


def test_what_it_took_is_told(fake: FakeChat, tmp_path: Path) -> None:
    config = EndpointJudge(**endpoint(fake, price_input=1, price_output=2))
    judgments = JudgeClient(config, "mt", FolderContext(tmp_path))
    assert judgments.usage() == {}
    judgments.ask([[user(f"{number}")] for number in range(20)], ["sft"] * 20, _readable)
    usage = judgments.usage()
    assert (usage["requests"], usage["prompt_tokens"], usage["completion_tokens"]) == (20, 200, 40)
    assert usage["cost"] == pytest.approx((200 + 80) / 1e6)


def test_a_judge_that_is_not_there_yet_is_a_warning(
    refused: Refused, fake: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    config = EndpointJudge(**endpoint(fake, key_variable="ALIGN_TEST_KEY")).endpoint
    assert config is not None
    refused(warn_if_unreachable, config, "tasks.mt", warnings.append)
    monkeypatch.setenv("ALIGN_TEST_KEY", "secret-key")
    warn_if_unreachable(config, "tasks.mt", warnings.append)
    assert warnings == []
    fake.stop()
    warn_if_unreachable(config, "tasks.mt", warnings.append)
    (warning,) = warnings
    assert fake.url in warning and "start it" in warning and "secret" not in warning


@pytest.mark.parametrize(
    "settings",
    [
        {"max_cost": 1.0},
        {"rubric": "  "},
        {"max_unreadable": 1.0},
    ],
)
def test_settings_that_do_not_fit(refused: Refused, fake: FakeChat, settings: dict[str, Any]) -> None:
    refused(lambda: EndpointJudge(**endpoint(fake), **settings))


def test_what_verdicts_depend_on(fake: FakeChat) -> None:
    base = EndpointJudge(**endpoint(fake)).identity()
    assert base == EndpointJudge(**endpoint(fake, concurrency=7, timeout=3), max_unreadable=0.5).identity()
    others = [
        EndpointJudge(**endpoint(fake), rubric="Short."), EndpointJudge(**endpoint(fake), max_tokens=9),
        EndpointJudge(**endpoint(fake), temperature=0.5), EndpointJudge(**endpoint(fake), seed=2),
        EndpointJudge(**endpoint(fake, model="other")),
    ]  # fmt: skip
    assert all(entry.identity() != base for entry in others)
