"""Stored rollouts of a stage that samples: how many it writes, and whose it learns from. Torch-free."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import Field

from align.config.base import Config
from align.config.user_paths import UserPath, user_path
from align.errors import UserError
from align.store.fingerprint import file_digest


class StoredRollouts(Config):
    """Rollouts that a stage stores as Parquet files (docs/rollouts.md). No result depends on them."""

    keep: float = Field(1.0, ge=0, le=1)
    """Share of the prompts whose responses are stored. The prompt decides, so the responses of a stored prompt are
    complete in every update. 0 stores none."""
    max_gb: float = Field(2.0, gt=0)
    """Limit of the files' size in GB (10^9 bytes). The files of the oldest updates are deleted first."""

    @property
    def max_bytes(self) -> int:
        """The limit in bytes."""
        return int(self.max_gb * 10**9)


class ReplayFolder(Config):
    """A folder of stored rollouts to learn from, such as a failed run's rollout."""

    folder: UserPath
    """Folder ``rollouts`` of a stage, below its artifact or below the ``checkpoints`` of its ``.partial`` folder."""

    def identity(self, base: Path) -> str:
        """Return the digest of the files. Raises ``UserError`` if there are none."""
        from align.store.rollouts import rollout_files

        files = rollout_files(user_path(self.folder, base))
        if not files:
            raise UserError(
                f"replay.folder: {self.folder} has no Parquet files. Name the folder `rollouts` of a stage that "
                "learned from its own samples."
            )
        digests = "\n".join(f"{path.name} {file_digest(path)}" for path in files)
        return hashlib.sha256(digests.encode()).hexdigest()
