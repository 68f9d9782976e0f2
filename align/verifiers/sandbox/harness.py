"""Preparation of tests: counters of their comparisons, helpers that they lack, and a replacement of pytest.

The text of this file precedes ``grader.py`` in the process that has the tests. Of pytest there are ``raises``,
``approx``, ``fail``, ``skip``, ``param``, fixtures, and the marks ``parametrize``, ``skip``, ``skipif`` and ``xfail``.
"""

from __future__ import annotations

import ast
import re
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from align.verifiers.sandbox.remote import Remote

UNUSUAL_NUMBERS = {
    "nan": re.compile(r"[+-]?(is_?|equal_?)?nan(_ok)?", re.IGNORECASE),
    "infinity": re.compile(r"[+-]?(is_?)?inf(inity)?|isfinite", re.IGNORECASE),
}
"""Names and texts in tests that expect such a number."""
PROGRAM_MODULES = re.compile(
    r"((my_|your_)?(solution|module)s?|program|main|submission|candidate|answer|code|implementation|student)"
)
"""Modules from which tests import what the program defines."""


class Instruments(ast.NodeTransformer):
    """Adds calls to tests that tell which of their comparisons are executed.

    Comparisons are asserts, conditions of ``raise``, and functions such as ``assertEqual``. A loop with comparisons,
    ``all`` and ``any`` must have items, and ``zip`` must use up a list that the tests write. ``is`` and ``type`` are
    asked of the program.
    """

    def __init__(self) -> None:
        self.places = 0
        """Comparisons in the tests."""
        self.loops = 0

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        """Put a call before an assert."""
        self.generic_visit(node)
        return [self._count(node), node]

    def visit_If(self, node: ast.If) -> list[ast.stmt]:
        """Put a call before the condition of a ``raise``."""
        is_condition = any(isinstance(each, ast.Raise) for each in node.body)
        self.generic_visit(node)
        return [self._count(node), node] if is_condition else [node]

    def visit_Raise(self, node: ast.Raise) -> ast.stmt:
        """Count a place that only a wrong program may reach."""
        self.places += 1
        return node

    def visit_For(self, node: ast.For) -> ast.stmt:
        """Watch the items of a loop with comparisons."""
        before = self.places
        self.generic_visit(node)
        if self.places > before:
            node.iter = self._watch(node.iter)
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        """Ask the program if two of its objects are the same one."""
        self.generic_visit(node)
        constants = [side for side in (node.left, *node.comparators) if isinstance(side, ast.Constant)]
        if len(node.ops) > 1 or constants or not isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            return node
        call = _call(node, "(is)", node.left, node.comparators[0])
        return call if isinstance(node.ops[0], ast.Is) else ast.copy_location(ast.UnaryOp(ast.Not(), call), node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Replace ``zip`` and ``type``, watch the items of ``all`` and ``any``, and count functions that compare."""
        self.generic_visit(node)
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        lists = [place for place, each in enumerate(node.args) if isinstance(each, (ast.List, ast.Tuple))]
        if name.startswith("assert") or name in ("raises", "fail"):
            self.places += 1
            return _call(node, "(count)", node)
        if not isinstance(node.func, ast.Name) or node.keywords:
            return node
        if name in ("all", "any") and any(isinstance(each, (ast.GeneratorExp, ast.ListComp)) for each in node.args):
            node.args = [self._watch(each) for each in node.args]
        if name == "zip" and lists:
            return _call(node, "(zip)", ast.Tuple([ast.Constant(place) for place in lists], ast.Load()), *node.args)
        return _call(node, "(type)", *node.args) if name == "type" and len(node.args) == 1 else node

    def _watch(self, items: ast.expr) -> ast.expr:
        self.loops += 1
        return _call(items, "(items)", ast.Constant(self.loops), items)

    def _count(self, node: ast.stmt) -> ast.stmt:
        self.places += 1
        return ast.copy_location(ast.Expr(ast.Call(ast.Name("(count)", ast.Load()), [], [])), node)


def _call(node: ast.expr, name: str, *arguments: ast.expr) -> ast.expr:
    return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), list(arguments), []), node)


class Helpers:
    """Finds functions that decide about results of other functions of the program: ``assert close(area(2), 12.57)``.

    A function that the tests also call with plain values has a test that expects something of it, and a function that
    must be both true and false needs more than a constant.
    """

    def __init__(self, trees: Sequence[ast.Module]) -> None:
        self._nodes = [node for tree in trees for node in ast.walk(tree)]
        self._missing: set[str] = set()
        self._modules: set[str] = set()
        self._results: set[str] = set()
        """Variables with results of the program."""

    def find(self, missing: set[str], modules: set[str]) -> set[str]:
        """Return these functions among the names that the tests lack, or that they take from modules."""
        self._missing = missing
        self._modules = modules
        for node in self._nodes:
            if isinstance(node, (ast.Assign, ast.For, ast.comprehension)):
                value = node.value if isinstance(node, ast.Assign) else node.iter
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(self._called(each) for each in ast.walk(value)):
                    self._results |= {
                        name for each in targets for part in ast.walk(each) for name in stored_names(part)
                    }
        decisions = [decision for node in self._nodes for decision in self._decisions(node)]
        expected = {name for node in self._nodes if (name := self._called(node)) and not self._uses_results(node)}
        both = {name for name, _ in decisions if {(name, True), (name, False)} <= set(decisions)}
        return {name for name, _ in decisions} - expected - both

    def _called(self, node: ast.AST) -> str | None:
        """Return the name of a function of the program that is called, or of its class if it is a class's."""
        if not isinstance(node, ast.Call):
            return None
        owner = None
        if isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id in self._modules:
                return node.func.attr
        # The call of a class makes an argument.
        name = getattr(owner or node.func, "id", "")
        return name if name in self._missing and name[0].isupper() == (owner is not None) else None

    def _uses_results(self, call: ast.AST) -> bool:
        """Return True for a call with the result of another function of the program."""
        nodes = list(ast.walk(call))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        return bool(names & self._results or {self._called(node) for node in nodes} - {None, self._called(call)})

    def _decisions(self, node: ast.AST) -> Iterator[tuple[str, bool]]:
        """Yield the functions whose result an assert, a condition or a statement depends on, and what it must be."""
        if isinstance(node, (ast.Assert, ast.If)):
            yield from self._truths(node.test, isinstance(node, ast.Assert))
        elif isinstance(node, ast.Expr):
            yield from self._truths(node.value, True)
        elif (
            isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("assertTrue", "assertFalse") and node.args
        ):
            yield from self._truths(node.args[0], node.func.attr == "assertTrue")  # type: ignore[attr-defined]

    def _truths(self, value: ast.expr, is_true: bool) -> Iterator[tuple[str, bool]]:
        """Yield the functions whose result is a truth value, or is smaller or larger than a limit."""
        name = self._called(value)
        if name is not None and self._uses_results(value):
            yield name, is_true
        elif isinstance(value, ast.UnaryOp):
            yield from self._truths(value.operand, is_true != isinstance(value.op, ast.Not))
        elif isinstance(value, ast.BoolOp):
            for part in value.values:
                yield from self._truths(part, is_true)
        elif isinstance(value, ast.Compare):
            constants = [each.value for each in value.comparators if isinstance(each, ast.Constant)]
            if isinstance(value.ops[0], (ast.Lt, ast.LtE, ast.Gt, ast.GtE)) or constants in ([True], [False]):
                for part in (value.left, *value.comparators):
                    yield from self._truths(part, is_true != (constants == [False]))
        elif isinstance(value, ast.Call) and value.args and isinstance(value.args[0], (ast.GeneratorExp, ast.ListComp)):
            yield from self._truths(value.args[0].elt, is_true)


def names_number(node: ast.AST, kind: str) -> bool:
    """Return True for a name or a text of tests that expect a NaN, or an infinity."""
    fields = [getattr(node, field, None) for field in ("id", "attr", "value", "arg", "name")]
    return any(isinstance(field, str) and UNUSUAL_NUMBERS[kind].fullmatch(field) for field in fields)


def stored_names(node: ast.AST) -> Iterator[str]:
    """Yield the names that a part of the tests defines."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)) and node.name:
        yield node.name
    elif isinstance(node, ast.alias):
        yield (node.asname or node.name).partition(".")[0]
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, (ast.MatchAs, ast.MatchStar)) and node.name:
        yield node.name


# ---- a replacement of pytest ----


class Skipped(Exception):
    """A test skips itself."""


class Raises:
    """The context of ``pytest.raises``, with the exception in ``value``."""

    def __init__(self, expected: Any, match: str | None = None) -> None:
        self._expected = expected
        self._match = match
        self.value: BaseException | None = None

    def __enter__(self) -> Raises:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        if error is None:
            raise AssertionError("no exception")
        if not isinstance(error, self._expected):
            return False
        self.value = error
        if self._match is not None and not re.search(self._match, str(error)):
            raise AssertionError("the exception has another text")
        return True

    @property
    def type(self) -> Any:
        """Class of the exception."""
        return type(self.value)


def raises(expected: Any, *arguments: Any, match: str | None = None, **keywords: Any) -> Raises:
    """Return a context, or call a function in it."""
    context = Raises(expected, match)
    if arguments:
        with context:
            arguments[0](*arguments[1:], **keywords)
    return context


class Approximate:
    """A number, or a sequence or mapping of numbers, that equals what is near it. A NaN equals no number."""

    def __init__(self, expected: Any, rel: float | None = None, abs: float | None = None, nan_ok: bool = False) -> None:
        self._expected = expected
        self._relative = 1e-6 if rel is None and abs is None else rel or 0.0
        self._absolute = 1e-12 if abs is None else abs
        self._accepts_nan = nan_ok

    def __eq__(self, other: object) -> bool:
        return self._is_near(self._expected, other)

    __hash__ = None  # type: ignore[assignment]

    def _is_near(self, expected: Any, value: Any) -> bool:
        if isinstance(expected, dict):
            is_same = isinstance(value, dict) and set(value) == set(expected)
            return is_same and all(self._is_near(expected[key], value[key]) for key in expected)
        if isinstance(expected, (list, tuple)):
            is_same = isinstance(value, (list, tuple)) and len(value) == len(expected)
            return is_same and all(map(self._is_near, expected, value))
        if isinstance(value, (Remote, str)) or value is None:
            return False
        if expected != expected:
            return self._accepts_nan and bool(value != value)
        limit = max(self._relative * abs(expected), self._absolute)
        return bool(value == expected or abs(value - expected) <= limit)


class Marks:
    """``pytest.mark``: marks without a meaning here have no effect."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def mark(*arguments: Any, **keywords: Any) -> Any:
            if len(arguments) == 1 and isinstance(arguments[0], (types.FunctionType, type)) and not keywords:
                return mark()(arguments[0])

            def decorate(function: Any) -> Any:
                function.is_skipped = name in ("skip", "xfail") or (name == "skipif" and bool(arguments[0]))
                return function

            return decorate

        return mark

    @staticmethod
    def parametrize(names: Any, values: Any, **keywords: Any) -> Callable[..., Any]:
        """Add parameters to a function; several marks multiply."""
        listed = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

        def decorate(function: Any) -> Any:
            rows = [dict(zip(listed, [row] if len(listed) == 1 else row, strict=True)) for row in values]
            others = getattr(function, "parameters", [{}])
            function.parameters = [{**other, **row} for other in others for row in rows]
            return function

        return decorate


def replace_pytest() -> types.ModuleType:
    """Return the module ``pytest``."""

    def fail(reason: str = "") -> None:
        raise AssertionError(reason)

    def skip(reason: str = "") -> None:
        raise Skipped(reason)

    def fixture(function: Any = None, **keywords: Any) -> Any:
        if function is None:
            return fixture
        function.is_fixture = True
        return function

    def param(*values: Any, **keywords: Any) -> Any:
        return values if len(values) > 1 else values[0]

    module = types.ModuleType("pytest")
    module.__dict__.update(raises=raises, approx=Approximate, mark=Marks(), fail=fail, skip=skip)
    module.__dict__.update(fixture=fixture, param=param)
    return module


def argument_names(function: Any) -> list[str]:
    """Return the names of the arguments of a function or of a bound method, without those that have a default."""
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]
    count = len(names) - len(function.__defaults__ or ())
    return list(names[isinstance(function, types.MethodType) : count])
