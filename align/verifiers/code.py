"""The verifier ``code``: programs against tests, by their output or by asserts, in a sandbox.

Tests by output start the program once for each input. Asserts run in a sandbox of their own, and call the program's
functions in two others (``Replicas``): no process sees another, and only plain values pass between them
(``sandbox/confined.py``).
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from align.data.final_answers import answer_text
from align.verifiers.sandbox.isolation import Limits, Sandbox, Session
from align.verifiers.verdict import (
    CRASHED,
    NO_ANSWER,
    RIGHT,
    TIMED_OUT,
    UNEQUAL,
    UNPARSABLE,
    BadReference,
    Verdict,
)

_OPENING = re.compile(r"(?P<fence>(?<!`)`{3,20}|(?<!~)~{3,20})[^\S\n]*(?P<language>[\w+#.-]{0,40})[^\n`]{0,100}\n")
_ITEM_SIGNS = " \t>-*.)0123456789"
"""Signs before the fence of a block in a list or a quotation."""
PYTHON = ("python", "python3", "py")
"""Languages of a block with a program, in small letters."""
SYNTAX_ERRORS = ("SyntaxError", "IndentationError", "TabError")
SYNTAX_EXIT = 3
"""Exit code of ``confined.py`` for a program that is not valid Python."""
MOST_MESSAGES = 1_000_000
LINE_ENDS = " \t\r\n"
"""Space that does not count at the end of an output or a line. No other sign ends a line."""
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_INTEGER = re.compile(r"[+-]?[0-9]+")
CHECKED_AT_ONCE = 50
"""References that one process checks."""


@dataclass(frozen=True)
class ProgramTests:
    """Tests of one row: pairs of input and output, or asserts."""

    cases: tuple[tuple[str, str], ...] = ()
    asserts: tuple[str, ...] = ()
    setup: str = ""
    """Trusted code that asserts need, such as imports."""
    entry_point: str | None = None
    """Function that ``check`` of the asserts gets as its argument."""


def read_tests(reference: Any) -> ProgramTests:
    """Return the tests in a column: a list, a mapping, or text with code or JSON.

    A list of texts has asserts. A list of mappings with ``input`` and ``output``, or a mapping with the lists
    ``inputs`` and ``outputs``, has cases. A mapping with ``test`` (text or a list) has asserts, optionally with
    ``setup`` and ``entry_point``. Raises ``BadReference`` for anything else.
    """
    if isinstance(reference, str):
        text = reference.strip()
        if text[:1] not in ("[", "{"):
            return ProgramTests(asserts=(text,))
        try:
            reference = json.loads(text)
        except (ValueError, RecursionError):
            raise BadReference("begins like JSON and is none") from None
    if isinstance(reference, list) and reference:
        if all(isinstance(item, str) for item in reference):
            return ProgramTests(asserts=tuple(reference))
        if all(isinstance(item, dict) and {"input", "output"} <= set(item) for item in reference):
            return ProgramTests(cases=tuple((_text(item["input"]), _text(item["output"])) for item in reference))
    if isinstance(reference, dict):
        inputs: Any = reference.get("inputs")
        outputs: Any = reference.get("outputs")
        # With ``fn_name`` the inputs are the arguments of a function, and not what a program reads.
        is_paired = isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)
        if is_paired and inputs and not reference.get("fn_name"):
            return ProgramTests(cases=tuple(zip(map(_text, inputs), map(_text, outputs), strict=True)))
        if "test" in reference:
            test = reference["test"]
            setup = reference.get("setup") or ""
            entry_point = reference.get("entry_point")
            return ProgramTests((), tuple(test) if isinstance(test, list) else (str(test),), str(setup), entry_point)
    raise BadReference(
        "has no tests. Write a list of asserts, a list of {input, output}, {inputs: [...], outputs: [...]}, or "
        "{test: ..., setup: ..., entry_point: ...}"
    )


def _text(value: Any) -> str:
    """Return lines as one text, as APPS writes some inputs."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def find_program(text: str, entry_point: str | None = None) -> str:
    """Return the program in an answer: its last block of Python, else the whole text outside thoughts.

    A block without a language counts if no block has Python's name. With ``entry_point`` it is the last block that
    defines this function, if one does.
    """
    answer = answer_text(text)
    if answer is None:
        return ""
    answer = answer.replace("\r\n", "\n")
    fenced = list(_find_blocks(answer))
    blocks = [block for language, block in fenced if language in PYTHON]
    blocks = blocks or [block for language, block in fenced if not language]
    if entry_point:
        blocks = [block for block in blocks if defines(block, entry_point)] or blocks
    return blocks[-1] if blocks else answer


def _find_blocks(answer: str) -> Iterator[tuple[str, str]]:
    """Yield language and content of each block between fences, without the indentation that all its lines have.

    A block that is never closed ends with the answer.
    """
    end = 0
    while (opening := _OPENING.search(answer, end)) is not None:
        language = opening["language"].lower()
        # A list or a quotation puts signs before a fence. After other text, a fence without Python's name only ends a
        # code span.
        before = answer[answer.rfind("\n", 0, opening.start()) + 1 : opening.start()]
        if before.strip(_ITEM_SIGNS) and language not in PYTHON:  # the end of code inside a line
            end = opening.end()
            continue
        closing = re.compile(rf"^[^\S\n]*{opening['fence']}", re.MULTILINE).search(answer, opening.end())
        stop, end = (len(answer), len(answer)) if closing is None else closing.span()
        content = answer[opening.end() : stop].removesuffix("\n")
        yield language, textwrap.dedent(content) if before else content


def defines(program: str, name: str) -> bool:
    """Return True for a program with a line that defines a function of this name."""
    return re.search(rf"^[^\S\n]*(?:async )?def {re.escape(name)}\b", program, re.MULTILINE) is not None


def verify(
    program: str, tests: ProgramTests, sandbox: Sandbox, limits: Limits, tolerance: float | None = None
) -> Verdict:
    """Return the verdict on a program: it passes all tests, or none counts. Raises ``SandboxFailed``.

    With ``tolerance`` a number of an output may differ by this much, absolutely or relative to the expected one.
    """
    if not program.strip():
        return Verdict(0.0, NO_ANSWER)
    if tests.asserts:
        return _verify_asserts(program, tests, sandbox, limits)
    # Each case runs in a new process, so a program cannot keep anything from one case to the next. The expected output
    # never enters the sandbox.
    for content, expected in tests.cases:
        with sandbox.start("run", limits) as session:
            session.begin({"program": program, "stdin": content})
            output = session.read_output()
            if output is None:
                return _failure(session)
        if not _is_equal_output(output, expected, tolerance):
            return Verdict(0.0, UNEQUAL)
    return RIGHT


def _is_equal_output(output: str, expected: str, tolerance: float | None) -> bool:
    """Return True for outputs of equal lines, in which numbers may differ within a tolerance."""
    lines, expected_lines = _lines(output), _lines(expected)
    if lines == expected_lines or tolerance is None:
        return lines == expected_lines
    if len(lines) != len(expected_lines):
        return False
    for line, expected_line in zip(lines, expected_lines, strict=True):
        words, expected_words = line.split(), expected_line.split()
        if len(words) != len(expected_words):
            return False
        if not all(_is_near(*pair, tolerance) for pair in zip(words, expected_words, strict=True)):
            return False
    return True


def _is_near(word: str, expected: str, tolerance: float) -> bool:
    """Return True for equal words, and for two numbers near each other, unless both are integers."""
    if word == expected:
        return True
    if not (_NUMBER.fullmatch(word) and _NUMBER.fullmatch(expected)):
        return False
    if _INTEGER.fullmatch(expected):
        # Only the form may differ: 3.0 for 3. A relative tolerance would accept other large integers.
        return not _INTEGER.fullmatch(word) and abs(float(word) - float(expected)) <= tolerance
    return abs(float(word) - float(expected)) <= tolerance * max(1.0, abs(float(expected)))


def _lines(output: str) -> list[str]:
    """Return the lines of an output without space at their ends, and without empty lines at the end."""
    return [line.rstrip(LINE_ENDS) for line in output.rstrip(LINE_ENDS).split("\n")]


def check_references(
    references: Sequence[ProgramTests], sandbox: Sandbox, limits: Limits, run: Callable[..., Iterable[Any]] = map
) -> list[BadReference | None]:
    """Return what is wrong with each of the tests, or None. ``run`` is ``map``, or a pool's.

    Asserts run with programs that return nothing, or the same object each time. Tests that exceed the limits are
    accepted.
    """
    problems: list[BadReference | None] = [None] * len(references)
    numbers = []
    for number, tests in enumerate(references):
        if tests.asserts:
            numbers.append(number)
        elif not any(expected.strip() for _, expected in tests.cases):
            problems[number] = BadReference("expects no output, so a program that does nothing would pass")
    batches = [numbers[start : start + CHECKED_AT_ONCE] for start in range(0, len(numbers), CHECKED_AT_ONCE)]

    def check(batch: list[int]) -> None:
        while batch:
            with sandbox.start("check", limits) as session:
                session.begin({"references": [_to_json(references[number]) for number in batch]})
                checked = 0
                while checked < len(batch) and (reply := session.receive()) is not None:
                    if reply["problem"]:
                        problems[batch[checked]] = BadReference(str(reply["problem"]))
                    checked += 1
            # The next tests ended the process, or spent the time. As the first of a process they get all of it.
            batch = batch[max(checked, 1) :]

    list(run(check, batches))
    return problems


def _to_json(tests: ProgramTests) -> dict[str, Any]:
    return {"tests": tests.asserts, "setup": tests.setup, "entry_point": tests.entry_point}


def _failure(session: Session) -> Verdict:
    """Return the verdict on a program that gave no result."""
    if session.is_over_time:
        return Verdict(0.0, TIMED_OUT)
    code = session.exit_code()
    # The processor time may have ended between the two.
    if session.is_over_time:
        return Verdict(0.0, TIMED_OUT)
    return Verdict(0.0, UNPARSABLE if code == SYNTAX_EXIT else CRASHED)


def _verify_asserts(program: str, tests: ProgramTests, sandbox: Sandbox, limits: Limits) -> Verdict:
    """Start the program and its tests, and carry their messages.

    Calls alternate between two processes of the program, so that no result can depend on an earlier call. Objects stay
    where they were made; if a call needs two of different processes, the tests start again with one process.
    """
    try:
        return _run_asserts(program, tests, sandbox, limits, 2)
    except SeparateObjects:
        return _run_asserts(program, tests, sandbox, limits, 1)


def _run_asserts(program: str, tests: ProgramTests, sandbox: Sandbox, limits: Limits, count: int) -> Verdict:
    """Run the tests with ``count`` processes of the program. Raises ``SeparateObjects``."""
    with ExitStack() as stack:
        # 1. Load the program in each of its processes.
        solutions = [stack.enter_context(sandbox.start("serve", limits)) for _ in range(count)]
        grader = stack.enter_context(sandbox.start("grade", limits))
        contents: dict[str, Any] = {}
        for solution in solutions:
            solution.begin({"program": program})
            loaded = solution.receive()
            if loaded is None:
                return _failure(solution)
            if "names" not in loaded:
                return Verdict(0.0, UNPARSABLE if loaded.get("error") in SYNTAX_ERRORS else CRASHED)
            contents = _read_contents(loaded)
        # 2. Start the tests in a process that has none of the program's objects.
        grader.begin({**_to_json(tests), **contents})
        # 3. Carry calls and results until the tests have a verdict. The number bounds tests that call without end.
        replicas = Replicas(solutions)
        for _ in range(MOST_MESSAGES):
            message = grader.receive()
            if message is None:
                return _failure(grader)
            if "verdict" in message:
                return _read_verdict(message)
            solution, reply = replicas.ask(message)
            if reply is None:
                return _failure(solution)
            grader.send(reply)
    return Verdict(0.0, TIMED_OUT)


def _read_contents(loaded: dict[str, Any]) -> dict[str, Any]:
    """Return the names in a program. A process of the program has sent them, so they are not trusted."""

    def texts(value: Any) -> list[str]:
        return [name for name in value if isinstance(name, str)] if isinstance(value, list) else []

    def mapping(value: Any) -> dict[str, list[str]]:
        return {name: texts(part) for name, part in value.items()} if isinstance(value, dict) else {}

    calls, exceptions = mapping(loaded.get("calls")), mapping(loaded.get("exceptions"))
    return {"names": texts(loaded["names"]), "calls": calls, "exceptions": exceptions}


def _read_verdict(message: dict[str, Any]) -> Verdict:
    if message["verdict"] == "passed":
        return RIGHT
    return Verdict(0.0, UNEQUAL if message["verdict"] == "failed" else CRASHED)


class SeparateObjects(Exception):
    """A call needs objects of different processes."""


class Replicas:
    """Processes of one program, among which the calls of its functions alternate.

    A function that answers from what an earlier call stored, such as the argument of ``encode`` for the result of
    ``decode``, gives another result in a process that has not seen that call. An object of the program's class stays in
    the process that made it, and so do the calls of its methods. Tests see one number for each object.
    """

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions
        self._calls = 0
        self._callers: list[int] = []
        """Processes that wait for the result of a function of the tests."""

    def ask(self, request: dict[str, Any]) -> tuple[Session, dict[str, Any] | None]:
        """Return the process that a request went to, and its reply; None if there is none.

        Raises ``SeparateObjects``.
        """
        # Tests see the number ``own number * count + index of the process``, so its remainder tells which process has
        # the object.
        count = len(self._sessions)
        owners = {handle % count for handle in _handles(request)}
        if "returned" in request:
            owners.add(self._callers.pop())
        if len(owners) > 1:
            raise SeparateObjects
        if owners:
            index = owners.pop()
        else:
            index = self._calls % count
            self._calls += 1
        session = self._sessions[index]
        reply = None
        if session.send(_renumber(request, lambda handle: handle // count)):
            reply = session.receive()
        if reply and "callback" in reply:
            self._callers.append(index)
        try:
            return session, reply and _renumber(reply, lambda handle: handle * count + index)
        except RecursionError:
            return session, None


def _handles(data: Any) -> Iterator[int]:
    """Yield the numbers of the objects in a message."""
    if isinstance(data, dict):
        if isinstance(data.get("handle"), int):
            yield data["handle"]
        for value in data.values():
            yield from _handles(value)
    elif isinstance(data, list):
        for value in data:
            yield from _handles(value)


def _renumber(data: Any, number: Callable[[int], int]) -> Any:
    """Return a message whose objects have other numbers."""
    if isinstance(data, dict):
        return {
            key: number(value) if key == "handle" and isinstance(value, int) else _renumber(value, number)
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [_renumber(value, number) for value in data]
    return data
