"""The view ``rollouts``: stored rollouts of the stages of all runs, as ``align.studio.rollouts.queries`` reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from align.store.artifacts import CHECKPOINTS
from align.store.rollouts import ROLLOUTS, VALIDATIONS
from align.studio.context import NotFound, StudioContext
from align.studio.rollouts.details import Base, RolloutDetails
from align.studio.rollouts.filters import MAX_NAME, Name, RolloutFilter, TableQuery
from align.studio.rollouts.parquet_reader import ParquetReader
from align.studio.rollouts.queries import RolloutTable

MAX_PARTS = 20
"""Parts of the score in a curve."""

FOLDERS = (ROLLOUTS, VALIDATIONS)
Folder = Literal["rollouts", "validations"]


class MeansQuery(RolloutFilter):
    """Conditions of rows, and the parts of the score whose means are asked for."""

    parts: list[Name] = Field([], max_length=MAX_PARTS)


def create_router(context: StudioContext) -> APIRouter:
    """Return the addresses of the view."""
    router = APIRouter(prefix="/rollouts")
    stored = StoredRollouts(context)

    @router.get("")
    def list_stages() -> dict[str, Any]:
        return {"runs": stored.stages()}

    @router.get("/{run}/{stage}/{folder}")
    def read_page(run: str, stage: str, folder: Folder, query: Annotated[TableQuery, Query()]) -> dict[str, Any]:
        return asdict(stored.table(run, stage, folder).page(query))

    @router.get("/{run}/{stage}/{folder}/facets")
    def read_facets(run: str, stage: str, folder: Folder) -> dict[str, Any]:
        return stored.details(run, stage, folder).facets()

    @router.get("/{run}/{stage}/{folder}/means")
    def read_means(run: str, stage: str, folder: Folder, query: Annotated[MeansQuery, Query()]) -> dict[str, Any]:
        return {"points": stored.details(run, stage, folder).means(query, query.parts)}

    @router.get("/{run}/{stage}/{folder}/prompt")
    def read_prompt(
        run: str,
        stage: str,
        folder: Folder,
        prompt_id: Annotated[str, Query(max_length=MAX_NAME)],
        updates: Annotated[str, Query(pattern=r"^[0-9,]{0,400}$")] = "",
        base: Base = "previous",
    ) -> dict[str, Any]:
        numbers = [int(number) for number in updates.split(",") if number]
        answers = stored.details(run, stage, folder).prompt(prompt_id, numbers, base)
        if not answers["answers"]:
            raise NotFound(f"{run}/{stage}: no response to the prompt {prompt_id[:80]!r} is stored.")
        return answers

    @router.get("/{run}/{stage}/{folder}/row")
    def read_row(
        run: str, stage: str, folder: Folder, identity: Annotated[str, Query(alias="id", max_length=80)]
    ) -> dict[str, Any]:
        row = stored.details(run, stage, folder).row(identity)
        if row is None:
            raise NotFound(f"{run}/{stage}: no rollout {identity!r} is stored. A run may delete the oldest updates.")
        return row

    return router


class StoredRollouts:
    """The folders of stored rollouts in a store."""

    def __init__(self, context: StudioContext) -> None:
        self.context = context

    @functools.cached_property
    def _reader(self) -> ParquetReader:
        # Opened by the first request: DuckDB is imported then.
        return ParquetReader(self.context.root)

    def stages(self) -> list[dict[str, Any]]:
        """Return the runs that have stored rollouts, the newest first, each with its stages and their folders."""
        store = self.context.store
        runs = []
        for name, run in sorted(store.runs().items(), key=lambda item: -item[1]["when"]):
            stages = []
            for stage, link in run["stages"].items():
                kind = link["kind"]
                available = [name for name in FOLDERS if self._folder(kind, link["key"], name).is_dir()]
                if available:
                    is_running = not store.folder(kind, link["key"]).is_dir()
                    stages.append({"stage": stage, "kind": kind, "folders": available, "running": is_running})
            if stages:
                runs.append({"run": name, "stages": stages})
        return runs

    def table(self, run: str, stage: str, folder: str) -> RolloutTable:
        """Return the table of a stage. Raises ``NotFound`` if it has no stored rollouts."""
        locate = self._locate(run, stage, folder)
        if not locate().is_dir():
            raise NotFound(
                f"{run}/{stage}: no {folder} are stored. Stages that sample store rollouts unless "
                "`rollouts: {keep: 0}`; those with `eval_updates` also store validations."
            )
        return RolloutTable(self._reader, locate)

    def details(self, run: str, stage: str, folder: str) -> RolloutDetails:
        """Return the queries behind the table of a stage."""
        return RolloutDetails(self.table(run, stage, folder))

    def _locate(self, run: str, stage: str, folder: str) -> Callable[[], Path]:
        stages = self.context.outline(run).stages
        if stage not in stages:
            raise NotFound(f"The run {run} has no stage '{stage[:80]}'.")
        kind, key = stages[stage]
        return lambda: self._folder(kind, key, folder)

    def _folder(self, kind: str, key: str, folder: str) -> Path:
        """Return the folder of a finished stage, else the folder next to its checkpoints."""
        store = self.context.store
        path = store.folder(kind, key) / folder
        if not path.is_dir():
            path = store.partial(kind, key) / CHECKPOINTS / folder
        return self.context.inside(*path.relative_to(store.root).parts)
