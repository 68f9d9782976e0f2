"""Copies the repository's pipelines, recipes and examples into the built package; pyproject.toml has the rest."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("pipelines", "data_recipes", "examples")
SUFFIXES = {".yaml", ".py", ".ipynb", ".jsonl", ".csv", ".jinja"}
"""Kinds of files that are shipped; caches and outputs of runs are not."""


class BuildWithShippedFiles(build_py):
    """The build, which also writes ``align/shipped``; an editable install reads the repository instead."""

    def run(self) -> None:
        """Build the package."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "align", "shipped")
        # An earlier build in the same folder may hold files that are gone.
        shutil.rmtree(target, ignore_errors=True)
        for folder in SHIPPED:
            for file in sorted(Path(folder).rglob("*")):
                if file.suffix in SUFFIXES:
                    copy = target / file
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)


setup(cmdclass={"build_py": BuildWithShippedFiles})
