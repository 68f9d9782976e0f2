"""Tests of a program inside a sandbox: asserts, functions and classes of pytest and unittest, and ``check(candidate)``.

The texts of ``remote.py``, ``harness.py`` and this file precede ``confined.py`` in the process that has the tests. The
program is in another process, and ``Remote`` stands for its functions and objects.
"""

from __future__ import annotations

import ast
import builtins
import io
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from align.verifiers.sandbox.confined import Channel, class_names, new_module
    from align.verifiers.sandbox.harness import (
        PROGRAM_MODULES,
        UNUSUAL_NUMBERS,
        Helpers,
        Instruments,
        Skipped,
        argument_names,
        names_number,
        replace_pytest,
        stored_names,
    )
    from align.verifiers.sandbox.remote import Program, Remote, class_of, complete_zip, is_same


class Constant:
    """A function of a program that always returns the same, or a class whose objects differ."""

    def __init__(self, result: Any, is_class: bool) -> None:
        self._result = result
        self._is_class = is_class

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._result if self._result is None or not self._is_class else object()


# ---- the tests ----


class BadTests(Exception):
    """The tests cannot decide about any program."""


class Tests:
    """The tests of a program: their code, the names that they lack, and the functions that they define."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.count = 0
        """Comparisons that were executed."""
        self.instruments = Instruments()
        self.entry_point: str | None = task["entry_point"]
        self._modules: set[str] = set()
        self.trees = [self._without_program_imports(ast.parse(test)) for test in task["tests"]]
        setup = ast.parse(task["setup"])
        nodes = [node for tree in (*self.trees, setup) for node in ast.walk(tree)]
        imports = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imports |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        self._imports_all = any(isinstance(node, ast.alias) and node.name == "*" for node in nodes)
        self.expected_numbers = {name for name in UNUSUAL_NUMBERS for node in nodes if names_number(node, name)}
        self.helpers = Helpers(self.trees)
        self._loops: dict[int, bool] = {}
        """Number of a loop, or of a call of ``all``, that has ended -> True if it has had an item."""
        # A test file is run as a program, so a guard of ``__main__`` is true.
        self.namespace = new_module("__main__")
        tools = {"(count)": self._count, "(items)": self._items, "(zip)": complete_zip}
        self.namespace.update(tools, **{"(is)": is_same, "(type)": class_of})
        if "pytest" in imports:
            sys.modules["pytest"] = replace_pytest()
        if "unittest" in imports:
            import unittest

            unittest.main = lambda *arguments, **keywords: None  # type: ignore[misc,assignment]
        exec(self._compile(setup, "setup.py"), self.namespace)  # noqa: S102
        self.missing = self._find_missing()

    def _without_program_imports(self, tree: ast.Module) -> ast.Module:
        """Return tests in which ``from solution import f`` is gone, so ``f`` is a name that they lack."""
        body: list[ast.stmt] = []
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and PROGRAM_MODULES.fullmatch(node.module or ""):
                renamed = [alias for alias in node.names if alias.asname]
                body += [ast.parse(f"{alias.asname} = {alias.name}").body[0] for alias in renamed]
            elif isinstance(node, ast.Import) and PROGRAM_MODULES.fullmatch(node.names[0].name):
                self._modules.add(node.names[0].asname or node.names[0].name)
            else:
                body.append(node)
        return ast.Module(body, [])

    @property
    def has_empty_loop(self) -> bool:
        """True if a loop with comparisons, ``all`` or ``any`` never had an item."""
        return not all(self._loops.values())

    def _count(self, value: Any = None) -> Any:
        self.count += 1
        return value

    def _items(self, number: int, values: Any) -> Iterator[Any]:
        for value in values:
            self._loops[number] = True
            yield value
        self._loops.setdefault(number, False)

    def _compile(self, tree: ast.Module, name: str) -> types.CodeType:
        return compile(ast.fix_missing_locations(self.instruments.visit(tree)), name, "exec")

    def _find_missing(self) -> set[str]:
        """Return the names that the tests use, and that neither they, nor the setup, nor Python define.

        A program must not replace ``abs`` or ``math`` in its tests, so these are Python's.
        """
        stored = {name for tree in self.trees for node in ast.walk(tree) for name in stored_names(node)}
        nodes = [node for tree in self.trees for node in ast.walk(tree)]
        missing = {node.id for node in nodes if isinstance(node, ast.Name)} - stored
        called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        for name in missing & sys.stdlib_module_names - set(self.namespace) - called - self._modules:
            self.namespace[name] = __import__(name)
        return {name for name in missing if name not in self.namespace and not hasattr(builtins, name)}

    def refuse_helpers(self) -> None:
        """Raise ``BadTests`` for a function that the tests need and that only the program could define.

        With an entry point it is any function that the tests call by another name. Otherwise it is a function that
        decides about the result of another one: ``assert close(area(2), 12.57)``.
        """
        if self.entry_point:
            used = {node.id for node in ast.walk(ast.parse(self.entry_point)) if isinstance(node, ast.Name)}
            names = {name for name in self.missing - used if not name[0].isupper()} - {"candidate"}
        else:
            names = self.helpers.find(self.missing, self._modules)
        if names:
            raise BadTests(f"needs {', '.join(sorted(names))}, which only the program could define; add it to `setup`")

    def run(self, names: dict[str, Any], candidate: Any) -> None:
        """Run everything; raises what the tests raise. ``names`` are the program's functions and classes."""
        self.namespace.update({name: names[name] for name in self.missing if name in names})
        self.namespace.update({module: types.SimpleNamespace(**names) for module in self._modules})
        if "candidate" in self.missing:
            self.namespace["candidate"] = candidate
        # A test that expects any exception would accept a NameError.
        lacking = {name for name in self.missing - set(self.namespace) if name != self.entry_point}
        if lacking and not self._imports_all:
            raise NameError(f"the program does not define {', '.join(sorted(lacking))}")
        if self.entry_point:
            if self.entry_point.isidentifier():
                self.namespace[self.entry_point] = candidate
            elif not isinstance(candidate, Constant):
                candidate = eval(self.entry_point, {**self.namespace, **names})  # noqa: S307
        # The function ``check`` is called unless the tests do so.
        calls = [node.func for tree in self.trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
        is_checked = any(getattr(call, "id", "") == "check" for call in calls)
        for code in [self._compile(tree, "tests.py") for tree in self.trees]:
            exec(code, self.namespace)  # noqa: S102
        if isinstance(check := self.namespace.get("check"), types.FunctionType) and not is_checked:
            check(candidate)
        for name, value in list(self.namespace.items()):
            if isinstance(value, type) and value.__module__ == "__main__":
                self._run_class(name, value)
            elif isinstance(value, types.FunctionType) and name.startswith("test"):
                self._run_function(value, {"candidate": candidate})

    def run_constant(self, result: Any) -> None:
        """Run everything with a program whose functions return ``result``."""
        self.run({name: Constant(result, name[0].isupper()) for name in self.missing}, Constant(result, False))

    def _run_class(self, name: str, kind: type) -> None:
        """Run a class of unittest, or of pytest if its name begins with ``Test``."""
        if getattr(kind, "is_skipped", False):
            return
        unittest = sys.modules.get("unittest")
        if unittest is not None and issubclass(kind, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(kind).run(result)
            if result.failures or result.unexpectedSuccesses:
                raise AssertionError(name)
            if result.errors:
                raise RuntimeError(name)
        elif name.startswith("Test"):
            run_if_present(kind, "setup_class")
            for method in [method for method in dir(kind) if method.startswith("test")]:
                instance = kind()
                run_if_present(instance, "setup_method")
                for parameters in getattr(kind, "parameters", [{}]):
                    self._run_function(getattr(instance, method), parameters)
                run_if_present(instance, "teardown_method")

    def _run_function(self, function: Any, values: dict[str, Any]) -> None:
        """Run a function of pytest, once for each set of its parameters."""
        if getattr(function, "is_skipped", False):
            return
        for parameters in getattr(function, "parameters", [{}]):
            output = sys.stdout
            try:
                given = {**values, **parameters}
                function(**{name: self._argument(name, given) for name in argument_names(function)})
            except Skipped:
                continue
            finally:
                sys.stdout = output

    def _argument(self, name: str, values: dict[str, Any]) -> Any:
        """Return a parameter, the candidate, or the value of a fixture."""
        if name in values:
            return values[name]
        if name == "capsys":
            return Captured()
        fixture: Any = self.namespace.get(name)
        if not getattr(fixture, "is_fixture", False):
            raise BadTests(f"has a test with the argument {name}, which no fixture gives")
        value = fixture(**{each: self._argument(each, values) for each in argument_names(fixture)})
        return next(value) if isinstance(value, types.GeneratorType) else value


class Captured:
    """The fixture ``capsys``: what the program has printed since the last call of ``readouterr``."""

    def __init__(self) -> None:
        sys.stdout = self._output = io.StringIO()

    def readouterr(self) -> Any:
        """Return the output, and an empty text for errors."""
        text = self._output.getvalue()
        sys.stdout = self._output = io.StringIO()
        return types.SimpleNamespace(out=text, err="")


def run_if_present(instance: Any, name: str) -> None:
    """Call a method if there is one; the method of a test that it may expect is not known."""
    function = getattr(instance, name, lambda: None)
    function(*(None for _ in argument_names(function)))


def grade(task: dict[str, Any], channel: Channel) -> None:
    """Execute tests against functions that run in another process, and report the verdict."""
    program = Program(channel)
    names: dict[str, Any] = {name: Remote(program, {"global": name}) for name in task["names"]}
    names |= {name: program.exception_class(tuple(bases)) for name, bases in task["exceptions"].items()}
    candidate = names.get(task["entry_point"] or find_candidate(task["calls"]))
    try:
        tests = Tests(task)
        if task["entry_point"]:
            used = {node.id for node in ast.walk(ast.parse(task["entry_point"])) if isinstance(node, ast.Name)}
            names = {name: value for name, value in names.items() if name in used or name[0].isupper()}
        tests.run(names, candidate)
        # A result that is empty, or a NaN, must not pass without a comparison.
        is_compared = (tests.count > 0 or program.has_raised) and not tests.has_empty_loop
        is_right = is_compared and program.unusual_numbers <= tests.expected_numbers
        channel.write({"verdict": "passed" if is_right else "failed"})
    except AssertionError:
        channel.write({"verdict": "failed"})
    except BaseException as error:
        channel.write({"verdict": "raised", "error": class_names(type(error))[0]})


def find_candidate(calls: dict[str, list[str]]) -> str:
    """Return the last function that no other function of the program calls, ``main`` not counted; else the last one.

    ``calls`` has the names that each function uses.
    """
    others = {name: set(used) - {name} for name, used in calls.items() if name != "main"}
    roots = [name for name in others if not any(name in used for used in others.values())]
    return next(reversed(roots or list(calls)), "")


def check(task: dict[str, Any], channel: Channel) -> None:
    """Write for each of several tests what is wrong with them, or an empty text."""
    for reference in task["references"]:
        try:
            channel.write({"problem": find_problem(reference)})
        except BaseException as error:  # tests that end Python
            channel.write({"problem": f"ends with {type(error).__name__}"})


def find_problem(task: dict[str, Any]) -> str:
    """Return why tests cannot decide about a program; empty if they can."""
    tests = None
    try:
        tests = Tests(task)
        tests.refuse_helpers()
        tests.run_constant(None)
    except SyntaxError as error:
        return f"has tests that are no Python: {error.msg}"
    except ImportError as error:
        return f"needs what the sandbox lacks: {error}; name packages with `packages`"
    except BadTests as error:
        return str(error)
    except NameError as error:
        return f"cannot run: {error}"
    except BaseException:  # They refuse a program that returns nothing.
        return "" if tests is not None and tests.instruments.places else "has no assert"
    if not tests.count:
        return "executes no assert on a program that returns nothing, so any program would pass"
    # A function may be right to return nothing, but not to return anything.
    try:
        Tests(task).run_constant(object())
    except BaseException:
        return ""
    return "passes a program that returns nothing, and a program that returns any object"
