"""Rows of a dataset, the records they come from, and the Parquet files that hold them. Torch-free.

A row is a plain dict:

- Every row has ``id`` (stable text), ``source``, ``prompt`` (messages, the last one a user turn, or a tool's result)
  and ``checks`` (JSON text for :mod:`align.data.checkers`, ``""`` when no program can check the answer).
- Instructions add ``completion``. Preferences add ``chosen`` and ``rejected``, and may add ``chosen_score`` and
  ``rejected_score``. Unpaired rows add ``completion`` and ``label``. An answer is one assistant turn; of an episode it
  is all that followed the prompt, up to the last assistant turn, with the results of tools in between.
- ``completion_finished``, ``chosen_finished``, ``rejected_finished`` or ``text_finished`` is False for a text that was
  cut off at its length limit: no end of turn, or of text, follows it in training.
- Before the step ``pairs``, rows may have ``responses``: a list of ``content``, ``score`` and ``rank`` (0 is best),
  where either of the last two may be None.
- ``tools`` is a JSON list of the functions that a model may call (``""`` for none). A message that calls some has
  ``tool_calls``, also JSON text, since the arguments have no common type. A message that is not learned has
  ``train: False``.
- A row of plain text has ``id``, ``source`` and ``text`` only.
- The recipe keeps any other column (``keep: [answer]``) for scorers, filters, judges and metrics. A column whose values
  are lists, mappings or of several types is stored as JSON text, and parsed when rows are read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Row = dict[str, Any]
Message = dict[str, Any]

_MESSAGE_MORE = ("tool_calls", "tool_call_id", "name", "train")
_OPTIONAL = {
    **dict.fromkeys(("prompt", "completion", "chosen", "rejected"), _MESSAGE_MORE),
    "responses": ("finished", "model"),
}
"""Columns of lists, with the fields that are written only if an item has them: many chat templates read
``tool_calls: None`` as a call.
"""
COLUMNS = (
    *("id", "source", "prompt", "checks", "completion"),
    *("chosen", "rejected", "chosen_score", "rejected_score"),
    *("completion_finished", "chosen_finished", "rejected_finished"),
    *("label", "responses", "tools", "text", "text_finished", "steps"),
    *("flipped", "score", "_where", "_source", "_split"),
)
"""The known columns in the order they are written."""
JSON_MARK = b"align"
"""Key in the metadata of a Parquet column whose texts are JSON."""
REQUIRED = ("id", "source", "prompt", "checks")
REQUIRED_OF_TEXTS = ("id", "source", "text")
_CONTENT_FIELDS = ("completion", "chosen", "rejected", "label", "responses", "tools")
"""Fields other than the prompt that a model learns from."""
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
        self.where = where
        self.problem = problem

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


@functools.cache
def _structs() -> dict[str, tuple[dict[str, pa.DataType], dict[str, pa.DataType]]]:
    """Return the columns of lists, each with the fields of every item and with its optional fields."""
    # Here and below pyarrow is imported where it is used: plans need rows, but read and write none.
    import pyarrow as pa

    text = pa.string()
    message = {"role": text, "content": text}
    message_more = {"tool_calls": text, "tool_call_id": text, "name": text, "train": pa.bool_()}
    response = {"content": text, "score": pa.float64(), "rank": pa.int32()}
    response_more = {"finished": pa.bool_(), "model": text}
    of_messages = dict.fromkeys(("prompt", "completion", "chosen", "rejected"), (message, message_more))
    return {**of_messages, "responses": (response, response_more)}


@functools.cache
def column_types() -> dict[str, pa.DataType]:
    """Return the known columns in the order they are written, with their types if no message calls a tool."""
    import pyarrow as pa

    types = dict.fromkeys(COLUMNS, pa.string())
    types |= {name: pa.list_(pa.struct(fields)) for name, (fields, _) in _structs().items()}
    types["steps"] = pa.list_(pa.struct({"content": pa.string(), "label": pa.float64()}))
    types |= dict.fromkeys(("chosen_score", "rejected_score", "score"), pa.float64())
    types |= dict.fromkeys((*_FINISHED, "label", "flipped"), pa.bool_())
    types["_source"] = pa.int32()
    return types


def kept_columns(row: Mapping[str, Any]) -> Row:
    """Return a row's columns other than align's own, which a recipe keeps, with a value."""
    return {name: value for name, value in row.items() if name not in COLUMNS and name[:1] != "_" and value is not None}


def _column(name: str, rows: list[Row]) -> pa.Array:
    import pyarrow as pa

    values = [row.get(name) for row in rows]
    if name not in _OPTIONAL:
        return pa.array(values, type=column_types().get(name))
    fields, optional = _structs()[name]
    # An optional field is written only if some item of this file has it.
    used: set[str] = set()
    for items in values:
        for item in items or ():
            used.update(key for key, value in item.items() if value is not None)
    used_optional = {key: kind for key, kind in optional.items() if key in used}
    return pa.array(values, pa.list_(pa.struct(fields | used_optional)))


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as one Parquet file. Known columns have fixed types, also in an empty file.

    Raises ``ValueError`` for a row without a required column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    required = REQUIRED_OF_TEXTS if rows and is_text(rows[0]) else REQUIRED
    for number, row in enumerate(rows):
        missing = [name for name in required if name not in row]
        if missing:
            raise ValueError(f"row {number} has no {', '.join(missing)}")
    # Columns in the order of first use, required ones first. Those that need JSON say so in their metadata.
    names = list(dict.fromkeys([*required, *(name for row in rows for name in row)]))
    kept_names = [name for name in names if name not in COLUMNS]
    encoded = [name for name in kept_names if needs_json(row.get(name) for row in rows)]
    columns = [
        pa.array([to_json_text(row.get(name)) for row in rows], pa.string()) if name in encoded else _column(name, rows)
        for name in names
    ]
    fields = [
        json_field(name) if name in encoded else pa.field(name, column.type)
        for name, column in zip(names, columns, strict=True)
    ]
    pq.write_table(pa.table(columns, schema=pa.schema(fields)), path)


def needs_json(values: Iterable[Any]) -> bool:
    """Return True for values of a kept column that have no type in common, or are lists or mappings."""
    values = [value for value in values if value is not None]
    # Parquet's integers have 64 bits. Types are compared exactly, because a bool is also an int.
    types = {type(value) for value in values}
    integers = [value for value in values if type(value) is int]
    if types == {int}:
        return any(not -(2**63) <= value < 2**63 for value in integers)
    if types == {int, float}:
        return any(abs(value) > _LARGEST_EXACT for value in integers)
    return bool(types & {dict, list, tuple}) or (types <= _PLAIN and len(types) > 1)


_PLAIN = {str, bool, int, float}
_LARGEST_EXACT = 2**53
"""Up to here a float holds every integer exactly."""


def json_field(name: str) -> pa.Field:
    """Return the field of a column whose values are stored as JSON text; its metadata says so."""
    import pyarrow as pa

    return pa.field(name, pa.string(), metadata={JSON_MARK: b"json"})


def is_json(column: pa.Field) -> bool:
    """Return True for a column whose values are stored as JSON text."""
    return bool(column.metadata) and column.metadata.get(JSON_MARK) == b"json"


def to_json_text(value: Any) -> str | None:
    """Return a value as JSON text; None for None."""
    return None if value is None else json.dumps(value, ensure_ascii=False)


def json_columns(schema: pa.Schema) -> list[str]:
    """Return the columns whose values are stored as JSON text."""
    return [column.name for column in schema if is_json(column)]


def decode(row: Row, names: Iterable[str]) -> Row:
    """Return the row itself with the values of the columns ``names`` parsed."""
    for name in names:
        if row.get(name) is not None:
            row[name] = json.loads(row[name])
    return row


def merged_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Return a schema that every file's rows fit after :func:`fit_column`: with all columns and fields of messages.

    A kept column that is of one type in one file and of another in the next is JSON text.
    """
    import pyarrow as pa

    schemas = list(schemas)
    types: dict[str, set[pa.DataType]] = {}
    encoded: set[str] = set()
    for schema in schemas:
        encoded.update(json_columns(schema))
        for column in schema:
            if column.name not in COLUMNS and not pa.types.is_null(column.type):
                types.setdefault(column.name, set()).add(column.type)
    mixed = {name: kinds for name, kinds in types.items() if len(kinds) > 1}
    # Arrow converts integers to floats when schemas are merged. No other mixture has a common type.
    encoded |= {name for name, kinds in mixed.items() if not kinds <= {pa.int64(), pa.float64()}}
    typed_schemas = [pa.schema([column for column in schema if column.name not in encoded]) for schema in schemas]
    merged = pa.unify_schemas(typed_schemas, promote_options="permissive")
    return pa.schema([*merged, *map(json_field, sorted(encoded))]) if encoded else merged


def fit_column(column: pa.ChunkedArray, source: pa.Field, target: pa.Field) -> pa.ChunkedArray:
    """Return a file's column as the merged schema has it.

    Raises ``UserError`` for an integer that a column of floats cannot hold exactly.
    """
    import pyarrow as pa

    if is_json(target) and not is_json(source):
        return pa.chunked_array([pa.array([to_json_text(value) for value in column.to_pylist()], pa.string())])
    try:
        return column.cast(target.type)
    except pa.ArrowInvalid as error:
        raise UserError(
            f"column '{target.name}' has numbers with a fraction, and integers that are too large for such a column "
            f"({error}). Write them as text in the source."
        ) from None


def split_files(path: Path) -> list[Path]:
    """Return the file, or where ``train.parquet`` is missing, its shards ``train-00000-of-00002.parquet`` and so on."""
    if path.exists():
        return [path]
    return sorted(path.parent.glob(f"{path.stem}-?????-of-?????{path.suffix}")) or [path]


def has_rows(path: Path) -> bool:
    """Return True if a split has a row, by the footers of its files."""
    import pyarrow.parquet as pq

    return any(pq.read_metadata(file).num_rows for file in split_files(path) if file.exists())


def read_rows(path: Path) -> list[Row]:
    """Read what :func:`write_rows` wrote, in one file or in shards.

    Raises ``UserError`` for a file that is missing or is no Parquet.
    """
    return list(iter_rows(path))


def iter_rows(path: Path, batch_size: int = 1024) -> Iterator[Row]:
    """Yield the rows that :func:`read_rows` returns, with ``batch_size`` of them in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for file in split_files(path):
            with pq.ParquetFile(file) as parquet:
                encoded = json_columns(parquet.schema_arrow)
                for batch in parquet.iter_batches(batch_size=batch_size):
                    for row in batch.to_pylist():
                        yield _without_absent_fields(decode(row, encoded))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; run the stage that makes it.") from None
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); delete its artifact and rebuild it.") from None


def take_rows(path: Path, places: np.ndarray) -> list[Row]:
    """Return the rows at ``places`` (M,) of one file that :func:`write_rows` wrote, without decoding the others."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    encoded = json_columns(table.schema)
    return [_without_absent_fields(decode(row, encoded)) for row in table.take(places).to_pylist()]


def _without_absent_fields(row: Row) -> Row:
    """Return the row itself without the optional fields that only other rows of its file have."""
    for name in _OPTIONAL.keys() & row.keys():
        row[name] = _without_absent(row[name], _OPTIONAL[name])
    return row


def _without_absent(items: list[dict[str, Any]] | None, optional: Sequence[str]) -> list[dict[str, Any]] | None:
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
    """Return the key of a prompt, see ``turns_key``; of a text, the normalized text."""
    return normalized(row["text"]) if is_text(row) else turns_key(row["prompt"])


def turns_key(messages: Sequence[Message]) -> str:
    """Return the role, the normalized content and the tool calls of every turn as one text."""
    turns = [(turn["role"], normalized(turn["content"] or ""), turn.get("tool_calls") or "") for turn in messages]
    return "\n".join(f"{role}: {text}{calls}" for role, text, calls in turns)


def row_id(row: Row) -> str:
    """Return 16 hex digits, equal for rows of equal content: prompts as compared between splits, replies exactly."""
    return _digest(_content(row)).hex()[:16]


def content_digest(row: Row) -> bytes:
    """Return 16 bytes, equal for rows that teach the same: the content of ``row_id`` and which answers were cut off.

    Two different rows of a million have equal digests with a probability of 1e-27. Ids are no substitute: the ids of
    sampled pairs name a prompt and places among its responses, where the next round puts other responses.
    """
    return _digest([*_content(row), *(name for name in _FINISHED if row.get(name) is False)])[:16]


def _content(row: Row) -> list[Any]:
    if is_text(row):
        return ["text", row["text"]]
    # Replies count exactly, prompts normalized: two rows may differ only in their answers.
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
    """Return False if an answer, given by its field, was cut off; True also if the data does not say."""
    return row.get(f"{side}_finished") is not False
