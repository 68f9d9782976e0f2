"""Builds as jobs of a cluster: the same result, jobs that go are noticed, and errors come back.

Slurm's commands are stood in for by scripts that run the jobs here; datatrove's side is the real one.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest

from align.config.recipe.recipe import Recipe
from align.config.runtime.executor import Executor, LocalExecutor, RayExecutor, SlurmExecutor
from align.data.builds import build as building
from align.data.builds import workers
from align.data.builds.build import build
from align.data.builds.shards import Task
from align.data.builds.workers import BuildResources
from align.data.formats import SourceFormat
from align.data.rows import BadRecord
from tests.support.refusals import Refused

SBATCH = """#!{python}
import os, re, subprocess, sys
text = open(sys.argv[-1]).read()
found = re.search(r"--array=0-(\\d+)", text)
if "merge_stats" not in text:
    for number in range(int(found[1]) + 1):
        values = dict(os.environ, SLURM_ARRAY_TASK_ID=str(number), SLURM_NODELIST="here", RUN_OFFSET="0")
        values["PYTHONPATH"] = os.pathsep.join([{here!r}, values.get("PYTHONPATH", "")])
        with open({log!r}, "ab") as log:
            subprocess.run(["/bin/bash", "-c", text], env=values, stdout=log, stderr=log)
print("Submitted batch job 7")
"""
OTHERS = {
    "srun": '#!/bin/bash\nwhile [[ $1 == -* || $1 == 1 ]]; do shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\necho here\n",
    "squeue": "#!/bin/bash\nexit 0\n",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmExecutor:
    pytest.importorskip("datatrove")
    folder = tmp_path / "bin"
    folder.mkdir()
    sbatch = SBATCH.format(python=sys.executable, here=str(Path.cwd()), log=str(tmp_path / "jobs.log"))
    for name, text in {"sbatch": sbatch, **OTHERS}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}")
    monkeypatch.setattr(building, "SHARD_ROWS", 12)
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.2)
    return SlurmExecutor(partition="cpu", tasks=2, cpus=2, memory_gb=5, account="nlp", setup="echo set up")


def recipe(folder: Path, lines: list[str]) -> Recipe:
    (folder / "a.jsonl").write_text("".join(lines))
    source = {"type": "files", "paths": ["a.jsonl"], "format": "prompt_completion"}
    return Recipe.model_validate({"kind": "instructions", "sources": [source], "steps": [{"type": "exact_duplicates"}]})


def lines(count: int) -> list[str]:
    return [json.dumps({"prompt": f"q {index}", "completion": "yes"}) + "\n" for index in range(count)]


def run(folder: Path, content: Recipe, name: str, executor: Executor | None = None) -> dict:
    (folder / name).mkdir(exist_ok=True)
    resources = BuildResources(executor=executor or LocalExecutor())
    return build(content, folder, folder / f"{name}-work", folder / name, resources=resources)


def test_jobs_build_what_this_process_does(
    refused: Refused, slurm: SlurmExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = recipe(tmp_path, lines(40))
    assert run(tmp_path, content, "jobs", slurm) == run(tmp_path, content, "here")
    assert len(list((tmp_path / "jobs-work").rglob("jobs/logs/completions/*"))) == 4  # two passes of two ranks
    script = next((tmp_path / "jobs-work").rglob("launch_script.slurm")).read_text().splitlines()
    for line in ("cpus-per-task=2", "mem-per-cpu=2560M", "partition=cpu", "account=nlp", "time=04:00:00", "array=0-1"):
        assert f"#SBATCH --{line}" in script
    assert "echo set up" in script
    (damaged,) = (tmp_path / "jobs-work").rglob("pass-0/00001.parquet")
    damaged.write_bytes(b"damaged")
    # A summary that stays would end the wait before the job has begun.
    monkeypatch.setattr(workers, "_launch", lambda *_: None)
    monkeypatch.setattr(workers, "_is_queued", lambda *_: False)
    refused(run, tmp_path, content, "jobs", slurm)


def test_failed_squeue_does_not_end_running_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """squeue fails at 0 s and at 100 s, with a grace of 60; the shard is done at 150 s."""
    answers = iter([False, True, False, True])
    clock = iter([0.0, 0.0, 100.0, 100.0])
    summaries = iter([None, None, None, None, {"rows": 1}])
    monkeypatch.setattr(workers, "_is_queued", lambda config, folder: next(answers))
    monkeypatch.setattr(workers, "read_summary", lambda folder, shard: next(summaries))
    monkeypatch.setattr(workers.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(workers.time, "sleep", lambda seconds: None)
    executor = SlurmExecutor(partition="cpu", tasks=1)
    workers._wait_for_jobs(executor, SimpleNamespace(folder=tmp_path), tmp_path, [0])  # type: ignore[arg-type]
    assert next(summaries, "all read") == "all read"


def test_without_tasks_this_process_builds_all_shards(slurm: SlurmExecutor, tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").unlink()
    assert run(tmp_path, recipe(tmp_path, lines(40)), "here", SlurmExecutor(partition="cpu"))


def test_jobs_see_nothing_of_the_job_that_submits_them(
    refused: Refused, slurm: SlurmExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")  # as in a worker of a sweep; datatrove would take it for its own
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1024")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/bash\n/usr/bin/env > {tmp_path}/seen\nexit 3\n")
    refused(lambda: run(tmp_path, recipe(tmp_path, lines(40)), "jobs", slurm))
    variables = [line for line in (tmp_path / "seen").read_text().splitlines() if line.startswith("SLURM")]
    assert variables == ["SLURM_CONF=/etc/slurm.conf"] and os.environ["SLURM_MEM_PER_NODE"] == "1024"


def test_resources_of_ray_tasks() -> None:
    config = RayExecutor(cpus=2, gpus=0.5, memory_gb=3, resources={"a100": 1}, tasks=4)
    assert workers._ray_options(config) == {"num_cpus": 2, "num_gpus": 0.5, "memory": 3 * 2**30}
    assert workers._ray_options(RayExecutor(cpus=2, tasks=4))["memory"] == 8 * 2**30


def test_a_bad_record_comes_back_as_it_would_here(refused: Refused, slurm: SlurmExecutor, tmp_path: Path) -> None:
    content = recipe(tmp_path, [*lines(20), "{broken\n"])
    refused(run, tmp_path, content, "jobs", slurm)


@pytest.mark.slow
def test_jobs_without_shards_are_named_and_rest_is_kept(slurm: SlurmExecutor, tmp_path: Path) -> None:
    (tmp_path / "bin" / "srun").write_text("#!/bin/bash\n[[ $SLURM_ARRAY_TASK_ID == 1 ]] && exit 1\n" + OTHERS["srun"])
    content = recipe(tmp_path, lines(40))
    with pytest.raises(RuntimeError, match=r"slurm: the jobs are gone, and 2 of 4 shards are not done"):
        run(tmp_path, content, "jobs", slurm)
    (tmp_path / "bin" / "srun").write_text(OTHERS["srun"])
    assert run(tmp_path, content, "jobs", slurm) == run(tmp_path, content, "here")


def test_without_slurm_the_remedy_is_named(refused: Refused, slurm: SlurmExecutor, tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").unlink()
    refused(lambda: run(tmp_path, recipe(tmp_path, lines(40)), "jobs", slurm))


def test_a_refused_job_is_the_users_to_mend(refused: Refused, slurm: SlurmExecutor, tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\nexit 3\n")
    refused(lambda: run(tmp_path, recipe(tmp_path, lines(40)), "jobs", slurm))


def test_a_task_survives_its_file() -> None:
    source = SourceFormat("alpaca")
    # A Parquet file may hold values that JSON has no type for.
    day = datetime(2024, 1, 2, 3, 4)
    values = {"day": day, "date": day.date(), "time": day.time(), "bytes": b"\xff", "price": Decimal("1.10")}
    record = {"instruction": "é", "n": [1, None], "values": [values]}
    task = Task(3, 30, 1, source, (("a:1", record), BadRecord("a:2", "no good")))
    again = workers._from_json(workers._to_json(task), {task.source: task.format})
    assert (again.shard, again.start, again.source, again.format) == (3, 30, 1, source)
    assert again.records[0] == task.records[0]
    assert str(again.records[1]) == "a:2: no good"
