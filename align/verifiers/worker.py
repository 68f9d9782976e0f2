"""The process that compares answers, which ``workers.py`` kills when it exceeds its limits. Messages are JSON."""

from __future__ import annotations

import functools
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from align.verifiers.verdict import UNPARSABLE, BadReference, Verdict

MEMORY = 2**31
"""Address space in bytes that comparisons may use in addition to the imported packages."""
ORPHAN_SECONDS = 10.0
"""Pause between two looks for the parent, and time after which an overdue request ends the worker without it."""
Verify = Callable[[Any, str], Verdict]


def find_verifier(kind: str) -> Verify:
    """Return the function of a verifier, after the import of its packages."""
    if kind == "math":
        import math_verify  # noqa: F401 - part of the start, not of the first comparison

        from align.verifiers import mathematics

        return mathematics.verify
    if kind == "ifeval":
        import if_verifiable.ifeval.instructions_registry  # noqa: F401

        from align.verifiers import instructions

        return instructions.verify
    from align.verifiers import answers

    if kind == "json_schema":
        import jsonschema  # noqa: F401
    function: Verify = getattr(answers, kind)
    return function


def load_verifier(kind: str) -> Verify:
    """Return the function of a verifier, and limit the memory that its comparisons may use."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # a CUDA build of torch maps many GiB when it is imported
    function = find_verifier(kind)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    return function


def main() -> None:
    """Answer requests on the descriptor that is the first argument, until it closes or the parent is gone."""
    connection = Connection(int(sys.argv[1]))
    parent = os.getppid()
    load = functools.cache(load_verifier)
    while True:
        # Another process may have inherited the other end, so its closing does not prove that the parent ended.
        while not select.select([connection], [], [], ORPHAN_SECONDS)[0]:
            if os.getppid() != parent:
                return
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        connection.send_bytes(json.dumps(_answer(load, request)).encode())


def _answer(load: Callable[[str], Verify], request: dict[str, Any]) -> dict[str, Any]:
    """Return the verdict on a request, or its ``error`` for a package or a reference that cannot be used."""
    try:
        function = load(request["kind"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if "text" not in request:
        return {}
    # If the parent dies during a comparison that hangs, the kernel ends this process: the default action of the alarm.
    signal.setitimer(signal.ITIMER_REAL, 4 * request["seconds"] + ORPHAN_SECONDS)
    try:
        verdict = function(request["reference"], request["text"])
    except BadReference as error:
        return {"error": str(error)}
    except RecursionError:  # thousands of brackets
        return {"score": 0.0, "reason": UNPARSABLE}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"score": verdict.score, "reason": verdict.reason}


if __name__ == "__main__":
    main()
