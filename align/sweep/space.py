"""What a sweep varies: ranges and choices over fields of a pipeline, and what one trial's draw sets. Torch-free."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from align.config.base import Config
from align.config.validation import nearest, validate
from align.errors import UserError
from align.pipeline.pipeline import Pipeline

Draw = dict[str, float | int | str]
"""Name → the number drawn, or the label of the choice."""
MAX_GRID = 10_000
DIGITS = 4
"""Significant digits of a number drawn from a continuous range: what the table shows is what ran."""


class RangeConfig(Config):
    """Numbers between two bounds, both included. Whole numbers where both bounds and the field are whole."""

    low: float | int
    """Smallest value; above 0 with ``log``."""
    high: float | int
    """Largest value."""
    log: bool = False
    """Every factor is as likely as every other: for learning rates and penalties."""
    step: float | int | None = None
    """Only low, low + step, …"""


@dataclass(frozen=True)
class Range:
    """A field with numbers between two bounds."""

    name: str
    low: float
    high: float
    whole: bool
    log: bool
    step: float | None

    def changes(self, drawn: float | int | str) -> dict[str, Any]:
        """Path → value."""
        if self.whole:
            return {self.name: int(drawn)}
        value = float(drawn)
        rounded = float(f"{value:.{10 if self.step else DIGITS}g}")
        return {self.name: min(max(rounded, self.low), self.high)}

    def corners(self) -> list[float | int | str]:
        """The bounds, which are tried in thought before anything runs."""
        return [self._typed(self.low), self._typed(self.high)]

    def points(self) -> list[float | int | str] | None:
        """Every value there is, or None where there are too many to try all."""
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [self._typed(self.low + at * step) for at in range(count)]

    def _typed(self, value: float) -> float | int:
        return int(value) if self.whole else float(value)

    def __str__(self) -> str:
        scale = ", log scale" if self.log else f", step {self.step:g}" if self.step else ""
        return f"{self.low:g} to {self.high:g}{scale}{', whole numbers' if self.whole else ''}"


@dataclass(frozen=True)
class Choice:
    """A few values of a field by label, or a few sets of changes."""

    name: str
    options: Mapping[str, Mapping[str, Any]]
    """Label → path → value."""

    def changes(self, drawn: float | int | str) -> dict[str, Any]:
        """Path → value."""
        return dict(self.options[str(drawn)])

    def corners(self) -> list[float | int | str]:
        """Every choice."""
        return list(self.options)

    def points(self) -> list[float | int | str] | None:
        """Every choice."""
        return list(self.options)

    def __str__(self) -> str:
        return " | ".join(self.options)


Dimension = Range | Choice


def read_space(raw: Mapping[str, Any], pipeline: Pipeline, where: str) -> list[Dimension]:
    """The dimensions of a ``space:`` block. Whether a range is of whole numbers the field's value in ``pipeline`` says.

    Raises ``UserError`` with the place of what is neither a range nor choices.
    """
    found: list[Dimension] = []
    for name, given in raw.items():
        place = f"{where}: space.{name}"
        if isinstance(given, list):
            found.append(_listed(name, given, place))
        elif isinstance(given, Mapping) and given and not _is_range(given):
            found.append(_named(name, given, place))
        elif isinstance(given, Mapping):
            found.append(_range(name, validate(RangeConfig, given, place), pipeline, place))
        else:
            raise UserError(f"{place}: should be a list of values, or a range {{low: …, high: …}}; found {given!r}.")
    paths = [path for one in found for path in one.changes(one.corners()[0])]
    for path in paths:
        if paths.count(path) > 1:
            raise UserError(f"{where}: space: '{path}' is varied twice; vary it in one place.")
    return found


def _is_range(given: Mapping[str, Any]) -> bool:
    """Whether a mapping is meant as a range: it has a number under one of its words, or no blocks at all."""
    close = any(nearest(str(key), ("low", "high")) and not isinstance(value, Mapping) for key, value in given.items())
    return close or not all(isinstance(value, Mapping) for value in given.values())


def _listed(name: str, given: list[Any], place: str) -> Choice:
    if not given:
        raise UserError(f"{place}: an empty list; write the values to try.")
    labels = [value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str) for value in given]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{place}: {label} stands there twice; write each value once.")
    return Choice(name, {label: {name: value} for label, value in zip(labels, given, strict=True)})


def _named(name: str, given: Mapping[str, Any], place: str) -> Choice:
    """Blocks by label: values of the field where the name is a path, else sets of changes, all of the same paths."""
    if "." in name:
        return Choice(name, {str(label): {name: value} for label, value in given.items()})
    options = {str(label): dict(changes) for label, changes in given.items()}
    first = next(iter(options.values()))
    for label, changes in options.items():
        missing = [path for path in {**first, **changes} if path not in changes or path not in first]
        if missing:
            raise UserError(
                f"{place}.{label}: every choice must set the same fields, and '{missing[0]}' is not set in all of "
                "them; write it in each."
            )
    return Choice(name, options)


def _range(name: str, given: RangeConfig, pipeline: Pipeline, place: str) -> Range:
    numbers = [given.low, given.high] if given.step is None else [given.low, given.high, given.step]
    whole = all(isinstance(value, int) for value in numbers) and not isinstance(current_value(pipeline, name), float)
    if not all(math.isfinite(value) for value in numbers) or given.low >= given.high:
        raise UserError(f"{place}: low must be below high; found {given.low} and {given.high}.")
    if given.log and given.low <= 0:
        raise UserError(f"{place}: a log scale begins above 0; found low {given.low}.")
    if given.log and given.step is not None:
        raise UserError(f"{place}: log and step exclude one another; a list gives values at any distance.")
    if given.step is not None and not 0 < given.step <= given.high - given.low:
        raise UserError(f"{place}.step: should be above 0 and at most {given.high - given.low:g}; found {given.step}.")
    return Range(name, given.low, given.high, whole, given.log, given.step)


def current_value(pipeline: Pipeline, path: str) -> Any:
    """What a field of the checked pipeline holds, defaults included; None where there is no such field."""
    top, _, rest = path.partition(".")
    at: Any = getattr(pipeline.config, top, None)
    if top == "stages":
        parts = rest.split(".")
        name, *below = parts[2:] if len(parts) > 2 and parts[1] == "stages" else parts  # below a loop's own name
        name, rest = pipeline.resolve(name), ".".join(below)
        at = pipeline.nodes[name].config if name in pipeline.nodes else None
    for part in filter(None, rest.split(".")):
        at = at.get(part) if isinstance(at, Mapping) else getattr(at, part, None)
    return at


def changes_of(space: list[Dimension], draw: Mapping[str, float | int | str]) -> dict[str, Any]:
    """Path → value of everything that a draw sets."""
    found: dict[str, Any] = {}
    for one in space:
        found |= one.changes(draw[one.name])
    return found


def grid(space: list[Dimension], where: str) -> list[Draw]:
    """Every combination, the last dimension changing fastest. Raises ``UserError`` where there is no end of them."""
    axes: list[list[float | int | str]] = []
    for one in space:
        points = one.points()
        if points is None:
            raise UserError(
                f"{where}: space.{one.name}: a grid needs values to try; write a list, or a `step`, or take another "
                "sampler."
            )
        axes.append(points)
    if math.prod(len(points) for points in axes) > MAX_GRID:
        raise UserError(f"{where}: space: {math.prod(map(len, axes)):,} combinations; a grid takes up to {MAX_GRID:,}.")
    return [dict(zip([one.name for one in space], values, strict=True)) for values in itertools.product(*axes)]


def corner_draws(space: list[Dimension]) -> Iterator[tuple[Dimension | None, Draw]]:
    """Draws that between them have every bound and every choice once: the first of all, then one changed at a time."""
    first: Draw = {one.name: one.corners()[0] for one in space}
    yield None, first
    for one in space:
        for value in one.corners()[1:]:
            yield one, {**first, one.name: value}


__all__ = ["Choice", "Dimension", "Draw", "Range", "changes_of", "corner_draws", "current_value", "grid", "read_space"]
