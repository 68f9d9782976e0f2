"""The verifier ``code``: programs against tests, by their output or by asserts, in a sandbox.

Tests by output start the program once for each input. Asserts run in a sandbox of their own, and call the program's
functions in two others (``sandbox/session.py``): no process sees another, and only plain values pass between them
(``sandbox/confined.py``).
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from align.data.final_answers import answer_text
from align.verifiers.sandbox.isolation import Limits, Sandbox
from align.verifiers.sandbox.session import Replicas, SeparateObjects, Session
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


def verify(program: str, tests: ProgramTests, sandbox: Sandbox, limits: Limits) -> Verdict:
    """Return the verdict on a program: it passes all tests, or none counts. Raises ``SandboxFailed``."""
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
        if _lines(output) != _lines(expected):
            return Verdict(0.0, UNEQUAL)
    return RIGHT


def _lines(output: str) -> list[str]:
    """Return the lines of an output without space at their ends, and without empty lines at the end."""
    return [line.rstrip() for line in output.rstrip().splitlines()]


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
        names: list[str] = []
        for solution in solutions:
            solution.begin({"program": program})
            loaded = solution.receive()
            if loaded is None:
                return _failure(solution)
            if "names" not in loaded:
                return Verdict(0.0, UNPARSABLE if loaded.get("error") in SYNTAX_ERRORS else CRASHED)
            # A process of the program has sent this, so its content is not trusted.
            names = [name for name in loaded["names"] if isinstance(name, str)]
        # 2. Start the tests in a process that has none of the program's objects.
        grader.begin({"tests": tests.asserts, "setup": tests.setup, "entry_point": tests.entry_point, "names": names})
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


def _read_verdict(message: dict[str, Any]) -> Verdict:
    if message["verdict"] == "passed":
        return RIGHT
    return Verdict(0.0, UNEQUAL if message["verdict"] == "failed" else CRASHED)
