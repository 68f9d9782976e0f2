"""The view ``data``: rows of builds, dropped rows by reason, masks by token, findings, and two builds compared.

It reads with the functions of ``align data show|lint|diff``. Rows are read a page at a time. Tokens need the tokenizer
of a finished stage with a checkpoint, which is loaded by the first request for it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
from fastapi import APIRouter, Query

from align.data.builds.build_files import batches, is_build, kept_texts, message_text, rows_by_number, shards
from align.data.builds.diff import compare
from align.data.rows import Row, is_text
from align.errors import UserError, with_article
from align.report.dataset.preview import load_preview_tokenizer, token_views
from align.report.run.data_ledgers import data_sections
from align.runs.run_page import RunOutline
from align.store.artifacts import DATASETS, Artifact
from align.store.json_files import DamagedFile, parse_object, read_file
from align.studio.context import NotFound, StudioContext, checked_name

Split = Literal["train", "test", "dropped"]
MAX_ROWS = 50
MAX_TEXT, MAX_PIECES = 6_000, 4_000
"""Characters of a text and pieces of a row that are shown."""
MAX_TOKENIZERS = 4
MAX_EXAMPLES = 5
FINDINGS = "findings.json"
SIDES = ("completion", "chosen", "rejected")


@dataclass(frozen=True)
class RowFilter:
    """Conditions of rows: source, beginning of the id, and for dropped rows the reason. Empty holds for all."""

    source: str = ""
    id: str = ""
    reason: str = ""

    def numbers(self, folder: Path, split: str) -> np.ndarray:
        """Return the numbers of the rows that meet the conditions, counted from 0."""
        columns = {"source": self.source, "id": self.id, "reason": self.reason}
        wanted = {name: value for name, value in columns.items() if value}
        start = 0
        found = []
        for batch in batches(folder, split, ["id", "source", "reason", "where"]):
            mask = np.ones(batch.num_rows, dtype=bool)
            for name, value in wanted.items():
                if name not in batch.schema.names:
                    mask[:] = False
                    continue
                column = batch.column(name)
                holds = pc.starts_with(column, value) if name == "id" else pc.equal(column, value)
                mask &= np.asarray(holds.fill_null(False))
            found.append(start + np.flatnonzero(mask))
            start += batch.num_rows
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def create_router(context: StudioContext) -> APIRouter:
    """Return the addresses of the view."""
    router = APIRouter(prefix="/data")
    view = DataView(context)
    router.add_api_route("", view.list_stages, methods=["GET"])
    router.add_api_route("/compare", view.compare, methods=["GET"])
    router.add_api_route("/{run}/{stage}", view.read_stage, methods=["GET"])
    router.add_api_route("/{run}/{stage}/rows", view.read_rows, methods=["GET"])
    router.add_api_route("/{run}/{stage}/rows/{split}/{number}", view.read_row, methods=["GET"])
    return router


class DataView:
    """The answers of the view."""

    def __init__(self, context: StudioContext) -> None:
        self.context = context
        self.index = context.index
        self._lock = threading.Lock()
        self._tokenizer = functools.lru_cache(MAX_TOKENIZERS)(load_preview_tokenizer)
        self._section = functools.lru_cache(256)(self._read_section)

    def list_stages(self) -> dict[str, Any]:
        """Return the finished data stages of all runs, with the rows of their splits."""
        stages = []
        for name, run in self.index.read().runs.items():
            for stage in run.outline.stages:
                artifact = self._find(run.outline, stage)
                if artifact is not None and artifact.kind in DATASETS and is_build(artifact.path):
                    section = self._section(artifact.path, artifact.stage)
                    kept = {"splits": section["splits"], "dropped": sum(step["lost"] for step in section["steps"])}
                    kind = str(artifact.record.get("kind"))
                    stages.append({"run": name, "stage": stage, "kind": kind, "key": artifact.key[:12]} | kept)
        return {"stages": stages}

    def read_stage(self, run: str, stage: str) -> dict[str, Any]:
        """Return the ledger of a build, the stages with a tokenizer, and the findings of the stages that learned."""
        outline = self.context.outline(run)
        artifact = self._require(outline, stage)
        section = self._section(artifact.path, artifact.stage)
        models = [name for name in outline.stages if self._tokenizer_folder(outline, name) is not None]
        splits = {name: len(shards(artifact.path, name)) > 0 for name in ("train", "test", "dropped")}
        return {
            **{name: section[name] for name in ("stage", "kind", "steps", "sources", "splits")},
            "has": splits,
            "models": models,
            "findings": self._findings(outline, stage),
        }

    def read_rows(
        self,
        run: str,
        stage: str,
        split: Split = "train",
        source: str = "",
        id: str = "",
        reason: str = "",
        model: str = "",
        offset: int = Query(0, ge=0),
        limit: int = Query(10, ge=1, le=MAX_ROWS),
    ) -> dict[str, Any]:
        """Return a page of rows; with ``model`` as the tokens of that stage's tokenizer."""
        outline = self.context.outline(run)
        folder = self._require(outline, stage).path
        numbers = RowFilter(source, id, reason).numbers(folder, split)
        page = [int(number) for number in numbers[offset : offset + limit]]
        rows = rows_by_number(folder, split, page)
        tokenizer = self._load_tokenizer(outline, model) if model and split != "dropped" else None
        return {
            "matches": len(numbers),
            "offset": offset,
            "rows": [self._row(rows[number], number, tokenizer) for number in page],
        }

    def read_row(self, run: str, stage: str, split: Split, number: int, model: str = "") -> dict[str, Any]:
        """Return one row of a split, by its number from 0."""
        outline = self.context.outline(run)
        folder = self._require(outline, stage).path
        row = rows_by_number(folder, split, [number]).get(number)
        if row is None:
            raise NotFound(f"The split '{split}' of '{stage}' has no row {number}.")
        return self._row(row, number, self._load_tokenizer(outline, model) if model else None)

    def compare(self, a_run: str, a_stage: str, b_run: str, b_stage: str) -> dict[str, Any]:
        """Return the differences of two builds, as ``align data diff``."""
        a = self._require(self.context.outline(a_run), a_stage)
        b = self._require(self.context.outline(b_run), b_stage)
        content = compare(a.path, b.path, MAX_EXAMPLES)
        return content | {"a": f"{a_run} · {a_stage} {a.key[:12]}", "b": f"{b_run} · {b_stage} {b.key[:12]}"}

    # ---- rows ----

    def _row(self, row: Row, number: int, tokenizer: Any) -> dict[str, Any]:
        """Return a row for the browser: messages and answers, or a dropped row, or tokens with their masks."""
        content: dict[str, Any] = {"number": number, "id": row.get("id", ""), "source": row.get("source", "")}
        if "reason" in row and "row" in row:
            return content | _dropped_row(row)
        content["kept"] = [{"name": name, "text": _shorten(text)} for name, text in kept_texts(row).items()]
        if tokenizer is not None:
            with self._lock:
                views = [
                    {
                        "title": view.title,
                        "tokens": len(view.ids),
                        "trained": sum(view.trained),
                        "notes": view.notes,
                        "pieces": [asdict(piece) for piece in view.pieces(tokenizer)[:MAX_PIECES]],
                    }
                    for view in token_views(tokenizer, row)
                ]
            return content | {"views": views}
        if is_text(row):
            return content | {"turns": [_turn("text", row["text"])], "answers": []}
        turns = [_turn(str(message["role"]), message_text(message)) for message in row.get("prompt", [])]
        return content | {"turns": turns, "answers": _answers(row)}

    # ---- lookups ----

    def _find(self, outline: RunOutline, stage: str) -> Artifact | None:
        if stage not in outline.stages:
            raise NotFound(f"The run '{outline.name}' has no stage '{checked_name('stage', stage)}'.")
        kind, key = outline.stages[stage]
        return self.context.store.find_intact(kind, key, stage)

    def _require(self, outline: RunOutline, stage: str) -> Artifact:
        artifact = self._find(outline, stage)
        if artifact is None:
            raise UserError(f"{stage}: is not finished in the run '{outline.name}'.")
        if artifact.kind not in DATASETS or not is_build(artifact.path):
            raise UserError(f"{stage}: makes {with_article(artifact.kind)}, not rows.")
        return artifact

    def _read_section(self, folder: Path, stage: str) -> dict[str, Any]:
        """Return the ledger of a finished build, which never changes."""
        record = parse_object(read_file(folder / "record.json"))
        kind = next(kind for kind in DATASETS if str(kind) == record["makes"])
        return data_sections([Artifact(stage, kind, folder, record)])[0]

    def _tokenizer_folder(self, outline: RunOutline, stage: str) -> Path | None:
        kind, key = outline.stages[stage]
        folder = self.context.store.folder(kind, key) / "model"
        return folder if (folder / "tokenizer_config.json").is_file() else None

    def _load_tokenizer(self, outline: RunOutline, stage: str) -> Any:
        folder = self._tokenizer_folder(outline, stage) if stage in outline.stages else None
        if folder is None:
            raise NotFound(f"The run '{outline.name}' has no finished stage '{stage[:80]}' with a tokenizer.")
        with self._lock:
            return self._tokenizer(folder)[0]

    def _findings(self, outline: RunOutline, stage: str) -> list[dict[str, Any]]:
        """Return what the linter found for each stage that read these rows."""
        findings = []
        for name in outline.stages:
            if stage not in outline.inputs(name):
                continue
            kind, key = outline.stages[name]
            for folder in (self.context.store.folder(kind, key), self.context.store.partial(kind, key) / "output"):
                try:
                    content = parse_object(read_file(folder / FINDINGS))
                except (OSError, DamagedFile):
                    continue
                findings.append({"stage": name, "findings": content.get("findings") or []})
                break
        return findings


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "text": _shorten(text)}


def _answers(row: Row) -> list[dict[str, Any]]:
    """Return the answers of a row with their titles and scores."""
    answers = [
        {"title": side, "score": row.get(f"{side}_score"), "text": _shorten(message_text(message))}
        for side in SIDES
        for message in row.get(side, [])
    ]
    for number, response in enumerate(row.get("responses", []), start=1):
        text = _shorten(message_text(response))
        answers.append({"title": f"response {number}", "score": response.get("score"), "text": text})
    return answers


def _dropped_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dropped row: the step and the reason, details, and the row as text."""
    texts = {name: _shorten(str(row[name])) for name in ("where", "step", "reason", "detail") if row.get(name)}
    return texts | {"text": _shorten(str(row["row"]))}


def _shorten(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    return f"{text[: MAX_TEXT * 2 // 3]} … ({len(text) - MAX_TEXT:,} more characters) … {text[-(MAX_TEXT // 3) :]}"
