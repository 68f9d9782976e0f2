"""One configuration of ``benchmarks.memory_plan`` in a process of its own: the stage itself, and its peak memory.

    python -m benchmarks.memory_run FOLDER '{"stage": "sft", "model": "embedded", "length": 256, ...}'

The baseline is what the process holds after the same stage has run on a model of under a megabyte: interpreter,
libraries, thread pools. Linux only: the peak is ``VmHWM``, set back in between.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

from align.runtime import Runtime
from benchmarks.stage_work import run_stage

RUNTIME = {"device": "cpu", "threads": 1, "engine": {"name": "transformers"}}
WIDE = {"hidden_size": 768, "layers": 8}
"""Sizes of the model that is made on the spot where SmolLM2 would be too large to train in full."""


def memory(name: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def model_in(root: Path, name: str) -> Path:
    """``embedded`` is SmolLM2-135M; ``wide`` and ``tiny`` are made below ``root``."""
    from align.models.embedded import fetch
    from align.models.tiny import make_tiny

    if name == "embedded":
        return fetch()
    return make_tiny(root / name, **(WIDE if name == "wide" else {}))


def main(root: Path, wanted: dict[str, Any]) -> dict[str, int]:
    """Baseline and peak beyond it, in bytes."""
    import torch

    from align.models.threads import use_threads

    runtime = Runtime.model_validate(RUNTIME)
    use_threads(runtime)
    work = [wanted[name] for name in ("length", "rows")]
    model = model_in(root, wanted["model"])
    torch.ones(512, 512) @ torch.ones(512, 512)
    run_stage(root / "warm", wanted["stage"], wanted["fields"], model_in(root, "tiny"), *work, runtime)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = memory("VmRSS")
    run_stage(root / "run", wanted["stage"], wanted["fields"], model, *work, runtime)
    return {"baseline": before, "peak": memory("VmHWM") - before}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]))))
