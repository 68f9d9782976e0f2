"""Cores and memory come from control groups; one process spins at a time; garbage collections are put off."""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from align.models.pretrained import open_model
from align.pipeline import process_limits
from align.pipeline.process_limits import (
    IMPORT_THRESHOLDS,
    SLEEPING,
    SPINNING,
    THRESHOLDS,
    claim_spinning,
    relax_collections,
    resume_collections,
    set_waiting,
    usable_cores,
    usable_memory,
    waiting_beside,
)

GIB = 2**30
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no such names for sockets")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16 cores and 64 GiB; return the folder of its control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    memory = psutil.virtual_memory()._replace(total=64 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(process_limits, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(process_limits, "GROUPS_OF_PROCESS", tmp_path / "own")
    return tmp_path


UNLIMITED = [
    {},
    {"cpu.max": "max 100000", "memory.max": "max"},
    {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
    {"memory/memory.limit_in_bytes": "9223372036854771712"},
    {"cpu.max": "6400000 100000", "memory.max": str(512 * GIB)},
]


@pytest.mark.parametrize(
    ("own", "files", "cores", "gib"),
    [
        pytest.param("0::/\n", {"cpu.max": "200000 100000", "memory.max": str(8 * GIB)}, 2, 8, id="root"),
        pytest.param(
            "0::/a/b\n",
            {
                "a/cpu.max": "400000 100000", "a/memory.max": str(6 * GIB),
                "a/b/cpu.max": "max 100000", "a/b/memory.max": str(8 * GIB),
            },
            4, 6, id="group-above",
        ),
        pytest.param(
            "3:cpu,cpuacct:/job\n2:memory:/job\n0::/\n",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "1",
                "cpu/job/cpu.cfs_quota_us": "300000", "cpu/job/cpu.cfs_period_us": "100000",
                "memory/job/memory.limit_in_bytes": str(5 * GIB),
            },
            3, 5, id="version-1",
        ),
        pytest.param("0::/\n", {"cpu.max": "50000 100000"}, 1, 64, id="half-a-core"),
        pytest.param("0::/\n", {"cpu.max": "190000 100000"}, 1, 64, id="not-two-cores"),
        # The path is the host's, of which only the root is mounted.
        pytest.param("0::/kubepods/pod1/container\n", {"cpu.max": "200000 100000"}, 2, 64, id="host-path"),
        *(pytest.param("0::/\n", files, 16, 64, id=f"unlimited-{index}") for index, files in enumerate(UNLIMITED)),
    ],
)  # fmt: skip
def test_usable_cores_and_memory_follow_control_groups(
    machine: Path, own: str, files: dict[str, str], cores: int, gib: int
) -> None:
    for name, text in files.items():
        file = machine / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    (machine / "own").write_text(own)
    assert (usable_cores(), usable_memory() // GIB) == (cores, gib)


def test_missing_control_groups_are_no_error(machine: Path) -> None:
    assert usable_cores() == 16


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name that no other test has, and an environment that leaves the choice open."""
    for variable in SPINNING:
        monkeypatch.delenv(variable, raising=False)
    return f"\0align-test{tmp_path}"[:100]


@linux_only
def test_first_claim_spins_and_others_sleep(name: str) -> None:
    with claim_spinning(name) as first:
        assert first == SPINNING
        with claim_spinning(name) as second:
            assert second == SLEEPING
    with claim_spinning(name) as third:
        assert third == SPINNING


@linux_only
def test_claim_ends_with_killed_process(name: str) -> None:
    code = (
        "import json, os, sys; from align.pipeline.process_limits import set_waiting\n"
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


@linux_only
def test_environment_overrides_thread_waiting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with claim_spinning(name) as chosen:
        assert chosen == {}
    set_waiting(name)
    assert "GOMP_SPINCOUNT" not in os.environ


@linux_only
def test_set_waiting_holds_for_the_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_limits, "_claims", claims := [])
    for variable in SPINNING:
        monkeypatch.setenv(variable, "")  # taken back at the end
        monkeypatch.delenv(variable)
    set_waiting(name)
    assert SPINNING.items() <= os.environ.items() and len(claims) == 1
    for variable in SPINNING:
        monkeypatch.delenv(variable)
    set_waiting(name)
    assert SLEEPING.items() <= os.environ.items() and len(claims) == 1
    claims[0].close()


@linux_only
def test_threads_sleep_without_abstract_sockets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(process_limits.socket, "AF_UNIX")
    with claim_spinning(name) as waiting:
        assert waiting == SLEEPING


@linux_only
def test_server_beside_spinning_stage_sleeps() -> None:
    assert waiting_beside({**SPINNING, "HOME": "/"}) == SLEEPING
    assert waiting_beside(SLEEPING) == waiting_beside({"OMP_WAIT_POLICY": "ACTIVE"}) == waiting_beside({}) == {}


@pytest.fixture
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.usefixtures("thresholds")
@pytest.mark.parametrize("module", ["align.runner.worker", "align.export.verify", "align.evaluation.lm_eval.worker"])
def test_processes_start_with_rare_collections(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module, str(tmp_path / "nowhere")])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises((SystemExit, OSError, ValueError)):
        runpy.run_module(module, run_name="__main__")
    assert gc.get_threshold() == IMPORT_THRESHOLDS


@pytest.mark.usefixtures("thresholds")
def test_first_model_resumes_collections_and_freezes_imports(tiny_model: Path) -> None:
    import torch

    relax_collections()
    frozen = gc.get_freeze_count()
    model, _ = open_model("causal", tiny_model, torch.float32)
    assert gc.get_threshold() == THRESHOLDS
    assert gc.get_freeze_count() > frozen
    # a frozen model would never be freed once it is garbage
    assert any(candidate is model for candidate in gc.get_objects())


@pytest.mark.usefixtures("thresholds")
def test_resume_does_nothing_in_usual_process() -> None:
    gc.set_threshold(*THRESHOLDS)  # a process of pytest-xdist has relaxed them, until a test resumes them
    frozen = gc.get_freeze_count()
    resume_collections()
    # Another thread may free frozen objects meanwhile; freezing would add all others.
    assert gc.get_freeze_count() <= frozen
    assert gc.get_threshold() == THRESHOLDS
