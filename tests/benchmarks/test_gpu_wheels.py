"""Wheels for a machine without a network: which are missing there, by pip from a local folder."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks import gpu_wheels
from benchmarks.gpu_wheels import Download, is_satisfied, own_requirements, read_installed, split
from tests.support.refusals import Refused


def make_wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """Write a wheel without code."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let pip see the wheels of a local folder alone."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def download(tmp_path: Path, installed: dict[str, str | None]) -> Download:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("apple<3\n")
    return Download(installed, "3.12", tmp_path / "wheels", constraints)


def test_only_what_is_missing_is_fetched_with_what_it_requires(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "apple", "2.0", "pear>=1", "old-python-only; python_version < '3.12'", "sweet; extra == 'taste'")
    make_wheel(index, "apple", "3.0")  # against the constraint
    make_wheel(index, "pear", "1.5")
    make_wheel(index, "sweet", "1.0")
    fetched = download(tmp_path, {"plum": "4.0", "torch": "2.11.0"})
    fetched.fetch([Requirement("apple[taste]"), Requirement("plum>=3"), Requirement("torch>=2")])
    assert sorted(wheel.name for wheel in fetched.wheels.values()) == [
        "apple-2.0-py3-none-any.whl", "pear-1.5-py3-none-any.whl", "sweet-1.0-py3-none-any.whl",
    ]  # fmt: skip
    assert sorted(fetched.folder.iterdir()) == sorted(fetched.wheels.values())


def test_an_older_version_there_is_replaced_but_never_torch(refused: Refused, index: Path, tmp_path: Path) -> None:
    make_wheel(index, "apple", "2.0", "torch>=2.12")
    refused(lambda: download(tmp_path, {"apple": "1.0", "torch": "2.11.0"}).fetch([Requirement("apple>=2")]))


def test_addition_is_fetched_and_unknown_version_is_reported(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_wheel(index, "apple", "2.0", "pear>=1")
    monkeypatch.setattr(gpu_wheels, "own_requirements", lambda: [Requirement("plum>=3"), Requirement("fig")])
    listed = tmp_path / "installed.txt"
    listed.write_text("apple==2.0\npear\nplum==3.1\nfig\n")
    assert gpu_wheels.main(["--installed", str(listed), "--out", str(tmp_path / "out"), "--add", "apple"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("apple-2.0-py3-none-any.whl")
    assert lines[2] == ("There in an unknown version, and not brought along: pear>=1. --add brings one along.")


def test_a_package_without_a_wheel_is_named(refused: Refused, index: Path, tmp_path: Path) -> None:
    refused(lambda: download(tmp_path, {}).fetch([Requirement("quince")]))


def test_the_list_of_that_machine(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "installed.txt"
    file.write_text("# a comment\nPyYAML==6.0.4\nhuggingface_hub\n\n")
    installed = read_installed(file)
    assert installed == {"pyyaml": "6.0.4", "huggingface-hub": None}
    assert is_satisfied(Requirement("PyYAML>=6"), installed)
    assert not is_satisfied(Requirement("PyYAML>=7"), installed)
    assert is_satisfied(Requirement("huggingface_hub>=1"), installed)  # of an unknown version
    file.write_text("PyYAML  6.0.4\n")
    refused(read_installed, file)


def test_align_and_its_tests_are_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert {"torch", "trl", "datasets", "pydantic", "pytest"} <= {
        requirement.name for requirement in own_requirements()
    }
    assert gpu_wheels.main(["--installed", str(tmp_path)]) == 2
    assert "expected the output of" in capsys.readouterr().err


def test_the_pieces_of_a_file_make_it_whole(tmp_path: Path) -> None:
    file = tmp_path / "large.whl"
    file.write_bytes(bytes(range(250)))
    pieces = split(file, tmp_path / "out", 100)
    assert [piece.parent.name for piece in pieces] == ["model-1", "model-2", "model-3"]
    assert b"".join(piece.read_bytes() for piece in pieces) == file.read_bytes()
