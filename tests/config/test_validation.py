from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from pydantic import Field

from align.config.base import Config, stage_input
from align.config.tuning import FullTuning, LoraTuning, Tuning
from align.config.validation import suggest, validate, validate_plain
from align.errors import UserError
from align.store.artifacts import Kind
from tests.support.refusals import Refused


class Inner(Config):
    depth: int = 1


class Example(Config):
    learning_rate: float = Field(1e-4, gt=0)
    tuning: Tuning = FullTuning()
    several: list[LoraTuning] = []
    mode: Literal["fast", "slow"] = "fast"
    inner: Inner | None = None
    needed: int = 0
    block: Inner = Inner()
    policy: stage_input(Kind.MODEL, Kind.POLICY) = "sft"  # type: ignore[valid-type]
    reward: stage_input(Kind.REWARD) | list[stage_input(Kind.REWARD)] | None = None  # type: ignore[valid-type]
    targets: Literal["all-linear"] | list[str] = "all-linear"
    count: int | None = Field(None, ge=1)
    either: Inner | str = ""
    schedule: dict[float, int] = {}
    size: Annotated[int, Field(ge=1)] | Literal["all"] = "all"


def message(mapping: object) -> str:
    with pytest.raises(UserError) as caught:
        validate(Example, mapping, "p.yaml: stages.ppo")
    return str(caught.value)


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"lerning_rate": 1}, "p.yaml: stages.ppo: unknown key 'lerning_rate'. Did you mean 'learning_rate'?"),
        ({"learning_rate": -1}, "p.yaml: stages.ppo.learning_rate: should be greater than 0; found -1."),
        ({"learning_rate": "much"}, "p.yaml: stages.ppo.learning_rate: should be a valid number"),
        ({"tuning": {"metod": "lora"}}, "p.yaml: stages.ppo.tuning: unknown key 'metod'. Did you mean 'method'?"),
        ({"tuning": {"method": "lorra"}}, "stages.ppo.tuning.method: unknown value 'lorra'. Did you mean 'lora'?"),
        ({"tuning": {"method": "lora", "rnk": 1}}, "stages.ppo.tuning: unknown key 'rnk'. Did you mean 'rank'?"),
        ({"tuning": {"method": "lora", "rank": 0}}, "stages.ppo.tuning.rank: should be greater than or equal to 1"),
        ({"several": [{}, {"method": "lora", "alfa": 1}]}, "stages.ppo.several[1]: unknown key 'alfa'"),
        ({"mode": "slo"}, "stages.ppo.mode: 'slo' is none of 'fast' or 'slow'. Did you mean 'slow'?"),
        ({"inner": {"dept": 1}}, "stages.ppo.inner: unknown key 'dept'. Did you mean 'depth'?"),
        ([1], "p.yaml: stages.ppo: expected a mapping"),
        ({"either": {"dept": 1}}, "stages.ppo.either: unknown key 'dept'. Did you mean 'depth'?"),
        ({"either": {"depth": "x"}}, "stages.ppo.either.depth: should be a valid integer"),
        ({"schedule": {float("nan"): 1}}, "p.yaml: stages.ppo.schedule: the key nan should be a finite number"),
        ({"schedule": {None: 1}}, "p.yaml: stages.ppo.schedule: the key None is neither text nor a number"),
    ],
)
def test_every_mistake_is_named_with_its_place_and_remedy(mapping: object, expected: str) -> None:
    assert expected in message(mapping)


REWARD = "the name of a stage that makes RewardCheckpoint"


@pytest.mark.parametrize(
    ("mapping", "line"),
    [
        ({"reward": 5}, f"reward: should be {REWARD}, a list of these, or null; found 5."),
        ({"reward": {"a": 1}}, f"reward: should be {REWARD}, a list of these, or null; found {{'a': 1}}."),
        ({"reward": ["rm", 5]}, f"reward[1]: should be {REWARD}; found 5."),
        ({"policy": None}, "policy: should be the name of a stage that makes ModelCheckpoint or PolicyCheckpoint; "
                           "found None."),
        ({"targets": 3}, "targets: should be 'all-linear' or a list, each item a text; found 3."),
        ({"targets": "all-liner"}, "targets: should be 'all-linear' or a list, each item a text; found 'all-liner'. "
                                   "Did you mean 'all-linear'?"),
        ({"count": "x"}, "count: should be a whole number or null; found 'x'."),
        ({"count": 0}, "count: should be greater than or equal to 1; found 0."),
        ({"block": 3}, "block: should be a mapping of keys to values; found 3."),
        ({"size": 0}, "size: should be greater than or equal to 1; found 0."),
        ({"either": 3}, "either: should be a mapping of keys to values or a text; found 3."),
    ],
)  # fmt: skip
def test_field_of_several_types_has_one_message(mapping: object, line: str) -> None:
    assert message(mapping) == f"p.yaml: stages.ppo.{line}"


def test_all_mistakes_are_listed_unknown_keys_first() -> None:
    lines = message({"mode": 3, "xlearning_rate": 1}).splitlines()
    assert len(lines) == 2
    assert "xlearning_rate" in lines[0]


def test_keys_may_be_numbers() -> None:
    """As those of ``unfreeze: {at: {0: 4, 0.5: 30}}`` are."""
    assert validate(Example, {"schedule": {0: 4, 0.5: 30}}, "p.yaml").schedule == {0: 4, 0.5: 30}


def test_suggest_lists_what_is_known_when_nothing_is_near() -> None:
    assert suggest("zzz", ["alpha", "beta"]) == " Known here: alpha, beta."


class Color(Enum):
    """An enumeration of a user's stage."""

    RED = "red"


class UsersConfig(Config):
    """Types that a stage of one's own may have and YAML has no form for."""

    folder: Path
    size: tuple[int, int]
    names: frozenset[str]
    color: Color
    rate: float


def test_user_stage_accepts_tuples_and_paths(refused: Refused) -> None:
    plain = {"folder": "a/b", "size": [1, 2], "names": ["x", "x"], "color": "red", "rate": 1}
    config = validate(UsersConfig, plain, "p.yaml")
    assert config == UsersConfig(folder=Path("a/b"), size=(1, 2), names=frozenset({"x"}), color=Color.RED, rate=1.0)
    assert validate_plain(UsersConfig, config.model_dump(mode="json")) == config
    refused(validate, UsersConfig, plain | {"size": [1, "2"]}, "p.yaml")


@pytest.mark.parametrize("number", [np.int64(3), np.int32(3), np.uint8(3)])
def test_numbers_of_numpy_are_numbers(refused: Refused, number: Any) -> None:
    plain = {"folder": "a", "size": [number, 2], "names": [], "color": "red", "rate": np.float32(0.5)}
    config = validate(UsersConfig, plain, "p.yaml")
    assert (config.size, config.rate) == ((3, 2), 0.5)
    refused(lambda: validate(UsersConfig, plain | {"rate": np.float32("inf")}, "p.yaml"))
