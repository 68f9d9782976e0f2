"""The parser of every command, and the options, loading and output that commands share. Has no heavy imports."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from align.errors import UserError, printable
from align.registry import failure_note
from align.registry import load as load_path

if TYPE_CHECKING:
    from rich.console import Console

    from align.pipeline.pipeline import Pipeline

PLAIN_WIDTH = 400
"""Columns of a table if output is not a terminal."""


class Parser(argparse.ArgumentParser):
    """Argument parser that refuses abbreviations and answers a wrong option or command with the nearest one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise ``UserError`` with the message and a hint, instead of printing the usage."""
        from align.config.synonyms import COMMANDS
        from align.config.validation import hint_nearest, nearest

        hint = ""
        commands = self._commands()
        if message.startswith("unrecognized arguments:"):
            word = message.split(": ", 1)[1].split()[0].split("=")[0]
            options = {name for name in option_names(self) if name.startswith("--")}
            # An option of another subcommand is no remedy for itself.
            hint = hint_nearest(word, options - {word})
            if word in options:
                hint = f" It is an option of other commands of {self.prog}; see --help."
        elif "invalid choice:" in message and commands and not message.startswith("argument -"):
            word = message.split("invalid choice: ", 1)[1].split("'")[1]
            message = f"unknown command '{word}'"
            # Only the commands of the top have other tools' names for them.
            names = {name: command for name, command in COMMANDS.items() if command in commands}
            close = nearest(word, [*commands, *names])
            hint = f" Commands: {', '.join(commands)}.{failure_note()}"
            if close is not None:
                hint = (
                    f" In align this is `{self.prog} {names[close]}`."
                    if close in names
                    else f" Did you mean '{close}'?{failure_note()}"
                )
        elif "are required:" in message and commands:
            hint = f" Commands: {', '.join(commands)}."
        raise UserError(f"{self.prog}: {message}.{hint}")

    def _commands(self) -> list[str]:
        return [name for action in self._actions if isinstance(action, _SUBPARSERS) for name in action.choices]


_SUBPARSERS = argparse._SubParsersAction


def import_late(place: str) -> Callable[[Any], Any]:
    """Return a function that imports ``MODULE:FUNCTION`` when it is called, and calls it."""
    return lambda argument: load_path(place)(argument)


class Handler(NamedTuple):
    """The functions of a command, for a module that has several commands."""

    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None]


def find_command(words: Sequence[str]) -> str:
    """Return the command in the words after ``align``; only options without a value precede it."""
    return next((word for word in words if not word.startswith("-")), "")


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a parser and of all its subcommands."""
    names = list(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, _SUBPARSERS):
            for subparser in action.choices.values():
                names += option_names(subparser)
    return names


def add_assignments(parser: argparse.ArgumentParser, description: str) -> None:
    """Add ``--set``, whose values are ``options.assignments``."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments", help=description
    )


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add ``--store`` and ``--json``, which most commands have."""
    parser.add_argument(
        "--store",
        metavar="DIR",
        help="the store: a folder or s3://bucket/prefix (default: $ALIGN_STORE, else ./store)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")


@contextlib.contextmanager
def exported_store(store: str | None) -> Iterator[None]:
    """Set ``$ALIGN_STORE`` to the folder of ``--store``: recipes find their sets of annotations by it.

    A variable with the address of a bucket stays, since it does not name a folder.
    """
    before = os.environ.get("ALIGN_STORE")
    if not store or "://" in store or "://" in (before or ""):
        yield
        return
    # The command itself refuses a name that no folder can have.
    with contextlib.suppress(ValueError):
        os.environ["ALIGN_STORE"] = os.path.abspath(os.path.expanduser(store))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("ALIGN_STORE", None)
        else:
            os.environ["ALIGN_STORE"] = before


def add_executor(parser: argparse.ArgumentParser, work: str) -> None:
    """Add ``--on``, which names the executor of ``work``."""
    parser.add_argument(
        "--on", choices=["local", "slurm", "ray"], help=f"run the {work} there, instead of where runtime.executor says"
    )


def load(options: argparse.Namespace) -> Pipeline:
    """Load the pipeline of the command line with its ``--set`` options."""
    from align.config.shipped import find_shipped
    from align.pipeline.pipeline import Pipeline
    from align.runner.open_store import settle_states

    place = find_shipped(options.pipeline)
    on = getattr(options, "on", None)
    sizes = _sizes(getattr(options, "model_config", ()))
    pipeline = Pipeline.load(place, options.assignments, on, print_warning, sizes)
    # Only a stage that continues a stopped stage depends on the store.
    return settle_states(pipeline, getattr(options, "store", None))


def _sizes(texts: Sequence[str]) -> dict[str, int]:
    """Return the parameters of models by ``STAGE=config.json``; ``plan_hardware`` refuses what cannot be read."""
    from align.models.compute.architecture import UnknownArchitecture
    from align.models.compute.model_types import read_architecture

    sizes = {}
    for text in texts:
        name, _, path = text.partition("=")
        with contextlib.suppress(UnknownArchitecture):
            sizes[name] = read_architecture(Path(path)).parameters
    return sizes


def print_pins(pipeline: Pipeline) -> None:
    """Print what the stages name and the file does not fix, such as the commit of a Hub model."""
    for name, fields in pipeline.pins.items():
        values = ", ".join(f"{field}: {value}" for field, value in fields.items())
        print(printable(f"{name} takes {values}"))


def print_warning(message: str) -> None:
    """Print a warning on standard error."""
    print(f"! {printable(message)}", file=sys.stderr)


def printable_json(value: Any) -> str:
    """Return indented JSON; control characters stay escaped, so the terminal is safe."""
    return json.dumps(value, indent=1, ensure_ascii=True, default=str)


def print_json(value: Any) -> None:
    """Print one JSON document on standard output."""
    print(printable_json(value))


def table_console() -> Console:
    """Return the console for a table. A table that goes to a file is not folded."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def align_columns(rows: Sequence[Sequence[str]], text_columns: int) -> list[str]:
    """Return rows as lines with aligned columns: the first ``text_columns`` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < text_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return lines
