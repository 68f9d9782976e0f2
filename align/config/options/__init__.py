"""Options that go to classes of other packages, checked: a stage's ``trainer:``, and ``tuning: {method: peft}``.

``field_dumps`` has the fields of the classes. The class itself checks rules across fields when the stage runs, and all
options if it has no dump. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import field_validator

from align.config.base import Config
from align.config.options.field_dumps import PEFT, class_options, method_options, shipped_fields
from align.config.validation import hint_nearest

_OPTIONS = json.loads(Path(__file__).with_name("owned_options.json").read_text(encoding="utf-8"))
OWNED: dict[str, str] = _OPTIONS["trainer"]
"""Options that every training stage sets itself, with what to do instead."""

OWNED_BY_ROLLOUTS: dict[str, str] = _OPTIONS["rollouts"]
"""The same for the stages that learn from rollouts, if their remedy differs."""

METHODS = {
    "lora": "method: lora",
    "ia3": "method: ia3",
    "prefix_tuning": "method: prefix",
    "prompt_tuning": "method: prompt",
    "p_tuning": "method: p_tuning",
    "adaption_prompt": "method: adapters, kind: llama_adapter",
}
"""Methods that have a separate ``method``, with its YAML."""

REFUSED: dict[str, str] = _OPTIONS["peft methods"]
"""Methods that cannot be used, with the reason."""

SET_HERE: dict[str, str] = _OPTIONS["peft options"]
"""Fields of every config class that no user sets, with the reason."""


def check_trainer_options(
    trainer_class: str, options: Mapping[str, Any], fields: Collection[str], owned: Mapping[str, str]
) -> None:
    """Check a ``trainer:`` block against the class ``trainer_class`` (``package.module:Name``) that it goes to.

    ``fields`` names the stage's own fields, ``owned`` the options that the stage sets itself, with the remedy. Raises
    ``ValueError`` for the first key that does not exist (with the nearest name), that is a field of the stage, or that
    the stage sets itself, and for a value of the wrong type.
    """
    class_fields = class_options(trainer_class)
    for name, value in options.items():
        # An unknown name first: a misspelling should not be told that the stage decides it.
        if class_fields is not None:
            refuse_unknown_option(name, {*class_fields, *fields}, trainer_class.partition(":")[2])
        if name in owned:
            raise ValueError(f"'{name}' is not set here: {owned[name]}.")
        if name in fields:
            raise ValueError(f"'{name}' is not set here: set '{name}' next to 'trainer'.")
        if class_fields is not None:
            class_fields[name].check(value)


class TrainerOptions(Config):
    """Check of the field ``trainer``, which a subclass has, against the class that accepts its options."""

    trainer_class: ClassVar[str]
    """Import path of the class that accepts the options under ``trainer``. It is never imported in this process."""
    owned_options: ClassVar[dict[str, str]] = OWNED
    """Options of that class which the stage sets itself, with what to do instead."""

    @classmethod
    def remedy_for_unknown(cls, key: str) -> str | None:
        """Return the remedy for an option of the trainer that was set outside ``trainer``; None for another name."""
        if key in cls.owned_options:
            reason = cls.owned_options[key].removesuffix(" next to 'trainer'")
            return f"Leave it out: {reason}."
        is_option = key in (class_options(cls.trainer_class) or ())
        return f"It goes under 'trainer': `trainer: {{{key}: …}}`." if is_option else None

    @field_validator("trainer", check_fields=False)
    @classmethod
    def _check_trainer_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        check_trainer_options(cls.trainer_class, options, cls.model_fields, cls.owned_options)
        return options


def peft_types() -> list[str]:
    """Return every method of the tested peft that ``type`` may name."""
    return list(shipped_fields()[PEFT]["classes"])


def check_type(name: str) -> None:
    """Raise ``ValueError`` for a method that peft does not have or that cannot be used."""
    if name in METHODS:
        raise ValueError(f"'{name}' is set with `{METHODS[name]}`.")
    if name in REFUSED:
        raise ValueError(f"'{name}' cannot be used: {REFUSED[name]}.")
    types = peft_types()
    if name not in types:
        hint = hint_nearest(name, [*types, *METHODS])
        raise ValueError(f"peft has no method '{name}', only {', '.join(types)}.{hint}")


def check_options(kind: str, mapping: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for the first option that peft's config class of ``kind`` does not have or accept."""
    options = method_options(kind)
    for name, value in mapping.items():
        if options is not None:
            refuse_unknown_option(name, options, f"peft's {kind}")
        if name in SET_HERE:
            raise ValueError(f"'{name}' is not set here: {SET_HERE[name]}.")
        if name == "bias" and value != "none":
            raise ValueError("'bias' trains the model's own biases, which then cannot be switched off for a reference.")
        if options is not None:
            options[name].check(value)


def refuse_unknown_option(name: str, known_options: Iterable[str], owner: str) -> None:
    """Raise ``ValueError`` with the nearest name if ``name`` is not among the ``known_options`` of ``owner``."""
    if name not in known_options:
        raise ValueError(f"unknown key '{name}': {owner} has no such option.{hint_nearest(name, known_options)}")
