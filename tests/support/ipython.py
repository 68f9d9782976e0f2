"""A stand-in for IPython inside a kernel, which keeps what its displays show."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class Displays:
    """Every display that was made: its contents in the order shown."""

    def __init__(self) -> None:
        self.contents: list[list[dict[str, str]]] = []

    def display(self, content: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw and display_id
        contents = [content]
        self.contents.append(contents)

        def update(content: dict[str, str], *, raw: bool) -> None:
            assert raw
            contents.append(content)

        return SimpleNamespace(update=update)


def install(monkeypatch: pytest.MonkeyPatch, *, kernel: bool = True) -> Displays:
    """Put the stand-in where ``import IPython`` finds it; without a ``kernel`` it is IPython in a terminal."""
    displays = Displays()
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    shell = SimpleNamespace(kernel=object()) if kernel else SimpleNamespace()
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    ipython.version_info = (9, 0)  # type: ignore[attr-defined]  # matplotlib asks for it
    display.display = displays.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return displays
