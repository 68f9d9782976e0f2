"""The errors a user sees, the exit code of each, and what of foreign text may be shown in them.

Everything else that escapes is a bug in align and keeps its traceback.
"""

import errno
import importlib.util
import math
import os
import re
import shutil
import unicodedata
from pathlib import Path

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
LITTLE_SPACE = 64 * 1024
"""Bytes; a disk with less cannot even hold a stage's result."""
NO_MEMORY = re.compile(
    r"enforce fail at alloc_cpu|DefaultCPUAllocator: (?:can't|not enough)|std::bad_alloc|could not create a primitive"
)
"""What torch, and oneDNN in it, raise as a RuntimeError on a CPU without memory, such as under `ulimit -v`."""

_SCHEME = r"://|\b(?:https?|s3|gs|hf|ftp|redis|wss?):/"
"""End of a scheme; an address that was taken for a path has one slash."""
SECRETS = (
    (re.compile(rf"({_SCHEME})[^\s@:/'\"<>]+:[^\s'\"<>]*@"), r"\1***@"),  # a password may hold @ and /
    (re.compile(rf"({_SCHEME})[^\s/?#'\"<>]*@"), r"\1***@"),
    (re.compile(r"(^|[\s'\"(\[=,])[^\s:/@'\"(\[=,]+:(?!//)[^\s@'\"]+@(?=[\w\[])"), r"\1***@"),  # without a scheme
    # The same, mistaken for a path: with a port behind it, which an image's digest and a mount do not have.
    (re.compile(r"(/)[^\s:/@'\"<>]+:[^\s:/@'\"<>]+@(?=[\w.\-]+:\d)"), r"\1***@"),
    (
        re.compile(
            r"([?&][^=&\s'\"]*(?:key|token|secret|passw|pwd|signature|sig|credential|auth)[^=&\s'\"]*=)[^&\s'\"]+", re.I
        ),
        r"\1***",
    ),
)
"""Parts of addresses that let somebody in, and what is shown in their place."""
HIDDEN = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))
"""Unicode categories without a glyph: controls, format marks (bidi overrides, tags), lone surrogates, separators."""
HARMLESS = frozenset("\n\t\u200c\u200d")
"""Those that stay: line breaks, tabs, and the two joiners that ordinary Persian, Hindi and emoji need."""


MOST_SHOWN = 200
"""Characters of a value that a message repeats."""
LONG = re.compile(r"\S{1000,}")
"""Words that are too long to read."""


def shorten(text: str, most: int = MOST_SHOWN) -> str:
    """Return at most ``most`` characters of a text, with its length if it is longer."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def with_article(noun: str) -> str:
    """Return a noun with "a" or "an", by its first letter: "an InstructionData"."""
    return f"{'an' if noun[:1].lower() in tuple('aeiou') else 'a'} {noun}"


def plain_number(value: float) -> str:
    """Return a number as text: a whole number with all its digits, other numbers with six digits."""
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:g}"


def redact(text: str) -> str:
    """Return the text with the names, passwords and tokens in its addresses replaced by ``***``."""
    for pattern, shown in SECRETS:
        text = pattern.sub(shown, text)
    return text


def printable(text: str) -> str:
    r"""Return the text with every hidden character as ``\x1b`` or ``\u202e``; what is left can be encoded as UTF-8.

    Terminals obey such characters, and text reads as what it is not. What ``HARMLESS`` names stays.
    """
    if text.isascii() and text.isprintable():
        return text
    rest = text
    for character in HARMLESS:
        rest = rest.replace(character, "")
    if rest.isprintable():  # what is not: HIDDEN, and spaces other than the common one
        return text
    return "".join(_escape(character) if _is_hidden(character) else character for character in text)


def _is_hidden(character: str) -> bool:
    return character not in HARMLESS and unicodedata.category(character) in HIDDEN


def _escape(character: str) -> str:
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


class UserError(Exception):
    """The user's input is wrong: exit code 2, one message with the place and the remedy, no traceback.

    Passwords in addresses that the message repeats are removed from it, and words of a thousand characters are cut.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(LONG.sub(lambda word: shorten(word.group()), redact(str(message))))


class StageFailed(Exception):
    """A stage ended without its artifact: exit code 1, the message names the stage and the path of its log."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(redact(str(message)))


def explain_os_error(error: OSError, folder: Path) -> str:
    """One sentence on an error of the system while working in ``folder``; a full disk comes with its remedy."""
    return no_space(folder) if is_no_space(error) else f"{type(error).__name__}: {error}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return True for a lack of memory, also of a GPU's; torch raises a plain RuntimeError for one on a CPU."""
    is_gpu_error = type(error).__name__ == "OutOfMemoryError"  # torch's class, which needs no import of torch
    text = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or is_gpu_error or NO_MEMORY.search(text) is not None


def is_no_space(error: BaseException) -> bool:
    """Return True for a full disk, which libraries such as shutil and safetensors wrap in their own errors."""
    is_system_error = isinstance(error, OSError) and error.errno in NO_SPACE
    return is_system_error or any(os.strerror(number) in str(error) for number in NO_SPACE)


def no_space(folder: Path | None = None) -> str:
    """Return the remedy for a full disk that holds ``folder``, if it is known."""
    place = "" if folder is None else f" that holds {folder}"
    return (
        f"no space left on the disk{place}; free some (`align gc` lists what no run needs) "
        "or name another --store, then run again: finished stages are kept."
    )


def disk_is_full(folder: Path) -> bool:
    """Return whether the disk that holds ``folder`` is as good as full."""
    return shutil.disk_usage(folder).free < LITTLE_SPACE


def require_extra(module: str, extra: str, user: str) -> None:
    """Raise ``UserError`` if ``module`` is not installed.

    The message begins with ``user``, the feature that needs the module. The module is not imported, so a plan can check
    what a stage will need.
    """
    try:
        is_there = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        is_there = False
    if not is_there:
        raise missing_extra(module, extra, user)


def missing_extra(module: str, extra: str, user: str) -> UserError:
    """Return the error for a ``module`` that is not installed."""
    remedy = f"pip install 'align-pipeline[{extra}]'"
    return UserError(f"{user} needs the package {module}, which is not installed: {remedy}.")
