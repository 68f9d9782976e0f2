"""What needs one GPU, measured in one table: speed, share of the card's matrix rate, memory against the plan.

    python -m benchmarks.gpu [--model smollm2|tiny|FOLDER] [--device cuda|cpu] [--only sft] [--limit S] [--json FILE]

Each line is a process of its own (``benchmarks.gpu_run``): the whole stage from loading to saving, or an engine that
samples. Without a CUDA device it says so and does nothing; ``--device cpu --model tiny`` runs the same on a processor,
to see that it works. A line that takes longer than its share of the time limit is stopped and said to be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from align.runner.worker import ENVIRONMENT

LIMIT = 600
"""Seconds for all lines together, unless ``--limit`` says otherwise."""
LINES = ("sft lora", "sft full", "reward lora", "dpo lora", "ppo lora", "rollouts")
HEAD = ("work", "tokens/s", "of the matrix rate", "peak, GiB", "plan, GiB", "off", "seconds", "")


def run_line(line: str, device: str, model: str, seconds: float) -> dict[str, Any]:
    """One line's numbers, or ``failed`` with why."""
    environment = {**ENVIRONMENT, "TOKENIZERS_PARALLELISM": "false", **os.environ}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu_run", folder, line, device, model]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=max(1, seconds))
        except subprocess.TimeoutExpired:
            return {"work": line, "failed": "stopped: the time for all lines was over (--limit)"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"work": line, "failed": last[:200]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"work": line, **found, "seconds": time.monotonic() - started}


def row(found: dict[str, Any]) -> list[str]:
    """A line of the table; what was not measured is a dash."""
    if "failed" in found:
        return [found["work"], *["-"] * (len(HEAD) - 2), found["failed"]]
    share, peak, plan = found.get("share"), found.get("peak"), found.get("plan")
    return [
        found["work"],
        f"{found['tokens_per_second']:,.0f}",
        "-" if share is None else f"{share:.0%}",
        "-" if peak is None else f"{peak / 2**30:.2f}",
        "-" if plan is None else f"{plan / 2**30:.2f}",
        "-" if peak is None or plan is None else f"{plan / peak - 1:+.0%}",
        f"{found['seconds']:.0f}",
        found.get("note", ""),
    ]


def table(head: str, results: list[dict[str, Any]]) -> list[str]:
    """The card's name and its lines, in columns."""
    rows = [list(HEAD), *map(row, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        head,
        *("  ".join(f"{cell:<{width}}" for cell, width in zip(one, widths, strict=True)).rstrip() for one in rows),
    ]


def why_not(device: str) -> str | None:
    """Why nothing can be measured on ``device``; None where it can."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return (
            f"skipped: torch {torch.__version__} sees no CUDA device. `--device cpu --model tiny` runs the same lines "
            "on a processor, which says that they work and nothing about a card."
        )
    return None


def main() -> int:
    """Print the table; exit code 1 where a line failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or a model folder")
    parser.add_argument("--only", default="", help="lines that contain this")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all lines together")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    reason = why_not(options.device)
    if reason is not None:
        print(reason)
        return 0
    from benchmarks.gpu_run import describe

    ends = time.monotonic() + options.limit
    results = []
    for line in LINES:
        if options.only in line:
            results.append(run_line(line, options.device, options.model, ends - time.monotonic()))
            print("  ".join(row(results[-1])), file=sys.stderr, flush=True)
    print("\n".join(table(f"{describe(options.device)}, {options.model}", results)))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 1 if any("failed" in found for found in results) else 0


if __name__ == "__main__":
    sys.exit(main())
