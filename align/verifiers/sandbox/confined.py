"""The first program inside a sandbox: it limits its own process for good, then runs code that nobody trusts.

The parent passes the texts of ``limits.py`` and of this file to Python (``-c``), so a container needs no align. They
import only the standard library. One line of JSON on standard input says what to do:

``run``: execute the program as ``__main__``; ``stdin`` is its input, and its output is the process's.
``serve``: execute the program, then answer requests for calls of its functions, one JSON line each.
``grade``: execute tests, whose calls of the program's functions are requests to the parent, then write the verdict.

A program and its tests never share a process: only plain values pass between them. So no ``__eq__`` of the program
takes part in a comparison, an early exit is a missing result, and the program cannot read its tests.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from align.verifiers.sandbox.limits import confine

MOST_ITEMS = 100_000
"""Items that are read from an iterator, which may have no end."""
SYNTAX_ERROR = 3
"""Exit code of a program that is not valid Python."""

# ---- plain values as JSON ----


def encode(value: Any, handles: dict[int, Any], depth: int = 0) -> Any:
    """Return a value as JSON data. Objects of the program's own classes are stored in ``handles``, by number."""
    if depth > 100:
        raise ValueError("a value nests too deep")
    if value is None or type(value) in (bool, int, str, float):
        return value
    if isinstance(value, (int, str, float)):  # a subclass counts as its value
        base: Any = next(kind for kind in (int, str, float) if isinstance(value, kind))
        return base(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, (list, tuple, set, frozenset)):
        name = next(kind.__name__ for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
        return {name: [encode(item, handles, depth + 1) for item in value]}
    if isinstance(value, dict):
        pairs = [[encode(key, handles, depth + 1), encode(item, handles, depth + 1)] for key, item in value.items()]
        return {"dict": pairs}
    if isinstance(value, Remote):
        return {"handle": value._number}
    if hasattr(type(value), "__next__"):
        items = [item for _, item in zip(range(MOST_ITEMS), value, strict=False)]
        return {"iterator": [encode(item, handles, depth + 1) for item in items]}
    number = len(handles)
    handles[number] = value
    return {"handle": number}


def decode(data: Any, resolve: Any) -> Any:
    """Return the value of JSON data; ``resolve`` gives the object behind a handle."""
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {decode(key, resolve): decode(item, resolve) for key, item in content}
    if kind == "iterator":
        return iter([decode(item, resolve) for item in content])
    if kind == "handle":
        return resolve(content)
    collection: Any = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
    return collection(decode(item, resolve) for item in content)


class Channel:
    """Lines of JSON to and from the parent, on descriptors that the program does not know by number."""

    def __init__(self) -> None:
        self.reader = os.fdopen(os.dup(0), "rb")
        self.writer = os.fdopen(os.dup(1), "wb")

    def read(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self.reader.readline() or "{}")
        # The parent has closed its end. Leave without the program's exit handlers.
        if not message:
            os._exit(0)
        return message

    def write(self, message: dict[str, Any]) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")
        self.writer.flush()


# ---- tasks ----


def run(task: dict[str, Any]) -> None:
    """Execute a program with its input on descriptor 0, where ``input()`` and ``open(0)`` read it."""
    namespace = main_module()
    try:
        program = compile(task["program"], "program.py", "exec")
    except (SyntaxError, ValueError):
        os._exit(SYNTAX_ERROR)
    exec(program, namespace)  # noqa: S102


def serve(task: dict[str, Any], channel: Channel) -> None:
    """Execute a program, then call its functions on request."""
    namespace = main_module()
    handles: dict[int, Any] = {}
    try:
        exec(compile(task["program"], "program.py", "exec"), namespace)  # noqa: S102
        names = [name for name, value in namespace.items() if callable(value) and not name.startswith("_")]
    except BaseException as error:
        channel.write({"error": type(error).__name__})
        return
    channel.write({"names": names})
    while True:
        request = channel.read()
        try:
            target = namespace[request["name"]] if "name" in request else handles[request["handle"]]
            if request["attribute"] is not None:
                target = getattr(target, request["attribute"])
            arguments = decode(request["arguments"], handles.__getitem__)
            keywords = decode(request["keywords"], handles.__getitem__)
            value = target(*arguments, **keywords) if request["is_call"] else target
            reply = {"value": encode(value, handles)}
            # A reply that JSON cannot hold is an error of the call. In ``write`` it would end the process.
            json.dumps(reply)
        except BaseException as error:
            reply = {"error": type(error).__name__}
        channel.write(reply)


class Remote:
    """An object of the program's own, seen from its tests: its attributes are asked for, and it is equal to nothing."""

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel = channel
        self._number = number

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return ask(self._channel, {"handle": self._number, "attribute": None, "is_call": True}, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return ask(self._channel, {"handle": self._number, "attribute": name, "is_call": False}, (), {})

    def __eq__(self, other: object) -> bool:
        raise TypeError("objects of the program cannot be compared")

    __hash__ = None  # type: ignore[assignment]


def ask(channel: Channel, request: dict[str, Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Return the result of a call in the program's process; raise its exception, by name."""
    handles: dict[int, Any] = {}
    message = {**request, "arguments": encode(list(arguments), handles), "keywords": encode(dict(keywords), handles)}
    if handles:
        raise TypeError("the tests pass an object that is no plain value")
    channel.write(message)
    reply = channel.read()
    if "error" in reply:
        # Only built-in exceptions are raised by name, so a program cannot choose any other object.
        kind = getattr(builtins, str(reply["error"]), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(reply["error"])
        raise Exception(reply["error"])
    return decode(reply["value"], lambda number: Remote(channel, number))


def grade(task: dict[str, Any], channel: Channel) -> None:
    """Execute tests against functions that run in another process, and report the verdict.

    The setup is trusted code. Of the program, tests see its entry point, and those names that they use and that neither
    the setup, nor Python, nor its standard library has: a program must not replace ``abs`` or ``math`` in its tests.
    """
    namespace = main_module()
    try:
        exec(compile(task["setup"], "setup.py", "exec"), namespace)  # noqa: S102
        tests = [compile(test, "tests.py", "exec") for test in task["tests"]]
        for name in {name for test in tests for name in names_in(test)}:
            if name in namespace or hasattr(builtins, name):
                continue
            if name in sys.stdlib_module_names:
                namespace[name] = __import__(name)
            elif name in task["names"]:
                namespace[name] = proxy(channel, name)
        entry_point = task["entry_point"]
        if entry_point:
            namespace[entry_point] = proxy(channel, entry_point)
        for test in tests:
            exec(test, namespace)  # noqa: S102
        if entry_point and "check" in namespace:
            namespace["check"](namespace[entry_point])
        channel.write({"verdict": "passed"})
    except AssertionError:
        channel.write({"verdict": "failed"})
    except BaseException as error:
        channel.write({"verdict": "raised", "error": type(error).__name__})


def names_in(code: types.CodeType) -> set[str]:
    """Return the global names of code and of its functions; attributes are among them."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= names_in(constant)
    return names


def proxy(channel: Channel, name: str) -> Any:
    """Return a function that calls the program's function of this name."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        return ask(channel, {"name": name, "attribute": None, "is_call": True}, arguments, keywords)

    return call


def main_module() -> dict[str, Any]:
    """Return the namespace of a new ``__main__``, which has none of this file's names."""
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    return module.__dict__


def main() -> None:
    """Do the task on standard input, after a line that says that the limits are in force."""
    task = json.loads(sys.stdin.buffer.readline())
    kind = task["kind"]
    channel = Channel()
    null = os.open(os.devnull, os.O_RDWR)
    if kind == "run":
        # The filter of system calls forbids this call later, so the input is laid out before.
        content = os.memfd_create("stdin")
        os.write(content, task["stdin"].encode("utf-8", "surrogateescape"))
        os.lseek(content, 0, os.SEEK_SET)
        os.dup2(content, 0)
    else:  # the channel reads the rest of the input; what the program prints is dropped
        os.dup2(null, 0)
        os.dup2(null, 1)
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    confine(task)
    channel.write({})
    # Until here standard error could tell the parent which limit failed. From here on the program would write to it.
    os.dup2(null, 2)
    if kind == "run":
        run(task)
    else:
        (serve if kind == "serve" else grade)(task, channel)


main()
