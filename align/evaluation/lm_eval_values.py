"""From lm-eval's samples to one number per document, so that differences between systems are paired. Torch-free.

lm-eval turns the numbers of documents into one by an *aggregation*. Those that are means, weighted or not, become
metrics here, and each is checked against lm-eval's own number. Perplexities are shown as their logarithm, which is a
mean; F1, BLEU, Matthews' correlation and the like belong to no document: they are only noted. Left out: running lm-eval
(``lm_eval_run.py``).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from align.errors import UserError
from align.evaluation.tasks.base import Metric

Form = Literal["mean", "nanmean", "log", "weighted log", "bits", "custom"]
FORMS: dict[str | None, Form] = {
    "mean": "mean",
    "nanmean": "nanmean",
    "perplexity": "log",
    "weighted_perplexity": "weighted log",
    "bits_per_byte": "bits",
    None: "custom",  # a function of the task's own: tried as a mean, and checked
}
"""lm-eval's aggregation → how a document's value enters a mean."""
SHARES = re.compile(r"^(acc|exact_match|em|prompt_level|inst_level|mc[12]|pass|f1)(_|@|$)")
TOLERANCE = 1e-6


class NotAMean(Exception):
    """lm-eval's number is no mean over documents."""


class Missing(Exception):
    """lm-eval gave no values under a metric's name."""


@dataclass(frozen=True)
class Column:
    """One metric of the scorecard: a metric and filter of lm-eval, over one task or averaged over a group's."""

    name: str
    of: str
    """The task or group, as lm-eval calls it."""
    key: str
    """``metric,filter``."""
    tasks: tuple[str, ...]
    form: Form
    better: bool | None
    by_size: bool | None = None
    """For a group: whether its tasks count by their documents, or each as one. None for a task."""

    def shown(self) -> Metric:
        """How the scorecard shows it."""
        metric, _, chosen = self.key.partition(",")
        how = "" if chosen == "none" else f", filter {chosen}"
        log = self.form in ("log", "weighted log")
        per = metric.removesuffix("_perplexity") if metric.endswith("_perplexity") else "answer"
        unit = "bits per byte" if self.form == "bits" else f"nats per {per}" if log else ""
        if not unit and SHARES.match(metric):
            unit = "share"
        meaning = f"lm-eval's {metric} of {self.of}{how}"
        if log:
            meaning = f"logarithm of {meaning}, which is a mean over documents"
        if self.by_size is not None:
            meaning += f"; {len(self.tasks)} tasks, " + (
                "by their documents" if self.by_size else "each counts the same"
            )
        better: Literal["higher", "lower"] | None = (
            None if self.better is None else "higher" if self.better else "lower"
        )
        title = f"{self.of} {metric}" + ("" if chosen == "none" else f" ({chosen})") + (" (log)" if log else "")
        return Metric(title, better, unit, meaning + ".")


def columns(described: Mapping[str, Any]) -> tuple[list[Column], dict[str, str]]:
    """The metrics of what ``lm_eval_run.describe`` found, and those that no document has a value of, with the reason.

    A group that averages its tasks gives its averages alone (MMLU has 57 tasks); their numbers are the table by source.
    """
    found: list[Column] = []
    left_out: dict[str, str] = {}
    for chosen in described["selected"]:
        averages = list(_averages(chosen, described["tasks"]))
        found += averages
        for task in () if averages else chosen["tasks"]:
            found += _own(task, described["tasks"][task], left_out)
    twice = [name for name, count in Counter(column.name for column in found).items() if count > 1]
    if twice:
        raise UserError(f"two metrics of lm-eval would both be called {twice[0]}; name their tasks in two entries.")
    return found, left_out


def _own(task: str, one: Mapping[str, Any], left_out: dict[str, str]) -> list[Column]:
    found = []
    for metric in one["metrics"]:
        form = FORMS.get(metric["aggregation"])
        if form is None:
            left_out[f"{task} {metric['metric']}"] = (
                f"its aggregation, {metric['aggregation']}, is no mean over documents"
            )
            continue
        for chosen in one["filters"]:
            name = column_name(task, metric["metric"], chosen, one["filters"])
            found.append(Column(name, task, f"{metric['metric']},{chosen}", (task,), form, metric["better"]))
    return found


def _averages(chosen: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[Column]:
    found = []
    for average in chosen["averaged"]:
        forms: dict[str, set[Form | None]] = {}
        members: dict[str, list[str]] = {}
        better = None
        for task in chosen["tasks"]:
            for metric in tasks[task]["metrics"]:
                for filtered in tasks[task]["filters"] if metric["metric"] == average["metric"] else ():
                    if average["filters"] is None or filtered in average["filters"]:
                        forms.setdefault(filtered, set()).add(FORMS.get(metric["aggregation"]))
                        members.setdefault(filtered, []).append(task)
                        better = metric["better"]
        for filtered, inner in members.items():
            if len(forms[filtered]) == 1 and forms[filtered] <= {"mean", "custom", "bits"}:
                form: Any = next(iter(forms[filtered]))
                name = column_name(chosen["name"], average["metric"], filtered, list(members))
                key = f"{average['metric']},{filtered}"
                found.append(Column(name, chosen["name"], key, tuple(inner), form, better, average["by_size"]))
    return found


def column_name(task: str, metric: str, chosen: str, filters: Sequence[str]) -> str:
    """``gsm8k_exact_match_strict``: the filter stands there where a task has several, its ``-match`` cut off."""
    parts = [task, metric]
    if len(filters) > 1:
        short = [re.sub(r"[-_](match|extract)$", "", one) for one in filters]
        parts.append(short[list(filters).index(chosen)] if len(set(short)) == len(short) else chosen)
    return "_".join(re.sub(r"\W+", "_", part).strip("_") for part in parts)


def numbers(
    column: Column, found: Mapping[str, Any], order: Mapping[tuple[str, int], int]
) -> tuple[list[float], list[float]]:
    """A value and a weight for each item; weight 0 for those of other tasks.

    ``found`` is what ``lm_eval_run.evaluate`` returns, ``order`` gives the place of (task, document). Raises
    ``Missing``, ``NotAMean``, and ``RuntimeError`` where values have gaps or do not give the number that lm-eval has.
    """
    values, weights = [0.0] * len(order), [0.0] * len(order)
    there = [task for task in column.tasks if column.key in found["values"].get(task, {})]
    if not there:
        raise Missing(column.key)
    for task in there:
        rows = [(order[task, document], *_entry(column, raw)) for document, raw in found["values"][task][column.key]]
        scale = 1.0
        if column.by_size is not None:
            size = max(map(len, found["values"][task].values())) if column.by_size else 1
            scale = size / sum(weight for _, _, weight in rows)
        for place, value, weight in rows:
            values[place], weights[place] = value, weight * scale
    _check(column, values, weights, found)
    used = [weight for weight in weights if weight]
    if max(used) - min(used) <= TOLERANCE * max(used):  # a plain mean: exactly one, so that it is seen as one
        weights = [1.0 if weight else 0.0 for weight in weights]
    return values, weights


def _entry(column: Column, raw: Any) -> tuple[float, float]:
    """A document's value and weight."""
    form = column.form
    if form in ("weighted log", "bits") and isinstance(raw, list) and len(raw) == 2:  # log-likelihood, units of text
        loss = -raw[0] / raw[1] if raw[1] else 0.0
        return (loss / math.log(2) if form == "bits" else loss), raw[1]
    if form == "custom" and isinstance(raw, list):  # several outcomes in a document, pooled
        return (sum(raw) / len(raw) if raw else 0.0), float(len(raw))
    if isinstance(raw, float) and form in ("mean", "nanmean", "custom", "log"):
        return (-raw if form == "log" else raw), 1.0
    if raw is None and form == "nanmean":
        return 0.0, 0.0
    if form == "custom":
        raise NotAMean(column.key)
    raise RuntimeError(f"lm-eval gave {raw!r} as a document's {column.key} of {column.of}, where a number was expected")


def _check(column: Column, values: list[float], weights: list[float], found: Mapping[str, Any]) -> None:
    total = sum(weights)
    own = sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else math.nan
    if column.form in ("log", "weighted log"):
        own = math.exp(own)
    theirs = found["aggregates"].get(column.of, {}).get(column.key)
    if isinstance(theirs, float) and math.isclose(own, theirs, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        return
    if column.form == "custom":
        raise NotAMean(column.key)
    raise RuntimeError(
        f"lm-eval's {column.key} of {column.of} is {theirs}, and its documents give {own}: its aggregation is not what "
        "align takes it for. Report this, with the version of lm-eval."
    )
