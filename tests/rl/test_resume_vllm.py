"""A run with vLLM that is killed asks for the responses that the uninterrupted one does, and comes to its numbers."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.fork_server import start_module

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

TOLERANCE = {"rel": 1e-5, "abs": 1e-6}
"""Stated in docs/ppo.md, for float32."""
NEW_UPDATES = {"syncing": 1, "sampling": 1, "learning": 4}
"""How many of each make an update."""


def live(tiny_model: Path, tiny_reward: Path, folder: Path, updates: int, points: list[str]) -> tuple[Path, Path]:
    """Folders of the uninterrupted run and of the one with a life for each point."""
    uninterrupted, killed = folder / "whole", folder / "killed"
    plan = json.dumps([[str(uninterrupted), updates, []], [str(killed), updates, points]])
    log = folder / "log.txt"
    process = start_module(
        "tests.support.rl.vllm_killed_run", [str(tiny_model), str(tiny_reward), plan], log, vllm=True
    )
    assert process.wait() == 0, log.read_text()[-4000:]
    return uninterrupted, killed


def assert_the_same(uninterrupted: Path, killed: Path) -> None:
    request, expected = ((first / "asked.jsonl").read_text().splitlines() for first in (killed, uninterrupted))
    assert list(dict.fromkeys(request)) == list(dict.fromkeys(expected))  # prompts and seeds; some of them again
    actual, known = (json.loads((first / "done.json").read_text()) for first in (killed, uninterrupted))
    assert len(actual["history"]) == len(known["history"])
    for entry, second in zip(actual["history"], known["history"], strict=True):
        assert entry == pytest.approx(second, **TOLERANCE)
    assert actual["best"] == pytest.approx(known["best"], **TOLERANCE)
    weights, others = (load_file(first / "weights.safetensors") for first in (killed, uninterrupted))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=TOLERANCE["rel"], atol=TOLERANCE["abs"])


def test_two_kills_change_nothing(tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> None:
    """In the middle of the third rollout; then, after that rollout, in the middle of learning from the next."""
    uninterrupted, killed = live(tiny_model, tiny_reward, tmp_path, 5, ["sampling:3", "learning:7"])
    assert_the_same(uninterrupted, killed)
    calls = [len((entry / "asked.jsonl").read_text().splitlines()) for entry in (uninterrupted, killed)]
    assert calls[1] == calls[0] + 2  # one rollout for each kill was sampled anew


@pytest.mark.slow
def test_twelve_kills_change_nothing(tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> None:
    rng, points = random.Random(7), []
    for place in [*NEW_UPDATES] * 4:
        points.append(f"{place}:{rng.randint(1, 3 * NEW_UPDATES[place])}")
    rng.shuffle(points)
    assert_the_same(*live(tiny_model, tiny_reward, tmp_path, 30, points))
