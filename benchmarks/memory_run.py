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
import time
import traceback
from pathlib import Path
from typing import Any

from align.config.runtime import Runtime
from benchmarks.stage_work import run_stage

RUNTIME = {"device": "cpu", "threads": 1, "engine": {"name": "transformers"}}
WIDE = {"hidden_size": 768, "layers": 8}
"""Sizes of the model that is made on the spot where SmolLM2 would be too large to train in full."""
BILLION: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
"""Sizes of TinyLlama, 1.1 billion parameters, for a model of random weights in bfloat16."""
POLL_SECONDS = 0.02


def memory(name: str, process: int | None = None) -> int:
    """``VmRSS``, ``VmHWM`` or ``RssAnon`` of a process, by default of this one, in bytes; 0 once it has ended."""
    lines = Path(f"/proc/{process or os.getpid()}/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def model_in(root: Path, name: str) -> Path:
    """``embedded`` is SmolLM2-135M; ``billion``, ``wide`` and ``tiny`` are made below ``root``."""
    from align.models.built_in import fetch, make_tiny

    if name == "embedded":
        return fetch()
    if name == "billion":
        return _make_billion(root / name)
    return make_tiny(root / name, **(WIDE if name == "wide" else {}))


def _make_billion(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.models.built_in import make_tiny_tokenizer

    if (folder / "tokenizer.json").exists():
        return folder
    tokenizer = make_tiny_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**BILLION, **ids))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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
        """Return the baseline and the peaks beyond it, of all and of anonymous memory, in bytes.

        Anonymous memory is read every 20 ms. Raises ``RuntimeError`` if the fork fails; its output went to stderr.
        """
        if stage not in self.warm:
            with tempfile.TemporaryDirectory(dir=self.root) as folder, contextlib.redirect_stdout(sys.stderr):
                tiny = model_in(Path(folder), "tiny")
                plain = {"tuning": {"method": fields["tuning"]["method"]}} if "tuning" in fields else {}
                small = {**fields, **plain}  # it has two layers
                run_stage(Path(folder) / "run", stage, small, tiny, length, rows, self.runtime)
            self.warm.add(stage)
        if model == "billion":
            model_in(self.root, model)  # not in the fork, whose peak it would be
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            result = Path(folder) / "result.json"
            child = os.fork()
            if not child:
                self._in_fork(Path(folder), result, stage, model, length, rows, fields)
            anonymous, ended, status = 0, 0, 0
            while not ended:
                anonymous = max(anonymous, memory("RssAnon", child))
                ended, status = os.waitpid(child, os.WNOHANG)
                time.sleep(POLL_SECONDS)
            if status or not result.exists():
                raise RuntimeError(f"{stage} on {model} with {fields} failed; see above")
            measurement: dict[str, int] = json.loads(result.read_text(encoding="utf-8"))
            return {**measurement, "anonymous": anonymous - measurement["anonymous"]}

    def _in_fork(self, root: Path, result: Path, stage: str, model: str, length: int, rows: int, fields: Any) -> None:
        code = 1
        os.dup2(2, 1)  # what a stage prints is not the benchmark's answer
        try:
            folder = model_in(self.root if model == "billion" else root, model)
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            before, anonymous = memory("VmRSS"), memory("RssAnon")
            run_stage(root / "run", stage, fields, folder, length, rows, self.runtime)
            measurement = {"baseline": before, "anonymous": anonymous, "peak": memory("VmHWM") - before}
            result.write_text(json.dumps(measurement), encoding="utf-8")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
