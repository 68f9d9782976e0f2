"""What stages save is an ordinary checkpoint: in transformers and in vLLM it says what the trained model said."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from align.config.options import peft_types
from align.models.built_in import make_tiny
from align.models.loading import load_tokenizer
from align.models.tuning.apply import save_tuned
from tests.support.fork_server import start_module
from tests.support.models.tuning.tuning_cases import CASES, FEW, peft_case, push, tuning_of, wrapped
from tests.support.stages.trained_checkpoints import IDS, POLICIES, REWARDS, BaseModels, run

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
    questions, answers = (log.parent / name for name in ("questions", "answers"))
    for pipe in (questions, answers):
        os.mkfifo(pipe)
    arguments = [kind, str(folder), str(questions), str(answers)]
    process = start_module("tests.support.stages.vllm_reader", arguments, log, vllm=True)

    def ends() -> str:
        """Wait for its end, and return its last words."""
        process.wait(20)
        return log.read_text()[-4000:]

    # Opened to be written as well, so that nobody waits here for a reader that has failed.
    with os.fdopen(os.open(questions, os.O_RDWR), "w") as asked, os.fdopen(os.open(answers, os.O_RDWR), "r") as told:

        def read(checkpoint: Path) -> dict[str, float]:
            asked.write(f"{checkpoint}\n")
            asked.flush()
            while not select.select([told], [], [], 1)[0]:
                assert process.poll() is None, f"vLLM read no checkpoint at {checkpoint}:\n{ends()}"
            return json.loads(told.readline())

        try:
            yield read
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait(20)


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
