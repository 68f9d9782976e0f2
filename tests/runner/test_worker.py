"""Code of an environment that changes between the command and the stage's process is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from align.config.stages.sample import SampleConfig
from align.config.user_functions import function_identity
from align.pipeline.registry import find_stage
from align.runner import worker
from align.runner.stage_result import RESULT, read_result, write_work
from align.runner.worker import require_planned
from tests.support.refusals import Refused

CODE = """class Room:
    '''A room.'''

    def reset(self, row):
        return "Hello"

    def step(self, message):
        return True

    def score(self):
        return 1.0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "room_of_test.py"
    path.write_text(CODE)
    return path


def config() -> SampleConfig:
    return SampleConfig(policy="sft", prompts="data", environment={"class": "room_of_test:Room", "max_tokens": 64})


def test_changed_environment_is_refused(refused: Refused, module: Path) -> None:
    stage, planned = find_stage("sample"), config().identities(Path.cwd())
    require_planned(stage, config(), planned, "pairs")
    module.write_text(CODE.replace("1.0", "2.0"))
    refused(lambda: require_planned(stage, config(), planned, "pairs"))


def test_changed_score_is_refused(refused: Refused, module: Path) -> None:
    planned = {"score": function_identity("room_of_test:Room")}
    module.write_text(CODE + "\n")
    scored = SampleConfig(policy="sft", prompts="data", score="room_of_test:Room")
    refused(lambda: require_planned(find_stage("sample"), scored, planned, "pairs"))


def test_stage_process_refuses_changed_code(module: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The plan reads models, and this stage has none.
    monkeypatch.setattr(worker, "fit_to_memory", lambda stage, config, inputs, runtime, gpu: (runtime, None))
    folder = tmp_path / "partial"
    folder.mkdir()
    work = {
        "name": "pairs",
        "stage": "sample",
        "config": config().model_dump(mode="json"),
        "seed": 0,
        "runtime": {"device": "cpu"},
        "inputs": {},
        "identities": config().identities(Path.cwd()),
        "runner_pid": os.getppid(),
    }
    write_work(folder, work)
    module.write_text(CODE.replace("1.0", "2.0"))
    assert worker.main(folder, os.getppid()) == 2
    result = read_result(folder / RESULT)
    assert result.status == "refused"
    assert "its code has changed" in result.message
