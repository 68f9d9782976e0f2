"""A real vLLM server as judge, over HTTP: one that babbles, and one that is held to the form of a verdict."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.inference.requests import RequestCache
from tests.support.evaluation.judged_harness import FolderContext, answers_of, constant, make_task
from tests.support.inference.vllm_server import vllm_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def judge(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The two-layer model behind vLLM's OpenAI-compatible server."""
    with vllm_server(tiny_model, tmp_path_factory.mktemp("server")) as url:
        yield {"url": url, "model": "tiny", "retries": 1, "timeout": 120}


def test_a_judge_that_babbles_is_an_error_with_counts(judge: dict[str, Any], tmp_path: Path) -> None:
    task = make_task(tmp_path, 20, judge={"endpoint": judge, "max_tokens": 16})
    bench = FolderContext(tmp_path)
    with pytest.raises(UserError, match=r"the judge tiny at .* in 16 of 16 judgments .*\(40 wanted") as caught:
        task.score(answers_of(task, constant("sft", "Yes."), constant("ppo", "No.")), bench)
    assert "cut off at judge.max_tokens" in str(caught.value)
    assert len(RequestCache(tmp_path / "judgments")) == 16
    assert bench.warnings == []


def test_a_judge_that_is_held_to_the_form_judges(judge: dict[str, Any], tmp_path: Path) -> None:
    form = {"structured_outputs": {"choice": ["[[A]]", "[[B]]", "[[C]]"]}}
    task = make_task(tmp_path, 12, judge={"endpoint": {**judge, "extra": form}, "max_tokens": 16})
    texts = [f"Answer {number}: {'x' * number}" for number in range(12)]
    (measured,) = task.score(
        answers_of(task, constant("sft", "Yes."), constant("ppo", *texts)), FolderContext(tmp_path)
    ).values()
    (row,) = task.extras()["win_rates"]
    message = measured.notes["verdicts"]
    assert row["n"] == 12 and message["unreadable"] == 0
    assert message["first"] + message["second"] + message["tie"] == 24
    assert row["wins"] + row["losses"] + row["ties"] + row["disagreements"] == 12
    assert task.usage["requests"] == 24 and task.usage["completion_tokens"] > 0
