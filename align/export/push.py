"""Uploading an exported model folder to the Hugging Face Hub: what would go, and the one commit that does it.

Weights of an earlier export that this one does not replace are deleted in the same commit: a reader would load both.
The token is huggingface_hub's business and is never printed. Torch-free; for datasets see ``align.data.push``.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.licenses import License
from align.data.push import Part, check_repo, hub_errors, make_repository

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
"""Files that decide which safetensors a loader takes: shards of an earlier push, an adapter that is merged now."""


@dataclass(frozen=True)
class ModelUpload:
    """Everything that would be uploaded."""

    folder: Path
    repo: str
    revision: str | None
    private: bool
    parts: tuple[Part, ...]
    license: License

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(part.size for part in self.parts)


def prepare(folder: Path, repo: str, license: License, revision: str | None, private: bool) -> ModelUpload:
    """What pushing ``folder`` would upload; touches no network."""
    check_repo(repo, "model")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = tuple(Part(path.relative_to(folder).as_posix(), path) for path in files)
    return ModelUpload(folder, repo, revision, private, parts, license)


def push(upload: ModelUpload, message: str, api: Any = None) -> dict[str, Any]:
    """Make the repository where there is none, and commit the upload. Returns ``url``, ``commit``, ``deleted``.

    ``api`` is a ``huggingface_hub.HfApi``. Raises ``UserError`` where the Hub refuses (no token, no right, a public
    repository that should be private) and ``StageFailed`` where it cannot be reached.
    """
    from huggingface_hub import HfApi

    api = api or HfApi(library_name="align")
    with hub_errors(upload.repo):
        there = make_repository(api, upload.repo, "model", upload.revision, upload.private)
        made = api.upload_folder(
            repo_id=upload.repo, folder_path=upload.folder, repo_type="model", revision=upload.revision,
            commit_message=message, delete_patterns=list(WEIGHTS),
        )  # fmt: skip
    kept = {part.name for part in upload.parts}
    deleted = sorted(
        name for name in there if name not in kept and any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS)
    )
    return {"url": str(made.commit_url), "commit": str(made.oid), "deleted": deleted}
