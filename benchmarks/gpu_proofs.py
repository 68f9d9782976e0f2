"""The pipelines of published results as items of the evidence for a GPU, and why some cannot run on a machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.config.hub_commits import RepoType, small_file
from align.config.recipe.source_settings import HubSource
from align.errors import UserError
from align.pipeline.pipeline import Pipeline
from align.stages.data import resolved_recipe
from benchmarks.gpu_items import Item, Machine

PROOFS = Path("pipelines/proof")
SMALL_FILES: dict[RepoType, str] = {"model": "config.json", "dataset": "README.md"}
"""File that shows whether a repository can be read."""


def proof_items(machine: Machine) -> list[Item]:
    """Return an item for each pipeline; its obstacle is a missing card, or a model or data set that cannot be read."""
    paths = sorted((Path(__file__).parents[1] / PROOFS).glob("*.yaml"))
    return [Item(path.stem, obstacle=find_obstacle(path, machine)) for path in paths]


def find_obstacle(path: Path, machine: Machine) -> str | None:
    """Return why a pipeline cannot run here; None if it can."""
    if machine.device != "cuda":
        return "published results need a GPU"
    try:
        pipeline = Pipeline.load(path)
        repositories = list(_repositories(pipeline))
    except UserError as error:
        return str(error)
    for name, commit, repo_type in repositories:
        if small_file(name, commit, SMALL_FILES[repo_type], repo_type) is None:
            return f"the Hub {repo_type} {name} is not in the Hub's cache and cannot be read"
    return None


def _repositories(pipeline: Pipeline) -> Iterator[tuple[str, str, RepoType]]:
    """Yield the name, the commit and the type of each Hub repository that a pipeline reads."""
    for node in pipeline:
        config: Any = node.config
        if node.stage.kind == "model":
            yield config.source, config.revision, "model"
        elif node.stage.kind == "data":
            for source in resolved_recipe(config, pipeline.base).sources:
                if isinstance(source, HubSource):
                    yield source.dataset, source.revision, "dataset"
