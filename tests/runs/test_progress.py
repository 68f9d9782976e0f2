"""Progress of a running stage: read as its file grows, of its present attempt only."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from align.runs import progress
from align.runs.progress import ProgressReader, progress_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stage's folder whose attempt started 100 seconds after the epoch."""
    (tmp_path / "work.json").write_text("{}")
    os.utime(tmp_path / "work.json", (100, 100))
    return tmp_path


def write(folder: Path, *events: dict[str, Any], end: str = "\n") -> None:
    with (folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n".join(json.dumps(event) for event in events) + end)


def step(done: float, at: float, total: float = 10) -> dict[str, Any]:
    return {"event": "progress", "time": at, "done": done, "total": total, "unit": "steps", "loss": 0.5}


def test_progress_has_share_and_time_left(folder: Path) -> None:
    reader = ProgressReader(folder)
    assert progress_json(reader.read()) is None
    write(folder, {"event": "phase", "time": 101.0, "text": "loading the model"})
    shown = progress_json(reader.read())
    assert shown is not None and shown["phase"] == "loading the model" and shown["share"] is None
    write(folder, step(2, 110.0), step(4, 120.0))
    shown = progress_json(reader.read())
    # Two steps in ten seconds, six steps are left.
    assert shown is not None and (shown["share"], shown["seconds_left"], shown["phase"]) == (0.4, 30.0, "")
    assert shown["text"] == "4/10 steps · 30s left · 12 steps/min · loss 0.5"


def test_silence_counts_from_the_last_event(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ProgressReader(folder)
    write(folder, step(2, 110.0), {"event": "phase", "time": 170.0, "text": "scoring"})
    reader.read()
    silences = []
    for now in (200.0, 290.0, 349.0, 351.0):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        silences.append(progress_json(reader.stage)["silence"])  # type: ignore[index]
    assert silences == ["", "silent for 2m 00s", "silent for 2m 00s", "silent for 3m 00s"]


def test_half_written_lines_come_with_the_next_read(folder: Path) -> None:
    reader = ProgressReader(folder)
    write(folder, step(1, 110.0))
    text = json.dumps(step(2, 120.0))
    with (folder / "events.jsonl").open("a") as file:
        file.write(text[:20])
        file.flush()
        assert progress_json(reader.read())["share"] == 0.1  # type: ignore[index]
        file.write(text[20:] + "\n")
    assert progress_json(reader.read())["share"] == 0.2  # type: ignore[index]


def test_earlier_attempts_do_not_count(folder: Path) -> None:
    write(folder, step(1, 10.0), step(2, 20.0))
    reader = ProgressReader(folder)
    assert reader.read() is None
    write(folder, step(3, 110.0), step(4, 112.0))
    assert progress_json(reader.read())["seconds_left"] == 12.0  # type: ignore[index]
    os.utime(folder / "work.json", (200, 200))
    assert reader.read() is None, "a new attempt starts over"


def test_only_the_end_of_a_large_file_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, *(step(done, 100.0 + done, 5000) for done in range(1, 5000)))
    monkeypatch.setattr(progress, "MAX_BYTES", 20_000)
    reader = ProgressReader(folder)
    started = time.perf_counter()
    shown = progress_json(reader.read())
    assert time.perf_counter() - started < 1
    assert shown is not None and shown["seconds_left"] == pytest.approx(1.0)
    assert reader.stage is not None and reader.stage.pace.first is not None
    assert reader.stage.pace.first["done"] > 4700
