"""An episode whose process is killed at random moments: it ends as if nothing had happened."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from align.environments.process_server import encode_source
from tests.support.environments.opened import open_class

TURNS = 30
PROGRAM = f"""
import sys
from pathlib import Path
from align.environments.journal import Journal
from align.environments.process_server import decode_source
from align.environments.journal import JournaledEnvironment
from align.environments.worker_pool import EnvironmentPool

source, folder = decode_source(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
pool = EnvironmentPool(source, isolation=sys.argv[3])
environment = JournaledEnvironment(pool, Journal(folder / "journal"), 0, {{"folder": str(folder)}})
environment.reset().result()
print("begun", flush=True)
texts = [environment.call(turn, 0, "append", {{"turn": turn}}).result().text for turn in range({TURNS})]
print(texts, environment.score([]).result().total, environment.differing)
"""


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_kill_repeats_only_interrupted_calls(tmp_path: Path, isolation: Any) -> None:
    (tmp_path / "source").write_bytes(encode_source(open_class("Writer")))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "source"), str(tmp_path), isolation]
    moments = random.Random(isolation)
    kills = 0
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        if kills < 6:
            time.sleep(moments.uniform(0.0, 0.1))
            process.send_signal(signal.SIGKILL)
        output = process.stdout.read()
        if process.wait() == 0:
            break
        kills += 1
        assert process.returncode == -signal.SIGKILL
    assert output == f"{[f'{turn + 1} turns' for turn in range(TURNS)]} {float(TURNS)} 0\n"
    called = [int(line) for line in (tmp_path / "called").read_text().splitlines()]
    assert called == sorted(called) and set(called) == set(range(TURNS))
    assert len(called) <= TURNS + kills
