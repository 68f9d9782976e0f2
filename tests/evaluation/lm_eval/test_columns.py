"""From lm-eval's values to items with weights: every kind of aggregation by hand, groups, and what is no mean."""

from __future__ import annotations

import math
from typing import Any

import pytest

from align.evaluation.lm_eval.columns import Column, MissingValuesError, NotAMeanError, column_name, columns, numbers
from tests.support.refusals import Refused


def column(form: Any = "mean", tasks: tuple[str, ...] = ("t",), by_size: bool | None = None, of: str = "t") -> Column:
    return Column("name", of, "m,none", tasks, form, True, by_size)


def found(aggregate: float, **rows: list[Any]) -> dict[str, Any]:
    """One metric's values by task; the aggregate is that of ``t``, or of the group ``g``."""
    values = {task: {"m,none": list(enumerate(raw))} for task, raw in rows.items()}
    return {"values": values, "aggregates": {"t": {"m,none": aggregate}, "g": {"m,none": aggregate}}}


def order(**sizes: int) -> dict[tuple[str, int], int]:
    pairs = [(task, document) for task, size in sizes.items() for document in range(size)]
    return {pair: index for index, pair in enumerate(pairs)}


def test_a_mean_and_items_of_another_task() -> None:
    values, weights = numbers(column(), found(2 / 3, t=[1.0, 0.0, 1.0]), order(other=2, t=3))
    assert values == [0.0, 0.0, 1.0, 0.0, 1.0]
    assert weights == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_bits_per_byte_is_a_ratio_of_sums() -> None:
    # 6 nats over 3 bytes and 2 over 5: (6 + 2) / 8 / ln 2, not the mean of 2 and 0.4 nats
    values, weights = numbers(column("bits"), found(1 / math.log(2), t=[[-6.0, 3.0], [-2.0, 5.0]]), order(t=2))
    assert values == pytest.approx([2 / math.log(2), 0.4 / math.log(2)])
    assert weights == [3.0, 5.0]


def test_perplexities_are_shown_as_logarithms() -> None:
    values, weights = numbers(column("weighted log"), found(math.e, t=[[-6.0, 3.0], [-2.0, 5.0]]), order(t=2))
    assert values == pytest.approx([2.0, 0.4])
    assert weights == [3.0, 5.0]
    values, weights = numbers(column("log"), found(math.exp(1.5), t=[-1.0, -2.0]), order(t=2))
    assert (values, weights) == ([1.0, 2.0], [1.0, 1.0])


def test_pooled_outcomes_weigh_what_they_are() -> None:
    # 1 of 1, 1 of 3 and none at all: 2 of 4 pooled, not the mean of 1 and 1/3
    raw = [[1.0], [1.0, 0.0, 0.0], []]
    values, weights = numbers(column("custom"), found(0.5, t=raw), order(t=3))
    assert values == pytest.approx([1.0, 1 / 3, 0.0])
    assert weights == [1.0, 3.0, 0.0]


def test_documents_without_a_number_drop_out_of_a_nanmean_alone(refused: Refused) -> None:
    values, weights = numbers(column("nanmean"), found(0.5, t=[1.0, None, 0.0]), order(t=3))
    assert (values, weights) == ([1.0, 0.0, 0.0], [1.0, 0.0, 1.0])
    refused(lambda: numbers(column("mean"), found(0.5, t=[1.0, None]), order(t=2)))


def test_a_group_counts_its_tasks_by_size_or_each_as_one() -> None:
    raw: dict[str, list[Any]] = {"a": [1.0, 1.0, 1.0, 0.0], "b": [0.0]}
    by_size = column(tasks=("a", "b"), by_size=True, of="g")
    assert numbers(by_size, found(3 / 5, **raw), order(a=4, b=1))[1] == [1.0] * 5
    each_as_one = column(tasks=("a", "b"), by_size=False, of="g")
    values, weights = numbers(each_as_one, found(3 / 8, **raw), order(a=4, b=1))  # (3/4 + 0) / 2
    assert weights == pytest.approx([0.25] * 4 + [1.0])
    assert values == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_a_group_leaves_out_tasks_that_lack_the_metric() -> None:
    both = column(tasks=("a", "b"), by_size=True, of="g")
    assert numbers(both, found(0.5, a=[1.0, 0.0]), order(a=2, b=3))[1] == [1.0, 1.0, 0.0, 0.0, 0.0]
    with pytest.raises(MissingValuesError):
        numbers(both, found(0.5, c=[1.0]), order(c=1))


def test_a_number_that_is_not_lm_eval_s_is_an_error_or_no_mean(refused: Refused) -> None:
    refused(lambda: numbers(column(), found(0.9, t=[1.0, 0.0]), order(t=2)))
    with pytest.raises(NotAMeanError):
        numbers(column("custom"), found(1.0, t=[1.0, 0.0]), order(t=2))  # a maximum
    with pytest.raises(NotAMeanError):
        numbers(column("custom"), found(1.0, t=["other", "other"]), order(t=2))
    with pytest.raises(NotAMeanError):
        numbers(column("custom"), {**found(0.5, t=[1.0, 0.0]), "aggregates": {}}, order(t=2))


@pytest.mark.parametrize(
    ("task", "metric", "chosen", "filters", "name"),
    [
        ("gsm8k", "exact_match", "strict-match", ["strict-match", "flexible-extract"], "gsm8k_exact_match_strict"),
        (
            "gsm8k",
            "exact_match",
            "flexible-extract",
            ["strict-match", "flexible-extract"],
            "gsm8k_exact_match_flexible",
        ),
        ("bbh", "exact_match", "get-answer", ["get-answer"], "bbh_exact_match"),
        ("t", "acc", "x-match", ["x-match", "x-extract"], "t_acc_x_match"),
        ("a-b::c.d", "pass@1", "none", ["none"], "a_b_c_d_pass_1"),
    ],
)
def test_names(task: str, metric: str, chosen: str, filters: list[str], name: str) -> None:
    assert column_name(task, metric, chosen, filters) == name


def described(**tasks: list[tuple[str, str | None]]) -> dict[str, Any]:
    return {
        name: {
            "metrics": [{"metric": metric, "better": True, "aggregation": how} for metric, how in metrics],
            "filters": ["none"],
        }
        for name, metrics in tasks.items()
    }


def test_columns_of_tasks_and_what_is_left_out() -> None:
    tasks = described(t=[("acc", "mean"), ("f1", "f1"), ("ppl", "perplexity"), ("own", None)])
    chosen = [{"name": "t", "tasks": ["t"], "averaged": []}]
    named, left_out = columns({"selected": chosen, "tasks": tasks})
    assert [(entry.name, entry.form) for entry in named] == [("t_acc", "mean"), ("t_ppl", "log"), ("t_own", "custom")]
    assert left_out == {"t f1": "its aggregation, f1, is no mean over documents"}
    assert named[0].metric().unit == "share"
    assert named[1].metric().better == "higher", "what lm-eval says, and the logarithm does not turn it round"


def test_a_group_that_averages_gives_its_averages_alone() -> None:
    tasks = described(a=[("acc", "mean"), ("ppl", "perplexity")], b=[("acc", "mean"), ("ppl", "perplexity")])
    averaged = [
        {"metric": "acc", "filters": None, "by_size": True},
        {"metric": "ppl", "filters": None, "by_size": True},  # a mean of exponentials is none of logarithms
    ]
    chosen = {"name": "g", "tasks": ["a", "b"], "averaged": averaged}
    named, _ = columns({"selected": [chosen], "tasks": tasks})
    assert [(entry.name, entry.of, entry.tasks, entry.by_size) for entry in named] == [("g_acc", "g", ("a", "b"), True)]
    assert "2 tasks, by their documents" in named[0].metric().meaning
    chosen["averaged"] = []
    named, _ = columns({"selected": [chosen], "tasks": tasks})
    assert [entry.name for entry in named] == ["a_acc", "a_ppl", "b_acc", "b_ppl"]
    chosen["averaged"] = [{"metric": "acc", "filters": ["strict-match"], "by_size": True}]  # which no task has
    assert [entry.name for entry in columns({"selected": [chosen], "tasks": tasks})[0]] == named_of(named)


def named_of(named: list[Column]) -> list[str]:
    return [entry.name for entry in named]


def test_two_metrics_of_one_name_are_refused(refused: Refused) -> None:
    tasks = described(**{"a-b": [("acc", "mean")], "a_b": [("acc", "mean")]})
    chosen = [{"name": name, "tasks": [name], "averaged": []} for name in tasks]
    refused(columns, {"selected": chosen, "tasks": tasks})
