"""Metrics of lm-eval as one number per document, so differences between systems are paired. Torch-free.

lm-eval turns the numbers of documents into one by an *aggregation*. Those that are means, weighted or not, become
metrics here, and each is checked against lm-eval's own number. Perplexities are shown as their logarithm, which is a
mean. F1, BLEU, Matthews' correlation and the like belong to no document: they are only noted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.errors import UserError
from align.evaluation.scorecard import Metric

Form = Literal["mean", "nanmean", "log", "weighted log", "bits", "custom"]
FORMS: dict[str | None, Form] = {
    "mean": "mean",
    "nanmean": "nanmean",
    "perplexity": "log",
    "weighted_perplexity": "weighted log",
    "bits_per_byte": "bits",
    None: "custom",  # a function in the task: tried as a mean, and checked
}
"""lm-eval's aggregation → the transformation of a document's value into a mean's term."""
SHARES = re.compile(r"^(acc|exact_match|em|prompt_level|inst_level|mc[12]|pass|f1)(_|@|$)")
TOLERANCE = 1e-6


class NotAMeanError(Exception):
    """lm-eval's number is no mean over documents."""


class MissingValuesError(Exception):
    """lm-eval gave no values under a metric's name."""


@dataclass(frozen=True)
class Column:
    """One metric of the scorecard: a metric and filter of lm-eval, over one task or averaged over a group."""

    name: str
    of: str
    """The task or group, as lm-eval calls it."""
    key: str
    """``metric,filter``."""
    tasks: tuple[str, ...]
    form: Form
    better: bool | None
    by_size: bool | None = None
    """For a group: True if its tasks are weighted by their documents, False if equally. None for a task."""

    def metric(self) -> Metric:
        """Return the metric as the scorecard describes it."""
        metric, _, filter_name = self.key.partition(",")
        is_log = self.form in ("log", "weighted log")
        title = f"{self.of} {metric}"
        meaning = f"lm-eval's {metric} of {self.of}"
        if filter_name != "none":
            title += f" ({filter_name})"
            meaning += f", filter {filter_name}"
        if is_log:
            title += " (log)"
            meaning = f"logarithm of {meaning}, which is a mean over documents"
        if self.by_size is not None:
            weighting = "by their documents" if self.by_size else "each counts the same"
            meaning += f"; {len(self.tasks)} tasks, {weighting}"
        better: Literal["higher", "lower"] | None = None
        if self.better is not None:
            better = "higher" if self.better else "lower"
        return Metric(title, better, self._unit(metric), meaning + ".")

    def _unit(self, metric: str) -> str:
        if self.form == "bits":
            return "bits per byte"
        if self.form in ("log", "weighted log"):
            per = metric.removesuffix("_perplexity") if metric.endswith("_perplexity") else "answer"
            return f"nats per {per}"
        return "share" if SHARES.match(metric) else ""


def columns(described: Mapping[str, Any]) -> tuple[list[Column], dict[str, str]]:
    """Return the columns of described tasks (``worker.describe``), and the metrics skipped with the reason.

    Metrics without a value per document are skipped. A group that averages its tasks has columns only for
    the averages (MMLU has 57 tasks); the tasks' numbers are in the table by source.
    """
    all_columns: list[Column] = []
    left_out: dict[str, str] = {}
    for selected in described["selected"]:
        averages = _group_columns(selected, described["tasks"])
        all_columns += averages
        # A group's average stands for its tasks, which would otherwise be tested once more each.
        for task in () if averages else selected["tasks"]:
            all_columns += _task_columns(task, described["tasks"][task], left_out)
    repeated = [name for name, count in Counter(column.name for column in all_columns).items() if count > 1]
    if repeated:
        raise UserError(f"two metrics of lm-eval would both be called {repeated[0]}; name their tasks in two entries.")
    return all_columns, left_out


def _task_columns(task: str, described: Mapping[str, Any], left_out: dict[str, str]) -> list[Column]:
    task_columns = []
    for metric in described["metrics"]:
        form = FORMS.get(metric["aggregation"])
        if form is None:
            left_out[f"{task} {metric['metric']}"] = (
                f"its aggregation, {metric['aggregation']}, is no mean over documents"
            )
            continue
        for filter_name in described["filters"]:
            name = column_name(task, metric["metric"], filter_name, described["filters"])
            key = f"{metric['metric']},{filter_name}"
            task_columns.append(Column(name, task, key, (task,), form, metric["better"]))
    return task_columns


def _group_columns(selected: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[Column]:
    """Return a column for each average of a group, if its tasks all aggregate their documents in the same way."""
    group_columns = []
    for average in selected["averaged"]:
        forms: dict[str, set[Form | None]] = {}
        members: dict[str, list[str]] = {}
        better = None
        for task in selected["tasks"]:
            for metric in tasks[task]["metrics"]:
                if metric["metric"] != average["metric"]:
                    continue
                for filter_name in tasks[task]["filters"]:
                    if average["filters"] is None or filter_name in average["filters"]:
                        forms.setdefault(filter_name, set()).add(FORMS.get(metric["aggregation"]))
                        members.setdefault(filter_name, []).append(task)
                        better = metric["better"]
        for filter_name, member_tasks in members.items():
            # Tasks that turn documents into a number in different ways have no common mean.
            if len(forms[filter_name]) == 1 and forms[filter_name] <= {"mean", "custom", "bits"}:
                form: Any = next(iter(forms[filter_name]))
                group = selected["name"]
                name = column_name(group, average["metric"], filter_name, list(members))
                key = f"{average['metric']},{filter_name}"
                group_columns.append(Column(name, group, key, tuple(member_tasks), form, better, average["by_size"]))
    return group_columns


def column_name(task: str, metric: str, filter_name: str, filters: Sequence[str]) -> str:
    """Return ``gsm8k_exact_match_strict``: task, metric and, of several filters, the filter without ``-match``."""
    parts = [task, metric]
    if len(filters) > 1:
        short = [re.sub(r"[-_](match|extract)$", "", name) for name in filters]
        is_unique = len(set(short)) == len(short)
        parts.append(short[list(filters).index(filter_name)] if is_unique else filter_name)
    return "_".join(re.sub(r"\W+", "_", part).strip("_") for part in parts)


def numbers(
    column: Column, results: Mapping[str, Any], order: Mapping[tuple[str, int], int]
) -> tuple[list[float], list[float]]:
    """Return a value and a weight for each item; items of other tasks have weight 0.

    ``results`` is the result of ``worker.evaluate``; ``order`` maps (task, document) to the item's index. Raises
    ``MissingValuesError``, ``NotAMeanError``, and ``RuntimeError`` if values have gaps or do not add up to lm-eval's
    number.
    """
    values = [0.0] * len(order)
    weights = [0.0] * len(order)
    tasks = [task for task in column.tasks if column.key in results["values"].get(task, {})]
    if not tasks:
        raise MissingValuesError(column.key)
    for task in tasks:
        rows = [(order[task, document], *_term(column, raw)) for document, raw in results["values"][task][column.key]]
        # A group's mean over tasks, as weights of documents: each task's weights add up to its size, or to one.
        scale = 1.0
        if column.by_size is not None:
            size = max(map(len, results["values"][task].values())) if column.by_size else 1
            scale = size / sum(weight for _, _, weight in rows)
        for index, value, weight in rows:
            values[index] = value
            weights[index] = weight * scale
    _check_aggregate(column, values, weights, results)
    used = [weight for weight in weights if weight]
    # Weights of a plain mean become exactly 1, so statistics treat it as one.
    if max(used) - min(used) <= TOLERANCE * max(used):
        weights = [1.0 if weight else 0.0 for weight in weights]
    return values, weights


def _term(column: Column, raw: Any) -> tuple[float, float]:
    """Return a document's value and weight in the mean."""
    form = column.form
    if form in ("weighted log", "bits") and isinstance(raw, list) and len(raw) == 2:  # log-likelihood, units of text
        loss = -raw[0] / raw[1] if raw[1] else 0.0
        return (loss / math.log(2) if form == "bits" else loss), raw[1]
    if form == "custom" and isinstance(raw, list):  # several outcomes of a document, pooled
        return (sum(raw) / len(raw) if raw else 0.0), float(len(raw))
    if isinstance(raw, float) and form in ("mean", "nanmean", "custom", "log"):
        return (-raw if form == "log" else raw), 1.0
    if raw is None and form == "nanmean":
        return 0.0, 0.0
    if form == "custom":
        raise NotAMeanError(column.key)
    raise RuntimeError(f"lm-eval gave {raw!r} as a document's {column.key} of {column.of}, where a number was expected")


def _check_aggregate(column: Column, values: list[float], weights: list[float], results: Mapping[str, Any]) -> None:
    """Compare the weighted mean with lm-eval's own number. Raises ``NotAMeanError`` or ``RuntimeError``."""
    total = sum(weights)
    mean = sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else math.nan
    if column.form in ("log", "weighted log"):
        # Perplexity is the exponential of a mean, so its logarithm is what is compared.
        mean = math.exp(mean)
    # lm-eval's own number is the proof that the values were read as it means them.
    aggregate = results["aggregates"].get(column.of, {}).get(column.key)
    if isinstance(aggregate, float) and math.isclose(mean, aggregate, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        return
    if column.form == "custom":
        raise NotAMeanError(column.key)
    raise RuntimeError(
        f"lm-eval's {column.key} of {column.of} is {aggregate}, and its documents give {mean}: align misreads its "
        "aggregation. Report this, with the version of lm-eval."
    )
