"""Gates: bounds on a scorecard's numbers that a run must keep, read from the YAML and held against the card.

``ifeval.prompt_strict: ">= sft - 0.02"``: a metric, an operator, and a number or another system's number with a step
added, subtracted or multiplied. Torch-free. Left out: what the run does about a gate that failed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from align.config.base import Config
from align.config.validation import suggest, validate_plain
from align.errors import UserError
from align.evaluation.bounds import Bound, check_system, parse_bound
from align.evaluation.tasks.base import SystemInfo

Row = dict[str, Any]

DRIFT = "kl_to_"
"""``kl_to_sft`` is the metric ``kl``, for the reader who wants to see what it is measured against."""
FORGETTING = 1.05
"""The default gate: bits per byte of general text at most 5 % above the base model's."""
_WRONG = {">=": "below", "<=": "above", ">": "not above", "<": "not below"}
_RIGHT = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}


class GateConfig(Config):
    """A gate with more than a bound."""

    bound: str
    """``>= 0.3``, ``>= sft``, ``>= sft - 0.02``, ``<= base * 1.05``; operators are >=, <=, > and <."""
    level: Literal["error", "warning"] = "error"
    """``error`` fails the run, after everything was written; ``warning`` is shown."""
    decide: Literal["value", "interval"] = "value"
    """``value``: the number itself must keep the bound. ``interval``: only a 95 % interval wholly beyond it fails."""
    systems: list[str] | None = Field(None, min_length=1)
    """Systems it holds for; by default every trained checkpoint but the one that the bound names and, unless the bound
    is on the base model, but the reference."""


GateSpec = str | GateConfig | list[str | GateConfig]
"""What may stand behind a metric in the YAML: a bound, a bound with more, or several of them."""


@dataclass(frozen=True)
class Gate:
    """One bound on one metric of some systems."""

    name: str
    """As the YAML spells it: ``ifeval.prompt_strict``, ``ppo/gold``, ``kl_to_sft``."""
    metric: str
    bound: Bound
    level: Literal["error", "warning"] = "error"
    decide: Literal["value", "interval"] = "value"
    systems: tuple[str, ...] | None = None
    automatic: bool = False
    """Whether nobody asked for it."""

    @property
    def shown(self) -> str:
        """The metric as the gate spells it."""
        return self.name.rsplit("/", 1)[-1]


def parse_gates(
    raw: Mapping[str, Any],
    systems: Collection[str],
    reference: str,
    tasks: Collection[str] | None = None,
    plain: Collection[str] | None = None,
) -> list[Gate]:
    """The gates of a ``gates:`` block, in its order.

    ``systems`` are the compared systems' names. ``tasks`` and ``plain``, where they are known already, are the tasks'
    names and the metrics that no task makes: a slip in them is then found before anything runs. Raises ``ValueError``
    with the place and the nearest known name.
    """
    gates = []
    for name, given in raw.items():
        place = f"gates.{name}"
        owner, metric = _split(place, str(name), systems, reference)
        _check_part(place, metric, tasks, plain)
        specs = list(given) if isinstance(given, list | tuple) else [given]
        if not specs:
            raise ValueError(f"{place}: no bound; write one, such as '>= 0.3'.")
        for spec in specs:
            config = _settings(place, spec)
            if owner is not None and config.systems is not None:
                raise ValueError(f"{place}: the key names '{owner}' already; drop `systems`, or the name in the key.")
            for system in config.systems or ():
                check_system(system, systems, place)
            chosen = (owner,) if owner is not None else tuple(config.systems) if config.systems else None
            bound = parse_bound(config.bound, systems, place)
            gates.append(Gate(str(name), metric, bound, config.level, config.decide, chosen))
    return gates


def default_gates(tasks: Mapping[str, str], base: str | None, given: Sequence[Gate] = ()) -> list[Gate]:
    """Gates that nobody has to ask for: forgetting against the base model, as a warning.

    ``tasks`` maps names to kinds. Every perplexity task's bits per byte may rise by 5 %; a metric that has a gate
    already keeps that one. None without a base model.
    """
    taken = {gate.metric for gate in given}
    metrics = [f"{name}.bits_per_byte" for name, kind in tasks.items() if kind == "perplexity"]
    bound = Bound("<=", "base", "*", FORGETTING)
    found = [Gate(name, name, bound, level="warning", automatic=True) for name in metrics if name not in taken]
    return found if base is not None else []


def check_gates(gates: Sequence[Gate], metrics: Collection[str], systems: Sequence[SystemInfo], reference: str) -> None:
    """Raise ``UserError`` for a gate that could never be decided: before anything expensive.

    ``metrics`` are the names of all that will be measured.
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
                f"{place}: holds for no system. By default the trained checkpoints are held to it, but neither the "
                f"reference '{reference}' nor the system in the bound; name one: '{reference}/{gate.metric}'."
            )


def targets(gate: Gate, roles: Mapping[str, str], reference: str) -> list[str]:
    """The systems a gate holds for; ``roles`` maps every compared system's name to its role."""
    if gate.systems is not None:
        named = [_resolve(name, roles, reference) for name in gate.systems]
        return list(dict.fromkeys(name for name in named if name is not None))
    against = None if gate.bound.system is None else _resolve(gate.bound.system, roles, reference)
    spared = {against}
    if against is None or roles.get(against) != "base":
        spared.add(reference)  # against the base it is a trained checkpoint like any other: SFT too may forget
    return [name for name, role in roles.items() if role == "checkpoint" and name not in spared]


def evaluate_gates(gates: Sequence[Gate], card: Mapping[str, Any]) -> list[Row]:
    """Every gate against a scorecard, once for each of its systems; see ``scorecard.py`` for the rows.

    ``low`` and ``high`` are on the scale of ``value``; where the bound is on another system they are as far from it as
    the ends of the paired difference are from the difference, which ``difference`` has as it is. ``clear`` says that
    they are wholly beyond the bound. A number that is missing makes ``passed`` null.
    """
    roles = {system["name"]: system["role"] for system in card["systems"]}
    rows = []
    for gate in gates:
        found = targets(gate, roles, card["reference"])
        rows += [_evaluate(gate, name, card, roles) for name in found]
        if not found and not gate.automatic:
            rows.append(_row(gate, None, f"{gate.shown} {gate.bound} holds for no compared system"))
    return rows


def failed_gates(rows: Sequence[Row]) -> list[str]:
    """Texts of the gates that fail a run: level ``error``, and not kept or not decided."""
    return [row["text"] for row in rows if row["level"] == "error" and row["passed"] is not True]


# -----------------------------------------------------------------------------------------------------------------


def _split(place: str, name: str, systems: Collection[str], reference: str) -> tuple[str | None, str]:
    """The system that a key names, if any, and the metric."""
    owner, slash, metric = name.rpartition("/")
    if slash:
        check_system(owner, systems, place)
    if metric.startswith(DRIFT):
        against = metric.removeprefix(DRIFT)
        if against not in (reference, "reference"):
            raise ValueError(
                f"{place}: KL is measured against the reference, '{reference}'; write {DRIFT}{reference}, or make "
                f"'{against}' the reference."
            )
        metric = "kl"
    return owner if slash else None, metric


def _check_part(place: str, metric: str, tasks: Collection[str] | None, plain: Collection[str] | None) -> None:
    task, dot, _ = metric.partition(".")
    if dot and tasks is not None and task not in tasks:
        raise ValueError(f"{place}: there is no task '{task}'.{suggest(task, tasks)}")
    if not dot and plain is not None and metric not in plain:
        remedy = suggest(metric, plain)
        raise ValueError(f"{place}: there is no metric '{metric}'; a task's is spelled task.metric.{remedy}")


def _settings(place: str, spec: Any) -> GateConfig:
    if isinstance(spec, GateConfig):
        return spec
    if isinstance(spec, str):
        return GateConfig(bound=spec)
    if isinstance(spec, Mapping):
        return validate_plain(GateConfig, spec)
    raise ValueError(f"{place}: expected a bound such as '>= 0.3'; found {spec!r}.")


def _resolve(name: str, roles: Mapping[str, str], reference: str) -> str | None:
    """The system behind a name or an alias; None for ``base`` where there is none."""
    if name in roles:
        return name
    if name == "reference":
        return reference
    return next((each for each, role in roles.items() if role == "base"), None) if name == "base" else None


def _evaluate(gate: Gate, system: str, card: Mapping[str, Any], roles: Mapping[str, str]) -> Row:
    named = gate.bound.system
    other = None if named is None else _resolve(named, roles, card["reference"])
    own, theirs = ((card["estimates"].get(name) or {}).get(gate.metric) or {} for name in (system, other))
    value, against = _number(own.get("value")), _number(theirs.get("value"))
    for name, number in ((system, value), *(((other or named, against),) if named is not None else ())):
        if number is None:
            text = f"{gate.shown} of {system} cannot be held to {gate.bound}: {name} has no {gate.metric}"
            return {**_row(gate, system, text), "value": value}
    assert value is not None
    bound = gate.bound.value(against or 0.0)
    difference = None if other is None else _difference(card, system, other, gate.metric)
    low, high = _number(own.get("low")), _number(own.get("high"))
    if other is not None:
        low, high = None, None
        if difference is not None:
            low, high = (value + difference[end] - difference["value"] for end in ("low", "high"))
    keeps = gate.bound.keeps(value, bound)
    best = high if gate.bound.operator in (">=", ">") else low
    clear = not keeps and best is not None and not gate.bound.keeps(best, bound)
    passed: bool | None = keeps
    if gate.decide == "interval" and not keeps:
        passed = None if best is None else not clear
    text = f"{gate.shown} of {system} is {_compared(gate.bound, value, bound, keeps)}"
    if other is not None:
        apart = value - (against or 0.0) if difference is None else difference["value"]
        text += f" ({system} - {other}: {apart:+.3g}, {_interval(difference)})"
    elif low is not None and high is not None:
        text += f" (95 % interval {_shown(low)} to {_shown(high)})"
    return {
        **_row(gate, system, text), "value": value, "low": low, "high": high, "bound": bound, "passed": passed,
        "clear": clear, "difference": difference,
    }  # fmt: skip


def _row(gate: Gate, system: str | None, text: str) -> Row:
    """What every row has; undecided until more is known."""
    return {
        "name": gate.name, "system": system, "metric": gate.metric, "expression": str(gate.bound), "value": None,
        "low": None, "high": None, "bound": None, "level": gate.level, "decide": gate.decide, "passed": None,
        "clear": False, "difference": None, "text": text,
    }  # fmt: skip


def _difference(card: Mapping[str, Any], system: str, other: str, metric: str) -> Row | None:
    """``system - other`` where the scorecard compares them; None where it does not, or has no interval."""
    for row in card["differences"]:
        found = [_number(row[name]) for name in ("value", "low", "high")]
        value, low, high = found
        if row["metric"] != metric or value is None or low is None or high is None:
            continue
        if (row["policy"], row["against"]) == (system, other):
            return {"against": other, "value": value, "low": low, "high": high}
        if (row["policy"], row["against"]) == (other, system):
            return {"against": other, "value": -value, "low": -high, "high": -low}
    return None


def _compared(bound: Bound, value: float, number: float, keeps: bool) -> str:
    """``0.31, below sft - 0.02 = 0.36``, with as many digits as tell the two apart."""
    digits = next((n for n in range(3, 12) if _shown(value, n) != _shown(number, n)), 3)
    side = (_RIGHT if keeps else _WRONG)[bound.operator]
    right = bound.right if bound.system is None else f"{bound.right} = {_shown(number, digits)}"
    return f"{_shown(value, digits)}, {side} {right}"


def _interval(difference: Row | None) -> str:
    if difference is None:
        return "no interval: the scorecard does not compare them"
    return f"95 % interval {difference['low']:+.3g} to {difference['high']:+.3g}"


def _shown(number: float, digits: int = 3) -> str:
    text = f"{number:.{digits}g}"
    return text if "e" not in text or abs(number) < 1 or abs(number) >= 1e9 else f"{number:.0f}"


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
