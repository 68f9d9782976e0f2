"""The quickstart's stages against their floors, from the records of a finished run.

    align run pipelines/quickstart.yaml --store FOLDER
    python -m benchmarks.quickstart --store FOLDER [--sampling-rate 500]

The floor of a stage is the time that the machine needs for its arithmetic alone: operations of the trained and the
scored tokens over the rate of a large bf16 matrix product, and sampled tokens over the rate of vLLM by itself
(``python -m benchmarks.rollouts``; measured here without ``--sampling-rate``). It is a lower bound: padding, the
vocabulary's head on trained rows, the optimizer, loading, saving and starting are left out. Run it on the machine that
ran the pipeline, with nothing beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.models.compute.architecture import Architecture
from align.models.compute.model_types import architecture_of
from align.pipeline.pipeline import Node, Pipeline
from align.runner.open_store import open_store
from align.store.store import Store
from benchmarks.flops import forward_flops, learning_flops
from benchmarks.training import matrix_peak

PIPELINE = Path(__file__).parents[1] / "pipelines" / "quickstart.yaml"
READERS = 3
"""Models that read each evaluated response: the checkpoint itself, the reference and the reward model."""


@dataclass(frozen=True)
class Work:
    """Operations and sampled tokens of a stage."""

    flops: float = 0.0
    sampled: float = 0.0

    def floor(self, peak: float, rate: float) -> float:
        """Return the least seconds at ``peak`` operations and ``rate`` sampled tokens a second."""
        return self.flops / peak + self.sampled / rate


def work_of(node: Node, record: dict[str, Any], model: Architecture) -> Work:
    """Return the work of a finished stage; none for a kind that computes nothing."""
    metrics, kind = record["metrics"], node.stage.kind
    if kind in ("sft", "reward", "dpo"):
        return Work(_training_flops(node, metrics, model))
    if kind == "sample":
        return Work(sampled=metrics["tokens"])
    if kind == "ppo":
        return _ppo_work(node, metrics, model)
    if kind == "evaluate":
        return Work(READERS * forward_flops(model, metrics["tokens"], 0.0), metrics["tokens"])
    return Work()


def _training_flops(node: Node, metrics: dict[str, Any], model: Architecture) -> float:
    """Count the passes over the trained rows, over the held-out rows before and after, and the reference's."""
    config: Any = node.config
    tokens = float(metrics["tokens"])
    rows = metrics.get("rows") or metrics["pairs"]
    held_out = tokens / rows * (metrics.get("test_rows") or metrics["test_pairs"])
    times_scored = sum(f"test_loss_{moment}" in metrics for moment in ("before", "after"))
    scored = times_scored * held_out + (tokens + held_out if node.stage.kind == "dpo" else 0.0)
    return learning_flops(model, config.tuning, tokens, 0.0) + forward_flops(model, scored, 0.0)


def _ppo_work(node: Node, metrics: dict[str, Any], model: Architecture) -> Work:
    """Count sampling; reading by policy, reference, critic and reward model; learning of policy and critic."""
    config: Any = node.config
    tokens = float(metrics["tokens"])
    flops = 4 * forward_flops(model, tokens, 0.0) + 2 * learning_flops(model, config.tuning, tokens, 0.0)
    return Work(flops, tokens)


def vllm_rate() -> float:
    """Return the tokens a second of vLLM by itself, in a process whose threads are its own."""
    command = [sys.executable, "-m", "benchmarks.rollouts", "--engine", "vllm"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["rate"])


def table(pipeline: Pipeline, store: Store, peak: float, rate: float) -> str:
    """Return a Markdown table: seconds, floor and their ratio for each stage that has run."""
    lines = ["| stage | seconds | floor | ratio |", "| --- | --- | --- | --- |"]
    artifacts = {node.name: store.find_intact(node.stage.kind, node.key) for node in pipeline}
    missing = [name for name, artifact in artifacts.items() if artifact is None]
    if missing:
        raise SystemExit(f"{store.root} has no finished {', '.join(missing)}; run the pipeline there first.")
    model = _architecture(artifacts["model"])
    seconds_in_all = 0.0
    for node in pipeline:
        record = artifacts[node.name].record  # type: ignore[union-attr]
        seconds = float(record["seconds"])
        seconds_in_all += seconds
        floor = work_of(node, record, model).floor(peak, rate)
        bound = f"{floor:.0f} | {seconds / floor:.1f}" if floor else "- | -"
        lines.append(f"| `{node.name}` | {seconds:.0f} | {bound} |")
    return "\n".join([*lines, f"| all | {seconds_in_all:.0f} | | |"])


def _architecture(artifact: Any) -> Architecture:
    config = json.loads((artifact.model / "config.json").read_text(encoding="utf-8"))
    return architecture_of(config)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="the store of a finished run")
    parser.add_argument("--sampling-rate", type=float, help="tokens a second of vLLM alone; measured by default")
    options = parser.parse_args()
    peak = matrix_peak()
    rate = options.sampling_rate or vllm_rate()
    print(f"bf16 matrix product: {peak / 1e9:.0f} GFLOP/s; vLLM alone: {rate:.0f} tokens/s\n")
    pipeline = Pipeline.load(PIPELINE)
    print(table(pipeline, open_store(pipeline, options.store), peak, rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
