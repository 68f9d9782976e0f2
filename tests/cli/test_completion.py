"""``align completion`` in real shells. A shell that is not installed is skipped; bash is everywhere."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from align.cli import data
from align.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]
PIPELINE = """\
name: mine
stages:
  model: {source: tiny}
  data: {recipe: data_recipes/embedded.yaml}
  sft: {model: model, data: data, learning_rate: 1.0e-3}
  loop: {rounds: 2, carry: {sft: dpo}, stages: {dpo: {policy: sft, data: data, learning_rate: 1.0e-3}}}
"""
STARTS = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}
PREPARE = {
    "bash": "bind 'set bell-style none'; source ./script",
    "zsh": "autoload -U compinit; compinit -u -D; source ./script",
}


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a pipeline, and an ``align`` that can be called."""
    (tmp_path / "mine.yaml").write_text(PIPELINE)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "store").mkdir()
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "align"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m align.cli.main "$@"\n')
    command.chmod(0o755)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "TERM": "dumb", "HOME": str(folder)}


def completions(folder: Path, line: str) -> list[str]:
    """Return what bash offers at the end of ``line``."""
    code = f"source ./script; COMP_LINE='{line}'; COMP_POINT={len(line)}; _python_argcomplete align"
    done = subprocess.run(
        ["bash", "--norc", "-c", f'{code}; printf "%s\\n" "${{COMPREPLY[@]}}"'],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(folder),
        check=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_words_and_paths(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "script").write_text(script("bash", capsys))
    for line, expected in {
        "align ": [*COMMANDS],
        "align data ": [*data.COMMANDS],
        "align run --on ": ["local", "slurm", "ray"],
        "align run --on local ": ["mine.yaml", "bin/", "store/"],
        "align run mine.yaml --str": ["--strict"],
        "align run mine.yaml --store ": ["bin/", "store/"],
        "align chat n": ["notes.txt"],
        "align fields onl": ["online_dpo"],
        "align plan --hardware ": [],
    }.items():
        assert sorted(completions(folder, line)) == sorted(expected), line


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_stages_assignments_and_fields(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "script").write_text(script("bash", capsys))
    (folder / "more.yaml").write_text(
        "extends: mine.yaml\nstages: {more: {continue_from: sft}, odd: {continue_from: odd}}\n"
    )
    for line, expected in {
        "align run mine.yaml --only ": ["model", "data", "sft", "loop", "dpo"],
        "align run missing.yaml --only ": [],
        "align plan mine.yaml --set seed=3 --set stages.dpo.be": ["stages.dpo.beta=", "stages.dpo.beta_schedule="],
        # A stage that continues another has the fields of its kind.
        "align run more.yaml --set stages.more.learning_ra": ["stages.more.learning_rate="],
        "align run more.yaml --set stages.odd.": ["stages.odd.seed="],
        "align fields ppo tuning.ra": ["tuning.rank"],
        "align fields unknown tuning.ra": [],
    }.items():
        assert completions(folder, line) == expected, line


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_tab_runs_no_text_of_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "script").write_text(script("bash", capsys))
    (folder / "hostile.yaml").write_text(
        "stages:\n"
        "  model: {source: tiny}\n"
        "  $(touch${IFS}ran): {stage: model}\n"
        "  '`touch${IFS}ran`': {stage: model}\n"
        "  two words: {stage: model}\n"
        "  mine: {stage: 'hostile:Stage'}\n"
    )
    (folder / "hostile.py").write_text("open('ran', 'w')")
    assert completions(folder, "align run hostile.yaml --only ") == ["model", "mine"]
    assert completions(folder, "align run hostile.yaml --set stages.mi") == ["stages.mine.seed="]
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("shell", STARTS)
def test_tab_completes_in_a_real_shell(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (folder / "script").write_text(script(shell, capsys))
    # The command that runs shows how the shell completed the line.
    typed = "align ru\t mi\t --on sl\t --set stages.sft.learning_r\t5 --only mod\t --stri\t\n"
    expected = "align run mine.yaml --on slurm --set stages.sft.learning_rate=5 --only model --strict"
    assert expected in type_into(shell, folder, typed, expected)


def test_fish_completes_words_and_stages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    (folder / "script").write_text(script("fish", capsys))
    code = "source ./script; complete -C 'align ru'; complete -C 'align run mine.yaml --only mod'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(folder),
        check=True,
        timeout=60,
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["run", "model"]


def type_into(shell: str, folder: Path, typed: str, expected: str) -> str:
    """Type into an interactive shell on a terminal, and return what it did: a stand-in for ``align run`` shows it."""
    command = folder / "bin" / "align"
    real = command.read_text().split("\n", 1)[1]
    command.write_text(f'#!/bin/sh\nif [ "$1$_ARGCOMPLETE" = run ]; then echo "align $*" >> ran; exit; fi\n{real}')
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(folder)
        os.execvpe(STARTS[shell][0], STARTS[shell], environment(folder))
    try:
        os.write(terminal, f"{PREPARE[shell]}; touch ready\n".encode())
        wait_for(terminal, folder / "ready", "")
        for text in typed.split("\t"):
            os.write(terminal, text.encode())
            if not text.endswith("\n"):
                os.write(terminal, b"\t")
                drain(terminal, 0.2)
        wait_for(terminal, folder / "ran", expected)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(terminal)
    ran = folder / "ran"
    return ran.read_text() if ran.exists() else ""


def drain(terminal: int, seconds: float) -> None:
    """Read what the shell writes until it is silent for ``seconds``, so that it never waits for a reader."""
    while select.select([terminal], [], [], seconds)[0]:
        os.read(terminal, 4096)


def wait_for(terminal: int, path: Path, expected: str, seconds: float = 30) -> None:
    """Wait until a file is there and contains ``expected``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not (path.exists() and expected in path.read_text()):
        drain(terminal, 0.1)
