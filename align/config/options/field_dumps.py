"""Dumps of the real fields of classes in trl, transformers, peft and users' packages. Torch-free.

Importing those classes needs torch and several seconds, so ``align.training.dump_fields`` does it in a separate
process. ``field_dumps.json`` next to this module has its result for the tested versions. For other versions, and for a
user's class, the result is stored in the user's cache folder.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from align.config.user_paths import cache_folder
from align.errors import UserError
from align.store.fingerprint import code_identity, digest, file_digest
from align.store.json_files import DamagedFile, parse_sealed, read_file, write_sealed

LOG = logging.getLogger(__name__)

SHIPPED = Path(__file__).with_suffix(".json")
"""The dumps ``trainers`` and ``peft`` of the versions in constraints.txt."""
TRAINERS = "trainers"
PEFT = "peft"
"""The dump of every class that a stage of align names, and the dump of peft's config classes by method."""
PACKAGES = {TRAINERS: ("trl", "transformers"), PEFT: ("peft",)}
"""Packages that define the classes of a dump. A user's class may build on any of them."""
MODULE = "align.training.dump_fields"
SOURCES = ("training/dump_fields.py", "rl/arguments.py", "config/stages/*.py")
"""Files of align that decide what a dump holds, besides the packages."""
TIMEOUT_SECONDS = 300.0
"""Time for the imports, usually 5 to 7 s."""


_PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "dict": (dict,),
    "list": (list,),
    "None": (type(None),),
}


@dataclass(frozen=True)
class Option:
    """One field of a class, with its type as text and the choices that its metadata or type lists."""

    name: str
    annotation: str
    choices: tuple[Any, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Return whether ``value`` has a type that the annotation names; True if it names a type that is not plain."""
        # Only the outer type is checked: ``list[int]`` accepts any list.
        names = [part.strip().split("[")[0] for part in _split_union(self.annotation)]
        if any(name not in _PLAIN_TYPES for name in names):
            return True
        if isinstance(value, bool):  # a bool is an int in Python, but not for the author of a YAML file
            return "bool" in names
        return any(isinstance(value, _PLAIN_TYPES[name]) for name in names)

    def check(self, value: Any) -> None:
        """Raise ``ValueError`` for a value of the wrong type or outside the choices."""
        if not self.accepts(value):
            raise ValueError(f"'{self.name}' should be {self.annotation}; found {value!r}.")
        # trl and transformers list the choices of ``str | None`` without None.
        is_left_open = value is None and "None" in map(str.strip, _split_union(self.annotation))
        if self.choices and not is_left_open and value not in self.choices:
            raise ValueError(f"'{self.name}' should be one of {', '.join(map(repr, self.choices))}; found {value!r}.")


def _split_union(annotation: str) -> list[str]:
    """Split ``dict[str, Any] | str | None`` at the bars outside brackets."""
    members = []
    depth = 0
    start = 0
    for index, char in enumerate(annotation):
        depth += (char == "[") - (char == "]")
        if char == "|" and depth == 0:
            members.append(annotation[start:index])
            start = index + 1
    return [*members, annotation[start:]]


class UnreadableClass(LookupError):
    """A class whose fields could not be read for a reason that may be gone the next time, such as a failed import."""


@dataclass(frozen=True)
class FieldDump:
    """Fields of several classes.

    ``classes`` maps a class's import path, or a method of peft, to its fields by name; a text in their place is the
    reason why there are none. ``errors`` has the reasons that may be gone the next time, such as a failed import.
    """

    classes: dict[str, dict[str, Any] | str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    def options(self, name: str) -> dict[str, Option]:
        """Return the options of one class by name. Raises ``LookupError`` with the reason if there are none."""
        if name in self.errors:
            raise UnreadableClass(self.errors[name])
        fields = self.classes[name]
        if isinstance(fields, str):
            raise LookupError(fields)
        return {
            option: Option(option, description["type"], tuple(description.get("choices", ())))
            for option, description in fields.items()
        }


@functools.cache
def class_options(path: str) -> dict[str, Option]:
    """Return every field of the class ``path`` (``package.module:Name``) by name, including inherited fields.

    Raises ``LookupError`` if the package is not installed or has no such class, and its subclass ``UnreadableClass`` if
    the import fails.
    """
    if path in _shipped()[TRAINERS]["classes"]:
        dump = field_dump(TRAINERS)
        if path in dump.classes or path in dump.errors:
            return dump.options(path)
    package = path.partition(":")[0].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise LookupError(f"the package {package} is not installed")
    return field_dump(path).options(path)


@functools.cache
def field_dump(subject: str) -> FieldDump:
    """Return the dump ``trainers`` or ``peft``, or the dump of the class with the import path ``subject``.

    The shipped dump is used if it has the installed versions, then a cached dump. Otherwise the dump is made and
    cached. Raises ``UnreadableClass`` for a user's module that is not valid Python.
    """
    packages = PACKAGES[subject] if subject in PACKAGES else itertools.chain(*PACKAGES.values())
    versions = {package: _installed_version(package) for package in packages}
    shipped = _shipped().get(subject)
    if shipped is not None and shipped["versions"] == versions:
        return FieldDump(shipped["classes"])
    file = _cache_file(subject, versions)
    try:
        return FieldDump(parse_sealed(read_file(file))["classes"])
    except (OSError, DamagedFile):  # no dump yet, or a dump that cannot be trusted
        dump = _make_dump(subject, versions)
    # What failed is tried again the next time.
    if dump.classes:
        _keep(file, dump)
    return dump


@functools.cache
def _shipped() -> dict[str, Any]:
    dumps: dict[str, Any] = json.loads(SHIPPED.read_text(encoding="utf-8"))
    return dumps


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cache_file(subject: str, versions: dict[str, str]) -> Path:
    """Return the file that keeps a dump; its name has a digest of everything that decides the content."""
    root = Path(__file__).parents[2]
    sources = {str(file.relative_to(root)): file_digest(file) for name in SOURCES for file in sorted(root.glob(name))}
    identity = {"subject": subject, "versions": versions, "sources": sources}
    module, _, name = subject.partition(":")
    if name and module.partition(".")[0] not in (*versions, "align"):
        try:
            identity["code"] = code_identity(module)
        except UserError as error:
            raise UnreadableClass(str(error)) from None
    return cache_folder() / "class-fields" / f"{name or subject}-{digest(identity)[:16]}.json"


def _keep(file: Path, dump: FieldDump) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(file, {"classes": dump.classes})
    except OSError as error:
        LOG.warning(
            "%s cannot be written (%s), so every command reads those options again. Set ALIGN_CACHE to a folder "
            "that can.",
            file,
            error.strerror,
        )


def _make_dump(subject: str, versions: dict[str, str]) -> FieldDump:
    """Import the classes in a separate process with this process's search path, and return their fields."""
    packages = ", ".join(f"{package} {number}" for package, number in versions.items())
    LOG.warning("reading the options of %s for %s, once (some seconds)", subject, packages)
    with tempfile.TemporaryDirectory(prefix="align-fields-") as folder:
        result = Path(folder) / "dump.json"
        # -P keeps the current folder at its position in the search path instead of first.
        command = [sys.executable, "-P", "-m", MODULE, subject, str(result)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
        try:
            process = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS
            )
            lines = process.stderr.strip().splitlines() or ["no message"]
            end = f"exit code {process.returncode}: {lines[-1]}"
        except subprocess.TimeoutExpired:
            end = f"no result after {TIMEOUT_SECONDS:g} s"
        if result.is_file():
            return FieldDump(**json.loads(result.read_text(encoding="utf-8")))
    names = [subject] if ":" in subject else list(_shipped()[subject]["classes"])
    shown = " ".join(command[:-1])
    reason = f"the process that imports it ended with {end}. `{shown} -` shows the whole error."
    return FieldDump(errors=dict.fromkeys(names, reason))
