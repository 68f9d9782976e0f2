"""Configurations of ``benchmarks.memory_plan``, each in a process of its own: the stage itself, and its peak memory.

A first process imports what the stages need and runs each kind once on a model of under a megabyte; those that measure
are its forks. The baseline is what a fork starts with: interpreter, libraries, pools. Linux only: the peak is
``VmHWM``, set back at the start.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from align.config.runtime import Runtime
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
    from align.models.built_in import fetch, make_tiny

    if name == "embedded":
        return fetch()
    return make_tiny(root / name, **(WIDE if name == "wide" else {}))


class Measurer:
    """Runs stages in forks of this process, which must have no threads of torch's: one thread is set."""

    def __init__(self, root: Path) -> None:
        import torch

        from align.models.compute.processes import use_threads

        self.root, self.runtime = root, Runtime.model_validate(RUNTIME)
        use_threads(self.runtime)
        torch.ones(512, 512) @ torch.ones(512, 512)
        self.warm: set[str] = set()

    def measure(self, stage: str, model: str, length: int, rows: int, fields: dict[str, Any]) -> dict[str, int]:
        """Return the baseline and the peak beyond it, in bytes.

        Raises ``RuntimeError`` if the fork fails; its output went to stderr.
        """
        if stage not in self.warm:
            with tempfile.TemporaryDirectory(dir=self.root) as folder, contextlib.redirect_stdout(sys.stderr):
                tiny = model_in(Path(folder), "tiny")
                plain = {"tuning": {"method": fields["tuning"]["method"]}} if "tuning" in fields else {}
                small = {**fields, **plain}  # it has two layers
                run_stage(Path(folder) / "run", stage, small, tiny, length, rows, self.runtime)
            self.warm.add(stage)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            result = Path(folder) / "result.json"
            child = os.fork()
            if not child:
                self._in_fork(Path(folder), result, stage, model, length, rows, fields)
            _, status = os.waitpid(child, 0)
            if status or not result.exists():
                raise RuntimeError(f"{stage} on {model} with {fields} failed; see above")
            measurement: dict[str, int] = json.loads(result.read_text(encoding="utf-8"))
            return measurement

    def _in_fork(self, root: Path, result: Path, stage: str, model: str, length: int, rows: int, fields: Any) -> None:
        code = 1
        os.dup2(2, 1)  # what a stage prints is not the benchmark's answer
        try:
            folder = model_in(root, model)
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            before = memory("VmRSS")
            run_stage(root / "run", stage, fields, folder, length, rows, self.runtime)
            measurement = {"baseline": before, "peak": memory("VmHWM") - before}
            result.write_text(json.dumps(measurement), encoding="utf-8")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
