"""Commands on a store that may only be read: those that look work, and those that change something say so."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from align import Pipeline
from align.cli.main import main
from tests.support import toy
from tests.support.cli.example_store import ExampleStore

Capture = pytest.CaptureFixture[str]


def read_only_view(folder: Path, place: Path) -> None:
    """Mount ``folder`` at ``place`` read-only; even root cannot write there."""
    place.mkdir()
    for options in (["--bind", str(folder)], ["-o", "remount,ro,bind"]):
        result = subprocess.run(["mount", *options, str(place)], capture_output=True)
        if result.returncode:
            pytest.skip("only root may mount a folder")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """Return the place for ``read_only_view``, which is unmounted at the end."""
    place = tmp_path / "read-only"
    yield place
    # Not ``ismount``: it does not see a folder of the same file system that is mounted elsewhere.
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, stages_in_process: None) -> Path:
    """Return a folder with two pipeline files and the store of their runs."""
    folder = tmp_path_factory.mktemp("finished")
    for name, number in (("low", 1), ("high", 5)):
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**toy.pipeline(two={"number": number}), "name": name}, sort_keys=False))
        Pipeline.load(file).run(store=folder / "store")
    return folder


@pytest.fixture
def store(finished: Path, mounted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Return a read-only view of the store; the current folder has the pipeline files."""
    monkeypatch.chdir(tmp_path)
    for file in finished.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    read_only_view(finished / "store", mounted)
    return str(mounted)


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (["plan", "low.yaml"], "cached"),
        (["explain", "low.yaml"], "unchanged"),
        (["status", "low"], "done"),
        (["list"], "sum/"),
        (["gc"], "0 folders"),
        (["report", "low"], "reports/low/report.html"),
        (["compare", "low", "high"], "reports/_compare/low-high/compare.html"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_reading_commands_work(command: list[str], output: str, store: str, capsys: Capture) -> None:
    capsys.readouterr()
    assert main([*command, "--store", store]) == 0
    assert output in capsys.readouterr().out


@pytest.mark.parametrize("command", [["run", "low.yaml"], ["gc", "--delete"]], ids=["run", "gc"])
def test_writing_commands_say_that_they_cannot_write(command: list[str], store: str, capsys: Capture) -> None:
    assert main([*command, "--store", store]) == 2
    assert f"{store}: the store is read-only here" in capsys.readouterr().err


def test_chat_reads_a_checkpoint(
    example: ExampleStore, mounted: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    read_only_view(example.store.root, mounted)
    monkeypatch.setattr("sys.stdin", io.StringIO("/exit\n"))
    assert main(["chat", example.sft.record["key"][:12], "--store", str(mounted)]) == 0
    assert str(mounted) in capsys.readouterr().out
