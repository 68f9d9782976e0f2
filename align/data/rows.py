"""Rows of a dataset and the Parquet files that hold them.

A row is a plain dict. Every row has ``id`` (stable text), ``source``, ``prompt`` (messages, the last one a user
turn) and ``checks`` (JSON text for :mod:`align.data.checkers`, ``""`` when no program can check the answer).
Instructions add ``completion``; preferences add ``chosen`` and ``rejected`` (one assistant turn each) and may add
``chosen_score`` and ``rejected_score``; ``chosen_finished`` or ``rejected_finished`` is False for an answer that was
cut off at its length limit. Torch-free.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.errors import UserError

Row = dict[str, Any]
Message = dict[str, str]

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_TYPES: dict[str, pa.DataType] = {
    "id": pa.string(),
    "source": pa.string(),
    "prompt": _MESSAGES,
    "checks": pa.string(),
    "completion": _MESSAGES,
    "chosen": _MESSAGES,
    "rejected": _MESSAGES,
    "chosen_score": pa.float64(),
    "rejected_score": pa.float64(),
    "chosen_finished": pa.bool_(),
    "rejected_finished": pa.bool_(),
    "flipped": pa.bool_(),
}
REQUIRED = ("id", "source", "prompt", "checks")


@dataclass(frozen=True)
class Dropped:
    """A record or row that is left out: why, in words that rows of like fate share, and what is particular to it."""

    reason: str
    detail: dict[str, Any] = field(default_factory=dict)


def user(text: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An assistant turn."""
    return {"role": "assistant", "content": text}


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as one Parquet file; the known columns have fixed types, so that an empty file still has them.

    Raises ``ValueError`` for a row without a required column.
    """
    for number, row in enumerate(rows):
        missing = [name for name in REQUIRED if name not in row]
        if missing:
            raise ValueError(f"row {number} has no {', '.join(missing)}")
    names = list(dict.fromkeys([*REQUIRED, *(name for row in rows for name in row)]))
    columns = [pa.array([row.get(name) for row in rows], type=_TYPES.get(name)) for name in names]
    pq.write_table(pa.table(columns, names=names), path)


def read_rows(path: Path) -> list[Row]:
    """Read what :func:`write_rows` wrote. Raises ``UserError`` for a file that is missing or is no Parquet."""
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; run the stage that makes it.") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); delete its artifact and rebuild it.") from None
    return rows


def normalised(text: str) -> str:
    """Text as compared between splits: NFKC, lower case, without ``.,:;!?`` and quotes, each run of space one space.

    Signs such as + and - stay: "3 + 4" and "3 - 4" are different questions.
    """
    return " ".join(re.sub(r"[.,:;!?\"'“”‘’`]+", " ", unicodedata.normalize("NFKC", text).casefold()).split())


def prompt_key(row: Row) -> str:
    """What makes two prompts the same: every turn, role and normalised content."""
    return "\n".join(f"{message['role']}: {normalised(message['content'])}" for message in row["prompt"])


def is_finished(row: Row, side: str) -> bool:
    """Whether the ``chosen`` or ``rejected`` answer ended by itself; True where the data says nothing of it."""
    return row.get(f"{side}_finished") is not False
