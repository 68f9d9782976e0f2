"""CPU threads and device of a process, from ``runtime``. They change speed, and results by rounding only."""

from __future__ import annotations

import os
from typing import Any

from align.config.launch import local_size
from align.config.runtime import Runtime
from align.errors import UserError
from align.pipeline.machine_limits import usable_cores


def use_threads(runtime: Runtime) -> int:
    """Set torch's thread count to ``runtime.threads``, or to this process's share of the cores, and return it.

    ``accelerate launch`` sets ``OMP_NUM_THREADS=1`` on a CPU, which would leave all other cores idle.
    """
    import torch

    threads = runtime.threads or max(1, usable_cores() // local_size())
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return threads


def device_of(runtime: Runtime) -> Any:
    """Return the ``torch.device`` to work on. Raises ``UserError`` when CUDA is required and not available."""
    import torch

    available = torch.cuda.is_available()
    if runtime.device == "cuda" and not available:
        raise UserError(
            f"runtime.device is cuda, but torch {torch.__version__} sees no CUDA device; set it to auto or cpu."
        )
    return torch.device("cuda" if runtime.device != "cpu" and available else "cpu")
