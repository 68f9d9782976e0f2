"""The task ``environment``: its settings, its rows, what counts as a success, and pass@k against sums by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from align.config.stages.evaluation.tasks import EnvironmentTaskConfig
from align.environments.episode import CallRecord, Episode, PolicyTurn
from align.evaluation.answers import EpisodeSet
from align.evaluation.tasks import build_task, task_identities
from align.evaluation.tasks.environment import EnvironmentTask, pass_at, powers_of_two
from tests.support.evaluation.tasks.respondents import NoModelContext, task_inputs
from tests.support.refusals import Refused

BUTTONS = {"class": "tests.support.environments.buttons:Buttons", "max_tokens": 60}
ROWS = [{"id": "one", "prompt": "go"}, {"id": "two", "prompt": "go on"}]


def write(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Write rows into a file, and return the ``files`` of a task."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["rows.jsonl"]


def make_task(folder: Path, rows: list[dict[str, Any]] | None = None, **fields: Any) -> EnvironmentTask:
    """Build a task on rows in ``folder``."""
    files = write(folder, ROWS if rows is None else rows)
    config = EnvironmentTaskConfig(files=files, **{"environment": BUTTONS} | fields)
    task = build_task("buttons", config, task_inputs(folder))
    assert isinstance(task, EnvironmentTask)
    return task


def play(score: float, turns: int = 1, **fields: Any) -> Episode:
    """Return an episode."""
    turn = PolicyTurn([5, 2], [0.0, 0.0], True, "ok")
    return Episode([1], [turn] * turns, score=score, **fields)


def failed() -> Episode:
    """Return an episode whose environment failed."""
    return play(math.nan, stop="failed", failure="call: it burnt down")


@pytest.mark.parametrize(
    "fields",
    [
        {"rows": None},
        {"files": ["a.jsonl"], "rows": "data"},
        {"columns": {"prompt": "question"}},
        {"samples": 4},
        {"success": ""},
        {"success": "0.5"},
        {"environment": {"max_tokens": 60}},
        {"rows": None, "dataset": "a/b"},
        {"rows": None, "header": ["id"]},
    ],
)
def test_wrong_settings_are_refused(refused: Refused, fields: dict[str, Any]) -> None:
    refused(EnvironmentTaskConfig, **{"rows": "data", "environment": BUTTONS} | fields)


def test_every_set_of_k_samples_counts_once_in_pass_at_k(refused: Refused) -> None:
    for samples in range(1, 7):
        for successes in range(samples + 1):
            outcomes = [True] * successes + [False] * (samples - successes)
            for k in range(1, samples + 1):
                sets = list(itertools.combinations(outcomes, k))
                assert pass_at(k, samples, successes) == pytest.approx(sum(map(any, sets)) / len(sets))
    # 1 - (4/6 * 3/5): neither of two drawn from six, two of which are right
    assert pass_at(2, 6, 2) == pytest.approx(0.6)
    refused(pass_at, 3, 2, 1)


def test_k_is_a_power_of_two_within_the_samples() -> None:
    assert [powers_of_two(samples) for samples in (1, 2, 3, 4, 9)] == [[], [2], [2], [2, 4], [2, 4, 8]]


def test_the_numbers_of_episodes(tmp_path: Path) -> None:
    task = make_task(tmp_path, samples=4, temperature=1.0, success=0.5)
    assert list(task.metrics) == [
        *("success", "pass_at_2", "pass_at_4", "score", "turns", "calls", "tool_errors", "failure_rate"),
    ]
    calls = [CallRecord(0, "a", {}, "A"), CallRecord(1, "", {}, "no such call", "malformed")]
    # One of four rows of parts that sum to 0.5 but for rounding is a success.
    episodes = {
        "sft": [
            [play(0.5 - 1e-12), play(0.4, 3, calls=calls), play(0.0, stop="max_turns"), failed()],
            [play(1.0), play(2.0), play(0.5), play(0.75)],
        ]
    }
    context = NoModelContext()
    measured = task.score_episodes(episodes, context)["sft"]
    assert measured.values["success"] == [[1, 0, 0, 0], [1, 1, 1, 1]]
    # 1 - C(3, 2) / C(4, 2) = 1 - 3/6, and certainly one of four
    assert measured.values["pass_at_2"] == [[0.5], [1.0]]
    assert measured.values["pass_at_4"] == [[1.0], [1.0]]
    assert measured.values["score"] == [[0.5 - 1e-12, 0.4, 0.0], [1.0, 2.0, 0.5, 0.75]]
    assert measured.values["turns"] == [[1, 3, 1, 1], [1, 1, 1, 1]]
    assert measured.values["calls"][0] == [0, 2, 0, 0] and measured.values["tool_errors"][0] == [0, 1, 0, 0]
    assert measured.values["failure_rate"] == [[0, 0, 0, 1], [0, 0, 0, 0]]
    assert measured.notes == {"episodes": 8, "truncated": 0, "max_turns": 1, "failed": 1, "malformed_calls": 1}
    assert context.warnings == [
        "buttons: 1 of 8 episodes of sft failed, and count as no success; the first in call: it burnt down"
    ]


class Playing:
    """A performer whose episodes are given."""

    def __init__(self, *episodes: Episode) -> None:
        self.episodes = episodes
        self.episode_set: EpisodeSet | None = None

    def play(self, episode_set: EpisodeSet) -> list[list[Episode]]:
        self.episode_set = episode_set
        return [[episode] for episode in self.episodes]


def test_a_part_of_the_score_may_decide(tmp_path: Path) -> None:
    task = make_task(tmp_path, success="right")
    performer: Any = Playing(play(9.0, parts={"right": 0.5, "form": 1.0}), play(0.2, parts={"right": 1.0}))
    episodes = {"sft": task.play(performer)}
    assert task.score_episodes(episodes, NoModelContext())["sft"].values["success"] == [[0], [1]]


def test_unknown_success_part_is_refused_after_first_system(refused: Refused, tmp_path: Path) -> None:
    task = make_task(tmp_path, success="rigth")
    performer: Any = Playing(play(1.0, parts={"right": 1.0}), failed())
    refused(task.play, performer)
    performer = Playing(play(1.0), play(2.0))
    refused(task.play, performer)
    performer = Playing(failed(), failed())
    assert task.play(performer)  # nothing was scored, so nothing is known


def test_rows_reach_the_environment_with_messages_and_an_id(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "go", "answer": "3"},
        {"id": 7, "prompt": [{"role": "user", "content": "go"}], "source": "sums"},
        {"id": "7", "level": 2},
    ]
    task = make_task(tmp_path, rows)
    performer: Any = Playing(play(1.0), play(1.0), play(1.0))
    task.play(performer)
    prompt = [{"role": "user", "content": "go"}]
    assert performer.episode_set.rows == [
        {"id": "rows.jsonl:1", "prompt": prompt, "answer": "3", "source": "rows"},
        {"id": "7", "prompt": prompt, "source": "sums"},
        {"id": "7 (2)", "level": 2, "source": "rows"},
    ]
    assert [item.source for item in task.items] == ["rows", "sums", "rows"]
    assert [item.prompt[0]["content"] for item in task.items] == ["go", "go", '{"id": "7 (2)", "level": 2}']


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": 3},
        {"prompt": []},
        {"prompt": [{"role": "user"}]},
        {"prompt": "go", "limit": math.nan},
    ],
)
def test_rows_that_no_environment_could_get_are_refused(refused: Refused, tmp_path: Path, row: dict[str, Any]) -> None:
    refused(make_task, tmp_path, [row])


def test_an_environment_that_cannot_be_opened_is_refused(refused: Refused, tmp_path: Path) -> None:
    refused(make_task, tmp_path, environment=BUTTONS | {"class": "tests.support.environments.buttons:Butons"})


def test_the_code_of_the_environment_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "class Game:\n    def reset(self, row): ...\n    def score(self): return {}\n"
    (tmp_path / "game_of_this_test.py").write_text(code.format(1))

    def identities(**fields: Any) -> dict[str, str]:
        environment = {"class": "game_of_this_test:Game", "max_tokens": 60} | fields
        return task_identities(EnvironmentTaskConfig(files=write(tmp_path, ROWS), environment=environment), tmp_path)

    before = identities()
    assert set(before) == {"rows.jsonl", "environment"}
    assert identities(workers=2) == before
    assert identities(max_turns=2) != before
    (tmp_path / "game_of_this_test.py").write_text(code.format(2))
    assert identities()["environment"] != before["environment"]
