"""The program of a sandbox as its tests see it: functions and objects that are in another process.

The text of this file precedes ``harness.py`` in the process that has the tests.
"""

from __future__ import annotations

import builtins
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from align.verifiers.sandbox.confined import Channel, Objects, decode, describe_exception, encode

SINGLE_ITEMS = 64
"""Items that are fetched one by one from an iterator; later ones come in batches."""
BATCH = 1024
EXCEPTION_MODULES = ("json.decoder", "decimal", "queue", "_queue", "struct", "re", "dataclasses", "statistics", "csv")
"""Modules of the standard library whose exceptions tests get as they are."""
PREDICATES = ("startswith", "endswith", "issubset", "issuperset", "equals", "match", "fullmatch")
"""Methods with one argument that may be the expected value."""


class Program:
    """The program in another process: requests to it, and what its tests have found out."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._objects: dict[int, Remote] = {}
        self._functions = Objects()
        """Functions of the tests that are arguments."""
        self._exceptions: dict[tuple[str, ...], type[BaseException]] = {}
        self.has_raised = False
        """True if a call has raised an exception."""
        self.unusual_numbers: set[str] = set()
        """Kinds of numbers in results that are neither near nor far from any other: NaN and infinity."""

    def call(self, request: dict[str, Any], arguments: Any = (), keywords: Any = None) -> Any:
        """Return the result of a call or an operation; raise its exception."""
        content = {
            "arguments": encode([*arguments], self._reference),
            "keywords": encode(keywords or {}, self._reference),
        }
        self._channel.write({**request, **content})
        while "callback" in (reply := self._channel.read()):
            self._channel.write(self._call_back(reply))
        sys.stdout.write(str(reply.get("printed", "")))
        if "error" in reply:
            self.has_raised = True
            raise self._exception(reply)
        kinds = set(unusual_numbers(reply["value"]))
        # Inside of a container an infinity may mark what was not reached.
        self.unusual_numbers |= kinds if isinstance(reply["value"], float) else kinds - {"infinity"}
        if reply["value"] is None and "changed" in reply:
            update([[*arguments], keywords or {}], decode(reply["changed"], self._resolve))
        return decode(reply["value"], self._resolve)

    def _call_back(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the result of a function of the tests that the program has called."""
        try:
            function = self._functions[message["callback"]]
            arguments = decode(message["arguments"], self._resolve)
            result = function(*arguments, **decode(message["keywords"], self._resolve))
            return {"returned": encode(result, self._reference)}
        except Exception as error:
            return {"returned": None, **describe_exception(error, self._reference)}

    def _reference(self, value: Any) -> Any:
        """Return the data for an object of the program, or for a function of the tests."""
        if isinstance(value, Remote):
            return vars(value)["_Remote__reference"]
        if not callable(value):
            raise TypeError("the tests pass an object that is no plain value")
        return {"callback": self._functions.add(value)}

    def operate(self, name: str, *arguments: Any) -> Any:
        """Return the result of an operation."""
        return self.call({"operation": name}, arguments)

    def _resolve(self, kind: str, content: Any) -> Any:
        if kind == "callback":
            return self._functions[content]
        if kind != "handle":
            raise TypeError(f"a result has the kind {kind}")
        # An object is always the same one, so ``is`` compares objects of the program.
        if content not in self._objects:
            self._objects[content] = Remote(self, {"handle": content})
        return self._objects[content]

    def exception_class(self, names: tuple[str, ...]) -> type[BaseException]:
        """Return the class of an exception with these names, its own and its bases.

        Only classes of Python are taken by name, so a program cannot choose an exception that ends its tests.
        """
        name, bases = (names[0], names[1:]) if names else ("Exception", ())
        module, _, own_name = name.rpartition(".")
        kind = getattr(builtins, name, None)
        if module in EXCEPTION_MODULES:
            __import__(module)
            kind = getattr(sys.modules[module], own_name, None)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            # A loop over results would take it for their end (PEP 479).
            if issubclass(kind, (StopIteration, StopAsyncIteration)):
                return RuntimeError
            return kind if issubclass(kind, (Exception, SystemExit)) else Exception
        if names not in self._exceptions:
            self._exceptions[names] = type(own_name, (self.exception_class(bases),), {"__str__": own_text})
        return self._exceptions[names]

    def _exception(self, reply: dict[str, Any]) -> BaseException:
        kind = self.exception_class(tuple(map(str, reply["error"])))
        arguments = decode(reply["arguments"], self._resolve) or []
        try:
            error = kind(*arguments)
        except TypeError:  # some need further arguments
            error = kind.__new__(kind)
            error.args = tuple(arguments)
        if kind in self._exceptions.values():
            vars(error).update(decode(reply["state"], self._resolve) or {}, **{"(text)": str(reply["text"])})
        return error


def own_text(error: Any) -> str:
    """Return the text of an exception of the program."""
    return str(vars(error).get("(text)", Exception.__str__(error)))


def unusual_numbers(data: Any) -> Iterator[str]:
    """Yield the kinds of unusual numbers in the JSON data of a value."""
    if isinstance(data, dict):
        text = str(data.get("decimal.Decimal", "")).lower()
        yield from (kind for kind in ("nan", "infinity") if kind in text)
        data = list(data.values())
    if isinstance(data, list):
        for part in data:
            yield from unusual_numbers(part)
    elif isinstance(data, float) and data - data != 0:
        yield "nan" if data != data else "infinity"
    elif isinstance(data, str) and data.strip(" +-").lower() == "nan":
        yield "nan"


def update(old: Any, new: Any) -> None:
    """Copy to the arguments what a call without a result has changed in them."""
    if isinstance(old, list):
        old[:] = [kept(*pair) for pair in zip(old, new, strict=False)] + new[len(old) :]
    elif isinstance(old, dict):
        changed = {key: kept(old.get(key), value) for key, value in new.items()}
        old.clear()
        old.update(changed)
    elif isinstance(old, set):
        old.intersection_update(new)
        old.update(new)
    elif type(old).__name__ in ("deque", "bytearray"):
        old.clear()
        old.extend(new)
    elif type(old).__name__ == "ndarray":
        old[...] = new


def kept(old: Any, new: Any) -> Any:
    """Return the same object with a new content if its class can change."""
    is_changeable = isinstance(old, (list, dict, set)) or type(old).__name__ in ("deque", "bytearray", "ndarray")
    if not is_changeable or type(old) is not type(new):
        return new
    update(old, new)
    return old


def program_of(value: Remote) -> Any:
    """Return the program of an object, whose own attributes are the program's and not these."""
    return vars(value)["_Remote__program"]


def is_same(first: Any, second: Any) -> bool:
    """Return True for one object. Two numbers of the program's processes may mean the same one."""
    if isinstance(first, Remote) and isinstance(second, Remote):
        return bool(program_of(first).operate("is_", first, second))
    return first is second


def class_of(value: Any) -> Any:
    """Return the class of an object, also of an object of the program."""
    return program_of(value).operate("type", value) if isinstance(value, Remote) else type(value)


def complete_zip(lists: tuple[int, ...], *iterables: Any) -> Iterator[Any]:
    """Yield what ``zip`` does. The lists among the iterables must end."""
    count = 0
    for items in zip(*iterables, strict=False):
        count += 1
        yield items
    if count < min(len(iterables[place]) for place in lists):
        raise AssertionError("there are fewer results than expected")


def unlike(item: Any) -> Any:
    """Return another value, of the same class if it can have any content."""
    if isinstance(item, str):
        return f"no {item}"
    number = 987_654_321_012
    return type(item)([number]) if isinstance(item, (list, tuple, set, frozenset)) else number


class Remote:
    """A function, class or object of the program.

    It is never equal to a plain value, nor smaller or larger. The result of its arithmetic with a plain value, which
    may be the expected one, must be an object of the program: otherwise ``abs(x - expected) < limit`` would ask the
    program about its own result. Such an object is *mixed*, and cannot become a number or a truth value.
    """

    def __init__(self, program: Program, reference: dict[str, Any]) -> None:
        vars(self).update(_Remote__program=program, _Remote__reference=reference, _Remote__is_mixed=False)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        request = {"target": self.__reference, "attribute": None, "is_call": True}
        return self.__program.call(request, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__", "__dict__"):
            raise AttributeError(name)
        if name in PREDICATES:
            return lambda *arguments: self._decide(lambda *each: self._call_method(name, *each), *arguments)
        return self.__program.call({"target": self.__reference, "attribute": name, "is_call": False})

    def __setattr__(self, name: str, value: Any) -> None:
        self.__program.operate("setattr", self, name, value)

    def __delattr__(self, name: str) -> None:
        self.__program.operate("delattr", self, name)

    def __eq__(self, other: object) -> Any:
        return self.__program.operate("equal", self, other) if isinstance(other, Remote) else NotImplemented

    def __hash__(self) -> int:
        return int(self.__program.operate("hash", self))

    def __contains__(self, item: Any) -> bool:
        return bool(self._decide(lambda each: self.__program.operate("contains", self, each), item))

    def _decide(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the answer of an object about one value. Raises ``TypeError`` if it is true for any value."""
        if len(arguments) == 1 and not isinstance(arguments[0], Remote):
            try:
                is_arbitrary = function(unlike(arguments[0])) is True
            except Exception:
                is_arbitrary = False
            if is_arbitrary:
                raise TypeError("an object of the program answers yes about any value")
        return function(*arguments)

    def __iter__(self) -> Iterator[Any]:
        iterator = self.__program.operate("iter", self)
        count = 0
        is_ended = False
        while not is_ended:
            items, is_ended = self.__program.operate("take", iterator, 1 if count < SINGLE_ITEMS else BATCH)
            count += len(items)
            yield from items

    def __next__(self) -> Any:
        items, is_ended = self.__program.operate("take", self, 1)
        if is_ended:
            raise StopIteration
        return items[0]

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, Remote) and bool(self.__program.operate("isinstance", value, self))

    def __subclasscheck__(self, kind: Any) -> bool:
        return isinstance(kind, Remote) and bool(self.__program.operate("issubclass", kind, self))

    def __enter__(self) -> Any:
        return self._call_method("__enter__")

    def __exit__(self, *arguments: Any) -> Any:
        return self._call_method("__exit__", None, None, None)

    def _call_method(self, name: str, *arguments: Any) -> Any:
        request = {"target": self.__reference, "attribute": name, "is_call": True}
        return self.__program.call(request, arguments)

    def _convert(self, name: str, *arguments: Any) -> Any:
        """Return the result of a conversion or of an operation with one operand."""
        result = self.__program.operate(name, self, *arguments)
        if self.__is_mixed and not isinstance(result, Remote):
            raise TypeError("a result of the program and a plain value give no number")
        return self._mix(result) if self.__is_mixed else result

    def _combine(self, name: str, first: Any, second: Any) -> Any:
        """Return the result of arithmetic."""
        result = self.__program.operate(name, first, second)
        operands = (first, second)
        if all(isinstance(operand, Remote) and not operand.__is_mixed for operand in operands):
            return result
        if not isinstance(result, Remote):
            raise TypeError("a result of the program and a plain value give no plain value")
        return self._mix(result)

    def _mix(self, result: Remote) -> Remote:
        vars(result)["_Remote__is_mixed"] = True
        return result


def add_operators() -> None:
    """Give ``Remote`` the operators that are asked of the program."""

    def convert(name: str) -> Any:
        return lambda self, *arguments: self._convert(name, *arguments)

    def combine(name: str, is_reflected: bool) -> Any:
        if is_reflected:
            return lambda self, other: self._combine(name, other, self)
        return lambda self, other: self._combine(name, self, other)

    def compare(name: str) -> Any:
        def ask_both(self: Remote, other: Any) -> Any:
            if not isinstance(other, Remote):
                return NotImplemented
            result = self._combine(name, self, other)
            # No order has each object below the other.
            if name in ("lt", "gt") and result is True and self._combine(name, other, self) is True:
                raise TypeError("objects of the program have no order")
            return result

        return ask_both

    def ask(name: str) -> Any:
        return lambda self, *arguments: program_of(self).operate(name, self, *arguments)

    for name in ("bool", "int", "float", "round", "abs", "neg", "pos", "invert"):
        setattr(Remote, f"__{name}__", convert(name))
    for name in (
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "matmul",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    ):
        operation = f"{name}_" if name in ("and", "or") else name
        setattr(Remote, f"__{name}__", combine(operation, False))
        setattr(Remote, f"__r{name}__", combine(operation, True))
        setattr(Remote, f"__i{name}__", combine(f"i{name}", False))
    for name in ("lt", "le", "gt", "ge"):
        setattr(Remote, f"__{name}__", compare(name))
    for name in ("len", "str", "repr", "format", "reversed", "getitem", "setitem", "delitem", "copy", "deepcopy"):
        setattr(Remote, f"__{name}__", ask(name))


add_operators()
