"""Shell completion. argcomplete answers the Tab key; functions here add the names that a pipeline file holds.

``align completion SHELL`` prints the shell's function, which calls ``align`` with the line. Never imports torch.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from align.cli.parser import find_command
from align.config.field_descriptions import nested_models
from align.errors import UserError

SHELLS = ("bash", "zsh", "fish")
YAML = ("PIPELINE", "RECIPE", "SUITE", "SWEEP", "RUN")
FILES = ("CHECKPOINT", "BUILD", "DATA", "SPEC", "MODEL", "FILE", "PATH", "A", "B")


def run(options: argparse.Namespace) -> int:
    """Run ``align completion``."""
    import argcomplete

    print(argcomplete.shellcode(["align"], use_defaults=False, shell=options.shell), end="")  # type: ignore[attr-defined]
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``align completion``."""
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")


def answer_shell(make_parser: Callable[[str], argparse.ArgumentParser]) -> None:
    """Write the candidates for the line in ``COMP_LINE`` and exit.

    Args:
        make_parser: Returns the parser that knows the arguments of a command, by the command's name.
    """
    import argcomplete
    from argcomplete.completers import ChoicesCompleter

    words = os.environ["COMP_LINE"].split()
    top = make_parser(find_command(words[1:]))
    _add_completers(top, "")
    # Other values are numbers and free text, for which file names would be wrong.
    argcomplete.autocomplete(top, always_complete_options=False, default_completer=ChoicesCompleter({}))


def _add_completers(parser: argparse.ArgumentParser, command: str) -> None:
    """Set the ``completer`` of each argument of a parser and of its subcommands, by its metavar."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                _add_completers(subparser, f"{command} {name}".strip())
            continue
        completer = _choose_completer(action, command)
        if completer is not None:
            action.completer = completer  # type: ignore[attr-defined]


def _choose_completer(action: argparse.Action, command: str) -> Callable[..., Iterable[str]] | None:
    """Return the function that lists an argument's values; None for choices, which argparse knows, and for text."""
    from argcomplete.completers import ChoicesCompleter, DirectoriesCompleter, FilesCompleter

    metavar = str(action.metavar)
    if metavar == "KIND":
        return ChoicesCompleter(dict.fromkeys(_kinds(command), ""))
    if metavar == "STAGE":
        return _complete_stages
    if metavar == "PATH=VALUE" and command in ("run", "plan", "explain"):
        return _complete_assignments
    if action.dest == "name" and command == "fields":
        return _complete_fields
    if metavar == "DIR":
        return DirectoriesCompleter()
    if metavar in YAML:
        return FilesCompleter(("yaml", "yml"))
    return FilesCompleter() if metavar in FILES else None


def _kinds(command: str) -> list[str]:
    from align.pipeline.registry import STAGES
    from align.registry import Topic, registered

    if command == "fields":
        return [*STAGES, *registered(Topic)]
    return [kind for kind, stage in STAGES.items() if stage.lint is not None]


def _complete_fields(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the paths of a kind's fields, as ``align fields`` accepts them."""
    from align.cli.fields import find_subject

    try:
        subject = find_subject(parsed_args.kind or "")
    except UserError:
        return []
    return [name for block in subject.blocks for name in _names_below(block)]


def _complete_stages(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the names of a file's stages, including the stages of loops."""
    return list(_stage_blocks(_read(parsed_args)))


def _read(parsed_args: argparse.Namespace) -> dict[str, Any]:
    """Return the pipeline that the line names, before its stages are checked; empty if it cannot be read."""
    from align.config.shipped import find_shipped
    from align.pipeline.file import read_pipeline_file

    name = getattr(parsed_args, "pipeline", None) or getattr(parsed_args, "run", None)
    try:
        return read_pipeline_file(Path(find_shipped(name)), (), ()) if name else {}
    except UserError:
        return {}


def _stage_blocks(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
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


def _complete_assignments(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return every path that ``--set`` can change in a file, each with its equals sign."""
    from align.config.runtime import Runtime
    from align.pipeline.pipeline import PipelineConfig

    paths = [f"{name}=" for name in PipelineConfig.model_fields if name not in ("stages", "runtime")]
    paths += [f"runtime.{name}=" for name in _names_below(Runtime)]
    blocks = _stage_blocks(_read(parsed_args))
    for name, block in blocks.items():
        config = _config_class(name, block, blocks)
        fields = [] if config is None else _names_below(config)
        paths += [f"stages.{name}.{path_below}=" for path_below in [*fields, "seed"]]
    return paths


def _config_class(name: str, block: dict[str, Any], blocks: dict[str, dict[str, Any]]) -> type[BaseModel] | None:
    """Return the class of a stage's fields; None for a kind of the user's own.

    The Tab key must not run code that a file names, so the module of such a kind stays unread.
    """
    from align.config.stages.continue_from import continued_stage
    from align.pipeline.loops import LoopConfig, is_loop
    from align.pipeline.registry import STAGES

    if is_loop(name, block):
        return LoopConfig
    passed = {name}
    kind = block.get("stage", name)
    # `sft_more: {continue_from: sft}` has the kind of the stage that it continues.
    while kind not in STAGES:
        continued = continued_stage(block)
        if continued is None or continued not in set(blocks) - passed:
            break
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
