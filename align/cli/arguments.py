"""What a word on the command line means: a checkpoint, a tokenizer, a build. Imports nothing heavy."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.validation import suggest
from align.data.built import is_build
from align.data.card import name_of
from align.errors import UserError
from align.pipeline.pipeline import Pipeline
from align.runner.listener import Listener
from align.runner.open_store import open_store
from align.runner.runner import Run, run_pipeline
from align.store.artifacts import DATASETS, Artifact
from align.store.output_files import differing

RECIPE_SUFFIXES = (".yaml", ".yml")
HUB_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.-]+))?")
STAGE = "data"


@dataclass(frozen=True)
class Build:
    """A build's folder, and what to call it."""

    folder: Path
    name: str
    run: Run | None = None
    """The run that made or found it, where a recipe was named."""


def find_build(word: str, store: str | None = None, workers: int | None = None) -> Build:
    """The build that ``word`` means: a folder, a recipe (built when it is not yet), or the beginning of a key.

    Raises ``UserError`` for none of these, and whatever building raises.
    """
    path = Path(word)
    if path.is_dir():
        if not is_build(path):
            raise UserError(f"{word}: no train or test Parquet files in it; `align data build RECIPE` makes a build.")
        return Build(path, name_of(path))
    if path.suffix in RECIPE_SUFFIXES:
        run = build_recipe(word, store, workers=workers)
        return Build(run.artifacts[STAGE].path, path.stem, run)
    if path.exists():
        raise UserError(f"{word}: neither a build's folder nor a recipe (.yaml).")
    artifact = open_store(None, store).resolve(word)
    if artifact.kind not in DATASETS:
        raise UserError(f"{word} is a {artifact.kind}, not rows.")
    return Build(artifact.path, name_of(artifact.path))


def recipe_pipeline(
    recipe: str, files: Sequence[str] | None = None, max_rows: int | None = None, workers: int | None = None
) -> Pipeline:
    """The pipeline of one stage that builds ``recipe``: cached, locked and resumable like any other.

    Its name begins with ``data-``, so that it does not take the place of a pipeline called like the recipe.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(recipe).stem)[:50].strip("-") or "recipe"
    settings: dict[str, Any] = {"stage": STAGE, "recipe": recipe}
    settings |= {name: value for name, value in (("files", files), ("max_rows", max_rows)) if value is not None}
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
    """Build a recipe into the store, or find it there; progress goes to standard error unless ``quiet``."""
    pipeline = recipe_pipeline(recipe, files, max_rows, workers)
    again = (STAGE,) if rebuild else ()
    if quiet:
        return run_pipeline(pipeline, store=store, rebuild=again, listener=Listener())
    from rich.console import Console

    from align.cli.console import ConsoleListener

    console = Console(stderr=True, highlight=False)
    with ConsoleListener(list(pipeline), console) as listener:
        return run_pipeline(pipeline, store=store, rebuild=again, listener=listener)


def find_checkpoint(name: str, store: str | None) -> Path:
    """The transformers folder that ``name`` means: a folder, the beginning of a key, or PIPELINE:STAGE."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if folder.exists() and folder.is_dir():
        raise UserError(f"{name}: no config.json in it, so not a checkpoint.")
    artifact = find_artifact(name, store)
    if not (artifact.model / "config.json").is_file():
        for problem in differing(artifact, thorough=False):
            raise UserError(f"{problem.path} {problem.what}. The artifact is corrupted; `--rebuild` makes it again.")
        raise UserError(f"{name} is a {artifact.kind}, not a checkpoint that can answer.")
    return artifact.model


def find_artifact(name: str, store: str | None) -> Artifact:
    """The finished artifact that ``name`` means: the beginning of a key, or PIPELINE:STAGE."""
    if ":" not in name:
        return open_store(None, store).resolve(name)
    path, _, stage = name.rpartition(":")
    pipeline = Pipeline.load(path)
    stage = pipeline.resolve(stage)
    if stage not in pipeline.nodes:
        raise UserError(f"{name}: the pipeline has no stage '{stage}'; it has {', '.join(pipeline.nodes)}.")
    node = pipeline.nodes[stage]
    artifact = open_store(pipeline, store).obtain(node.stage.kind, node.key)
    if artifact is None:
        raise UserError(f"{name}: not finished yet; `align run {path}` makes it.")
    return artifact


def find_tokenizer_folder(name: str, store: str | None) -> str:
    """A model's folder as text, or the name of a built-in one. Raises ``UserError`` for anything else."""
    from align.models.source import BUILT_IN

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
    """The tokenizer of a model: built in, a checkpoint (as for ``find_checkpoint``), or a Hub name with ``@revision``.

    What a model stage would put right in it is put right here and said on standard error.
    """
    from align.models import embedded
    from align.models.source import TINY
    from align.models.tiny import make_tiny_tokenizer
    from align.report.tokens import load_for_show

    if name == TINY:
        return make_tiny_tokenizer()
    options: dict[str, Any] = {}
    try:
        folder = find_tokenizer_folder(name, store)
    except UserError:
        found = HUB_NAME.fullmatch(name)
        if found is None or Path(name).exists():
            raise
        folder, options = found[1], {"revision": found[2]} if found[2] else {}
    if folder == embedded.NAME:
        folder = str(embedded.fetch(lambda text: print(text, file=sys.stderr)))
    tokenizer, notes = load_for_show(folder, **options)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return tokenizer
