"""The results of the evidence for a GPU as one Markdown document, ready for docs/performance.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Result = dict[str, Any]
GIB = 2**30
TOLERANCE = 0.15
"""Error of the plan's memory that docs/performance.md allows."""
MISSING = "-"


def make_table(parts: dict[str, Any]) -> str:
    """Return the document: a section for each part that has results, with a table for each machine and commit."""
    sections = []
    for part, write in WRITERS.items():
        lines = []
        for items in _by_machine(parts[part]["items"]):
            measured = {name: result for name, result in items.items() if "skipped" not in result}
            *_, last = items.values()
            lines += ["", *_machine(last["machine"]), "", *(write(measured) if measured else []), *_skipped(items)]
        if lines:
            sections.append("\n".join([f"## {TITLES[part]}", *lines]))
    return "\n\n".join(sections or ["No results yet."]) + "\n"


def summarize(result: Result) -> str:
    """Return a result as a few words for the console."""
    if "failed" in result:
        return f"FAILED: {result['failed']}"
    if "passed" in result:
        return f"{result['passed']} passed, {result['skipped_tests']} skipped"
    if "stages" in result:
        return f"{len(result['stages'])} stages in {result['total']:.0f} s"
    if "equal" in result:
        return "equal bits" if result["equal"] else "different bits"
    if "gap" in result:
        return f"update {result['seconds_of_update']:.3f} s, {result['tokens_per_second']:,.0f} tokens/s"
    return f"{result['tokens_per_second']:,.0f} tokens/s, peak {result['peak'] / GIB:.2f} GiB"


def _by_machine(items: dict[str, Result]) -> list[dict[str, Result]]:
    """Return the items of each card, commit and set of versions."""
    groups: dict[str, dict[str, Result]] = {}
    for name, result in items.items():
        # The matrix rate is measured by every command, and differs a little each time.
        machine = {key: value for key, value in result["machine"].items() if key != "matrix_rate"}
        groups.setdefault(json.dumps(machine, sort_keys=True), {})[name] = result
    return list(groups.values())


def _machine(machine: dict[str, Any]) -> list[str]:
    """Return one line about the card and the versions."""
    if not machine:
        return []
    memory = "" if machine.get("memory") is None else f", {machine['memory'] / GIB:.1f} GiB"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    tiny = ". Models of two layers (`--tiny`): no figure says anything about a card" if machine.get("tiny") else ""
    commit = f"; commit {machine['commit'][:10]}" if machine.get("commit") else ""
    return [
        f"{machine['card']}{memory}, {machine['matrix_rate'] / 1e12:.3g} TFLOP/s in a bf16 product; "
        f"Python {machine['python']}, {versions}{commit}{tiny}."
    ]


def _skipped(items: dict[str, Result]) -> list[str]:
    """Return a line for each reason why items were not run."""
    reasons = Counter(result["skipped"] for result in items.values() if "skipped" in result)
    return [line for reason, count in reasons.items() for line in ("", f"Not measured: {count} items ({reason}).")]


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table's lines; a bar within a cell is escaped."""
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for row in rows:
        cells = (cell.replace("|", "\\|").replace("\n", " ") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _gib(amount: int | None) -> str:
    return MISSING if amount is None else f"{amount / GIB:.2f}"


def _percent(share: float | None, sign: str = "") -> str:
    return MISSING if share is None else f"{share:{sign}.0%}"


def _error(result: Result) -> float | None:
    """Return by how much the plan is off the peak, as a share of the peak."""
    return result["plan"] / result["peak"] - 1 if result.get("peak") else None


def _failures(items: dict[str, Result]) -> list[str]:
    """Return a list of the items that failed."""
    failures = [f"- `{name}` failed: {result['failed']}" for name, result in items.items() if "failed" in result]
    return ["", *failures] if failures else []


def _measured(items: dict[str, Result]) -> dict[str, Result]:
    return {name: result for name, result in items.items() if "failed" not in result}


# ---- the parts ----


def _tests(items: dict[str, Result]) -> list[str]:
    head = ("test", "passed", "skipped", "seconds", "")
    rows = [
        (
            f"`{name.partition('::')[2]}`",
            str(result.get("passed", MISSING)),
            str(result.get("skipped_tests", MISSING)),
            f"{result['seconds']:.0f}",
            f"FAILED: {result['failed']}" if "failed" in result else result.get("reason", ""),
        )
        for name, result in items.items()
    ]
    return _rows(head, rows)


def _training(items: dict[str, Result]) -> list[str]:
    head = ("model, stage, tuning", "tokens/s", "of the matrix rate", "sampling", "peak, GiB", "reserved, GiB",
            "plan, GiB", "off", "micro-batch", "repeated steps", "seconds")  # fmt: skip
    rows = [
        (
            name,
            f"{result['tokens_per_second']:,.0f}",
            _percent(result["share"]),
            _percent(result["sampling_share"]),
            _gib(result["peak"]),
            _gib(result["reserved"]),
            _gib(result["plan"]),
            _percent(_error(result), "+"),
            str(result["micro_batch"]),
            str(result["repeated_steps"]),
            f"{result['seconds']:.0f}",
        )
        for name, result in _measured(items).items()
    ]
    return [*_rows(head, rows), *_failures(items)]


def _plan(items: dict[str, Result]) -> list[str]:
    head = ("stage", "plan, GiB", "peak, GiB", "off", "reserved, GiB")
    measured = _measured(items)
    rows = [
        (name, _gib(result["plan"]), _gib(result["peak"]), _percent(_error(result), "+"), _gib(result["reserved"]))
        for name, result in measured.items()
    ]
    errors = [error for result in measured.values() if (error := _error(result)) is not None]
    within = sum(abs(error) <= TOLERANCE for error in errors)
    return [*_rows(head, rows), "", f"{within} of {len(errors)} are within {TOLERANCE:.0%}.", *_failures(items)]


def _peers(items: dict[str, Result]) -> list[str]:
    head = ("model, peer", "tokens/s", "peak, GiB", "reserved, GiB", "seconds")
    rows = [
        (
            name,
            f"{result['tokens_per_second']:,.0f}",
            _gib(result["peak"]),
            _gib(result["reserved"]),
            f"{result['seconds']:.0f}",
        )
        for name, result in _measured(items).items()
    ]
    return [*_rows(head, rows), *_failures(items)]


def _adapters(items: dict[str, Result]) -> list[str]:
    head = ("model, rank, way", "adapter, MB", "update, s", "full set, s", "tokens/s", "gap, nats")
    rows = [
        (
            name,
            f"{result['bytes'] / 1e6:.1f}",
            f"{result['seconds_of_update']:.3f}",
            f"{result['full_seconds']:.3f}" if "full_seconds" in result else MISSING,
            f"{result['tokens_per_second']:,.0f}",
            f"{result['gap']:.4f}",
        )
        for name, result in _measured(items).items()
    ]
    return [*_rows(head, rows), *_failures(items)]


def _determinism(items: dict[str, Result]) -> list[str]:
    head = ("stage", "two runs", "tokens/s", "SHA-256 of the weights")
    rows = [
        (
            name,
            "equal bits" if result["equal"] else "**differ**",
            f"{result['tokens_per_second']:,.0f}",
            ", ".join(f"`{digest[:12]}`" for digest in dict.fromkeys(result["sha256"])),
        )
        for name, result in items.items()
        if "equal" in result
    ]
    return [*_rows(head, rows), *_failures(items)]


def _quickstart(items: dict[str, Result]) -> list[str]:
    lines: list[str] = []
    for result in _measured(items).values():
        lines += _rows(("stage", "seconds"), [(name, f"{seconds:.0f}") for name, seconds in result["stages"].items()])
        rows = [
            (name, *(MISSING if number is None else f"{number:.3f}" for number in numbers))
            for name, numbers in result["scores"].items()
        ]
        lines += ["", f"{result['total']:.0f} s in all; PPO sampled with {result['engine']}.", ""]
        lines += _rows(("system", result["metric"], "low", "high"), rows)
    return [*lines, *_failures(items)]


def _proof(items: dict[str, Result]) -> list[str]:
    head = ("pipeline", "expected", "measured", "seconds")
    rows = [
        (f"`{name}`", result["expected"], _figures(result), f"{result['total']:.0f}")
        for name, result in _measured(items).items()
    ]
    return [*_rows(head, rows), *_failures(items)]


def _figures(result: Result) -> str:
    """Return the deciding metric of each system with its interval, or the held-out metrics."""
    if "scores" not in result:
        return ", ".join(f"{name} {value:.3f}" for name, value in result["measured"].items())
    shown = [
        f"{name} {MISSING}" if value is None else f"{name} {value:.3f} ({low:.3f} to {high:.3f})"
        for name, (value, low, high) in result["scores"].items()
    ]
    return f"{result['metric']}: {', '.join(shown)}"


TITLES = {
    "tests": "Tests of one GPU",
    "training": "Speed and memory of training",
    "plan": "Memory against the plan",
    "card": "Stages in the memory of a card of 24 GB",
    "peers": "SFT with LoRA of trl and Unsloth",
    "adapters": "An update of an adapter in vLLM",
    "determinism": "Equal bits of two runs",
    "quickstart": "Quickstart",
    "proof": "Published results",
}
WRITERS: dict[str, Callable[[dict[str, Result]], list[str]]] = {
    "tests": _tests,
    "training": _training,
    "plan": _plan,
    "card": _training,
    "peers": _peers,
    "adapters": _adapters,
    "determinism": _determinism,
    "quickstart": _quickstart,
    "proof": _proof,
}
