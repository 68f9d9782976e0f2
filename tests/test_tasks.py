"""The ten tasks of ``docs/tasks.md``, taken from the page and run from an empty folder outside the clone."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from align.cli.main import main
from tests.support.document_files import write_files
from tests.support.inference.fake_chat import FakeChat, completion
from tests.support.installed import InstalledAlign

PAGE = Path("docs/tasks.md")
MAX_LINES = 15
PIPELINES = ("sft", "dpo", "ppo", "judged", "grpo", "more")
TINY = ["runtime.engine.name=transformers"]
MODEL = "stages.model.source=tiny"
PPO = ["stages.ppo.rollout_batch=8", "stages.ppo.max_tokens=8", "stages.ppo.updates=1"]
SMALL = {
    "sft": ["stages.sft.max_steps=2", "stages.sft.max_length=512"],
    "dpo": [MODEL, "stages.dpo.max_steps=2"],
    "ppo": [MODEL, *PPO],
    "judged": [MODEL, *PPO],
    "grpo": [MODEL, "stages.grpo.updates=1", "stages.grpo.rollout_batch=8", "stages.grpo.max_tokens=8"],
}
"""Overrides that bring each pipeline to a size for tests."""

Align = Callable[..., str]


def sections() -> dict[str, list[str]]:
    """Return the blocks of code of each task, by its heading."""
    parts = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    return {part.splitlines()[0]: re.findall(r"```\w+\n(.*?)```", part, flags=re.DOTALL) for part in parts}


def code_lines(block: str) -> int:
    return sum(not line.startswith("# ") for line in block.strip().splitlines())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files and data of the user's, which is the current folder."""
    for blocks in sections().values():
        for block in blocks:
            name = re.match(r"# (\S+\.(?:yaml|py))\n", block)
            if name:
                (tmp_path / name.group(1)).write_text(block)
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_every_task_is_short_and_the_table_counts_its_lines() -> None:
    page = PAGE.read_text(encoding="utf-8")
    tasks = sections()
    assert len(tasks) == 10
    for title, blocks in tasks.items():
        lines = sum(map(code_lines, blocks))
        assert lines <= MAX_LINES
        assert re.search(rf"\| \[{re.escape(title)}\]\(#[\w-]+\) \| {lines} \|", page), f"{title} has {lines} lines"


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_is_planned_as_it_stands(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{name}.yaml"]) == 0
    assert "never run" in capsys.readouterr().out


def test_the_sweep_is_checked_as_it_stands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "sweep.yaml", "--dry-run"]) == 0
    assert "stages.dpo.beta" in capsys.readouterr().out


@pytest.fixture
def align(folder: Path, installed_align: InstalledAlign) -> Align:
    """Run a program of the installed wheel in ``folder``; return what it prints."""

    def run(*arguments: str, module: str | None = "align.cli.main") -> str:
        command = [str(installed_align.python), *(["-m", module] if module else []), *arguments]
        environment = installed_align.environment
        process = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    return run


def shrink(align: Align, folder: Path, *names: str) -> None:
    """Replace pipelines by themselves at a size for tests."""
    for name in names:
        assignments = [word for assignment in [*TINY, *SMALL[name]] for word in ("--set", assignment)]
        (folder / f"{name}.yaml").write_text(align("plan", f"{name}.yaml", "--resolved", *assignments))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_a_pipeline_runs(align: Align, folder: Path, name: str) -> None:
    shrink(align, folder, name)
    output = align("run", f"{name}.yaml")
    assert f"✓ {name}" in output and "Report: " in output


@pytest.mark.slow
def test_ppo_goes_on_is_evaluated_and_exported(align: Align, folder: Path) -> None:
    shrink(align, folder, "ppo")
    assert "✓ ppo " in align("run", "ppo.yaml")
    output = align("run", "more.yaml", "--set", "stages.ppo_more.updates=2")
    assert "cached" in output and "✓ ppo_more" in output
    align("export", "ppo.yaml:ppo", "--output", "my-model")
    assert "exact" in align("eval", "my-model", "--suite", "own.yaml", "--set", "max_tokens=8")
    assert align("use.py", module=None).endswith("\n")


@pytest.mark.slow
def test_a_judge_is_asked(align: Align, folder: Path) -> None:
    fake = FakeChat(lambda body: completion("[[5]]"))
    file = folder / "judged.yaml"
    file.write_text(file.read_text().replace("http://127.0.0.1:8000/v1", fake.url))
    shrink(align, folder, "judged")
    align("run", "judged.yaml")
    fake.stop()
    assert fake.bodies


@pytest.mark.slow
def test_a_sweep_and_seeds_share_their_stages(align: Align, folder: Path) -> None:
    shrink(align, folder, "dpo", "ppo")
    assert "dpo.test_accuracy_after" in align("sweep", "sweep.yaml", "--trials", "2")
    assert len(align("seeds.py", module=None).splitlines()) == 3
