"""The options of a trainer are the fields of the installed class, and mistakes are named."""

import dataclasses
import re
from typing import Any

import pytest

from align.config.options import OWNED, check_trainer_options
from align.config.options.field_dumps import class_options
from align.config.stages.training import TrainingFields
from align.pipeline.registry import STAGES, load_object
from tests.support.refusals import Refused

TRL_KINDS = ("sft", "pretrain", "distill", "reward", "dpo", "kto", "cpo", "simpo", "orpo")
SFT = "trl.trainer.sft_config:SFTConfig"


def class_of(kind: str) -> str:
    path = STAGES[kind].trainer_class
    assert path is not None
    return path


def check(kind: str, options: dict[str, Any]) -> None:
    config: Any = STAGES[kind].config_class()
    check_trainer_options(config.trainer_class, options, config.model_fields, config.owned_options)


@pytest.mark.parametrize("kind", TRL_KINDS)
def test_options_equal_the_installed_dataclass(kind: str) -> None:
    real = {field.name for field in dataclasses.fields(load_object(class_of(kind))) if field.init}
    assert set(class_options(class_of(kind))) == real


def test_trainer_classes_of_stages_exist() -> None:
    stages = [stage for stage in STAGES.values() if "trainer" in stage.config_class().model_fields]
    assert len(stages) == len(TRL_KINDS) + 5  # those that learn from rollouts
    for stage in stages:
        assert stage.trainer_class not in (None, TrainingFields.trainer_class), stage.kind
        assert class_options(class_of(stage.kind)), stage.kind
    assert STAGES["data"].trainer_class is None


def test_every_owned_option_exists_somewhere() -> None:
    known = set().union(*(class_options(class_of(kind)) for kind in TRL_KINDS))
    assert set(OWNED) <= known


@pytest.mark.parametrize("kind", TRL_KINDS)
def test_defaults_of_the_class_are_accepted(kind: str) -> None:
    options = class_options(class_of(kind))
    for field in dataclasses.fields(load_object(class_of(kind))):
        if field.default not in (dataclasses.MISSING, None):
            assert options[field.name].accepts(field.default), field


def test_every_remedy_names_a_field_that_exists() -> None:
    configs: list[Any] = [stage.config_class() for stage in STAGES.values() if stage.trainer_class is not None]
    for config in configs:
        for key in class_options(config.trainer_class):
            remedy = config.owned_options.get(key, "")
            named = re.findall(r"'(\w+)'", remedy.partition(" next to ")[0]) if " next to " in remedy else []
            assert not set(named) - set(config.model_fields), (config, key, remedy)


def test_right_values_pass() -> None:
    check("sft", {"adam_beta2": 0.95, "gradient_checkpointing_kwargs": {"use_reentrant": False}})


def test_none_is_accepted_if_the_type_allows_it(refused: Refused) -> None:
    option = class_options(SFT)["ddp_backend"]
    assert option.choices and None not in option.choices
    check("sft", {"ddp_backend": None})
    refused(check, "sft", {"ddp_backend": "ncl"})
    refused(check, "sft", {"log_level": None})
