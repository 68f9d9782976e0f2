"""What one GPU must do as a processor does: ``make test-gpu``. None of it has run on a card yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from align.capacity import estimate_training
from align.capacity.sharding import Setting
from align.config.runtime import Runtime
from align.models.compute.model_types import read_architecture
from benchmarks.stage_work import FIELD, config_of, run_stage

pytestmark = pytest.mark.gpu
LORA = {"method": "lora", "rank": 4}


def run(root: Path, kind: str, device: str, model: Path, **fields: Any) -> dict[str, Any]:
    """A stage on eight rows of 48 tokens."""
    runtime = Runtime.model_validate({"device": device, "engine": {"name": "transformers"}})
    sizes: dict[str, Any] = {"batch_size": 4, "micro_batch_size": 2, "max_length": 48, "eval_rows": 4}
    if kind == "ppo":
        sizes = {"updates": 2, "rollout_batch": 8, "micro_batch_size": 4, "max_prompt_tokens": 48, "max_tokens": 8}
    return run_stage(root, kind, {"tuning": LORA, **sizes, **fields}, model, 48, 8, runtime)


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_card_learns_what_a_processor_learns(kind: str, device: str, tiny_model: Path, tmp_path: Path) -> None:
    fields = {"precision": "float32", "learning_rate": 1e-3}
    here, there = (run(tmp_path / place, kind, on, tiny_model, **fields) for place, on in (("a", device), ("b", "cpu")))
    assert here["loss_first"] == pytest.approx(there["loss_first"], rel=1e-3)
    assert here["loss_last"] == pytest.approx(there["loss_last"], rel=1e-2)


@pytest.mark.parametrize("critic", ["reward", "head"])
def test_ppo_updates_and_its_two_models_agree(critic: str, device: str, tiny_model: Path, tmp_path: Path) -> None:
    result = run(tmp_path, "ppo", device, tiny_model, critic=critic)  # its own parity probe stops it where they do not
    assert result["updates"] == 2 and result["parity_gap_last"] < 0.1


def test_four_bits_train(device: str, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    result = run(tmp_path, "sft", device, tiny_model, tuning={"method": "qlora", "rank": 4}, learning_rate=1e-2)
    assert result["loss_last"] < result["loss_first"]


def test_ragged_attention_is_torch_s_own(device: str) -> None:
    from align.models.fast.ragged_rows import make_layout, ragged_attention, to_device

    torch.manual_seed(0)
    lengths = [700, 30, 600]  # beyond and below what a processor does by plain products
    q, k, v = (torch.randn(1, heads, sum(lengths), 32, device=device) for heads in (4, 2, 2))
    actual = ragged_attention(torch.nn.Identity(), q, k, v, None, layout=to_device(make_layout(lengths), device))[0]
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        wide = [tensor[:, :, part].repeat_interleave(4 // tensor.shape[1], dim=1) for tensor in (q, k, v)]
        plain = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=True).transpose(1, 2)
        assert torch.allclose(actual[:, part], plain, atol=2e-3)
        start = part.stop


def test_vllm_has_the_trainer_s_weights_and_sleeps(device: str, tiny_model: Path, tmp_path: Path) -> None:
    from align.inference.vllm import why_unusable

    reason = why_unusable()
    if reason is not None:
        pytest.skip(f"vLLM cannot be used: {reason}")
    script = (
        "import torch\n"
        "from align.models.loading import load_policy\n"
        "from align.models.tuning.peft_layers import merged_weights\n"
        "from align.inference.engine import open_engine\n"
        "from align.inference.trainer_engine import probe\n"
        "from align.config.runtime import Runtime\n"
        "from pathlib import Path\n"
        f"folder, device = Path({str(tiny_model)!r}), {device!r}\n"
        "engine = {'name': 'vllm', 'dtype': 'float32', 'gpu_memory': 0.2, 'cpu_kv_cache_gb': 0.1}\n"
        "runtime = Runtime.model_validate({'device': device, 'engine': engine})\n"
        "engine = open_engine(folder, runtime, precision='float32', max_length=64, seed=1, warn=print)\n"
        "policy = load_policy(folder).to(device)\n"
        "for parameter in policy.parameters(): parameter.data.mul_(1.1)\n"
        "engine.load_weights(merged_weights(policy))\n"
        "print(probe(engine, policy, [[5, 6, 7], [8, 9]], temperature=1.0).mean_gap)\n"
        "engine.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"CUDA_LAUNCH_BLOCKING": "0"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) < 1e-3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_stage_holds_what_the_plan_counts(method: str, device: str, tmp_path: Path) -> None:
    from align.models.built_in import make_tiny

    if device != "cuda":
        pytest.skip("a processor's memory is measured by benchmarks.memory_plan")
    model = make_tiny(tmp_path / "wide", hidden_size=1024, layers=12)
    fields = {"tuning": {"method": method}, "batch_size": 16, "micro_batch_size": 8, "max_length": 512, "eval_rows": 4}
    runtime = Runtime.model_validate({"device": "cuda"})
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run_stage(tmp_path / "run", "sft", fields, model, 512, 32, runtime)
    job = estimate_training.job(
        config_of("sft", fields), {FIELD["sft"]: [read_architecture(model / "config.json")]}, runtime
    )
    counted = job.memory(Setting(8, gpu=True)).peak(job.tokens(8))
    assert counted == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


def test_every_stage_runs_from_one_file(device: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "align.cli.main",
        "run",
        "pipelines/smoke.yaml",
        "--store",
        str(tmp_path / "store"),
    ]
    command += ["--set", f"runtime.device={device}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
