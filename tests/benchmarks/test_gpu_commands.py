"""Processes of the evidence for a GPU: their ends, their results, and the table that is made of them."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_commands
from benchmarks.gpu_commands import OutOfTime, Place, last_document, last_json, read_report, run_command, run_stage_item
from benchmarks.gpu_items import Item, Machine
from benchmarks.gpu_results import Results
from benchmarks.gpu_run import StageItem, speed, weights_digest
from benchmarks.gpu_table import make_table
from tests.support.refusals import Refused
from tests.support.runs import wait_for

ITEM = StageItem("qwen2.5-0.5b", "sft", "full", "cpu", tiny=True, length=64, rows=8)
STOPS = """
import signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)", *sys.argv[1:]])
"""


def test_a_command_beyond_its_time_ends_with_its_children(tmp_path: Path) -> None:
    marker = f"of-{tmp_path.name}"
    with pytest.raises(OutOfTime):
        run_command([sys.executable, "-c", PARENT, marker], tmp_path / "log", 2.0)
    wait_for(lambda: not _running(marker))


def _running(marker: str) -> list[bytes]:
    """Return the command lines that have the marker; a killed process has none."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            lines.append(path.read_bytes())
    return [line for line in lines if marker.encode() in line]


@pytest.mark.parametrize("end", ["", "resource_tracker: 1 leaked semaphore\n", "{'a': 1}\n{\nno JSON\n"])
def test_a_run_s_document_is_read_among_what_libraries_print(end: str, tmp_path: Path) -> None:
    document = {"name": "smoke", "stages": {"sft": {"seconds": 1.5}}}
    log = tmp_path / "log"
    log.write_text('{"rank": 0}\n' + json.dumps(document, indent=2) + "\n" + end)
    assert last_document(log) == document


def test_an_output_without_a_document_has_none(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("{\nno JSON\n")
    assert last_document(tmp_path / "log") is None


def test_a_command_with_grace_is_asked_to_stop_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    wait = gpu_commands._wait
    monkeypatch.setattr(
        gpu_commands, "_wait", lambda process, seconds: waited.append((wait(process, seconds), process))
    )
    with pytest.raises(OutOfTime):
        run_command([sys.executable, "-c", STOPS], tmp_path / "log", 30.0, grace=27.0)
    assert waited[0][1].returncode == 75


def test_a_command_gets_the_environment_of_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONFAULTHANDLER", raising=False)
    script = "import json, os; print('noise'); print(json.dumps(dict(os.environ)))"
    assert run_command([sys.executable, "-c", script], tmp_path / "log", 30, {"ADDED": "yes"}) == 0
    environment = json.loads(last_json(tmp_path / "log"))
    assert (environment["ADDED"], environment["PYTHONFAULTHANDLER"]) == ("yes", "1")


@pytest.mark.parametrize(
    ("deterministic", "digests", "expected"),
    [
        (True, "aa", {"equal": True}),
        (True, "ab", {"equal": False, "failed": "two runs"}),
        (False, "ab", {"equal": False}),
    ],
)
def test_two_runs_are_compared_by_what_they_saved(
    deterministic: bool, digests: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(digests)

    def fake(command: list[str], log: Path, seconds: float) -> int:
        log.write_text("Loading weights\n" + json.dumps({"tokens_per_second": 5.0, "sha256": left.pop(0)}) + "\n")
        return 0

    monkeypatch.setattr(gpu_commands, "run_command", fake)
    stage = StageItem(**{**vars(ITEM), "deterministic": deterministic})
    result = run_stage_item(Item("twice", stage, runs=2), Place(Machine("cpu", True), tmp_path), 100)
    assert (result["equal"], result["sha256"]) == (expected["equal"], list(digests))
    assert result.get("failed", "").startswith(expected.get("failed", ""))
    assert ("failed" in result) == ("failed" in expected)


def test_a_stage_that_fails_is_told_by_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], log: Path, seconds: float) -> int:
        log.write_text("Traceback\ntorch.OutOfMemoryError: CUDA out of memory\n\n")
        return 1

    monkeypatch.setattr(gpu_commands, "run_command", fail)
    result = run_stage_item(Item("large", ITEM), Place(Machine("cpu", True), tmp_path), 100)
    assert result == {"failed": "torch.OutOfMemoryError: CUDA out of memory"}


def test_a_report_of_pytest_is_counted(tmp_path: Path) -> None:
    report = tmp_path / "test.xml"
    report.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><skipped message='no bitsandbytes'/></testcase>"
        "<testcase name='c[sft]'><failure message='assert 1 == 2'/></testcase></testsuite></testsuites>"
    )
    assert read_report(report) == {
        "passed": 1, "skipped_tests": 1, "reason": "no bitsandbytes", "failed": "c[sft]: assert 1 == 2",
    }  # fmt: skip


def test_speed_leaves_out_the_first_two_steps(refused: Refused) -> None:
    events = [{"event": "note"}] + [
        {"event": "progress", "done": step, "time": moment, "tokens": 100 * step}
        for step, moment in ((1, 50.0), (2, 60.0), (3, 61.0), (4, 62.0))
    ]
    assert speed(events) == (1.0, 100.0)
    refused(lambda: speed(events[:3]))


def test_the_digest_covers_names_and_bytes_of_all_weights(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.safetensors").write_bytes(b"1")
    before = weights_digest(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert weights_digest(tmp_path) == before
    (tmp_path / "model" / "a.safetensors").write_bytes(b"2")
    assert weights_digest(tmp_path) != before


def test_the_table_has_a_section_for_each_part_with_results(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.machine = {"card": "H100", "memory": 80 * 2**30, "matrix_rate": 8e14, "python": "3.12.3",
                       "versions": {"torch": "2.11.0"}, "commit": "0123456789abcdef", "tiny": False}  # fmt: skip
    timing = {"seconds": 12.0}
    numbers = {"tokens_per_second": 1234.5, "share": 0.25, "peak": 2**30, "reserved": 2**31, "plan": 2**29,
               "micro_batch": 4, "repeated_steps": 1,
               "engine": "vllm", "sampling_share": 0.5, "sha256": "ab"} | timing  # fmt: skip
    results.put("training", "qwen2.5-0.5b ppo lora vllm", numbers)
    results.put("training", "qwen2.5-1.5b ppo full", {"failed": "out of memory"} | timing)
    results.put("plan", "sft full", numbers | {"plan": int(1.1 * 2**30)})
    results.put("determinism", "sft full", numbers | {"equal": False, "failed": "differ", "sha256": ["ab", "cd"]})
    results.put(
        "tests", "tests/gpu/test_one_card.py::test_x", {"passed": 3, "skipped_tests": 1, "reason": "none"} | timing
    )
    scores = {"metric": "gold", "scores": {"sft": [0.25, 0.2, 0.3]}, "stages": {"sft": 30.0}, "total": 30.0}
    results.put("quickstart", "quickstart", scores | {"engine": "transformers"} | timing)
    text = make_table(results.parts)
    for line in (
        "H100, 80.0 GiB, 800 TFLOP/s in a bf16 product; Python 3.12.3, torch 2.11.0; commit 0123456789.",
        "| qwen2.5-0.5b ppo lora vllm | 1,234 | 25% | 50% | 1.00 | 2.00 | 0.50 | -50% | 4 | 1 | 12 |",
        "- `qwen2.5-1.5b ppo full` failed: out of memory",
        "| sft full | 1.10 | 1.00 | +10% | 2.00 |",
        "1 of 1 are within 15%.",
        "| sft full | **differ** | 1,234 | `ab`, `cd` |",
        "| `test_x` | 3 | 1 | 12 | none |",
        "30 s in all; PPO sampled with transformers.",
        "| sft | 0.250 | 0.200 | 0.300 |",
    ):
        assert line in text.splitlines()


def test_figures_are_listed_by_card_and_commit(tmp_path: Path) -> None:
    numbers = {"tokens_per_second": 1.0, "share": None, "sampling_share": None, "peak": 2**30, "reserved": 2**30,
               "plan": 2**30, "seconds": 1.0, "micro_batch": 4, "repeated_steps": 0}  # fmt: skip
    machine = {"memory": None, "python": "3.12.3", "versions": {"torch": "2.11.0"}, "tiny": False}
    folders = []
    # The second command measures another matrix rate of the same card.
    for card, commit, rate in (("H100", "aaaa", 7e14), ("H100", "aaaa", 7.1e14), ("H200", "bbbb", 7e14)):
        results = Results(tmp_path / str(len(folders)), folders)
        results.machine = machine | {"card": card, "commit": commit, "matrix_rate": rate}
        results.put("training", f"item {len(folders)}", numbers)
        folders.append(results.folder)
    lines = make_table(results.parts).splitlines()
    shown = [re.split(r",| \| ", line)[0] for line in lines if line.startswith(("H", "| item "))]
    assert shown == ["H100", "| item 0", "| item 1", "H200", "| item 2"]
    assert [line.rpartition("commit ")[2] for line in lines if line.startswith("H")] == ["aaaa.", "bbbb."]


def test_results_of_a_file_with_one_machine_are_that_machine_s(tmp_path: Path) -> None:
    content = {"machine": {"card": "H100"}, "items": {"item": {"failed": "x", "seconds": 1.0}}, "listed": []}
    (tmp_path / "training.json").write_text(json.dumps(content))
    assert Results(tmp_path).parts["training"]["items"]["item"]["machine"] == {"card": "H100"}
