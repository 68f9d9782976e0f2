"""Resolves the words of ``align eval`` to checkpoints: their names, the stages that bring them in, their bases.

A word is a finished artifact (its folder, the beginning of its key, PIPELINE:STAGE), a plain model folder, a ``.gguf``
file, a built-in model, or a Hub name with ``@`` and its commit. ``NAME=`` before it names it. Has no heavy imports.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.cli.arguments import HUB_NAME, find_artifact, find_build, find_checkpoint, refuse_pipeline
from align.config.user_paths import user_path
from align.config.validation import suggest
from align.errors import UserError, with_article
from align.models.checkpoints import source
from align.models.checkpoints.files import is_adapter
from align.pipeline.registry import NAME_PATTERN, STAGES
from align.report.page.assets import unique_name
from align.stages.artifact import read_record
from align.store.artifacts import GENERATORS, Artifact, Kind
from align.store.record import MARKER, RECORD
from align.store.store import Store

NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_-]{0,63})=(.+)", re.DOTALL)
BASE = "base"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, and the stage that brings it into a pipeline."""

    name: str
    stage: dict[str, Any]
    """``{stage: artifact, path: ...}`` or ``{stage: model, source: ...}``."""
    artifact: Artifact | None
    """None for a plain model, which has no record."""

    @property
    def is_plain(self) -> bool:
        """Return whether it has no record of its origin."""
        return self.artifact is None


def find_all(words: Iterable[str], store: str | None) -> list[Checkpoint]:
    """Return the checkpoints that ``words`` name, in order, each under a unique name.

    Raises ``UserError`` for a word that names none, and for a name that is used twice.
    """
    split = [_split_name(word) for word in words]
    chosen_names = [name for name, _ in split if name is not None]
    for name in chosen_names:
        if chosen_names.count(name) > 1:
            raise UserError(f"two checkpoints are called '{name}'; give each its own name: NAME=CHECKPOINT.")
    # Chosen names are reserved first, so no automatic name uses them.
    used_names = set(chosen_names)
    checkpoints: list[Checkpoint] = []
    for chosen_name, word in split:
        checkpoint = _find(word, store)
        name = chosen_name if chosen_name is not None else unique_name(checkpoint.name, used_names)
        used_names.add(name)
        checkpoints.append(Checkpoint(name, checkpoint.stage, checkpoint.artifact))
    return checkpoints


def _split_name(word: str) -> tuple[str | None, str]:
    """Return the name and the rest of ``NAME=CHECKPOINT``; an existing path wins over that reading."""
    match = NAMED.fullmatch(word)
    return (match[1], match[2]) if match and not Path(word).exists() else (None, word)


def _find(word: str, store: str | None) -> Checkpoint:
    """Return the checkpoint that a word without ``NAME=`` names."""
    refuse_pipeline(word)
    folder = user_path(word)
    # An artifact's model folder stands for the artifact, whose record has its origin.
    if folder.name == "model" and (folder.parent / RECORD).is_file():
        folder = folder.parent
    if (folder / RECORD).is_file():
        artifact = artifact_at(folder)
    elif word in source.BUILT_IN or folder.exists():
        return _find_plain_model(word)
    # A Hub name needs its revision, so a misspelled path is not a Hub name.
    elif "@" in word and HUB_NAME.fullmatch(word):
        name, _, revision = word.partition("@")
        return _model_checkpoint(word, {"source": name, "revision": revision}, name.rpartition("/")[2])
    else:
        try:
            artifact = find_artifact(word, store)
        except UserError as error:
            raise UserError(f"{error}{_hint(word)}") from None
    if artifact.kind not in GENERATORS:
        raise UserError(f"{word} is {with_article(artifact.kind)}, not a checkpoint that can answer.")
    return Checkpoint(_stage_name(artifact.stage), {"stage": "artifact", "path": str(artifact.path)}, artifact)


def _hint(word: str) -> str:
    """Return a hint for a word that does not name an artifact of the store."""
    if HUB_NAME.fullmatch(word):
        return f" A model on the Hub is written with its revision: {word}@main."
    return "" if ":" in word else suggest(word, source.BUILT_IN)


def _find_plain_model(word: str) -> Checkpoint:
    """Return a built-in model, a folder without a record (of a model or an adapter), or a ``.gguf`` file."""
    path = user_path(word)
    if word in source.BUILT_IN or path.is_file() or is_adapter(path):
        return _model_checkpoint(word, {"source": word}, path.stem if path.is_file() else path.name)
    folder = find_checkpoint(str(path), None)
    name = folder.parent.name if folder.name == "model" else folder.name
    return _model_checkpoint(word, {"source": str(folder)}, name or folder.resolve().name)


def _model_checkpoint(word: str, block: dict[str, Any], name: str) -> Checkpoint:
    """Return a checkpoint that a ``model`` stage with ``block`` brings in; raise ``UserError`` if it could not."""
    try:
        source.resolve(block["source"], block.get("revision"), Path.cwd())
    except UserError as error:
        raise UserError(f"{word}: {str(error).removeprefix('source: ').removeprefix('revision: ')}") from None
    return Checkpoint(_stage_name(name), {"stage": "model", **block}, None)


def _stage_name(text: str) -> str:
    """Return ``text`` as a stage's name: letters, digits, ``-`` and ``_``, beginning with a letter."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:60]
    return name if re.fullmatch(NAME_PATTERN, name) else f"model-{name}".rstrip("-")


def artifact_at(folder: Path) -> Artifact:
    """Return the finished artifact in ``folder``; raise ``UserError`` if it is missing or unreadable."""
    record = read_record(folder)
    if record is None:
        raise UserError(f"{folder}: not a finished artifact; it has no {RECORD}.")
    return Artifact(record["stage"], Kind(record["makes"]), folder, record)


def find_reward(option: str, word: str, store: str | None) -> dict[str, Any]:
    """Return the stage that brings in a reward model: an artifact, or a plain folder with a score head."""
    folder = user_path(word)
    if folder.name == "model" and (folder.parent / RECORD).is_file():
        folder = folder.parent
    if (folder / RECORD).is_file():
        artifact = artifact_at(folder)
    elif folder.exists():
        from align.config.stages.inputs import ArtifactConfig

        stage = STAGES["artifact"]
        try:
            config = ArtifactConfig(path=str(folder))
            stage.makes_with(config)
            stage.identities(config, Path.cwd())
        except UserError as error:
            reason = str(error).removeprefix("path: ").removeprefix("source: ")
            raise UserError(f"{option} {word} is no reward model: {reason}") from None
        return {"stage": "artifact", "path": str(folder)}
    else:
        artifact = find_artifact(word, store)
    if artifact.kind != Kind.REWARD:
        raise UserError(f"{option} {word} is {with_article(artifact.kind)}, not a {Kind.REWARD}.")
    return {"stage": "artifact", "path": str(artifact.path)}


def find_rows(option: str, word: str, store: str | None, kinds: tuple[Kind, ...]) -> dict[str, Any]:
    """Return the stage that brings in rows: anything that ``find_build`` accepts; a recipe is built first."""
    build = find_build(word, store)
    if not (build.folder / RECORD).is_file():
        raise UserError(
            f"{option} {word}: these rows have no {RECORD} that says what kind they are; name their recipe, or the "
            "build in its store."
        )
    artifact = artifact_at(build.folder)
    if artifact.kind not in kinds:
        raise UserError(f"{option} {word} is {artifact.kind}; it must be {' or '.join(kinds)}.")
    return {"stage": "artifact", "path": str(artifact.path)}


def base_of(artifact: Artifact, store: Store) -> Artifact | None:
    """Return the base model from which a checkpoint was trained, by the records of its store; None if unknown.

    Only the inputs that became the policy are followed: a reward model or data may have come from another base.
    """
    store = store_of(artifact) or store
    # Breadth first through the inputs that can generate, up to a base model.
    queue = [artifact]
    visited: set[tuple[str, str]] = set()
    while queue:
        checkpoint = queue.pop(0)
        if checkpoint.kind == Kind.MODEL:
            return checkpoint
        for link in links_of(checkpoint.record):
            source = store.find_intact(*link) if link not in visited else None
            visited.add(link)
            if source is not None and source.kind in GENERATORS:
                queue.append(source)
    return None


def links_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (kind, key) of a stage's inputs, and of the original of an imported artifact."""
    links = [(str(link["kind"]), str(link["key"])) for link in record["input_stages"]]
    metrics = record.get("metrics") or {}
    if record.get("kind") == "artifact" and metrics.get("key"):
        links.append((str(metrics.get("kind")), str(metrics["key"])))
    return links


def store_of(artifact: Artifact) -> Store | None:
    """Return the store of an artifact; None for an artifact outside of any store."""
    root = artifact.path.resolve().parents[1]
    return Store(root) if (root / MARKER).is_file() else None
