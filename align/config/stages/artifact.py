"""Settings of the stage ``artifact``: a finished artifact to use as it is. Torch-free."""

from __future__ import annotations

from typing import ClassVar

from align.config.base import Config
from align.config.located_paths import UserPath


class ArtifactConfig(Config):
    """The artifact's folder."""

    path: UserPath
    """Folder of a finished artifact (with its record.json), or a reward model's folder (safetensors)."""

    identified: ClassVar[frozenset[str]] = frozenset({"path"})
