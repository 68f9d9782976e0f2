"""Training side by side: align, trl 1.16 and LLaMA-Factory 0.9.5 by their command lines, on the same rows.

    python -m benchmarks.training_vs_peers --rounds 2 --json FILE [--only sft_lora,dpo_full] [--peers trl_threads]

Works: SFT with LoRA and in full, a reward model in full, DPO with LoRA and in full, KTO with LoRA. Peers: ``trl`` as it
comes, which on a CPU trains on one thread and recomputes activations; ``trl_threads``, on all cores and without
recomputation; ``llamafactory``, the same. Every side has a virtual environment of its own, made with pip where it is
missing: align's runs this checkout, without optional packages.

Alike on all sides: the embedded SmolLM2-135M-Instruct with a chat template that adds no system message, single-turn
rows of LLaMA-Factory's demo files that fit the greatest length, one epoch in steps of 8 rows (pairs) in one
micro-batch, learning rate, LoRA of rank 16 on every linear layer but the head, products in bfloat16
(``--precision float32`` for a processor that emulates it). Weights are float32 masters, but for LLaMA-Factory's LoRA,
which holds the frozen weights in bfloat16. Each side draws its own order of the rows. No side evaluates; each saves as
it does by default, a checkpoint after the last step included.

Measured in each run, a process tree of its own that starts from an empty folder: the training loop from the end of the
first step to the end of the last, in real tokens (prompt and answer, no padding, a pair's prompt twice) as the side
itself counts them; resident memory of the tree at its peak, shared pages counted in each process; seconds of the whole
command. align scores DPO's and KTO's reference before it trains: that time is added to its loop.

Results are kept in ``--json`` after every run, and the same command goes on from there. ``--minutes 9`` starts no run
that would end later, and exits with 3 while runs are left. A failed peer is a row of the table, and exit code 1.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.config.user_paths import cache_folder
from align.errors import UserError
from benchmarks.ppo_work import inventory
from benchmarks.training_peers.comparison import Comparison
from benchmarks.training_peers.environments import ALIGN, LLAMAFACTORY, PACKAGES, TRL, prepare
from benchmarks.training_peers.model import export_model
from benchmarks.training_peers.results import Results
from benchmarks.training_peers.rows import data_folder
from benchmarks.training_peers.sides import PEERS
from benchmarks.training_peers.table import notes, table
from benchmarks.training_peers.works import WORKS, Settings

RUNS_LEFT = 3
"""Exit code while runs are left."""


def names(known: tuple[str, ...]) -> Any:
    """Return an argument type: a comma-separated list of known names, in their own order."""

    def parse_names(text: str) -> list[str]:
        requested = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in requested if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return [name for name in known if name in requested]

    return parse_names


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options, with their defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", type=names(tuple(WORKS)), default=list(WORKS), help=f"works, of {', '.join(WORKS)}")
    add("--peers", type=names(PEERS), default=list(PEERS), help=f"sides beside align, of {', '.join(PEERS)}")
    add("--rounds", type=int, default=2, help="runs of each side and work")
    add("--rows", type=int, help="rows (pairs) of an epoch; by default 64 of SFT, 32 pairs, 48 of KTO")
    add("--micro-batch", type=int, default=8, choices=(1, 2, 4, 8), help="rows of a forward pass; a step has 8")
    add("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="type of the matrix products")
    add("--checkpointing", action="store_true", help="every side recomputes activations in the backward pass")
    add("--data", type=Path, help="folder of the demo files; by default $ALIGN_DATA/llamafactory-demo")
    add("--json", type=Path, help="results, which the same command goes on from")
    add("--minutes", type=float, help="start no run that would end later than this")
    add("--timeout", type=float, default=1800, help="seconds after which a run is killed")
    add("--retry", action="store_true", help="repeat runs that failed")
    add("--folder", type=Path, help="keep everything that the runs write there, logs included")
    for package in (ALIGN, TRL, LLAMAFACTORY):
        add(f"--{package.name}-environment", type=Path, default=cache_folder() / package.folder)
    options = parser.parse_args(arguments)
    if options.rows is not None and (options.rows < 16 or options.rows % 8):
        parser.error("--rows: a multiple of 8, at least 16, because the first step of 8 is not counted")
    return options


def environments(options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, dict[str, str]], dict[str, str]]:
    """Return the command of each side, its packages, and why a peer that cannot be run cannot."""
    folder = options.align_environment
    executables = {"align": prepare(ALIGN, folder)}
    packages = {"align": inventory(folder / "bin" / "python")}
    failures = {}
    for peer in options.peers:
        package = PACKAGES[peer]
        folder = getattr(options, f"{package.name}_environment")
        try:
            executables[peer] = prepare(package, folder)
            packages[peer] = inventory(folder / "bin" / "python")
        except UserError as error:
            failures[peer] = str(error)
    return executables, packages, failures


def compare(options: argparse.Namespace, folder: Path, start: float) -> int:
    """Run what is due, print the table, and return the exit code."""
    settings = Settings(
        micro_batch=options.micro_batch, checkpointing=options.checkpointing, precision=options.precision
    )
    rows = {name: options.rows or WORKS[name].rows for name in WORKS}
    results = Results.load(options.json, {**asdict(settings), "rows": rows})
    executables, packages, failures = environments(options)
    results.packages |= packages
    comparison = Comparison(
        works=[WORKS[name] for name in options.only],
        executables=executables,
        settings=settings,
        rounds=options.rounds,
        model=export_model(folder / "model"),
        folder=folder,
        results=results,
        timeout=options.timeout,
        deadline=None if options.minutes is None else start + 60 * options.minutes,
        keep=options.folder is not None,
    )
    comparison.prepare(options.data or data_folder(), options.rows)
    remaining = comparison.run(options.retry)
    print()
    print("\n".join(table(results.runs, options.only, ("align", *options.peers))))
    print("\n".join(notes(results.runs, results.expected_tokens)))
    for peer, failure in failures.items():
        print(f"{peer} could not be run: {failure}")
    if remaining:
        print(f"{remaining} runs are left; the same command goes on with them")
        return RUNS_LEFT
    return int(bool(failures) or any({"failure", "failure_after_training"} & run.keys() for run in results.runs))


def stop_on_request() -> None:
    """Turn SIGTERM into an exception, which also ends the command that is being measured."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def main() -> None:
    """Compare; exit code 0, 1 where a run failed, 2 for wrong input, 3 while runs are left."""
    start = time.monotonic()
    options = parse()
    stop_on_request()
    try:
        if options.folder is not None:
            options.folder.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix="comparison-", dir=options.folder))
            sys.exit(compare(options, scratch, start))
        with tempfile.TemporaryDirectory(prefix="align-peers-") as folder:
            sys.exit(compare(options, Path(folder), start))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
