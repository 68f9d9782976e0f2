"""align as a user has it: the wheel, installed into an environment of its own, away from the repository."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("align", "pipelines", "data_recipes", "examples", "tests", "docs", "benchmarks")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class InstalledAlign:
    """The wheel, and the environment that it is installed in."""

    wheel: Path
    python: Path
    command: Path
    """The executable ``align``."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables for processes of this environment, which sees nothing of the repository."""
        return _outer_environment() | OFFLINE

    def run(self, *arguments: str, folder: Path, timeout: float = 250) -> subprocess.CompletedProcess[str]:
        """Run ``align`` with ``arguments`` in ``folder``; the result has its output as text."""
        return subprocess.run(
            [self.command, *arguments],
            cwd=folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


@pytest.fixture(scope="session")
def installed_align(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InstalledAlign]:
    """Build the wheel and install it into an empty environment, which sees the other packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = build_wheel(folder)
    environment = folder / "environment"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    _run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], folder
    )
    packages = next(environment.glob("lib/python*/site-packages"))
    # Only paths: the lines of .pth files in them, such as that of an editable align, are not read.
    others = [place for place in (*site.getsitepackages(), site.getusersitepackages()) if Path(place).is_dir()]
    (packages / "others.pth").write_text("\n".join(others) + "\n")
    yield InstalledAlign(wheel, python, environment / "bin" / "align")
    shutil.rmtree(folder, ignore_errors=True)


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the repository's files, which stay as they are."""
    copy = folder / "repository"
    ignored = shutil.ignore_patterns("__pycache__", "shipped")
    for name in SOURCES:
        shutil.copytree(REPOSITORY / name, copy / name, ignore=ignored)
    for name in FILES:
        shutil.copyfile(REPOSITORY / name, copy / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    _run([sys.executable, "-m", "pip", "wheel", *options, str(copy)], folder)
    return next(folder.glob("*.whl"))


def _outer_environment() -> dict[str, str]:
    """Return this process's variables without those that lead to the repository."""
    hidden = ("PYTHONPATH", "ALIGN_STORE", "ALIGN_MODULE_FOLDERS", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in hidden}


def _run(command: list[str], folder: Path) -> None:
    # From another folder, and without its path: pip would take the repository's modules for installed ones.
    result = subprocess.run(command, cwd=folder, env=_outer_environment(), capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr
