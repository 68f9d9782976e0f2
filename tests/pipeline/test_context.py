"""Events that a stage writes through its context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.config.runtime import Runtime
from align.pipeline.context import PROGRESS_SECONDS, StageContext


def test_warnings_and_notes_are_stored_without_passwords(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    context = StageContext("sft", None, {}, 1, Runtime(), tmp_path, tmp_path / "checkpoints", path)
    context.warn("https://alice:hunter22@mlflow.example.com does not answer")
    context.note("reading https://alice:hunter22@mlflow.example.com")
    assert [json.loads(line)["message"] for line in path.read_text().splitlines()] == [
        "https://***@mlflow.example.com does not answer", "reading https://***@mlflow.example.com",
    ]  # fmt: skip


def test_of_fast_counts_few_are_kept_and_the_last_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("align.pipeline.context.time.monotonic", lambda: clock[0])
    path = tmp_path / "events.jsonl"
    context = StageContext("sample", None, {}, 1, Runtime(), tmp_path, tmp_path / "checkpoints", path)
    for done in range(1, 101):
        context.progress(done, 100, unit="responses")
        context.progress(done, 100, unit="answers read")
        context.progress(done, 100, loss=1.0)
        clock[0] += PROGRESS_SECONDS / 9.5
    kept: dict[str, list[int]] = {"responses": [], "answers read": [], "steps": []}
    for line in path.read_text().splitlines():
        event = json.loads(line)
        kept[event["unit"]].append(event["done"])
    assert kept["responses"] == kept["answers read"] == [*range(1, 101, 10), 100]
    assert kept["steps"] == list(range(1, 101))
