"""A trainer's arguments are the fields of its stage: same names, bounds, defaults and help."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import TrainingArguments

from align.config.field_docstrings import field_docstrings
from align.config.field_dumps import class_options
from align.config.stages.rl import DriftFields, RolloutFields, trainer_fields
from align.config.trl_options import check_trainer_options
from align.pipeline.registry import STAGES, load_object
from align.rl.argument_stub import STUB, stub_text
from align.rl.arguments import RolloutArguments

SCRIPT_ONLY = {"reuse_forward", "padding_free", "share_prompts", "probe_parity"}
"""Arguments that no stage has a field for; ``trainer:`` passes them on."""
OUT_OF_BOUNDS = (-1, 0, 1, 2, 10**6, -1.0, 0.0, 0.5, 1.0, 1.5, 1e6, "nonsense", True, None, [])
"""Values one of which lies outside of any field's bounds."""
KINDS = pytest.mark.parametrize(
    "kind", [kind for kind, stage in STAGES.items() if issubclass(stage.config_class(), RolloutFields)]
)


def settings_of(kind: str) -> type[RolloutFields]:
    return STAGES[kind].config_class()  # type: ignore[return-value]


def arguments_of(kind: str) -> type[RolloutArguments]:
    return load_object(settings_of(kind).trainer_class)  # type: ignore[no-any-return]


def make_arguments(kind: str, **fields: Any) -> RolloutArguments:
    """Arguments whose micro-batch divides every batch."""
    micro_batch = 2 if kind == "online_dpo" else 1
    return arguments_of(kind)(**{"output_dir": "x", "use_cpu": True, "report_to": "none", "learning_rate": 1e-6,
                                 "per_device_train_batch_size": micro_batch} | fields)  # fmt: skip


def make_settings(kind: str, **fields: Any) -> RolloutFields:
    base = {"policy": "p", "prompts": "q", "score": "gold", "gold": "gold", "learning_rate": 1e-6}
    if fields.get("ptx_coef"):
        base["ptx"] = "data"
    return settings_of(kind)(**(base | fields))


@KINDS
def test_every_field_has_the_default_and_the_help_of_the_stage(kind: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(arguments_of(kind))}
    docstrings = field_docstrings(settings_of(kind))
    for name, info in trainer_fields(settings_of(kind)).items():
        assert fields[name].default == (None if info.is_required() else info.default), name
        assert fields[name].metadata["help"] == docstrings[name], name
        assert fields[name].type == info.annotation, name
    arguments, stage = make_arguments(kind), make_settings(kind)
    for name in trainer_fields(settings_of(kind)):
        if name != "kl_estimator":  # resolved
            assert getattr(arguments, name) == getattr(stage, name), name


def test_the_stub_states_the_fields_of_the_configs() -> None:
    assert STUB.read_text(encoding="utf-8") == stub_text(), "Write it again: python -m align.rl.argument_stub"


@KINDS
def test_the_stub_has_every_argument_that_a_stage_has(kind: str) -> None:
    """A type checker reads the stub in place of the module: its classes, together, must have all fields."""
    bases = {base.__name__ for base in arguments_of(kind).__mro__}
    classes = [node for node in ast.parse(stub_text()).body if isinstance(node, ast.ClassDef) and node.name in bases]
    stated = {ast.unparse(line.target) for node in classes for line in node.body if isinstance(line, ast.AnnAssign)}
    assert stated == {"stage_config"} | set(trainer_fields(DriftFields)) | set(trainer_fields(settings_of(kind)))


@KINDS
def test_there_is_no_argument_but_those_of_stages_and_of_transformers(kind: str) -> None:
    fields = {field.name for field in dataclasses.fields(arguments_of(kind))}
    transformers = {field.name for field in dataclasses.fields(TrainingArguments)}
    shared = set(trainer_fields(DriftFields)) | set(trainer_fields(settings_of(kind)))
    assert fields - transformers - shared == SCRIPT_ONLY | ({"critic_adam_epsilon"} if kind == "ppo" else set())


@KINDS
def test_a_value_is_refused_by_both_or_by_neither(kind: str) -> None:
    for name in trainer_fields(settings_of(kind)):
        for value in OUT_OF_BOUNDS:
            field = {name: value}
            try:
                make_settings(kind, **field)
            except ValidationError:
                with pytest.raises(ValueError, match=r"\w"):
                    make_arguments(kind, **field)
            else:
                if name not in ("eval_updates", "num_mini_batches", "best"):  # these go with the micro-batch
                    make_arguments(kind, **field)


def test_a_refusal_names_the_argument_its_value_and_its_bound() -> None:
    with pytest.raises(ValueError, match=r"^gamma is 2\.0; it should be less than or equal to 1\.$"):
        make_arguments("ppo", gamma=2.0)
    with pytest.raises(ValueError, match=r"^learning_rate is None; it should be a valid number\.$"):
        make_arguments("ppo", learning_rate=None)


def test_reuse_forward_accepts_shares_only() -> None:
    assert [make_arguments("ppo", reuse_forward=share).reuse_forward for share in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]
    for share in (-0.5, 1.5):
        with pytest.raises(ValueError, match=f"^reuse_forward is {share}; it is a share of micro-batches"):
            make_arguments("ppo", reuse_forward=share)


@KINDS
def test_arguments_take_every_field_by_keyword(kind: str) -> None:
    parameters = inspect.signature(arguments_of(kind)).parameters
    assert set(trainer_fields(settings_of(kind))) <= set(parameters)


@KINDS
def test_options_are_the_fields_of_the_class_and_the_stages_own_are_set_beside(kind: str) -> None:
    settings = settings_of(kind)
    assert set(class_options(settings.trainer_class)) == {
        f.name for f in dataclasses.fields(arguments_of(kind)) if f.init
    }
    for name in settings.model_fields:
        with pytest.raises(ValueError, match=f"^'{name}' is not set here"):
            check_trainer_options(settings.trainer_class, {name: 1}, settings.model_fields, settings.owned_options)
