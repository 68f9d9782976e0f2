"""The view ``evaluations``: the items of the evaluate stages of all runs, with the answers of all systems."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field

from align.evaluation.scorecard import SAMPLES, SCORECARD
from align.studio.context import NotFound, StudioContext
from align.studio.evaluations.items import EvaluationItems, ItemQuery
from align.studio.rollouts.filters import MAX_NAME

MAX_EVALUATIONS = 4
"""Evaluations in memory: places and numbers of their items, without texts."""

Name = Annotated[str, Field(max_length=MAX_NAME)]
Signature = tuple[int, int]


def create_router(context: StudioContext) -> APIRouter:
    """Return the addresses of the view."""
    router = APIRouter(prefix="/evaluations")
    evaluations = StoredEvaluations(context)

    @router.get("")
    def list_stages() -> dict[str, Any]:
        return {"runs": evaluations.stages()}

    @router.get("/{run}/{stage}")
    def read_facts(run: str, stage: str) -> dict[str, Any]:
        return evaluations.items(run, stage).facts()

    @router.get("/{run}/{stage}/items")
    def read_page(run: str, stage: str, query: Annotated[ItemQuery, Query()]) -> dict[str, Any]:
        return evaluations.items(run, stage).page(query)

    @router.get("/{run}/{stage}/items/{number}")
    def read_item(run: str, stage: str, number: int, first: Name = "", second: Name = "") -> dict[str, Any]:
        item = evaluations.items(run, stage).item(number, first, second)
        if item is None:
            raise NotFound(f"{run}/{stage}: the evaluation has no item {number}.")
        return item

    return router


class StoredEvaluations:
    """The finished evaluate stages of a store; the last few that were read stay in memory."""

    def __init__(self, context: StudioContext) -> None:
        self.context = context
        self._read: OrderedDict[Path, tuple[Signature, EvaluationItems]] = OrderedDict()
        self._lock = threading.Lock()

    def stages(self) -> list[dict[str, Any]]:
        """Return the runs that have finished evaluations, the newest first, each with its stages."""
        store = self.context.store
        runs = []
        for name, run in sorted(store.runs().items(), key=lambda item: -item[1]["when"]):
            links = run["stages"].items()
            stages = [stage for stage, link in links if _is_evaluation(store.folder(link["kind"], link["key"]))]
            if stages:
                runs.append({"run": name, "stages": stages})
        return runs

    def items(self, run: str, stage: str) -> EvaluationItems:
        """Return the items of a stage. Raises ``NotFound`` if the stage is no finished evaluation."""
        stages = self.context.outline(run).stages
        if stage not in stages:
            raise NotFound(f"The run {run} has no stage '{stage[:80]}'.")
        kind, key = stages[stage]
        path = self.context.store.folder(kind, key)
        folder = self.context.inside(*path.relative_to(self.context.store.root).parts)
        if not _is_evaluation(folder):
            raise NotFound(f"{run}/{stage} has no answers: it is not a finished evaluation.")
        stat = (folder / SCORECARD).stat()
        signature = (stat.st_mtime_ns, stat.st_ino)
        with self._lock:
            if folder not in self._read or self._read[folder][0] != signature:
                self._read[folder] = (signature, EvaluationItems.read(folder))
            self._read.move_to_end(folder)
            while len(self._read) > MAX_EVALUATIONS:
                self._read.popitem(last=False)
            return self._read[folder][1]


def _is_evaluation(folder: Path) -> bool:
    return (folder / SCORECARD).is_file() and (folder / SAMPLES).is_file()
