"""The ``gates`` block: bounds on a scorecard's numbers, read from YAML. Torch-free.

``ifeval.prompt_strict: ">= sft - 0.02"`` is a metric, an operator, and a number or another system's number with a
number added, subtracted or multiplied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from align.config.base import Config
from align.config.validation import suggest, validate_plain

Operator = Literal[">=", "<=", ">", "<"]
Arithmetic = Literal["+", "-", "*"]

ALIASES = ("base", "reference")
"""Names that a bound may use in addition to the systems' names; a system with such a name takes precedence."""
KL_PREFIX = "kl_to_"
"""``kl_to_sft`` is the metric ``kl`` with its reference spelled out."""

_SIZE = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_BOUND = re.compile(r"(>=|<=|>|<)\s*(\S.*)", re.DOTALL)


class GateConfig(Config):
    """A gate with settings in addition to its bound."""

    bound: str
    """``>= 0.3``, ``>= sft``, ``>= sft - 0.02``, ``<= base * 1.05``; operators are >=, <=, > and <."""
    level: Literal["error", "warning"] = "error"
    """``error`` fails the run after everything was written; ``warning`` is only shown."""
    decide: Literal["value", "interval"] = "value"
    """``value``: the number itself must satisfy the bound. ``interval``: the gate fails only if the whole 95 % interval
    is beyond the bound."""
    systems: list[str] | None = Field(None, min_length=1)
    """Systems the gate applies to. The default is every trained checkpoint except the system that the bound names, and
    except the reference unless the bound is on the base model."""


GateSpec = str | GateConfig | list[str | GateConfig]
"""Value of a metric in the ``gates`` block: a bound, a bound with further settings, or a list of them."""


@dataclass(frozen=True)
class Bound:
    """An operator, and a number or a system's number with an offset or a factor."""

    operator: Operator
    system: str | None = None
    arithmetic: Arithmetic | None = None
    number: float = 0.0

    def __str__(self) -> str:
        return f"{self.operator} {self.right}"

    @property
    def right(self) -> str:
        """The text behind the operator."""
        number = repr(float(self.number)).removesuffix(".0")
        if self.system is None:
            return number
        return self.system if self.arithmetic is None else f"{self.system} {self.arithmetic} {number}"

    def value(self, system_value: float) -> float:
        """Return the bound as a number; ``system_value`` is the named system's value, if the bound names one."""
        if self.system is None:
            return self.number
        if self.arithmetic == "*":
            return system_value * self.number
        return system_value + (-self.number if self.arithmetic == "-" else self.number)

    def is_satisfied(self, value: float, bound: float) -> bool:
        """Compare ``value`` with ``bound``; numbers equal up to rounding count as equal."""
        # ``sft - 0.02`` is computed, so its last bits must not decide.
        if math.isclose(value, bound, rel_tol=1e-9, abs_tol=1e-12):
            return self.operator in (">=", "<=")
        return value > bound if self.operator in (">=", ">") else value < bound


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
    """True for a default gate, which no YAML asks for."""

    @property
    def title(self) -> str:
        """The metric as the gate spells it."""
        return self.name.rsplit("/", 1)[-1]


def parse_gates(
    raw: Mapping[str, Any],
    systems: Collection[str],
    reference: str,
    tasks: Collection[str] | None = None,
    prompt_metrics: Collection[str] | None = None,
) -> list[Gate]:
    """Return the gates of a ``gates`` block, in its order.

    ``systems`` are the compared systems' names. ``tasks`` and ``prompt_metrics`` are the tasks' names and the metrics
    of the prompt set, if they are already known: a misspelled name is then found before any stage runs. Raises
    ``ValueError`` with the place and the nearest known name.
    """
    gates = []
    for name, block in raw.items():
        place = f"gates.{name}"
        owner, metric = _split_key(place, str(name), systems, reference)
        _check_metric(place, metric, tasks, prompt_metrics)
        # One metric may have several bounds, such as a range.
        specs = list(block) if isinstance(block, list | tuple) else [block]
        if not specs:
            raise ValueError(f"{place}: no bound; write one, such as '>= 0.3'.")
        for spec in specs:
            config = _gate_config(place, spec)
            if owner is not None and config.systems is not None:
                raise ValueError(f"{place}: the key names '{owner}' already; drop `systems`, or the name in the key.")
            for system in config.systems or ():
                check_system(system, systems, place)
            chosen = tuple(config.systems) if config.systems else None
            if owner is not None:
                chosen = (owner,)
            bound = parse_bound(config.bound, systems, place)
            gates.append(Gate(str(name), metric, bound, config.level, config.decide, chosen))
    return gates


def parse_bound(text: str, systems: Collection[str], place: str) -> Bound:
    """Parse a bound; ``str`` of the result gives the text back, with single spaces.

    Raises ``ValueError``, which begins with ``place``, for text that is no bound and for a system that is not compared.
    """
    match = _BOUND.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{place}: '{text}' does not begin with >=, <=, > or <; write a bound such as '>= 0.3'.")
    operator: Operator = match[1]  # type: ignore[assignment]
    right = match[2]
    if re.fullmatch(rf"[+-]?{_SIZE}", right):
        return Bound(operator, number=_finite_number(right, place))
    # Names may contain a '-'. The longest name that fits wins, so sft-2 is a system if a system has that name.
    for name in sorted({*systems, *ALIASES}, key=len, reverse=True):
        if right == name:
            return Bound(operator, name)
        step = re.fullmatch(rf"{re.escape(name)}\s*([+*-])\s*({_SIZE})", right)
        if step is not None:
            arithmetic: Arithmetic = step[1]  # type: ignore[assignment]
            return Bound(operator, name, arithmetic, _finite_number(step[2], place))
    unknown = re.match(r"([A-Za-z][\w-]*)\s*(?:$|[+*-])", right)
    if unknown is not None:
        check_system(unknown[1], systems, place)
    hint = f" A share is a number from 0 to 1, not {right[:-1].strip()} %." if right[-1] == "%" else ""
    raise ValueError(
        f"{place}: '{text}' is not a bound; expected a number (>= 0.3), a system (>= sft), or a system and a step "
        f"(>= sft - 0.02, <= base * 1.05).{hint}"
    )


def check_system(name: str, systems: Collection[str], place: str) -> None:
    """Raise ``ValueError`` for a name that is neither a compared system nor ``base`` or ``reference``."""
    if name not in systems and name not in ALIASES:
        raise ValueError(f"{place}: there is no compared system '{name}'.{suggest(name, [*systems, *ALIASES])}")


def _finite_number(text: str, place: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{place}: {text} is too large a number.")
    return number


def _split_key(place: str, key: str, systems: Collection[str], reference: str) -> tuple[str | None, str]:
    """Split a gate's key into the system it names, if any, and the metric."""
    owner, slash, metric = key.rpartition("/")
    if slash:
        check_system(owner, systems, place)
    if metric.startswith(KL_PREFIX):
        against = metric.removeprefix(KL_PREFIX)
        if against not in (reference, "reference"):
            raise ValueError(
                f"{place}: KL is measured against the reference, '{reference}'; write {KL_PREFIX}{reference}, or make "
                f"'{against}' the reference."
            )
        metric = "kl"
    return owner if slash else None, metric


def _check_metric(
    place: str, metric: str, tasks: Collection[str] | None, prompt_metrics: Collection[str] | None
) -> None:
    task, dot, _ = metric.partition(".")
    if dot and tasks is not None and task not in tasks:
        raise ValueError(f"{place}: there is no task '{task}'.{suggest(task, tasks)}")
    if not dot and prompt_metrics is not None and metric not in prompt_metrics:
        remedy = suggest(metric, prompt_metrics)
        raise ValueError(f"{place}: there is no metric '{metric}'; a task's is spelled task.metric.{remedy}")


def _gate_config(place: str, spec: Any) -> GateConfig:
    if isinstance(spec, GateConfig):
        return spec
    if isinstance(spec, str):
        return GateConfig(bound=spec)
    if isinstance(spec, Mapping):
        return validate_plain(GateConfig, spec)
    raise ValueError(f"{place}: expected a bound such as '>= 0.3'; found {spec!r}.")
