"""Environments behind a real OpenEnv server on this machine."""

from __future__ import annotations

import contextlib
import functools
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from align.environments.environment import Action, EnvironmentSource
from align.environments.journal import Journal, JournaledEnvironment
from align.environments.results import BadCall, EnvironmentFailed, Scores, Step, ToolError
from align.environments.worker_pool import EnvironmentPool
from align.errors import UserError
from tests.support.environments.opened import open_block

pytest.importorskip("openenv", reason="the extra openenv is not installed")

Serve = Callable[..., str]
ROW = {"id": "row 1"}


PROCESSES: list[subprocess.Popen[bytes]] = []


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Starts a server of a kind, once for each kind and capacity; returns its address."""

    @functools.cache
    def start(kind: str, capacity: int = 8) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "tests.support.environments.openenv_server", kind, str(port), str(capacity)]
        PROCESSES.append(subprocess.Popen(command))
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return f"http://127.0.0.1:{port}"
            assert PROCESSES[-1].poll() is None
            time.sleep(0.05)
        pytest.fail("the server did not start")

    yield start
    for process in PROCESSES:
        process.kill()
        process.wait()


def opened(url: str, **fields: Any) -> EnvironmentSource:
    return open_block({"openenv": url} | fields)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def guess_to_the_end(environment: Any) -> list[str]:
    """Count up to the secret; returns what was said."""
    said = []
    for guess in range(1, 10):
        step = environment.step(str(guess))
        said += [message["content"] for message in step.messages]
        if step.done:
            return said
    raise AssertionError(said)


def test_a_server_with_a_text_for_an_action_is_spoken_to(serve: Serve) -> None:
    source = opened(serve("guess"), arguments={"highest": 5})
    assert (source.tools, source.has_step, source.can_save) == ([], True, False)
    environment = source.make()
    assert environment.reset(ROW) == [user("Guess a number up to 5.")]
    assert environment.step("many") == Step([user("many is no number (code: EXECUTION_ERROR)")])
    said = guess_to_the_end(environment)
    assert said == ["Higher."] * (len(said) - 1) + ["Right."]
    assert environment.score([]).total == pytest.approx(1 - 0.1 * (len(said) - 1))
    # The same row has the same secret, and another instance comes to the same place.
    other = source.make()
    first = Action(None, "1", [user(said[0])])
    assert other.restore(ROW, [first]) == 0
    environment.close()
    other.close()


def test_a_server_with_several_fields_has_a_tool_for_its_action(serve: Serve) -> None:
    source = opened(serve("line"))
    function = source.tools[0]["function"]
    assert function["name"] == "act" and function["description"] == "Move on a line."
    assert list(function["parameters"]["properties"]) == ["steps", "backwards"]
    environment = source.make()
    assert environment.reset(ROW) == [user("You are at 0. Go to 3.")]
    assert environment.call("act", {"steps": 5}) == "You are at 5."
    with pytest.raises(BadCall, match="act needs the argument 'steps'"):
        environment.call("act", {})
    assert environment.call("act", {"steps": 2, "backwards": True}) == "You are at 3.\n[the episode is over]"
    with pytest.raises(ToolError, match="the episode is over"):
        environment.call("act", {"steps": 1})
    assert environment.score([]) == Scores(1.0, {})
    environment.close()


def test_a_server_of_mcp_tools_has_these(serve: Serve) -> None:
    source = opened(serve("sums"))
    assert [tool["function"]["name"] for tool in source.tools] == ["add"] and not source.has_step
    environment = source.make()
    assert environment.reset(ROW) is None
    assert environment.call("add", {"first": 2, "second": 3}) == "5"
    with pytest.raises(ToolError, match="no negative numbers"):
        environment.call("add", {"first": -2, "second": 3})
    with pytest.raises(BadCall, match="there is no tool 'ad'. Did you mean 'add'"):
        environment.call("ad", {})
    environment.close()


def test_a_sum_of_rewards_that_is_not_finite_fails_the_episode(serve: Serve) -> None:
    environment = opened(serve("guess")).make()
    environment.reset(ROW)
    environment.step("all")
    assert environment.score([]).total == sys.float_info.max
    environment.step("all")
    with pytest.raises(EnvironmentFailed, match=r"^the server at http://\S+ returned inf; return finite numbers"):
        environment.score([])
    environment.close()


def test_a_server_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match=r"environment.openenv: http://127.0.0.1:9 does not answer as an OpenEnv"):
        opened("http://127.0.0.1:9")


def test_a_full_server_says_how_to_start_it(serve: Serve) -> None:
    source = opened(serve("guess", capacity=1))
    first, second = source.make(), source.make()
    first.reset(ROW)
    with pytest.raises(EnvironmentFailed, match=r"max_concurrent_envs of at least the episodes"):
        second.reset(ROW)
    first.close()


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_episodes_go_on_in_another_process(serve: Serve, tmp_path: Path, isolation: Any) -> None:
    source = opened(serve("guess"))
    said = []
    for run in range(3):
        pool = EnvironmentPool(source, workers=4, tool_seconds=100.0, isolation=isolation)
        environment = JournaledEnvironment(pool, Journal(tmp_path / "journal"), 0, ROW)
        assert environment.reset().result(100) == [user("Guess a number up to 9.")]
        said.append([environment.step(turn, str(turn + 1)).result(100) for turn in range(run)])
        assert environment.differing == 0
        pool.close()
    assert said[2][:1] == said[1]


def test_a_server_that_dies_fails_the_episode(serve: Serve) -> None:
    environment = opened(serve("guess", capacity=7)).make()
    environment.reset(ROW)
    PROCESSES[-1].kill()
    PROCESSES[-1].wait()
    with pytest.raises(EnvironmentFailed, match="ended the session"):
        environment.step("1")
    environment.close()
