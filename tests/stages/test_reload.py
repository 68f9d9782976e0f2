"""What stages save is an ordinary checkpoint: in transformers and in vLLM it says what the trained model said."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.config.peft_options import peft_types
from align.models.loading import load_tokenizer
from align.models.tiny import make_tiny
from align.models.tuning.apply import save_tuned
from tests.support.models.tuning.tuning_cases import CASES, FEW, peft_case, push, tuning_of, wrapped
from tests.support.stages import vllm_reader
from tests.support.stages.trained_checkpoints import IDS, POLICIES, REWARDS, BaseModels, run

READER = Path(vllm_reader.__file__)
HAS_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
QUICK = ("pretrain", "sft-packed", "distill", "merge", "reward")
"""Those that no other test of the short run reads back."""


def slow_but_quick(names: dict[str, object]) -> list[object]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names]


Checkpoint = Callable[[str], tuple[Path, torch.Tensor]]
Read = Callable[[Path], dict[str, float]]


@pytest.fixture(scope="module")
def base_models(tiny_model: Path, tiny_reward: Path, tmp_path_factory: pytest.TempPathFactory) -> BaseModels:
    teacher = make_tiny(tmp_path_factory.mktemp("teacher") / "model", seed=5, hidden_size=96, layers=3)
    return BaseModels(tiny_model, tiny_reward, teacher)


@pytest.fixture(scope="module")
def checkpoint(base_models: BaseModels, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Makes each checkpoint once; its folder, and what the live model said to ``IDS``."""
    checkpoints: dict[str, tuple[Path, torch.Tensor]] = {}

    def get(name: str) -> tuple[Path, torch.Tensor]:
        if name not in checkpoints:
            checkpoints[name] = run(name, tmp_path_factory.mktemp("made") / name, base_models)
        return checkpoints[name]

    return get


def reading(kind: str, folder: Path, log: Path) -> Iterator[Read]:
    """An engine in a process of its own, which a process can have one of; it swaps weights."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(READER), kind, str(folder)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None

        def read(checkpoint: Path) -> dict[str, float]:
            process.stdin.write(f"{checkpoint}\n")
            process.stdin.flush()
            for line in process.stdout:
                if line.startswith(vllm_reader.ANSWER):
                    return json.loads(line.removeprefix(vllm_reader.ANSWER))
            raise AssertionError(f"vLLM read no checkpoint at {checkpoint}:\n{log.read_text()[-4000:]}")

        try:
            yield read
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def vllm_policy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Read]:
    yield from reading("policy", tiny_model, tmp_path_factory.mktemp("log") / "errors.txt")


@pytest.fixture(scope="module")
def vllm_reward(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Read]:
    yield from reading("reward", checkpoint("reward")[0], tmp_path_factory.mktemp("log") / "errors.txt")


@pytest.mark.parametrize("name", slow_but_quick({**POLICIES, **REWARDS}))
def test_transformers_says_what_the_trained_model_said(
    name: str, checkpoint: Checkpoint, base_models: BaseModels
) -> None:
    """By transformers' own loading, which knows nothing of ours; and something was trained or merged."""
    folder, live = checkpoint(name)
    loader = AutoModelForSequenceClassification if name in REWARDS else AutoModelForCausalLM
    model, info = loader.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        outputs = model.eval()(input_ids=IDS).logits
        start = AutoModelForCausalLM.from_pretrained(base_models.policy)(input_ids=IDS).logits
    assert outputs.shape == live.shape
    assert (outputs - live).abs().max() < 1e-4 * max(1.0, float(live.abs().max()))
    if name in REWARDS:
        assert live.abs().min() > 1e-3  # a new head gives 0
    else:
        assert (live - start).abs().max() > 0.01


@HAS_VLLM
@pytest.mark.parametrize("name", slow_but_quick(POLICIES))
def test_vllm_says_it_too(name: str, checkpoint: Checkpoint, vllm_policy: Read) -> None:
    """Log-probabilities in nats, in float32."""
    difference = vllm_policy(checkpoint(name)[0])
    assert difference["apart"] < 1e-3
    assert difference["moved"] > 0.01  # an engine that kept the weights it had would be no test


@HAS_VLLM
@pytest.mark.parametrize("name", slow_but_quick(REWARDS))
def test_vllm_scores_as_the_reward_model(name: str, checkpoint: Checkpoint, vllm_reward: Read) -> None:
    """At the end and on the way, as a process model's steps are read; with vLLM's defaults, which would put a score
    through a sigmoid if the checkpoint did not say that it is a number."""
    difference = vllm_reward(checkpoint(name)[0])
    assert difference["apart"] < 1e-4
    assert (difference["moved"] > 0.01) == (name != "reward")


TUNINGS = [*CASES, *(kind for kind in peft_types() if kind not in FEW)]


@HAS_VLLM
@pytest.mark.slow
@pytest.mark.parametrize("name", TUNINGS)
def test_vllm_reads_what_every_tuning_folds(name: str, tiny_model: Path, tmp_path: Path, vllm_policy: Read) -> None:
    """After a pretended training; ``tests/models/tuning/test_merged_weights.py`` has the same in transformers."""
    model = wrapped(tiny_model, tuning_of(CASES.get(name) or peft_case(name)))
    push(model)
    save_tuned(model, load_tokenizer(tiny_model), tmp_path / "model")
    difference = vllm_policy(tmp_path / "model")
    assert difference["apart"] < 1e-3
    assert difference["moved"] > 2e-3  # some move little, but more than what is let pass as equal
