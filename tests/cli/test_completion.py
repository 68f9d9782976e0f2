"""``align completion``: the scripts in real shells. A shell that is not installed is skipped; bash is everywhere."""

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
from align.cli.main import COMMANDS, main, parser
from align.cli.parser import option_names

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
    "fish": ["fish", "--no-config", "-i"],
}
PREPARE = {
    "bash": "bind 'set bell-style none'; source ./script",
    "zsh": "autoload -U compinit; compinit -u -D; source ./script",
    "fish": "source ./script",
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


def completions(folder: Path, words: list[str]) -> list[str]:
    """Return what bash's function offers for the last of ``words``."""
    listed = " ".join(f"'{word}'" for word in words)
    code = (
        f"source ./script; COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}; "
        '_align align; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code],
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
def test_bash_offers_what_can_stand_at_a_place(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "script").write_text(script("bash", capsys))
    for words, expected in {
        "align _": [*COMMANDS],
        "align pl_": ["plan"],
        "align data _": [*data.COMMANDS],
        "align run --on _": ["local", "slurm", "ray"],
        "align run --on local _": ["mine.yaml", "bin", "store"],
        "align run mine.yaml --str_": ["--strict"],
        "align data build --max_": ["--max-rows"],
        "align run mine.yaml --store _": ["bin", "store"],
        "align chat n_": ["notes.txt"],
        "align export --dtype b_": ["bfloat16"],
        "align data lint --kind onl_": ["online_dpo"],
        "align fields onl_": ["online_dpo"],
        "align completion _": ["bash", "zsh", "fish"],
        "align plan --hardware _": [],
        "align schema x_": [],
    }.items():
        offered = completions(folder, words.removesuffix("_").split(" "))
        assert sorted(offered) == sorted(expected), words


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_offers_names_of_the_pipeline_and_fields(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "script").write_text(script("bash", capsys))
    stages = ["model", "data", "sft", "loop", "dpo"]
    assert completions(folder, ["align", "run", "mine.yaml", "--only", ""]) == stages
    # bash has the words of an assignment apart
    after = ["align", "plan", "mine.yaml", "--set", "seed", "=", "3", "--set", "stages.dpo.be"]
    assert completions(folder, after) == ["stages.dpo.beta=", "stages.dpo.beta_schedule="]
    assert completions(folder, ["align", "cancel", "mine.yaml", "sft", "mo"]) == ["model"]
    assert completions(folder, ["align", "fields", "ppo", "tuning.ra"]) == ["tuning.rank"]
    assert completions(folder, ["align", "run", "missing.yaml", "--only", ""]) == []


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
    assert completions(folder, ["align", "run", "hostile.yaml", "--only", ""]) == ["model", "mine"]
    assert completions(folder, ["align", "run", "hostile.yaml", "--set", "stages.mi"]) == ["stages.mine.seed="]
    # Even a command that prints such a name does not get it run.
    (folder / "bin" / "align").write_text("#!/bin/sh\necho '$(touch${IFS}ran)'\n")
    completions(folder, ["align", "run", "hostile.yaml", "--only", ""])
    assert not (folder / "ran").exists()


def test_a_continued_stage_has_the_paths_of_its_kind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = folder / "more.yaml"
    more.write_text("extends: mine.yaml\nstages: {more: {continue_from: sft}, odd: {continue_from: odd}}\n")
    assert main(["completion", "paths", str(more)]) == 0
    paths = capsys.readouterr().out.split()
    assert "stages.more.learning_rate=" in paths and "stages.odd.seed=" in paths


def test_every_option_of_every_command_is_in_every_script(capsys: pytest.CaptureFixture[str]) -> None:
    options = {name.removeprefix("--") for name in option_names(parser()) if name.startswith("--")} - {"worker"}
    assert "max-rows" in options
    for shell in STARTS:
        text = script(shell, capsys).replace("--", " -l ").replace("'", " ").replace("\n", " ")
        for option in options:
            assert f" -l {option} " in text, (shell, option)


@pytest.mark.parametrize("shell", STARTS)
def test_tab_completes_in_a_real_shell(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (folder / "script").write_text(script(shell, capsys))
    # The command that runs shows how the shell completed the line.
    typed = "align ru\t mi\t --on sl\t --set stages.sft.learning_r\t5 --only mod\t --stri\t\n"
    expected = "align run mine.yaml --on slurm --set stages.sft.learning_rate=5 --only model --strict"
    assert expected in type_into(shell, folder, typed, expected)


def type_into(shell: str, folder: Path, typed: str, expected: str) -> str:
    """Type into an interactive shell on a terminal, and return what it did: a stand-in for ``align run`` shows it."""
    command = folder / "bin" / "align"
    real = command.read_text().split("\n", 1)[1]
    command.write_text(f'#!/bin/sh\nif [ "$1" = run ]; then echo "align $*" >> ran; exit; fi\n{real}')
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
