"""A step's micro-batches: dealt out to processes, weighted, and halved when a step runs out of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from align.errors import StageFailed
from align.pipeline.context import MemoryGuess
from align.rl.buffer import RolloutBuffer
from align.runner.runner import run_pipeline
from align.training import micro_batches
from align.training.micro_batches import FILE, SHARE, MemorySettings, StepMemory, StepRows, gather_uneven
from tests.support.rl.stages import make_stage as make_rollout_stage
from tests.support.training import distributed_runs
from tests.support.training.aimed_stages import make_stage
from tests.support.training.distributed_runs import Made, interrupted, pipeline
from tests.support.training.kills import Kill, points, run, run_killed
from tests.support.training.scarce_memory import Allocator, no_memory

WITHIN = 1e-6


# ---- the rows of a step ----


def parts_of(
    rows: list[int], size: int, rank: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[list[int], float]]:
    """Return the rows of each micro-batch of a process, with its weight."""
    for module in (micro_batches, sys.modules["align.models.compute.processes"]):
        monkeypatch.setattr(module, "world_size", lambda: processes)
    monkeypatch.setattr("align.models.compute.processes.rank", lambda: rank)
    step = StepRows([{"row": row} for row in rows], lambda part: {"rows": [row["row"] for row in part]})
    return [(batch["rows"], float(batch[SHARE])) for batch in step.micro_batches(size)]


def test_rows_are_dealt_to_processes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # 5 rows in parts of 2, 2 and 1: two rounds of two processes. A part's weight is its share of the five rows times
    # two processes. The second process repeats the first part in the second round, with weight 0.
    rows = [8, 7, 6, 5, 4]
    assert parts_of(rows, 2, 0, 2, monkeypatch) == [([8, 7], pytest.approx(0.8)), ([4], pytest.approx(0.4))]
    assert parts_of(rows, 2, 1, 2, monkeypatch) == [([6, 5], pytest.approx(0.8)), ([8, 7], 0.0)]


@given(rows=st.integers(1, 40), size=st.integers(1, 9), processes=st.integers(1, 4))
def test_weights_make_the_mean_over_a_step_s_rows(rows: int, size: int, processes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        dealt = [parts_of(list(range(rows)), size, rank, processes, patch) for rank in range(processes)]
    assert len({len(parts) for parts in dealt}) == 1
    # The loss of a row is its number; gradients are averaged over the processes.
    total = sum(share * sum(part) / len(part) for parts in dealt for part, share in parts) / processes
    assert total == pytest.approx((rows - 1) / 2, abs=1e-4)


def test_gather_pads_and_cuts_rows_of_another_process() -> None:
    others = {"sizes": torch.tensor([3]), "rows": torch.tensor([[1.0], [2.0], [3.0]])}
    gathered: list[object] = []
    begun: list[bool] = []

    def gather(value: object) -> object:
        gathered.append(value)
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            return value
        return torch.cat([value, others["sizes" if value.dtype == torch.int64 else "rows"]])

    wrapped = gather_uneven(gather, lambda: begun.append(True))
    # This process has two rows, the other three: this one pads by a row, which is cut off again.
    rows = wrapped(torch.tensor([[8.0], [9.0]]))
    assert rows.tolist() == [[8.0], [9.0], [1.0], [2.0], [3.0]]
    assert [len(value) for value in gathered if isinstance(value, torch.Tensor)] == [1, 3]
    # A number and a nested value have no rows: they pass as they are.
    gathered.clear()
    scalar = torch.tensor(2.0)
    assert wrapped(scalar) is scalar
    assert wrapped({"a": 1}) == {"a": 1}
    assert gathered == [scalar, {"a": 1}]
    assert len(begun) == 3


# ---- the choice of settings ----


def make_memory(folder: Path, sizes: tuple[int, ...], may_recompute: bool = True) -> tuple[StepMemory, Any]:
    settings = MemorySettings(sizes, may_recompute=may_recompute)
    args = SimpleNamespace(output_dir=folder, memory=settings, gradient_checkpointing=False)
    memory = StepMemory(args)
    memory.notify = lambda text: args.__dict__.setdefault("notes", []).append(text)
    model = torch.nn.Linear(2, 1)
    model.supports_gradient_checkpointing = True
    model.gradient_checkpointing_enable = lambda **_: None
    trainer = SimpleNamespace(
        args=args,
        model=model,
        accelerator=SimpleNamespace(),
        state=SimpleNamespace(global_step=4),
        is_world_process_zero=lambda: True,
    )
    return memory, trainer


def test_sizes_then_recomputation_then_an_error(tmp_path: Path) -> None:
    memory, trainer = make_memory(tmp_path, (4, 2, 1))
    tried: list[tuple[int, bool, float]] = []
    undone: list[int] = []

    def attempt() -> str:
        tried.append((memory.rows, trainer.args.gradient_checkpointing, float(torch.rand(()))))
        trainer.model(torch.ones(1, 2)).sum().backward()
        raise no_memory()

    trainer.model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(StageFailed, match=r"micro-batches of 1 ran out of memory \(CUDA.*\)\. Lower max_length: "):
        memory.run(trainer, attempt, lambda: undone.append(memory.rows))
    assert [(rows, recomputes) for rows, recomputes, _ in tried] == [(4, False), (2, False), (1, False), (1, True)]
    assert len({draw for *_, draw in tried}) == 1, "a repeated step starts from the generator's state"
    assert undone == [4, 2, 1, 1]
    assert trainer.model.weight.grad is None
    assert "step 5: micro-batches of 4 ran out of memory" in trainer.args.notes[0]
    assert "repeated with micro-batches of 2" in trainer.args.notes[0]
    assert memory.facts() == {"micro_batch_size": 1, "gradient_checkpointing": True, "repeated_steps": 3}
    # A resumed run begins with what was found.
    resumed, other = make_memory(tmp_path, (4, 2, 1))
    assert resumed.facts() == memory.facts()
    assert other.args.gradient_checkpointing


def test_plan_chooses_the_first_size() -> None:
    settings = MemorySettings((8, 4, 2, 1))
    assert settings.up_to(None).sizes == (8, 4, 2, 1)
    assert settings.up_to(MemoryGuess(3, recomputes=False)).sizes == (2, 1)
    assert MemorySettings((4,)).up_to(MemoryGuess(1, recomputes=False)).sizes == (4,)


def test_fixed_settings_fail_and_say_what_would_help(tmp_path: Path) -> None:
    memory, trainer = make_memory(tmp_path, (4,), may_recompute=False)

    def attempt() -> None:
        raise no_memory()

    with pytest.raises(torch.OutOfMemoryError):  # nothing may change, so torch's own error ends the stage
        memory.run(trainer, attempt, lambda: None)
    memory, trainer = make_memory(tmp_path, (4, 2), may_recompute=False)
    with pytest.raises(StageFailed, match=r"Set `gradient_checkpointing: auto`\. Lower max_length"):
        memory.run(trainer, attempt, lambda: None)


def test_other_errors_are_not_repeated(tmp_path: Path) -> None:
    memory, trainer = make_memory(tmp_path, (4, 2))
    tried: list[int] = []

    def attempt() -> None:
        tried.append(memory.rows)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        memory.run(trainer, attempt, lambda: None)
    assert tried == [4]
    assert not (tmp_path / FILE).exists()


def test_sharded_stage_stores_the_smaller_size(tmp_path: Path) -> None:
    memory, trainer = make_memory(tmp_path, (4, 2))
    memory.is_sharded = True

    def attempt() -> None:
        raise no_memory()

    with pytest.raises(StageFailed, match="Run again: the stage continues with micro-batches of 2"):
        memory.run(trainer, attempt, lambda: None)
    assert make_memory(tmp_path, (4, 2))[0].rows == 2


# ---- whole stages ----

SUPERVISED = {"micro_batch_size": "auto", "epochs": 3, "max_steps": 7}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    # Dropout shows that a repeated step draws as its first attempt did.
    "sft": ("backward", {"tuning": {"method": "lora", "rank": 4, "dropout": 0.2}, **SUPERVISED}),
    "dpo": ("forward", SUPERVISED),
    "reward": ("backward", {"tuning": {"method": "lora", "rank": 4}, **SUPERVISED}),
    "ppo": ("backward", {"num_epochs": 1, "num_mini_batches": 1}),
    "grpo": ("pack", {"num_epochs": 1}),
}
FIXED = 2


def make(kind: str, root: Path, model: Path, **fields: Any) -> Any:
    maker = make_rollout_stage if kind in ("ppo", "grpo") else make_stage
    return maker(kind, root, model, **{**STAGES[kind][1], **fields})


@pytest.mark.parametrize("kind", STAGES)
def test_halved_stage_equals_one_with_small_micro_batches(
    kind: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage is killed after a checkpoint. Its second attempt begins with the size that the first has found."""
    where, _ = STAGES[kind]
    fixed = make(kind, tmp_path / "fixed", tiny_model, micro_batch_size=FIXED)
    memory = Allocator()
    with memory.installed():
        expected = run(fixed)
    scarce = Allocator(memory.largest if where != "pack" else None, where)
    if where == "pack":
        plain = RolloutBuffer.pack

        def pack(buffer: Any, rollout: Any, indices: list[int], *texts: Any) -> Any:
            if len(indices) > FIXED:
                scarce.failures += 1
                raise no_memory()
            return plain(buffer, rollout, indices, *texts)

        monkeypatch.setattr(RolloutBuffer, "pack", pack)
    stage = make(kind, tmp_path / "auto", tiny_model)
    with scarce.installed():
        metrics = run_killed(stage, [Kill("after", 4 if kind in ("ppo", "grpo") else 3)])
    assert metrics["micro_batch_size"] == expected["micro_batch_size"] == FIXED
    assert expected["repeated_steps"] == 0
    assert scarce.failures == metrics["repeated_steps"] > 0, "the second attempt fails no more"
    assert json.loads((stage.checkpoints / FILE).read_text())["micro_batch_size"] == FIXED
    weights, others = (load_file(each.output / "model" / "model.safetensors") for each in (fixed, stage))
    for name, tensor in weights.items():
        assert (tensor - others[name]).abs().max() <= WITHIN, name
    # Metrics of a repeated step count once.
    assert points(stage).keys() == points(fixed).keys()
    for step, values in points(fixed).items():
        assert points(stage)[step] == pytest.approx(values, rel=1e-5, abs=1e-6), step


def test_order_of_rows_depends_on_no_micro_batch(tiny_model: Path, tmp_path: Path) -> None:
    """Explicit sizes that change no result: same rows in each step, and short last steps weigh rows alike."""
    weights = []
    for size in (1, 8):
        stage = make_stage(
            "dpo", tmp_path / str(size), tiny_model, batch_size=16, micro_batch_size=size, max_rows=20, epochs=2
        )
        run(stage)
        weights.append(load_file(stage.output / "model" / "model.safetensors"))
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_processes_agree_and_keep_the_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in one of two ranks, which is killed after a checkpoint."""
    kind = f"tests.support.training.scarce_memory:{name.upper()}"
    more: dict[str, Any] = {"max_steps": 40} if name == "sft" else {"updates": 12}
    fields = {**distributed_runs.STAGES[name], "stage": kind}
    if name == "ppo":
        fields["score_validation"] = {"rows": 0}
    monkeypatch.setitem(distributed_runs.STAGES, name, fields)
    launch = {"processes": 2}
    actual = interrupted(tmp_path, name, launch, launch)
    size = actual.metrics["micro_batch_size"]
    assert size < 6, "each process begins with half of the 12 rows"
    monkeypatch.setitem(distributed_runs.STAGES, name, {**fields, "stage": name, "micro_batch_size": size})
    finished = run_pipeline(pipeline(name, launch, **more), store=tmp_path / "fixed")
    expected = Made(name, finished.artifacts[name].path, finished.metrics(name))
    assert actual.metrics["tokens"] == expected.metrics["tokens"]
    assert actual.losses[-1] == pytest.approx(expected.losses[-1], abs=WITHIN)
    for key, tensor in expected.weights.items():
        assert (tensor - actual.weights[key]).abs().max() <= WITHIN, key


def test_limit_of_a_process_halves_micro_batches(tmp_path: Path) -> None:
    """The system refuses memory to a process, as a limit of its address space does, and torch raises."""
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.training.scarce_memory", str(tmp_path)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["repeated_steps"] > 0
    assert result["micro_batch_size"] < 8
    assert result["difference"] <= WITHIN
