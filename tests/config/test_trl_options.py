"""The options read from source are those of the installed classes, and mistakes are named."""

import dataclasses
import importlib
import re
import subprocess
import sys
import time

import pytest

from align.config.stages.dpo import DpoConfig
from align.config.stages.ppo import PpoConfig
from align.config.stages.reward import RewardConfig
from align.config.stages.sft import SftConfig
from align.config.trl_options import CLASSES, OWNED, OWNED_BY_PPO, check_trainer_options, trainer_options

TRL_KINDS = ("sft", "reward", "dpo", "kto", "cpo", "orpo")


def installed(kind: str) -> type:
    """The class that the options of ``kind`` are read for, imported."""
    file, name = CLASSES[kind][1:]
    where = f"trl.experimental.{kind}" if file.startswith("experimental/") else "trl"
    return getattr(importlib.import_module(where), name)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", TRL_KINDS)
def test_options_equal_the_installed_dataclass(kind: str) -> None:
    real = {field.name for field in dataclasses.fields(installed(kind)) if field.init}
    assert set(trainer_options(kind)) == real


def test_every_owned_option_exists_somewhere() -> None:
    known = set().union(*(trainer_options(kind) for kind in TRL_KINDS))
    assert set(OWNED) <= known


@pytest.mark.parametrize("kind", TRL_KINDS)
def test_defaults_of_the_class_are_accepted(kind: str) -> None:
    for field in dataclasses.fields(installed(kind)):
        if field.default not in (dataclasses.MISSING, None):
            assert trainer_options(kind)[field.name].accepts(field.default), field


def test_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown key 'adam_bta2'.*SFTConfig.*Did you mean 'adam_beta2'"):
        check_trainer_options("sft", {"adam_bta2": 0.95})


def test_owned_key_names_our_field() -> None:
    with pytest.raises(ValueError, match=r"'num_train_epochs'.*'epochs' beside 'trainer'"):
        check_trainer_options("sft", {"num_train_epochs": 2})


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
    with pytest.raises(ValueError, match=f"'{key}' is not set here: set {ours} beside"):
        check_trainer_options("ppo", {key: 1})


def test_every_remedy_names_a_field_that_exists() -> None:
    stages = {"sft": SftConfig, "reward": RewardConfig, "dpo": DpoConfig, "ppo": PpoConfig}
    for kind, config in stages.items():
        for key in trainer_options(kind):
            remedy = {**OWNED, **(OWNED_BY_PPO if kind == "ppo" else {})}.get(key, "")
            named = re.findall(r"'(\w+)'", remedy.partition(" beside ")[0]) if " beside " in remedy else []
            assert not set(named) - set(config.model_fields), (kind, key, remedy)


def test_reserved_key_names_the_field() -> None:
    check_trainer_options("dpo", {"beta": 0.2})
    with pytest.raises(ValueError, match="'beta' beside 'trainer'"):
        check_trainer_options("dpo", {"beta": 0.2}, reserved={"beta"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adam_beta2": "high"}, "should be float; found 'high'"),
        ({"gradient_checkpointing": 1}, "should be bool"),
        ({"logging_steps": True}, "every step is logged"),
        ({"loss_type": "nil"}, "one of 'nll'"),
    ],
)
def test_wrong_values(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_trainer_options("sft", options)


def test_right_values_pass() -> None:
    check_trainer_options(
        "sft", {"adam_beta2": 0.95, "packing": False, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    )


def test_reading_is_quick_and_torch_free() -> None:
    code = (
        "import sys, time; import align.pipeline.registry; start = time.perf_counter();"
        "from align.config.trl_options import trainer_options;"
        "[trainer_options(kind) for kind in ('sft', 'reward', 'dpo')];"
        "print(time.perf_counter() - start);"
        "assert not {'torch', 'trl', 'transformers'} & set(sys.modules)"
    )
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 30
    assert float(out.stdout) < 1.0  # about 0.1 s on an idle machine
