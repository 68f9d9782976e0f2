"""The micro-batches of an optimizer step. A step that runs out of memory is repeated with smaller micro-batches.

A step's loss is a mean over its rows or its tokens, over all processes together. So neither the size of micro-batches
nor the number of processes changes it. ``StepMemory`` halves the size until a step fits, and then has activations
recomputed. A repeated step starts from the generators' states of its first attempt, without gradients. All processes
repeat it together: each collective operation inside a step first asks whether another process has run out of memory.

A model that is sharded over processes gathers its weights inside a pass, so a step cannot be repeated there. Its stage
fails, and the next start uses the smaller size.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import BatchSampler, DataLoader

from align.config.runtime.launch import world_size
from align.errors import StageFailed, is_out_of_memory
from align.models.compute.precision import disable_autocast_cache
from align.models.compute.processes import all_reduce, broadcast, empty_caches, split_by_rank
from align.pipeline.context import MemoryGuess
from align.training.checkpoints import read_state, write_state

T = TypeVar("T")
LOG = logging.getLogger(__name__)
SHARE = "loss_share"
"""Key of a micro-batch's weight among its inputs."""
FILE = "memory.json"
"""In the folder of the checkpoints: the settings that fit in memory so far."""
BUCKET = 2**23
"""Gradients that are averaged over the processes at a time, unless one tensor has more."""


@dataclass(frozen=True)
class MemorySettings:
    """The settings of memory that a stage's config allows. A trainer's arguments have them as ``memory``."""

    sizes: tuple[int, ...]
    """Rows of a micro-batch in each process; each size is tried after the one before has failed."""
    may_recompute: bool = False
    """True if activations may be recomputed once the last size has failed."""
    lengths: str = "max_length"
    """Fields of the config that limit the length of a row."""

    def up_to(self, guess: MemoryGuess | None) -> MemorySettings:
        """Return the settings without sizes above the plan's choice; all of them if it is None."""
        sizes = tuple(size for size in self.sizes if guess is None or size <= guess.micro_batch)
        return replace(self, sizes=sizes or self.sizes[-1:])


class _OthersFailed(Exception):
    """Another process has run out of memory in this step."""


class StepMemory:
    """The size of a trainer's micro-batches, and the repetition of steps that run out of memory."""

    def __init__(self, args: Any) -> None:
        """Read the settings of ``args``, and what an earlier attempt of the same run has found."""
        settings: MemorySettings | None = getattr(args, "memory", None)
        self.settings = settings or MemorySettings((int(args.per_device_train_batch_size),))
        launch = getattr(args, "launch", None)
        self.is_sharded = world_size() > 1 and launch is not None and launch.strategy != "ddp"
        self.notify: Callable[[str], object] = LOG.warning
        self.repeated = 0
        """Number of times that a step was repeated."""
        self.rows = self.settings.sizes[0]
        self._is_trying = False
        self._file = Path(str(args.output_dir)) / FILE
        self._args = args
        if not self.finds:
            return
        found = broadcast(lambda: read_state(self._file)) or {}
        fitting = [size for size in self.settings.sizes if size <= found.get("micro_batch_size", self.rows)]
        self.rows = fitting[0] if fitting else self.settings.sizes[-1]
        self.repeated = found.get("repeated_steps", 0)
        if self.settings.may_recompute and found.get("gradient_checkpointing"):
            args.gradient_checkpointing = True

    @property
    def finds(self) -> bool:
        """True if the size or recomputation is ``auto``."""
        return len(self.settings.sizes) > 1 or self.settings.may_recompute

    @property
    def averages(self) -> bool:
        """True if gradients are averaged over the processes after a step's passes.

        DDP would average them inside the last pass, where processes would wait for a process without memory.
        """
        return self.finds and world_size() > 1 and not self.is_sharded

    def describe(self) -> str:
        """Return the settings in use, for the log."""
        ending = " and recomputed activations" if self._args.gradient_checkpointing else ""
        return f"micro-batches of {self.rows}{ending}"

    def facts(self) -> dict[str, Any]:
        """Return the settings in use, as metrics of the stage."""
        return {
            "micro_batch_size": self.rows,
            "gradient_checkpointing": bool(self._args.gradient_checkpointing),
            "repeated_steps": self.repeated,
        }

    def run(self, trainer: Any, attempt: Callable[[], T], undo: Callable[[], None]) -> T:
        """Return the result of ``attempt``, which runs micro-batches of ``rows`` rows; repeat it if memory runs out.

        ``undo`` removes what a failed attempt has changed in the trainer, except gradients and generators. Raises
        ``StageFailed`` if no setting is left.
        """
        if not self.finds:
            return attempt()
        state = _random_state()
        while True:
            result, error = self._try(attempt)
            if not error:
                assert result is not None
                return result[0]
            # The failed attempt's tensors are freed here: its exception held the frames that had them.
            trainer.model.zero_grad()
            undo()
            empty_caches()
            _restore_random_state(state)
            self._use_less(trainer, error)

    def _try(self, attempt: Callable[[], T]) -> tuple[tuple[T] | None, str]:
        """Return the result of an attempt, boxed, or the error of a lack of memory in any process."""
        self._is_trying = True
        try:
            result = attempt()
            if self._agree(failed=False):
                return None, "another process ran out of memory"
            return (result,), ""
        except _OthersFailed:
            return None, "another process ran out of memory"
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            text = str(error).strip().partition("\n")[0] or type(error).__name__
        finally:
            self._is_trying = False
        self._agree(failed=True)
        return None, text

    def _agree(self, *, failed: bool) -> bool:
        """Return whether memory ran out in any process; every process must call this."""
        if not self.averages:
            return failed
        return bool(all_reduce(torch.tensor(float(failed))) > 0)

    def check_others(self) -> None:
        """End this process's attempt if another process has run out of memory. Collective operations begin with it."""
        if self._is_trying and self._agree(failed=False):
            raise _OthersFailed

    def _use_less(self, trainer: Any, error: str) -> None:
        """Choose smaller micro-batches, or recomputation, and store the choice for a resume."""
        smaller = [size for size in self.settings.sizes if size < self.rows]
        used = f"micro-batches of {self.rows} ran out of memory ({error})"
        if smaller:
            self.rows = smaller[0]
            remedy = f"micro-batches of {self.rows}"
        elif self.settings.may_recompute and not self._args.gradient_checkpointing and _can_recompute(trainer.model):
            recompute_activations(trainer)
            remedy = "recomputed activations (gradient_checkpointing)"
        else:
            raise StageFailed(f"{used}. {self._remedies()}")
        self.repeated += 1
        if trainer.is_world_process_zero() or self.is_sharded:
            found = {"micro_batch_size": self.rows, "repeated_steps": self.repeated}
            write_state(self._file, {**found, "gradient_checkpointing": bool(self._args.gradient_checkpointing)})
        if self.is_sharded:
            raise StageFailed(f"{used}. Run again: the stage continues with {remedy}.")
        step = int(trainer.state.global_step) + 1
        self.notify(f"step {step}: {used}. The step is repeated with {remedy}, which does not change its result.")

    def _remedies(self) -> str:
        """Return what would help if no setting is left."""
        remedies = [f"Lower {self.settings.lengths}: shorter rows need less memory, and a smaller rank of adapters"]
        remedies[0] += " hardly less."
        if self.rows > 1 and len(self.settings.sizes) == 1:
            remedies.insert(0, "Set `micro_batch_size: auto`, if the loss does not compare the rows of a micro-batch.")
        if not self.settings.may_recompute and not self._args.gradient_checkpointing:
            remedies.insert(0, "Set `gradient_checkpointing: auto`.")
        return " ".join(remedies)

    def model(self, trainer: Any) -> Any:
        """Return the model of a step's passes, without DDP's wrapper if gradients are averaged after them.

        The wrapper also exchanges buffers in some of its forward passes.
        """
        return trainer.model if self.averages else trainer.model_wrapped

    def one_pass(self, trainer: Any, *, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of one forward and backward pass of a step: DDP and DeepSpeed reduce in the last one."""
        trainer.accelerator.sync_gradients = is_last
        if is_last or self.averages or trainer.is_deepspeed_enabled:
            return contextlib.nullcontext()
        context: AbstractContextManager[None] = trainer.accelerator.no_sync(trainer.model_wrapped)
        return context

    def finish(self, model: torch.nn.Module) -> None:
        """Average the gradients of a step over the processes, unless its last pass has done so."""
        if self.averages:
            average_gradients(model)


def recompute_activations(trainer: Any) -> None:
    """Switch the recomputation of activations on, as the option of transformers' trainers does at the start."""
    trainer.args.gradient_checkpointing = True
    disable_autocast_cache(trainer.accelerator)
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _can_recompute(model: Any) -> bool:
    policy = getattr(model, "policy", model)
    return bool(getattr(policy, "supports_gradient_checkpointing", False))


def average_gradients(model: torch.nn.Module) -> None:
    """Replace the gradients of ``model`` by their means over all processes; a missing one counts as 0."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    counts = all_reduce(torch.tensor([float(parameter.grad is not None) for parameter in trained]))
    gradients: list[torch.Tensor] = []
    for parameter, count in zip(trained, counts.tolist(), strict=True):
        if count and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        flat /= world_size()
        for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and (sum(t.numel() for t in bucket) + tensor.numel() > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


RandomState = tuple[torch.Tensor, torch.Tensor | None, Any, Any]


def _random_state() -> RandomState:
    """Return the states of the generators of torch, of the current GPU, of Python and of numpy."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()


def _restore_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
    random.setstate(state[2])
    np.random.set_state(state[3])


# ---- rows of supervised trainers ----


@dataclass(frozen=True)
class StepRows:
    """The rows of one optimizer step, over all processes, which are collated in micro-batches."""

    rows: Sequence[dict[str, Any]]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    _collated: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def micro_batches(self, size: int) -> list[dict[str, Any]]:
        """Return this process's micro-batches of at most ``size`` rows; every process gets as many.

        A micro-batch's weight is its share of the step's rows, times the number of processes, whose gradients are
        averaged. A process that would get one less gets the first one again, with weight 0.
        """
        if size not in self._collated:
            self._collated[size] = self._collate(size)
        return self._collated[size]

    def _collate(self, size: int) -> list[dict[str, Any]]:
        parts = [list(self.rows[start : start + size]) for start in range(0, len(self.rows), size)]
        batches = []
        for _, part, counts in split_by_rank(parts):
            share = len(part) / len(self.rows) * world_size() if counts else 0.0
            batches.append({**self.collate(part), SHARE: torch.tensor(share)})
        return batches


class StepSampler(BatchSampler):
    """Batches of an optimizer step's rows. transformers calls ``set_epoch`` on its attribute ``batch_sampler``."""

    @property
    def batch_sampler(self) -> StepSampler:
        """The sampler itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)  # type: ignore[union-attr]


class _PlainRows(torch.utils.data.Dataset[Any]):
    """The rows of a dataset as dicts."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def step_loader(rows: Any, collate: Callable[[list[Any]], dict[str, Any]], sampler: Any, size: int) -> DataLoader[Any]:
    """Return a loader whose items are the ``StepRows`` of steps of ``size`` rows."""
    batches = StepSampler(sampler, size, drop_last=False)
    return DataLoader(_PlainRows(rows), batch_sampler=batches, collate_fn=lambda step: StepRows(step, collate))


def is_copy(batch: dict[str, Any]) -> bool:
    """Return True for a micro-batch with weight 0, which runs only because the other processes run one."""
    return SHARE in batch and float(batch[SHARE]) == 0.0


def gather_uneven(gather: Callable[[Any], Any], begin: Callable[[], None]) -> Callable[[Any], Any]:
    """Wrap accelerate's ``gather`` for tensors whose number of rows differs between processes.

    trl gathers its metrics by row, and a step's last micro-batches have different sizes. ``begin`` is called first.
    """

    def gathered(tensor: Any) -> Any:
        begin()
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0:
            return gather(tensor)
        # All processes exchange their number of rows, pad to the largest, gather, and cut the padding off.
        sizes = gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
        if len(set(sizes)) == 1:
            return gather(tensor)
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        blocks = gather(padded).split(max(sizes))
        return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])

    return gathered
