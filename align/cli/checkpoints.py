"""Checkpoints on the command line of ``align eval``: what each word means, what to call it, where it comes from.

A word is a finished artifact (its folder, the beginning of its key, PIPELINE:STAGE), a plain model folder, a ``.gguf``
file, a built-in model, or a Hub name with ``@`` and its commit; ``NAME=`` before it names it. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.cli.arguments import HUB_NAME, find_artifact, find_build, find_checkpoint
from align.config.user_paths import user_path
from align.config.validation import suggest
from align.errors import UserError
from align.models import source
from align.pipeline.pipeline import NAME_PATTERN
from align.pipeline.registry import STAGES
from align.stages.artifact import read_record
from align.store.artifacts import GENERATORS, Artifact, Kind
from align.store.marker import MARKER
from align.store.record import RECORD
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
    """With its record, where it is a finished artifact."""

    @property
    def is_plain(self) -> bool:
        """Whether nothing is known of where it comes from."""
        return self.artifact is None


def find_all(words: Iterable[str], store: str | None) -> list[Checkpoint]:
    """The checkpoints that ``words`` mean, in order, each under a name of its own.

    Raises ``UserError`` for a word that means none, and for a name that was given twice.
    """
    found: list[Checkpoint] = []
    split = [_split(word) for word in words]
    given = [name for name, _ in split if name is not None]
    for name in given:
        if given.count(name) > 1:
            raise UserError(f"two checkpoints are called '{name}'; give each a name of its own: NAME=CHECKPOINT.")
    taken = set(given)
    for chosen, word in split:
        one = _find(word, store)
        called = chosen if chosen is not None else unique(one.name, taken)
        taken.add(called)
        found.append(Checkpoint(called, one.stage, one.artifact))
    return found


def _split(word: str) -> tuple[str | None, str]:
    named = NAMED.fullmatch(word)
    return (named[1], named[2]) if named and not Path(word).exists() else (None, word)


def unique(name: str, taken: Iterable[str]) -> str:
    """``name``, or with a number behind it where it is taken."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found


def _find(word: str, store: str | None) -> Checkpoint:
    folder = user_path(word)
    if folder.name == "model" and (folder.parent / RECORD).is_file():
        folder = folder.parent
    if (folder / RECORD).is_file():
        artifact = artifact_at(folder)
    elif word in source.BUILT_IN or folder.exists():
        return _plain(word)
    elif "@" in word and HUB_NAME.fullmatch(word):
        name, _, revision = word.partition("@")
        return _model(word, {"source": name, "revision": revision}, name.rpartition("/")[2])
    else:
        try:
            artifact = find_artifact(word, store)
        except UserError as error:
            raise UserError(f"{error}{_other_meanings(word)}") from None
    if artifact.kind not in GENERATORS:
        raise UserError(f"{word} is a {artifact.kind}, not a checkpoint that can answer.")
    return Checkpoint(_name(artifact.stage), {"stage": "artifact", "path": str(artifact.path)}, artifact)


def _other_meanings(word: str) -> str:
    if source.HUB_NAME.fullmatch(word):
        return f" A model of the Hub needs its commit: {word}@<40 hexadecimal digits>."
    return "" if ":" in word else suggest(word, source.BUILT_IN)


def _plain(word: str) -> Checkpoint:
    """A built-in model, a folder without a record, or a .gguf file."""
    path = user_path(word)
    if word in source.BUILT_IN or path.is_file():
        return _model(word, {"source": word}, path.stem if path.is_file() else word)
    folder = find_checkpoint(str(path), None)
    name = folder.parent.name if folder.name == "model" else folder.name
    return _model(word, {"source": str(folder)}, name or folder.resolve().name)


def _model(word: str, block: dict[str, Any], name: str) -> Checkpoint:
    try:
        source.resolve(block["source"], block.get("revision"), Path.cwd())
    except UserError as error:
        raise UserError(f"{word}: {str(error).removeprefix('source: ').removeprefix('revision: ')}") from None
    return Checkpoint(_name(name), {"stage": "model", **block}, None)


def _name(text: str) -> str:
    """``text`` as a stage's name."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")[:60]
    return name if re.fullmatch(NAME_PATTERN, name) else f"model-{name}".rstrip("-")


def artifact_at(folder: Path) -> Artifact:
    """The finished artifact in ``folder``; ``UserError`` for one that cannot be read."""
    record = read_record(folder)
    if record is None:
        raise UserError(f"{folder}: no {RECORD} in it, so not a finished artifact.")
    return Artifact(record["stage"], Kind(record["makes"]), folder, record)


def find_reward(option: str, word: str, store: str | None) -> dict[str, Any]:
    """The stage that brings in the reward model that ``word`` means: an artifact, or a plain folder with a head."""
    folder = user_path(word)
    if folder.name == "model" and (folder.parent / RECORD).is_file():
        folder = folder.parent
    if (folder / RECORD).is_file():
        artifact = artifact_at(folder)
    elif folder.exists():
        from align.config.stages.artifact import ArtifactConfig

        stage = STAGES["artifact"]
        try:
            config = ArtifactConfig(path=str(folder))
            stage.makes_with(config)
            stage.identities(config, Path.cwd())
        except UserError as error:
            said = str(error).removeprefix("path: ").removeprefix("source: ")
            raise UserError(f"{option} {word} is no reward model: {said}") from None
        return {"stage": "artifact", "path": str(folder)}
    else:
        artifact = find_artifact(word, store)
    if artifact.kind != Kind.REWARD:
        raise UserError(f"{option} {word} is a {artifact.kind}, not a {Kind.REWARD}.")
    return {"stage": "artifact", "path": str(artifact.path)}


def find_rows(option: str, word: str, store: str | None, kinds: tuple[Kind, ...]) -> dict[str, Any]:
    """The stage that brings in the rows that ``word`` means (what ``find_build`` takes); a recipe is built first."""
    build = find_build(word, store)
    if not (build.folder / RECORD).is_file():
        raise UserError(
            f"{option} {word}: rows without a {RECORD}, so nothing says what they are; name their recipe, or the "
            "build in its store."
        )
    artifact = artifact_at(build.folder)
    if artifact.kind not in kinds:
        raise UserError(f"{option} {word} is {artifact.kind}; {' or '.join(kinds)} is needed there.")
    return {"stage": "artifact", "path": str(artifact.path)}


def base_of(artifact: Artifact, store: Store) -> Artifact | None:
    """The base model that a checkpoint was trained from, by the records of its store; None where they do not say.

    Only what became the policy is followed: a reward model or data may have come from another base.
    """
    store = _store_of(artifact) or store
    queue, seen = [artifact], set()
    while queue:
        one = queue.pop(0)
        if one.kind == Kind.MODEL:
            return one
        links = [(link["kind"], link["key"]) for link in one.record["input_stages"]]
        metrics = one.record.get("metrics") or {}
        if one.record.get("kind") == "artifact":
            links.append((str(metrics.get("kind")), str(metrics.get("key"))))
        for link in links:
            found = store.find_intact(*link) if link not in seen else None
            seen.add(link)
            if found is not None and found.kind in GENERATORS:
                queue.append(found)
    return None


def _store_of(artifact: Artifact) -> Store | None:
    """The store that an artifact's folder lies in, which need not be the one that results go to."""
    root = artifact.path.resolve().parents[1]
    return Store(root) if (root / MARKER).is_file() else None
