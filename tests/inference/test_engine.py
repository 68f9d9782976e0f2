"""Which engine is opened, and what is said when it is not the first choice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.config.runtime import EngineConfig, Runtime
from align.errors import UserError
from align.inference import vllm
from align.inference.engine import engine_dtype, open_engine
from align.inference.weights import checkpoint_weights, weight_names


def _open(model_dir: Path, name: str, messages: list[str]) -> str:
    runtime = Runtime(engine=EngineConfig(name=name))
    return open_engine(model_dir, runtime, precision="float32", max_length=64, seed=0, warn=messages.append).name


def test_auto_falls_back_and_says_so(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(vllm, "why_unusable", lambda: "vLLM does not import (ImportError: no _C)")
    assert _open(tiny_model, "auto", messages) == "transformers"
    assert messages == [
        "vLLM does not import (ImportError: no _C); sampling with transformers instead, which is slower"
    ]
    with pytest.raises(UserError, match=r"runtime\.engine\.name is vllm, but vLLM does not import"):
        _open(tiny_model, "vllm", messages)


def test_auto_falls_back_where_vllm_cannot_run_the_model(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "vLLM on a CPU has no attention for heads of 16 numbers, only of 32, 64"
    monkeypatch.setattr(vllm, "why_unusable", lambda: None)
    monkeypatch.setattr(vllm, "why_model_unusable", lambda model_dir, device, dtype: reason)
    warnings: list[str] = []
    assert _open(tiny_model, "auto", warnings) == "transformers"
    assert warnings == [f"{reason}; sampling with transformers instead, which is slower"]
    with pytest.raises(UserError, match=r"name is vllm, but vLLM on a CPU .*Set it to transformers or auto"):
        _open(tiny_model, "vllm", warnings)


def test_transformers_by_name_does_not_even_look_at_vllm(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def looked() -> str:
        raise AssertionError("looked for vLLM")

    monkeypatch.setattr(vllm, "why_unusable", looked)
    assert _open(tiny_model, "transformers", []) == "transformers"


def test_dtype_follows_the_precision_unless_set() -> None:
    assert engine_dtype(Runtime(), "bfloat16") == torch.bfloat16
    assert engine_dtype(Runtime(), "float32") == torch.float32
    assert engine_dtype(Runtime(engine=EngineConfig(dtype="float32")), "bfloat16") == torch.float32


def test_checkpoint_weights_are_the_files(tiny_model: Path, tmp_path: Path) -> None:
    weights = dict(checkpoint_weights(tiny_model))
    assert set(weights) == weight_names(tiny_model)
    assert "lm_head.weight" not in weights  # tied: an engine has to think of it
    with pytest.raises(UserError, match="holds no weights"):
        weight_names(tmp_path)
