"""Bounds of gates: ``>= sft - 0.02`` as text and as a comparison. Torch-free."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from align.config.validation import suggest

Operator = Literal[">=", "<=", ">", "<"]
Arithmetic = Literal["+", "-", "*"]

ALIASES = ("base", "reference")
"""Names a bound may use beside those of the systems; a system that is really called so comes first."""

_SIZE = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_BOUND = re.compile(r"(>=|<=|>|<)\s*(\S.*)", re.DOTALL)


@dataclass(frozen=True)
class Bound:
    """An operator, and a number or a system's number with a step."""

    operator: Operator
    system: str | None = None
    arithmetic: Arithmetic | None = None
    number: float = 0.0

    def __str__(self) -> str:
        return f"{self.operator} {self.right}"

    @property
    def right(self) -> str:
        """What stands behind the operator."""
        number = repr(float(self.number)).removesuffix(".0")
        if self.system is None:
            return number
        return self.system if self.arithmetic is None else f"{self.system} {self.arithmetic} {number}"

    def value(self, other: float) -> float:
        """The bound as a number; ``other`` is the named system's, and means nothing where none is named."""
        if self.system is None:
            return self.number
        if self.arithmetic == "*":
            return other * self.number
        return other + (-self.number if self.arithmetic == "-" else self.number)

    def keeps(self, value: float, bound: float) -> bool:
        """Whether ``value`` is on the right side; numbers equal up to rounding count as equal."""
        if math.isclose(value, bound, rel_tol=1e-9, abs_tol=1e-12):
            return self.operator in (">=", "<=")
        return value > bound if self.operator in (">=", ">") else value < bound


def parse_bound(text: str, systems: Collection[str], place: str) -> Bound:
    """The bound that ``text`` spells; ``str`` of it gives the text back, with single spaces.

    Raises ``ValueError``, which begins with ``place``, for text that is no bound and for a system that is not compared.
    """
    match = _BOUND.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{place}: '{text}' does not begin with >=, <=, > or <; write a bound such as '>= 0.3'.")
    operator: Operator = match[1]  # type: ignore[assignment]
    right = match[2]
    if re.fullmatch(rf"[+-]?{_SIZE}", right):
        return Bound(operator, number=_number(right, place))
    # Names may hold a '-': the longest that fits is meant, so sft-2 is a system where there is one of that name.
    for name in sorted({*systems, *ALIASES}, key=len, reverse=True):
        if right == name:
            return Bound(operator, name)
        step = re.fullmatch(rf"{re.escape(name)}\s*([+*-])\s*({_SIZE})", right)
        if step is not None:
            arithmetic: Arithmetic = step[1]  # type: ignore[assignment]
            return Bound(operator, name, arithmetic, _number(step[2], place))
    named = re.match(r"([A-Za-z][\w-]*)\s*(?:$|[+*-])", right)
    if named is not None:
        check_system(named[1], systems, place)
    hint = f" A share is a number from 0 to 1: {right[:-1].strip()} % is written as one." if right[-1] == "%" else ""
    raise ValueError(
        f"{place}: '{text}' is no bound; expected a number (>= 0.3), a system (>= sft), or a system and a step "
        f"(>= sft - 0.02, <= base * 1.05).{hint}"
    )


def check_system(name: str, systems: Collection[str], place: str) -> None:
    """Raise ``ValueError`` for a name that is neither a compared system nor ``base`` or ``reference``."""
    if name not in systems and name not in ALIASES:
        raise ValueError(f"{place}: there is no compared system '{name}'.{suggest(name, [*systems, *ALIASES])}")


def _number(text: str, place: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{place}: {text} is too large a number.")
    return number
