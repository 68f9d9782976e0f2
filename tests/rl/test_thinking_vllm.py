"""GRPO with vLLM and a budget for thoughts: forced tokens are in the responses, and in no number."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from tests.support.fork_server import start_module
from tests.support.stored_rollouts import stored_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def test_forced_tokens_are_in_no_number(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    process = start_module("tests.support.rl.vllm_thinking_run", [str(tiny_model), str(tmp_path)], log, vllm=True)
    assert process.wait(timeout=240) == 0, log.read_text()[-4000:]
    entries = json.loads((tmp_path / "logs.json").read_text())
    assert len(entries) == 2
    for entry in entries:
        # "\n</think>\n\n" has a byte a token, and follows 6 sampled tokens unless the turn ended before.
        assert entry["forced_tokens"] == 11 * (1 - entry["open_thoughts"]) > 5
        assert entry["length"] == pytest.approx(
            entry["thought_length"] + entry["answer_length"] - 11 * (1 - entry["open_thoughts"])
        )
        assert entry["parity_gap_max"] < 1e-3
    # Before the first step the policy is the reference; afterwards it has moved.
    assert entries[0]["kl"] == 0 and entries[1]["kl"] != 0
    rows = stored_rows(tmp_path / "run" / "rollouts")
    assert rows and all(row["thought_tokens"] >= 6 for row in rows if not row["open_thought"])
