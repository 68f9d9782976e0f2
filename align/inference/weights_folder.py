"""Weights handed to servers through a folder: written as a draft, renamed when complete, the marker file last."""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from align.config.user_paths import user_path
from align.inference.weights import refuse_missing, with_tied_head
from align.inference.weights_digest import combine, digest_all
from align.store.atomic_write import write_text_atomically

if TYPE_CHECKING:
    from align.inference.server_options import ServerSpec

READY = "READY"
"""File that is written last into a folder of weights: without it the folder is incomplete."""
SHARD_BYTES = 512 * 2**20
"""Weights held in memory at a time while they are written."""


class WeightsFolder:
    """Numbered versions of a policy's weights, each a complete model folder that servers read."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec, self.version = spec, 0
        self.owner = secrets.token_hex(8)
        """Prefix of this run's version names: another run may give weights to the same server."""
        self.digests: dict[int, str] = {}
        """Version → digest of the tensors that were written."""
        self._temporary = contextlib.ExitStack()
        self.path = self.temporary(spec.pool.weights_folder)

    def temporary(self, parent: str | None = None) -> Path:
        """Return a new folder that ``close`` removes, inside ``parent`` if given."""
        outer = None if parent is None else user_path(parent).absolute()
        if outer is not None:
            outer.mkdir(parents=True, exist_ok=True)
        directory = tempfile.TemporaryDirectory(prefix="align-", dir=outer, ignore_cleanup_errors=True)
        folder = Path(self._temporary.enter_context(directory))
        if outer is not None:
            folder.chmod(0o755)  # the server may run as another user; the outer folder says who gets in
        return folder

    def path_of(self, version: int) -> Path:
        """Return the folder of a version."""
        return self.path / f"step_{version}"

    def name_of(self, version: int) -> str:
        """Return the name of a version, unique among all runs."""
        return f"{self.owner}:{version}"

    def write(self, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Write the next version and return its number. Floating-point tensors are written in the servers' type.

        Each tensor has the shape that the checkpoint gives its name.
        Raises ``ValueError`` when a tensor is missing; the version then does not exist.
        """
        spec, version = self.spec, self.version + 1
        folder = self.path_of(version)
        draft = folder.with_name(f"{folder.name}.partial")
        draft.mkdir()
        try:
            digests = write_shards(with_tied_head(weights, spec.tied_embeddings), draft, spec.dtype)
            refuse_missing(set(spec.tensor_names), set(digests))
            # Servers take the folder for a checkpoint of its own, so it needs all of its small files.
            for file in spec.model_dir.iterdir():  # configuration and tokenizer
                if file.suffix in (".json", ".jinja", ".model", ".txt") and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, draft / file.name)
            # A server that looks for this version sees it complete or not at all; the marker says so to others.
            draft.rename(folder)
            (folder / READY).touch()
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        self.version = version
        self.digests[version] = combine(digests)
        return version

    def drop_before(self, version: int) -> None:
        """Remove the versions before ``version``."""
        for folder in self.path.glob("step_*"):
            number = folder.name.removeprefix("step_")
            if number.isdigit() and int(number) < version:
                shutil.rmtree(folder, ignore_errors=True)
                self.digests.pop(int(number), None)

    def close(self) -> None:
        """Remove all versions and temporary folders."""
        self._temporary.close()


def write_shards(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """Write safetensors of about ``SHARD_BYTES`` bytes each and their index; floating-point tensors in ``dtype``.

    Tensors keep their shapes. Returns name → digest of each tensor as it was written.
    """
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    digests: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        # Digests are of the tensors as written, in the servers' type. A server can compute the same ones.
        digests.update(digest_all(shard.items()))
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in weights:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        # A separate copy: safetensors refuses tensors that share memory, as a tied head does.
        copy = tensor.detach().to("cpu", kind, copy=True, memory_format=torch.contiguous_format)
        # Write what is held before the next tensor would pass the limit: only one shard is in memory.
        if shard and size + copy.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = copy
        size += copy.nbytes
    flush()
    content = {"metadata": {}, "weight_map": index}
    write_text_atomically(folder / "model.safetensors.index.json", json.dumps(content))
    return digests
