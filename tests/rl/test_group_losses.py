"""Losses without a critic: worked by hand, and equal to what trl's own functions make of the same numbers."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from align.config.stages.policy_gradient import PRESETS
from align.methods.call import Method
from align.rl import GrpoConfig
from align.rl.losses import loss_count
from align.rl.objectives.selection import ONLINE_LOSSES, pair_loss
from tests.support.rl.policy_losses import make_tokens, policy_loss

MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, True]])
OLD = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, 0.0, 0.0], [-0.7, -2.2, 0.0], [-3.0, -0.2, -1.1]])
MOVED = torch.tensor([[0.5, -0.4, 0.1], [0.3, 0.0, 0.0], [-0.6, 0.2, 0.0], [0.05, 2.0, -0.3]])
ADVANTAGES = torch.tensor([1.0, -0.5, 0.25, -1.5])
MAX_TOKENS = 5


def trl_grpo(loss: str, clip: tuple[float, float], new: torch.Tensor) -> torch.Tensor:
    """``GRPOTrainer._compute_loss`` of the installed trl; it fails here where trl changes what it needs."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    low, high = clip
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **options: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if loss == "gspo" else "token",
        beta=0.0,
        loss_type="grpo" if loss == "gspo" else loss,
        epsilon_low=low,
        epsilon_high=1 + high if loss == "cispo" else high,  # there the cap itself
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_TOKENS,
        accelerator=SimpleNamespace(num_processes=1, reduce=lambda t, reduction: t, gather=lambda t: t),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(4, 3, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": MASK.long(), "completion_ids": ids, "completion_mask": MASK.long(),
        "advantages": ADVANTAGES, "old_per_token_logps": OLD, "num_items_in_batch": MASK.sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(stub, None, inputs)


def trl_rloo(clip: float, new: torch.Tensor) -> torch.Tensor:
    """``RLOOTrainer._compute_loss`` of the installed trl."""
    from trl.trainer.rloo_trainer import RLOOTrainer

    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **options: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False,
        epsilon_low=clip,
        epsilon_high=clip,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(reduce=lambda t, reduction: t, gather=lambda t: t),
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(4, 3, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": MASK.long(), "completion_ids": ids, "completion_mask": MASK.long(),
        "advantages": ADVANTAGES, "old_logps": (OLD * MASK).sum(1),
    }  # fmt: skip
    return RLOOTrainer._compute_loss(stub, None, inputs)


def trl_dpo(loss: str, new: torch.Tensor) -> torch.Tensor:
    """``DPOTrainer._compute_loss`` of the installed trl, on the pairs of ``pair``: rows 0 and 3 are the better ones."""
    from trl.trainer.dpo_trainer import DPOTrainer

    order, prompt = [0, 3, 1, 2], torch.zeros(4, 1, dtype=torch.long)
    mask, nothing = MASK[order], torch.zeros(4, 3)
    outputs = SimpleNamespace(log_probs=new[order] * mask, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss],
        loss_weights=[1.0],
        beta=0.5,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    reference = (OLD * MASK).sum(dim=1)[order]
    inputs = {
        "input_ids": torch.zeros(4, 4, dtype=torch.long), "completion_mask": torch.cat([prompt, mask.long()], dim=1),
        "ref_chosen_logps": reference[:2], "ref_rejected_logps": reference[2:],
    }  # fmt: skip
    return DPOTrainer._compute_loss(stub, lambda **values: outputs, inputs, False)


def with_gradient(loss_of):
    new = (OLD + MOVED).requires_grad_()
    loss = loss_of(new)
    (gradient,) = torch.autograd.grad(loss, new)
    return loss.detach(), gradient


@pytest.mark.parametrize("loss", PRESETS)
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.1, 0.4)], ids=["even", "higher"])
def test_every_variant_is_trl_s_to_the_gradient(loss, clip):
    preset = PRESETS[loss]

    def ours(new):
        tokens = make_tokens(new, OLD, ADVANTAGES[:, None] * MASK, MASK)
        count = loss_count([MASK], preset.aggregation, MAX_TOKENS)
        low, high = clip
        options = {"high": high} if loss == "cispo" else {"low": low, "high": high}
        return policy_loss(tokens, count, name=loss, aggregation=preset.aggregation, **options).loss

    for actual, expected in zip(with_gradient(ours), with_gradient(lambda new: trl_grpo(loss, clip, new)), strict=True):
        assert torch.allclose(actual, expected, atol=1e-6), (actual, expected)


def test_rloo_is_trl_s_to_the_gradient():
    def ours(new):
        tokens = make_tokens(new, OLD, ADVANTAGES[:, None] * MASK, MASK)
        return policy_loss(tokens, 4.0, name="rloo", aggregation="sequence").loss

    for actual, expected in zip(with_gradient(ours), with_gradient(lambda new: trl_rloo(0.2, new)), strict=True):
        assert torch.allclose(actual, expected, atol=1e-6), (actual, expected)


def test_clip_ranges_follow_from_the_variant():
    def clip(**fields):
        return GrpoConfig.for_trainer(learning_rate=1e-6, **fields).clip

    assert clip() == (0.2, 0.2)
    assert clip(loss="dapo") == (0.2, 0.28)
    assert clip(loss="dapo", clip_range=0.1) == (0.1, 0.1)
    assert clip(loss="gspo") == (3e-4, 4e-4)
    assert clip(loss="cispo") == (0.2, 4.0)
    assert clip(loss="cispo", clip_range_high=1.0) == (0.2, 1.0)


def test_ratios_of_a_response_leave_padding_out():
    # row 0: 0.5 - 0.4 + 0.1 = 0.2 over 3 tokens; row 1: 0.3 over 1
    new = (OLD + MOVED).masked_fill(~MASK, 9.0)
    tokens = make_tokens(new, OLD, ADVANTAGES[:, None] * MASK, MASK)
    assert tokens.response_log_ratio[:2].flatten().tolist() == pytest.approx([0.2, 0.3])
    assert tokens.mean_log_ratio[:2].flatten().tolist() == pytest.approx([0.2 / 3, 0.3])


BETTER_FIRST = [0, 1, 3, 2]
"""Rows of the pairs, the better one first."""


def pair_terms(kind, new, decided=(True, True), count=2.0, **options):
    rows = [tensor[BETTER_FIRST] for tensor in (new, OLD, MASK)]
    loss = Method(ONLINE_LOSSES[kind])
    fields = {"beta": 0.5, "label_smoothing": 0.0} | options
    return pair_loss(loss, *rows[:2], torch.tensor(decided), rows[2], count, **fields)


def pair(kind, **options):
    return pair_terms(kind, (OLD + MOVED).masked_fill(~MASK, 5.0), **options)


def test_pair_losses_by_hand():
    # drift: 0.2, 0.3, -0.4, 1.75; margins: 0.2 - 0.3 = -0.1 and -(-0.4) + 1.75 = 2.15
    right = [torch.tensor(0.5 * m).sigmoid().log().item() for m in (-0.1, 2.15)]
    wrong = [torch.tensor(-0.5 * m).sigmoid().log().item() for m in (-0.1, 2.15)]
    assert pair("sigmoid").loss.item() == pytest.approx(-sum(right) / 2, abs=1e-6)
    smoothed = pair("sigmoid", label_smoothing=0.1).loss.item()
    assert smoothed == pytest.approx(-(0.9 * sum(right) + 0.1 * sum(wrong)) / 2, abs=1e-6)
    # a token's: 0.2 / 3, 0.3, -0.4 / 2, 1.75 / 3
    per_token = (0.2 / 3 - 0.3, 0.4 / 2 + 1.75 / 3)
    assert pair("ipo").loss.item() == pytest.approx(sum((m - 1) ** 2 for m in per_token) / 2, abs=1e-5)
    assert pair("hinge").loss.item() == pytest.approx((1.05 + 0.0) / 2, abs=1e-6)
    assert pair("sigmoid").sums["accuracy"].item() == 1.0
    assert pair("sigmoid").sums["margin"].item() == pytest.approx(0.5 * 2.05, abs=1e-6)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_pair_losses_are_those_of_stage_dpo_to_the_gradient(kind):
    def ours(new):
        return pair_terms(kind, new).loss

    for computed, expected in zip(with_gradient(ours), with_gradient(lambda new: trl_dpo(kind, new)), strict=True):
        assert torch.allclose(computed, expected, atol=1e-6), (computed, expected)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_ties_count_for_nothing(kind):
    single_pair = pair(kind, decided=(False, True), count=1.0)
    both = pair(kind)
    first = pair(kind, decided=(True, False), count=1.0)
    assert both.loss.item() == pytest.approx((single_pair.loss.item() + first.loss.item()) / 2)
