"""``in_flight``: what it needs of the stage and of what samples, and keys of stages without it."""

from __future__ import annotations

from typing import Any

import pytest

from align.config.base import settings_for_key
from align.config.runtime.rollouts import RolloutsConfig
from align.config.stages.best_of_n import OnlineDpoConfig
from align.config.stages.continue_from import inexactness, must_be_equal
from align.config.stages.policy_gradient import GrpoConfig, PpoConfig, RlooConfig
from tests.support.refusals import Refused

FIELDS: dict[str, Any] = {"policy": "p", "prompts": "q", "score": "gold", "learning_rate": 1e-3}
ENVIRONMENT = {"environment": {"class": "module:Class", "max_tokens": 64}}
CONTINUE = {"in_flight": "continue", "max_staleness": 1}


@pytest.mark.parametrize("kind", [PpoConfig, GrpoConfig, RlooConfig])
def test_continue_needs_staleness_and_episodes(refused: Refused, kind: type[PpoConfig]) -> None:
    assert kind(**FIELDS, **ENVIRONMENT, **CONTINUE).in_flight == "continue"
    refused(kind, **FIELDS, **ENVIRONMENT, in_flight="continue")
    refused(kind, **FIELDS, **CONTINUE)


def test_methods_without_staleness_have_no_such_field(refused: Refused) -> None:
    refused(OnlineDpoConfig, **FIELDS, **ENVIRONMENT, in_flight="continue")


def test_the_default_is_no_part_of_the_key() -> None:
    def settings(**fields: Any) -> dict[str, Any]:
        config = PpoConfig(**FIELDS, **ENVIRONMENT, max_staleness=1, **fields)
        chosen: dict[str, Any] = settings_for_key(config, config.model_dump())
        return chosen

    assert "in_flight" not in settings() and settings() == settings(in_flight="wait")
    assert settings(in_flight="continue")["in_flight"] == "continue"


def test_stored_rollouts_are_no_part_of_the_key(refused: Refused) -> None:
    def settings(**fields: Any) -> dict[str, Any]:
        config = PpoConfig(**FIELDS, **fields)
        chosen: dict[str, Any] = settings_for_key(config, config.model_dump(exclude=config.fields_outside_key()))
        return chosen

    assert settings(rollouts={"keep": 0.5, "max_gb": 0.1}) == settings()
    # Keys still count the field that stored rollouts replaced.
    assert settings()["completions"] == 8 and "rollouts" not in settings()
    for rollouts in ({"keep": 1.5}, {"keep": -0.1}, {"max_gb": 0.0}, {"gb": 1.0}):
        refused(PpoConfig, **FIELDS, rollouts=rollouts)


@pytest.mark.parametrize(
    ("rollouts", "objection"),
    [
        ({}, "but no servers sample for this stage. Set runtime.rollouts, or `in_flight: wait`."),
        ({"servers": 1, "weights": "nccl"}, "Take `weights: folder`, or `in_flight: wait`."),
        ({"servers": 2}, None),
        ({"addresses": ["http://127.0.0.1:8000"]}, None),
    ],
)
def test_continue_needs_servers_that_read_a_folder(rollouts: dict[str, Any], objection: str | None) -> None:
    config = GrpoConfig(**FIELDS, **ENVIRONMENT, **CONTINUE)
    message = config.sampling_objection(RolloutsConfig(**rollouts))
    assert (message is None) == (objection is None)
    if objection is not None:
        assert message is not None and message.endswith(objection)
    assert GrpoConfig(**FIELDS, **ENVIRONMENT).sampling_objection(RolloutsConfig(**rollouts)) is None


def test_continued_stage_keeps_in_flight_and_is_inexact() -> None:
    config = GrpoConfig(**FIELDS, **ENVIRONMENT, **CONTINUE)
    assert "in_flight" in must_be_equal(config)
    assert inexactness(config, 4, 8) == "with `in_flight: continue` the weights of every turn depend on the clock"
