"""Numbers of finished stages as rows and as tables of pandas. Torch-free, and pandas is imported only for a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.evaluation.scorecard import Scorecard
from align.report.curves.metric_series import metric_values
from align.store.artifacts import Artifact, Kind
from align.store.events import read_events

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = ("stage", "system", "metric", "value", "low", "high", "n")
FRAME_TYPES = {"value": "float64", "low": "float64", "high": "float64", "n": "Int64"}
"""Types of the columns of numbers in a table, also where all are missing; ``Int64`` has missing whole numbers."""
RECORD_FIELDS = ("seconds", "peak_memory_bytes")
"""Numbers of every stage's record, beside its metrics."""
SCORECARD_SUMMARIES = ("values", "differences")
"""Parts of an evaluation's record that repeat its scorecard without intervals."""

Row = dict[str, Any]


def result_rows(artifacts: Iterable[Artifact]) -> list[Row]:
    """Return a row with ``COLUMNS`` for each number of the stages, in their order.

    Raises ``UserError`` for an evaluation whose scorecard cannot be read.
    """
    rows: list[Row] = []
    for artifact in artifacts:
        rows += [_row(artifact.stage, metric, value) for metric, value in record_numbers(artifact.record).items()]
        if artifact.kind == Kind.SCORECARD:
            card = Scorecard.read(artifact.path, artifact.stage)
            rows += [{"stage": artifact.stage, **row} for row in card.rows()]
    return rows


def record_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a stage's record by name; those of a block inside have its name and a dot in front."""
    metrics = {name: value for name, value in (record.get("metrics") or {}).items() if name not in SCORECARD_SUMMARIES}
    numbers = dict(_flatten(metrics))
    # Times that a stage measures itself leave out the start of its process; the record's count.
    return numbers | dict(_flatten({name: record.get(name) for name in RECORD_FIELDS}))


def _flatten(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in block.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def _row(stage: str, metric: str, value: float) -> Row:
    return {**dict.fromkeys(COLUMNS), "stage": stage, "metric": metric, "value": value}


def logged_rows(artifact: Artifact) -> list[Row]:
    """Return what a stage logged: a row for each step, with ``step`` and the finite numbers of that step."""
    by_step: dict[float, Row] = {}
    for event in read_events(artifact.path / "events.jsonl"):
        if event["event"] == "metrics":
            # A resumed stage logs steps again from its checkpoint; the later value replaces the lost one.
            row = by_step.setdefault(event["step"], {"step": event["step"]})
            row.update(metric_values(event))
    return [by_step[step] for step in sorted(by_step)]


def data_frame(rows: list[Row], columns: Iterable[str] | None, instead: str) -> DataFrame:
    """Return rows as a table of pandas; all ``columns`` are there even without rows.

    Raises ``UserError`` where pandas is missing; ``instead`` is the call that needs no pandas.
    """
    try:
        from pandas import DataFrame
    except ImportError:
        raise UserError(
            f"pandas is not installed, and a DataFrame needs it: `pip install pandas`. "
            f"{instead} returns the same as a list of dictionaries."
        ) from None
    return DataFrame.from_records(rows, columns=None if columns is None else list(columns))
