"""Episodes in files: what was written is read back, and a bad line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.data.rows import assistant, user
from align.environments.episode import CallRecord, Episode, PolicyTurn, failed_episode
from align.environments.rehearsal import Replayed, StoredEpisode, read_episodes, write_episodes
from align.errors import UserError


def test_episodes_come_back_whatever_a_model_says(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line of a text, but none of JSON."""
    said = "one\u2028two\x85three\u2029four\x1cfive\r\nsix"
    stored = [
        StoredEpisode({"prompt": [user("q")]}, seed, Episode([1], messages=[user("q"), assistant(said)], score=0.5))
        for seed in (1, 2)
    ]
    write_episodes(tmp_path / "episodes.jsonl", stored)
    assert read_episodes(tmp_path / "episodes.jsonl") == stored


def test_a_line_that_is_no_episode_is_named(tmp_path: Path) -> None:
    write_episodes(tmp_path / "episodes.jsonl", [StoredEpisode({}, 1, Episode([1]))])
    with (tmp_path / "episodes.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(UserError, match=r"episodes\.jsonl:2: no episode"):
        read_episodes(tmp_path / "episodes.jsonl")


def test_first_difference_of_replayed_episode_is_stated() -> None:
    def episode(token: int = 5, tool: str = "add", score: float = 1.0) -> Episode:
        call = CallRecord(0, tool, {}, "3", "", seconds=0.5)
        return Episode([1], [PolicyTurn([token], [-1.0], True, "ok")], calls=[call], score=score)

    assert Replayed(episode(), episode()).difference == ""
    assert Replayed(episode(), episode(token=6, tool="sub", score=0.0)).difference == "what the environment answers"
    assert Replayed(episode(), episode(tool="sub", score=0.0)).difference == "how calls are read"
    assert Replayed(episode(), episode(score=0.0)).difference == "the score"
    # Both scores are NaN, which differs from itself.
    failed = failed_episode([1], 7, "reset: no such table")
    assert Replayed(failed, failed_episode([1], 7, "reset: no such table")).difference == ""
    assert Replayed(failed, Episode([1], failed.turns, score=1.0)).difference == "the score"
