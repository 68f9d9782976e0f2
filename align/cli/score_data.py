"""Rows and stored responses that ``align score`` reads: builds, recipes, files, and the artifacts of stages.

Has no heavy imports.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.cli.arguments import RECIPE_SUFFIXES, find_artifact, find_build
from align.data.builds.build_files import is_build, rows, shards
from align.data.final_answers import AnswerText, split_thought
from align.data.rows import BadRecord, Dropped, Row, user
from align.errors import UserError
from align.evaluation.rescoring import StoredResponse
from align.runner.open_store import open_store
from align.store.record import RECORD, read_artifact
from align.store.store import Store

SAMPLES = "samples.jsonl"
"""File with the responses of a ``sample`` stage."""
ROLLOUT_COLUMNS = ("update", "prompt_id", "prompt", "response", "score", "finished", "thought_end")
"""Columns of stored rollouts that are read."""
SIDES = ("completion", "chosen", "rejected")


@dataclass(frozen=True)
class ScoreData:
    """Rows, and responses to them."""

    name: str
    rows: list[Row] = field(default_factory=list)
    responses: list[StoredResponse] = field(default_factory=list)


def read_data(word: str, store: str | None, split: str, rows_from: str | None = None) -> ScoreData:
    """Return the rows and responses that ``word`` names.

    Args:
        word: A recipe, a folder (of a build or of a stage's artifact), a key, ``PIPELINE:STAGE``, or a file of records.
        store: The store, as on the command line.
        split: Split of a build, and of a sample stage's responses.
        rows_from: Build with the rows that the responses answer. By default an artifact's own prompts.

    Raises:
        UserError: There is no such data, or it has no rows.
    """
    data = _read(word, store, split, rows_from)
    if not data.rows:
        raise UserError(f"{word}: has no {split} rows to score; try another --split.")
    return data


def _read(word: str, store: str | None, split: str, rows_from: str | None) -> ScoreData:
    path = Path(word)
    if not path.exists() and (path.suffix or "/" in word) and ":" not in word:
        raise UserError(f"{word}: there is no such file or folder.")
    if path.is_file() and path.suffix not in RECIPE_SUFFIXES:
        return _read_file(path, split, _JoinedRows.read(rows_from, store))
    if path.is_dir() or path.is_file():
        folder = path if path.is_dir() else find_build(word, store).folder
    else:
        folder = find_artifact(word, store).path
    has_rollouts = any((folder / "rollouts").glob("*.parquet"))
    if (folder / SAMPLES).is_file() or has_rollouts:
        joined = _JoinedRows.read(rows_from, store) or _JoinedRows.of_artifact(folder, store)
        if (folder / SAMPLES).is_file():
            return _read_file(folder / SAMPLES, split, joined)
        return _read_rollouts(folder, split, joined)
    if not is_build(folder):
        raise UserError(f"{word}: has neither rows (train or test Parquet files) nor {SAMPLES} nor rollouts.")
    if not shards(folder, split):
        raise UserError(f"{word}: has no {split} split.")
    build_rows = list(rows(folder, split))
    return ScoreData(word, build_rows, [response for row in build_rows for response in _responses_of(row)])


class _JoinedRows:
    """Rows of a build by id and by prompt, since files of responses lack their columns."""

    def __init__(self, folder: Path) -> None:
        self._rows: dict[str, Row] = {}
        for split in ("train", "test"):
            for row in rows(folder, split):
                self._rows.setdefault(_prompt_key(row.get("prompt")), row)
                if row.get("id"):
                    self._rows.setdefault(str(row["id"]), row)

    @classmethod
    def read(cls, word: str | None, store: str | None) -> _JoinedRows | None:
        """Return the rows of the build that ``word`` names; None without a word."""
        return None if word is None else cls(find_build(word, store).folder)

    @classmethod
    def of_artifact(cls, folder: Path, store: str | None) -> _JoinedRows | None:
        """Return the rows of the prompts that a stage has answered; None if they are not in the store."""
        if not (folder / RECORD).is_file():
            return None
        key = (read_artifact(folder).record.get("inputs") or {}).get("prompts")
        if not isinstance(key, str):
            return None
        try:
            artifact = _store_of(folder, store).resolve(key)
        except UserError:
            return None
        return cls(artifact.path) if is_build(artifact.path) else None

    def complete(self, record: Mapping[str, Any]) -> Row:
        """Return a record with the columns of its row."""
        identity = str(record.get("id", ""))
        row = self._rows.get(identity) or self._rows.get(_prompt_key(record.get("prompt"))) or {}
        return {**row, **record}


def _store_of(folder: Path, store: str | None) -> Store:
    """Return the store that the command line names, else the store that a folder is in."""
    if store is not None:
        return open_store(None, store)
    return open_store(None, str(folder.resolve().parents[1]))


def _prompt_key(prompt: Any) -> str:
    return "" if prompt is None else json.dumps(prompt, sort_keys=True, default=str)


def _read_file(path: Path, split: str, joined: _JoinedRows | None) -> ScoreData:
    """Read a file of records: of stored responses, else of any format that a recipe reads."""
    from align.data.formats.reading import is_readable, read_file

    if not is_readable(path):
        raise UserError(f"{path}: neither a recipe (.yaml) nor a file of records (.jsonl, .json, .csv, .parquet).")
    records = []
    for item in read_file(path):
        if isinstance(item, BadRecord):
            raise item
        records.append(item)
    if not any(_texts(record) is not None for _, record in records):
        converted = _convert_records(path)
        return ScoreData(str(path), converted, [response for row in converted for response in _responses_of(row)])
    return _score_data(str(path), records, split, joined)


def _read_rollouts(folder: Path, split: str, joined: _JoinedRows | None) -> ScoreData:
    """Read the rollouts that a stage stored."""
    from align.store.rollouts import ROLLOUTS, open_rollouts, rollout_rows

    records = []
    for number, row in enumerate(rollout_rows(open_rollouts(folder / ROLLOUTS), ROLLOUT_COLUMNS), start=1):
        columns = {name: value for name, value in row.items() if value is not None}
        records.append((f"{folder}: rollout {number}", {"id": columns.pop("prompt_id", str(number)), **columns}))
    return _score_data(str(folder), records, split, joined)


def _score_data(
    name: str, records: Sequence[tuple[str, Mapping[str, Any]]], split: str, joined: _JoinedRows | None
) -> ScoreData:
    """Return the rows and responses of records, each with its place."""
    data_rows: list[Row] = []
    responses: list[StoredResponse] = []
    for number, (place, record) in enumerate(records, start=1):
        if record.get("split") not in (None, split):
            continue
        texts = _texts(record)
        if texts is None:
            raise UserError(f"{place}: has no response (`response`, `responses` or `texts`), as other records have.")
        row = _row_of(record, number, joined)
        data_rows.append(row)
        responses += _stored(record, row, texts)
    return ScoreData(name, data_rows, responses)


def _row_of(record: Mapping[str, Any], number: int, joined: _JoinedRows | None) -> Row:
    """Return the row that a record of responses answers, without the responses."""
    other_fields = {
        name: value for name, value in record.items() if name not in ("texts", "responses", "response", "row")
    }
    row: Row = {"id": str(number), "source": "", "checks": "", **other_fields, **(record.get("row") or {})}
    if isinstance(row.get("prompt"), str):
        row["prompt"] = [user(row["prompt"])]
    row.setdefault("prompt", [])
    return row if joined is None else joined.complete({name: value for name, value in row.items() if value != ""})


def _texts(record: Mapping[str, Any]) -> list[str] | None:
    """Return the responses of a record; None if it has none."""
    for name in ("texts", "responses"):
        value = record.get(name)
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            return value
    value = record.get("response")
    return [value] if isinstance(value, str) else None


def _stored(record: Mapping[str, Any], row: Row, texts: Sequence[str]) -> Iterator[StoredResponse]:
    """Yield the responses of a record, with the scores and thoughts that it has."""
    count = len(texts)
    scores = _list_of(record, "scores", "score", count)
    are_finished = _list_of(record, "finished", "finished", count)
    ends = _list_of(record, "thought_end", "thought_end", count)
    for index, text in enumerate(texts):
        end = ends[index]
        answer = split_thought(text) if end is None else AnswerText.cut(text, int(end))
        score = scores[index]
        stored_score = float(score) if isinstance(score, int | float) and not isinstance(score, bool) else None
        yield StoredResponse(row, answer, str(index + 1), are_finished[index] is not False, stored_score)


def _list_of(record: Mapping[str, Any], list_name: str, single_name: str, count: int) -> list[Any]:
    """Return a value for each response; None for all if the record has none, or another number of them."""
    values = record.get(list_name)
    if isinstance(values, list) and len(values) == count:
        return values
    return [record.get(single_name)] if count == 1 and not isinstance(record.get(single_name), list) else [None] * count


def _convert_records(path: Path) -> list[Row]:
    """Return the rows of a file in a format that a recipe detects, with all other columns of its records."""
    from align.config.recipe.source_settings import FilesSource
    from align.config.validation import validate_plain
    from align.data.builds.dataset_recipe import kind_of
    from align.data.formats.converters import convert
    from align.data.sources import choose_format, read

    source = validate_plain(FilesSource, {"type": "files", "paths": [str(path.absolute())], "format": "auto"})
    choice = choose_format(source, read(source, Path.cwd()))
    kind = kind_of(choice.format.form)
    converted: list[Row] = []
    for item in choice.records:
        if isinstance(item, BadRecord):
            raise item
        place, record = item
        for row in convert(record, choice.format, place, kind):
            if not isinstance(row, Dropped):
                converted.append({"source": path.stem, **record, **row})
    return converted


def _responses_of(row: Row) -> Iterator[StoredResponse]:
    """Yield the answers that a row has."""
    for side in SIDES:
        messages = row.get(side)
        if messages and isinstance(messages, list):
            text = str(messages[-1].get("content") or "")
            has_end = row.get(f"{side}_finished") is not False
            yield StoredResponse(row, split_thought(text), side, has_end, row.get(f"{side}_score"))
    for number, response in enumerate(row.get("responses") or (), start=1):
        yield StoredResponse(row, split_thought(response["content"]), str(number), True, response.get("score"))
