"""Errors of environments: what is said to the model, and what ends an episode. Torch-free."""

from __future__ import annotations


class EnvironmentFailed(Exception):
    """The episode cannot go on. It ends, is recorded as failed with this text, and nothing is learned from it.

    Methods of an environment raise it. Any other exception of a tool is answered to the model with its text.
    """


class ToolError(Exception):
    """A call had no result; the text says so to the model, and the episode goes on."""

    kind = "raised"
    """What went wrong, in metrics and records: the tool raised an exception."""


class BadCall(ToolError):
    """The model called a tool that there is not, or with arguments that it does not take."""

    kind = "arguments"


class ToolTimeout(ToolError):
    """A call took longer than ``tool_seconds``, and was given up. The instance that it ran in is gone."""

    kind = "timeout"


ERRORS: dict[str, type[ToolError]] = {error.kind: error for error in (ToolError, BadCall, ToolTimeout)}
"""The errors that are said to the model, by kind."""
