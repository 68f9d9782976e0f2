"""A sweep's file: pipeline, search space, objectives, sampler, pruning. Never imports torch."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from align.config.base import Config
from align.config.user_paths import UserPath, locate, settle
from align.config.validation import nearest, validate
from align.config.yaml import load_yaml
from align.errors import UserError
from align.pipeline.pipeline import Pipeline
from align.pipeline.registry import NAME_PATTERN


class PruneConfig(Config):
    """Pruning: trials end early if a curve of a stage is behind other trials' curves."""

    maximize: str | None = None
    """``STAGE.CURVE`` that should rise, such as ``ppo.score``."""
    minimize: str | None = None
    """``STAGE.CURVE`` that should fall, such as ``sft.loss``. If a stage chooses its checkpoint by validation rows,
    ``sft.test_loss`` is its ``validation_loss``."""
    method: Literal["successive_halving", "median"] = "successive_halving"
    """``successive_halving`` (1810.05934): of the trials at a rung, the best 1 / ``reduction`` continue; rungs
    are at ``start``, ``start * reduction``, … ``median``: a trial that is worse than the median at a step ends."""
    start: int = Field(ge=1)
    """Step of the curve before which no trial ends."""
    reduction: int = Field(2, ge=2)
    """One in so many trials continues at each rung; 3 saves more and errs more."""

    @model_validator(mode="after")
    def _one_curve(self) -> PruneConfig:
        if (self.maximize is None) == (self.minimize is None):
            raise ValueError("name one curve, as `maximize: STAGE.CURVE` or as `minimize: STAGE.CURVE`.")
        if not all(self.target.partition(".")):
            raise ValueError(f"'{self.target}' names no curve; write STAGE.CURVE, such as ppo.score.")
        return self

    @property
    def target(self) -> str:
        """``STAGE.CURVE`` of either direction."""
        return str(self.maximize if self.minimize is None else self.minimize)


class SweepConfig(Config):
    """The top level of a sweep file."""

    name: str = Field(pattern=NAME_PATTERN, max_length=50)
    """Name of the sweep; its trials are the runs ``NAME-0``, ``NAME-1``, …"""
    description: str = ""
    """Free text."""
    pipeline: UserPath
    """The pipeline's file; a relative path starts at the sweep's folder."""
    set: dict[str, Any] = Field({})
    """Overrides of the pipeline's fields in every trial, by path: ``{stages.sft.max_rows: 200}``."""
    space: dict[str, Any] = Field(min_length=1)
    """Search space: a path with its range (``{low: 1.0e-5, high: 1.0e-3, log: true}``), a list of values or named
    values; or a name of your own with a set of changes for each choice."""
    maximize: str | list[str] = Field([])
    """Objective: ``SYSTEM.METRIC`` of the scorecard (``ppo.gold``), or ``STAGE.METRIC`` of a stage's record."""
    minimize: str | list[str] = Field([])
    """Objective of which less is better. With several objectives the sweep finds the best trade-offs."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """``tpe`` learns from the trials so far (1907.10902); ``grid`` tries every combination, in order."""
    trials: int | None = Field(None, ge=1)
    """Trials in all, failed and ended ones included; 20 by default, for ``grid`` all combinations."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the sampler; with one worker the same seed tries the same values, however often it is interrupted."""
    workers: int = Field(1, ge=1)
    """Parallel trials, each a process; ``--workers`` overrides it. Changes no trial's result."""
    prune: PruneConfig | None = None
    """Pruning of trials that are behind."""

    @model_validator(mode="after")
    def _check_objectives(self) -> SweepConfig:
        # Owners and metrics are checked against the pipeline later, in ``plan.py``.
        names = [name for name, _ in self.objectives]
        if not names:
            raise ValueError(
                "no objective decides which trial is best; write `maximize: SYSTEM.METRIC`, such as ppo.gold."
            )
        for name in names:
            if not all(name.partition(".")):
                raise ValueError(f"'{name}' is no objective; write SYSTEM.METRIC, such as ppo.gold.")
            if names.count(name) > 1:
                raise ValueError(f"'{name}' is an objective twice; name it once.")
        if self.prune is not None and len(names) > 1:
            raise ValueError("prune ends trials by one objective, and there are several. Take `prune` or one out.")
        return self

    @property
    def objectives(self) -> list[tuple[str, bool]]:
        """Objectives as (name, True if higher is better)."""
        maximized = [self.maximize] if isinstance(self.maximize, str) else self.maximize
        minimized = [self.minimize] if isinstance(self.minimize, str) else self.minimize
        return [(name, True) for name in maximized] + [(name, False) for name in minimized]


def load_sweep(path: str | Path) -> SweepConfig:
    """Read and check a sweep file; ``UserError`` names file, YAML path and remedy."""
    raw = load_yaml(Path(path))
    if "stages" in raw and "pipeline" not in raw:
        raise UserError(f"{path}: a pipeline, not a sweep; `align run` runs it. A sweep says `pipeline: {path}`.")
    settled = settle(SweepConfig, locate(raw, Path(path)), Path.cwd(), str(path))
    return validate(SweepConfig, settled, str(path))


Draw = dict[str, float | int | str]
"""Name of a dimension → number, or label of a choice."""
MAX_GRID = 10_000
DIGITS = 4
"""Significant digits of a number from a continuous range: the table then shows the exact value that ran."""


class RangeConfig(Config):
    """Numbers between two bounds, both included. Integers if both bounds and the field are integers."""

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
    is_integer: bool
    log: bool
    step: float | None

    def changes(self, value: float | int | str) -> dict[str, Any]:
        """Return path → value."""
        if self.is_integer:
            return {self.name: int(value)}
        # Steps are exact multiples, which four digits could miss.
        digits = 10 if self.step else DIGITS
        # Rounding must not leave the bounds.
        rounded = float(f"{float(value):.{digits}g}")
        return {self.name: min(max(rounded, self.low), self.high)}

    def corners(self) -> list[float | int | str]:
        """Return the bounds, which are checked before anything runs."""
        return [self._typed(self.low), self._typed(self.high)]

    def points(self) -> list[float | int | str] | None:
        """Return every value, or None for a continuous range."""
        step = self.step or (1 if self.is_integer and not self.log else None)
        # A continuous range, or a logarithmic range without steps.
        if step is None:
            return None
        # In floats 0.3 / 0.1 is a little below 3; without the small number the last step would be lost.
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [self._typed(self.low + index * step) for index in range(count)]

    def _typed(self, value: float) -> float | int:
        return int(value) if self.is_integer else float(value)

    def __str__(self) -> str:
        text = f"{self.low:g} to {self.high:g}"
        if self.log:
            text += ", log scale"
        elif self.step:
            text += f", step {self.step:g}"
        return f"{text}, whole numbers" if self.is_integer else text


@dataclass(frozen=True)
class Choice:
    """A few values of a field by label, or a few sets of changes."""

    name: str
    options: Mapping[str, Mapping[str, Any]]
    """Label → path → value."""

    def changes(self, label: float | int | str) -> dict[str, Any]:
        """Return path → value."""
        return dict(self.options[str(label)])

    def corners(self) -> list[float | int | str]:
        """Return every choice."""
        return list(self.options)

    points = corners

    def __str__(self) -> str:
        return " | ".join(self.options)


Dimension = Range | Choice


def read_space(raw: Mapping[str, Any], pipeline: Pipeline, where: str) -> list[Dimension]:
    """Return the dimensions of a ``space:`` block. The field's value in ``pipeline`` says whether a range has integers.

    Raises ``UserError`` with the place of what is neither a range nor choices.
    """
    space: list[Dimension] = []
    for name, block in raw.items():
        place = f"{where}: space.{name}"
        if isinstance(block, list):
            space.append(_list_choice(name, block, place))
        elif isinstance(block, Mapping) and block and not _is_range(block):
            space.append(_named_choice(name, block, place))
        elif isinstance(block, Mapping):
            space.append(_range(name, validate(RangeConfig, block, place), pipeline, place))
        else:
            raise UserError(f"{place}: should be a list of values, or a range {{low: …, high: …}}; found {block!r}.")
    paths: set[str] = set()
    for dimension in space:
        # All values of a dimension set the same fields, so one value shows them.
        for path in dimension.changes(dimension.corners()[0]):
            if path in paths:
                raise UserError(f"{where}: space: '{path}' is varied twice; vary it in one place.")
            paths.add(path)
    return space


def _is_range(block: Mapping[str, Any]) -> bool:
    """Return True for a mapping meant as a range: a number under a name like ``low``, or values that are no blocks."""
    for key, value in block.items():
        if nearest(str(key), ("low", "high")) and not isinstance(value, Mapping):
            return True
    return not all(isinstance(value, Mapping) for value in block.values())


def _list_choice(name: str, values: list[Any], place: str) -> Choice:
    if not values:
        raise UserError(f"{place}: an empty list; write the values to try.")
    labels = [value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str) for value in values]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{place}: {label} is listed twice; write each value once.")
    return Choice(name, {label: {name: value} for label, value in zip(labels, values, strict=True)})


def _named_choice(name: str, blocks: Mapping[str, Any], place: str) -> Choice:
    """Return a choice from blocks by label: values of the field if the name is a path, else sets of changes."""
    # A path: each label names one value of that field.
    if "." in name:
        return Choice(name, {str(label): {name: value} for label, value in blocks.items()})
    options = {str(label): dict(changes) for label, changes in blocks.items()}
    first = next(iter(options.values()))
    # Trials could not be compared if one choice left a field that another sets.
    for label, changes in options.items():
        common = first.keys() & changes.keys()
        missing = [path for path in {**first, **changes} if path not in common]
        if missing:
            raise UserError(
                f"{place}.{label}: every choice must set the same fields, and '{missing[0]}' is not set in all of "
                "them; write it in each."
            )
    return Choice(name, options)


def _range(name: str, block: RangeConfig, pipeline: Pipeline, place: str) -> Range:
    numbers = [block.low, block.high] if block.step is None else [block.low, block.high, block.step]
    is_integer = all(isinstance(value, int) for value in numbers)
    # ``low: 1, high: 3`` of a float field means floats.
    is_integer = is_integer and not isinstance(current_value(pipeline, name), float)
    if not all(math.isfinite(value) for value in numbers) or block.low >= block.high:
        raise UserError(f"{place}: low must be below high; found {block.low} and {block.high}.")
    if block.log and block.low <= 0:
        raise UserError(f"{place}: a log scale begins above 0; found low {block.low}.")
    if block.log and block.step is not None:
        raise UserError(f"{place}: log and step exclude one another; a list gives values at any distance.")
    if block.step is not None and not 0 < block.step <= block.high - block.low:
        raise UserError(f"{place}.step: should be above 0 and at most {block.high - block.low:g}; found {block.step}.")
    return Range(name, block.low, block.high, is_integer, block.log, block.step)


def current_value(pipeline: Pipeline, path: str) -> Any:
    """Return the value of a field of the checked pipeline, defaults included; None if there is no such field."""
    top, _, rest = path.partition(".")
    value: Any = getattr(pipeline.config, top, None)
    if top == "stages":
        parts = rest.split(".")
        if len(parts) > 2 and parts[1] == "stages":  # stages.LOOP.stages.NAME…
            parts = parts[2:]
        name = pipeline.resolve(parts[0])
        rest = ".".join(parts[1:])
        value = pipeline.nodes[name].config if name in pipeline.nodes else None
    for part in filter(None, rest.split(".")):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value


def changes_of(space: list[Dimension], draw: Mapping[str, float | int | str]) -> dict[str, Any]:
    """Return path → value of everything that a draw sets."""
    changes: dict[str, Any] = {}
    for dimension in space:
        changes |= dimension.changes(draw[dimension.name])
    return changes


def grid(space: list[Dimension], where: str) -> list[Draw]:
    """Return every combination, the last dimension changing fastest. Raises ``UserError`` if they are too many."""
    axes: list[list[float | int | str]] = []
    for dimension in space:
        points = dimension.points()
        if points is None:
            raise UserError(
                f"{where}: space.{dimension.name}: a grid needs values to try; write a list, or a `step`, or take "
                "another sampler."
            )
        axes.append(points)
    if math.prod(len(points) for points in axes) > MAX_GRID:
        raise UserError(f"{where}: space: {math.prod(map(len, axes)):,} combinations; a grid takes up to {MAX_GRID:,}.")
    names = [dimension.name for dimension in space]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*axes)]


def first_draw(space: list[Dimension]) -> Draw:
    """Return the first bound or choice of every dimension."""
    return {dimension.name: dimension.corners()[0] for dimension in space}


def corner_draws(space: list[Dimension]) -> Iterator[tuple[str, Draw]]:
    """Yield the draws that differ from ``first_draw`` in one dimension, with its name, until each value was in one."""
    # Not all combinations of corners: their number would double with each dimension.
    first = first_draw(space)
    for dimension in space:
        for value in dimension.corners()[1:]:
            yield dimension.name, {**first, dimension.name: value}
