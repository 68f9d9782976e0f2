"""Identity of a source: the files, commits and versions that decide its records. Reads no records."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from align.config.extras import require_extra
from align.config.recipe.source_settings import (
    ArtifactSource,
    EmbeddedSource,
    FilesSource,
    GymSource,
    HubSource,
    InputSource,
    PythonSource,
    Source,
)
from align.config.user_functions import function_identity
from align.config.user_paths import matching_paths, user_path
from align.config.validation import suggest
from align.data.reading import SUFFIXES, is_readable
from align.errors import UserError
from align.store.fingerprint import file_digest
from align.store.record import RECORD, read_record


def identity(source: Source, base: Path, inputs: Sequence[Path] = ()) -> dict[str, str]:
    """Return digests, commits and versions that decide the source's records, by name; the same on every machine.

    Files by sha256 (their folder does not matter), the Hub by commit, a Python generator by the digest of its source
    file, artifacts by their key. A stage's key includes its inputs anyway; a recipe built without a stage needs them
    here. Raises ``UserError`` for a missing file or artifact.
    """
    if isinstance(source, FilesSource):
        return _digests(find_files(source.paths, base))
    if isinstance(source, HubSource):
        return {source.dataset: source.revision}
    if isinstance(source, PythonSource):
        return {source.function: function_identity(source.function, "function")}
    if isinstance(source, EmbeddedSource):
        from align.data import checkers, embedded

        return {"embedded": f"version {embedded.VERSION}, checks {checkers.VERSION}"}
    if isinstance(source, GymSource):
        require_extra("reasoning_gym", "gym", f"{source.label}:")
        return {"reasoning-gym": importlib.metadata.version("reasoning-gym")}
    folder = source_folder(source, base, inputs)
    return {"artifact" if isinstance(source, ArtifactSource) else f"input {source.index}": artifact_key(folder)}


def find_files(patterns: Sequence[str], base: Path) -> list[Path]:
    """Return the files of paths and globs, in sorted order, each once. Raises ``UserError`` for one without a match."""
    unique: dict[Path, None] = {}
    for pattern in patterns:
        files = [path for path in matching_paths(pattern, base) if path.is_file()]
        if not files:
            raise UserError(f"no file matches '{pattern}' (searched from {base}).{_neighbors(base / pattern)}")
        for path in files:
            if not is_readable(path):
                raise UserError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}.")
            unique[path] = None
    return list(unique)


def _neighbors(path: Path) -> str:
    names = [file.name for file in path.parent.iterdir() if is_readable(file)] if path.parent.is_dir() else []
    return suggest(path.name, names)


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    """Return sha256 digests by file name; files of one name in different folders get a number."""
    digests: dict[str, str] = {}
    for path in paths:
        name, number = path.name, 2
        while name in digests:
            name = f"{path.name} ({number})"
            number += 1
        digests[name] = f"sha256:{file_digest(path)}"
    return digests


def source_folder(source: ArtifactSource | InputSource, base: Path, inputs: Sequence[Path]) -> Path:
    """Return the folder of an earlier artifact. Raises ``UserError`` for an input that the stage does not have."""
    if isinstance(source, ArtifactSource):
        return user_path(source.path, base)
    if source.index >= len(inputs):
        count = f"{len(inputs)} inputs" if inputs else "none"
        raise UserError(
            f"a source reads input {source.index}, and the data stage has {count}. List the stages whose data it "
            "takes under the stage's inputs, counted from 0."
        )
    return inputs[source.index]


def artifact_key(folder: Path) -> str:
    """Return the key in an artifact's record. Raises ``UserError`` for a folder that is no finished artifact."""
    try:
        return str(read_record(folder)["key"])
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no finished artifact (it has no {RECORD}). `align list` shows the finished ones; files of "
            "other programs are read with type: files."
        ) from None
