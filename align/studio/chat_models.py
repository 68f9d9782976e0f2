"""Models that the chat view keeps in memory: each once, within the free memory, and for some minutes after its use."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.errors import UserError, shorten

SECONDS_KEPT = 300.0
"""Time after its last use for which a model stays in memory."""
MAX_MODELS = 5
"""Models in memory at once: four that answer, and a reward model."""
BYTES_PER_WEIGHT = 4
"""Models are loaded in float32."""
HEADROOM = 1.15
"""Memory for a model relative to its weights: caches, and buffers of layers."""
GIB = 2**30
SECONDS_BETWEEN_REPORTS = 1.0
LOADS, WAITS = "loading the model", "waiting for memory, which other replies use"

ModelUse = Literal["policy", "reward"]
Load = Callable[[ModelUse, Path], Any]
Report = Callable[[str], None]
"""Told of what a user waits for, again and again; it may raise an error to end the waiting."""


@dataclass
class _Slot:
    """A model in memory, or a model that is being loaded."""

    size: int
    users: int = 0
    model: Any = None
    """None while the model is being loaded."""
    last_use: float = field(default_factory=time.monotonic)


class ModelPool:
    """Models by their use and folder. Several threads may borrow models, also the same one."""

    def __init__(
        self,
        load: Load | None = None,
        free_memory: Callable[[], int] | None = None,
        seconds_kept: float = SECONDS_KEPT,
    ) -> None:
        self._load = load or load_model
        self._free_memory = free_memory or free_bytes
        self._seconds_kept = seconds_kept
        self._slots: dict[tuple[ModelUse, Path], _Slot] = {}
        self._changed = threading.Condition()
        self._loading = threading.Lock()
        """Held while a model is loaded: transformers changes settings of the whole process meanwhile."""

    @contextmanager
    def borrow(self, use: ModelUse, folder: Path, report: Report = lambda text: None) -> Iterator[Any]:
        """Lend a model, which is loaded if it is not in memory.

        It waits while other models that are in use leave no memory. Raises ``UserError`` for a model that cannot be
        loaded, or that does not fit into the memory.
        """
        slot = self._acquire(use, folder, report)
        try:
            yield slot.model
        finally:
            with self._changed:
                slot.users -= 1
                slot.last_use = time.monotonic()
                self._changed.notify_all()
            timer = threading.Timer(self._seconds_kept, self.free_unused)
            timer.daemon = True
            timer.start()

    def folders(self) -> list[Path]:
        """Return the folders of the models in memory."""
        with self._changed:
            return [folder for (_, folder), slot in self._slots.items() if slot.model is not None]

    def wait_until_unused(self, seconds: float) -> None:
        """Wait until no model is in use, for ``seconds`` at most."""
        with self._changed:
            self._changed.wait_for(lambda: all(slot.users == 0 for slot in self._slots.values()), seconds)

    def free_unused(self) -> None:
        """Free the models whose last use is longer ago than they are kept."""
        now = time.monotonic()
        with self._changed:
            unused = [
                key
                for key, slot in self._slots.items()
                if slot.users == 0 and now - slot.last_use >= self._seconds_kept * 0.99
            ]
            self._free(unused)

    def _acquire(self, use: ModelUse, folder: Path, report: Report) -> _Slot:
        """Return the slot of a model in memory, of which the caller is a user."""
        key = (use, folder)
        size = model_size(folder)
        with self._changed:
            while True:
                slot = self._slots.get(key)
                if slot is not None and slot.model is not None:
                    slot.users += 1
                    return slot
                if slot is None and self._make_room(size):
                    slot = self._slots[key] = _Slot(size, users=1)
                    break
                report(WAITS if slot is None else LOADS)
                self._changed.wait(SECONDS_BETWEEN_REPORTS)
        try:
            with self._loading:
                report(LOADS)
                model = self._load(use, folder)
        except BaseException as error:
            with self._changed:
                del self._slots[key]
                self._changed.notify_all()
            if isinstance(error, UserError) or not isinstance(error, Exception):
                raise
            raise UserError(f"{folder}: cannot be loaded: {type(error).__name__}: {shorten(str(error))}") from error
        with self._changed:
            slot.model = model
            self._changed.notify_all()
        return slot

    def _make_room(self, size: int) -> bool:
        """Free the models that were used least recently until there is room for another one.

        Returns False while models that are in use leave no room. Raises ``UserError`` if there is none without them.
        """
        needed = math.ceil(size * HEADROOM)
        while len(self._slots) >= MAX_MODELS or self._free_memory() - self._reserved() < needed:
            idle = [key for key, slot in self._slots.items() if slot.users == 0]
            if idle:
                self._free([min(idle, key=lambda key: self._slots[key].last_use)])
                continue
            if self._slots:
                return False
            raise UserError(
                f"The model needs {needed / GIB:.1f} GiB of memory, and {self._free_memory() / GIB:.1f} GiB are free. "
                "End other programs, or serve the checkpoint with `align serve` and chat with its endpoint."
            )
        return True

    def _reserved(self) -> int:
        """Return the bytes that models need which are being loaded."""
        return sum(math.ceil(slot.size * HEADROOM) for slot in self._slots.values() if slot.model is None)

    def _free(self, keys: list[tuple[ModelUse, Path]]) -> None:
        for key in keys:
            del self._slots[key]
        if keys:
            release_memory()
            self._changed.notify_all()


def load_model(use: ModelUse, folder: Path) -> Any:
    """Load a policy as a ``Replier``, or a reward model."""
    if use == "policy":
        from align.inference.replier import Replier

        return Replier(folder)
    from align.config.runtime import Runtime
    from align.models.compute.processes import device_of
    from align.models.reward import RewardModel

    return RewardModel(folder, device=device_of(Runtime()))


def model_size(folder: Path) -> int:
    """Return the bytes of a model's weights in memory. Raises ``UserError`` for a folder without intact weights."""
    from align.models.checkpoints.folder_checks import tensor_entries

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has no model.")
    return sum(math.prod(entry.shape) for entry in tensor_entries(folder).values()) * BYTES_PER_WEIGHT


def free_bytes() -> int:
    """Return the bytes of memory that another model may have."""
    from align.models.compute.processes import free_memory

    return free_memory()


def release_memory() -> None:
    """Return the memory of freed models to the system."""
    from align.models.compute.processes import empty_caches

    empty_caches()
