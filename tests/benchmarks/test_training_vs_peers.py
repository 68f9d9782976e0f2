"""The comparison around its runs: measuring a process, results that resume, the table, options, environments."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.store.artifacts import VERSION
from benchmarks import training_vs_peers
from benchmarks.training_peers import environments
from benchmarks.training_peers.comparison import Comparison
from benchmarks.training_peers.environments import ALIGN, LLAMAFACTORY, TRL, prepare, repair_torchaudio, requirements
from benchmarks.training_peers.logs import Loop, Step
from benchmarks.training_peers.process import run_measured
from benchmarks.training_peers.results import Results, run_of
from benchmarks.training_peers.sides import environment_of
from benchmarks.training_peers.table import notes, table
from benchmarks.training_peers.works import WORKS, Settings

ROOT = Path(__file__).parents[2]


def run_python(code, tmp_path, timeout=None):
    return run_measured([sys.executable, "-c", code], dict(os.environ), tmp_path, tmp_path / "log.txt", timeout)


def ends(pid):
    """Wait until a process that was killed is gone, at most 20 s; another process may have to reap it."""
    for _ in range(200):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


def measured_values(per_token=0.01, peak=2**30, seconds=60.0, tokens=100):
    return {"seconds_per_token": per_token, "peak_bytes": peak, "seconds": seconds, "tokens": tokens}


def make_run(side, number=0, per_token=0.01, **more):
    return {"work": "sft_lora", "side": side, "round": number, **measured_values(per_token, **more)}


def failed_run(side, number=0, work="sft_lora"):
    return {"work": work, "side": side, "round": number, "failure": "exit code 1\nno module", "seconds": 3.0}


def test_lines_are_timed_when_they_arrive(tmp_path):
    # The second line is printed only after the first was read and logged.
    code = (
        "import os, time; print('first', flush=True)\n"
        "while not os.path.exists('log.txt') or 'first' not in open('log.txt').read(): time.sleep(0.05)\n"
        "print(time.time())"
    )
    measured = run_python(code, tmp_path, timeout=60)
    (first, text), (second, printed) = measured.lines
    assert measured.failure is None
    assert text == "first"
    assert first <= float(printed) <= second
    assert (tmp_path / "log.txt").read_text() == f"first\n{printed}\n"


def test_peak_memory_is_that_of_the_process_tree(tmp_path):
    child = "import time; block = bytearray(200 * 2**20); time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run_python(code, tmp_path).peak > 200 * 2**20


def test_a_failed_command_shows_its_last_lines(tmp_path):
    failure = run_python("print('before'); raise SystemExit('no such model')", tmp_path).failure
    assert failure is not None
    assert failure.splitlines() == ["exit code 1", "before", "no such model"]


def test_a_command_out_of_time_is_killed_with_its_children(tmp_path):
    child = "import time; time.sleep(60)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); p.wait()"
    measured = run_python(f"import sys; sys.stdout.reconfigure(line_buffering=True); {code}", tmp_path, timeout=1.0)
    assert measured.code == -signal.SIGKILL
    assert "out of time" in (measured.failure or "")
    assert ends(int(measured.lines[0][1]))


def test_a_killed_comparison_leaves_no_command_behind(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from benchmarks.training_peers.process import run_measured\n"
        "from benchmarks.training_vs_peers import stop_on_request\n"
        "stop_on_request()\n"
        'code = \'import os, time; open("pid", "w").write(str(os.getpid())); time.sleep(60)\'\n'
        f"run_measured([sys.executable, '-c', code], dict(os.environ), Path({str(tmp_path)!r}), Path('log.txt'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(program)], cwd=tmp_path, env=environment)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert ends(int((tmp_path / "pid").read_text()))


def test_table_has_ratios_and_their_extremes():
    runs = [
        make_run("align", 0, per_token=0.010, peak=3 * 2**30, seconds=60),
        make_run("align", 1, per_token=0.010, peak=3 * 2**30, seconds=66),
        make_run("trl", 0, per_token=0.020, peak=2 * 2**30, seconds=120),
        make_run("trl", 1, per_token=0.040, peak=2 * 2**30, seconds=120),
    ]
    head, _, ours, theirs = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table(runs, ["sft_lora"], ["align", "trl"])
    )
    assert head == ["work", "side", "tokens/s", "GiB", "command s", "time per token", "memory", "command"]
    assert ours == ["sft_lora", "align", "100", "3.0", "63", "", "", ""]
    assert theirs == [
        *("sft_lora", "trl", "33", "2.0", "120"),
        *("0.38 (0.25-0.50)", "1.50 (1.50-1.50)", "0.53 (0.50-0.55)"),
    ]


def test_ratio_of_one_round_has_no_extremes_and_is_of_that_round():
    runs = [make_run("align", 0, 0.01), make_run("align", 1, 0.03), make_run("trl", 1, 0.06), failed_run("trl", 0)]
    assert "| 0.50 " in table(runs, ["sft_lora"], ["align", "trl"])[-1]


def test_a_failed_peer_is_a_row_and_a_note():
    runs = [make_run("align"), failed_run("llamafactory")]
    lines = table(runs, ["sft_lora"], ["align", "trl", "llamafactory"])
    assert len(lines) == 4  # trl has no run yet
    assert [cell.strip() for cell in lines[-1].split("|")[1:4]] == ["sft_lora", "llamafactory", "failed"]
    assert notes(runs, {"sft_lora": 100}) == ["sft_lora, llamafactory, round 1 failed: exit code 1\nno module"]


def test_other_tokens_than_expected_are_noted():
    runs = [make_run("align", tokens=100), make_run("trl", tokens=108)]
    assert notes(runs, {"sft_lora": 100}) == ["sft_lora, trl, round 1 read 108 tokens; its rows have 100"]


def test_peer_that_cannot_save_has_only_loop_time():
    unsaved = make_run("llamafactory", per_token=0.02, peak=2**31) | {"failure_after_training": "cannot save"}
    lines = table([make_run("align"), unsaved], ["sft_lora"], ["align", "llamafactory"])
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells == ["sft_lora", "llamafactory", "50", "2.0", "failed", "0.50", "0.50", "-"]
    assert notes([unsaved], {"sft_lora": 100}) == ["sft_lora, llamafactory, round 1 failed after training: cannot save"]


SIDE = """#!/bin/sh
echo "{'loss': '0.7'}"
echo "{'loss': '0.6'}"
mkdir out
echo '{"loss": 0.7, "total_tokens": 40}' > out/trainer_log.jsonl
echo '{"loss": 0.6, "total_tokens": 90}' >> out/trainer_log.jsonl
exit 1
"""


@pytest.mark.parametrize(
    ("rows", "name", "text"),
    [(16, "failure_after_training", "exit code 1"), (24, "failure", "exit code 1")],
)
def test_a_command_that_fails_counts_only_after_its_last_step(tmp_path, rows, name, text):
    side = tmp_path / "llamafactory-cli"
    side.write_text(SIDE)
    side.chmod(0o755)
    comparison = make_comparison(tmp_path, None)
    comparison.executables["llamafactory"] = side
    comparison._rows["sft_lora"] = rows
    run = comparison.measure(WORKS["sft_lora"], "llamafactory")
    assert run[name].startswith(text)
    assert ("tokens" in run) == (name == "failure_after_training")


def test_results_keep_what_the_table_needs():
    loop = Loop([Step(5.0, 10, 0.7), Step(9.0, 30, 0.6)], reference_seconds=3.0)
    run = run_of(loop, seconds=20.0, peak=7)
    assert run["seconds_per_token"] == pytest.approx(4 / 20 + 3 / 30)
    assert run["steps"] == [[0.0, 10, 0.7], [4.0, 30, 0.6]]
    assert (run["tokens"], run["seconds"], run["peak_bytes"], run["reference_seconds"]) == (30, 20.0, 7, 3.0)


def make_comparison(tmp_path, path, rounds=2, **more):
    return Comparison(
        works=[WORKS["sft_lora"]],
        executables={"align": Path("align"), "trl": Path("trl")},
        settings=Settings(),
        rounds=rounds,
        model=tmp_path,
        folder=tmp_path,
        results=Results.load(path, {"batch": 8}),
        timeout=60,
        **more,
    )


def test_sides_take_turns_in_going_first(tmp_path):
    order = [(number, side) for _, number, side in make_comparison(tmp_path, None).schedule()]
    assert order == [(0, "align"), (0, "trl"), (1, "trl"), (1, "align")]


def test_a_comparison_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    path, started = tmp_path / "results.json", []

    def measure(self, work, side):
        if len(started) == 2:
            raise KeyboardInterrupt
        started.append(side)
        return {"failure": "exit code 1", "seconds": 1.0} if side == "trl" else measured_values()

    monkeypatch.setattr(Comparison, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        make_comparison(tmp_path, path).run()
    started.clear()
    assert make_comparison(tmp_path, path).run() == 0
    assert started == ["trl", "align"]  # the second round alone: the failure of the first one stays
    started.clear()
    assert make_comparison(tmp_path, path).run(retry=True) == 0
    assert started == ["trl", "trl"]
    assert len(json.loads(path.read_text())["runs"]) == 4


def test_no_run_starts_that_would_end_after_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(Comparison, "measure", lambda *_: measured_values(seconds=3600.0))
    comparison = make_comparison(tmp_path, None, deadline=time.monotonic() + 600)
    assert comparison.run() == 3
    assert len(comparison.results.runs) == 1  # nothing was known of the work before it


def test_results_of_other_settings_are_refused(refused, tmp_path):
    path = tmp_path / "results.json"
    Results(path, {"batch": 8}).save()
    assert Results.load(path, {"batch": 8}).runs == []
    refused(Results.load, path, {"batch": 4})
    path.write_text("[]")
    refused(Results.load, path, {"batch": 8})


def test_options_keep_the_order_of_works_and_peers():
    options = training_vs_peers.parse(["--only", "dpo_full,sft_lora", "--peers", "llamafactory,trl", "--rows", "16"])
    assert options.only == ["sft_lora", "dpo_full"]
    assert options.peers == ["trl", "llamafactory"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "ppo"], "'ppo' is none of sft_lora"),
        (["--rows", "12"], "--rows: a multiple of 8"),
        (["--rows", "8"], "at least 16"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        training_vs_peers.parse(arguments)
    assert message in capsys.readouterr().err


def test_only_llamafactory_has_separate_versions():
    trl, llamafactory = requirements(TRL), requirements(LLAMAFACTORY)
    assert trl[0] == "trl==1.16.0"
    assert llamafactory[0] == "llamafactory==0.9.5"
    assert {entry.partition("==")[0] for entry in trl[1:-1]} == {"transformers", "peft", "accelerate", "datasets"}
    assert len(llamafactory) == 2
    assert trl[-1] == llamafactory[-1]
    assert trl[-1].startswith("torch>=")
    assert "+" not in trl[-1]


def test_align_is_this_checkout_without_optional_packages():
    constraints, checkout = requirements(ALIGN)[1::2]
    assert Path(checkout, "pyproject.toml").is_file()
    assert Path(constraints) == Path(checkout, "constraints.txt")
    assert environment_of("align")["PYTHONPATH"] == checkout
    assert "PYTHONPATH" not in environment_of("trl")


def make_python(folder, script):
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


def test_environment_refuses_what_is_not_its_own(refused, tmp_path):
    make_python(tmp_path / "old", """echo '{"trl": "1.12.0"}'""")
    refused(prepare, TRL, tmp_path / "old")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    refused(prepare, LLAMAFACTORY, tmp_path / "other")


def test_environment_that_is_complete_is_used(tmp_path):
    make_python(tmp_path, """echo '{"llamafactory": "0.9.5"}'""")
    assert prepare(LLAMAFACTORY, tmp_path) == tmp_path / "bin" / "llamafactory-cli"


def test_environment_that_lacks_the_package_is_completed(tmp_path, monkeypatch):
    make_python(tmp_path, "echo '{}'")
    commands, repaired = [], []
    monkeypatch.setattr(environments, "run_or_refuse", commands.append)
    monkeypatch.setattr(environments, "repair_torchaudio", lambda python, folder: repaired.append(folder))
    prepare(LLAMAFACTORY, tmp_path)
    ((_, *command),) = commands
    assert command[:3] == ["-m", "pip", "install"]
    assert "llamafactory==0.9.5" in command
    assert repaired == [tmp_path]


@pytest.mark.parametrize(("code", "remains"), [(0, True), (1, False)])
def test_torchaudio_loses_a_library_only_where_it_does_not_load(tmp_path, code, remains):
    python = make_python(tmp_path, f"exit {code}")
    folder = tmp_path / "lib" / "python3.11" / "site-packages" / "torchaudio" / "lib"
    folder.mkdir(parents=True)
    (folder / "_torchaudio.abi3.so").touch()
    (folder / "libtorchaudio.abi3.so").touch()
    repair_torchaudio(python, tmp_path)
    assert (folder / "_torchaudio.abi3.so").exists() == remains
    assert (folder / "libtorchaudio.abi3.so").exists()


def test_peer_that_cannot_be_installed_is_skipped(tmp_path, monkeypatch):
    make_python(tmp_path / "align", f"""echo '{{"align": "{VERSION}"}}'""")
    (tmp_path / "notes.txt").write_text("mine")
    folders = ["--align-environment", str(tmp_path / "align"), "--llamafactory-environment", str(tmp_path)]
    options = training_vs_peers.parse(["--peers", "llamafactory", *folders])
    executables, packages, failures = training_vs_peers.environments(options)
    assert executables == {"align": tmp_path / "align" / "bin" / "align"}
    assert packages == {"align": {"align": VERSION}}
    assert "is not a virtual environment" in failures["llamafactory"]
