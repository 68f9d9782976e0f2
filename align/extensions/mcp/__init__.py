"""``align mcp``: serve the runs of a store to an assistant over standard input and output. Has no heavy imports."""

from __future__ import annotations

import argparse
import contextlib
import sys

from align.errors import UserError, require_extra
from align.registry import Command, Extension

EXTENSION = Extension(
    "runs of a store for an assistant, by the Model Context Protocol",
    (
        Command(
            "mcp", "offer the runs of a store to an assistant over standard input and output", "align.extensions.mcp"
        ),
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align mcp``."""
    from align.cli.parser import add_store

    parser.add_argument(
        "--allow-writes", action="store_true", help="also offer tools that stop and resume runs (default: only reads)"
    )
    add_store(parser)


def run(options: argparse.Namespace) -> int:
    """Run ``align mcp`` until standard input ends."""
    if options.json:
        raise UserError("align mcp: has no --json; its output is the protocol's.")
    require_extra("mcp", "mcp", "align mcp")
    from align.extensions.mcp.server import create_server
    from align.runner.open_store import open_store
    from align.studio.context import StudioContext

    context = StudioContext(open_store(None, options.store), read_only=not options.allow_writes)
    server = create_server(context)
    if sys.stdin.isatty():
        print("An assistant starts this command and talks to it by JSON; Ctrl-D ends it.", file=sys.stderr)
    # The protocol takes the real standard output, and turns other output of this process to standard error.
    with contextlib.redirect_stdout(sys.__stdout__):
        server.run("stdio")
    return 0
