"""Checkpoints of soft prompts, prefixes and adapters in vLLM: what is folded runs as it is, what is stored by hooks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from align.config.runtime import EngineConfig, Runtime
from align.config.tuning import AdaptersTuning, PromptTuning, PTuning, TuningBase
from align.errors import UserError
from align.inference.engine import open_engine
from align.inference.vllm_internals import why_unsupported
from align.models.chat.render import render_prompt
from align.models.loading import load_policy
from tests.support.fork_server import start_module
from tests.support.models.tuning.confident_model import confident_copy, saved

HAS_VLLM = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
SEQUENTIAL = AdaptersTuning(position="sequential", size=8)


@HAS_VLLM
def test_stored_adapters_run_in_vllm(tiny_model: Path, tmp_path: Path) -> None:
    """Prefix, sequential bottleneck and LLaMA-Adapter; the output names the check that failed."""
    base = confident_copy(tiny_model, tmp_path / "base")
    _passes(tmp_path, str(base))


def _passes(tmp_path: Path, *arguments: str) -> None:
    log = tmp_path / "log.txt"
    process = start_module("tests.support.inference.vllm_adapter_checks", arguments, log, vllm=True)
    assert process.wait(timeout=240) == 0, log.read_text()[-4000:]
    assert "all checks passed" in log.read_text()


@HAS_VLLM
@pytest.mark.slow
@pytest.mark.parametrize(
    "tuning",
    [PromptTuning(tokens=4), PTuning(tokens=4), AdaptersTuning(size=16)],
    ids=lambda tuning_case: tuning_case.label,
)
def test_folded_checkpoints_are_plain_to_vllm(tuning: TuningBase, tiny_model: Path, tmp_path: Path) -> None:
    folder = saved(confident_copy(tiny_model, tmp_path / "base"), tuning, tmp_path / "out" / "model")
    _passes(tmp_path, str(folder), "folded")


def test_the_transformers_engine_runs_a_stored_adapter(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    from align.inference.protocol import Sampling
    from align.inference.trainer_engine import trainer_logprobs

    folder = saved(tiny_model, SEQUENTIAL, tmp_path / "out" / "model")
    runtime = Runtime(device="cpu", engine=EngineConfig(name="transformers"))
    engine = open_engine(folder, runtime, precision="float32", max_length=128, seed=7, warn=print)
    prompts = [render_prompt(engine.tokenizer, [{"role": "user", "content": text}]) for text in ("Hello", "x")]
    draws = [entry for some in engine.generate(prompts, Sampling(12, seed=3)) for entry in some]
    tokens = [entry.token_ids for entry in draws]
    theirs = torch.tensor([value for entry in draws for value in entry.logprobs])
    ours = trainer_logprobs(load_policy(folder), prompts, tokens, 1.0)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(trainer_logprobs(load_policy(tiny_model), prompts, tokens, 1.0), theirs, atol=0.1)


def test_why_vllm_cannot_run_one(tiny_model: Path, tmp_path: Path) -> None:
    folder = saved(tiny_model, SEQUENTIAL, tmp_path / "out" / "model")
    assert why_unsupported(tiny_model, EngineConfig(), server=True) is None
    assert why_unsupported(folder, EngineConfig(name="vllm")) is None
    compiled = why_unsupported(folder, EngineConfig(name="vllm", compile=True))
    assert compiled is not None and "bottleneck 8 sequential" in compiled and "compiled" in compiled
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "olmo2"}), encoding="utf-8")
    strange = why_unsupported(folder, EngineConfig(name="auto"))
    assert strange is not None and strange.endswith("which vLLM's olmo2 models have no place for")


@HAS_VLLM
@pytest.mark.parametrize(
    ("settings", "actual"),
    [
        ({"rollouts": {"servers": 1}}, "names servers, but the checkpoint carries .*a vLLM server has no place"),
        (
            {"engine": {"name": "vllm", "compile": True}},
            "name is vllm, but the checkpoint carries .*a compiled vLLM model has no place",
        ),
    ],
)
def test_vllm_by_name_is_refused_where_it_cannot(
    settings: dict[str, Any], actual: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = saved(tiny_model, SEQUENTIAL, tmp_path / "out" / "model")
    runtime = Runtime.model_validate({"device": "cpu", **settings})
    with pytest.raises(UserError, match=actual):
        open_engine(folder, runtime, precision="float32", max_length=128, seed=7, warn=print)


@HAS_VLLM
def test_auto_falls_back_with_a_sentence(tiny_model: Path, tmp_path: Path) -> None:
    folder = saved(tiny_model, SEQUENTIAL, tmp_path / "out" / "model")
    messages: list[str] = []
    runtime = Runtime(device="cpu", engine=EngineConfig(name="auto", compile=True))
    engine = open_engine(folder, runtime, precision="float32", max_length=128, seed=7, warn=messages.append)
    assert engine.name == "transformers"
    assert (
        len(messages) == 1 and "bottleneck 8 sequential" in messages[0] and "with transformers instead" in messages[0]
    )
