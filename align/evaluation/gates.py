"""Gates: bounds that a scorecard's numbers must satisfy. The run decides what follows from a violation. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from align.config.stages.evaluation_gates import Bound, Gate
from align.config.validation import suggest
from align.errors import UserError
from align.evaluation.tasks.base import SystemInfo

Row = dict[str, Any]

FORGETTING = 1.05
"""Factor of the default gate: bits per byte of general text at most 5 % above the base model's."""
_VIOLATED = {">=": "below", "<=": "above", ">": "not above", "<": "not below"}
_SATISFIED = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}


def default_gates(tasks: Mapping[str, str], base: str | None, gates: Sequence[Gate] = ()) -> list[Gate]:
    """Return the default gates: forgetting against the base model, as a warning.

    ``tasks`` maps names to kinds. Every perplexity task's bits per byte may rise by 5 %; metrics that have one of
    ``gates`` get no default. Empty without a base model.
    """
    if base is None:
        return []
    gated = {gate.metric for gate in gates}
    metrics = [f"{name}.bits_per_byte" for name, kind in tasks.items() if kind == "perplexity"]
    bound = Bound("<=", "base", "*", FORGETTING)
    return [Gate(name, name, bound, level="warning", automatic=True) for name in metrics if name not in gated]


def check_gates(gates: Sequence[Gate], metrics: Collection[str], systems: Sequence[SystemInfo], reference: str) -> None:
    """Raise ``UserError`` for a gate that could never be decided, before anything expensive.

    ``metrics`` are the names of all metrics that will be measured.
    """
    roles = {system.name: system.role for system in systems}
    for gate in gates:
        place = f"gates.{gate.name}"
        if gate.metric not in metrics:
            raise UserError(f"{place}: nothing measures '{gate.metric}' here.{suggest(gate.metric, metrics)}")
        for name in (*(gate.systems or ()), *([gate.bound.system] if gate.bound.system else ())):
            if _resolve(name, roles, reference) is None:
                raise UserError(f"{place}: no base model is compared; add its stage to `policies`, or name a system.")
        if not targets(gate, roles, reference):
            raise UserError(
                f"{place}: applies to no system. By default it applies to the trained checkpoints, but neither to the "
                f"reference '{reference}' nor to the system in the bound; name one: '{reference}/{gate.metric}'."
            )


def targets(gate: Gate, roles: Mapping[str, str], reference: str) -> list[str]:
    """Return the systems a gate applies to; ``roles`` maps every compared system's name to its role."""
    if gate.systems is not None:
        named = [_resolve(name, roles, reference) for name in gate.systems]
        return list(dict.fromkeys(name for name in named if name is not None))
    against = None if gate.bound.system is None else _resolve(gate.bound.system, roles, reference)
    exempt = {against}
    # Compared with the base model, the reference is a trained checkpoint like any other: SFT may forget too.
    if against is None or roles.get(against) != "base":
        exempt.add(reference)
    return [name for name, role in roles.items() if role == "checkpoint" and name not in exempt]


def evaluate_gates(gates: Sequence[Gate], card: Mapping[str, Any]) -> list[Row]:
    """Return a row for every gate and each of its systems; see ``scorecard.py`` for the rows.

    ``low`` and ``high`` are on the scale of ``value``. Where the bound names another system, they are the interval of
    the paired difference (``difference``), shifted to that scale. ``clear`` is true where the interval lies entirely
    beyond the bound. A missing number makes ``passed`` null.
    """
    roles = {system["name"]: system["role"] for system in card["systems"]}
    rows = []
    for gate in gates:
        systems = targets(gate, roles, card["reference"])
        rows += [_evaluate(gate, name, card, roles) for name in systems]
        if not systems and not gate.automatic:
            rows.append(_row(gate, None, f"{gate.title} {gate.bound} applies to no compared system"))
    return rows


def failed_gates(rows: Sequence[Row]) -> list[str]:
    """Return the texts of the gates that fail a run: level ``error``, and violated or undecided."""
    return [row["text"] for row in rows if row["level"] == "error" and row["passed"] is not True]


def _resolve(name: str, roles: Mapping[str, str], reference: str) -> str | None:
    """Return the system behind a name or an alias; None for ``base`` without a base model."""
    if name in roles:
        return name
    if name == "reference":
        return reference
    if name == "base":
        return next((system for system, role in roles.items() if role == "base"), None)
    return None


def _evaluate(gate: Gate, system: str, card: Mapping[str, Any], roles: Mapping[str, str]) -> Row:
    """Return the row of one gate and one of its systems."""
    named = gate.bound.system
    rival = None if named is None else _resolve(named, roles, card["reference"])
    estimate = _estimate(card, system, gate.metric)
    value = _finite(estimate.get("value"))
    rival_value = None if rival is None else _finite(_estimate(card, rival, gate.metric).get("value"))
    missing = None
    if value is None:
        missing = system
    elif named is not None and rival_value is None:
        missing = rival or named
    if value is None or missing is not None:
        text = f"{gate.title} of {system} cannot be compared with {gate.bound}: {missing} has no {gate.metric}"
        return {**_row(gate, system, text), "value": value}
    bound = gate.bound.value(rival_value or 0.0)
    difference = None if rival is None else _difference(card, system, rival, gate.metric)
    low, high = _finite(estimate.get("low")), _finite(estimate.get("high"))
    if rival is not None:
        # Against another system the paired difference decides: its interval, shifted to the scale of the value.
        low, high = None, None
        if difference is not None:
            low = value + difference["low"] - difference["value"]
            high = value + difference["high"] - difference["value"]
    is_satisfied = gate.bound.is_satisfied(value, bound)
    # A violation is clear if even the interval's end nearest to the bound violates it.
    best = high if gate.bound.operator in (">=", ">") else low
    is_clear = not is_satisfied and best is not None and not gate.bound.is_satisfied(best, bound)
    passed: bool | None = is_satisfied
    # By the interval a gate fails only where the violation is clear; without an interval nobody knows.
    if gate.decide == "interval" and not is_satisfied:
        passed = None if best is None else not is_clear
    text = f"{gate.title} of {system} is {_comparison(gate.bound, value, bound, is_satisfied)}"
    if rival is not None:
        gap = value - (rival_value or 0.0) if difference is None else difference["value"]
        text += f" ({system} - {rival}: {gap:+.3g}, {_interval(difference)})"
    elif low is not None and high is not None:
        text += f" (95 % interval {_format(low)} to {_format(high)})"
    return {
        **_row(gate, system, text),
        "value": value,
        "low": low,
        "high": high,
        "bound": bound,
        "passed": passed,
        "clear": is_clear,
        "difference": difference,
    }


def _estimate(card: Mapping[str, Any], system: str, metric: str) -> Mapping[str, Any]:
    return (card["estimates"].get(system) or {}).get(metric) or {}


def _row(gate: Gate, system: str | None, text: str) -> Row:
    """Return a row with the fields that every row has, still undecided."""
    return {
        "name": gate.name,
        "system": system,
        "metric": gate.metric,
        "expression": str(gate.bound),
        "value": None,
        "low": None,
        "high": None,
        "bound": None,
        "level": gate.level,
        "decide": gate.decide,
        "passed": None,
        "clear": False,
        "difference": None,
        "text": text,
    }


def _difference(card: Mapping[str, Any], system: str, rival: str, metric: str) -> Row | None:
    """Return ``system - rival`` where the scorecard compares them; None where it does not, or has no interval."""
    for row in card["differences"]:
        value, low, high = (_finite(row[name]) for name in ("value", "low", "high"))
        if row["metric"] != metric or value is None or low is None or high is None:
            continue
        if (row["policy"], row["against"]) == (system, rival):
            return {"against": rival, "value": value, "low": low, "high": high}
        if (row["policy"], row["against"]) == (rival, system):
            # The scorecard has the pair the other way round, so the signs turn and the bounds change places.
            return {"against": rival, "value": -value, "low": -high, "high": -low}
    return None


def _comparison(bound: Bound, value: float, number: float, is_satisfied: bool) -> str:
    """Format ``0.31, below sft - 0.02 = 0.36``, with as many digits as tell the two numbers apart."""
    digits = next((n for n in range(3, 12) if _format(value, n) != _format(number, n)), 3)
    side = (_SATISFIED if is_satisfied else _VIOLATED)[bound.operator]
    right = bound.right if bound.system is None else f"{bound.right} = {_format(number, digits)}"
    return f"{_format(value, digits)}, {side} {right}"


def _interval(difference: Row | None) -> str:
    if difference is None:
        return "no interval: the scorecard does not compare them"
    return f"95 % interval {difference['low']:+.3g} to {difference['high']:+.3g}"


def _format(number: float, digits: int = 3) -> str:
    text = f"{number:.{digits}g}"
    return text if "e" not in text or abs(number) < 1 or abs(number) >= 1e9 else f"{number:.0f}"


def _finite(value: Any) -> float | None:
    """Return a finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
