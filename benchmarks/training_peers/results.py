"""The JSON file of a comparison: its settings, the expected tokens, and every run. A comparison resumes from it.

Written after each run by one rename, so that a killed comparison loses at most the run that was going. Torch-free.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.store.json_files import write_text_atomically
from benchmarks.training_peers.logs import Loop

Run = dict[str, Any]
"""``work``, ``side``, ``round``, and ``failure`` or what was measured (:func:`run_of`)."""


def run_of(loop: Loop, seconds: float, peak: int) -> Run:
    """Return what is kept of a run that ended well: seconds, bytes, tokens, and its steps."""
    return {
        "seconds_per_token": loop.seconds_per_token,
        "reference_seconds": loop.reference_seconds,
        "tokens": loop.tokens,
        "seconds": seconds,
        "peak_bytes": peak,
        "steps": [[step.time - loop.steps[0].time, step.tokens, step.loss] for step in loop.steps],
    }


@dataclass
class Results:
    """A comparison's file and its content. Without ``path`` nothing is kept."""

    path: Path | None
    settings: dict[str, Any]
    """Everything that two runs must have in common to be compared."""
    expected_tokens: dict[str, int] = field(default_factory=dict)
    packages: dict[str, dict[str, str]] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path | None, settings: dict[str, Any]) -> Results:
        """Read an earlier part of the comparison. Raises ``UserError`` for a file of other settings."""
        if path is None or not path.is_file():
            return cls(path, settings)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            before = content["settings"]
            results = cls(path, settings, content["expected_tokens"], content["packages"], content["runs"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path} is not a file of this benchmark; name another with --json.") from None
        changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed:
            pairs = ", ".join(f"{name} {before.get(name)!r}, now {settings.get(name)!r}" for name in sorted(changed))
            raise UserError(f"{path} was measured with other settings ({pairs}); name another file with --json.")
        return results

    def find(self, work: str, side: str, number: int) -> Run | None:
        """Return the run of a side in a round; None where there is none yet."""
        same = (run for run in self.runs if (run["work"], run["side"], run["round"]) == (work, side, number))
        return next(same, None)

    def add(self, run: Run) -> None:
        """Keep a run, in place of an earlier one of the same side and round, and write the file."""
        earlier = self.find(run["work"], run["side"], run["round"])
        if earlier is not None:
            self.runs.remove(earlier)
        self.runs.append(run)
        self.save()

    def save(self) -> None:
        """Write the file."""
        if self.path is None:
            return
        content = {
            "settings": self.settings,
            "expected_tokens": self.expected_tokens,
            "packages": self.packages,
            "runs": self.runs,
        }
        write_text_atomically(self.path, json.dumps(content, indent=1) + "\n")

    def longest(self, work: str) -> float:
        """Return the seconds of the longest run of a work so far, 0 where there is none."""
        return max((run["seconds"] for run in self.runs if run["work"] == work), default=0.0)
