"""Adapters in vLLM: ``python -m tests.support.inference.vllm_adapter_checks FOLDER [folded]``.

Stored adapters of the model in FOLDER, all in one engine; or the checkpoint in FOLDER, into which one was folded.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from align.config.runtime import EngineConfig, Runtime
from align.config.tuning import AdaptersTuning, PrefixTuning
from align.inference.engine import open_engine
from align.inference.protocol import Sampling
from align.inference.trainer_engine import trainer_logprobs
from align.inference.vllm import VllmEngine
from align.inference.vllm_internals import Adapter
from align.inference.weights import checkpoint_weights, weight_names
from align.models.chat.render import render_prompt
from align.models.loading import load_policy
from tests.support.models.tuning.confident_model import saved

TEXTS = ["Hello", "What is it?", "Name three colors, please.", "x"]
OTHERS = {
    "sequential": AdaptersTuning(position="sequential", size=16, after=["attention", "mlp"]),
    "llama": AdaptersTuning(kind="llama_adapter", tokens=4, layers=2),
}


def difference(engine: VllmEngine, model: Any) -> float:
    """The largest difference of log-probability between what the engine samples and what ``model`` gives it."""
    prompts = [render_prompt(engine.tokenizer, [{"role": "user", "content": text}]) for text in TEXTS]
    draws = [entry for some in engine.generate(prompts, Sampling(16, seed=3)) for entry in some]
    ours = trainer_logprobs(model, prompts, [entry.token_ids for entry in draws], 1.0)
    theirs = torch.tensor([value for entry in draws for value in entry.logprobs])
    scored = engine.score_tokens(prompts, [entry.token_ids for entry in draws], 1.0)
    again = torch.tensor([value for entry in scored for value in entry])
    return float(max((ours - theirs).abs().max(), (ours - again).abs().max()))


def folded(checkpoint: Path) -> None:
    runtime = Runtime(engine=EngineConfig(name="vllm", cpu_kv_cache_gb=0.1))
    engine = open_engine(checkpoint, runtime, precision="float32", max_length=128, seed=7, warn=print)
    actual = difference(engine, load_policy(checkpoint))
    assert actual < 1e-3, actual
    print("all checks passed")


def stored(tiny: Path, root: Path) -> None:
    prefix = PrefixTuning(tokens=4)
    checkpoint = saved(tiny, prefix, root / "prefix" / "model")
    base = root / "base"  # with room for the prefix's tokens, so that one engine takes all
    shutil.copytree(checkpoint, base, ignore=shutil.ignore_patterns("adapter"))
    runtime = Runtime(engine=EngineConfig(name="vllm", cpu_kv_cache_gb=0.1))
    engine = open_engine(checkpoint, runtime, precision="float32", max_length=128, seed=7, warn=print)
    assert isinstance(engine, VllmEngine)
    assert engine.adapter is not None

    assert difference(engine, load_policy(checkpoint)) < 1e-3
    assert difference(engine, load_policy(base)) > 0.1, "the prefix changes nothing, so nothing was checked"

    second_adapter = saved(tiny, prefix, root / "other" / "model", seed=2)
    engine.load_weights(checkpoint_weights(second_adapter))
    assert difference(engine, load_policy(second_adapter)) < 1e-3
    assert difference(engine, load_policy(checkpoint)) > 0.1

    for name, tuning in OTHERS.items():
        other = saved(base, tuning, root / name / "model")
        engine.adapter.remove()
        engine.adapter = Adapter(engine.runner.model, other, torch.float32)
        engine.names = weight_names(other)
        engine.load_weights(checkpoint_weights(other))
        actual = difference(engine, load_policy(other))
        assert actual < 1e-3, (name, actual)
        assert difference(engine, load_policy(base)) > 0.1, name
    engine.close()
    print("all checks passed")


if __name__ == "__main__":
    if sys.argv[2:] == ["folded"]:
        folded(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            stored(Path(sys.argv[1]), Path(folder))
