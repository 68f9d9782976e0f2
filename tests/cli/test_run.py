"""``align run`` and ``align sweep`` run where ``runtime.executor`` says, and ``--on`` says another place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from align.cli.main import main
from align.cli.main import parser as command_line
from align.extensions.sweep.config import load_sweep
from align.extensions.sweep.plan import Sweep
from align.extensions.sweep.worker_pool import SweepTask
from align.store.store import Store
from tests.support import toy
from tests.support.sweep import toy_sweep

SLURM = {"executor": {"name": "slurm", "partition": "gpu"}, "stages": {"two": {"executor": {"cpus": 2}}}}
NO_SLURM = "there is no sbatch here. Run this on a login node"
NO_RAY = "ray is not installed here: pip install 'align-pipeline[ray]'"


@pytest.fixture(autouse=True)
def _without_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ray", None)


def pipeline_file(folder: Path, runtime: dict[str, Any]) -> str:
    (folder / "p.yaml").write_text(json.dumps(toy.pipeline() | {"runtime": runtime}))
    return str(folder / "p.yaml")


def outcome(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main([*words, "--store", str(folder / "store")])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(("runtime", "message"), [(SLURM, NO_SLURM), ({"executor": "ray"}, NO_RAY)])
def test_a_run_goes_where_its_file_says(
    runtime: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = outcome(tmp_path, capsys, "run", pipeline_file(tmp_path, runtime))
    assert code == 2 and message in text and "not used" not in text


@pytest.mark.usefixtures("stages_in_process")
def test_on_takes_another_place_and_says_what_is_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pipeline_file(tmp_path, SLURM)
    warning = "the file's fields for slurm are not used (runtime.executor, runtime.stages.two.executor)."
    code, text = outcome(tmp_path, capsys, "run", file, "--on", "ray")
    assert code == 2 and text.startswith(f"! --on ray: {warning}\n") and NO_RAY in text
    code, text = outcome(tmp_path, capsys, "run", file, "--on", "local")
    assert (code, text) == (0, f"! --on local: {warning}\n")


def test_a_run_stays_here_without_a_scheduler_that_could_keep_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for runtime in ({}, {"executor": "ray"}):
        code, text = outcome(tmp_path, capsys, "run", pipeline_file(tmp_path, runtime), "--detach")
        assert code == 2 and "add --on slurm" in text


def test_a_sweep_goes_where_its_pipeline_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for runtime, message in ((SLURM, NO_SLURM), ({"executor": "ray"}, NO_RAY)):
        raw = toy_sweep.pipeline() | {"runtime": {"executor": runtime["executor"]}}
        code, text = outcome(tmp_path, capsys, "sweep", toy_sweep.write(tmp_path, raw), "--fresh")
        assert code == 2 and message in text
    code, text = outcome(tmp_path, capsys, "sweep", toy_sweep.write(tmp_path, raw), "--on", "slurm", "--fresh")
    assert code == 2 and NO_SLURM in text


@pytest.mark.usefixtures("stages_in_process")
def test_a_sweep_s_workers_run_where_the_sweep_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = toy_sweep.pipeline() | {"runtime": {"executor": SLURM["executor"]}}
    file = toy_sweep.write(tmp_path, raw, trials=1)
    code, text = outcome(tmp_path, capsys, "sweep", file, "--on", "local")
    assert code == 0 and text.startswith("! --on local: the file's fields for slurm are not used (runtime.executor).")
    options = command_line().parse_args(["sweep", file, "--on", "local"])
    sweep = Sweep.check(load_sweep(file), file, options.assignments, options.on)
    task = SweepTask.of(sweep, Store.open(tmp_path / "store"), options)
    assert task.check().base.config.runtime.executor.name == "local"
