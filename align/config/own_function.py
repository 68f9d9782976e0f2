"""Functions of the user's as parts of a method: ``loss: {function: "module:name", OPTION: ...}``. Torch-free."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

from align.config.base import Config
from align.config.user_functions import check_arguments, function_identity

PATH = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""Import path of a function, ``package.module:function``."""


class OwnFunction(Config):
    """A function by its import path. All other keys are its options."""

    model_config = ConfigDict(extra="allow")

    function: str = Field(pattern=PATH)
    """``package.module:function``; its module is in the folder of the YAML file, the current folder, or installed."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the function."""
        return dict(self.model_extra or {})

    def identity(self, place: str, provided: Collection[str] = ()) -> str:
        """Return the identity of the function's code, for the stage's key.

        ``provided`` are keyword arguments that the stage passes if the function has them. Raises ``UserError``, which
        begins with ``place``, for a missing function, and for options that are missing or that it does not have.
        """
        identity = function_identity(self.function, place)
        check_arguments(self.function, self.options, place, positional=1, provided=provided)
        return identity


def _read_path(value: Any) -> Any:
    """Return the block of a function that is written as its path only."""
    return {"function": value} if isinstance(value, str) and ":" in value else value


def own_or(shipped: Any) -> Any:
    """Return the type of a field that names one of the ``shipped`` functions, a ``Literal``, or an own function.

    An own function is written as its path, or as a block with its options.
    """
    written = shipped | OwnFunction | Annotated[str, Field(pattern=PATH)]
    return Annotated[shipped | OwnFunction, BeforeValidator(_read_path, json_schema_input_type=written)]
