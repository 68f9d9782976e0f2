"""The driver of the evidence for a GPU: what it keeps, leaves out, stops and says; one real stage on a processor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_evidence
from benchmarks.gpu_commands import OutOfTime, Place
from benchmarks.gpu_items import Item, Machine

MACHINE = {"card": "a card", "memory": 2**34, "matrix_rate": 8e14, "python": "3.12.3", "versions": {"torch": "2.11.0"}}
NUMBERS = {
    "tokens_per_second": 1234.5, "share": 0.25, "peak": 2**30, "reserved": 2**31, "plan": 2**29, "engine": None,
    "sampling_share": None, "sha256": "ab", "micro_batch": 4, "repeated_steps": 0,
}  # fmt: skip


class Clock:
    """Time that passes where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Stages:
    """Stands in for the processes of stages: each takes ``seconds`` and returns a result, or is stopped."""

    def __init__(self, clock: Clock, seconds: float = 40.0) -> None:
        self.clock, self.seconds = clock, seconds
        self.ran: list[str] = []
        self.long: dict[str, float] = {}
        """Seconds of the items that take longer."""
        self.result: dict[str, Any] = NUMBERS

    def run(self, item: Item, place: Place, seconds: float) -> dict[str, Any]:
        self.ran.append(item.name)
        needed = self.long.get(item.name, self.seconds)
        if needed > seconds:
            self.clock.now += seconds
            raise OutOfTime
        self.clock.now += needed
        return dict(self.result)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    """A machine with a card on which four items are to be run."""
    clock = Clock()
    fake = Stages(clock)
    items = [Item(f"item {number}") for number in range(4)] + [Item("with vLLM", obstacle="vllm is not installed")]
    monkeypatch.setattr(gpu_evidence, "time", clock)
    monkeypatch.setattr(gpu_evidence, "describe_machine", lambda place, seconds: dict(MACHINE))
    monkeypatch.setattr(gpu_evidence, "run_stage_item", fake.run)
    for name in ("training_items", "plan_items", "determinism_items"):
        monkeypatch.setattr(gpu_evidence, name, lambda machine: items)
    return fake


def call(out: Path, *words: str) -> int:
    return gpu_evidence.main(["--part", "training", "--out", str(out), "--work", str(out / "work"), *words])


def kept(out: Path) -> dict[str, Any]:
    return json.loads((out / "training.json").read_text())["items"]


def test_a_command_ends_in_time_and_the_next_ones_go_on(stages: Stages, tmp_path: Path, capsys) -> None:
    assert call(tmp_path, "--limit", "100") == gpu_evidence.UNFINISHED  # a third one may take 48 s, and 20 are left
    assert "training: 2 of 4 items are done. Run the same command again to go on." in capsys.readouterr().out
    assert call(tmp_path, "--limit", "100") == 0
    assert stages.ran == [f"item {number}" for number in range(4)]
    assert call(tmp_path, "--limit", "100") == 0
    assert len(stages.ran) == 4
    result = kept(tmp_path)["item 3"]
    assert {name: value for name, value in result.items() if name != "machine"} == NUMBERS | {"seconds": 40.0}
    assert result["machine"]["card"] == "a card" and "commit" in result["machine"]


def test_interrupted_item_is_repeated_unless_too_long(stages: Stages, tmp_path: Path) -> None:
    stages.long["item 2"] = 90.0  # 48 are expected, and 70 are left
    assert call(tmp_path, "--limit", "150", "--only", "item") == gpu_evidence.UNFINISHED
    assert (stages.ran, list(kept(tmp_path))) == (["item 0", "item 1", "item 2"], ["item 0", "item 1"])
    assert call(tmp_path, "--limit", "150", "--only", "item") == gpu_evidence.UNFINISHED
    assert list(kept(tmp_path)) == ["item 0", "item 1", "item 2"]
    stages.long["item 3"] = 200.0
    assert call(tmp_path, "--limit", "150", "--only", "item") == 1
    assert kept(tmp_path)["item 3"]["failed"] == "took longer than the 150 seconds of a command (--limit)"


def test_failed_item_is_reported_and_can_be_repeated(stages: Stages, tmp_path: Path, capsys) -> None:
    stages.result = {"failed": "out of memory"}
    assert call(tmp_path) == 1
    assert "training: item 3: FAILED: out of memory (40 s)" in capsys.readouterr().out
    stages.result = NUMBERS
    assert call(tmp_path) == 1
    assert len(stages.ran) == 4
    assert call(tmp_path, "--retry") == 0
    assert len(stages.ran) == 8


def test_results_of_another_folder_are_taken_over(stages: Stages, tmp_path: Path) -> None:
    earlier, later = tmp_path / "earlier", tmp_path / "later"
    assert call(earlier, "--only", "item 1") == 0
    assert call(later, "--results", str(earlier)) == 0
    assert stages.ran == ["item 1", "item 0", "item 2", "item 3"]
    assert set(kept(later)) == {"with vLLM", *stages.ran}


def test_an_obstacle_is_told_and_measured_once_it_is_gone(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(tmp_path) == 0
    assert kept(tmp_path)["with vLLM"]["skipped"] == "vllm is not installed"
    assert "Not measured: 1 items (vllm is not installed)." in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(gpu_evidence, "training_items", lambda machine: [Item("with vLLM")])
    assert call(tmp_path) == 0
    monkeypatch.setattr(gpu_evidence, "training_items", lambda machine: [Item("with vLLM", obstacle="gone again")])
    assert call(tmp_path) == 0
    assert kept(tmp_path)["with vLLM"]["tokens_per_second"] == 1234.5


@pytest.mark.parametrize("part", ["quickstart", "proof"])
def test_a_pipeline_continues_and_is_never_too_long(
    part: str, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages.seconds = 1000.0
    monkeypatch.setattr(gpu_evidence, "proof_items", lambda machine: [Item("g1")])
    monkeypatch.setitem(gpu_evidence.RUN, part, stages.run)
    words = ["--part", part, "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    assert gpu_evidence.main(words) == gpu_evidence.UNFINISHED
    assert not (tmp_path / f"{part}.json").exists()


def test_collection_runs_once_and_may_fail(stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[Any] = [RuntimeError("no pytest"), ["a", "b"], ["b", "c"]]

    def collect(place: Place, seconds: float) -> list[str]:
        names = collected.pop(0)
        if isinstance(names, Exception):
            raise names
        return names

    monkeypatch.setattr(gpu_evidence, "list_tests", collect)
    monkeypatch.setitem(gpu_evidence.RUN, "tests", stages.run)
    assert call(tmp_path, "--part", "tests") == 1
    assert stages.ran == [f"item {number}" for number in range(4)]  # of the part after it
    for _ in range(2):
        assert call(tmp_path, "--part", "tests") == 0
    assert list(json.loads((tmp_path / "tests.json").read_text())["items"]) == ["a", "b"]
    assert call(tmp_path, "--part", "tests", "--retry") == 0
    assert stages.ran.count("b") == 1 and stages.ran.count("c") == 1
    assert collected == []


def test_a_collection_that_takes_too_long_is_tried_again(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def late(place: Place, seconds: float) -> list[str]:
        raise OutOfTime

    monkeypatch.setattr(gpu_evidence, "list_tests", late)
    words = ["--part", "tests", "--out", str(tmp_path), "--work", str(tmp_path / "work")]
    assert gpu_evidence.main(words) == gpu_evidence.UNFINISHED
    assert "tests: the time is over. Run the same command again" in capsys.readouterr().out


def test_without_a_card_it_says_so_and_does_nothing(
    stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    absent = {"absent": "torch 2.13.0+cpu sees no CUDA device"}
    monkeypatch.setattr(gpu_evidence, "describe_machine", lambda place, seconds: absent)
    assert call(tmp_path) == 0
    assert stages.ran == []
    text = "sees no CUDA device. `--device cpu --tiny` runs the same code on a processor."
    assert text in capsys.readouterr().out


def test_damaged_results_are_named_with_the_remedy(stages: Stages, tmp_path: Path, capsys) -> None:
    (tmp_path / "plan.json").write_text('{"items": []}')
    assert call(tmp_path) == 2
    assert "plan.json: is not a file of results. Remove it" in capsys.readouterr().err


def test_this_machine_s_torch_is_asked_in_a_process_of_its_own(tmp_path: Path) -> None:
    machine = gpu_evidence.describe_machine(Place(Machine("cpu", tiny=True), tmp_path), 120)
    assert (machine["card"], machine["memory"]) == ("cpu", None)
    assert machine["matrix_rate"] > 1e9
    assert {"torch", "transformers", "trl"} <= set(machine["versions"])
    assert machine["python"] == sys.version.split()[0]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("120", "torch does not start here: RuntimeError: no driver Repair"),
        ("0.2", "Give the command more by --limit."),
    ],
)
def test_a_torch_that_does_not_start_is_named_with_the_remedy(
    limit: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\nsleep 1\necho "RuntimeError: no driver"\nexit 1\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(gpu_evidence.sys, "executable", str(interpreter))
    words = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--limit", limit]
    assert gpu_evidence.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_stages_are_really_measured_on_a_processor(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--out", str(tmp_path), "--work", str(tmp_path / "work"), "--limit", "1500"]
    assert gpu_evidence.main([*words, "--part", "training", "--only", "0.5b grpo lora"]) == 0
    assert gpu_evidence.main([*words, "--part", "determinism", "--only", "sft full, deterministic"]) == 0
    training = json.loads((tmp_path / "training.json").read_text())["items"]
    for name, engine in (("qwen2.5-0.5b grpo lora", "transformers"), ("qwen2.5-0.5b grpo lora vllm", "vllm")):
        result = training[name]
        if "skipped" in result:  # without vLLM
            continue
        assert result["engine"] == engine
        assert result["tokens_per_second"] > 0 and 0 < result["share"] < 1 and 0 < result["sampling_share"] < 1
        assert result["peak"] > 0 and result["plan"] > 0
    (twice,) = json.loads((tmp_path / "determinism.json").read_text())["items"].values()
    assert twice["equal"] and twice["sha256"][0] == twice["sha256"][1]
    assert "equal bits" in (tmp_path / "table.md").read_text()
