"""``align serve``: checks before a server starts, and the command that starts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from itertools import pairwise
from pathlib import Path

import pytest

from align.cli.main import main
from align.cli.serve import ended_by_signals
from align.inference.server_guard import KEY_FILE
from align.inference.servers.openai_server import ServedModel
from tests.support.cli.example_store import ExampleStore


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--adapters", "tuned"), "--adapters tuned: write NAME=PATH"),
        (("--adapters", "tuned=nowhere"), "has no adapter_config.json"),
        (("--adapters", "model=ADAPTER"), "the model itself has this name"),
        (("--adapters", "a=ADAPTER", "a=ADAPTER"), "two adapters have the name a"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(
    words: tuple[str, ...], message: str, trained: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    options = [word.replace("ADAPTER", str(trained / "adapter")) for word in words]
    assert main(["serve", str(tiny_model), *options]) == 2
    assert message in capsys.readouterr().err


def test_adapter_of_another_base_is_refused(
    example: ExampleStore, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights would be added to a model that it was not trained on, without an error of vLLM."""
    pytest.importorskip("vllm")
    other = Path(shutil.copytree(example.sft.model, tmp_path / "other"))
    adapter = example.sft.path / "adapter"
    assert main(["serve", str(other), "--adapters", f"tuned={adapter}"]) == 2
    assert str(adapter) in capsys.readouterr().err


def test_two_checkpoints_share_no_adapters_and_no_name(
    tiny_model: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("vllm")
    models = (str(tiny_model), str(trained / "model"))
    assert main(["serve", *models, "--adapters", f"a={trained / 'adapter'}"]) == 2
    assert "--adapters belong to one base model" in capsys.readouterr().err
    assert main(["serve", *models, "--name", "m"]) == 2
    assert "--name is the name of one model" in capsys.readouterr().err


def test_missing_vllm_is_named(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("align.cli.serve.importlib.util.find_spec", lambda name: None)
    assert main(["serve", str(tiny_model)]) == 2
    assert "align serve needs vLLM, which is not installed" in capsys.readouterr().err


def test_command_has_loopback_guard_and_no_key(tmp_path: Path) -> None:
    model = ServedModel(
        tmp_path,
        "m",
        {"a": tmp_path / "x"},
        largest_rank=32,
        reasoning_parser="qwen3",
        is_on_cpu=True,
        options=("--seed=1",),
    )
    command = model.command(8001)
    pairs = dict(pairwise(command))
    assert pairs["--host"] == "127.0.0.1" and pairs["--port"] == "8001"
    assert pairs["--middleware"] == "align.inference.server_guard.Guard" and pairs["--generation-config"] == "auto"
    assert pairs["--max-lora-rank"] == "32" and pairs["--lora-modules"] == f"a={tmp_path / 'x'}"
    assert pairs["--reasoning-parser"] == "qwen3" and command[-1] == "--seed=1"
    assert not any(KEY_FILE in word or "key" in word.removeprefix("--kv") for word in command if "/" not in word)
    assert json.dumps(command)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_command_also_in_background(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)  # as a shell starts a background job
    try:
        with pytest.raises(KeyboardInterrupt), ended_by_signals():
            os.kill(os.getpid(), number)
            signal.pause()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)
