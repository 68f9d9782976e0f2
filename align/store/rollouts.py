"""Rollouts as Parquet files: the schema, the list of a folder's files, and readers. Torch-free.

A file is written once, under a name with its first and its last update and the beginning of its digest. Small files are
merged into new files (``rollout_writer``). While the stage runs, a manifest next to the folder lists the files that
together hold each row once. It is replaced atomically. The files that it no longer lists stay for some minutes, so a
reader takes one manifest and reads its files to the end. The record lists the files of a finished stage.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from align.errors import UserError
from align.store.fingerprint import file_state
from align.store.json_files import DamagedFile, parse_sealed, validate
from align.store.record import RECORD, Digest, read_record

ROLLOUTS, VALIDATIONS = "rollouts", "validations"
"""Folders of the responses that a stage learns from, and of the responses to its held-out prompts."""
FORMAT = "1"
FORMAT_KEY, SETTINGS_KEY = b"align.format", b"align.settings"
"""Keys of a file's metadata: the version of the schema, and the settings of the run as JSON."""

NUMBERS = pa.list_(pa.field("element", pa.float32()))
_IDS = pa.list_(pa.field("element", pa.int32()))
_MASK = pa.list_(pa.field("element", pa.bool_()))
_TEXTS = pa.list_(pa.field("element", pa.string()))

RESPONSE_COLUMNS = {
    "update": pa.int32(),
    "round": pa.int32(),
    "index": pa.int32(),
    "group": pa.int32(),
    "split": pa.string(),
    "prompt_id": pa.string(),
    "prompt": pa.string(),
    "reference": pa.string(),
    "response": pa.string(),
    "score": pa.float32(),
    "scores": pa.map_(pa.string(), pa.float32()),
    "reasons": pa.map_(pa.string(), pa.string()),
    "explanation": pa.string(),
    "gold": pa.float32(),
    "tokens": pa.int32(),
    "finished": pa.bool_(),
    "learned": pa.bool_(),
    "kl": pa.float32(),
    "thought_tokens": pa.int32(),
    "thought_end": pa.int32(),
    "open_thought": pa.bool_(),
}
"""Columns with one value for each response."""
EPISODE_COLUMNS = {
    "messages": pa.string(),
    "calls": pa.string(),
    "turns": pa.int32(),
    "turn_scores": NUMBERS,
    "stop": pa.string(),
    "failure": pa.string(),
    "episode": pa.string(),
}
"""Columns of episodes, null without an environment."""
TOKEN_COLUMNS = {
    "prompt_ids": _IDS,
    "token_ids": _IDS,
    "token_texts": _TEXTS,
    "response_mask": _MASK,
    "learn_mask": _MASK,
    "forced": _MASK,
    "weights_update": _IDS,
    "sampler_logprobs": NUMBERS,
    "logprobs": NUMBERS,
    "ref_logprobs": NUMBERS,
    "token_kl": NUMBERS,
    "entropy": NUMBERS,
    "values": NUMBERS,
    "step_rewards": NUMBERS,
    "raw_advantages": NUMBERS,
    "advantages": NUMBERS,
}
"""Columns with a list for each response: of the prompt's tokens, and of the response's tokens."""
SCHEMA = pa.schema([pa.field(*column) for column in (RESPONSE_COLUMNS | EPISODE_COLUMNS | TOKEN_COLUMNS).items()])
JSON_COLUMNS = ("prompt", "explanation", "messages", "calls", "episode")
"""Columns with JSON as text."""

Result = TypeVar("Result")
_UPDATES = re.compile(r"(\d{6,9})-(\d{6,9})-[0-9a-f]{8}\.parquet")


class RolloutFile(BaseModel):
    """A file of a manifest."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: str = Field(pattern=r"^[a-z0-9-]+\.parquet$")
    bytes: int
    sha256: Digest
    level: int = 0
    """Number of merges behind its rows."""


class Manifest(BaseModel):
    """The files of a running stage, in the order of their rows."""

    files: list[RolloutFile]


def updates_of(name: str) -> tuple[int, int] | None:
    """Return the first and the last update of the file ``name``; None for rows that belong to no update."""
    match = _UPDATES.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


# ---- manifests ----


def manifest_path(folder: Path) -> Path:
    """Return the path of the manifest, next to its folder."""
    return folder.with_name(f"{folder.name}.json")


def read_manifest(folder: Path) -> list[RolloutFile] | None:
    """Return the files of a running stage; None without a manifest. Raises ``UserError`` for a damaged manifest."""
    path = manifest_path(folder)
    try:
        with _open_regular(path) as file:
            return validate(Manifest, parse_sealed(file.read())).files
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        raise UserError(f"{path}: damaged: it {error}. A running stage writes it anew with its next update.") from None


# ---- rows ----


def make_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rows as a table of ``SCHEMA``; missing columns are null, and values of JSON columns are encoded."""
    encoded = []
    for row in rows:
        unknown = sorted(row.keys() - set(SCHEMA.names))
        if unknown:
            raise ValueError(f"{unknown[0]} is no column of rollouts")
        encoded.append({name: encode_value(name, value) for name, value in row.items()})
    return pa.Table.from_pylist(encoded, SCHEMA)


def encode_value(name: str, value: Any) -> Any:
    """Return the value of a column as pyarrow takes it: JSON as text, mappings as pairs."""
    if name in JSON_COLUMNS:
        return to_json(value)
    if isinstance(value, str):
        return to_text(value)
    if isinstance(value, Mapping):
        return [(encode_value("", key), encode_value("", item)) for key, item in value.items()]
    # Texts of tokens may be halves of characters; numbers need no look.
    if isinstance(value, list | tuple) and any(isinstance(item, str) for item in value):
        return [encode_value("", item) for item in value]
    return value


def to_json(value: Any) -> str | None:
    """Return a value as JSON text, None for None."""
    if value is None:
        return None
    text = json.dumps(value, ensure_ascii=False, default=str)
    # Half a character cannot be stored as UTF-8, but as an escape of JSON.
    return text if _is_utf8(text) else json.dumps(value, default=str)


def to_text(text: str) -> str:
    """Return a text without halves of characters, which a model may write into the JSON of a call."""
    return text if _is_utf8(text) else text.encode("utf-8", "replace").decode("utf-8")


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def prompt_digest(prompt: Any) -> str:
    """Return the identity of a prompt, a text or messages."""
    return hashlib.sha256(json.dumps(prompt, sort_keys=True, default=str).encode()).hexdigest()[:16]


def identify_prompt(row: Mapping[str, Any]) -> str:
    """Return the ``prompt_id`` of a data set's row: its own id, or a digest of its prompt."""
    identity = row.get("id")
    return to_text(identity) if isinstance(identity, str) and identity else prompt_digest(row["prompt"])


def is_kept(prompt_id: str, share: float) -> bool:
    """Return True if a prompt is among the ``share`` of all prompts whose responses are stored."""
    number = int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:6], "big")
    return number < share * 2**48


# ---- reading ----


def rollout_files(folder: Path) -> list[Path]:
    """Return the files of a folder in the order of their updates; a missing folder has none.

    Raises ``UserError`` for an entry that is not a regular file: a pipe would block its reader forever.
    """
    entries = _regular_files(folder)
    listed = read_manifest(folder) if folder.is_dir() else None
    return entries if listed is None else [folder / file.name for file in listed]


def checked_files(folder: Path) -> list[Path]:
    """Return the files of a folder, each of which is as the manifest or the record of the finished stage lists it.

    Raises ``UserError`` for another file. A folder without manifest and record has the files that are there.
    """
    entries = _regular_files(folder)
    source = manifest_path(folder)
    if (manifest := read_manifest(folder)) is not None:
        listed = {file.name: (file.bytes, file.sha256) for file in manifest}
    else:
        source = folder.parent / RECORD
        try:
            outputs = read_record(folder.parent)["outputs"]
        except FileNotFoundError:
            return entries
        paths = [(PurePosixPath(name), outputs[name]) for name in sorted(outputs)]
        listed = {
            path.name: (entry["bytes"], entry["sha256"]) for path, entry in paths if str(path.parent) == folder.name
        }
        for path in entries:
            if path.name not in listed:
                raise UserError(f"{path}: the record of its stage does not list this file; remove it.")
    for name, (size, sha256) in listed.items():
        check_file(folder / name, size, sha256, source)
    return [folder / name for name in listed]


def read_located(locate: Callable[[], Path], read: Callable[[Path], Result]) -> Result:
    """Return what ``read`` returns for the folder of a stage that may run.

    A stage that finishes moves its rollouts to another folder, which is read if it finished meanwhile.
    """
    folder = locate()
    try:
        result = read(folder)
    except (UserError, OSError):
        if locate() == folder:
            raise
    else:
        if locate() == folder:
            return result
    return read(locate())


def _regular_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    for path in files:
        # A running stage may delete a file at any time.
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise _irregular(path)
    return files


def _irregular(path: Path) -> UserError:
    return UserError(f"{path}: not a regular file, so it is not read; remove it.")


def _open_regular(path: Path) -> io.BufferedReader:
    """Open a file to be read. Raises ``UserError`` for another kind of entry, without waiting for a pipe's writer."""
    try:
        file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; it must be a regular file.") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _irregular(path)
    return file


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def check_file(path: Path, size: int, sha256: str, source: Path) -> None:
    """Raise ``UserError`` for a file that differs from its entry in ``source``, a manifest or a record."""
    is_finished = source.name == RECORD
    remedy = "Make the stage again with --rebuild." if is_finished else "Delete it; the stage continues without it."
    try:
        with _open_regular(path) as file:
            state = tuple(file_state(os.fstat(file.fileno())))
        is_equal = path.stat().st_size == size and _digest(path, state) == sha256
    except FileNotFoundError:
        raise UserError(f"{path}: {source.name} lists this file, and it is missing. {remedy}") from None
    if not is_equal:
        raise UserError(f"{path}: it has another sha256 than {source.name} says. {remedy}")


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, state: tuple[int, ...]) -> str:
    """Return a file's digest, computed once while its state is unchanged."""
    with _open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_rollouts(folder: str | Path) -> ds.Dataset:
    """Return the files of a folder as a dataset of pyarrow, which is read later.

    The run may still write: the dataset has the rows of the updates until now, and its files stay for some minutes. A
    missing folder is an empty dataset.
    """
    return rollout_dataset(rollout_files(Path(folder)))


def rollout_dataset(files: Sequence[Path]) -> ds.Dataset:
    """Return files as a dataset of pyarrow."""
    if not files:
        return ds.dataset(SCHEMA.empty_table())
    return ds.dataset([str(path) for path in files], schema=SCHEMA, format="parquet")


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run that wrote the files; empty without files. Raises as ``file_settings``."""
    files = rollout_files(folder)
    return file_settings(files[0]) if files else {}


def file_settings(path: Path) -> dict[str, Any]:
    """Return the settings of the run that wrote a file. Raises ``UserError`` for another file."""
    try:
        with _open_regular(path) as file:
            metadata = pq.read_schema(file).metadata or {}
        settings: dict[str, Any] = json.loads(metadata.get(SETTINGS_KEY, b"{}"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return settings


def rollout_rows(
    data: ds.Dataset | pa.Table, columns: Sequence[str] | None = None, **options: Any
) -> Iterator[dict[str, Any]]:
    """Yield responses as dictionaries, with JSON decoded; ``Dataset.to_batches`` gets the ``options``.

    Few rows are in memory at a time.
    """
    scanned = ds.dataset(data) if isinstance(data, pa.Table) else data
    batches = scanned.to_batches(columns=None if columns is None else list(columns), **{"batch_size": 256, **options})
    for batch in batches:
        for row in batch.to_pylist(maps_as_pydicts="lossy"):
            yield {name: _decode(name, value) for name, value in row.items()}


def _decode(name: str, value: Any) -> Any:
    return json.loads(value) if name in JSON_COLUMNS and value is not None else value
