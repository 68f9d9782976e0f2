"""The program inside a sandbox: it limits its own process for good, then runs untrusted code.

The parent passes the texts of ``limits.py`` and of this file to Python (``-c``), and with tests also the texts of
``remote.py``, ``harness.py`` and ``grader.py``, so a container needs no align. They import only the standard library.
One line of JSON on standard input says what to do:

``run``: execute the program as ``__main__``; ``stdin`` is its input, and its output is the process's.
``serve``: execute the program, then answer requests for calls of its functions, one JSON line each.
``grade``: execute tests, whose calls of the program's functions are requests to the parent, then write the verdict.
``check``: execute tests with programs that always return the same, and write what is wrong with each of them.

A program and its tests never share a process: only plain values pass between them. So no ``__eq__`` of the program
decides about a plain value, an early exit is a missing result, and the program cannot read its tests.
"""

from __future__ import annotations

import builtins
import copy
import io
import json
import operator
import os
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` costs milliseconds in every program
    from collections.abc import Callable
    from typing import Any

    from align.verifiers.sandbox.limits import PackageFinder, confine

SYNTAX_ERROR = 3
"""Exit code of a program that is not valid Python."""
LONGEST_PRINT, MOST_DEPTH = 1 << 18, 200  # characters of one call, and levels of nested values
LARGEST_INTEGER = 1 << 53  # larger ones are written in hexadecimal digits, whose number Python does not limit


# ---- plain values as JSON ----


def standard(module: str, name: str) -> Callable[..., Any]:
    """Return a function that builds a value of a class, which is imported when the first one is built."""
    return lambda *arguments: operator.attrgetter(name)(__import__(module))(*arguments)


# Class -> what it is built from, and what builds it. A value of a subclass counts as a value of the class.
CLASSES: dict[str, tuple[Callable[[Any], list[Any]], Callable[..., Any]]] = {
    "builtins.int": (lambda value: [hex(value)], lambda digits: int(digits, 16)),
    "builtins.slice": (lambda value: [value.start, value.stop, value.step], slice),
    "builtins.complex": (lambda value: [value.real, value.imag], complex),
    "builtins.bytes": (lambda value: [value.hex()], bytes.fromhex),
    "builtins.bytearray": (lambda value: [value.hex()], bytearray.fromhex),
    "builtins.range": (lambda value: [value.start, value.stop, value.step], range),
    "builtins.dict_keys": (lambda value: [list(value)], lambda items: dict.fromkeys(items).keys()),
    "builtins.dict_values": (lambda value: [list(value)], lambda items: dict(enumerate(items)).values()),
    "builtins.dict_items": (lambda value: [list(value)], lambda items: dict(items).items()),
    "fractions.Fraction": (lambda value: [value.numerator, value.denominator], standard("fractions", "Fraction")),
    "decimal.Decimal": (lambda value: [str(value)], standard("decimal", "Decimal")),
    "datetime.datetime": (lambda value: [value.isoformat()], standard("datetime", "datetime.fromisoformat")),
    "datetime.date": (lambda value: [value.isoformat()], standard("datetime", "date.fromisoformat")),
    "datetime.time": (lambda value: [value.isoformat()], standard("datetime", "time.fromisoformat")),
    "datetime.timedelta": (
        lambda value: [value.days, value.seconds, value.microseconds],
        standard("datetime", "timedelta"),
    ),
    "collections.deque": (lambda value: [list(value), value.maxlen], standard("collections", "deque")),
    "collections.Counter": (lambda value: [dict(value)], standard("collections", "Counter")),
    "collections.defaultdict": (
        lambda value: [value.default_factory, list(value.items())],
        standard("collections", "defaultdict"),
    ),
    "collections.OrderedDict": (lambda value: [list(value.items())], standard("collections", "OrderedDict")),
    "pathlib.PurePath": (lambda value: [str(value)], standard("pathlib", "Path")),
    "array.array": (lambda value: [value.typecode, value.tolist()], standard("array", "array")),
    "numpy.ndarray": (lambda value: [value.tolist(), value.dtype.str], standard("numpy", "array")),
}
COLLECTIONS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Objects(list):  # type: ignore[type-arg]
    """The objects that the other process knows by number only. An object has the same number each time."""

    def __init__(self) -> None:
        super().__init__()
        self._numbers: dict[int, int] = {}

    def add(self, value: Any) -> int:
        """Return the number of an object."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self)
            self.append(value)  # which keeps it alive, so its id is not used again
        return self._numbers[id(value)]


def encode(value: Any, number_of: Callable[[Any], Any], depth: int = 0) -> Any:
    """Return a value as JSON data. ``number_of`` gives the data for an object of another class."""

    def nested(part: Any) -> Any:
        return encode(part, number_of, depth + 1)

    if depth > MOST_DEPTH:
        raise ValueError("a value nests too deep")
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    # A subclass counts as its value, which its own methods do not decide about.
    if isinstance(value, int):
        plain = int.__index__(value)
        return plain if abs(plain) < LARGEST_INTEGER else {"builtins.int": [hex(plain)]}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    paths = [f"{each.__module__}.{each.__qualname__}" for each in kind.__mro__]
    if "numpy.generic" in paths:
        return nested(value.item())
    for path in paths:
        if path in CLASSES:
            return {path: [nested(part) for part in CLASSES[path][0](value)]}
    if isinstance(value, tuple) and isinstance(fields := getattr(kind, "_fields", None), tuple):
        return {"namedtuple": [kind.__name__, list(fields), [nested(item) for item in value]]}
    for name, collection in COLLECTIONS.items():
        if isinstance(value, collection):
            return {name: [nested(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[nested(key), nested(item)] for key, item in value.items()]}
    name = getattr(value, "__name__", "")
    if isinstance(value, type) and vars(builtins).get(name) is value:
        return {"type": name}
    return number_of(value)


def decode(data: Any, resolve: Callable[[str, Any], Any]) -> Any:
    """Return the value of JSON data; ``resolve`` gives the object behind a handle or a global name."""
    if not isinstance(data, dict):
        return data
    ((kind, content),) = data.items()
    if kind == "type":
        return {name: each for name, each in vars(builtins).items() if isinstance(each, type)}[content]
    if kind == "namedtuple":
        # Without the methods of its class.
        return standard("collections", "namedtuple")(*content[:2])(*(decode(item, resolve) for item in content[2]))
    if kind == "dict":
        return {decode(key, resolve): decode(item, resolve) for key, item in content}
    if kind in CLASSES:
        return CLASSES[kind][1](*(decode(part, resolve) for part in content))
    if kind in COLLECTIONS:
        return COLLECTIONS[kind](decode(item, resolve) for item in content)
    return resolve(kind, content)


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
    namespace = new_module("__main__")
    try:
        program = compile(task["program"], "program.py", "exec")
    except (SyntaxError, ValueError):
        os._exit(SYNTAX_ERROR)
    exec(program, namespace)  # noqa: S102


def serve(task: dict[str, Any], channel: Channel) -> None:
    """Execute a program, then call its functions on request."""
    # A guard of ``__main__`` is false, as in any program that is imported.
    namespace = new_module("program")
    sys.stdin = NoInput()  # type: ignore[assignment]
    try:
        exec(compile(task["program"], "program.py", "exec"), namespace)  # noqa: S102
    except EOFError:
        pass  # It reads its input after its functions.
    except BaseException as error:
        channel.write({"error": type(error).__name__})
        return
    public = {name: value for name, value in namespace.items() if callable(value) and not name.startswith("_")}
    own = {name: value for name, value in public.items() if getattr(value, "__module__", "") == "program"}
    calls = {name: value.__code__.co_names for name, value in own.items() if isinstance(value, types.FunctionType)}
    kinds = [(name, value) for name, value in public.items() if isinstance(value, type)]
    exceptions = {name: class_names(kind) for name, kind in kinds if issubclass(kind, BaseException)}
    channel.write({"names": list(public), "calls": calls, "exceptions": exceptions})
    server = Server(namespace, channel)
    while True:
        server.answer(channel.read())


class Server:
    """Answers requests for calls of a program's functions."""

    def __init__(self, namespace: dict[str, Any], channel: Channel) -> None:
        self._namespace = namespace
        self._channel = channel
        self._objects = Objects()
        self._callbacks: dict[Any, int] = {}  # functions of the tests, as the program sees them

    def answer(self, request: dict[str, Any]) -> None:
        """Perform a request and write the reply, with the arguments that a call without a result may have changed."""
        sys.stdout = output = io.StringIO()
        try:
            arguments = decode(request["arguments"], self._resolve)
            keywords = decode(request["keywords"], self._resolve)
            reply = {"value": encode(self._perform(request, arguments, keywords), self._number_of)}
            if reply["value"] is None:
                reply["changed"] = encode([arguments, keywords], self._number_of)
            # A reply that JSON cannot hold is an error of the call. In ``write`` it would end the process.
            json.dumps(reply)
        except BaseException as error:
            reply = describe_exception(error, self._number_of)
        self._channel.write(reply | {"printed": "" if output.closed else output.getvalue()[:LONGEST_PRINT]})

    def _perform(self, request: dict[str, Any], arguments: list[Any], keywords: dict[str, Any]) -> Any:
        if "operation" in request:
            return OPERATIONS[request["operation"]](*arguments)
        target = decode(request["target"], self._resolve)
        if request["attribute"] is not None:
            target = getattr(target, request["attribute"])
        return target(*arguments, **keywords) if request["is_call"] else target

    def _resolve(self, kind: str, content: Any) -> Any:
        if kind != "callback":
            return self._objects[content] if kind == "handle" else self._namespace[content]

        def call(*arguments: Any, **keywords: Any) -> Any:
            return self._ask(content, list(arguments), keywords)

        self._callbacks[call] = content
        return call

    def _number_of(self, value: Any) -> dict[str, int]:
        if isinstance(value, types.FunctionType) and value in self._callbacks:
            return {"callback": self._callbacks[value]}
        return {"handle": self._objects.add(value)}

    def _ask(self, number: int, arguments: list[Any], keywords: dict[str, Any]) -> Any:
        """Return the result of a function of the tests, which may call the program in turn."""
        content = [encode(each, self._number_of) for each in (arguments, keywords)]
        self._channel.write({"callback": number, "arguments": content[0], "keywords": content[1]})
        while "returned" not in (message := self._channel.read()):
            self.answer(message)
        if "error" in message:
            kind = next(kind for name in message["error"] if isinstance(kind := vars(builtins).get(name), type))
            raise kind(*decode(message["arguments"], self._resolve))
        return decode(message["returned"], self._resolve)


class NoInput:
    """The input of a program whose functions are called. A program that reads it has defined them before."""

    def __getattr__(self, name: str = "") -> Any:
        raise EOFError

    __iter__ = __getattr__


def class_names(kind: type) -> list[str]:
    """Return the names of a class and of its bases, with the module if it is in the standard library."""
    names = [f"{each.__module__}.{each.__name__}" for each in kind.__mro__]
    return [name.removeprefix("builtins.").removeprefix("program.") for name in names]


def describe_exception(error: BaseException, number_of: Callable[[Any], Any]) -> dict[str, Any]:
    """Return an exception's classes, arguments, text and attributes, without those that are no plain values."""
    reply: dict[str, Any] = {"error": class_names(type(error)), "arguments": [], "text": "", "state": {}}
    parts = {"arguments": lambda: list(error.args), "text": lambda: str(error), "state": lambda: dict(vars(error))}
    for name, read in parts.items():
        try:
            data = encode(read(), number_of)
            json.dumps(data)
            reply[name] = data
        except BaseException:  # noqa: S112 - of a program
            continue
    return reply


def take(iterator: Any, count: int) -> tuple[list[Any], bool]:
    """Return the next items of an iterator, and True if it has ended."""
    items = [item for _, item in zip(range(count), iterator, strict=False)]
    return items, len(items) < count


def is_equal(first: Any, second: Any) -> bool:
    """Return True for equal objects of the program whose ``__eq__`` reads them.

    An ``__eq__`` that is true for anything, or for any object of its class, has no meaning: it must be false for
    another object, and for copies of the second object with other values of some attribute.
    """
    if first is second:
        return True
    if not differs(first, object()) or differs(first, second):
        return False
    names = [*getattr(second, "__dict__", ()), *getattr(type(second), "__slots__", ())]
    copies = [[changed_copy(second, name, value) for value in other_values(getattr(second, name, 0))] for name in names]
    is_read = any(all(differs(first, changed) for changed in each) for each in copies)
    # Once more, for an ``__eq__`` that counts its calls.
    return is_read and not differs(first, second)


def differs(first: Any, second: Any) -> bool:
    """Return True for objects that are not equal, or cannot be compared."""
    try:
        return not (first == second)  # noqa: SIM201 - ``!=`` may be another method
    except Exception:
        return True


def other_values(value: Any) -> list[Any]:
    """Return an object that equals no other, and if possible a value of the same class as ``value``."""
    others: list[Any] = [object()]
    if isinstance(value, bool):
        others.append(not value)
    elif isinstance(value, (int, float)):
        others.append(value + 1)
    elif isinstance(value, str):
        others.append(f"{value} other")
    elif isinstance(value, (list, tuple)):
        others.append(type(value)([*value, "other"]))
    return others


def changed_copy(value: Any, name: str, other: Any) -> Any:
    """Return a copy of an object with another value of an attribute."""
    try:
        changed = copy.copy(value)
        object.__setattr__(changed, name, other)
        return changed
    except Exception:
        return value


OPERATIONS: dict[str, Callable[..., Any]] = {
    # A copy: a program may change the modules.
    **vars(builtins),
    **vars(operator),
    "equal": is_equal,
    "take": take,
    "copy": copy.copy,
    "deepcopy": lambda value, memory: copy.deepcopy(value),
}


def new_module(name: str) -> dict[str, Any]:
    """Return the namespace of a new module, which has none of this file's names."""
    sys.modules[name] = module = types.ModuleType(name)
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
    sys.meta_path.append(PackageFinder(task["packages"]))
    confine(task)
    channel.write({})
    # Programs may print large integers.
    getattr(sys, "set_int_max_str_digits", int)(0)
    # Until here standard error could tell the parent which limit failed. From here on the program would write to it.
    os.dup2(null, 2)
    if kind == "run":
        run(task)
    elif kind == "serve":
        serve(task, channel)
    else:  # ``grade`` and ``check`` of ``grader.py``, whose text precedes this file's
        globals()[kind](task, channel)


main()
