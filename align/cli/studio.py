"""``align studio``: start the local web application. Has no heavy imports."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import secrets
import socket
import sys
import webbrowser
from typing import TYPE_CHECKING

from align.cli.parser import add_store, print_json
from align.errors import UserError, printable, require_extra

if TYPE_CHECKING:
    from align.studio.context import StudioContext

HOSTS = ("127.0.0.1", "localhost", "::1")
PORT = 8010
PORTS_TRIED = 10
"""Ports that are tried from ``PORT`` on if ``--port`` names none."""
PACKAGES = ("fastapi", "uvicorn", "sse_starlette")
SECONDS_TO_END = 2
"""Time that open requests have after Ctrl-C."""


def run(options: argparse.Namespace) -> int:
    """Run ``align studio`` until Ctrl-C."""
    if options.host not in HOSTS:
        raise UserError(
            f"--host {options.host}: the studio only listens on this machine ({', '.join(HOSTS)}), because it has no "
            "accounts. From another machine use a tunnel: ssh -L 8010:127.0.0.1:8010 MACHINE."
        )
    for package in PACKAGES:
        require_extra(package, "studio", "align studio")
    from align.runner.open_store import open_store
    from align.studio.context import StudioContext

    keys = frozenset(options.chat_key)
    missing = sorted(key for key in keys if not os.environ.get(key))
    if missing:
        raise UserError(f"--chat-key {missing[0]}: this environment variable is not set; put the endpoint's key in it.")
    context = StudioContext(open_store(None, options.store), read_only=options.read_only, chat_keys=keys)
    listener = listen(options.host, options.port)
    with contextlib.closing(listener):
        serve(context, listener, options)
    return 0


def listen(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens on ``port``, by default on the first free port from ``PORT`` on.

    Raises ``UserError`` if the port is busy or cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    ports = range(PORT, PORT + PORTS_TRIED) if port is None else [port]
    for number in ports:
        listener = socket.socket(family, socket.SOCK_STREAM)
        # A port of a studio that has just ended is free again at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, number))
            listener.listen()
        except (OSError, OverflowError) as error:
            listener.close()
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE and port is None:
                continue
            raise UserError(f"--port {number}: {_explain(error)}") from None
        return listener
    raise UserError(f"The ports {ports[0]} to {ports[-1]} are all in use; name a free one with --port.")


def _explain(error: OSError | OverflowError) -> str:
    if isinstance(error, OverflowError):
        return "a port is a number from 0 to 65535."
    if error.errno == errno.EADDRINUSE:
        return "another program uses this port, perhaps another studio; name a free one, or leave --port away."
    return f"{error.strerror}; name another port."


def serve(context: StudioContext, listener: socket.socket, options: argparse.Namespace) -> None:
    """Print the address with the token, and serve until Ctrl-C or SIGTERM."""
    import uvicorn

    from align.studio.app import create_app

    token = secrets.token_urlsafe(32)
    port = listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{port}/?token={token}"
    app = create_app(context, token, cookie=f"align-studio-{port}")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=SECONDS_TO_END
    )
    store = str(context.store.root.resolve())
    if options.json:
        print_json({"address": address, "store": store, "is_writable": context.is_writable})
    else:
        print(f"Store: {printable(store)}{'' if context.is_writable else ' (read only)'}")
        print(f"Studio: {address}")
        print("Ctrl-C ends the studio; runs continue.")
    sys.stdout.flush()
    if options.open and not _open(address):
        print("note: no browser could be started here; open the address yourself.", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has ended
        uvicorn.Server(config).run(sockets=[listener])


def _open(address: str) -> bool:
    try:
        return webbrowser.open(address)
    except (webbrowser.Error, OSError):
        return False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``align studio``."""
    parser.add_argument(
        "--port",
        type=int,
        metavar="N",
        help=f"port to listen on (default: the first free port from {PORT} on)",
    )
    parser.add_argument("--host", default=HOSTS[0], help="address of this machine to listen on (default: 127.0.0.1)")
    parser.add_argument("--open", action="store_true", help="open the studio in a browser")
    parser.add_argument("--read-only", action="store_true", help="refuse every action that writes into the store")
    parser.add_argument(
        "--chat-key",
        action="append",
        default=[],
        metavar="VARIABLE",
        help="environment variable with a key that the chat may send to endpoints; may be given again",
    )
    add_store(parser)
