"""Rows of a dataset, the records they come from, and the Parquet files that hold them. Torch-free.

A row is a plain dict:

- Every row has ``id`` (stable text), ``source``, ``prompt`` (messages, the last one a user turn, or a tool's result)
  and ``checks`` (JSON text for :mod:`align.data.checkers`, ``""`` when no program can check the answer).
- Instructions add ``completion``. Preferences add ``chosen`` and ``rejected`` (one assistant turn each), and may add
  ``chosen_score`` and ``rejected_score``. Unpaired rows add ``completion`` and ``label``.
- ``completion_finished``, ``chosen_finished``, ``rejected_finished`` or ``text_finished`` is False for a text that was
  cut off at its length limit: no end of turn, or of text, follows it in training.
- Before the step ``pairs``, rows may have ``responses``: a list of ``content``, ``score`` and ``rank`` (0 is best),
  where either of the last two may be None.
- ``tools`` is a JSON list of the functions that a model may call (``""`` for none). A message that calls some has
  ``tool_calls``, JSON text too, since the arguments have no common type.
- An assistant's turn that is excluded from training has ``train: False``.
- A row of plain text has ``id``, ``source`` and ``text`` only.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from align.errors import UserError

Row = dict[str, Any]
Message = dict[str, Any]

_MESSAGE = {"role": pa.string(), "content": pa.string()}
_MESSAGE_MORE = {"tool_calls": pa.string(), "tool_call_id": pa.string(), "name": pa.string(), "train": pa.bool_()}
_RESPONSE = {"content": pa.string(), "score": pa.float64(), "rank": pa.int32()}
_RESPONSE_MORE = {"finished": pa.bool_(), "model": pa.string()}
_STRUCTS = {
    **dict.fromkeys(("prompt", "completion", "chosen", "rejected"), (_MESSAGE, _MESSAGE_MORE)),
    "responses": (_RESPONSE, _RESPONSE_MORE),
}
"""Columns of lists, with the fields of every item, and fields that are written only where an item has them: many chat
templates read ``tool_calls: None`` as a call.
"""
_MESSAGES = pa.list_(pa.struct(_MESSAGE))
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
    "completion_finished": pa.bool_(),
    "chosen_finished": pa.bool_(),
    "rejected_finished": pa.bool_(),
    "label": pa.bool_(),
    "responses": pa.list_(pa.struct(_RESPONSE)),
    "tools": pa.string(),
    "text": pa.string(),
    "text_finished": pa.bool_(),
    "steps": pa.list_(pa.struct({"content": pa.string(), "label": pa.float64()})),
    "flipped": pa.bool_(),
    "score": pa.float64(),
    "_where": pa.string(),
    "_source": pa.int32(),
    "_split": pa.string(),
}
REQUIRED = ("id", "source", "prompt", "checks")
REQUIRED_OF_TEXTS = ("id", "source", "text")
_CONTENT_FIELDS = ("completion", "chosen", "rejected", "label", "responses", "tools")
"""Fields beside the prompt that a model learns from."""
_FINISHED = ("completion_finished", "chosen_finished", "rejected_finished", "text_finished")
"""Fields that are False for a text that was cut off."""


Record = tuple[str, dict[str, Any]]
"""Place of a record (``file:line``) and its fields, as a source reads them."""


class BadRecord(UserError):
    """A record that cannot be read or understood: ``on_error: stop`` raises it, ``drop`` counts it.

    ``where`` is its file and line, or its number; ``problem`` says what is wrong.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where, self.problem = where, problem

    @property
    def message(self) -> str:
        """The full message."""
        return str(self)

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str]]:
        return type(self), (self.where, self.problem)


@dataclass(frozen=True)
class Dropped:
    """A record or row that is dropped: the reason, in words that similar rows share, and its own details."""

    reason: str
    detail: dict[str, Any] = field(default_factory=dict)


def user(text: str) -> Message:
    """Return a user turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Return an assistant turn."""
    return {"role": "assistant", "content": text}


def column_types() -> dict[str, pa.DataType]:
    """Return the known columns in the order they are written, with their types where no message calls a tool."""
    return dict(_TYPES)


def _column(name: str, rows: list[Row]) -> pa.Array:
    values = [row.get(name) for row in rows]
    if name not in _STRUCTS:
        return pa.array(values, type=_TYPES.get(name))
    fields, optional = _STRUCTS[name]
    # An optional field is written only if some item of this file has it.
    used = {key for items in values if items for item in items for key in item if item[key] is not None}
    used_optional = {key: kind for key, kind in optional.items() if key in used}
    return pa.array(values, pa.list_(pa.struct(fields | used_optional)))


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as one Parquet file. Known columns have fixed types, which an empty file has too.

    Raises ``ValueError`` for a row without a required column.
    """
    required = REQUIRED_OF_TEXTS if rows and is_text(rows[0]) else REQUIRED
    for number, row in enumerate(rows):
        missing = [name for name in required if name not in row]
        if missing:
            raise ValueError(f"row {number} has no {', '.join(missing)}")
    # Columns in the order of first use, required ones first.
    names = list(dict.fromkeys([*required, *(name for row in rows for name in row)]))
    pq.write_table(pa.table([_column(name, rows) for name in names], names=names), path)


def merged_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Return a schema that every file's rows fit after a cast: it has all columns and all fields of messages."""
    return pa.unify_schemas(list(schemas), promote_options="permissive")


def split_files(path: Path) -> list[Path]:
    """Return the file, or where ``train.parquet`` is missing, its shards ``train-00000-of-00002.parquet`` and so on."""
    if path.exists():
        return [path]
    return sorted(path.parent.glob(f"{path.stem}-?????-of-?????{path.suffix}")) or [path]


def read_rows(path: Path) -> list[Row]:
    """Read what :func:`write_rows` wrote, in one file or in shards.

    Raises ``UserError`` for a file that is missing or is no Parquet.
    """
    return list(iter_rows(path))


def iter_rows(path: Path, batch_size: int = 1024) -> Iterator[Row]:
    """Yield the rows that :func:`read_rows` returns, with ``batch_size`` of them in memory at a time."""
    try:
        for file in split_files(path):
            with pq.ParquetFile(file) as parquet:
                structs = [name for name in _STRUCTS if name in parquet.schema_arrow.names]
                for batch in parquet.iter_batches(batch_size=batch_size):
                    for row in batch.to_pylist():
                        for name in structs:
                            row[name] = _without_absent(row[name], _STRUCTS[name][1])
                        yield row
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; run the stage that makes it.") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); delete its artifact and rebuild it.") from None


def take_rows(path: Path, places: np.ndarray) -> list[Row]:
    """Return the rows at ``places`` (M,) of one file that :func:`write_rows` wrote, without decoding the others."""
    rows: list[Row] = pq.read_table(path).take(places).to_pylist()
    for row in rows:
        for name in set(_STRUCTS) & row.keys():
            row[name] = _without_absent(row[name], _STRUCTS[name][1])
    return rows


def _without_absent(items: list[dict[str, Any]] | None, optional: dict[str, Any]) -> list[dict[str, Any]] | None:
    if not items or not any(key in items[0] for key in optional):
        return items
    return [{key: value for key, value in item.items() if value is not None or key not in optional} for item in items]


def normalized(text: str) -> str:
    """Return a text as compared between splits: NFKC, lower case, without ``.,:;!?`` and quotes, single spaces.

    Signs such as + and - stay: "3 + 4" and "3 - 4" are different questions.
    """
    return " ".join(re.sub(r"[.,:;!?\"'“”‘’`]+", " ", unicodedata.normalize("NFKC", text).casefold()).split())


def is_text(row: Row) -> bool:
    """Return True for a row of plain text, which has no turns."""
    return "prompt" not in row and "text" in row


def prompt_key(row: Row) -> str:
    """Return the key of a prompt: role, normalized content and tool calls of every turn; of a text, the text."""
    if is_text(row):
        return normalized(row["text"])
    return "\n".join(
        f"{message['role']}: {normalized(message['content'])}{message.get('tool_calls') or ''}"
        for message in row["prompt"]
    )


def row_id(row: Row) -> str:
    """Return 16 hex digits, equal for rows of equal content: prompts as compared between splits, replies exactly."""
    return _digest(_content(row)).hex()[:16]


def content_digest(row: Row) -> bytes:
    """Return 16 bytes, equal for rows that teach the same: the content of ``row_id`` and which answers were cut off.

    Two different rows of a million have equal digests with a probability of 1e-27. Ids are no substitute: those of
    sampled pairs name a prompt and places among its responses, where the next round puts other responses.
    """
    return _digest([*_content(row), *(name for name in _FINISHED if row.get(name) is False)])[:16]


def _content(row: Row) -> list[Any]:
    if is_text(row):
        return ["text", row["text"]]
    # Replies count exactly, prompts normalized: two rows may differ in their answers alone.
    content = [prompt_key(row), *(row[name] for name in _CONTENT_FIELDS if row.get(name) not in (None, ""))]
    if any(message.get("train") is False for message in row["prompt"]):
        content.append([message.get("train") is False for message in row["prompt"]])
    return content


def _digest(content: list[Any]) -> bytes:
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).digest()


def answer_side(row: Mapping[str, Any]) -> str:
    """Return the field of the answer that is learned from a row: ``completion``, or without one ``chosen``."""
    return "completion" if row.get("completion") else "chosen"


def is_finished(row: Mapping[str, Any], side: str) -> bool:
    """Return False where an answer, given by its field, was cut off; True also where the data does not say."""
    return row.get(f"{side}_finished") is not False
