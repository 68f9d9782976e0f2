"""The view ``runs``: every run of the store, and one run with its graph, progress, curves, logs and alarms, live."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from sse_starlette import EventSourceResponse

from align.runs.resume import console_path, resume_run
from align.runs.status import StageStatus, cancel_run
from align.studio.context import NotFound, StudioContext, checked_name
from align.studio.report_pages import page_address, write_report_page
from align.studio.run_detail import RunReader, find_status, tail_json
from align.studio.run_index import IndexedRun, list_json
from align.studio.streams import stream_states

LIST_SECONDS = 2.0
RUN_SECONDS = 1.0
"""Time between two looks at the store for one reader."""


class StopRequest(BaseModel):
    """Body of a request to stop a run: names of the stages to end; empty means all."""

    stages: list[str] = []


def create_router(context: StudioContext) -> APIRouter:
    """Return the addresses of the view."""
    router = APIRouter()
    runs = Runs(context)
    router.add_api_route("/runs", runs.read_list, methods=["GET"])
    router.add_api_route("/runs-stream", runs.stream_list, methods=["GET"])
    router.add_api_route("/runs/{name}", runs.read_run, methods=["GET"])
    router.add_api_route("/runs/{name}/stream", runs.stream_run, methods=["GET"])
    router.add_api_route("/runs/{name}/console", runs.read_console, methods=["GET"])
    router.add_api_route("/runs/{name}/stages/{stage}/curves", runs.read_curves, methods=["GET"])
    router.add_api_route("/runs/{name}/stages/{stage}/log", runs.read_log, methods=["GET"])
    router.add_api_route("/runs/{name}/stages/{stage}/settings", runs.read_settings, methods=["GET"])
    router.add_api_route("/runs/{name}/stop", runs.stop, methods=["POST"])
    router.add_api_route("/runs/{name}/resume", runs.resume, methods=["POST"])
    router.add_api_route("/runs/{name}/report", runs.write_report, methods=["POST"])
    return router


class Runs:
    """The answers of the view."""

    def __init__(self, context: StudioContext) -> None:
        self.context = context
        self.index = context.index
        self.reader = RunReader(context.store)

    def read_list(self) -> dict[str, Any]:
        """Return every run with the states of its stages."""
        runs = self.index.read()
        return list_json(runs, {name: page_address(self.context, name) for name in runs.runs})

    async def stream_list(self) -> EventSourceResponse:
        """Send the list whenever it changes."""
        return stream_states(self.read_list, LIST_SECONDS)

    def read_run(self, name: str) -> dict[str, Any]:
        """Return one run."""
        run, states = self._find(name)
        return {**self.reader.read(run, states), "page": page_address(self.context, name)}

    async def stream_run(self, name: str) -> EventSourceResponse:
        """Send the run whenever it changes."""
        return stream_states(lambda: self.read_run(name), RUN_SECONDS)

    def read_curves(self, name: str, stage: str) -> dict[str, Any]:
        """Return the curves of a stage as numbers."""
        run, states = self._find(name)
        return self.reader.curves(run.outline, stage, find_status(states, name, stage).state)

    def read_log(self, name: str, stage: str) -> dict[str, Any]:
        """Return the end of a stage's log."""
        run, states = self._find(name)
        return self.reader.log(run.outline, stage, find_status(states, name, stage).state)

    def read_settings(self, name: str, stage: str) -> dict[str, Any]:
        """Return the settings, numbers and provenance of a stage."""
        run, states = self._find(name)
        return self.reader.settings(run.outline, find_status(states, name, stage))

    def read_console(self, name: str) -> dict[str, Any]:
        """Return the output of the command that resumed the run here."""
        self._find(name)
        return tail_json(console_path(self.context.store, name))

    def stop(self, name: str, request: StopRequest) -> dict[str, Any]:
        """End a run's jobs and its process on this machine, as ``align cancel`` does."""
        self.context.require_writable()
        run, states = self._find(name)
        for stage in request.stages:
            find_status(states, name, stage)
        cancelled = cancel_run(self.context.store, name, run.outline, request.stages)
        self.index.forget()
        return {"jobs": cancelled.jobs, "processes": cancelled.processes}

    def resume(self, name: str) -> dict[str, Any]:
        """Start a run again in a separate process, as ``align run`` does."""
        self.context.require_writable()
        run, _ = self._find(name)
        resumed = resume_run(run.outline, self.context.store)
        self.index.forget()
        return resumed.to_json()

    def write_report(self, name: str) -> dict[str, str]:
        """Write the report page of a run, as ``align report`` does."""
        self.context.require_writable()
        self._find(name)
        return {"page": write_report_page(self.context, name)}

    def _find(self, name: str) -> tuple[IndexedRun, list[StageStatus]]:
        """Return a run and the states of its stages. Raises ``NotFound``, or ``UserError`` for a damaged record."""
        found = self.index.find(checked_name("run", name))
        if found is None:
            self.context.outline(name)  # names the damage, or the nearest run
            raise NotFound(f"The store has no run '{name}'.")
        return found
