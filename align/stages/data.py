"""Stage ``data``: build a dataset from a recipe, split by prompt, with a ledger of every record read."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.base import Config, settings_for_key
from align.config.hub_commits import find_commit
from align.config.recipe.format_options import KINDS
from align.config.recipe.recipe import Recipe, load_recipe
from align.config.recipe.source_settings import FilesSource, InputSource, Source
from align.config.stages.inputs import DataConfig
from align.config.user_paths import cache_folder
from align.config.validation import validate
from align.data.builds.dataset_recipe import check_named_columns, dataset_recipe, guess, is_local, kind_of, sources_of
from align.data.formats.column_guess import suggest_source
from align.data.sources import identity
from align.data.steps.step import step_identities
from align.errors import UserError
from align.models.checkpoints.files import digests, read_optional
from align.models.pretrained import open_tokenizer
from align.pipeline.context import StageContext
from align.pipeline.process_limits import usable_cores
from align.pipeline.stop_signal import die_with_parent
from align.store.artifacts import VERSION, Kind
from align.store.fingerprint import digest
from align.store.json_files import write_text_atomically

GUESSES = "dataset-formats"
"""Folder of the cache with the formats of Hub datasets, which would be read again by each command."""


def pinned(config: DataConfig, base: Path) -> DataConfig:
    """Return the config of a dataset with its commit, kind and format.

    Raises ``UserError`` for a dataset that is not there, cannot be read or has columns of no known format.
    """
    if config.dataset is None:
        return config
    changes: dict[str, Any] = {}
    if not is_local(config.dataset, base):
        try:
            changes["revision"] = find_commit(config.dataset, config.revision, "dataset")
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith("revision: ") else f"dataset: {text}") from None
    config = config.model_copy(update=changes)
    if config.format == "auto":
        form = _guessed_format(config, base)
        changes |= {"format": form, "kind": config.kind or kind_of(form)}
    elif config.kind is None:
        changes["kind"] = kind_of(config.format)
    return config.model_copy(update=changes)


def _guessed_format(config: DataConfig, base: Path) -> str:
    """Return the format of the dataset's first records; a dataset of the Hub is read from the cache if possible."""
    block = sources_of(config, base)[0]
    source = validate(_HubOrFiles, {"source": block}, f"dataset {config.dataset}").source
    if isinstance(source, FilesSource):
        return guess(source, base, config.kind).format
    # Another version of align may guess another format.
    key = digest({"source": block_text(block), "kind": config.kind, "align": VERSION})
    file = cache_folder() / GUESSES / f"{key}.json"
    cached_format = read_optional(file).get("format") if file.is_file() else None
    if isinstance(cached_format, str) and cached_format in KINDS:
        return cached_format
    form = guess(source, base, config.kind).format
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(file, json.dumps({"format": form}) + "\n")
    return form


class _HubOrFiles(Config):
    """A source to guess the format of."""

    source: Source


def block_text(block: dict[str, Any]) -> str:
    """Return a source's block as text that is equal for equal blocks."""
    return json.dumps(block, default=lambda value: value.model_dump(mode="json"), sort_keys=True)


logger = logging.getLogger(__name__)


def makes(config: DataConfig) -> Kind:
    """Return the kind of dataset that the recipe states."""
    return _recipe(config, Path.cwd()).makes()


def remedy(config: DataConfig, base: Path, kinds: Sequence[Kind]) -> str:
    """Return the mapping with which a dataset's file gives pairs, if a stage wants them and the columns allow it."""
    if config.dataset is None or Kind.PREFERENCES not in kinds:
        return ""
    source = validate(_HubOrFiles, {"source": sources_of(config, base)[0]}, f"dataset {config.dataset}").source
    return suggest_source(source, base, "preferences").strip()


def _recipe(config: DataConfig, base: Path) -> Recipe:
    """Return the recipe from its file, or the recipe that a ``dataset:`` expands to."""
    if config.recipe is not None:
        return load_recipe(config.recipe, base)
    return dataset_recipe(pinned(config, base), base)


def resolved_recipe(config: DataConfig, base: Path) -> Recipe:
    """Return the recipe as it will run: ``files``, or its environment variable's files, replace its sources."""
    recipe = _recipe(config, base)
    if config.max_rows is not None:
        recipe = recipe.model_copy(update={"max_rows": config.max_rows})
    files = config.files
    origin = "files"
    if files is None and recipe.files_variable and os.environ.get(recipe.files_variable):
        origin = f"${recipe.files_variable}"
        files = [part for part in os.environ[recipe.files_variable].split(os.pathsep) if part]
    if not files:
        return recipe
    try:
        return recipe.with_files(files)
    except ValueError as error:
        raise UserError(f"{origin} cannot replace the sources of {config.recipe}: {error}.") from None


def identities(config: DataConfig, base: Path) -> dict[str, str]:
    """Return the digest of the recipe's content, and digests, commits and versions of what sources and steps read."""
    recipe = resolved_recipe(config, base)
    content = settings_for_key(recipe, _without_identified(recipe))
    # Words for readers must not build a dataset again.
    for name in ("description", "language", "files_variable"):
        content.pop(name)
    identities = {}
    for index, source in enumerate(recipe.sources):
        if isinstance(source, InputSource):
            continue  # the key of an input is part of the stage's key
        check_named_columns(source, base)
        for name, value in identity(source, base).items():
            identities[f"sources[{index}] {name}".strip()] = value
    for index, step in enumerate(recipe.steps):
        for name, value in step_identities(step, base, StepModels()).items():
            identities[f"steps[{index}] {name}".strip()] = value
    return {"recipe": digest(content), **identities}


def _without_identified(value: Any) -> Any:
    """Return a config as plain values, at every level without the fields that its identities cover."""
    if isinstance(value, Config):
        names = [name for name in type(value).model_fields if name not in value.identified]
        return {name: _without_identified(getattr(value, name)) for name in names}
    if isinstance(value, (list, tuple)):
        return [_without_identified(item) for item in value]
    return value


def run(context: StageContext) -> dict[str, Any]:
    """Build the recipe (``align.data.builds.build``) with its card and preview page, and return the row counts."""
    # A plan asks this module for keys, and must not wait for what builds datasets.
    from align.data.builds.build import build
    from align.data.builds.ledger import describe_large_cluster, summary_lines, unused_lines
    from align.data.builds.workers import BuildResources
    from align.data.card import write_card
    from align.report.dataset.preview import write_preview

    config: DataConfig = context.config
    base = Path.cwd()
    recipe = resolved_recipe(config, base)
    if config.files and any(isinstance(source, FilesSource) for source in recipe.sources):
        logger.info("reading %d local patterns instead of the recipe's sources", len(config.files))
    resources = BuildResources(
        workers=context.runtime.workers or usable_cores(),
        device=context.runtime.device,
        start_worker=functools.partial(die_with_parent, os.getpid()),
        executor=context.runtime.executor,
        models=StepModels(),
    )
    inputs = [artifact.path for artifact in context.inputs.get("inputs") or []]
    ledger = build(
        recipe,
        base,
        context.checkpoints,
        context.output,
        inputs=inputs,
        resources=resources,
        progress=lambda done, step: context.progress(done, done, unit="rows", step=step),
    )
    for line in summary_lines(ledger):
        logger.info(line)
    for line in unused_lines(ledger):
        context.note(line)
    warning = describe_large_cluster(ledger)
    if warning is not None:
        context.warn(warning)
    write_text_atomically(context.output / "ledger.json", json.dumps(ledger, indent=2) + "\n")
    name = Path(config.recipe or config.dataset or "").stem
    settings = recipe.model_dump(mode="json", exclude_unset=True)
    write_card(context.output, settings, ledger, name)
    write_preview(context.output, settings, name)
    total = sum(ledger["splits"].values())
    context.progress(total, total, unit="rows")
    return {
        "kind": recipe.kind,
        "train_rows": ledger["splits"]["train"],
        "test_rows": ledger["splits"]["test"],
        "rows_in": ledger["rows_in"],
        "dropped": ledger["dropped"],
    }


@dataclass(frozen=True)
class StepModels:
    """Loaders that ``align.data``, which is below ``align.models``, is given (``align.data.steps.step``)."""

    def digests(self, folder: Path) -> dict[str, str]:
        """Return the sha256 of every file of a model folder that a loader may read, by its path in it."""
        return digests(folder)

    def open_tokenizer(self, name: str, revision: str | None) -> Any:
        """Return the tokenizer of a folder, or of the Hub at a commit. Raises whatever its files cause."""
        return open_tokenizer(name, revision=revision)

    def make_scorer(self, config: Any, folder: Path, device: str) -> Any:
        """Return the function from rows to scores that a ``ScoreStep`` describes."""
        from align.models.row_scores import make_scorer

        return make_scorer(config, folder, device)

    def make_embedder(self, folder: Path, device: str, max_length: int, batch_size: int) -> Any:
        """Return the function from texts to embeddings (texts, dimensions)."""
        from align.models.row_scores import make_embedder

        return make_embedder(folder, device, max_length, batch_size)
