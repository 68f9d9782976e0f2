"""A sweep as a user types it: trials share stages, a failure is noted, a killed sweep goes on, workers."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from align.cli.main import main
from align.extensions.sweep.worker import _TrialListener
from align.runner.listener import Listener
from align.store.garbage import find_garbage
from align.store.store import Store
from tests.support.sweep import toy_sweep

pytestmark = pytest.mark.usefixtures("stages_in_process")
Said = pytest.CaptureFixture[str]


def sweep(folder: Path, *words: str, raw: dict[str, Any] | None = None, **changes: Any) -> int:
    file = toy_sweep.write(folder, raw, **changes)
    return main(["sweep", file, "--store", str(folder / "store"), *words])


def document(folder: Path, capsys: Said, *words: str, **changes: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert sweep(folder, "--json", *words, **changes) == 0
    actual: dict[str, Any] = json.loads(capsys.readouterr().out)
    return actual


def test_trials_share_what_does_not_change_and_the_best_is_found(tmp_path: Path, capsys: Said) -> None:
    space = {"stages.ppo.height": [0.2, 0.9, 0.4], "stages.evaluate.spoilt": [False]}
    actual = document(tmp_path, capsys, space=space, sampler="grid", trials=None)
    assert [(row["number"], row["values"]["ppo.gold"]) for row in actual["trials"]] == [(1, 0.9), (2, 0.4), (0, 0.2)]
    assert actual["best"] == [1] and actual["trials"][0]["best"] and actual["trials"][0]["run"] == "sw-1"
    assert actual["trials"][0]["intervals"]["ppo.gold"] == pytest.approx([0.8, 1.0])
    store = Store.open(tmp_path / "store")
    kinds = [artifact.record["kind"] for artifact in store.all()]
    assert (kinds.count("number"), kinds.count("curve"), kinds.count("card")) == (1, 3, 3)
    assert {"sw-0", "sw-1", "sw-2"} <= set(store.runs()) and find_garbage(store) == []
    # again: nothing runs, the same is said
    assert document(tmp_path, capsys, space=space, sampler="grid", trials=None)["trials"] == actual["trials"]


def test_a_table_and_a_page_say_it(tmp_path: Path, capsys: Said) -> None:
    assert sweep(tmp_path, space={"stages.ppo.height": [0.2, 0.9]}, sampler="grid", trials=None, minimize="ppo.kl") == 0
    out = capsys.readouterr().out
    assert "✓ trial 1 of 2  done  ppo.gold 0.900  ppo.kl 0.810  (ppo.height=0.9)" in out
    assert "Best trade-offs (*), which no trial beats in all objectives: 1, 0." in out
    page = Path(out.rpartition("Report: ")[2].strip())
    assert page == (tmp_path / "store" / "reports" / "sw" / "compare.html").resolve()
    text = page.read_text(encoding="utf-8")
    assert "The sweep: every trial" in text and text.count("not beaten") == 2
    with (page.parent / "tables" / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["set ppo.height"], row["ppo.gold"], row["ppo.gold low"]) for row in rows] == [
        ("0.9", "0.9", "0.8"), ("0.2", "0.2", "0.1"),
    ]  # fmt: skip
    assert (page.parent / "figures" / "sweep-ppo.gold-ppo.height.svg").is_file()


def test_a_failed_trial_is_noted_and_the_others_run(tmp_path: Path, capsys: Said) -> None:
    space = {
        "way": {
            "bad": {"stages.ppo.crash": True, "stages.evaluate.spoilt": False, "stages.ppo.height": 0.1},
            "good": {"stages.ppo.crash": False, "stages.evaluate.spoilt": False, "stages.ppo.height": 0.3},
            "spoilt": {"stages.ppo.crash": False, "stages.evaluate.spoilt": True, "stages.ppo.height": 0.3},
        }
    }
    actual = document(tmp_path, capsys, space=space, sampler="grid", trials=None)
    states = {row["draw"]["way"]: (row["state"], row["note"]) for row in actual["trials"]}
    assert states == {
        "good": ("done", ""),
        "bad": ("failed", "ppo: RuntimeError: diverged"),
        "spoilt": ("failed", "ppo.gold is no number there: None"),
    }
    assert sweep(tmp_path, "--retry", space=space, sampler="grid", trials=None) == 0
    assert "2 failed trials run again" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_artifact_fails_its_own_trial_only(tmp_path: Path, capsys: Said) -> None:
    settings: dict[str, Any] = {"space": {"stages.ppo.height": [0.2, 0.9]}, "sampler": "grid", "trials": None}
    document(tmp_path, capsys, **settings)
    store = Store.open(tmp_path / "store")
    run = store.runs()["sw-1"]["stages"]["ppo"]
    record = store.folder(run["kind"], run["key"]) / "record.json"
    record.write_text("{}")
    rows = {row["number"]: row for row in document(tmp_path, capsys, "--fresh", **settings)["trials"]}
    assert (rows[0]["state"], rows[1]["state"]) == ("done", "failed")
    assert f"{record}: damaged: it" in rows[1]["note"]


def test_what_failed_already_is_not_run_again_for_another_trial(tmp_path: Path, capsys: Said) -> None:
    space = {"stages.ppo.crash": [True, False], "stages.evaluate.spoilt": [False, True]}
    raw = toy_sweep.pipeline()
    actual = document(tmp_path, capsys, raw=raw, space=space, sampler="grid", trials=3)
    notes = {row["number"]: row["note"] for row in actual["trials"]}
    assert notes == {
        2: "", 0: "ppo: RuntimeError: diverged", 1: "stage 'ppo' failed in trial 0 with the same settings"
    }  # fmt: skip


def test_failed_shared_stage_ends_the_sweep(tmp_path: Path, capsys: Said) -> None:
    assert sweep(tmp_path, space={"stages.ppo.height": [0.1]}, set={"stages.ppo.crash": True}, trials=1) == 1
    captured = capsys.readouterr()
    # ppo is the same in the one trial there is
    assert "Every trial has this stage, so the sweep ends here." in captured.err
    raw = toy_sweep.pipeline()
    raw["stages"]["one"]["crash"] = "bug"
    assert sweep(tmp_path, raw=raw, name="other", trials=3) == 1
    captured = capsys.readouterr()
    assert "stage 'one' failed: ValueError: a bug" in captured.err and "Every trial has this stage" in captured.err
    assert "0 trials done" not in captured.out
    both = {"stages.ppo.height": [0.1, 0.2]}
    assert sweep(tmp_path, name="third", space=both, set={"stages.ppo.crash": True}, trials=2) == 1
    assert "0 trials done, 2 failed." in capsys.readouterr().out


def test_unmeasured_objective_ends_the_sweep_until_fixed(tmp_path: Path, capsys: Said) -> None:
    assert sweep(tmp_path, maximize="ppo.golt", trials=1) == 2
    assert "sweep.yaml: ppo.golt: nothing measures 'golt' of 'ppo'. Did you mean 'gold'?" in capsys.readouterr().err
    assert sweep(tmp_path, maximize=["ppo.ifeval.strict", "ppo.height"], minimize="evaluate.seconds", trials=1) == 0
    assert "ppo.ifeval.strict 0.500  ppo.height 0." in capsys.readouterr().out


def test_trials_that_are_behind_are_ended(tmp_path: Path, capsys: Said) -> None:
    changes: dict[str, Any] = {
        "space": {"stages.ppo.height": [0.9, 0.1, 1.0]}, "sampler": "grid", "trials": None,
        "prune": {"maximize": "ppo.score", "start": 2}, "set": {"stages.ppo.pause": 0.2, "stages.ppo.steps": 6},
    }  # fmt: skip
    actual = document(tmp_path, capsys, **changes)
    assert {row["number"]: row["state"] for row in actual["trials"]} == {2: "done", 0: "done", 1: "ended early"}
    store = Store.open(tmp_path / "store")
    assert len([artifact for artifact in store.all() if artifact.record["kind"] == "curve"]) == 2
    assert not list((tmp_path / "store" / "curve").glob("*.partial"))
    wrong = {**changes, "name": "wrong", "prune": {"maximize": "ppo.scores", "start": 2}}
    assert sweep(tmp_path, **wrong) == 2
    assert "prune: stage 'ppo' has no curve 'scores'. Did you mean 'score'?" in capsys.readouterr().err


@pytest.mark.parametrize("chooses", [False, True])
def test_pruning_uses_the_held_out_rows_that_are_scored(chooses: bool, tmp_path: Path, capsys: Said) -> None:
    """A stage that chooses its checkpoint calls the curve ``validation_loss``."""
    changes: dict[str, Any] = {
        "space": {"stages.ppo.height": [0.9, 0.1, 1.0]}, "sampler": "grid", "trials": None,
        "prune": {"minimize": "ppo.test_loss", "start": 2},
        "set": {"stages.ppo.pause": 0.2, "stages.ppo.steps": 6, "stages.ppo.chooses": chooses},
    }  # fmt: skip
    actual = document(tmp_path, capsys, **changes)
    assert {row["number"]: row["state"] for row in actual["trials"]} == {2: "done", 0: "done", 1: "ended early"}


def start(file: str, store: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "align.cli.main", "sweep", file, "--store", str(store), *words]
    # A shell that starts the tests in the background has them ignore SIGINT, and so would the sweep.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(condition: Any, seconds: float = 240) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not come to that"
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_killed_sweep_resumes_the_trial_and_its_checkpoints(
    number: signal.Signals, tmp_path: Path, capsys: Said
) -> None:
    changes: dict[str, Any] = {
        "space": {"stages.ppo.height": {"low": 0, "high": 1}}, "trials": 1,
        "set": {"stages.ppo.pause": 0.5, "stages.ppo.steps": 6},
    }  # fmt: skip
    file, store = toy_sweep.write(tmp_path, **changes), tmp_path / "store"
    process = start(file, store)
    wait_for(lambda: len(list(store.glob("curve/*.partial/checkpoints/step-*"))) >= 2)
    process.send_signal(number)
    process.communicate(timeout=240)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    actual = document(tmp_path, capsys, **changes)
    assert [(row["number"], row["state"]) for row in actual["trials"]] == [(0, "done")]
    record = Store.open(store).find(*stage(store, "sw-0", "ppo"))
    assert record is not None and record.record["metrics"]["resumed_at"] >= 2


def stage(store: Path, run: str, name: str) -> tuple[str, str]:
    entry = Store.open(store).runs()[run]["stages"][name]
    return entry["kind"], entry["key"]


def test_workers_divide_the_trials_and_share_stages(tmp_path: Path, capsys: Said) -> None:
    space = {"stages.ppo.height": [0.1, 0.2, 0.3]}
    file, store = toy_sweep.write(tmp_path, space=space, sampler="grid", trials=None), tmp_path / "store"
    process = start(file, store, "--workers", "2")
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert [out.count(f"✓ trial {number} of 3  done") for number in range(3)] == [1, 1, 1]
    assert "3 trials done." in out and "Best: trial 2; its run is sw-2." in out
    kinds = [artifact.record["kind"] for artifact in Store.open(store).all()]
    assert kinds.count("number") == 1 and kinds.count("curve") == 3


def test_a_dry_run_says_what_is_shared_and_runs_nothing(tmp_path: Path, capsys: Said) -> None:
    assert sweep(tmp_path, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "sw: 4 trials of" in out and "stages.ppo.height  0 to 1" in out
    assert "run once for all trials: one\nrun in every trial: ppo, evaluate" in out
    store = Store.open(tmp_path / "store")
    assert store.all() == [] and store.runs() == {} and not (store.root / "sweeps").exists()
    assert sweep(tmp_path, "--dry-run", "--json", "--trials", "9") == 0
    actual = json.loads(capsys.readouterr().out)
    assert actual["trials"] == 9 and actual["shared"] == [{"stage": "one", "cached": False}]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--workers", "0"], "--workers: should be at least 1; found 0."),
        (["--trials", "0"], "--trials: should be at least 1; found 0."),
        (["--wokers", "2"], "Did you mean '--workers'?"),
        (["--set", "stages.ppo.hight=1"], "unknown key 'hight'. Did you mean 'height'?"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], expected: str, tmp_path: Path, capsys: Said) -> None:
    assert sweep(tmp_path, *words) == 2
    assert expected in capsys.readouterr().err


def test_gpus_are_divided_among_workers() -> None:
    from align.extensions.sweep.worker_pool import device_share

    assert [device_share("0,1,2", index, 2) for index in range(2)] == [
        {"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "1"},
    ]  # fmt: skip
    assert device_share("0", 1, 2) == {} and device_share(None, 0, 2) == {}


def test_trial_listener_passes_on_events_that_it_does_not_handle() -> None:
    inner = Listener()
    listener = _TrialListener.__new__(_TrialListener)
    listener.inner = inner
    assert listener.transfer == inner.transfer
    assert listener.stage_queued == inner.stage_queued
