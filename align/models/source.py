"""Resolve the source of a base model and what pins its identity. Torch-free.

A source is a built-in name, a transformers folder, a peft adapter's folder, a ``.gguf`` file, or a Hub name. A Hub name
with a commit is resolved without the network; for any other revision the Hub or its cache names the commit.
Left out: fetching and conversion (``embedded.py``, ``stages/model.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from align.config.hub_commits import HUB_NAME, find_commit
from align.config.user_paths import user_path
from align.config.validation import suggest
from align.errors import UserError
from align.models import files
from align.models.embedded import NAME as EMBEDDED
from align.models.embedded import WHEEL_SHA256
from align.models.folder_checks import check_adapter, check_folder, check_gguf
from align.models.sharded_checkpoints import explain_sharded
from align.store.fingerprint import digest, file_digest

TINY = "tiny"
TINY_VERSION = 1
"""Increased when ``make_tiny`` writes other weights for the same seed."""
BUILT_IN = (EMBEDDED, TINY)

STORED_ADAPTER = Path("adapter", "adapter.json")
"""In a model folder, the description of an adapter that only align applies (``align.models.tuning.stored``)."""


class Origin(StrEnum):
    """Way in which a source is fetched."""

    EMBEDDED = "embedded"
    TINY = "tiny"
    FOLDER = "folder"
    ADAPTER = "adapter"
    GGUF = "gguf"
    HUB = "hub"


@dataclass(frozen=True)
class Source:
    """A validated source. ``path`` is set for a folder or a file, ``revision`` (a commit) for a Hub name."""

    origin: Origin
    name: str
    path: Path | None = None
    revision: str | None = None


def resolve(source: str, revision: str | None, base: Path) -> Source:
    """Validate ``source`` without fetching it; relative paths start at ``base``.

    ``revision`` of a Hub name is a branch, a tag or a commit, by default ``main``. Raises ``UserError`` for a path that
    is missing, a model folder with a file that is damaged or hostile, a Hub name or revision that does not exist, and a
    name that is none of these.
    """
    if source in BUILT_IN:
        if revision is not None:
            raise UserError(f"revision: the built-in model '{source}' is pinned already; leave revision out.")
        return Source(Origin.EMBEDDED if source == EMBEDDED else Origin.TINY, source)
    path = user_path(source, base)
    if path.exists():
        if revision is not None:
            raise UserError(f"revision: '{source}' is a path, pinned by its contents; leave revision out.")
        return _local(source, path)
    # These look like paths, so the message must not suggest a Hub name.
    if source.endswith(".gguf") or source.startswith((".", "/", "~")):
        raise UserError(f"source: there is no '{path}'; give the path of a model folder or of a .gguf file.")
    if not HUB_NAME.fullmatch(source):
        raise UserError(
            f"source: '{source}' is neither a built-in model ({', '.join(BUILT_IN)}), nor a path under '{base}', "
            f"nor a Hub name like 'organization/model'.{suggest(source, BUILT_IN)}"
        )
    try:
        return Source(Origin.HUB, source, revision=find_commit(source, revision, "model"))
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith("revision: ") else f"source: {text}") from None


def _local(source: str, path: Path) -> Source:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"source: '{source}' is a file but no .gguf; give a model folder or a .gguf file.")
        _explain(check_gguf, path)
        return Source(Origin.GGUF, source, path=path)
    if files.is_adapter(path):
        _explain(check_adapter, path)
        return Source(Origin.ADAPTER, source, path=path)
    if not files.has_weights(path):
        sharded = explain_sharded(path)
        if sharded is not None:
            raise UserError(f"source: {sharded}")
    _explain(check_folder, path)
    if (path / STORED_ADAPTER).is_file():
        raise UserError(
            f"source: '{source}' carries an adapter that cannot be merged into its weights ({STORED_ADAPTER}), and a "
            "model stage reads weights only. Use the finished artifact with `stage: artifact`."
        )
    return Source(Origin.FOLDER, source, path=path)


def _explain(check: Callable[[Path], None], path: Path) -> None:
    try:
        check(path)
    except UserError as error:
        raise UserError(f"source: {error}") from None


def identity(source: str, revision: str | None, base: Path) -> str:
    """Return text that changes whenever the model does: a commit, a checksum, or a digest of the files' contents."""
    resolved = resolve(source, revision, base)
    if resolved.origin is Origin.EMBEDDED:
        return f"embedded:{WHEEL_SHA256}"
    if resolved.origin is Origin.TINY:
        return f"tiny:{TINY_VERSION}"
    if resolved.origin is Origin.HUB:
        return f"hub:{resolved.name}@{resolved.revision}"
    assert resolved.path is not None
    if resolved.origin is Origin.GGUF:
        return f"gguf:{_digest(resolved.path)}"
    contents = {name: _digest(file) for name, file in files.files_read(resolved.path).items()}
    return f"{resolved.origin}:{digest(contents)}"


def _digest(path: Path) -> str:
    # Size and time identify an unchanged file, so a digest of gigabytes is computed once.
    status = path.stat()
    return _cached_digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _cached_digest(path: Path, size: int, modified: int) -> str:
    """Return a file's digest, computed once per process while size and time are unchanged: a plan needs it often."""
    return file_digest(path)
