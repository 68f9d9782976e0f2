"""Weights handed to servers through a folder: written under another name, renamed when whole, their marker last."""

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

if TYPE_CHECKING:
    from align.inference.server_options import Served

READY = "READY"
"""File that is written last into a folder of weights: without it the folder is not whole."""
SHARD_BYTES = 512 * 2**20
"""Weights held in memory at once while they are written."""


class WeightsFolder:
    """Numbered versions of a policy's weights, each a whole model folder, which servers read and ``close`` removes."""

    def __init__(self, served: Served) -> None:
        self.served, self.version = served, 0
        self.owner = secrets.token_hex(8)
        """Stands for this run in the names of weights, which another run may give the same server, too."""
        self.digests: dict[int, str] = {}
        """By version, of the tensors that were written."""
        self._temporary = contextlib.ExitStack()
        self.path = self.temporary(served.pool.weights_folder)

    def temporary(self, inside: str | None = None) -> Path:
        """A new folder that ``close`` removes."""
        outer = None if inside is None else user_path(inside).absolute()
        if outer is not None:
            outer.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix="align-", dir=outer, ignore_cleanup_errors=True)
        folder = Path(self._temporary.enter_context(made))
        if outer is not None:
            folder.chmod(0o755)  # the server may run as another user; the outer folder says who gets in
        return folder

    def of(self, version: int) -> Path:
        """Where a version lies."""
        return self.path / f"step_{version}"

    def name_of(self, version: int) -> str:
        """The name of a version among those of all runs."""
        return f"{self.owner}:{version}"

    def write(self, weights: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Write the next version, which is returned; ``ValueError`` when a tensor is missing, and then none is there.

        Floating-point tensors are written in the servers' type.
        """
        served, version = self.served, self.version + 1
        folder = self.of(version)
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir()
        try:
            digests = write_shards(with_tied_head(weights, served.tied), partial, served.dtype)
            refuse_missing(set(served.names), set(digests))
            for file in served.model_dir.iterdir():  # configuration and tokenizer
                if file.suffix in (".json", ".jinja", ".model", ".txt") and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, partial / file.name)
            partial.rename(folder)
            (folder / READY).touch()
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self.version, self.digests[version] = version, combine(digests)
        return version

    def drop_before(self, version: int) -> None:
        """Remove the versions before this one."""
        for old in self.path.glob("step_*"):
            number = old.name.removeprefix("step_")
            if number.isdigit() and int(number) < version:
                shutil.rmtree(old, ignore_errors=True)
                self.digests.pop(int(number), None)

    def close(self) -> None:
        """Remove everything."""
        self._temporary.close()


def write_shards(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype) -> dict[str, str]:
    """Write safetensors of about ``SHARD_BYTES`` and their index; floating-point tensors in ``dtype``.

    Returns the digest of each tensor as it was written, by its name.
    """
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    digests: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        file = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        digests.update(digest_all(shard.items()))
        index.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in weights:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        # A copy of its own: safetensors refuses tensors that share memory, as a tied head does.
        copy = tensor.detach().to("cpu", kind, copy=True, memory_format=torch.contiguous_format)
        if shard and size + copy.nbytes > SHARD_BYTES:
            flush()
            size = 0
        shard[name] = copy
        size += copy.nbytes
    flush()
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    return digests
