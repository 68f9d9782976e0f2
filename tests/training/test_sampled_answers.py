"""Answers that a student samples: only the first process writes them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from align.training import sampled_answers
from align.training.sampled_answers import AnswerRecorder


@pytest.mark.parametrize(("rank", "writes"), [(0, [["a", "b"]]), (1, []), (3, [])])
def test_first_process_writes_the_answers_of_all(
    rank: int, writes: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    recorder = AnswerRecorder.__new__(AnswerRecorder)
    recorder.config = SimpleNamespace(keep=1.0)
    recorder.files = SimpleNamespace(rewind=lambda step: None, write=written.append)  # type: ignore[assignment]
    recorder._has_started = False
    line = {"tokens": 1, "prompt_id": "p"}
    monkeypatch.setattr(recorder, "_line", lambda number, prompt, answer: {**line, "response": answer})
    monkeypatch.setattr(sampled_answers, "rank", lambda: rank)
    # The other process has sampled "b".
    monkeypatch.setattr(sampled_answers, "all_gather", lambda mine: [mine, [{**line, "response": "b"}]])
    recorder.write(0, [0], [[1]], ["a"])  # type: ignore[list-item]
    assert [table["response"].to_pylist() for table in written] == writes
