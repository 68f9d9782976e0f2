"""Dataclasses of the fields that a trainer's arguments and its stage share, each made from the stage's config.

They are made at import, so names, types, defaults and help stand in ``align.config.stages`` alone. Type checkers and
editors read ``argument_fields.pyi``, which ``python -m align.rl.argument_stub`` writes.
"""

from __future__ import annotations

from dataclasses import field, make_dataclass
from typing import Any

from align.config.field_docstrings import field_docstrings
from align.config.stages.grpo import GrpoConfig
from align.config.stages.online_dpo import OnlineDpoConfig
from align.config.stages.ppo import PpoConfig
from align.config.stages.rejection import RejectionConfig
from align.config.stages.rl import DriftFields, RolloutFields, trainer_fields
from align.config.stages.rloo import RlooConfig


def _make_fields(name: str, config: type[RolloutFields]) -> Any:
    """Return a dataclass with the trainer's fields of ``config``, which it holds as ``stage_config``.

    A field without a default there has None here, which ``RolloutArguments`` refuses.
    """
    docstrings = field_docstrings(config)
    fields = [
        (
            field_name,
            info.annotation,
            field(default=None if info.is_required() else info.default, metadata={"help": docstrings.get(field_name)}),
        )
        for field_name, info in trainer_fields(config).items()
    ]
    doc = f"The fields of ``{config.__name__}`` that its trainer has, too."
    return make_dataclass(name, fields, namespace={"__doc__": doc, "__module__": __name__, "stage_config": config})


DriftArguments = _make_fields("DriftArguments", DriftFields)
PpoArguments = _make_fields("PpoArguments", PpoConfig)
GrpoArguments = _make_fields("GrpoArguments", GrpoConfig)
RlooArguments = _make_fields("RlooArguments", RlooConfig)
OnlineDpoArguments = _make_fields("OnlineDpoArguments", OnlineDpoConfig)
RejectionArguments = _make_fields("RejectionArguments", RejectionConfig)
