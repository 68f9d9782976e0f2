"""What a run's stages are on Ray: a task each, given the results of those it waits for.

A task says where it runs, and how it ended, in a file of the store, which every node must see. Never imports torch.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align.clusters.follow import Place, Said, read_note, write_note
from align.clusters.threads import await_inputs, with_threads
from align.config.scheduler import RayConfig
from align.errors import StageFailed, UserError
from align.inference import ray_client as client
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.stop_signal import Stopped, StopRequest, request_stop
from align.runner.listener import Listener
from align.runner.open_store import Opening
from align.runner.runner import run_pipeline
from align.store.marker import MARKER
from align.store.partial import LOG
from align.store.store import Store


@dataclass(frozen=True)
class Work:
    """What a task is given; plain values, so that any machine can read it."""

    raw: dict[str, Any]
    """The pipeline as parsed YAML, overrides set and loops written out."""
    where: str
    base: str
    rounds: dict[str, list[str]]
    store: dict[str, Any]
    """Fields of ``align.runner.open_store.Opening``."""
    folder: str
    """Where tasks say how they are."""
    stage: str
    key: str
    anew: bool = False
    replaces: str | None = None
    cores: int = 1


def make_stage(work: dict[str, Any], *after: str) -> str:
    """The task: make one stage; ``done``, or what became of it. ``after`` are the results of the stages it reads."""
    if any(status != "done" for status in after):
        return "skipped"
    given = Work(**work)
    host = socket.gethostname()
    folder = Path(given.store["folder"])
    if not (folder / MARKER).is_file():
        return f"failed: node {host} does not see the store {folder}; all nodes must, under the same path."
    os.chdir(given.base)
    _say(given, Said("runs", host, node=client.own_node()))
    said = _made(given)
    _say(given, said)
    return said.status


def _made(given: Work) -> Said:
    store = Opening(**given.store).open()
    log: Path | None = None
    try:
        pipeline = with_threads(Pipeline(given.raw, given.where, Path(given.base), given.rounds), max(1, given.cores))
        node = pipeline.nodes[given.stage]
        if node.key != given.key:
            raise UserError(
                f"stage '{given.stage}' is another here than where the run began: a file that {given.where} names "
                "differs. All nodes must see the same files."
            )
        log = store.partial(node.stage.kind, node.key) / LOG
        await_inputs(pipeline, node, store)
        found = store.find_intact(node.stage.kind, node.key)
        again = given.anew and (found is None or found.record["created"] == given.replaces)
        run_pipeline(
            pipeline, store=store, only=node.name, rebuild=(node.name,) if again else (), listener=Listener(),
            stop=StopRequest(),
        )  # fmt: skip
    except Stopped as stopped:
        return Said("stopped", str(stopped).removeprefix(f"stage '{given.stage}' "))
    except (UserError, StageFailed) as error:
        text = str(error).partition("\nLog: ")[0]
        message = text.removeprefix(f"stage '{given.stage}' failed: ").removeprefix(f"stage '{given.stage}': ")
        return Said(
            "refused" if isinstance(error, UserError) else "failed", message,
            log=str(log) if log is not None and log.is_file() else None,
        )  # fmt: skip
    return Said("done", "")


def _say(given: Work, said: Said) -> None:
    write_note(Path(given.folder) / f"{given.stage}.json", said)


@dataclass
class RayQueue:
    """The tasks of a run, for ``align.clusters.follow``."""

    ray: Any
    pipeline: Pipeline
    store: Store
    folder: Path
    references: dict[str, Any] = field(default_factory=dict)
    name: str = "Ray"
    every: float = 0.5
    stop: StopRequest = field(default_factory=StopRequest)
    """Asks the stages under way to save and stop, and begins no other."""
    _replaces: dict[str, str] = field(default_factory=dict)
    _unheld: dict[str, float] = field(default_factory=dict)
    _given_up: dict[str, Place] = field(default_factory=dict)
    """Of stages called off here; Ray says of their tasks that they were cancelled."""

    def start(self, nodes: Iterable[Node], anew: set[str]) -> None:
        """Start a task for each of these stages, in the pipeline's order."""
        rounds = {name: list(names) for name, names in self.pipeline.expanded.rounds.items()}
        for node in nodes:
            block = self.block(node.name)
            before = self.store.find_intact(node.stage.kind, node.key)
            if node.name in anew and before is not None:
                self._replaces[node.name] = str(before.record["created"])
            work = Work(
                self.pipeline.plain, self.pipeline.where, str(self.pipeline.base.resolve()), rounds,
                asdict(Opening.of(self.store)), str(self.folder.resolve()), node.name, node.key, node.name in anew,
                self._replaces.get(node.name), int(block.cpus),
            )  # fmt: skip
            after = [self.references[name] for name in node.input_names if name in self.references]
            name = f"align:{self.pipeline.name}:{node.name}"
            self.references[node.name] = client.start(self.ray, make_stage, block, name, [asdict(work), *after])

    def block(self, stage: str) -> RayConfig:
        """What a stage asks of a node."""
        return self.pipeline.runtimes[stage].ray

    def look(self, stages: Collection[str]) -> dict[str, Place]:
        """See ``align.clusters.follow.Queue``."""
        places = {stage: self._place(stage, stages) for stage in stages}
        if self.stop.is_requested:
            for stage, place in places.items():
                node = self.pipeline.nodes[stage]
                partial = self.store.partial(node.stage.kind, node.key)
                if place.state == "runs" and partial.is_dir():
                    request_stop(partial)
                elif place.state == "waits":
                    client.call_off(self.ray, [self.references[stage]])
        return places

    def _place(self, stage: str, left: Collection[str]) -> Place:
        if stage in self._given_up:
            return self._given_up[stage]
        over, status, why = client.outcome(self.ray, self.references[stage])
        if over:
            if status == "done":
                return Place("gone", "its task is done, and its result is not there")
            if status is None:
                return Place(
                    "over", why, f"Raise runtime.stages.{stage}.ray.retries (now {self.block(stage).retries})."
                )
            return Place("over", str(status).removeprefix("failed: "))
        if any(name in left for name in self.pipeline.nodes[stage].input_names):
            return Place("waits", "waits for what it reads")
        said = self._note(stage)
        # of one whose node died, which has to begin anew, the note is still there
        if said is not None and said.status == "runs" and client.lives(self.ray, said.node):
            return Place("runs", f"runs on {said.message}")
        return self._waiting(stage)

    def _waiting(self, stage: str) -> Place:
        """A task that could start: it waits for a node to be free, or for one that there is not."""
        block = self.block(stage)
        if client.could_hold(self.ray, block):
            self._unheld.pop(stage, None)
            return Place("waits", "waits for a free node")
        needs = ", ".join(f"{name} {amount:g}" for name, amount in client.wanted(block).items())
        since = self._unheld.setdefault(stage, time.monotonic())
        if time.monotonic() - since > block.wait:
            client.call_off(self.ray, [self.references[stage]])
            self._given_up[stage] = Place(
                "over", f"no node of the Ray cluster has what it asks for ({needs})",
                f"Start such a node, or change runtime.stages.{stage}.ray.",
            )  # fmt: skip
            return self._given_up[stage]
        return Place("waits", f"waits: no node has what it asks for ({needs})")

    def _note(self, stage: str) -> Said | None:
        return read_note(self.folder / f"{stage}.json")

    def said(self, stage: str) -> Said | None:
        """See ``align.clusters.follow.Queue``."""
        found = self._note(stage)
        return None if found is None or found.status == "runs" else found

    def log(self, stage: str) -> Path:
        """See ``align.clusters.follow.Queue``: what a task prints is Ray's; the stage's own log is in its folder."""
        node = self.pipeline.nodes[stage]
        return self.store.partial(node.stage.kind, node.key) / LOG

    def replaces(self, stage: str) -> str | None:
        """See ``align.clusters.follow.Queue``."""
        return self._replaces.get(stage)


__all__ = ["RayQueue", "Work", "make_stage"]
