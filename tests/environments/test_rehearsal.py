"""Episodes in files: what was written is read back, and a bad line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.data.rows import assistant, user
from align.environments.episode import Episode
from align.environments.rehearsal import StoredEpisode, read_episodes, write_episodes
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
