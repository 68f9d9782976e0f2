"""Every way of fitting that folds into weights, and a pretended training: every trained weight gets a push."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from align.config.tuning import Tuning, TuningBase
from align.models.loading import load_policy, new_reward
from align.models.tuning.apply import apply_tuning, load_for_tuning

IDS = torch.tensor([[1, 40, 41, 42, 2, 1, 50, 60, 70, 80]])
ROWS = [list(range(4 + start, 60 + start)) for start in range(20)]

LORA: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "olora": {"init": "olora", "rslora": True},
    "pissa": {"init": "pissa"},
    "pissa_niter": {"init": "pissa_niter_4"},
    "pissa_dora": {"init": "pissa", "dora": True},
    "eva": {"init": "eva"},
    "embeddings": {"save_modules": ["embed_tokens"]},
    "tokens": {"train_tokens": ["<|im_start|>", "<|im_end|>"]},
    "last": {"last_layers": 1},
    "last_pissa": {"last_layers": 1, "init": "pissa"},
}
QLORA: dict[str, dict[str, Any]] = {
    "qlora_q_proj": {"targets": ["q_proj"]},
    "nf4": {},
    "fp4": {"quantization": "fp4", "double_quantization": False},
    "qdora": {"dora": True},
    "loftq": {"init": "loftq"},
    "loftq_dora": {"init": "loftq", "dora": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 16},
    "boft": {"boft_block_size": 4},
    "vblora": {"num_vectors": 16, "vector_length": 16},
    "randlora": {"r": 4},
    "fourierft": {"n_frequency": 50},
}
"""Sizes that fit the two-layer model."""
FEW = ("vera", "lokr", "oft", "ln_tuning")


def peft_case(kind: str) -> dict[str, Any]:
    return {"method": "peft", "type": kind, "options": OPTIONS.get(kind, {})}


CASES: dict[str, dict[str, Any]] = {
    **{name: {"method": "lora", "rank": 4, **fields} for name, fields in LORA.items()},
    **{name: {"method": "qlora", "rank": 4, **fields} for name, fields in QLORA.items()},
    "ia3": {"method": "ia3"},
    **{kind: peft_case(kind) for kind in FEW},
}


def tuning_of(fields: dict[str, Any]) -> TuningBase:
    tuning: TuningBase = TypeAdapter(Tuning).validate_python(fields)
    return tuning


def base(model_dir: Path, reward: bool = False) -> Any:
    """The model as it comes in; a reward model's head is no longer zero."""
    model = new_reward(model_dir) if reward else load_policy(model_dir)
    return _head(model) if reward else model


def wrapped(model_dir: Path, tuning: TuningBase, reward: bool = False) -> Any:
    model = load_for_tuning(model_dir, tuning, reward=reward)
    return apply_tuning(_head(model) if reward else model, tuning, 7, rows=ROWS).eval()


def _head(model: Any) -> Any:
    model.score.weight.data.normal_(generator=torch.Generator().manual_seed(5))
    return model


def push(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result
