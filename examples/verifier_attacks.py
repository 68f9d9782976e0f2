"""Run the cases of verifier_attacks.yaml against any verifier, and count its errors. Needs only PyYAML.

    python verifier_attacks.py my_rewards:verify --kind number --kind math [--list]

``my_rewards.verify(case)`` gets a case as a mapping (the first document of the YAML file describes its fields) and
returns True, or a score of at least 0.5, if it accepts ``case["response"]``. An exception counts as a rejection.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CORPUS = Path(__file__).with_suffix(".yaml")
Case = Mapping[str, Any]


@dataclass(frozen=True)
class Errors:
    """Errors of a verifier on the cases of one kind."""

    kind: str
    wrong: int
    """Wrong responses."""
    right: int
    false_accepts: tuple[str, ...]
    """Cases whose wrong response is accepted."""
    false_rejects: tuple[str, ...]

    def row(self) -> str:
        """Return the row of a table in Markdown."""
        return (
            f"| `{self.kind}` | {self.wrong} | {len(self.false_accepts)} | {_percent(self.false_accepts, self.wrong)} "
            f"| {self.right} | {len(self.false_rejects)} | {_percent(self.false_rejects, self.right)} |"
        )


HEAD = (
    "| kind | wrong responses | false accepts | % | right responses | false rejects | % |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)


def _percent(errors: Sequence[str], total: int) -> str:
    return f"{100 * len(errors) / total:.1f}" if total else "-"


def read_cases(path: Path = CORPUS) -> list[Case]:
    """Return the cases of the corpus."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    with path.open(encoding="utf-8") as file:
        _, cases = yaml.load_all(file, loader)
    return list(cases)


def count_errors(cases: Sequence[Case], accepted: Mapping[str, bool]) -> list[Errors]:
    """Return the errors for each kind of case. ``accepted`` has the verdict on each case by its id."""
    errors = []
    for kind in dict.fromkeys(case["kind"] for case in cases):
        wrong = [case["id"] for case in cases if (case["kind"], case["expected"]) == (kind, "wrong")]
        right = [case["id"] for case in cases if (case["kind"], case["expected"]) == (kind, "right")]
        false_accepts = tuple(id for id in wrong if accepted[id])
        false_rejects = tuple(id for id in right if not accepted[id])
        errors.append(Errors(kind, len(wrong), len(right), false_accepts, false_rejects))
    return errors


def run(verify: Callable[[Case], Any], case: Case) -> bool:
    """Return True for a response that a verifier accepts."""
    try:
        return float(verify(case)) >= 0.5
    except Exception:
        return False


def main(arguments: list[str]) -> None:
    """Print a row for each kind of case, and with ``--list`` the cases of each error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verifier", metavar="MODULE:FUNCTION")
    parser.add_argument("--kind", action="append", help="only cases of this kind; several times for several kinds")
    parser.add_argument("--list", action="store_true", help="print the id and the reason of each error")
    options = parser.parse_args(arguments)
    module, _, name = options.verifier.partition(":")
    sys.path.insert(0, "")
    verify = getattr(importlib.import_module(module), name)
    cases = [case for case in read_cases() if not options.kind or case["kind"] in options.kind]
    if not cases:
        parser.error(f"there are no cases of the kind {', '.join(options.kind)}")
    print(HEAD)
    for errors in count_errors(cases, {case["id"]: run(verify, case) for case in cases}):
        print(errors.row())
        if options.list:
            for case in cases:
                if case["id"] in errors.false_accepts + errors.false_rejects:
                    print(f"  {case['id']}: {case['why']}")


if __name__ == "__main__":
    main(sys.argv[1:])
