"""Allocators that fail, for tests of steps that run out of memory, and stages that use them in one rank."""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from align.config.runtime import Runtime
from align.config.runtime.launch import rank
from align.data.rows import assistant, user, write_rows
from align.models.built_in import make_tiny
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind

FREE = 60 * 2**20
"""Bytes that a process may still ask for when its first step begins; a micro-batch of all rows needs more."""
LAYERS = 2
"""Of the tiny model."""
TOKENS = 110
RESPONSES = 2
"""Most tokens, or responses, of a learning pass in the rank whose memory is scarce. Six rows have over 150 tokens."""


def no_memory() -> torch.OutOfMemoryError:
    """Return the error of torch's allocator on a GPU."""
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")


class Allocator:
    """Counts the tokens of the passes that learn; passes over more than ``tokens`` fail.

    ``where`` is ``forward`` or ``backward``. A backward pass fails in its last layer, after gradients were added.
    """

    def __init__(self, tokens: int | None = None, where: str = "forward") -> None:
        self.tokens = tokens
        self.where = where
        self.largest = 0
        self.failures = 0
        self._layers = 0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, Llama's MLPs ask the allocator."""
        from transformers.models.llama.modeling_llama import LlamaMLP

        plain = LlamaMLP.forward

        def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
            output = plain(module, x)
            if torch.is_grad_enabled():
                self._allocate(x.numel() // x.shape[-1], output)
            return output

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LlamaMLP, "forward", forward)
            yield

    def _allocate(self, tokens: int, output: torch.Tensor) -> None:
        self.largest = max(self.largest, tokens)
        if self.tokens is None or tokens <= self.tokens:
            return
        if self.where == "forward":
            self.failures += 1
            raise no_memory()
        self._layers = 0
        output.register_hook(self._fail)

    def _fail(self, gradient: torch.Tensor) -> None:
        self._layers += 1
        if self._layers == LAYERS:
            self.failures += 1
            raise no_memory()


def run_scarce_rows(context: StageContext) -> dict[str, Any]:
    """Run ``sft`` with an allocator that refuses passes over more than ``TOKENS`` tokens in the last rank."""
    with Allocator(TOKENS if rank() == 1 else None, "backward").installed():
        return STAGES["sft"].runner()(context) or {}


def run_scarce_responses(context: StageContext) -> dict[str, Any]:
    """Run ``ppo`` with an allocator that refuses passes over more than ``RESPONSES`` responses in the last rank."""
    from align.rl.buffer import RolloutBuffer

    plain = RolloutBuffer.pack

    def pack(buffer: Any, rollout: Any, indices: list[int], *texts: Any) -> Any:
        if rank() == 1 and len(indices) > RESPONSES:
            raise no_memory()
        return plain(buffer, rollout, indices, *texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutBuffer, "pack", pack)
        return STAGES["ppo"].runner()(context) or {}


SFT = dataclasses.replace(STAGES["sft"], kind="scarce_sft", run=f"{__name__}:run_scarce_rows", path=f"{__name__}:SFT")
PPO = dataclasses.replace(
    STAGES["ppo"], kind="scarce_ppo", run=f"{__name__}:run_scarce_responses", path=f"{__name__}:PPO"
)


def main(folder: Path) -> None:
    """Run ``sft`` with little memory, then with the size that was found; print the settings and weights' difference."""
    from safetensors.torch import load_file

    from align.training.trainers import Prepared
    from tests.support.training.harness import context

    model = make_tiny(folder / "model", hidden_size=128)
    (folder / "data").mkdir()
    for split, count in (("train", 16), ("test", 1)):
        # Rows of some 700 tokens: a token is a byte.
        lines = [
            {
                "id": f"{split}{number}",
                "source": "t",
                "checks": "",
                "prompt": [user(f"{number} " * 200)],
                "completion": [assistant("ab " * 30)],
            }
            for number in range(10, 10 + count)
        ]
        write_rows(folder / "data" / f"{split}.parquet", lines)
    data = Artifact("data", Kind.INSTRUCTIONS, folder / "data", {})
    fields = {"batch_size": 16, "learning_rate": 1e-3, "max_length": 1024, "max_steps": 1, "precision": "float32"}
    fields |= {"scheduler": "constant", "warmup_ratio": 0.0}
    runtime = Runtime(device="cpu", threads=1)
    plain = Prepared.training_step

    def limited(trainer: Any, *args: Any) -> Any:
        in_use = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (in_use + FREE, resource.RLIM_INFINITY))
        try:
            return plain(trainer, *args)
        finally:  # saving starts threads
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    metrics: dict[str, Any] = {}
    weights = []
    for size in ("auto", None):
        size = size or metrics["micro_batch_size"]
        config = STAGES["sft"].config_class()(model="model", data="data", micro_batch_size=size, **fields)
        stage = dataclasses.replace(context(folder / str(size), config, model, data), runtime=runtime)
        with pytest.MonkeyPatch.context() as patch:
            if size == "auto":
                patch.setattr(Prepared, "training_step", limited)
            results = STAGES["sft"].runner()(stage)
        metrics = metrics or results
        weights.append(load_file(stage.output / "model" / "model.safetensors"))
    difference = max(float((tensor - weights[1][name]).abs().max()) for name, tensor in weights[0].items())
    print(json.dumps({**metrics, "difference": difference}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
