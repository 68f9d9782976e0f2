"""The sides' virtual environments, made with pip where they are missing. Torch-free.

align has one, too: beside optional packages that development installs, such as bitsandbytes and scikit-learn, peft and
transformers take five seconds longer to import.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from align.errors import UserError
from align.store.artifacts import VERSION
from benchmarks.ppo_work import SAME, inventory, run_or_refuse


@dataclass(frozen=True)
class Package:
    """The package of a peer, its version and its command."""

    name: str
    version: str
    executable: str
    distribution: str = ""
    """Name of its distribution, if that is another one."""

    @property
    def folder(self) -> str:
        """Default name of its environment's folder."""
        return f"{self.name}-{self.version}"


ROOT = Path(__file__).parents[2]
"""This checkout, which is what align's environment runs."""
ALIGN = Package("align", VERSION, "align", distribution="align-pipeline")
TRL = Package("trl", "1.16.0", "trl")
LLAMAFACTORY = Package("llamafactory", "0.9.5", "llamafactory-cli")
PACKAGES = {"trl": TRL, "trl_threads": TRL, "llamafactory": LLAMAFACTORY}


def requirements(package: Package) -> list[str]:
    """Return what pip installs: this checkout, trl on its versions, LLaMA-Factory on those that it asks for."""
    if package is ALIGN:
        return ["-c", str(ROOT / "constraints.txt"), "-e", str(ROOT)]
    major, minor = version("torch").split("+")[0].split(".")[:2]
    torch = f"torch>={major}.{minor},<{major}.{int(minor) + 1}"
    same = [f"{name}=={version(name)}" for name in (*SAME, "datasets")] if package is TRL else []
    return [f"{package.name}=={package.version}", *same, torch]


def prepare(package: Package, folder: Path) -> Path:
    """Return the package's command in the environment in ``folder``, which is made or completed if need be.

    Raises ``UserError`` for a folder that is something else or holds another version, and where pip fails.
    """
    python = folder / "bin" / "python"
    if not python.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} is not a virtual environment; name another folder for {package.name}.")
        print(f"creating a virtual environment for {package.name} {package.version} in {folder}", flush=True)
        run_or_refuse([sys.executable, "-m", "venv", str(folder)])
    installed = inventory(python).get(package.distribution or package.name)
    if installed is None:
        print(f"installing {package.name} {package.version} there", flush=True)
        run_or_refuse(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements(package)]
        )
        if package is LLAMAFACTORY:
            repair_torchaudio(python, folder)
    elif installed != package.version:
        raise UserError(f"{folder} has {package.name} {installed}; {package.version} is compared. Name another folder.")
    return folder / "bin" / package.executable


def repair_torchaudio(python: Path, folder: Path) -> None:
    """Remove torchaudio's native library where it does not load; LLaMA-Factory imports torchaudio for any training.

    torchaudio's wheels are built for CUDA, and their library does not load beside a CPU build of torch. Without the
    file the package imports, as torchaudio intends; only alignment of speech is lost.
    """
    if subprocess.run([str(python), "-c", "import torchaudio"], capture_output=True).returncode == 0:
        return
    for library in folder.glob("lib/python*/site-packages/torchaudio/lib/_torchaudio*.so"):
        print(f"removing {library}, which does not load beside this torch", flush=True)
        library.unlink()
