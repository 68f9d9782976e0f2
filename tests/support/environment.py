"""The environment variables that the tests of this process began with."""

from __future__ import annotations

import os

_variables: dict[str, str] = {}


def remember_environment() -> None:
    """Take the variables of this moment as those that the tests began with."""
    _variables.clear()
    _variables.update(os.environ)


def beginning_environment() -> dict[str, str]:
    """Return the variables that the tests began with; outside of tests, those of now."""
    return dict(_variables or os.environ)


def restore_environment() -> None:
    """Take back what was set since: a stage with another environment than its fork server has cannot be forked."""
    for name in os.environ.keys() - _variables.keys():
        if not name.startswith("PYTEST_"):
            del os.environ[name]
    os.environ.update(_variables)
