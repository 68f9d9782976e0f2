"""``criteria`` in ``score:``, ``metrics:`` and environments: what is refused, and what of it enters keys."""

from __future__ import annotations

from typing import Any

from align.config.base import settings_for_key
from align.config.environment import EnvironmentConfig
from align.config.scores import MetricFunction, RewardEntry
from align.config.validation import validate
from align.config.verifiers import Criterion
from tests.support.refusals import Refused

JUDGE = {"endpoint": {"url": "http://127.0.0.1:9/v1", "model": "judge"}}


def entry(**fields: Any) -> RewardEntry:
    return validate(RewardEntry, {"criteria": "rubric", "judge": JUDGE} | fields, "p.yaml: score[0]")


def test_criteria_are_a_column_or_a_list() -> None:
    assert entry().label == "criteria" and entry().criteria == "rubric"
    listed = entry(criteria=["It is short.", {"criterion": "It is rude.", "weight": -0.5, "name": "rude"}])
    assert listed.criteria == [
        Criterion(criterion="It is short."), Criterion(criterion="It is rude.", weight=-0.5, name="rude")
    ]  # fmt: skip


def test_identity_has_all_that_decisions_depend_on() -> None:
    identities = [
        entry().identity(""),
        entry(criteria="other").identity(""),
        entry(criteria=["a"]).identity(""),
        entry(criteria=[{"criterion": "a", "weight": 2.0}]).identity(""),
        entry(judge={**JUDGE, "reference": "answer"}).identity(""),
        entry(judge={**JUDGE, "seed": 1}).identity(""),
        entry(retries=1).identity(""),
        entry(on_error=0).identity(""),
    ]
    assert len(set(identities)) == len(identities)
    rates = JUDGE["endpoint"] | {"concurrency": 3, "retries": 1, "timeout": 9}
    assert entry(judge={"endpoint": rates, "max_unreadable": 0.5}).identity("") == entry().identity("")


def test_metric_with_criteria_keys_by_its_identity(refused: Refused) -> None:
    def metric(**judge: Any) -> MetricFunction:
        endpoint = JUDGE["endpoint"] | judge
        return validate(MetricFunction, {"criteria": "rubric", "judge": {"endpoint": endpoint}}, "p.yaml: metrics[0]")

    assert metric().metric == "criteria"
    dumped = [settings_for_key(item, item.model_dump()) for item in (metric(), metric(concurrency=3))]
    assert dumped[0] == dumped[1]
    assert metric().identity("") == metric(concurrency=3).identity("") != metric(model="other").identity("")
    refused(validate, MetricFunction, {"math": "answer", "judge": JUDGE}, "p.yaml: metrics[0]")


def test_environment_with_criteria_has_no_budget(refused: Refused) -> None:
    def environment(**judge: Any) -> EnvironmentConfig:
        score = {"criteria": "rubric", "judge": JUDGE | judge}
        block = {"tools": ["tests.support.environments.tools:double"], "score": score, "max_tokens": 64}
        return validate(EnvironmentConfig, block, "p.yaml: environment")

    prices = JUDGE["endpoint"] | {"price_input": 1.0, "price_output": 1.0}
    refused(environment, endpoint=prices, max_cost=1.0)
    assert environment(seed=1).identity() != environment().identity()
    assert environment(endpoint=JUDGE["endpoint"] | {"retries": 1}).identity() == environment().identity()
