"""The process that lm-eval runs in: its errors, its silence, and its end with the process that started it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import align
from align.evaluation.lm_eval import task as process
from align.evaluation.lm_eval.task import lm_eval_version, log_end, run_lm_eval
from tests.support.processes import command_of, is_alive
from tests.support.refusals import Refused


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a program that runs in place of ``lm_eval/worker.py``; its folder is the second argument."""
    (tmp_path / "modules").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setattr(process, "MODULE", "stand_in")
    return tmp_path / "modules" / "stand_in.py"


WRITES = "import json, os, sys\nfolder = sys.argv[1]\njob = json.load(open(folder + '/job.json'))\n"


def test_a_result_comes_back_from_a_process_in_the_base_folder(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    program.write_text(
        WRITES + "seen = {'job': job, 'cwd': os.getcwd(), 'rank': os.environ.get('RANK'), 'first': sys.path[1]}\n"
        "json.dump(seen, open(folder + '/result.json', 'w'))\n"
    )
    reply = run_lm_eval({"do": "describe"}, tmp_path, 60)
    assert reply["job"] == {"do": "describe", "parent": os.getpid()}
    assert Path(reply["cwd"]) == tmp_path
    assert Path(reply["first"]) == Path(align.__file__).resolve().parents[1], "the process imports this align"
    assert reply["rank"] is None, "lm-eval would take itself for one of several processes"


def test_what_the_user_has_to_change_is_a_user_error(refused: Refused, program: Path, tmp_path: Path) -> None:
    program.write_text(WRITES + "json.dump({'refused': 'tasks: no'}, open(folder + '/result.json', 'w'))\n")
    refused(run_lm_eval, {}, tmp_path, 60)


def test_failure_shows_end_of_log_without_progress_bars(program: Path, tmp_path: Path) -> None:
    program.write_text(
        "import sys\nsys.stderr.write('\\r 10%|#   | 1/10 [00:01<00:09, 1.00it/s]\\r100%|####| 10/10\\n')\n"
        "print('before')\nraise OSError('the disk is gone')\n"
    )
    with pytest.raises(RuntimeError) as raised:
        run_lm_eval({}, tmp_path, 60)
    text = str(raised.value)
    assert text.startswith("lm-eval ended with exit code 1.\nThe end of its log:\n")
    assert text.endswith("OSError: the disk is gone")
    assert "before" in text
    assert "10%" not in text


def test_no_result_is_a_failure_whatever_the_exit_code(refused: Refused, program: Path, tmp_path: Path) -> None:
    program.write_text("pass\n")
    refused(run_lm_eval, {}, tmp_path, 60)


def test_idleness_ends_it_and_speech_or_work_does_not(
    refused: Refused, program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "BUSY_CPU_SECONDS", 0.02)  # a busy machine may give it little more
    program.write_text("import time\nprint('thinking', flush=True)\ntime.sleep(60)\n")
    began = time.monotonic()
    refused(run_lm_eval, {}, tmp_path, 2)
    assert time.monotonic() - began < 30
    assert not [child for child in psutil.Process().children() if "stand_in" in command_of(child)]
    ends = "json.dump({}, open(folder + '/result.json', 'w'))\n"
    program.write_text(
        WRITES + "import time\nfor _ in range(15):\n    print('.', flush=True)\n    time.sleep(0.2)\n" + ends
    )
    assert run_lm_eval({}, tmp_path, 2) == {}
    program.write_text(WRITES + "import time\nwhile time.process_time() < 3:\n    pass\n" + ends)
    assert run_lm_eval({}, tmp_path, 2) == {}, "silent, but at work"


def test_the_log_s_end_is_short(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("\n".join(f"line {number}" for number in range(100)))
    assert log_end(log).splitlines()[2:] == [f"line {number}" for number in range(85, 100)]
    log.write_text("")
    assert log_end(log) == ""


def test_lm_eval_that_is_not_installed_is_named_with_its_extra(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lm_eval_version() == importlib.metadata.version("lm_eval")

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    refused(lm_eval_version)


SLEEPS = """
task: sleeps
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
process_docs: !function slow.sleep
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: exact_match}}]
"""


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    data, mark = tmp_path / "data.jsonl", tmp_path / "pid"
    data.write_text('{"question": "?"}\n')
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sleeps.yaml").write_text(SLEEPS.format(data=data))
    (tmp_path / "tasks" / "slow.py").write_text(
        "import os, time\ndef sleep(docs):\n"
        f"    open({str(mark)!r}, 'w').write(str(os.getpid()))\n    time.sleep(300)\n"
    )
    job = {"do": "describe", "tasks": ["sleeps"], "include": str(tmp_path / "tasks"), "limit": None, "revisions": {}}
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom align.evaluation.lm_eval.task import run_lm_eval\n"
        "run_lm_eval(json.loads(sys.argv[1]), Path('.'), 600)\n"
    )
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    starter = subprocess.Popen([sys.executable, "-c", code, json.dumps(job)], env=environment)
    try:
        process = psutil.Process(_wait_for(mark, starter))
        starter.send_signal(signal.SIGKILL)
        starter.wait()
        deadline = time.monotonic() + 30
        while is_alive(process):
            assert time.monotonic() < deadline, "it lives on"
            time.sleep(0.1)
    finally:
        starter.kill()
        starter.wait()


def _wait_for(mark: Path, starter: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 200
    while not (mark.is_file() and mark.read_text()):
        assert starter.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return int(mark.read_text())
