"""Programs a minute that the verifier ``code`` runs, and the time that a comparison by ``math`` costs.

.venv/bin/python -m benchmarks.sandbox --programs 200

A program with asserts needs two isolated processes. The processor time is of this process and of those that it waited
for, which bubblewrap's descendants are not.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor

from align.verifiers.code import ProgramTests, verify
from align.verifiers.sandbox.isolation import Level, Limits, Sandbox
from align.verifiers.verdict import Verdict
from align.verifiers.workers import Comparison, WorkerPool, cores

PROGRAM = "def area(width, height):\n    return width * height\n"
TESTS = ProgramTests(asserts=("assert area(2, 3) == 6", "assert area(0, 3) == 0", "assert area(1.5, 2) == 3.0"))
CASES = ProgramTests(cases=(("2 3", "6"),))
PRINTING = "width, height = map(int, input().split())\nprint(width * height)\n"


def main() -> None:
    """Print a line for each level, and one for comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=200)
    count = parser.parse_args().programs
    print(f"{cores()} cores, load {os.getloadavg()[0]:.1f}, {count} programs")
    print("| level | tests | programs a minute | processor time each |")
    print("| --- | --- | --- | --- |")
    levels: tuple[Level, ...] = ("bubblewrap", "landlock", "unsafe")
    for level in levels:
        for name, program, tests in (("asserts", PROGRAM, TESTS), ("output", PRINTING, CASES)):
            wall, cpu = measure(Sandbox(level), program, tests, count)
            print(f"| {level} | {name} | {60 * count / wall:.0f} | {1000 * cpu / count:.0f} ms |")
    print(f"math: {1000 * measure_comparisons(count):.1f} ms wall-clock time for each comparison")


def measure(sandbox: Sandbox, program: str, tests: ProgramTests, count: int) -> tuple[float, float]:
    """Return wall-clock and processor time of ``count`` programs. Raises ``RuntimeError`` if one fails."""

    def run(_: int) -> Verdict:
        return verify(program, tests, sandbox, Limits())

    run(0)
    start, before = time.monotonic(), os.times()
    with ThreadPoolExecutor(cores()) as threads:
        verdicts = list(threads.map(run, range(count)))
    wall, after = time.monotonic() - start, os.times()
    if any(verdict.score < 1 for verdict in verdicts):
        raise RuntimeError(f"{sandbox.level}: {verdicts}")
    return wall, sum(after[:4]) - sum(before[:4])


def measure_comparisons(count: int) -> float:
    """Return the seconds of a comparison, after the start of the workers."""
    pool = WorkerPool(cores())
    comparisons = [Comparison("math", f"\\frac{{{n}}}{{7}}", f"\\boxed{{{n}/7}}", 60.0) for n in range(1, count + 1)]
    pool.verify(comparisons[: cores()])
    start = time.monotonic()
    pool.verify(comparisons)
    seconds = time.monotonic() - start
    pool.close()
    return seconds / count


if __name__ == "__main__":
    main()
