"""Pipelines, recipes and examples that come with align: below the installed package, else in the repository.

A build copies the repository's folders into the package (``setup.py``); an editable install reads the repository.
Never imports torch.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

from align.config.validation import nearest
from align.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
QUICKSTART = "quickstart"
STARTS = "examples/start"
"""Folder with the other starting points of ``align init``, a folder each."""
SUFFIX = ".yaml"
RECIPE = re.compile(r"\.\./data_recipes/(\w+)\.yaml")
"""A shipped recipe as shipped pipelines name it."""


@functools.cache
def shipped_root() -> Path:
    """Return the folder that has ``pipelines``, ``data_recipes`` and ``examples``."""
    installed = PACKAGE / "shipped"
    return installed if installed.is_dir() else PACKAGE.parent


FOLDERS = {"pipeline": "pipelines", "suite": "pipelines/suites", "sweep": "pipelines/sweeps"}
"""Kind of a shipped file → its folder."""


def shipped_files(kind: str) -> dict[str, Path]:
    """Return the shipped files of a kind by name."""
    return {file.stem: file for file in sorted((shipped_root() / FOLDERS[kind]).glob(f"*{SUFFIX}"))}


def find_shipped(word: str, kind: str = "pipeline") -> str:
    """Return the file that ``word`` names: a path, else a shipped file of this kind by its bare name.

    A file takes precedence. Text that looks like a path is returned as it is, and its reader refuses a missing file.
    Any other word raises ``UserError`` with the nearest shipped name.
    """
    path = Path(word)
    if os.path.exists(word) or path.name != word or path.suffix in (SUFFIX, ".yml"):
        return word
    files = shipped_files(kind)
    if word in files:
        file = files[word]
        return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else str(file)
    close = nearest(word, files)
    hint = f" Did you mean '{close}'?" if close else f" Shipped are: {', '.join(files)}."
    raise UserError(f"{word}: there is no such file, and no shipped {kind} of this name.{hint}")


def starting_points() -> dict[str, str]:
    """Return the starting points of ``align init`` with the first line of each file."""
    descriptions = {}
    folders = sorted(folder.name for folder in (shipped_root() / STARTS).iterdir() if folder.is_dir())
    for name in (QUICKSTART, *folders):
        first_line = _main_file(name).read_text(encoding="utf-8").partition("\n")[0]
        descriptions[name] = first_line.removeprefix("# ")
    return descriptions


def starting_files(name: str) -> dict[str, str]:
    """Return the files of a starting point as name → text.

    For the quickstart, these are the shipped pipeline and its recipe, which are then in the same folder.
    """
    if name != QUICKSTART:
        folder = _main_file(name).parent
        files = [file for file in sorted(folder.iterdir()) if file.is_file()]
        return {file.name: file.read_text(encoding="utf-8") for file in files if file.suffix != ".pyc"}
    texts = {}
    pipeline = _main_file(name).read_text(encoding="utf-8")
    for recipe in sorted(set(RECIPE.findall(pipeline))):
        texts[f"{recipe}_recipe{SUFFIX}"] = (shipped_root() / "data_recipes" / f"{recipe}{SUFFIX}").read_text("utf-8")
    return {f"{name}{SUFFIX}": RECIPE.sub(rf"\1_recipe{SUFFIX}", pipeline), **texts}


def _main_file(name: str) -> Path:
    """Return the YAML file of a starting point."""
    if name == QUICKSTART:
        return shipped_files("pipeline")[name]
    return shipped_root() / STARTS / name / f"{name}{SUFFIX}"
