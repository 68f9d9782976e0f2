"""Upload an exported model folder to the Hugging Face Hub in one commit.

The commit also deletes weights of an earlier export that this one does not replace: a reader would load both. Only
huggingface_hub handles the token, which is never printed. Torch-free; for datasets see ``align.data.push``.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from align.data.licenses import License
from align.data.push import Part, Upload, check_repo, hub_errors, make_repository

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
"""Files that decide which safetensors a loader reads: shards of an earlier push, an adapter that is now merged."""


def prepare(folder: Path, repo: str, license: License, revision: str | None, private: bool) -> Upload:
    """Return the upload of ``folder``, without using the network."""
    check_repo(repo, "model")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    parts = tuple(Part(path.relative_to(folder).as_posix(), path) for path in files)
    return Upload(folder, repo, revision, private, parts, license)


def push(upload: Upload, message: str, api: Any = None) -> dict[str, Any]:
    """Create the repository if necessary and commit the upload. Returns ``url``, ``commit``, ``deleted``.

    ``api`` is a ``huggingface_hub.HfApi``. Raises ``UserError`` where the Hub refuses (no token, no right, a public
    repository that should be private) and ``StageFailed`` where it cannot be reached.
    """
    from huggingface_hub import HfApi

    api = api or HfApi(library_name="align")
    with hub_errors(upload.repo):
        existing = make_repository(api, upload.repo, "model", upload.revision, upload.private)
        commit = api.upload_folder(
            repo_id=upload.repo,
            folder_path=upload.folder,
            repo_type="model",
            revision=upload.revision,
            commit_message=message,
            delete_patterns=list(WEIGHTS),
        )
    # delete_patterns removes matching files that the upload does not contain; report those.
    uploaded = {part.name for part in upload.parts}
    deleted = sorted(
        name for name in existing if name not in uploaded and any(fnmatch.fnmatch(name, pattern) for pattern in WEIGHTS)
    )
    return {"url": str(commit.commit_url), "commit": str(commit.oid), "deleted": deleted}
