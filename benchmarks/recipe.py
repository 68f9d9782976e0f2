"""A whole recipe over many rows: rows per second of every step, wall time, and peak memory of all processes together.

    python -m benchmarks.recipe [--rows 1000000] [--workers 2] [--datasketch 100000] [--folder DIR]

The recipe: read JSON lines, normalize, filter (lengths, turns, stock phrases, repetition), exact and near-duplicates,
decontamination against three evaluation sets, the split with its near-duplicate prompts. Rows are those of
``benchmarks.dedup``, random words with planted copies, and in one of a thousand stands an evaluation item. A step's
rate is the rows it got over its seconds, summed over processes; ``storage`` is reading and writing shards.
``--datasketch N`` also runs near-duplicate removal on N such rows beside datasketch. Memory is the sum of the
processes' proportional set sizes, sampled five times a second.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from align.config.recipe.recipe import Recipe
from align.data.builds.build import Build
from align.data.builds.workers import BuildResources
from benchmarks import dedup

SETS, ITEMS = 3, 500


def prepare(folder: Path, rows: int, seed: int) -> None:
    """Write ``rows.jsonl``, ``set0.jsonl`` and so on; reuses rows that are there."""
    if not (folder / "truth.json").exists():
        dedup.generate(folder, rows, seed)
    rng = random.Random(seed)
    items = [[f"item{rng.randrange(10_000):x}" for _ in range(rng.randrange(10, 40))] for _ in range(SETS * ITEMS)]
    for number in range(SETS):
        set_items = items[number * ITEMS : (number + 1) * ITEMS]
        lines = [json.dumps({"prompt": " ".join(words)}) + "\n" for words in set_items]
        (folder / f"set{number}.jsonl").write_text("".join(lines))
    with (folder / "rows.jsonl").open() as source, (folder / "input.jsonl").open("w") as file:
        for line in source:
            record = json.loads(line)
            if rng.random() < 0.001:
                record["prompt"] += " " + " ".join(rng.choice(items))
            file.write(json.dumps({"prompt": record["prompt"], "completion": record["reply"]}) + "\n")


def recipe() -> Recipe:
    """Return the recipe that is built."""
    sets = [{"name": f"set{number}", "files": [f"set{number}.jsonl"]} for number in range(SETS)]
    return Recipe.model_validate(
        {
            "kind": "instructions",
            "sources": [{"type": "files", "paths": ["input.jsonl"], "format": "prompt_completion"}],
            "steps": [
                {"type": "normalize"},
                {
                    "type": "filter",
                    "chars": {"min_prompt": 2, "max": 8000},
                    "turns": {"max": 5},
                    "boilerplate": {},
                    "repetition": {},
                },
                {"type": "exact_duplicates"},
                {"type": "near_duplicates"},
                {"type": "decontaminate", "sets": sets},
            ],
            "test_size": 0.01,
        }
    )


class Memory(threading.Thread):
    """Samples the proportional set size of this process and its children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.going = 0, True

    def run(self) -> None:
        """Sample until ``going`` is False."""
        me = psutil.Process()
        while self.going:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.Error, AttributeError):
                    continue
            self.peak = max(self.peak, total)
            time.sleep(0.2)


def run(folder: Path, workers: int) -> dict[str, Any]:
    """Build, and return seconds and rows of each step, wall seconds and GiB."""
    memory = Memory()
    memory.start()
    work, out = folder / "work", folder / "out"
    for path in (work, out):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    build = Build(recipe(), folder, work, resources=BuildResources(workers=workers))
    began = time.perf_counter()
    ledger = build.run(out)
    wall = time.perf_counter() - began
    memory.going = False
    memory.join()
    return {
        "wall": wall,
        "gib": memory.peak / 2**30,
        "steps": [
            {"step": line["step"], "rows": line["rows_in"], "seconds": build.seconds.get(number, 0.0)}
            for number, line in enumerate(ledger["steps"])
        ],
        "storage": build.seconds.get(-1, 0.0),
        "dropped": ledger["dropped"],
        "rows_in": ledger["rows_in"],
        "digests": ledger["digests"],
    }


def show(results: dict[str, Any], workers: int) -> None:
    """Print a table of a run."""
    print(f"{results['rows_in']:,} rows on {workers} processes: {results['wall']:.0f} s, ", end="")
    print(f"{results['rows_in'] / results['wall']:,.0f} rows/s, peak {results['gib']:.2f} GiB")
    for line in [*results["steps"], {"step": "storage", "rows": results["rows_in"], "seconds": results["storage"]}]:
        if line["seconds"] > 0:
            rate = line["rows"] / line["seconds"]
            print(f"  {line['step']:<22}{line['rows']:>12,} rows{line['seconds']:>9.1f} s{rate:>12,.0f} rows/s")
    for reason, count in results["dropped"].items():
        print(f"  dropped {count:>10,}  {reason}")


def main() -> None:
    """Prepare, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--datasketch", type=int, default=0, metavar="N")
    parser.add_argument("--folder", type=Path, help="keep the rows here and use them again")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, options.rows, options.seed)
        show(run(folder, options.workers), options.workers)
    if options.datasketch:
        subprocess.run([sys.executable, "-m", "benchmarks.dedup", "--rows", str(options.datasketch)], check=True)


if __name__ == "__main__":
    main()
