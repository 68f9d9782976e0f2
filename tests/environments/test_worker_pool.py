"""The pool of environments: order, limits, and what happens to an episode whose environment hangs or dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.environments.environment import EnvironmentSource
from align.environments.results import BadCall, EnvironmentFailed, Scores, Step, ToolError, ToolTimeout
from align.environments.worker_pool import EnvironmentPool, Result
from tests.support.environments.classes import Odd
from tests.support.environments.opened import open_class, open_tools

both = pytest.mark.parametrize("isolation", ["thread", "process"])


@contextmanager
def pool_of(source: EnvironmentSource, **options: Any) -> Iterator[EnvironmentPool]:
    pool = EnvironmentPool(source, **({"workers": 4, "tool_seconds": 20.0} | options))
    try:
        yield pool
    finally:
        pool.close()


@both
def test_calls_of_an_episode_run_in_order(isolation: Any) -> None:
    with pool_of(open_class("Counter"), isolation=isolation) as pool:
        results = []
        for episode in range(6):
            pool.submit(episode, "reset", {"goal": episode})
            results.append([pool.submit(episode, "call", "wait_and_add", {"number": n}) for n in (1, 2)])
        for pair in results:
            assert [result.result() for result in pair] == ["1", "3"]
        assert all(pool.is_open(episode) for episode in range(6))
        assert pool.submit(3, "score", []).result() == Scores(1.0, {"right": 1.0, "close": 0.0})
        assert pool.close_episode(3).result() is None and not pool.is_open(3)
        assert pool.close_episode(3).result() is None  # a second time


@both
def test_every_kind_of_result_and_error_arrives(isolation: Any) -> None:
    with pool_of(open_class("Game"), isolation=isolation) as pool:
        assert pool.submit(0, "reset", {"goal": 3}).result() is None
        assert pool.submit(0, "step", "2").result() == Step([{"role": "user", "content": "Not 2."}])
        assert pool.submit(0, "step", "3").result() == Step([], True)
        messages = [{"role": "assistant", "content": "3"}]
        assert pool.submit(0, "score", messages).result() == Scores(1.0, {}, [0.0, 1.0])
        with pytest.raises(BadCall, match="there is no tool 'x'"):
            pool.submit(0, "call", "x", {}).result()
    with pool_of(open_class("Troubled"), isolation=isolation) as pool:
        assert pool.submit(0, "reset", {}).result()[0]["role"] == "system"
        with pytest.raises(ToolError, match="ZeroDivisionError"):
            pool.submit(0, "call", "divide", {"first": 1, "second": 0}).result()
        assert len(pool.submit(0, "call", "shout", {}).result()) < 20_000
        with pytest.raises(EnvironmentFailed, match="the sandbox is gone"):
            pool.submit(0, "call", "give_up", {}).result()
        with pytest.raises(EnvironmentFailed, match="ended its process"):
            pool.submit(0, "call", "leave", {}).result()
        # What raised is there for more.
        assert pool.submit(0, "call", "odd", {"kind": "list"}).result() == '[1, "ä"]'
    with pool_of(open_class("Counter"), isolation=isolation) as pool:
        with pytest.raises(EnvironmentFailed, match="Counter.reset raised KeyError: 'goal'"):
            pool.submit(0, "reset", {}).result()
        assert pool.submit(1, "restore", {"goal": 1}, [], None).result() == 0


@both
def test_printed_megabytes_do_not_disturb_results(isolation: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Calls and results have a socket of their own; what is printed goes to the stage's log."""
    with pool_of(open_class("Loud"), isolation=isolation) as pool:
        pool.submit(0, "reset", {"goal": 1}).result()
        assert pool.submit(0, "call", "loud", {}).result() == "said"
        assert pool.submit(0, "call", "wait_and_add", {"number": 1}).result() == "1"
    assert capfd.readouterr().out.count("x") == 2_000_000


@both
def test_functions_run_in_a_pool(isolation: Any) -> None:
    with pool_of(open_tools("double", "shout"), isolation=isolation) as pool:
        pool.submit(0, "reset", {"goal": "A"})
        assert pool.submit(0, "call", "shout", {"text": "a"}).result() == "A"
        assert pool.submit(0, "score", [{"role": "assistant", "content": "A"}]).result().total == 1.0


@both
def test_hanging_call_is_abandoned_without_delay_for_others(isolation: Any) -> None:
    with pool_of(open_class("Troubled"), workers=1, isolation=isolation) as pool:
        pool.submit(0, "reset", {}).result()
        started = time.monotonic()
        hanging = submit_briefly(pool, 0.5, "hang", {})
        queued = pool.submit(0, "call", "odd", {"kind": "none"})
        beside = pool.submit(1, "reset", {})
        with pytest.raises(ToolTimeout, match="^hang did not answer within 0.5 seconds.$"):
            hanging.result(20)
        # The only worker is stuck in a thread; another one takes its place.
        assert beside.result(20) is not None
        with pytest.raises(EnvironmentFailed, match="did not begin, or is gone"):
            queued.result(20)
        assert 0.5 <= hanging.seconds <= time.monotonic() - started
        assert pool.timeouts == 1 and not pool.is_open(0) and pool.is_open(1)
        # A new instance may go on.
        assert pool.submit(0, "restore", {}, [], None).result(20) == 0
        if isolation == "process":
            assert pool.abandoned == 0


def test_hanging_async_call_is_cancelled() -> None:
    with pool_of(open_class("Troubled")) as pool:
        pool.submit(0, "reset", {}).result()
        with pytest.raises(ToolTimeout):
            submit_briefly(pool, 0.2, "hang_softly", {}).result(20)
        wait_until(lambda: pool.abandoned == 0)


def test_hanging_thread_is_counted_until_it_returns() -> None:
    with pool_of(open_class("Troubled")) as pool:
        pool.submit(0, "reset", {}).result()
        with pytest.raises(ToolTimeout):
            submit_briefly(pool, 0.1, "hang", {"seconds": 3.0}).result(20)
        assert pool.abandoned == 1
        wait_until(lambda: pool.abandoned == 0)


@pytest.mark.parametrize("method", ["reset", "score"])
def test_other_methods_that_hang_fail_the_episode(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_class("Odd")
    monkeypatch.setattr(Odd, method, lambda self, *inputs: time.sleep(3600))
    with pool_of(source) as pool:
        if method == "score":
            pool.submit(0, "reset", {}).result()
        pool.tool_seconds = 0.2
        result = pool.submit(0, method, {})
        with pytest.raises(EnvironmentFailed, match=f"^{method} did not return within 0.2 seconds.$"):
            result.result(20)


def test_a_process_that_dies_takes_one_episode_with_it() -> None:
    with pool_of(open_class("Troubled"), isolation="process") as pool:
        for episode in range(2):
            pool.submit(episode, "reset", {}).result()
        with pytest.raises(EnvironmentFailed, match=r"the environment's process died \(exit code 11\) in `call`."):
            pool.submit(0, "call", "die", {}).result(10)
        assert not pool.is_open(0)
        assert pool.close_episode(0).result(10) is None
        assert pool.submit(1, "call", "odd", {"kind": "none"}).result(10) == ""


def test_close_ends_processes_and_their_descendants() -> None:
    with pool_of(open_class("Starter"), isolation="process") as pool:
        pool.submit(0, "reset", {}).result()
        own, started = map(int, pool.submit(0, "call", "start", {}).result().split())
        with pytest.raises(ToolTimeout):
            submit_briefly(pool, 0.2, "hang", {}).result(20)
        wait_for_end(own)
        wait_for_end(started)
        pool.submit(1, "reset", {}).result()
        other = int(pool.submit(1, "call", "start", {}).result().split()[0])
    wait_for_end(other)


@pytest.mark.parametrize("end", ["hang", "die", "close"])
def test_sessions_of_a_tool_end_with_it(end: str) -> None:
    with pool_of(open_class("Starter"), isolation="process") as pool:
        pool.submit(0, "reset", {}).result()
        started = pool.submit(0, "call", "start_session", {}).result().split()
        assert len(started) == 2
        if end == "close":
            pool.close_episode(0).result(10)
        else:
            with pytest.raises((ToolTimeout, EnvironmentFailed)):
                submit_briefly(pool, 0.2, end, {}).result(20)
        for process in started:
            wait_for_end(int(process))


def test_processes_end_with_the_stage(tmp_path: Path) -> None:
    program = (
        "from tests.support.environments.opened import open_class\n"
        "from align.environments.worker_pool import EnvironmentPool\n"
        "import os\n"
        "pool = EnvironmentPool(open_class('Starter'), isolation='process')\n"
        "pool.submit(0, 'reset', {})\n"
        "pids = pool.submit(0, 'call', 'start', {}).result()\n"
        "pool.submit(0, 'call', 'hang', {})\n"
        "print(pids, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    for process in done.stdout.split():
        wait_for_end(int(process))


def test_failed_import_in_server_is_an_error() -> None:
    source = replace(open_class("Counter"), path="no_such_module:Counter")  # type: ignore[type-var]
    with pytest.raises(EnvironmentFailed, match="the process of the environments did not start: UserError: .*no_su"):
        EnvironmentPool(source, isolation="process")


def test_a_dead_server_fails_its_episodes_and_is_started_again() -> None:
    with pool_of(open_class("Starter"), isolation="process") as pool:
        pool.submit(0, "reset", {}).result()
        assert pool._server is not None and pool._server._process is not None
        pool._server._process.kill()
        pool._server._process.wait()
        with pytest.raises(EnvironmentFailed, match="process died"):
            for _ in range(100):  # its processes die a moment later
                pool.submit(0, "call", "start", {}).result(10)
        for _ in range(2):
            try:
                pool.submit(1, "reset", {}).result(20)
                break
            except EnvironmentFailed:
                continue
        assert pool.submit(1, "call", "start", {}).result(20)


def test_a_pool_closes_while_a_call_hangs() -> None:
    pool = EnvironmentPool(open_class("Troubled"), workers=2, tool_seconds=60.0)
    pool.submit(0, "reset", {}).result()
    hanging = pool.submit(0, "call", "hang", {"seconds": 120.0})
    waiting = pool.submit(0, "call", "hang", {})
    time.sleep(0.1)
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 20
    with pytest.raises(ToolTimeout):
        hanging.result(1)
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(0, "reset", {})


def test_close_is_called_once_for_each_instance(tmp_path: Path) -> None:
    with pool_of(open_class("Closing", arguments={"folder": str(tmp_path)})) as pool:
        for episode in range(3):
            pool.submit(episode, "reset", {"id": episode}).result()
        pool.close_episode(1).result()
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_an_instance_that_is_still_being_made_is_closed_too(tmp_path: Path) -> None:
    """It would be there afterwards, and a later episode of the same number would get it."""
    with pool_of(open_class("Closing", arguments={"folder": str(tmp_path), "seconds": 0.3})) as pool:
        pool.submit(0, "reset", {"id": 0})
        while not pool._running:
            time.sleep(0.005)
        pool.close_episode(0).result(20)
        assert not pool.is_open(0)
        assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_many_slow_calls_run_at_once() -> None:
    with pool_of(open_class("Counter"), workers=64) as pool:
        for episode in range(64):
            pool.submit(episode, "reset", {"goal": 1})
        started = time.monotonic()
        slow = [pool.submit(i, "call", "wait_and_add", {"number": 1, "seconds": 0.5}) for i in range(64)]
        assert [result.result() for result in slow] == ["1"] * 64
        assert time.monotonic() - started < 16  # one after the other: 32 seconds


def submit_briefly(pool: EnvironmentPool, seconds: float, name: str, arguments: dict[str, Any]) -> Result:
    """Call a tool of episode 0 with a limit of its own, so that a slow machine gives up no other call."""
    before, pool.tool_seconds = pool.tool_seconds, seconds
    try:
        return pool.submit(0, "call", name, arguments)
    finally:
        pool.tool_seconds = before


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def wait_for_end(process: int) -> None:
    """Wait until a process is gone, or a zombie whose parent is gone."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.02)
    os.kill(process, 9)
    pytest.fail(f"process {process} still runs")
