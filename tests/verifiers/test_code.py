"""The program in an answer, and the processes that a program's calls alternate between."""

from __future__ import annotations

import time
from typing import Any

import pytest

from align.config.validation import validate
from align.config.verifiers import EnvironmentVerifier
from align.errors import UserError
from align.scoring.verifiers import open_verifier
from align.verifiers.code import Replicas, SeparateObjects, check_references, find_program, read_tests
from align.verifiers.sandbox.isolation import Limits, open_sandbox

OTHER = "```\n6\n```"


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("f = 1", "f = 1"),
        ("```python\nf = 1\n```", "f = 1"),
        ("```PY\nf = 1", "f = 1"),
        ("~~~python3\nf = 1\n~~~", "f = 1"),
        ("```\nf = 1\n```", "f = 1"),
        ("Here: ```python\nf = 1\n```", "f = 1"),
        ("```python\r\nf = 1\r\ng = 2\r\n```", "f = 1\ng = 2"),
        (f"```python\nf = 1\n```\n{OTHER}", "f = 1"),
        (f"{OTHER}\n```text\n7\n```", "6"),
        ("```bash\nls\n```\n```python\nf = 1\n```", "f = 1"),
        ("```python\nf = 0\n```\n```python\nf = 1\n```", "f = 1"),
        ("1. So:\n   ```python\n   if f:\n       f = 1\n   ```", "if f:\n    f = 1"),
        ("Use ```f``` here\n```python\nf = 1\n```", "f = 1"),
        ("````python\nf = '''\n```\n'''\n````", "f = '''\n```\n'''"),
        ("```python\n```", ""),
        ("<think>```python\nf = 0\n```</think>No.", "No."),
        ("<think>```python\nf = 0\n```", ""),
    ],
)
def test_program_is_the_last_block_of_python(answer: str, program: str) -> None:
    assert find_program(answer) == program


@pytest.mark.parametrize("piece", ["~~~ ", "```", "```python\n", "~~~\n```\n", "1. ```text\n"])
def test_long_answers_take_linear_time(piece: str) -> None:
    started = time.process_time()
    find_program(piece * 20_000)
    assert time.process_time() - started < 5


def test_block_with_the_entry_point_is_the_program() -> None:
    assert find_program("```python\ndef f(): 1\n```\n```python\nf()\n```", "f") == "def f(): 1"


class EchoSession:
    """A process that returns an object with the next number for each call, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> bool:
        self.requests.append(message)
        return True

    def receive(self) -> dict[str, Any]:
        return {"value": {"list": [{"handle": len(self.requests) - 1}]}}


def test_calls_alternate_and_objects_stay_in_their_process() -> None:
    sessions = [EchoSession(), EchoSession()]
    replicas = Replicas(sessions)  # type: ignore[arg-type]
    numbers = []
    for _ in range(4):
        _, reply = replicas.ask({"name": "f", "arguments": {"list": []}})
        assert reply is not None
        numbers.append(reply["value"]["list"][0]["handle"])
    assert numbers == [0, 1, 2, 3]
    assert [len(session.requests) for session in sessions] == [2, 2]
    session, _ = replicas.ask({"handle": 3, "attribute": "g"})
    assert session is sessions[1] and sessions[1].requests[-1]["handle"] == 1
    with pytest.raises(SeparateObjects):
        replicas.ask({"name": "f", "arguments": {"list": [{"handle": 0}, {"handle": 1}]}})


UNITTEST = "import unittest\nclass T(unittest.TestCase):\n    def {}(self):\n        self.assertEqual(f(1), 2)"


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        (" ", "executes no assert"),
        ("# assert f(1) == 2", "executes no assert"),
        (["f(1) == 2"], "executes no assert"),
        (["print(f(1) + 1)"], "has no assert"),
        ("if f(1) != 2:\n    print('no')", "executes no assert"),
        ("def run():\n    assert f(1) == 2", "executes no assert"),
        ("async def test_f():\n    assert f(1) == 2", "executes no assert"),
        ("def test_f():\n    return f(1) == 2", "executes no assert"),
        ("import pytest\n@pytest.mark.skip\ndef test_f():\n    assert f(1) == 2", "executes no assert"),
        (UNITTEST.format("f_test"), "executes no assert"),
        ({"test": "def verify(candidate):\n    assert candidate(1) == 2", "entry_point": "f"}, "executes no assert"),
        ({"test": "", "entry_point": "f"}, "executes no assert"),
        (["assert (f(1) == 2, 'message')"], "any object"),
        ("try:\n    assert f(1) == 2\nexcept AssertionError:\n    pass", "any object"),
        (["assert callable(f)"], "any object"),
        (["assert close(f(1), 2)"], "needs close"),
        (["result = f(1)\nassert close(result, 2)"], "needs close"),
        (["assert distance(f(1), 2) < 0.1"], "needs distance"),
        (["assert all(close(a, b) for a, b in zip(f(1), [2]))"], "needs close"),
        ({"test": "def check(candidate):\n    assert close(candidate(1), 2)", "entry_point": "f"}, "needs close"),
        (["assert Math.close(f(1), 2)"], "needs Math"),
        (["import solution\nassert solution.close(solution.f(1), 2)"], "needs close"),
        (["assert f(3) == expected(3)"], "any object"),
        (["assert f(1) == = 2"], "no Python"),
        (["import no_such_package\nassert f(1) == 2"], "`packages`"),
        (["def test_f(page): assert f(page)"], "no fixture"),
        ([{"input": "1", "output": " "}], "expects no output"),
    ],
)  # fmt: skip
def test_tests_that_decide_nothing_are_refused(reference: Any, problem: str) -> None:
    (error,) = check_references([read_tests(reference)], open_sandbox(None, "test"), Limits())
    assert error is not None and problem in str(error)


@pytest.mark.parametrize(
    "reference",
    [
        ["assert f(1) == 2"],
        ["assert find([1], 2) is None"],
        ["assert Item(1) == make(1)"],
        ["if f(1) != 2:\n    raise ValueError"],
        ["assert decode(encode('a')) == 'a'"],
        ["try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    raise AssertionError"],
        ["assert is_prime(next_prime(8))", "assert is_prime(7)"],
        ["root = insert(None, 5)\nassert search(root, 5)\nassert not search(root, 7)"],
        {"test": "assert close(f(1), 2)", "setup": "def close(a, b): return abs(a - b) < 0.1"},
        UNITTEST.format("test_f"),
        "from solution import f\n\ndef test_f():\n    assert f(1) == 2",
        [{"input": "1", "output": "2"}],
    ],
)
def test_tests_that_decide_are_accepted(reference: Any) -> None:
    assert check_references([read_tests(reference)], open_sandbox(None, "test"), Limits()) == [None]


def test_references_behind_one_that_hangs_are_checked() -> None:
    references = [["while True: pass"], ["import os\nos._exit(0)"], ["f(1)"], ["assert f(1) == 2"]]
    errors = check_references(list(map(read_tests, references)), open_sandbox(None, "test"), Limits(seconds=0.5))
    assert [error is not None for error in errors] == [False, False, True, False]


def verdict(tests: Any, program: str, **fields: Any) -> str:
    config = validate(EnvironmentVerifier, {"code": "tests", **fields}, "p.yaml")
    (verdict,) = open_verifier(config, "score").verify([{"id": "7", "tests": tests}], [program])
    return verdict.reason or "right"


def test_scorer_refuses_a_reference_and_names_its_row() -> None:
    with pytest.raises(UserError, match="score.code: row 7: the reference .* executes no assert"):
        verdict("# no test", "def f(): pass")


@pytest.mark.parametrize(
    ("tests", "program", "expected"),
    [
        ("assert np.allclose(f(np.ones(2)), [2, 2])", "def f(x): return 2 * x", "right"),
        ("np.testing.assert_allclose(f(2), np.eye(2))", "import numpy\ndef f(n): return numpy.ones((n, n))", "unequal"),
        ("assert not (abs(f() - 1) > 0.1).any()", "import numpy\ndef f(): return numpy.full(2, numpy.nan)", "unequal"),
        ("a = np.zeros(2)\nf(a)\nassert (a == 1).all()", "def f(a): a[:] = 1", "right"),
    ],
)
def test_programs_import_the_packages_that_are_named(tests: str, program: str, expected: str) -> None:
    pytest.importorskip("numpy")
    assert verdict(f"import numpy as np\n{tests}", program, packages=["numpy"]) == expected


def test_programs_are_counted_while_they_run() -> None:
    config = validate(EnvironmentVerifier, {"code": "tests"}, "p")
    counts: list[tuple[int, int]] = []
    scorer = open_verifier(config, "score")
    scorer.report = lambda done, total: counts.append((done, total))
    rows = [{"id": str(number), "tests": ["assert f() == 1"]} for number in range(3)]
    assert [verdict.score for verdict in scorer.verify(rows, ["def f(): return 1"] * 3)] == [1.0] * 3
    assert counts == [(1, 3), (2, 3), (3, 3)]


def test_packages_are_hidden_and_a_missing_package_is_named() -> None:
    assert verdict(["assert f() == 1"], "import numpy\ndef f(): return 1") == "crashed"
    with pytest.raises(UserError, match=r"score.packages: no_such is not installed here. Install it"):
        verdict(["assert f() == 1"], "def f(): return 1", packages=["no_such"])


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "reason"),
    [
        ("0.33333 yes", "0.333333 yes", 1e-3, "right"),
        ("0.33333 no", "0.333333 yes", 1e-3, "unequal"),
        ("123456.7891", "123456.789", 1e-6, "right"),
        ("2.0", "2", 1e-6, "right"),
        ("1000000006", "1000000007", 1e-3, "unequal"),
        ("0.51", "0.5", 1e-3, "unequal"),
        ("nan", "0.5", 1e-3, "unequal"),
        ("0.5 0.6", "0.5", 1e-3, "unequal"),
        ("0.33333", "0.333333", None, "unequal"),
    ],
)
def test_numbers_of_outputs_may_differ_within_the_tolerance(
    output: str, expected: str, tolerance: float | None, reason: str
) -> None:
    fields = {} if tolerance is None else {"tolerance": tolerance}
    assert verdict([{"input": "", "output": expected}], f"print('{output}')", **fields) == reason


def test_packages_and_tolerance_are_part_of_the_identity() -> None:
    configs = [{}, {"packages": ["numpy"]}, {"tolerance": 0.1}]
    identities = [validate(EnvironmentVerifier, {"code": "t", **each}, "p").verifier_identity() for each in configs]
    assert "packages" not in identities[0] and identities[1]["packages"] == ["numpy"]
    assert identities[2]["tolerance"] == 0.1
    with pytest.raises(UserError, match="tolerance is for code, and this is number"):
        validate(EnvironmentVerifier, {"number": "t", "tolerance": 0.1}, "p")
    with pytest.raises(UserError, match="'no-name' is no name of a package"):
        validate(EnvironmentVerifier, {"code": "t", "packages": ["no-name"]}, "p")
