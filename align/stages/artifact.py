"""Stage ``artifact``: take a finished artifact into a pipeline as it is, so that nothing of it is made again.

The files are shared with the original (hard links) where the file system can, and copied elsewhere. A reward model's
plain folder is taken, too; a plain folder that answers prompts is what the ``model`` stage reads.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.stages.artifact import ArtifactConfig
from align.config.user_paths import user_path
from align.errors import UserError
from align.pipeline.context import StageContext
from align.store.artifacts import Kind, original_key
from align.store.fingerprint import file_digest
from align.store.record import RECORD, DamagedRecord
from align.store.record import read_record as read_checked

if TYPE_CHECKING:
    from align.models.architecture import Architecture


def artifact_folder(config: ArtifactConfig, base: Path) -> Path:
    """Return the folder; ``UserError`` where there is none."""
    folder = user_path(config.path, base)
    if not folder.is_dir():
        raise UserError(f"path: there is no folder '{folder}'; relative paths start at the current folder.")
    return folder


def makes(config: ArtifactConfig) -> Kind:
    """Return the kind that the artifact's record states."""
    folder = artifact_folder(config, Path.cwd())
    record = read_record(folder)
    if record is None:
        _refuse_other_models(folder)
        return Kind.REWARD
    return Kind(record["makes"])


def identities(config: ArtifactConfig, base: Path) -> dict[str, str]:
    """Return the artifact's key; for a reward model's folder the digest of its files."""
    folder = artifact_folder(config, base)
    record = read_record(folder)
    if record is not None:
        return {"path": str(record["key"])}
    from align.models.source import identity

    return {"path": identity(str(folder), None, base)}


def architecture(config: ArtifactConfig, base: Path) -> Architecture:
    """Return the model's sizes, for the memory of the stages that use it."""
    from align.models.architecture import read_architecture

    folder = artifact_folder(config, base)
    model_folder = folder / "model" if read_record(folder) is not None else folder
    return read_architecture(model_folder / "config.json")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished artifact, or None; ``UserError`` for one that cannot be read."""
    try:
        return read_checked(folder)
    except FileNotFoundError:
        return None
    except DamagedRecord as error:
        raise UserError(f"path: {error}") from None
    except OSError as error:
        raise UserError(f"path: {folder / RECORD} cannot be read ({error.strerror}).") from None


def _refuse_other_models(folder: Path) -> None:
    """Without a record only a reward model's folder is taken: all else has a stage that reads it properly."""
    try:
        kinds = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["?"]
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"path: '{folder}' has no {RECORD}, so it is not a finished artifact; `align list` shows those of a store."
        ) from None
    if not str(kinds[0]).endswith("ForSequenceClassification"):
        raise UserError(
            f"path: '{folder}' is a {kinds[0]} without a {RECORD}, a plain model folder; bring it in with "
            f"`stage: model` and `source: {folder}`."
        )


def run(context: StageContext) -> dict[str, Any]:
    """Fill the output with the artifact's files and say where it comes from: its ``key``, ``stage`` and ``kind``.

    Raises ``UserError`` for a file that is gone or is not what the record says.
    """
    config: ArtifactConfig = context.config
    folder = artifact_folder(config, Path.cwd())
    record = read_record(folder)
    if record is None:
        _copy_model(folder, context.output / "model")
        return {"key": identities(config, Path.cwd())["path"], "stage": folder.name, "kind": "folder"}
    total = sum(entry["bytes"] for entry in record["outputs"].values())
    done = 0
    for name, entry in record["outputs"].items():
        _take(folder / name, context.output / name, context.output, entry["sha256"])
        done += entry["bytes"]
        context.progress(done, total, unit="bytes")
    return {"key": original_key(record), "stage": record["stage"], "kind": record["kind"]}


def _take(source: Path, target: Path, root: Path, sha256: str) -> None:
    """One file, checked: the key stands for these bytes, and a name must not lead out of the folder."""
    if not target.resolve().is_relative_to(root.resolve()):
        raise UserError(f"path: the record names the file '{source}', outside the artifact; do not use it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        found = file_digest(source)
    except OSError as error:
        raise UserError(f"path: {source} cannot be read ({error.strerror}); the artifact is not whole.") from None
    if found != sha256:
        raise UserError(f"path: {source} has another sha256 than its record; the artifact is corrupted.")
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)


def _copy_model(folder: Path, target: Path) -> None:
    """A folder that someone may still change: copied, never shared."""
    from align.models.files import files_read

    for name, file in files_read(folder).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target / name)
