"""Events that a stage writes through its context."""

from __future__ import annotations

import json
from pathlib import Path

from align.config.runtime import Runtime
from align.pipeline.context import StageContext


def test_no_stored_warning_or_note_has_the_password_of_an_address(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    context = StageContext("sft", None, {}, 1, Runtime(), tmp_path, tmp_path / "checkpoints", path)
    context.warn("https://alice:hunter22@mlflow.example.com does not answer")
    context.note("reading https://alice:hunter22@mlflow.example.com")
    assert [json.loads(line)["message"] for line in path.read_text().splitlines()] == [
        "https://***@mlflow.example.com does not answer", "reading https://***@mlflow.example.com",
    ]  # fmt: skip
