"""Runs of a comparison: what is prepared once, the order of the runs, and one run of a side."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.training_peers.logs import Loop, UnreadableRun, loop_of_output, read_align
from benchmarks.training_peers.model import token_counter
from benchmarks.training_peers.process import run_measured
from benchmarks.training_peers.results import Results, Run, run_of
from benchmarks.training_peers.rows import choose_rows, read_rows, write_rows
from benchmarks.training_peers.sides import Place, command_of, environment_of
from benchmarks.training_peers.works import Settings, Work


@dataclass
class Comparison:
    """Works and sides to compare. ``executables`` has the command of each side; ``folder`` is for everything written.

    ``deadline`` is a time of ``time.monotonic``, or None; ``timeout`` limits a run (seconds).
    """

    works: list[Work]
    executables: dict[str, Path]
    settings: Settings
    rounds: int
    model: Path
    folder: Path
    results: Results
    timeout: float
    deadline: float | None = None
    keep: bool = False
    _rows: dict[str, int] = field(default_factory=dict)

    def prepare(self, data: Path, rows: int | None) -> None:
        """Write the rows of every work and note their tokens. Raises ``UserError`` where too few fit."""
        count = token_counter(self.model)
        for work in self.works:
            chosen, tokens = choose_rows(read_rows(work.kind, data), work, rows or work.rows, count)
            # Otherwise the file's first rows, which may be of one kind, would always be the step that is not counted.
            random.Random(0).shuffle(chosen)
            write_rows(chosen, work.kind, self.folder / work.name)
            self.results.expected_tokens[work.name], self._rows[work.name] = tokens, len(chosen)

    def schedule(self) -> Iterator[tuple[Work, int, str]]:
        """Yield every run: sides take turns, and so does which of them goes first."""
        sides = list(self.executables)
        for number in range(self.rounds):
            for work in self.works:
                yield from ((work, number, side) for side in (sides if number % 2 == 0 else reversed(sides)))

    def run(self, retry: bool = False) -> int:
        """Measure what is not in the results yet, and return how many runs are left. ``retry`` repeats failed ones."""
        planned = [step for step in self.schedule() if self._is_due(*step, retry=retry)]
        for position, (work, number, side) in enumerate(planned):
            # Only started where the longest run of this work so far would still end in time.
            if self.deadline is not None and time.monotonic() + self.results.longest(work.name) > self.deadline:
                return len(planned) - position
            print(f"round {number + 1}: {work.name}, {side} ...", end="", flush=True)
            run = {"work": work.name, "side": side, "round": number, **self.measure(work, side)}
            self.results.add(run)
            print(f" {summary(run)}", flush=True)
        return 0

    def _is_due(self, work: Work, number: int, side: str, retry: bool) -> bool:
        existing = self.results.find(work.name, side, number)
        return existing is None or (retry and "failure" in existing)

    def measure(self, work: Work, side: str) -> Run:
        """Run a side once, from an empty folder, and return what was measured, or its ``failure``."""
        place = Place(
            model=self.model,
            rows=self.folder / work.name,
            run=Path(tempfile.mkdtemp(prefix=f"{work.name}-{side}-", dir=self.folder)),
        )
        try:
            command = command_of(side, self.executables[side], work, self.settings, place)
            measured = run_measured(command, environment_of(side), place.run, place.run / "log.txt", self.timeout)
            try:
                run = run_of(self._loop(work, side, place, measured.lines), measured.seconds, measured.peak)
            except UnreadableRun as error:
                return {"failure": measured.failure or str(error), "seconds": measured.seconds}
            if measured.failure is not None:
                # Trained to the end and then failed, as a peer that cannot save its model does: the loop still counts.
                run["failure_after_training"] = measured.failure
            return run
        finally:
            if not self.keep:
                shutil.rmtree(place.run, ignore_errors=True)

    def _loop(self, work: Work, side: str, place: Place, lines: list[tuple[float, str]]) -> Loop:
        loop = read_align(place.run, work.kind) if side == "align" else loop_of_output(lines, place.run / "out")
        steps = self._rows[work.name] // self.settings.batch
        if len(loop.steps) != steps:
            raise UnreadableRun(f"{len(loop.steps)} steps were done; {steps} were expected")
        return loop


def summary(run: Run) -> str:
    """Return a line about a run."""
    if "failure" in run:
        return f"failed after {run['seconds']:.0f} s: {run['failure'].splitlines()[0]}"
    rate, peak = 1 / run["seconds_per_token"], run["peak_bytes"] / 2**30
    end = "failed after training" if "failure_after_training" in run else f"{run['seconds']:.0f} s"
    return f"{rate:.0f} tokens/s, {peak:.1f} GiB, {end}"
