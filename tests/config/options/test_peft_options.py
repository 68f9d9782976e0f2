"""peft's methods and options, they are those of its classes, and misspellings are told."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from align.config.options import METHODS, REFUSED, check_options, check_type, peft_types
from align.config.options.field_dumps import method_options
from align.config.tuning import Tuning


def test_every_type_and_option_is_pefts_own() -> None:
    """Fails loudly when a new peft has methods that nobody has looked at, or options that the dump lacks."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    theirs = {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    assert set(peft_types()) == set(theirs) - set(METHODS) - set(REFUSED)
    assert set(METHODS) <= set(theirs)
    for kind in peft_types():
        assert set(method_options(kind) or ()) == {
            field.name for field in dataclasses.fields(theirs[kind]) if field.init
        }


def test_reading_them_imports_neither_peft_nor_torch() -> None:
    code = (
        "import sys; from align.config.options import peft_types; "
        "from align.config.options.field_dumps import method_options; "
        "[method_options(k) for k in peft_types()]; "
        "print([m for m in ('torch', 'peft', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("verra", "has no method 'verra', only .*Did you mean 'vera'"),
        ("lora", "'lora' is set with `method: lora`"),
        ("prefix_tuning", "is set with `method: prefix`"),
        ("lily", "cannot be merged into the weights"),
        ("adalora", "its ranks are redistributed"),
    ],
)
def test_a_type_that_is_not_to_be_had_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_type(name)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "vera",
            {"dropout": 0.1},
            "unknown key 'dropout': peft's vera has no such option. Did you mean 'vera_dropout'",
        ),
        ("vera", {"r": "64"}, "'r' should be int; found '64'"),
        ("vera", {"r": True}, "'r' should be int; found True"),
        ("vera", {"task_type": "CAUSAL_LM"}, "'task_type' is not set here: the stage decides"),
        ("oft", {"bias": "all"}, "cannot be switched off"),
        ("lokr", {"target_modules": 3}, r"should be list\[str\] \| str \| None; found 3"),
        ("road", {"variant": 3}, "should be str; found 3"),
        ("adamss", {"init_weights": "orthgonal"}, "should be one of 'orthogonal', None; found 'orthgonal'"),
        ("lokr", {"init_weights": 3}, r"should be bool \| str; found 3"),
    ],
)
def test_an_option_that_peft_would_not_take_is_refused(kind: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_options(kind, options)


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"method": "lora", "rnak": 8}, "rnak"),
        ({"method": "lora", "init": "pisa"}, "Did you mean 'pissa'"),
        ({"method": "lora", "init": "pissa_niter_0"}, "none of default"),
        ({"method": "lora", "init": "loftq"}, "take `method: qlora`"),
        ({"method": "lora", "init": "eva", "dora": True}, "dora with init eva"),
        ({"method": "lora", "init": "orthogonal", "rank": 3}, "needs an even rank"),
        ({"method": "lora", "quantization": "nf4"}, "quantization"),
        ({"method": "qlora", "init": "pissa"}, "which 4 bits cannot hold"),
        ({"method": "qlora", "quantization": "nf3"}, "nf4"),
        ({"method": "ia3", "targets": ["k_proj"]}, "targets and feedforward go together"),
        ({"method": "ia3", "targets": ["k_proj"], "feedforward": ["down_proj"]}, "not among targets"),
        ({"method": "ia3", "rank": 4}, "rank"),
        ({"method": "peft", "type": "vera", "options": {"rr": 4}}, "Did you mean 'r'"),
        ({"method": "peft", "type": "vera", "rank": 4}, "rank"),
    ],
)
def test_what_a_tuning_block_does_not_take(tuning: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Tuning).validate_python(tuning)


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        ({"method": "qlora", "dropout": 0.1}, "set it to 0"),
        ({"method": "lora", "init": "eva"}, "there are none yet"),
        ({"method": "peft", "type": "vera", "options": {"vera_dropout": 0.1}}, "vera_dropout is 0.1"),
        ({"method": "peft", "type": "pvera"}, "at random in each pass"),
        ({"method": "prompt"}, "changes the model's input"),
        ({"method": "lora", "init": "pissa"}, None),
        ({"method": "ia3"}, None),
    ],
)
def test_what_ppo_cannot_train(tuning: dict[str, object], message: str | None) -> None:
    objection = TypeAdapter(Tuning).validate_python(tuning).online_objection
    assert objection is None if message is None else message in objection


def test_labels_say_what_is_not_plain() -> None:
    label = TypeAdapter(Tuning).validate_python({"method": "lora", "rank": 8, "dora": True, "init": "pissa"}).label
    assert label == "lora r8 DoRA pissa"
