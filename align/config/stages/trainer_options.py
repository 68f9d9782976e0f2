"""Config base of all stages with a block ``trainer:``. Torch-free."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import field_validator

from align.config.base import Config
from align.config.trl_options import OWNED, check_trainer_options, remedy_for_option


class TrainerOptions(Config):
    """Check of the field ``trainer``, which a subclass has, against the class that accepts its options."""

    trainer_class: ClassVar[str]
    """Import path of the class that accepts the options under ``trainer``. It is never imported in this process."""
    owned_options: ClassVar[dict[str, str]] = OWNED
    """Options of that class which the stage sets itself, with what to do instead."""

    @classmethod
    def remedy_for_unknown(cls, key: str) -> str | None:
        """Return a sentence on an option of the trainer that was set outside ``trainer``."""
        return remedy_for_option(cls.trainer_class, cls.owned_options, key)

    @field_validator("trainer", check_fields=False)
    @classmethod
    def _check_trainer_options(cls, options: dict[str, Any]) -> dict[str, Any]:
        check_trainer_options(cls.trainer_class, options, cls.model_fields, cls.owned_options)
        return options
