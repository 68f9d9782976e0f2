"""Calls of a method's function: its options, the form of its result, and errors that name function, line and rows."""

from __future__ import annotations

import dataclasses
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from align.config.own_function import OwnFunction
from align.config.scores import NAME_RULE, is_metric_name
from align.config.user_functions import check_call, load_function
from align.errors import StageFailed, shorten

Record = Any  # a frozen dataclass of ``align.methods.records``
MOST_ROWS = 3
"""Rows that an error names."""


class FunctionFailed(StageFailed):
    """An own function has raised an exception, or its result cannot be used."""


class HasRows(Protocol):
    """A micro-batch with the rows behind it."""

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows, one for each item."""


@dataclass(frozen=True)
class Result:
    """Losses that a function returned."""

    values: torch.Tensor
    metrics: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    """Further numbers, which appear as curves: a number, or a tensor with one per item or per token, detached."""

    def means(self, mask: torch.Tensor | None = None) -> dict[str, float]:
        """Return the mean of each metric; of tokens, over those in ``mask`` (B, T), and none if there are none."""
        means = {}
        for name, value in self.metrics.items():
            values = torch.as_tensor(value, dtype=torch.float32)
            if mask is not None and values.shape == mask.shape:
                values = values[mask]
            if values.numel():
                means[name] = float(values.mean())
        return means


@dataclass(frozen=True)
class Method:
    """A function with its options. Results of own functions are checked, and their failures explained."""

    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    """Import path of an own function; None for a shipped function, whose exceptions pass through."""

    @classmethod
    def own(cls, config: OwnFunction, place: str, provided: Sequence[str] = ()) -> Method:
        """Import an own function. Raises ``UserError``, which begins with ``place``, if it cannot be called."""
        function = load_function(config.function, place)
        name = config.function.rpartition(":")[2]
        check_call(function, config.options, name, place, positional=1, provided=provided)
        return cls(function, config.options, config.function)

    def __call__(
        self,
        record: Record,
        shape: tuple[int, ...],
        when: str = "",
        *,
        or_shape: tuple[int, ...] = (),
        fields: Mapping[str, float] = MappingProxyType({}),
    ) -> Result:
        """Return the function's result for ``record``, which has the ``shape``, or ``or_shape`` if there are two.

        ``fields`` are values of the stage's fields, passed to a function that has parameters of these names. ``when``
        names the step in errors. Raises ``FunctionFailed`` for an own function.
        """
        options = {name: value for name, value in fields.items() if name in self._parameters} | dict(self.options)
        if self.path is None:
            return Result(*_split(self.function(record, **options)))
        try:
            result = self.function(record, **options)
        except (StageFailed, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            detail = f"{type(error).__name__}: {str(error) or 'no message'}"
            raise FunctionFailed(self._explain(detail.rstrip("."), record, when, self._line(error))) from error
        values, metrics = _split(result)
        shapes = (shape, or_shape) if or_shape else (shape,)
        # Only in training does a part of the record have a gradient.
        learns = any(tensor.requires_grad for tensor in tensors_of(record).values())
        problem = _problem(values, shapes, learns) or _metrics_problem(metrics, values)
        if problem:
            raise FunctionFailed(self._explain(problem, record, when))
        return Result(values, {name: _detached(value, values) for name, value in metrics.items()})

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.function).parameters)

    def _explain(self, problem: str, record: HasRows, when: str, place: str = "") -> str:
        ids = [shorten(str(row.get("id", "?"))) for row in record.rows]
        rows = ", ".join(ids[:MOST_ROWS]) + (f" and {len(ids) - MOST_ROWS} more" if len(ids) > MOST_ROWS else "")
        return f"{self.path}{place}: {problem}{f', {when}' if when else ''}{f', rows {rows}' if rows else ''}"

    def _line(self, error: BaseException) -> str:
        """Return the last line of the function's own file that the exception passed, in brackets."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
        frame = (own or frames)[-1]
        return f" ({Path(frame.filename).name}:{frame.lineno})"


def tensors_of(record: Record) -> dict[str, torch.Tensor]:
    """Return the fields of a record that are tensors."""
    values = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def _problem(values: Any, shapes: Sequence[tuple[int, ...]], learns: bool) -> str | None:
    """Return why the numbers that a function returned cannot be a loss; None if they can."""
    size = " or ".join(map(str, shapes))
    if not isinstance(values, torch.Tensor):
        return f"it returned a {type(values).__name__}; return a tensor of shape {size}"
    if tuple(values.shape) not in shapes:
        scalar = "; align takes the mean" if values.dim() == 0 else ""
        return f"it returned a tensor of shape {tuple(values.shape)}; return {size}{scalar}"
    if not values.is_floating_point():
        return f"it returned numbers of type {values.dtype}; return floating-point numbers"
    if learns and not values.requires_grad:
        return "its result has no gradient; compute it from the model's values without detach(), item() or no_grad()"
    finite = torch.isfinite(values.detach())
    if not finite.all():
        place = (~finite).nonzero()[0].tolist()
        return f"it returned {values.detach()[tuple(place)].item()} at {place}; losses must be finite"
    return None


def _split(result: Any) -> tuple[Any, Any]:
    """Return the losses of a function's result, and its metrics."""
    return result if isinstance(result, tuple) and len(result) == 2 else (result, {})


def _metrics_problem(metrics: Any, losses: torch.Tensor) -> str | None:
    """Return why the second part of a function's result cannot be metrics of these losses; None if it can."""
    if not isinstance(metrics, Mapping):
        return f"its metrics are a {type(metrics).__name__}; return (losses, {{name: number}})"
    for name, value in metrics.items():
        if not is_metric_name(name):
            return f"it returned a metric called {shorten(repr(name))}; {NAME_RULE}"
        if isinstance(value, torch.Tensor) and value.numel() != 1:
            shapes = _metric_shapes(losses)
            if tuple(value.shape) not in shapes:
                size = " or ".join(map(str, shapes))
                return f"its metric '{name}' is a tensor of shape {tuple(value.shape)}; return a number, or {size}"
        elif not isinstance(value, int | float | torch.Tensor) or not math.isfinite(_number(value)):
            return f"it returned {shorten(repr(value))} as the metric '{name}'; return a finite number"
    return None


def _metric_shapes(losses: torch.Tensor) -> list[tuple[int, ...]]:
    """Return the shapes of a metric per item and per loss."""
    return list(dict.fromkeys((tuple(losses.shape[:1]), tuple(losses.shape))))


def _detached(value: float | torch.Tensor, losses: torch.Tensor) -> float | torch.Tensor:
    """Return a metric without gradient: a tensor per item or per loss, also of one element, or a number."""
    if isinstance(value, torch.Tensor) and tuple(value.shape) in _metric_shapes(losses):
        return value.detach()
    return _number(value)


def _number(value: float | torch.Tensor) -> float:
    return value.detach().item() if isinstance(value, torch.Tensor) else float(value)
