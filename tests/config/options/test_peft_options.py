"""peft's methods and options, they are those of its classes, and misspellings are told."""

from __future__ import annotations

import dataclasses

import pytest
from pydantic import TypeAdapter

from align.config.options import METHODS, REFUSED, peft_types
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
