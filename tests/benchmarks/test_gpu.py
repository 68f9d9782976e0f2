"""The benchmark of one card: it skips where there is none, and its lines really run on a processor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu

REPOSITORY = Path(__file__).parents[2]


def test_without_a_card_it_says_so_and_does_nothing(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(gpu, "run_line", lambda *_: pytest.fail("a line was run"))
    assert gpu.main() == 0
    assert "sees no CUDA device. `--device cpu --model tiny`" in capsys.readouterr().out


def test_a_line_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fake(line: str, device: str, model: str, seconds: float):
        if line == "dpo lora":
            return {"work": line, "failed": "out of memory"}
        return {"work": line, "tokens_per_second": 1234.5, "share": 0.25, "peak": 2**30, "plan": 2**29, "seconds": 3.0}

    monkeypatch.setattr(gpu, "run_line", fake)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--model", "tiny"])
    monkeypatch.setattr("benchmarks.gpu_run.describe", lambda device: "a card")
    assert gpu.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a card, tiny" and len(lines) == 2 + len(gpu.LINES)
    assert lines[2].split() == ["sft", "lora", "1,234", "25%", "1.00", "0.50", "-50%", "3"]
    assert next(line for line in lines if "dpo" in line).endswith("out of memory")


def test_a_line_beyond_the_limit_is_stopped() -> None:
    assert "stopped" in gpu.run_line("sft lora", "cpu", "tiny", 0.0)["failed"]


@pytest.mark.slow
def test_every_line_runs_on_a_processor(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--model", "tiny", "--limit", "3000", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout + done.stderr
    actual = {entry["work"]: entry for entry in json.loads((tmp_path / "found.json").read_text())}
    assert list(actual) == list(gpu.LINES)
    assert all(entry["tokens_per_second"] > 0 for entry in actual.values())
    assert all(0 < entry["share"] < 1 and entry["plan"] > 0 for name, entry in actual.items() if name != "rollouts")
