"""A sweep checked against its pipeline: every bound and choice tried in thought, before anything runs. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from align.config.validation import suggest
from align.errors import UserError
from align.pipeline.pipeline import Pipeline
from align.store.fingerprint import digest
from align.sweep.config import SweepConfig
from align.sweep.objectives import Objective, systems_of
from align.sweep.space import Dimension, Draw, changes_of, corner_draws, grid, read_space


@dataclass(frozen=True)
class Sweep:
    """A sweep's file, checked against its pipeline."""

    config: SweepConfig
    where: str
    base: Pipeline
    space: list[Dimension]
    objectives: list[Objective]
    shared: dict[str, str]
    """Stages that are the same in all trials, with their keys."""
    first: Pipeline
    """The pipeline with the first value of everything that varies."""

    @classmethod
    def check(cls, config: SweepConfig, where: str, assignments: Iterable[str] = ()) -> Sweep:
        """Read the pipeline and try every bound and choice in thought.

        ``assignments`` are ``--set``'s. Raises ``UserError`` with the place in the sweep's file.
        """
        base = Pipeline.load(config.pipeline)
        base = _at(f"{where}: set", lambda: base.changed(config.set))
        for text in assignments:
            base = base.set(text)
        space = read_space(config.space, base, where)
        if config.sampler == "grid":
            grid(space, where)
        keys: list[dict[str, str]] = []
        for changed, draw in corner_draws(space):
            place = "space" if changed is None else f"space.{changed.name} = {draw[changed.name]}"
            changes = changes_of(space, draw)
            pipeline = _at(f"{where}: {place}", lambda changes=changes: base.changed(changes))  # type: ignore[misc]
            keys.append({node.name: node.key for node in pipeline})
            if changed is None:
                first = pipeline
                objectives = [Objective(name, higher) for name, higher in config.objectives]
                for one in objectives:
                    one.check(pipeline, where)
                _check_prune(config, pipeline, where)
        shared = {name: key for name, key in keys[0].items() if all(each.get(name) == key for each in keys)}
        return cls(config, where, base, space, objectives, shared, first)

    def parts(self) -> dict[str, Any]:
        """What all trials of a study have in common; another study is begun when one of these changes."""
        config = self.config
        return {
            "space": [[one.name, str(one), digest([one.changes(at) for at in one.corners()])] for one in self.space],
            "objective": [[one.name, one.higher] for one in self.objectives],
            "pipeline": digest(self.keys()),
            "sampler": [config.sampler, config.seed],
            "pruning": None if config.prune is None else config.prune.model_dump(mode="json"),
        }

    def keys(self) -> dict[str, str]:
        """All stages' keys with the first value of everything that varies."""
        return {node.name: node.key for node in self.first}

    def run_name(self, number: int) -> str:
        """The name of a trial's run in the store."""
        return f"{self.config.name}-{number}"

    def pipeline_of(self, draw: Draw, number: int) -> Pipeline:
        """The pipeline of one trial: what decides needs of it. ``UserError`` for a combination that is refused."""
        whole = self.base.changed({**changes_of(self.space, draw), "name": self.run_name(number)})
        needed = self.needed(whole)
        plain = whole.plain
        plain["stages"] = {name: block for name, block in plain["stages"].items() if name in needed}
        runtime = plain.get("runtime") or {}
        known = {*plain["stages"], *whole.expanded.rounds}
        own = {name: block for name, block in (runtime.get("stages") or {}).items() if name in known}
        plain["runtime"] = {**runtime, "stages": own}
        return Pipeline(plain, whole.where, whole.base, whole.expanded.rounds)

    def needed(self, pipeline: Pipeline) -> set[str]:
        """Stages without which an objective, or the curve that pruning goes by, could not be read."""
        prune = self.config.prune
        owners = {pipeline.resolve(one.owner) for one in self.objectives}
        if prune is not None:
            owners.add(pipeline.resolve(str(prune.maximize or prune.minimize).partition(".")[0]))
        found = {name for name in owners if name in pipeline.nodes}
        found |= {node.name for node in pipeline if owners & set(systems_of(node))}
        queue = list(found)
        while queue:
            for name in pipeline.nodes[queue.pop()].input_names:
                if name not in found:
                    found.add(name)
                    queue.append(name)
        return found


def _at(place: str, make: Callable[[], Pipeline]) -> Pipeline:
    try:
        return make()
    except UserError as error:
        raise UserError(f"{place}: {str(error).removeprefix('--set ')}") from None


def _check_prune(config: SweepConfig, pipeline: Pipeline, where: str) -> None:
    if config.prune is None:
        return
    stage = str(config.prune.maximize or config.prune.minimize).partition(".")[0]
    if pipeline.resolve(stage) not in pipeline.nodes:
        known = [*pipeline.nodes, *pipeline.expanded.rounds]
        raise UserError(f"{where}: prune: there is no stage '{stage}'.{suggest(stage, known)}")


__all__ = ["Sweep"]
