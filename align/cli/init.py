"""``align init``: copy a commented starting point into a folder of the user's. Has no heavy imports."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from align.cli.parser import print_json
from align.config.shipped import QUICKSTART, starting_files, starting_points
from align.config.user_paths import user_path
from align.config.validation import suggest
from align.errors import UserError, printable
from align.pipeline.json_schema import pipeline_schema

SCHEMA = "align.schema.json"
"""The file with the JSON schema of pipelines, which editors read if a pipeline's first line names it."""
NEXT_COMMANDS = {"data": "align data build"}
"""Commands that read a starting point, where that is not ``align run``."""


def run(options: argparse.Namespace) -> int:
    """Run ``align init``."""
    points = starting_points()
    if options.name is None:
        return _list(points, options.json)
    if options.name not in points:
        raise UserError(f"init: there is no starting point '{options.name}'.{suggest(options.name, points)}")
    folder = user_path(options.output)
    written = write_starting_point(options.name, folder)
    main_file = next(file for file in written if file.stem == options.name and file.suffix == ".yaml")
    command = f"{NEXT_COMMANDS.get(options.name, 'align run')} {main_file}"
    if options.json:
        print_json({"name": options.name, "files": [str(file) for file in written], "command": command})
        return 0
    for file in written:
        print(printable(f"wrote {file}"))
    print(printable(f"Change it where its comments say, then: {command}"))
    return 0


def _list(points: dict[str, str], as_json: bool) -> int:
    if as_json:
        print_json(points)
        return 0
    for name, description in points.items():
        print(f"{name:<{len(QUICKSTART)}}  {description}")
    print("Copy one: align init NAME")
    return 0


def write_starting_point(name: str, folder: Path) -> list[Path]:
    """Write the files of a starting point and the schema of its pipeline into ``folder``, and return them.

    Raises ``UserError``, before anything is written, for a file that is there already or a folder that cannot be made.
    """
    texts = starting_files(name)
    if name not in NEXT_COMMANDS:
        pipeline = f"{name}.yaml"
        texts[pipeline] = f"# yaml-language-server: $schema={SCHEMA}\n{texts[pipeline]}"
        # Every starting point has the same schema, so an existing schema is kept.
        if not (folder / SCHEMA).exists():
            texts[SCHEMA] = json.dumps(pipeline_schema(), indent=2) + "\n"
    existing = [folder / file for file in texts if (folder / file).exists()]
    if existing:
        raise UserError(
            f"init: {existing[0]} is there already, and nothing is overwritten. Choose another folder with --output."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            # "x": a file that appeared meanwhile is not overwritten either.
            with (folder / file).open("x", encoding="utf-8") as stream:
                stream.write(text)
    except OSError as error:
        raise UserError(f"init: {folder} cannot be written: {error.strerror}.") from None
    return [folder / file for file in texts]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align init``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="quickstart, sft, dpo, ppo, grpo, eval or data")
    parser.add_argument("--output", metavar="DIR", default=".", help="the folder to write into (default: this one)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
