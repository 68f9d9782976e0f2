"""The listener of a notebook. Never imports torch.

Live displays of rich need ipywidgets in a notebook. This display only needs the kernel's own IPython: rich draws the
lines and bars, and the display shows HTML.
"""

from __future__ import annotations

import io
import sys
import threading
from typing import Any

from rich.console import Console

from align.pipeline.pipeline import Node
from align.runner.listener import WIDE, ConsoleListener

REFRESH_EVERY = 0.5
"""Seconds between two updates of the display."""
PAGE = '<pre style="white-space: pre; overflow-x: auto; line-height: normal">{code}</pre>'


class NotebookListener(ConsoleListener):
    """Shows a line per finished stage and a bar per running one, in one display of a notebook."""

    def __init__(self, pipeline_nodes: list[Node], display: Any) -> None:
        """``display`` is the function of that name of ``IPython.display``."""
        super().__init__(pipeline_nodes, _recording_console())
        self._display = display
        self._handle: Any = None
        self._shown: dict[str, str] = {}
        self._refresher = threading.Thread(target=self._refresh_regularly, name="notebook-progress", daemon=True)

    def __enter__(self) -> NotebookListener:
        self.show()
        self._refresher.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        self._refresher.join()
        self.show()

    def _refresh_regularly(self) -> None:
        while not self._closed.wait(REFRESH_EVERY):
            self.show()

    def show(self) -> None:
        """Bring the display up to date; the first call makes it."""
        # A separate console for the bars: the console records every line that was ever printed.
        bars = _recording_console()
        if self.tasks:
            bars.print(self.progress.get_renderable())
        consoles = (self.console, bars)
        # rich escapes texts of models and logs in HTML.
        code = "".join(
            console.export_html(clear=False, inline_styles=True, code_format="{code}") for console in consoles
        )
        content = {
            "text/html": PAGE.format(code=code.rstrip()),
            "text/plain": "".join(console.export_text(clear=False) for console in consoles).rstrip(),
        }
        if content == self._shown:
            return
        self._shown = content
        if self._handle is None:
            self._handle = self._display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def progress_listener(pipeline_nodes: list[Node]) -> ConsoleListener:
    """Return the listener that shows a run in this process's environment: in a notebook, a terminal, or a log."""
    if is_in_notebook():
        from IPython.display import display

        return NotebookListener(pipeline_nodes, display)
    return ConsoleListener(pipeline_nodes)


def is_in_notebook() -> bool:
    """Return True if a kernel of Jupyter runs this process. IPython in a terminal has no kernel."""
    # A kernel has imported IPython already; importing it here would slow down every script.
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


def _recording_console() -> Console:
    """Return a console that prints nowhere and keeps what it was given, with colors."""
    return Console(
        file=io.StringIO(),
        record=True,
        width=WIDE,
        force_terminal=True,
        force_jupyter=False,
        color_system="standard",
        highlight=False,
    )
