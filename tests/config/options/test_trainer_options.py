"""The options of a trainer are the fields of the installed class, and mistakes are named."""

import dataclasses
import re
import subprocess
import sys
from typing import Any

import pytest

from align.config.options import OWNED, check_trainer_options
from align.config.options.field_dumps import class_options
from align.config.stages.training import TrainingFields
from align.pipeline.registry import STAGES, load_object

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


def test_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'adam_bta2'.*SFTConfig.*Did you mean 'adam_beta2'"):
        check("sft", {"adam_bta2": 0.95})


def test_owned_key_names_our_field() -> None:
    with pytest.raises(ValueError, match=r"'num_train_epochs'.*'epochs' next to 'trainer'"):
        check("sft", {"num_train_epochs": 2})


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("save_steps", "'save_updates'"),
        ("max_steps", "'updates'"),
        ("gradient_accumulation_steps", "'rollout_batch', 'num_mini_batches' and 'micro_batch_size'"),
        ("lr_scheduler_type", "'scheduler'"),
    ],
)
def test_owned_keys_of_ppo_name_ppos_fields(key: str, ours: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' is not set here: set {ours} next to"):
        check("ppo", {key: 1})


def test_every_remedy_names_a_field_that_exists() -> None:
    configs: list[Any] = [stage.config_class() for stage in STAGES.values() if stage.trainer_class is not None]
    for config in configs:
        for key in class_options(config.trainer_class):
            remedy = config.owned_options.get(key, "")
            named = re.findall(r"'(\w+)'", remedy.partition(" next to ")[0]) if " next to " in remedy else []
            assert not set(named) - set(config.model_fields), (config, key, remedy)


def test_a_field_of_the_stage_is_known_to_be_no_option() -> None:
    """The class has no such option, but the author means the stage's."""
    with pytest.raises(ValueError, match="^'batch_size' is not set here: set 'batch_size' next to 'trainer'"):
        check("sft", {"batch_size": 8})
    with pytest.raises(ValueError, match="SFTConfig has no such option. Did you mean 'batch_size'"):
        check("sft", {"bacth_size": 8})


def test_reserved_key_names_the_field() -> None:
    check("reward", {"adam_beta1": 0.8})
    with pytest.raises(ValueError, match="'beta' is not set here: set 'beta' next to 'trainer'"):
        check("dpo", {"beta": 0.2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adam_beta2": "high"}, "should be float; found 'high'"),
        ({"full_determinism": 1}, "should be bool"),
        ({"logging_steps": True}, "every step is logged"),
        ({"loss_type": "nil"}, "one of 'nll'"),
        ({"log_level": "warn"}, "one of 'detail', 'debug', 'info', 'warning'"),  # choices that transformers computes
    ],
)
def test_wrong_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check("sft", options)


def test_right_values_pass() -> None:
    check("sft", {"adam_beta2": 0.95, "gradient_checkpointing_kwargs": {"use_reentrant": False}})


def test_none_is_accepted_if_the_type_allows_it() -> None:
    option = class_options(SFT)["ddp_backend"]
    assert option.choices and None not in option.choices
    check("sft", {"ddp_backend": None})
    with pytest.raises(ValueError, match="should be one of 'nccl'"):
        check("sft", {"ddp_backend": "ncl"})
    with pytest.raises(ValueError, match="should be str; found None"):
        check("sft", {"log_level": None})


def test_reading_options_does_not_import_torch() -> None:
    code = (
        "import sys; from align.config.options.field_dumps import class_options; "
        "from align.pipeline.registry import STAGES; "
        "[class_options(STAGES[kind].trainer_class) for kind in ('sft', 'reward', 'dpo')]; "
        "assert not {'torch', 'trl', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
