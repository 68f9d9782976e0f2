"""CPU threads and the device, from ``runtime``. Changes speed, never results beyond rounding."""

from __future__ import annotations

import os
from typing import Any

from align.config.launch import local_size
from align.config.runtime import Runtime
from align.errors import UserError


def cores() -> int:
    """Cores this process may use, which a container or ``taskset`` may have made fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_threads(runtime: Runtime) -> int:
    """Set torch's thread count to ``runtime.threads`` or this process's share of the cores there are, and return it.

    ``accelerate launch`` sets ``OMP_NUM_THREADS=1`` on a CPU, which would leave all cores but one idle.
    """
    import torch

    wanted = runtime.threads or max(1, cores() // local_size())
    os.environ["OMP_NUM_THREADS"] = str(wanted)
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)
    return wanted


def device_of(runtime: Runtime) -> Any:
    """The ``torch.device`` to work on. Raises ``UserError`` when CUDA is asked for and absent."""
    import torch

    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise UserError(
            f"runtime.device is cuda, but torch {torch.__version__} sees no CUDA device; set it to auto or cpu."
        )
    return torch.device("cuda" if runtime.device != "cpu" and available else "cpu")
