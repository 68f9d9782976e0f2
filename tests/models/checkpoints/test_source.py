"""Sources: each form is recognized and pinned, each mistake named."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.models.checkpoints.source import Origin, identity, resolve
from tests.support.models.small_gguf import small_gguf
from tests.support.refusals import Refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("source", "revision"),
    [
        ("smolm2-135m-instruct", None),
        ("HuggingFaceTB/SmolLM2-135M", None),
        ("HuggingFaceTB/SmolLM2-135M", "two words"),
        ("tiny", COMMIT),
        ("./nowhere", None),
        ("nowhere.gguf", None),
        ("empty", None),
        ("pickled", None),
        ("pickled/config.json", None),
    ],
)
def test_mistakes(refused: Refused, tmp_path: Path, source: str, revision: str | None) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (tmp_path / "pickled" / name).write_text("{}")
    refused(resolve, source, revision, tmp_path)


def test_forms(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(small_gguf())
    assert resolve(str(tiny_model), None, tmp_path).origin is Origin.FOLDER
    assert resolve("m.gguf", None, tmp_path).origin is Origin.GGUF
    assert resolve("a/b", COMMIT, tmp_path).origin is Origin.HUB
    assert identity("a/b", COMMIT, tmp_path) == f"hub:a/b@{COMMIT}"
    assert identity("tiny", None, tmp_path) != identity("smollm2-135m-instruct", None, tmp_path)


def test_folder_identity_follows_contents_not_names_or_notes(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    before = identity(str(copy), None, tmp_path)
    assert before == identity(str(tiny_model), None, tmp_path)
    (copy / "README.md").write_text("a note")
    assert identity(str(copy), None, tmp_path) == before
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert identity(str(copy), None, tmp_path) != before
