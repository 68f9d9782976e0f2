"""``align completion``: scripts by which bash, zsh and fish complete commands, options, files and stages.

The scripts are written from the argument parser. Only names in a pipeline file need Python while the user types: the
scripts run ``align completion stages FILE``, ``paths FILE`` and ``fields KIND`` for them. Never imports torch.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.cli.completion_scripts import Argument, Command, bash_script, fish_script, zsh_script
from align.config.field_descriptions import nested_models
from align.errors import UserError, printable

SHELLS = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}
LISTS = ("stages", "paths", "fields")
"""Lists of names that the scripts ask for while the user types."""
YAML = ("PIPELINE", "RECIPE", "SUITE", "SWEEP", "RUN")
FILES = ("CHECKPOINT", "BUILD", "MODEL", "FILE", "PATH", "A", "B")


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print a shell's script, or the names that such a script asks for; ``parser`` is the parser of all commands."""
    if options.shell in LISTS:
        if options.subject is None:
            raise UserError(f"align completion {options.shell}: a pipeline file, or a kind for `fields`, is missing.")
        names = {"stages": _stage_names, "paths": _assignment_paths, "fields": _field_names}[options.shell]
        print(printable("\n".join(names(options.subject))))
        return 0
    print(SHELLS[options.shell](list(_commands(parser, ""))), end="")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``align completion``."""
    parser.add_argument(
        "shell",
        metavar="SHELL",
        choices=[*SHELLS, *LISTS],
        help="bash, zsh or fish; their scripts ask for `stages FILE`, `paths FILE` and `fields KIND`",
    )
    parser.add_argument("subject", nargs="?", help="for the scripts alone: a pipeline file, or a kind of stage")


def _commands(parser: argparse.ArgumentParser, name: str, description: str = "") -> Iterator[Command]:
    """Yield a parser's command and all those below it, outer ones first."""
    command = Command(name, description)
    inner: list[Command] = []
    position = 0
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            position += 1
            command.arguments.append(Argument(str(position), "words", tuple(action.choices)))
            for choice, entry in zip(action.choices, action._choices_actions, strict=True):
                path = f"{name} {choice}".strip()
                inner += _commands(action.choices[choice], path, entry.help or "")
        elif action.option_strings and action.help != argparse.SUPPRESS:
            kind, words = ("flag", ()) if action.nargs == 0 else _kind_of_value(name, action)
            command.arguments.append(Argument(action.option_strings[-1], kind, words, _help_of(parser, action)))
        elif not action.option_strings:
            position += 1
            kind, words = _kind_of_value(name, action)
            command.arguments.append(Argument(str(position), kind, words, repeats=action.nargs in ("+", "*")))
    yield command
    yield from inner


def _help_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _kind_of_value(command: str, action: argparse.Action) -> tuple[str, tuple[str, ...]]:
    """Return the kind of an argument's values, and the words that it may be."""
    name = str(action.metavar or "")
    if action.dest == "shell":
        return "words", tuple(SHELLS)
    if action.choices is not None:
        return "words", tuple(map(str, action.choices))
    if name == "KIND":
        return "words", tuple(_kinds(command))
    if name == "STAGE":
        return "stages", ()
    if name == "PATH=VALUE" and command in ("run", "plan", "explain"):
        return "paths", ()
    if action.dest == "name" and command == "fields":
        return "fields", ()
    if name == "DIR":
        return "folders", ()
    if name in YAML:
        return "yaml", ()
    return ("files" if name in FILES else "text"), ()


def _kinds(command: str) -> list[str]:
    from align.cli.fields import topics
    from align.pipeline.registry import STAGES

    if command == "fields":
        return [*STAGES, *topics()]
    return [kind for kind, stage in STAGES.items() if stage.lint is not None]


def _field_names(kind: str) -> list[str]:
    """Return the paths of a kind's fields, as ``align fields`` accepts them."""
    from align.cli.fields import find_subject

    return [name for block in find_subject(kind).blocks for name in _names_below(block)]


def _read(path: str) -> dict[str, Any]:
    from align.pipeline.file import read_pipeline_file

    return read_pipeline_file(Path(path), (), ())


def _stage_names(path: str) -> list[str]:
    """Return the names of a file's stages, including the stages of loops."""
    return list(_stage_blocks(_read(path)))


def _stage_blocks(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the block of every stage by its name; a loop's stages follow the loop."""
    from align.pipeline.loops import is_loop
    from align.pipeline.registry import NAME_PATTERN

    blocks: dict[str, dict[str, Any]] = {}
    stages = raw.get("stages")
    for name, block in stages.items() if isinstance(stages, dict) else ():
        # A name with other letters is an error in the file, and text that a shell could run.
        if not isinstance(block, dict) or not re.fullmatch(NAME_PATTERN, str(name)):
            continue
        blocks[str(name)] = block
        if is_loop(str(name), block):
            blocks.update(_stage_blocks(block))
    return blocks


def _assignment_paths(path: str) -> list[str]:
    """Return every path that ``--set`` can change in a file, each with its equals sign."""
    from align.config.runtime import Runtime
    from align.pipeline.pipeline import PipelineConfig

    paths = [f"{name}=" for name in PipelineConfig.model_fields if name not in ("stages", "runtime")]
    paths += [f"runtime.{name}=" for name in _names_below(Runtime)]
    blocks = _stage_blocks(_read(path))
    for name, block in blocks.items():
        config = _config_class(name, block, blocks)
        fields = [] if config is None else _names_below(config)
        paths += [f"stages.{name}.{path_below}=" for path_below in [*fields, "seed"]]
    return paths


def _config_class(name: str, block: dict[str, Any], blocks: dict[str, dict[str, Any]]) -> type[BaseModel] | None:
    """Return the class of a stage's fields; None for a kind of the user's own.

    The Tab key must not run code that a file names, so the module of such a kind stays unread.
    """
    from align.config.stages.continue_from import CONTINUE
    from align.pipeline.loops import LoopConfig, is_loop
    from align.pipeline.registry import STAGES

    if is_loop(name, block):
        return LoopConfig
    passed = {name}
    kind = block.get("stage", name)
    # `sft_more: {continue_from: sft}` has the kind of the stage that it continues.
    while kind not in STAGES and block.get(CONTINUE) in set(blocks) - passed:
        continued = block[CONTINUE]
        passed.add(continued)
        block = blocks[continued]
        kind = block.get("stage", continued)
    return STAGES[kind].config_class() if kind in STAGES else None


def _names_below(config: type[BaseModel]) -> list[str]:
    """Return the names of a block's fields, and the paths of the fields of the blocks in it."""
    names = []
    for name, info in config.model_fields.items():
        names.append(name)
        # Blocks in a list or a mapping have an index or a name of the user's before their fields.
        is_in_container = any(container in str(info.annotation) for container in ("dict[", "list["))
        blocks = [] if is_in_container else list(nested_models(info.annotation))
        inner = dict.fromkeys(inner_name for block in blocks for inner_name in block.model_fields)
        names += [f"{name}.{inner_name}" for inner_name in inner]
    return names
