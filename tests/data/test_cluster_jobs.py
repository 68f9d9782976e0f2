"""Builds as jobs of a cluster: the same result, jobs that go are noticed, and errors come back.

Slurm's commands are stood in for by scripts that run the jobs here; datatrove's side is the real one.
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest

from align.config.recipe.recipe import Recipe
from align.config.runtime import ExecutorConfig, Runtime
from align.data import build as building
from align.data import cluster_jobs
from align.data.build import build
from align.data.rows import BadRecord
from align.data.shards import Task
from align.data.workers import BuildResources
from align.errors import UserError

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
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExecutorConfig:
    pytest.importorskip("datatrove")
    folder = tmp_path / "bin"
    folder.mkdir()
    sbatch = SBATCH.format(python=sys.executable, here=str(Path.cwd()), log=str(tmp_path / "jobs.log"))
    for name, text in {"sbatch": sbatch, **OTHERS}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}")
    monkeypatch.setattr(building, "SHARD_ROWS", 12)
    monkeypatch.setattr(cluster_jobs, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(cluster_jobs, "GRACE_SECONDS", 0.2)
    return ExecutorConfig(name="slurm", partition="cpu", tasks=2)


def recipe(folder: Path, lines: list[str]) -> Recipe:
    (folder / "a.jsonl").write_text("".join(lines))
    source = {"type": "files", "paths": ["a.jsonl"], "format": "prompt_completion"}
    return Recipe.model_validate({"kind": "instructions", "sources": [source], "steps": [{"type": "exact_duplicates"}]})


def lines(count: int) -> list[str]:
    return [json.dumps({"prompt": f"q {index}", "completion": "yes"}) + "\n" for index in range(count)]


def run(folder: Path, content: Recipe, name: str, executor: ExecutorConfig | None = None) -> dict:
    (folder / name).mkdir(exist_ok=True)
    resources = BuildResources(executor=executor or ExecutorConfig())
    return build(content, folder, folder / f"{name}-work", folder / name, resources=resources)


def test_jobs_build_what_this_process_does(slurm: ExecutorConfig, tmp_path: Path) -> None:
    content = recipe(tmp_path, lines(40))
    assert run(tmp_path, content, "jobs", slurm) == run(tmp_path, content, "here")
    assert len(list((tmp_path / "jobs-work").rglob("jobs/logs/completions/*"))) == 4  # two passes of two ranks


def test_a_bad_record_comes_back_as_it_would_here(slurm: ExecutorConfig, tmp_path: Path) -> None:
    content = recipe(tmp_path, [*lines(20), "{broken\n"])
    with pytest.raises(UserError, match=r"a.jsonl:21: not valid JSON"):
        run(tmp_path, content, "jobs", slurm)


@pytest.mark.slow
def test_jobs_that_end_without_their_shards_are_named_and_the_rest_is_kept(
    slurm: ExecutorConfig, tmp_path: Path
) -> None:
    (tmp_path / "bin" / "srun").write_text("#!/bin/bash\n[[ $SLURM_ARRAY_TASK_ID == 1 ]] && exit 1\n" + OTHERS["srun"])
    content = recipe(tmp_path, lines(40))
    with pytest.raises(RuntimeError, match=r"slurm: the jobs are gone, and 2 of 4 shards are not done"):
        run(tmp_path, content, "jobs", slurm)
    (tmp_path / "bin" / "srun").write_text(OTHERS["srun"])
    assert run(tmp_path, content, "jobs", slurm) == run(tmp_path, content, "here")


def test_without_slurm_the_remedy_is_named(slurm: ExecutorConfig, tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").unlink()
    with pytest.raises(UserError, match="no sbatch here; run this on a login node"):
        run(tmp_path, recipe(tmp_path, lines(40)), "jobs", slurm)


def test_a_refused_job_is_the_users_to_mend(slurm: ExecutorConfig, tmp_path: Path) -> None:
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\nexit 3\n")
    with pytest.raises(UserError, match="sbatch refused the jobs .exit code 3"):
        run(tmp_path, recipe(tmp_path, lines(40)), "jobs", slurm)


def test_an_executor_by_name_and_one_without_a_partition() -> None:
    assert Runtime.model_validate({"executor": "ray"}).executor.name == "ray"
    with pytest.raises(ValueError, match="slurm needs a partition"):
        Runtime.model_validate({"executor": "slurm"})


def test_a_task_survives_its_file() -> None:
    task = Task(3, 30, 1, "alpaca", (("a:1", {"instruction": "é", "n": [1, None]}), BadRecord("a:2", "no good")))
    again = cluster_jobs._from_json(cluster_jobs._to_json(task))
    assert (again.shard, again.start, again.source, again.form, again.records[0]) == (
        3,
        30,
        1,
        "alpaca",
        task.records[0],
    )
    assert str(again.records[1]) == "a:2: no good"
