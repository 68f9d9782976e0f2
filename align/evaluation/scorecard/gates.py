"""Gates and flags of a scorecard. Torch-free.

A gate is a bound that a number must satisfy; the run decides what follows from a violation. A flag is a finding that
needs attention: a regression, a proxy that rose while the truth fell, answers that collapsed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from align.config.stages.evaluation.gates import Bound, Gate
from align.config.validation import suggest
from align.errors import UserError
from align.evaluation.scorecard import SystemInfo, program_metrics

Row = dict[str, Any]
FORGETTING = 1.05
"""Factor of the default gate: bits per byte of general text at most 5 % above the base model's."""
_VIOLATED = {">=": "below", "<=": "above", ">": "not above", "<": "not below"}
_SATISFIED = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
MIN_EOS_RATE = 0.9
MAX_LENGTH_FACTOR = 2.0
Flag = dict[str, str]


def default_gates(tasks: Mapping[str, str], base: str | None, gates: Sequence[Gate] = ()) -> list[Gate]:
    """Return the default gates: forgetting against the base model, as a warning.

    ``tasks`` maps names to kinds. Every perplexity task's bits per byte may rise by 5 %; metrics in ``gates``
    get no default. Empty without a base model.
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
        systems = [_resolve(name, roles, reference) for name in gate.systems]
        return list(dict.fromkeys(name for name in systems if name is not None))
    against = None if gate.bound.system is None else _resolve(gate.bound.system, roles, reference)
    exempt = {against}
    # A gate against the base model treats the reference like any other trained checkpoint: SFT may also forget.
    if against is None or roles.get(against) != "base":
        exempt.add(reference)
    return [name for name, role in roles.items() if role == "checkpoint" and name not in exempt]


def evaluate_gates(gates: Sequence[Gate], card: Mapping[str, Any]) -> list[Row]:
    """Return a row for every gate and each of its systems; see ``scorecard_builder.py`` for the rows.

    ``low`` and ``high`` are on the scale of ``value``. If the bound names another system, they are the interval of
    the paired difference (``difference``), shifted to that scale. ``clear`` is true if the complete interval is
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
    """Return the row of a gate for a system."""
    rival_name = gate.bound.system
    rival = None if rival_name is None else _resolve(rival_name, roles, card["reference"])
    value, low, high = _numbers(card, system, gate.metric)
    rival_value = None if rival is None else _numbers(card, rival, gate.metric)[0]
    missing = None
    if value is None:
        missing = system
    elif rival_name is not None and rival_value is None:
        missing = rival or rival_name
    if value is None or missing is not None:
        text = f"{gate.title} of {system} cannot be compared with {gate.bound}: {missing} has no {gate.metric}"
        return {**_row(gate, system, text), "value": value}
    bound = gate.bound.value(rival_value or 0.0)
    difference = None if rival is None else _difference(card, system, rival, gate.metric)
    if rival is not None:
        # Against another system the paired difference decides: its interval, shifted to the scale of the value.
        low = None
        high = None
        if difference is not None:
            low = value + difference["low"] - difference["value"]
            high = value + difference["high"] - difference["value"]
    is_satisfied = gate.bound.is_satisfied(value, bound)
    # A violation is clear if even the interval's end nearest to the bound violates it.
    best = high if gate.bound.operator in (">=", ">") else low
    is_clear = not is_satisfied and best is not None and not gate.bound.is_satisfied(best, bound)
    passed: bool | None = is_satisfied
    # By the interval a gate fails only if the violation is clear; without an interval it is undecided.
    if gate.decide == "interval" and not is_satisfied:
        passed = None if best is None else not is_clear
    text = f"{gate.title} of {system} is {_comparison(gate.bound, value, bound, is_satisfied)}"
    if difference is not None:
        interval = f"95 % interval {difference['low']:+.3g} to {difference['high']:+.3g}"
        text += f" ({system} - {rival}: {difference['value']:+.3g}, {interval})"
    elif rival is not None:
        gap = value - (rival_value or 0.0)
        text += f" ({system} - {rival}: {gap:+.3g}, no interval: the scorecard does not compare them)"
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


def _numbers(card: Mapping[str, Any], system: str, metric: str) -> list[float | None]:
    """Return a system's value in a metric, and both ends of its interval; None for a number that is missing."""
    estimate = (card["estimates"].get(system) or {}).get(metric) or {}
    return [_finite(estimate.get(name)) for name in ("value", "low", "high")]


def _row(gate: Gate, system: str | None, text: str) -> Row:
    """Return a row with the fields that every row has, still undecided."""
    empty = dict.fromkeys(("value", "low", "high", "bound"))
    return {
        "name": gate.name,
        "system": system,
        "metric": gate.metric,
        "expression": str(gate.bound),
        **empty,
        "level": gate.level,
        "decide": gate.decide,
        "passed": None,
        "clear": False,
        "difference": None,
        "text": text,
    }


def _difference(card: Mapping[str, Any], system: str, rival: str, metric: str) -> Row | None:
    """Return ``system - rival`` if the scorecard compares them; None if it does not, or has no interval."""
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


def _format(number: float, digits: int = 3) -> str:
    text = f"{number:.{digits}g}"
    return text if "e" not in text or abs(number) < 1 or abs(number) >= 1e9 else f"{number:.0f}"


def _finite(value: Any) -> float | None:
    """Return a finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def find_flags(card: Mapping[str, Any]) -> list[Flag]:
    """Return the flags of a scorecard that has its estimates and differences."""
    flags = [_regression(row, card["metrics"]) for row in card["differences"] if row["verdict"] == "worse"]
    verdicts = {(row["policy"], row["against"], row["metric"]): row for row in card["differences"]}
    reference = card["reference"]
    if card["base"] is None:
        text = "the base model is not among the compared systems, so it is unknown whether training helped at all"
        flags.append({"policy": reference, "kind": "no-base", "text": text})
    # The first program decides, so it stands for the truth that a reward model is a proxy of.
    program = next(iter(program_metrics(card["metrics"])), None)
    for policy in card["policies"]:
        if policy == card["base"]:
            continue
        proxy = verdicts.get((policy, reference, "reward"))
        truth = verdicts.get((policy, reference, program))
        # The proxy's gain must be clear, while any loss in truth is a warning: that is how over-optimization begins.
        if proxy and truth and proxy["verdict"] == "better" and _is_loss(truth, card["metrics"][program]):
            text = f"{policy} pleases the reward model more than {reference} but does worse by {program}"
            flags.append({"policy": policy, "kind": "over-optimized", "text": text})
        flags += _collapse(policy, card["estimates"][policy], reference, card["estimates"][reference])
    return flags + _inconsistent_judges(card.get("win_rates", ())) + _copies(card)


def _is_loss(row: Mapping[str, Any], metric: Mapping[str, Any]) -> bool:
    return bool(row["value"] > 0) if metric["better"] == "lower" else bool(row["value"] < 0)


def _regression(row: Mapping[str, Any], metrics: Mapping[str, Any]) -> Flag:
    title = metrics[row["metric"]]["title"]
    if "." not in row["metric"]:
        title = title.lower()
    text = f"{row['policy']} is worse than {row['against']} in {title}: {row['value']:+.3g} "
    interval = f"(95 % interval {row['low']:+.3g} to {row['high']:+.3g})"
    return {"policy": row["policy"], "kind": "regression", "text": text + interval}


def _collapse(
    policy: str, estimates: Mapping[str, Any], reference: str, ref_estimates: Mapping[str, Any]
) -> list[Flag]:
    """Return flags for responses that seldom end by themselves or whose length differs by more than a factor of two."""
    flags: list[Flag] = []
    if "finished" not in estimates or "finished" not in ref_estimates:
        return flags
    finished_share = estimates["finished"]["value"]
    if finished_share is not None and finished_share < MIN_EOS_RATE:
        text = (
            f"only {finished_share:.0%} of {policy}'s responses end by themselves; the rest were cut at the token limit"
        )
        flags.append({"policy": policy, "kind": "eos", "text": text})
    length = estimates["length"]["value"]
    expected = ref_estimates["length"]["value"]
    if length and expected and not 1 / MAX_LENGTH_FACTOR <= length / expected <= MAX_LENGTH_FACTOR:
        text = f"{policy} answers with {length:.0f} tokens on average, {reference} with {expected:.0f}"
        flags.append({"policy": policy, "kind": "length", "text": text})
    return flags


def _copies(card: Mapping[str, Any]) -> list[Flag]:
    """Return a flag for each checkpoint whose second sampling repeated the first: it measures no noise."""
    originals = {system["name"]: system["of"] for system in card.get("systems", ())}
    flags = []
    for policy, tasks in card.get("copies", {}).items():
        text = (
            f"{policy} repeats {originals[policy]} word for word in {', '.join(tasks)}, so the noise was not measured "
            "there: greedy answers do not change with the seed; sample at a temperature above 0"
        )
        flags.append({"policy": policy, "kind": "noise", "text": text})
    return flags


def _inconsistent_judges(win_rates: Sequence[Mapping[str, Any]]) -> list[Flag]:
    """Return a flag for each judge that contradicts itself in most pairs once their order is swapped."""
    flags = []
    for row in win_rates:
        if row["n"] and row["disagreements"] > row["n"] / 2:
            text = (
                f"the judge of {row['task']} ({row['judge']}) contradicts itself, once answers are swapped, in "
                f"{row['disagreements']} of {row['n']} comparisons of {row['one']} and {row['other']}"
            )
            flags.append({"policy": row["one"], "kind": "judge", "text": text})
    return flags
