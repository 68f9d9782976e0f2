"""Verifiers and judges that fail in the middle of RL: a clear message, no lost update, and an exact resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from align.errors import UserError
from align.inference import endpoint_client
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.stages import rl as stage
from align.stages.update_reports import ReportUpdates
from align.verifiers.sandbox import isolation
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.refusals import Refused
from tests.support.stages.rollout_contexts import context_maker
from tests.support.stored_rollouts import stored_rows
from tests.support.training.harness import events

LORA = {"method": "lora", "rank": 4, "alpha": 8}
SLOW_PATTERN = r"(?s)\A(?:.?){60}(?!)"
"""A pattern whose search takes minutes in a text of four characters or more."""
Maker = Callable[..., StageContext]


@pytest.fixture
def make_context(tmp_path: Path, tiny_model: Path, tiny_reward: Path) -> Maker:
    return context_maker(tmp_path, tiny_model, tiny_reward)


def run(context: StageContext) -> dict[str, Any]:
    metrics: dict[str, Any] = STAGES[context.name].runner()(context)
    return metrics


def call_before_learning(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Call ``action`` when the first rollout is scored and no other has begun."""

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            action()

    monkeypatch.setattr(ReportUpdates, "on_step_begin", on_step_begin)


def assert_equal_results(first: StageContext, second: StageContext, names: tuple[str, ...] = ()) -> None:
    """Assert that two attempts have the same weights, and each update once with the same scores.

    ``names`` are the metrics to compare; by default all scores and their reasons, and the KL.
    """
    weights = [load_file(context.output / "model" / "model.safetensors") for context in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    points = [[point for point in events(context, "metrics") if "score" in point] for context in (first, second)]
    assert [point["step"] for point in points[1]] == [1, 2]
    compared = names or tuple(name for name in points[0][0] if name.startswith(("score", "kl")))
    for ours, theirs in zip(*points, strict=True):
        assert {name: ours[name] for name in compared} == {name: theirs[name] for name in compared}


# ---- the sandbox ----


@pytest.fixture
def container(tmp_path: Path) -> tuple[list[str], Path]:
    """A command that isolates nothing, and the file whose presence makes it fail as a client without a daemon does."""
    down = tmp_path / "down"
    script = tmp_path / "container"
    script.write_text(
        f'#!/bin/sh\n[ -e {down} ] && echo "Cannot connect to the container daemon." >&2 && exit 1\nexec "$@"\n'
    )
    script.chmod(0o755)
    return [str(script)], down


def test_missing_sandbox_ends_the_stage_before_the_engine(
    refused: Refused, make_context: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "_problem", lambda level, command: f"{level} is missing.")
    monkeypatch.setattr(stage, "open_engine", lambda *args, **kwargs: pytest.fail("the engine was started"))
    context = make_context("grpo", "refused", score=[{"code": "tests"}])
    refused(run, context)
    assert not list(context.checkpoints.iterdir()) and not (context.output / "model").exists()


def test_sandbox_that_fails_later_loses_no_update(
    refused: Refused, make_context: Maker, container: tuple[list[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, down = container
    score = [{"code": "tests", "sandbox": {"command": command}}, {"function": "tests.support.rewards:vowels"}]
    whole = make_context("ppo", "whole", score=score, tuning=LORA)
    failed = make_context("ppo", "failed", score=score, tuning=LORA)
    expected = run(whole)
    assert expected["sandboxes"] == {"code": "command"}
    with monkeypatch.context() as patch:
        call_before_learning(patch, down.touch)
        refused(run, failed)
    assert (failed.checkpoints / "checkpoint-1").is_dir() and not (failed.output / "model").exists()
    with pytest.raises(UserError, match=r"score\[0\].sandbox.command: .* did not work"):
        isolation._problem.cache_clear()  # another process asks again
        run(failed)
    down.unlink()
    isolation._problem.cache_clear()
    resumed = run(failed)
    assert resumed["episodes"] == expected["episodes"]
    assert_equal_results(whole, failed)


# ---- worker processes ----


def test_hanging_verifier_is_counted_and_resumes_exactly(make_context: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    score = [{"regex": SLOW_PATTERN, "seconds": 0.2}, {"function": "tests.support.rewards:vowels"}]
    whole = make_context("grpo", "whole", score=score, tuning=LORA, rollout_batch=8)
    killed = make_context("grpo", "killed", score=score, tuning=LORA, rollout_batch=8)
    metrics = run(whole)
    points = [point for point in events(whole, "metrics") if "score" in point]
    assert all(point["score_regex_timed_out"] > 0 for point in points) and metrics["episodes"] == 16
    row = stored_rows(whole.output / "rollouts")[0]
    assert row["scores"]["regex"] == 0.0 and "regex_timed_out" in row["scores"]

    class Killed(BaseException):
        pass

    def kill(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ReportUpdates, "on_step_begin", kill)
        with pytest.raises(Killed):
            run(killed)
    run(killed)
    # On a busy machine an easy comparison may also reach the limit, so the share of each reason may differ.
    assert_equal_results(whole, killed, ("score", "score_regex", "score_vowels", "kl"))


def test_verifier_whose_processes_die_changes_no_score(make_context: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    score = [{"regex": "[aeiou]"}]
    whole = make_context("grpo", "whole", score=score, tuning=LORA)
    damaged = make_context("grpo", "damaged", score=score, tuning=LORA)
    run(whole)
    killed = []

    def kill_workers() -> None:
        for child in psutil.Process().children():
            if "align.verifiers.workers" in child.cmdline():
                child.kill()
                killed.append(child.pid)

    with monkeypatch.context() as patch:
        call_before_learning(patch, kill_workers)
        run(damaged)
    assert killed
    assert all(point["score_regex_crashed"] == 0 for point in events(damaged, "metrics") if "score" in point)
    assert_equal_results(whole, damaged)


# ---- a judge ----


@pytest.fixture
def judge_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeChat]:
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.01)
    fake = FakeChat(lambda body: completion(f"[[{1 + len(body['messages'][-1]['content']) % 10}]]"))
    yield fake
    fake.stop()


def test_judge_that_dies_loses_no_update_and_no_grade(
    refused: Refused, make_context: Maker, judge_server: FakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = {"url": judge_server.url, "model": "good-model", "retries": 1}
    score = [{"judge": {"endpoint": endpoint}}]
    whole = make_context("grpo", "whole", score=score, tuning=LORA)
    failed = make_context("grpo", "failed", score=score, tuning=LORA)
    expected = run(whole)
    requests = len(judge_server.bodies)
    answer = judge_server.reply

    def die() -> None:
        judge_server.reply = judge_server.refuse

    with monkeypatch.context() as patch:
        call_before_learning(patch, die)
        refused(run, failed)
    assert (failed.checkpoints / "checkpoint-1").is_dir() and not (failed.output / "model").exists()
    judge_server.reply = answer
    before = len(judge_server.bodies)
    resumed = run(failed)
    # The first update's grades are not asked for again: only the second update's are, and a word at the start.
    assert len(judge_server.bodies) - before < requests
    assert resumed["score_last"] == expected["score_last"]
    assert_equal_results(whole, failed)
