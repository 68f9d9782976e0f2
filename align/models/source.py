"""Where a base model comes from, and what pins its identity. Torch-free, and never touches the network.

A source is a built-in name, a transformers folder, a ``.gguf`` file, or a Hub name with the commit it is pinned to.
Left out: fetching and conversion (``embedded.py``, ``stages/model.py``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

from align.errors import UserError
from align.fingerprint import digest, file_digest
from align.models.embedded import NAME as EMBEDDED
from align.models.embedded import WHEEL_SHA256
from align.validation import suggest

TINY = "tiny"
TINY_VERSION = 1
"""Bumped when ``make_tiny`` writes other weights for the same seed."""
BUILT_IN = (EMBEDDED, TINY)

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MODEL_FILES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model", ".py", ".tiktoken"})
"""Suffixes of the files that decide what a folder's model computes; a README or an optimizer state does not."""


class Origin(StrEnum):
    """How a source is fetched."""

    EMBEDDED = "embedded"
    TINY = "tiny"
    FOLDER = "folder"
    GGUF = "gguf"
    HUB = "hub"


@dataclass(frozen=True)
class Source:
    """A checked source. ``path`` is set for a folder or a GGUF file, ``revision`` for a Hub name."""

    origin: Origin
    name: str
    path: Path | None = None
    revision: str | None = None


def resolve(source: str, revision: str | None, base: Path) -> Source:
    """Check ``source`` without fetching it; relative paths start at ``base``.

    Raises ``UserError`` for a path that is missing or holds no safetensors, a Hub name without a 40-digit commit,
    and a name that is none of these.
    """
    if source in BUILT_IN:
        if revision is not None:
            raise UserError(f"revision: the built-in model '{source}' is pinned already; leave revision out.")
        return Source(Origin.EMBEDDED if source == EMBEDDED else Origin.TINY, source)
    path = base / Path(source).expanduser()
    if path.exists():
        if revision is not None:
            raise UserError(f"revision: '{source}' is a path, pinned by its contents; leave revision out.")
        return _local(source, path)
    if source.endswith(".gguf") or source.startswith((".", "/", "~")):
        raise UserError(f"source: there is no '{path}'; give the path of a model folder or of a .gguf file.")
    if not HUB_NAME.fullmatch(source):
        raise UserError(
            f"source: '{source}' is neither a built-in model ({', '.join(BUILT_IN)}), nor a path under '{base}', "
            f"nor a Hub name like 'organisation/model'.{suggest(source, BUILT_IN)}"
        )
    if revision is None or not COMMIT.fullmatch(revision):
        found = "it is missing" if revision is None else f"'{revision}' can move"
        raise UserError(
            f"revision: the Hub model '{source}' needs the commit it is pinned to, 40 hexadecimal digits; {found}. "
            f"Copy it from https://huggingface.co/{source}/commits/main"
        )
    return Source(Origin.HUB, source, revision=revision)


def _local(source: str, path: Path) -> Source:
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"source: '{source}' is a file but no .gguf; give a model folder or a .gguf file.")
        return Source(Origin.GGUF, source, path=path)
    if not (path / "config.json").is_file():
        raise UserError(f"source: '{source}' holds no config.json, so it is no transformers model folder.")
    refuse_pickles(source, [file.name for file in path.iterdir()])
    return Source(Origin.FOLDER, source, path=path)


def refuse_pickles(name: str, files: list[str]) -> None:
    """Raise ``UserError`` unless there are safetensors among ``files``: pickled weights run code when opened."""
    if any(file.endswith(".safetensors") for file in files):
        return
    pickled = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt")))
    found = f"only pickled weights ({pickled[0]}), which run code when opened" if pickled else "no weights"
    raise UserError(
        f"source: '{name}' holds {found}; align loads safetensors only. Convert it once with "
        "`model.save_pretrained(folder)` where you trust it, and point source at that folder."
    )


def identity(source: str, revision: str | None, base: Path) -> str:
    """Text that changes whenever the model does: a commit, a checksum, or a digest of the files' contents."""
    found = resolve(source, revision, base)
    if found.origin is Origin.EMBEDDED:
        return f"embedded:{WHEEL_SHA256}"
    if found.origin is Origin.TINY:
        return f"tiny:{TINY_VERSION}"
    if found.origin is Origin.HUB:
        return f"hub:{found.name}@{found.revision}"
    assert found.path is not None
    if found.origin is Origin.GGUF:
        return f"gguf:{_digest(found.path)}"
    files = {file.name: _digest(file) for file in found.path.iterdir() if file.suffix in MODEL_FILES and file.is_file()}
    return f"folder:{digest(files)}"


def _digest(path: Path) -> str:
    status = path.stat()
    return _cached_digest(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _cached_digest(path: Path, size: int, modified: int) -> str:
    """A file's digest, once per process while its size and time stay the same: a plan asks several times."""
    return file_digest(path)
