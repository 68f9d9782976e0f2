"""The parity probe: quiet for equal weights, loud for one changed tensor, with the causes named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.inference.trainer_engine import ParityError, compare_experts, probe
from align.inference.transformers import TransformersEngine
from align.models.experts import routers
from align.models.loading import load_policy
from align.models.tuning.peft_layers import merged_weights
from tests.support.models.families import write_family

PROMPTS = [[1, 30, 31], [1, 40, 41, 42], [1, 50, 51]]


@pytest.fixture
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(tiny_model, device=torch.device("cpu"), dtype=torch.float32, batch_size=8)


def test_equal_weights_pass_and_the_trainer_is_left_alone(engine: TransformersEngine, tiny_model: Path) -> None:
    model = load_policy(tiny_model).train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    state = probe(engine, model, PROMPTS, temperature=0.8)
    assert state.mean_gap < 1e-5
    assert state.tolerance == 1e-3
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"]
)
def test_one_changed_tensor_is_found(engine: TransformersEngine, tiny_model: Path, name: str) -> None:
    model = load_policy(tiny_model)
    weights = {key: tensor.clone() for key, tensor in merged_weights(model)}
    weights[name] *= 1.5
    engine.load_weights(weights.items())
    with pytest.raises(ParityError, match="weights not loaded into the engine"):
        probe(engine, model, PROMPTS)


def test_wrong_temperature_is_found(engine: TransformersEngine, tiny_model: Path) -> None:
    draws = engine.generate

    def hot(prompts, sampling, on_progress=None):  # type: ignore[no-untyped-def]
        return draws(prompts, type(sampling)(**{**sampling.__dict__, "temperature": 1.0}), on_progress)

    engine.generate = hot  # type: ignore[method-assign]
    with pytest.raises(ParityError, match="another temperature"):
        probe(engine, load_policy(tiny_model), PROMPTS, temperature=0.7)


def test_other_experts_of_a_mixture_are_counted(tmp_path: Path) -> None:
    folder = write_family("qwen3_moe", tmp_path / "model")
    engine = TransformersEngine(folder, device=torch.device("cpu"), dtype=torch.float32, batch_size=8)
    model = load_policy(folder)
    assert probe(engine, model, PROMPTS).router_disagreement == 0.0
    for router in routers(engine.model).values():
        router.data = router.data.flip(0)
    assert (compare_experts(engine, model, PROMPTS) or 0.0) > 0.5


def test_dense_models_have_no_disagreement(engine: TransformersEngine, tiny_model: Path) -> None:
    assert probe(engine, load_policy(tiny_model), PROMPTS).router_disagreement is None
