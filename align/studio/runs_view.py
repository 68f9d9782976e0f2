"""The view ``runs``: every run of the store with the states of its stages, live."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from sse_starlette import EventSourceResponse

from align.studio.context import StudioContext
from align.studio.report_pages import page_address
from align.studio.run_index import RunIndex, list_json
from align.studio.streams import stream_states

SECONDS = 2.0
"""Time between two looks at the store for one reader."""


def create_router(context: StudioContext) -> APIRouter:
    """Return the addresses of the view."""
    router = APIRouter()
    index = RunIndex(context.store)

    def read_list() -> dict[str, Any]:
        runs = index.read()
        return list_json(runs, {name: page_address(context, name) for name in runs.runs})

    @router.get("/runs")
    def list_runs() -> dict[str, Any]:
        return read_list()

    @router.get("/runs-stream")
    async def stream_runs() -> EventSourceResponse:
        return stream_states(read_list, SECONDS)

    return router
