"""Stage ``artifact``: use a finished artifact in a pipeline as it is.

Its files are hard links to the original, or copies if the file system has no links. A reward model's plain folder is
also accepted; the ``model`` stage reads plain folders of language models.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.stages.inputs import ArtifactConfig
from align.config.user_paths import user_path
from align.errors import UserError, with_article
from align.pipeline.context import StageContext
from align.store.artifacts import Kind, original_key
from align.store.fingerprint import file_digest
from align.store.record import RECORD, DamagedRecord
from align.store.record import read_record as read_checked

if TYPE_CHECKING:
    from align.models.compute.architecture import Architecture


def artifact_folder(config: ArtifactConfig, base: Path) -> Path:
    """Return the folder; raise ``UserError`` if there is none."""
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
    """Return the artifact's key, or for a reward model's folder the digest of its files."""
    folder = artifact_folder(config, base)
    record = read_record(folder)
    if record is not None:
        return {"path": str(record["key"])}
    from align.models.checkpoints.source import identity

    return {"path": identity(str(folder), None, base)}


def architecture(config: ArtifactConfig, base: Path) -> Architecture:
    """Return the model's sizes, for estimates of the stages that use it."""
    from align.models.compute.model_types import read_architecture

    folder = artifact_folder(config, base)
    model_folder = folder / "model" if read_record(folder) is not None else folder
    return read_architecture(model_folder / "config.json")


def parameters(config: ArtifactConfig, base: Path) -> int:
    """Return the model's number of parameters; raise ``UnknownArchitecture`` if it is not known."""
    from align.models.model_plan import known_parameters

    folder = artifact_folder(config, base)
    return known_parameters(str(folder / "model" if read_record(folder) is not None else folder), None, base)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a finished artifact, or None; raise ``UserError`` if it cannot be read."""
    try:
        return read_checked(folder)
    except FileNotFoundError:
        return None
    except DamagedRecord as error:
        raise UserError(f"path: {error}") from None
    except OSError as error:
        raise UserError(f"path: {folder / RECORD} cannot be read ({error.strerror}).") from None


def _refuse_other_models(folder: Path) -> None:
    """Raise ``UserError`` for a folder without a record that is not a reward model's."""
    try:
        kinds = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or ["?"]
    except (OSError, ValueError, AttributeError):
        raise UserError(
            f"path: '{folder}' has no {RECORD}, so it is not a finished artifact; `align list` shows those of a store."
        ) from None
    if not str(kinds[0]).endswith("ForSequenceClassification"):
        raise UserError(
            f"path: '{folder}' is {with_article(kinds[0])} without a {RECORD}, a plain model folder; bring it in with "
            f"`stage: model` and `source: {folder}`."
        )


def run(context: StageContext) -> dict[str, Any]:
    """Fill the output with the artifact's files, and return its origin: ``key``, ``stage`` and ``kind``.

    Raises ``UserError`` for a file that is missing or differs from the record.
    """
    config: ArtifactConfig = context.config
    folder = artifact_folder(config, Path.cwd())
    record = read_record(folder)
    if record is None:
        _copy_model(folder, context.output / "model")
        return {"key": identities(config, Path.cwd())["path"], "stage": folder.name, "kind": "folder"}
    total = sum(entry["bytes"] for entry in record["outputs"].values())
    # Count bytes, because copying a few large files is nearly all of the work.
    copied = 0
    for name, entry in record["outputs"].items():
        _link(folder / name, context.output / name, context.output, entry["sha256"])
        copied += entry["bytes"]
        context.progress(copied, total, unit="bytes")
    return {"key": original_key(record), "stage": record["stage"], "kind": record["kind"]}


def _link(source: Path, target: Path, root: Path, sha256: str) -> None:
    """Link or copy one file, after checking its digest, and that its name does not lead out of the folder."""
    if not target.resolve().is_relative_to(root.resolve()):
        raise UserError(f"path: the record names the file '{source}', outside the artifact; do not use it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        digest = file_digest(source)
    except OSError as error:
        raise UserError(f"path: {source} cannot be read ({error.strerror}); the artifact is not whole.") from None
    if digest != sha256:
        # Check before linking, because the new artifact's record lists these digests.
        raise UserError(f"path: {source} has another sha256 than its record; the artifact is corrupted.")
    try:
        # A hard link costs no space, and finished artifacts never change.
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(source, target)


def _copy_model(folder: Path, target: Path) -> None:
    """Copy a plain folder; no hard links, since someone may still change it."""
    from align.models.checkpoints.files import files_read

    for name, file in files_read(folder).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target / name)
