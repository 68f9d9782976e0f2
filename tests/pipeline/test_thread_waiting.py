"""How OpenMP's threads wait: one process of a machine spins at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.pipeline import thread_waiting
from align.pipeline.thread_waiting import SLEEPING, SPINNING, claim_spinning, set_waiting, waiting_beside

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no such names for sockets")


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that no other test has, and an environment that leaves the choice open."""
    for variable in SPINNING:
        monkeypatch.delenv(variable, raising=False)
    return f"\0align-test{tmp_path}"[:100]


def test_the_first_spins_until_it_is_done_and_others_sleep(name: str) -> None:
    with claim_spinning(name) as first:
        assert first == SPINNING
        with claim_spinning(name) as second:
            assert second == SLEEPING
    with claim_spinning(name) as third:
        assert third == SPINNING


def test_the_claim_of_a_process_ends_with_it_even_if_it_is_killed(name: str) -> None:
    code = (
        "import json, os, sys; from align.pipeline.thread_waiting import set_waiting\n"
        "set_waiting(chr(0) + sys.argv[1]); print(json.dumps(dict(os.environ)), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, name[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        environment = json.loads(process.stdout.readline())
        assert SPINNING.items() <= environment.items()
        with claim_spinning(name) as beside:
            assert beside == SLEEPING
        process.kill()
        process.wait()
        with claim_spinning(name) as after:
            assert after == SPINNING


def test_a_process_keeps_what_the_environment_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with claim_spinning(name) as chosen:
        assert chosen == {}
    set_waiting(name)
    assert "GOMP_SPINCOUNT" not in os.environ


def test_a_process_spins_or_sleeps_for_good(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_waiting, "_held", held := [])
    for variable in SPINNING:
        monkeypatch.setenv(variable, "")  # taken back at the end
        monkeypatch.delenv(variable)
    set_waiting(name)
    assert SPINNING.items() <= os.environ.items() and len(held) == 1
    for variable in SPINNING:
        monkeypatch.delenv(variable)
    set_waiting(name)
    assert SLEEPING.items() <= os.environ.items() and len(held) == 1
    held[0].close()


def test_a_system_without_such_names_sleeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(thread_waiting.socket, "AF_UNIX")
    with claim_spinning(name) as waiting:
        assert waiting == SLEEPING


def test_a_server_beside_a_stage_that_spins_sleeps() -> None:
    assert waiting_beside({**SPINNING, "HOME": "/"}) == SLEEPING
    assert waiting_beside(SLEEPING) == waiting_beside({"OMP_WAIT_POLICY": "ACTIVE"}) == waiting_beside({}) == {}
