"""``align init``: copy a commented starting point into a folder of the user's. Has no heavy imports."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
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
RUN_OPTIONS = ("model", "data", "hardware", "answer")
EXAMPLE = "`align init {} --model Qwen/Qwen3-4B-Instruct-2507 --data my.csv --hardware 24gb`"


def run(options: argparse.Namespace) -> int:
    """Run ``align init``."""
    points = starting_points()
    folder = user_path(options.output)
    plan = None
    if any(getattr(options, name) is not None for name in RUN_OPTIONS):
        written, plan = _write_run(options, folder)
    elif options.name is None:
        return _list(points, options.json)
    elif options.name not in points:
        raise UserError(f"init: there is no starting point '{options.name}'.{suggest(options.name, points)}")
    else:
        written = write_starting_point(options.name, folder)
    main_file = next(file for file in written if file.stem == options.name and file.suffix == ".yaml")
    command = f"{NEXT_COMMANDS.get(options.name, 'align run')} {main_file}"
    if options.json:
        document = {"name": options.name, "files": [str(file) for file in written], "command": command}
        print_json(document if plan is None else {**document, "plan": plan})
        return 0
    for line in [*(f"wrote {file}" for file in written), *([plan] if plan else [])]:
        print(printable(line))
    print(printable(f"Change it where its comments say, then: {command}"))
    return 0


def _write_run(options: argparse.Namespace, folder: Path) -> tuple[list[Path], str]:
    """Write the pipeline for a model, rows and hardware; return its files and its plan. Raises ``UserError``."""
    from align.cli.init_run import KINDS, write_text

    kind = options.name
    if kind not in KINDS:
        raise UserError(f"init: --model, --data and --hardware are for {', '.join(KINDS)}.{suggest(kind or '', KINDS)}")
    missing = [f"--{name}" for name in RUN_OPTIONS[:3] if getattr(options, name) is None]
    if missing:
        raise UserError(f"init {kind}: {' and '.join(missing)} missing, as in {EXAMPLE.format(kind)}.")
    if options.answer is not None and kind != "grpo":
        raise UserError(f"init: --answer is for grpo; {kind} learns from the answers in the rows.")
    file = folder / f"{kind}.yaml"
    _refuse_existing([file])
    text, plan = write_text(kind, options, file)
    return _write(folder, {file.name: text}, file.name), plan


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
    return _write(folder, starting_files(name), None if name in NEXT_COMMANDS else f"{name}.yaml")


def _write(folder: Path, texts: dict[str, str], pipeline: str | None) -> list[Path]:
    """Write files by name into a folder, and the schema of the file ``pipeline`` among them; return their paths."""
    if pipeline is not None:
        texts[pipeline] = f"# yaml-language-server: $schema={SCHEMA}\n{texts[pipeline]}"
        # Every pipeline has the same schema, so an existing schema is kept.
        if not (folder / SCHEMA).exists():
            texts[SCHEMA] = json.dumps(pipeline_schema(), indent=2) + "\n"
    _refuse_existing([folder / file for file in texts])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in texts.items():
            # "x": a file that appeared meanwhile is not overwritten either.
            with (folder / file).open("x", encoding="utf-8") as stream:
                stream.write(text)
    except OSError as error:
        raise UserError(f"init: {folder} cannot be written: {error.strerror}.") from None
    return [folder / file for file in texts]


def _refuse_existing(files: Sequence[Path]) -> None:
    for file in files:
        if file.exists():
            raise UserError(
                f"init: {file} is there already, and nothing is overwritten. Choose another folder with --output."
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align init``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="quickstart, sft, dpo, ppo, grpo, eval or data")
    parser.add_argument("--model", metavar="MODEL", help="sft, dpo, grpo: a folder, or a Hub name, perhaps @COMMIT")
    parser.add_argument("--data", metavar="FILE", help="sft, dpo, grpo: a file of rows (.csv, .jsonl, .parquet, ...)")
    parser.add_argument("--answer", metavar="COLUMN", help="grpo: the column with the right answer")
    parser.add_argument("--hardware", metavar="CARD", help="sft, dpo, grpo: 24gb, rtx4090, h100, cpu: what it runs on")
    parser.add_argument("--output", metavar="DIR", default=".", help="the folder to write into (default: this one)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
