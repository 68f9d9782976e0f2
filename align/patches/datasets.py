"""Patches of datasets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.patches.signatures import private_name


def pin_revisions(revisions: Mapping[str, str]) -> set[str]:
    """Have ``datasets`` load data of the Hub at these commits.

    Replaces ``datasets.load_dataset`` and reads ``datasets.packaged_modules._PACKAGED_DATASETS_MODULES``, the names of
    file formats that it accepts instead of a dataset. lm-eval's tasks call that function without a commit, and lm-eval
    has no setting for all tasks of a group. The patch was written for datasets 5.2.

    Returns:
        A set that collects the datasets that were loaded without a commit.
    """
    formats = private_name("datasets", "datasets.packaged_modules:_PACKAGED_DATASETS_MODULES")
    original = private_name("datasets", "datasets:load_dataset")
    import datasets

    unpinned: set[str] = set()

    def load_dataset(path: str, *arguments: Any, **options: Any) -> Any:
        if path not in formats and not Path(path).exists():
            if path in revisions:
                options["revision"] = revisions[path]
            elif not re.fullmatch(r"[0-9a-f]{40}", str(options.get("revision"))):
                unpinned.add(path)
        return original(path, *arguments, **options)

    datasets.load_dataset = load_dataset
    return unpinned
