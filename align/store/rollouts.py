"""Rollouts as Parquet files: the schema, the writer that a resumed run continues, and readers. Torch-free.

A folder holds files that are named by the first update in them. An update extends the last file if that file is small,
else it begins a new file. A file is written under another name and renamed, so every file is complete at any time, and
a reader may open the files while the run continues.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from align.errors import UserError
from align.store.json_files import atomic_draft

ROLLOUTS, VALIDATIONS = "rollouts", "validations"
"""Folders of the responses that a stage learns from, and of the responses to its held-out prompts."""
FILE_BYTES = 2**19
"""Size of a file above which the next update begins a new file. Extending a file rewrites it."""
GROUP_BYTES, MERGED_BYTES = 16 * 2**20, 256 * 2**20
"""Bytes in memory of a row group and of a file after ``merge``."""
FORMAT = "1"
FORMAT_KEY, SETTINGS_KEY = b"align.format", b"align.settings"
"""Keys of a file's metadata: the version of the schema, and the settings of the run as JSON."""

_NUMBERS = pa.list_(pa.field("element", pa.float32()))
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
    "turn_scores": _NUMBERS,
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
    "sampler_logprobs": _NUMBERS,
    "logprobs": _NUMBERS,
    "ref_logprobs": _NUMBERS,
    "token_kl": _NUMBERS,
    "entropy": _NUMBERS,
    "values": _NUMBERS,
    "step_rewards": _NUMBERS,
    "raw_advantages": _NUMBERS,
    "advantages": _NUMBERS,
}
"""Columns with a list for each response: of the prompt's tokens, and of the response's tokens."""
SCHEMA = pa.schema([pa.field(*column) for column in (RESPONSE_COLUMNS | EPISODE_COLUMNS | TOKEN_COLUMNS).items()])
JSON_COLUMNS = ("prompt", "explanation", "messages", "calls", "episode")
"""Columns with JSON as text."""
_SPLIT_COLUMNS = [f"{name}.list.element" for name, kind in TOKEN_COLUMNS.items() if kind is _NUMBERS]
_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    # Numbers by token hardly ever repeat, but their bytes of equal weight do.
    "use_dictionary": [name for name in SCHEMA.names if f"{name}.list.element" not in _SPLIT_COLUMNS],
    "use_byte_stream_split": _SPLIT_COLUMNS,
}

Notify = Callable[[str], None]


# ---- writing ----


@dataclass
class RolloutFiles:
    """Writes the rollouts of a run into ``root/rollouts`` and ``root/validations``, up to ``max_bytes`` in all."""

    root: Path
    max_bytes: int
    settings: Mapping[str, Any]
    """Settings of the run, which every file stores."""
    notify: Notify
    _sizes: dict[Path, int] = field(default_factory=dict, repr=False)
    _last: dict[str, tuple[Path, pa.Table]] = field(default_factory=dict, repr=False)
    """The last file of each folder, with its rows."""
    _has_notified: bool = field(default=False, repr=False)

    def rewind(self, updates: int) -> None:
        """Delete the rows that a run after ``updates`` finished updates writes again."""
        self._sizes.clear()
        self._last.clear()
        # The validation after an update is repeated by a run that resumes there.
        for name, last in ((ROLLOUTS, updates), (VALIDATIONS, updates - 1)):
            self._rewind_folder(name, last)

    def _rewind_folder(self, name: str, last: int) -> None:
        files = rollout_files(self.root / name)
        for path in [path for path in files if int(path.stem) > last]:
            path.unlink()
            files.remove(path)
        self._sizes |= {path: path.stat().st_size for path in files}
        if not files:
            return
        # Only the last file may have rows of earlier and of later updates.
        table = pq.read_table(files[-1], schema=SCHEMA)
        earlier_rows = table.filter(pc.less_equal(table["update"], last))
        if len(earlier_rows) < len(table):
            self._write_file(files[-1], earlier_rows)
        self._last[name] = (files[-1], earlier_rows)

    def write(self, table: pa.Table, name: str = ROLLOUTS) -> None:
        """Add the rows of one update, with the columns of ``SCHEMA``, to the folder ``name``."""
        if not len(table):
            return
        path = self.root / name / f"{table['update'][0].as_py():06d}.parquet"
        last = self._last.get(name)
        # Parquet files cannot be appended to. The last table stays in memory and is written again with the new rows,
        # until its file is large enough.
        if last is not None and self._sizes[last[0]] < FILE_BYTES:
            path = last[0]
            table = pa.concat_tables([last[1], table])
        self._write_file(path, table)
        self._last[name] = (path, table)
        self._limit_size(path)

    def _write_file(self, path: Path, table: pa.Table) -> None:
        self._sizes[path] = write_rollouts(table, path, self.settings)

    def _limit_size(self, written: Path) -> None:
        """Delete the files of the oldest updates until the size is below the limit."""
        total = sum(self._sizes.values())
        for path in sorted(self._sizes, key=lambda path: int(path.stem)):
            if total <= self.max_bytes or path == written:
                return
            # The last file of the other folder may be extended again.
            if any(path == last for last, _ in self._last.values()):
                continue
            total -= self._sizes.pop(path)
            path.unlink()
            if not self._has_notified:
                self._has_notified = True
                self.notify(
                    f"the rollouts exceed rollouts.max_gb {self.max_bytes / 10**9:g}; those of the oldest updates are "
                    "deleted"
                )


def write_rollouts(table: pa.Table, path: Path, settings: Mapping[str, Any]) -> int:
    """Write a table of ``SCHEMA`` with the settings of its run atomically; return the file's bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {FORMAT_KEY: FORMAT, SETTINGS_KEY: json.dumps(settings, default=str)}
    with atomic_draft(path) as draft:
        write_parquet(table.replace_schema_metadata(metadata), draft)
    return path.stat().st_size


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write a table of ``SCHEMA`` as one row group."""
    pq.write_table(table, path, row_group_size=max(1, len(table)), **_OPTIONS)


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


def merge(source: Path, target: Path) -> None:
    """Write the rows of the folder ``source`` as few large files into ``target``, which is written anew."""
    target.mkdir(parents=True, exist_ok=True)
    for path in rollout_files(target):
        path.unlink()
    settings = json.dumps(read_settings(source))
    file: list[pa.Table] = []
    group: list[pa.Table] = []
    # Tables become row groups, and row groups become files, so at most one file is in memory.
    for path in rollout_files(source):
        group.append(pq.read_table(path, schema=SCHEMA))
        if _bytes(group) < GROUP_BYTES:
            continue
        file.append(pa.concat_tables(group))
        group = []
        if _bytes(file) >= MERGED_BYTES:
            _write_groups(file, target, settings)
            file = []
    if group:
        file.append(pa.concat_tables(group))
    if file:
        _write_groups(file, target, settings)


def _bytes(tables: Iterable[pa.Table]) -> int:
    return sum(table.nbytes for table in tables)


def _write_groups(groups: Sequence[pa.Table], folder: Path, settings: str) -> None:
    """Write tables as the row groups of a file."""
    path = folder / f"{groups[0]['update'][0].as_py():06d}.parquet"
    schema = SCHEMA.with_metadata({FORMAT_KEY: FORMAT, SETTINGS_KEY: settings})
    with atomic_draft(path) as draft, pq.ParquetWriter(draft, schema, **_OPTIONS) as writer:
        for group in groups:
            writer.write_table(group.replace_schema_metadata(schema.metadata), row_group_size=len(group))


# ---- reading ----


def rollout_files(folder: Path) -> list[Path]:
    """Return the files of a folder in the order of their updates; a missing folder has none.

    Raises ``UserError`` for an entry that is not a regular file: a pipe would block its reader forever.
    """
    files = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    for path in files:
        # A running stage may delete a file at any time.
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise UserError(f"{path}: not a regular file, so it is not read; remove it.")
    return files


def open_rollouts(folder: str | Path) -> ds.Dataset:
    """Return the files of a folder as a dataset of pyarrow, which is read later.

    The run may still write: the dataset has the files that are complete now. A missing folder is an empty dataset.
    """
    files = rollout_files(Path(folder))
    if not files:
        return ds.dataset(SCHEMA.empty_table())
    return ds.dataset([str(path) for path in files], schema=SCHEMA, format="parquet")


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run that wrote the files; empty without files."""
    for path in rollout_files(folder)[:1]:
        settings: dict[str, Any] = json.loads((pq.read_schema(path).metadata or {}).get(SETTINGS_KEY, b"{}"))
        return settings
    return {}


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
