"""``align export --format``: what it writes, measures and refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from huggingface_hub import ModelCard

from align.cli.main import main
from align.export import verify
from align.extensions.formats.gguf_tensors import encode
from tests.support.cli.example_store import ExampleStore
from tests.support.data.sample_build import row, write_build
from tests.support.fake_llmcompressor import write_interpreter
from tests.support.fork_server import Forking
from tests.support.models.families import write_family


@pytest.fixture(autouse=True)
def in_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "subprocess", Forking())


@pytest.fixture
def no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.export.distributions.has_llama_cpp", lambda: False)


@pytest.mark.usefixtures("no_llama_cpp")
def test_gguf_has_file_modelfile_and_card_with_cost(
    example: ExampleStore, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("22222222", "--format", "gguf", "--task-items", "8", "--json", check=True) == 0
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {"README.md", "Modelfile", "out-q8_0.gguf"}
    summary = json.loads(capsys.readouterr().out)
    assert summary["format"] == "gguf" and summary["dtype"] == "q8_0"
    reading = summary["cost"]["readings"][0]
    assert 0 < reading["kl"] < 0.01 and reading["same"] > 0.95 and reading["engine"].startswith("transformers")
    assert summary["cost"]["bytes"] < summary["cost"]["plain_bytes"] / 2
    assert reading["perplexity"] == pytest.approx(summary["cost"]["perplexity"], rel=0.02)
    # A random model solves no instruction.
    assert summary["cost"]["items"] == 8 and reading["solved"]["value"] == 0 == reading["change"]["value"]
    assert reading["solved"]["n"] == 8 and summary["cost"]["checkpoint"][0]["change"] is None
    text = (folder / "README.md").read_text()
    assert "| engine | KL per token |" in text and "llama-cpp-python is not installed" in text
    assert ModelCard.load(folder / "README.md").data.library_name == "gguf"
    assert "FROM ./out-q8_0.gguf" in (folder / "Modelfile").read_text()


def test_gguf_of_adapter_holds_merged_weights(
    example: ExampleStore, export: Callable[..., int], tmp_path: Path
) -> None:
    adapter = str(example.sft.path / "adapter")
    assert export(adapter, "--format", "gguf", "--gguf-type", "f16", output=tmp_path / "a") == 0
    assert export("22222222", "--format", "gguf", "--gguf-type", "f16", output=tmp_path / "b") == 0
    first = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "a" / "a-f16.gguf").tensors}
    second = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "b" / "b-f16.gguf").tensors}
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


def test_damaged_file_fails_and_leaves_no_folder(
    example: ExampleStore,
    export: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("align.extensions.formats.gguf_file.encode", lambda array, kind: encode(array * 1.1, kind))
    assert export("22222222", "--format", "gguf", check=True) == 1
    assert "more than" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gguf-type", "f16"), "--gguf-type goes with --format gguf."),
        (("--format", "gguf", "--dtype", "bfloat16"), "--format gguf has its own types."),
        (("--text", "x.txt"), "--text goes with a format whose weights are rounded"),
        (("--format", "lora", "--task-items", "3"), "--task-items goes with a format whose weights are rounded"),
        (("--format", "gguf", "--task-items", "-1"), "--task-items -1: must be 0, for no task score, or more."),
        (("--format", "gguf", "--text", "nowhere.txt"), "--text nowhere.txt: no such file"),
        (("--format", "gguf", "--gguf-type", "q4_k", "--llama-quantize", "nothing"), "nothing is not a program."),
        (("--format", "fp8", "--llmcompressor", "python"), "--llmcompressor goes with --format gptq or awq."),
        (("--format", "awq"), "--format awq needs an interpreter with llm-compressor."),
        (("--format", "gptq", "--calibration-rows", "0"), "--calibration-rows 0: must be at least 1."),
    ],
)
def test_options_that_do_not_fit_are_refused(
    words: tuple[str, ...], message: str, export: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("22222222", *words) == 2
    assert message in capsys.readouterr().err


def test_unsupported_family_is_refused_before_writing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_family("bloom", tmp_path / "model")
    assert main(["export", str(folder), "--output", str(tmp_path / "out"), "--format", "gguf"]) == 2
    assert "does not support models of type bloom. Supported: gemma2," in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_reward_model_has_no_gguf(export: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert export("33333333", "--format", "gguf") == 2
    assert "is for models that answer, and this is a reward model" in capsys.readouterr().err


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    os.chmod(path, 0o755)
    return str(path)


def test_q4_k_calls_the_named_program(export: Callable[..., int], tmp_path: Path) -> None:
    named = program(tmp_path / "quantize", f'echo "$3" > {tmp_path}/kind; cp "$1" "$2"')
    words = ("--format", "gguf", "--gguf-type", "q4_k", "--llama-quantize", named)
    assert export("22222222", *words) == 0
    assert (tmp_path / "kind").read_text() == "Q4_K_M\n"
    assert {path.name for path in (tmp_path / "out").glob("*.gguf")} == {"out-q4_k.gguf"}


def test_program_that_fails_is_quoted(
    export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = program(tmp_path / "quantize", "echo 'no such type' >&2; exit 3")
    words = ("--format", "gguf", "--gguf-type", "q4_k", "--llama-quantize", named)
    assert export("22222222", *words) == 1
    assert "failed (exit code 3): no such type" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else find_spec(name, *more)
    )


@pytest.mark.usefixtures("no_vllm")
def test_awq_is_calibrated_with_the_training_data(
    example: ExampleStore, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--format", "awq", "--llmcompressor", write_interpreter(tmp_path / "python"), "--task-items", "0")
    assert export("22222222", *words, "--json", check=True) == 0
    summary = json.loads(capsys.readouterr().out)
    reading = summary["cost"]["readings"][0]
    assert summary["format"] == summary["dtype"] == "awq" and 0 < reading["kl"] < 0.5
    assert summary["cost"]["bytes"] < summary["cost"]["plain_bytes"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "4-bit weights in groups of 64, rounded by AWQ in llm-compressor 0.14.0 with 2 rows" in text
    assert "experimental" not in text
    assert "of data." in text and "Not checked: vLLM is not installed." in text


def test_calibration_rows_come_from_the_named_build(
    example: ExampleStore, export: Callable[..., int], tmp_path: Path
) -> None:
    build = write_build(tmp_path / "mine", [row("a", "b"), row("c", "d"), row("e", "f")], [])
    words = ("--format", "gptq", "--llmcompressor", write_interpreter(tmp_path / "python"), "--group-size", "32")
    assert export("22222222", *words, "--calibration", str(build), "--calibration-rows", "2") == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "in groups of 32, rounded by GPTQ in llm-compressor 0.14.0 with 2 rows" in text and "of mine." in text
    assert "GPTQ is experimental" in text


def test_perplexity_is_that_of_the_named_text(
    export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A short text of one line.")
    words = ("--format", "gguf", "--text", str(text), "--json")
    assert export("22222222", *words, check=True) == 0
    shown = capsys.readouterr()
    cost: dict[str, Any] = json.loads(shown.out)["cost"]
    assert cost["text_tokens"] == len(text.read_text()) - 1
    # A toy model is not asked for a task score, and every step says what it does and how long it took.
    assert cost["items"] == 0 and "no task score for a model of" in shown.err
    for model in ("checkpoint", "export"):
        line = rf"the {model} answers 8 prompts and reads {len(text.read_text())} tokens, in transformers\n  \d+s, with"
        assert re.search(line, shown.err), shown.err
