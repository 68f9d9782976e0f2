"""Whatever the way of fitting: the saved folder answers as the live model, and the start is where it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from align.config.options import peft_types
from align.models.loading import load_policy, load_reward, load_tokenizer
from align.models.tuning.apply import initial_policy, save_tuned
from tests.support.models.tuning.tuning_cases import CASES, FEW, IDS, base, logits, peft_case, push, tuning_of, wrapped
from tests.support.refusals import Refused

TOLERANCE = 1e-4


def check(name: str, reward: bool, model_dir: Path, tmp_path: Path) -> None:
    tuning = tuning_of(CASES.get(name) or peft_case(name))
    model = wrapped(model_dir, tuning, reward)
    start = logits(model)
    push(model)
    live, before = logits(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert (live - start).abs().max() > 5e-3
    save_tuned(model, load_tokenizer(model_dir), tmp_path / "model")
    saved = (load_reward if reward else load_policy)(tmp_path / "model")
    assert (logits(saved) - live).abs().max() < TOLERANCE * max(1.0, float(live.abs().max()))
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())
    assert not list((tmp_path / "model").glob("*.bin"))
    # the reference: the model as it came in, and afterwards the trained one again
    came_in = logits(base(model_dir, reward))
    with initial_policy(model):
        actual = logits(model)
    if tuning.method == "qlora":
        assert (actual - start).abs().max() < TOLERANCE  # the quantized model is what is trained
    else:
        assert (actual - came_in).abs().max() < TOLERANCE * max(1.0, float(came_in.abs().max()))
        alone = PeftModel.from_pretrained(base(model_dir, reward), tmp_path / "adapter").eval()
        assert (logits(alone) - live).abs().max() < TOLERANCE * max(1.0, float(live.abs().max()))
    assert logits(model).equal(live)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_policy_answers_as_the_live_one(name: str, tiny_model: Path, tmp_path: Path) -> None:
    check(name, False, tiny_model, tmp_path)


@pytest.mark.parametrize("name", ["dora", "pissa", "eva", "loftq", "ia3", "vera"])
def test_a_saved_reward_model_scores_as_the_live_one(name: str, tiny_model: Path, tmp_path: Path) -> None:
    check(name, True, tiny_model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reward", [False, True], ids=["policy", "reward"])
@pytest.mark.parametrize("kind", [kind for kind in peft_types() if kind not in FEW])
def test_every_method_of_peft_folds(kind: str, reward: bool, tiny_model: Path, tmp_path: Path) -> None:
    check(kind, reward, tiny_model, tmp_path)


@pytest.mark.parametrize("name", ["lora", "pissa_niter", "loftq", "vera"])
def test_a_seed_gives_the_same_start_and_the_caller_draws_on(name: str, tiny_model: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (wrapped(tiny_model, tuning_of(CASES[name])) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(a.equal(b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_start_is_the_start_within_one_autocast_too(name: str, tiny_model: Path) -> None:
    """Autocast keeps its copy of a trained matrix for as long as it lasts, whatever stands in the matrix by then."""
    model = wrapped(tiny_model, tuning_of(CASES[name]))
    with torch.autocast("cpu", torch.bfloat16):
        start = logits(model)
    push(model)
    with torch.autocast("cpu", torch.bfloat16):
        live = logits(model)
        with initial_policy(model):
            actual = logits(model)
        assert logits(model).equal(live)
    with torch.autocast("cpu", torch.bfloat16):
        with initial_policy(model):
            alone = logits(model)
        assert logits(model).equal(live)
    assert actual.equal(alone)
    assert (live - start).abs().max() > 20 * (actual - start).abs().max()


@pytest.mark.parametrize("name", CASES)
def test_a_look_at_the_start_changes_no_gradient(name: str, tiny_model: Path) -> None:
    """PPO reuses its measuring passes, and the anchor looks back before the backward pass."""
    model = wrapped(tiny_model, tuning_of(CASES[name]))
    push(model)
    gradients = []
    for look_back in (False, True):
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        if look_back:
            with torch.no_grad(), initial_policy(model):
                model(input_ids=IDS)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(first.equal(second) for first, second in zip(*gradients, strict=True))


def test_no_look_back_at_a_start_that_a_pass_would_not_see(refused: Refused, tiny_model: Path) -> None:
    """FSDP2 and ZeRO-3 gather a parameter from memory of their own: the live policy would pass for its start."""
    model = wrapped(tiny_model, tuning_of(CASES["pissa"]))
    trained = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    trained.ds_id = 0
    refused(lambda: initial_policy(model).__enter__())
