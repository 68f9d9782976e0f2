"""One line of ``benchmarks.gpu``: a stage, or an engine, on one device.

python -m benchmarks.gpu_run FOLDER "sft lora" cuda smollm2
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from align.capacity.estimate import estimator_of
from align.capacity.job import Job, Setting
from align.config.runtime import Runtime
from align.models.architecture import Architecture, read_architecture
from align.pipeline.registry import STAGES
from benchmarks.memory_run import model_in
from benchmarks.stage_work import FIELD, config_of, run_stage

ON_GPU = {"length": 1024, "batch": 16, "micro": 4, "steps": 12, "prompt": 256, "response": 128, "rollout": 64}
ON_CPU = {"length": 64, "batch": 4, "micro": 2, "steps": 3, "prompt": 32, "response": 16, "rollout": 8}
"""Sizes of the work: enough steps for a steady rate on a card, few enough for a processor."""


def describe(device: str) -> str:
    """The card, or the processor, and its matrix rate."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return f"{name}: {matrix_rate(device) / 1e12:.3g} TFLOP/s in a bf16 product"


def matrix_rate(device: str, size: int | None = None) -> float:
    """FLOP/s of a square bf16 product, best of ten."""
    import torch

    size = size or (8192 if device == "cuda" else 1024)
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def fields_of(kind: str, method: str, sizes: dict[str, int]) -> dict[str, Any]:
    """The config of a stage's line."""
    common = {"tuning": {"method": method}, "micro_batch_size": sizes["micro"]}
    if kind == "ppo":
        return common | {
            "updates": 2, "rollout_batch": sizes["rollout"], "samples_per_prompt": 4,
            "max_prompt_tokens": sizes["prompt"], "max_tokens": sizes["response"],
        }  # fmt: skip
    return common | {
        "batch_size": sizes["batch"], "max_length": sizes["length"], "max_steps": sizes["steps"], "eval_rows": 4,
    }  # fmt: skip


def stage_line(root: Path, kind: str, method: str, device: str, model: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """Rate, share of the matrix rate, and peak memory of a stage against the plan's."""
    import torch

    engine = {"name": "auto" if device == "cuda" else "transformers"}
    runtime = Runtime.model_validate({"device": device, "engine": engine})
    fields = fields_of(kind, method, sizes)
    length, rows = (sizes["prompt"], sizes["rollout"]) if kind == "ppo" else (sizes["length"], sizes["batch"] * 2)
    sizes_of_model = read_architecture(model / "config.json")
    job = _job(kind, fields, sizes_of_model, runtime)
    rate = matrix_rate(device)
    metrics = run_stage(root / "run", kind, fields, model, length, rows, runtime)
    setting = Setting(job.micro_batch, job.batch > job.micro_batch, gpu=device == "cuda")
    learned = job.steps(job.rows(10**9) or 0) * job.batch if kind != "ppo" else job.rows(None) or 0
    seconds = float(metrics["seconds"] if kind == "ppo" else metrics["training_seconds"])
    work = job.work(1.0)
    # PPO's seconds hold its scoring passes and its sampling; the others' are of steps alone
    flops = learned * (work.learning + (work.scoring if kind == "ppo" else 0.0))
    return {
        "tokens_per_second": float(metrics["tokens_per_second"]),
        "share": flops / seconds / rate,
        # a processor's memory is measured by benchmarks.memory_plan, beyond what its libraries take
        "peak": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "plan": job.memory(setting).peak(job.tokens(job.micro_batch)),
        "note": f"engine {metrics['engine']}, sampling included" if kind == "ppo" else "",
    }


def _job(kind: str, fields: dict[str, Any], model: Architecture, runtime: Runtime) -> Job:
    models = {FIELD[kind]: [model]} | ({"reward": [model]} if kind == "ppo" else {})
    job: Job = estimator_of(STAGES[kind]).job(config_of(kind, fields), models, runtime)
    return job


def rollout_line(device: str, model: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """Sampled tokens a second of the engine that a stage would have, every response at its full length."""
    from align.inference.engine import open_engine
    from align.inference.protocol import Sampling

    runtime = Runtime.model_validate(
        {"device": device, "engine": {"name": "auto" if device == "cuda" else "transformers"}}
    )
    notes: list[str] = []
    engine = open_engine(
        model, runtime, precision="bfloat16", max_length=sizes["prompt"] + sizes["response"], seed=1, warn=notes.append
    )
    try:
        prompts = [[4 + (at + place) % 200 for place in range(sizes["prompt"])] for at in range(sizes["rollout"])]
        sampling = Sampling(n=1, max_tokens=sizes["response"], temperature=1.0, seed=1)
        engine.generate(prompts[:2], sampling)  # what the first call compiles or allocates
        started = time.perf_counter()
        responses = engine.generate(prompts, sampling)
        seconds = time.perf_counter() - started
    finally:
        engine.close()
    tokens = sum(len(response.token_ids) for some in responses for response in some)
    return {"tokens_per_second": tokens / seconds, "note": f"engine {engine.name}"}


def main(root: Path, line: str, device: str, model: str) -> dict[str, Any]:
    """The numbers of one line."""
    known = {"smollm2": "embedded", "tiny": "tiny"}
    folder = model_in(root, known[model]) if model in known else Path(model)
    sizes = ON_GPU if device == "cuda" else ON_CPU
    if line == "rollouts":
        return rollout_line(device, folder, sizes)
    kind, method = line.split()
    return stage_line(root, kind, method, device, folder, sizes)


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:5])))
