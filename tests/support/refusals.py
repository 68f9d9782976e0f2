"""Messages of errors, compared with those in ``tests/messages.txt``: other wording changes that file and no test."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path

from pydantic import ValidationError

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "messages.txt"
UPDATE = "ALIGN_UPDATE_MESSAGES"
"""Variable that has tests write the messages that they find, for git to show. It needs ``-n 0``."""
INDENT = "    "
CHANGING = {
    r"(?<=127\.0\.0\.1:)\d{4,}": "PORT",
    r"\b(?=[a-f]*\d)[0-9a-f]{12,}\b": "KEY",
    r"\b20\d\d-\d\d-\d\d \d\d:\d\d(:\d\d)?": "TIME",
    r"(?<=s3://tests/project )\d+": "N",
    r"\b\d+\.(\d{3,}|\d(?= %))": "X.X",
    r"\b(token|position|answer) \d+": r"\1 N",
    r"\bin \d+ of \d+ answers": "in N of N answers",
    r"\binstead of \d+": "instead of N",
    r"\bat step \d+ of": "at step N of",
}
"""What the machine, the order of tests, or a stage's version decides."""


@cache
def stored_messages() -> dict[str, str]:
    """Return the messages in the file by test; several of one test are numbered."""
    lines: dict[str, list[str]] = {}
    key = ""
    for line in FILE.read_text(encoding="utf-8").split("\n") if FILE.exists() else ():
        if line.startswith(INDENT):
            lines[key].append(line.removeprefix(INDENT))
        elif line:
            key = line
            lines[key] = []
    return {key: "\n".join(text) for key, text in lines.items()}


def store(messages: dict[str, str]) -> None:
    """Write the file."""
    blocks = [f"{key}\n{textwrap.indent(text, INDENT, lambda line: True)}\n" for key, text in sorted(messages.items())]
    FILE.write_text("".join(blocks), encoding="utf-8")


class Refused:
    """Calls what must raise, and compares the type and text of the error with the stored ones."""

    def __init__(self, test: str, temporary: Path) -> None:
        self.test = test
        self.count = 0
        # A test's folders have a number and lie in a folder of the process.
        self.places = {
            rf"{re.escape(str(temporary))}/[^/\s'\":]+?\d+\b": "TMP",
            re.escape(str(ROOT)): "ALIGN",
        } | CHANGING

    def __call__(self, call: Callable[..., object], *arguments: object, **named: object) -> None:
        """Call it. Raises ``AssertionError`` if no error comes of it, or another one than the stored."""
        try:
            call(*arguments, **named)
        except Exception as error:
            said = self._text(error)
        else:
            raise AssertionError("nothing was refused")
        self.count += 1
        key = self.test if self.count == 1 else f"{self.test} {self.count}"
        if os.environ.get(UPDATE):
            store(stored_messages() | {key: said})
            stored_messages.cache_clear()
        assert said == stored_messages().get(key), f"{UPDATE}=1 stores the message of {key}:\n{said}"

    def _text(self, error: Exception) -> str:
        if isinstance(error, AssertionError):
            raise error
        text = str(error)
        if isinstance(error, ValidationError):  # without the address of pydantic's page
            text = "\n".join(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors())
        for place, name in self.places.items():
            text = re.sub(place, name, text)
        text = text.replace(sys.executable, "PYTHON").encode("utf-8", "backslashreplace").decode()
        return f"{type(error).__name__}: {text}"
