"""A checkpoint as a judge of responses: prompts, thoughts, caches, and settings that it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.config.scores import RewardEntry
from align.config.validation import validate
from align.data.rows import user
from align.inference.protocol import Response
from align.judges.checkpoint import CheckpointJudge
from align.judges.client import JudgmentCaches
from align.models.built_in import make_tiny_tokenizer
from align.scoring.score import open_entry
from align.store.artifacts import Artifact, Kind
from tests.support.refusals import Refused

ROWS: list[Any] = [{"id": str(number), "prompt": [user(f"Question {number}")]} for number in range(3)]
TEXTS = ["alpha", "bravo", "charlie"]
SETTINGS = {"model": "judge", "max_tokens": 16}


class ScriptedEngine:
    """An engine that answers a prompt by its text, as an engine does: in tokens."""

    def __init__(self, replies: dict[str, str]) -> None:
        self.replies, self.tokenizer = replies, make_tiny_tokenizer()
        self.asked: list[int] = []
        self.is_closed = False

    def sample(self, requests: list[Any], temperature: float, top_p: float) -> list[Response]:
        self.asked.append(len(requests))
        responses = []
        for request in requests:
            shown = self.tokenizer.decode(request.prompt)
            text = next(reply for word, reply in self.replies.items() if word in shown)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            responses.append(Response(ids, [0.0] * len(ids), len(ids) <= request.max_tokens, text))
        return responses

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def make_judge(tmp_path: Path, tiny_model: Path) -> Any:
    """Returns a judge on the tiny model's tokenizer, with an engine that answers by rule."""
    (tmp_path / "model").symlink_to(tiny_model)
    artifact = Artifact("judge", Kind.POLICY, tmp_path, {"key": "k", "weights": "w"})

    def make(replies: dict[str, str], folder: str = "cache", **fields: Any) -> Any:
        entry = validate(RewardEntry, {"judge": SETTINGS} | fields, "p.yaml: score[0]")
        backend = CheckpointJudge(artifact, SimpleNamespace(), "float32", "score[0]")  # type: ignore[arg-type]
        engine = ScriptedEngine(replies)
        backend._open = lambda: engine
        caches = JudgmentCaches(tmp_path / folder, None, print)
        return open_entry(entry, "score[0]", caches, checkpoint=backend), engine

    return make


def test_checkpoint_grades_after_its_thoughts(make_judge: Any) -> None:
    replies = {"alpha": "<think>[[1]]</think>[[10]]", "bravo": "[[1]]", "charlie": "<think>[[10]]"}
    scorer, engine = make_judge(replies)
    scorer.check()  # loads no weights
    assert engine.asked == []
    scored = scorer.score(ROWS, TEXTS)
    # The thought that never ends has no grade.
    assert (scored.total, scored.metrics) == ([1.0, 0.0, 0.0], {"unreadable": [0.0, 0.0, 1.0]})
    assert not scorer.waits and scorer.facts()["judges"]["requests"] == 3
    again, other = make_judge(replies)
    assert again.score(ROWS, TEXTS).total == [1.0, 0.0, 0.0] and other.asked == []
    scorer.close()
    assert engine.is_closed


def test_checkpoint_decides_on_criteria(make_judge: Any) -> None:
    reply = '{"criterion_1": {"reason": "r", "satisfied": "yes"}}'
    scorer, engine = make_judge({"Question": reply}, criteria=["It is short"], judge=SETTINGS | {"max_tokens": 60})
    scorer.check()
    scored = scorer.score(ROWS, TEXTS)
    assert (scored.total, scored.reasons[0][0]["reason"]) == ([1.0] * 3, "r")
    assert engine.asked == [3] and not scorer.is_structured


def test_prompt_that_is_too_long_is_unreadable(make_judge: Any) -> None:
    scorer, engine = make_judge({"Question": "[[10]]"})
    scorer.judge.backend._positions = 40
    assert scorer.score(ROWS, TEXTS).metrics["unreadable"] == [1.0] * 3
    assert engine.asked == []


def test_judge_is_an_endpoint_or_a_checkpoint(refused: Refused) -> None:
    endpoint = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    refused(validate, RewardEntry, {"judge": {"endpoint": endpoint, "model": "judge"}}, "p.yaml: score[0]")
    refused(validate, RewardEntry, {"judge": {"max_tokens": 3}}, "p.yaml: score[0]")
