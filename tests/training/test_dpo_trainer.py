"""trl's DPO trainer as we drive it: the reference is a column, beta follows the step, and every loss is trl's own."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from align.config.stages.preference import DIFFERENCES, DpoConfig, Loss
from align.config.tuning import LoraTuning
from align.methods.call import Method
from align.methods.losses import PAIR_LOSSES, alpha_divergence, forward_kl, js_divergence
from align.models.loading import load_policy, load_tokenizer
from align.models.tuning.apply import apply_tuning
from align.store.artifacts import Kind
from align.training import held_out
from align.training.arguments import training_arguments
from align.training.fused_head import use_blockwise_head
from align.training.preference_trainers import PreparedDPO, WeightedLoss, beta_at
from align.training.rows import Encoded, encode_pairs
from tests.support.training.harness import context, data_artifact, rows


def made(root: Path, model: Path, encoded: Encoded, wrapped: Any = None, **options: Any) -> PreparedDPO:
    """A trainer on ``encoded``, whose rows have their reference log-probabilities."""
    config = DpoConfig(policy="m", data="d", learning_rate=1e-2, batch_size=8, max_length=128, precision="float32")
    inputs = context(root, config, model, data_artifact(root / "data", Kind.PREFERENCES), "policy")
    use_blockwise_head()
    trainer = PreparedDPO(
        model=wrapped if wrapped is not None else load_policy(model),
        beta_at=lambda step: 0.5,
        args=training_arguments(DPOConfig, inputs, 8, precompute_ref_log_probs=True, **options),
        train_dataset=Dataset.from_list(encoded.rows),
        processing_class=load_tokenizer(model),
    )
    trainer.row_lengths = encoded.lengths
    return trainer


def scored(model: Path, chosen: float = -20.0, rejected: float = -50.0) -> Encoded:
    """Eight pairs, the reference's log-probabilities made up."""
    encoded = encode_pairs(load_tokenizer(model), rows(8), 128)
    for index, row in enumerate(encoded.rows):
        row["ref_chosen_logps"], row["ref_rejected_logps"] = chosen - index, rejected + index  # type: ignore[assignment]
    return encoded


def logprobs(model: Path, encoded: Encoded) -> dict[str, torch.Tensor]:
    """Sums of the sides' log-probabilities, less the reference's, and their tokens; from plain logits."""
    policy = load_policy(model)
    outcome: dict[str, list[float]] = {name: [] for name in ("c", "r", "lc", "lr", "pc", "pr")}
    for row in encoded.rows:
        for side, name in (("chosen", "c"), ("rejected", "r")):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad():
                every = policy(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
            total = float(every[-len(row[f"{side}_ids"]) :].sum())
            outcome[name].append(total - float(row[f"ref_{side}_logps"]))  # type: ignore[arg-type]
            outcome[f"p{name}"].append(total)
            outcome[f"l{name}"].append(len(row[f"{side}_ids"]))
    return {name: torch.tensor(values) for name, values in outcome.items()}


def expected(loss: str, p: dict[str, torch.Tensor], b: float = 0.5, e: float = 0.1) -> float:
    """Each loss as its paper writes it, of log-ratios ``c`` and ``r``; beta ``b``, smoothing ``e``."""
    log, sig = torch.nn.functional.logsigmoid, torch.sigmoid
    c, r = p["c"], p["r"]
    d = b * (c - r)
    per_token = c / p["lc"] - r / p["lr"]
    q = sig(d)
    values = {
        "sigmoid": lambda: -log(d),
        "sigmoid_norm": lambda: -log(b * per_token),
        "hinge": lambda: torch.relu(1 - d),
        "ipo": lambda: (per_token - 1 / (2 * b)) ** 2,
        "robust": lambda: (-(1 - e) * log(d) + e * log(-d)) / (1 - 2 * e),
        "exo_pair": lambda: q * (q.log() - math.log(1 - e)) + (1 - q) * (log(-d) - math.log(e)),
        "nca_pair": lambda: -log(b * c) - 0.5 * log(-b * c) - 0.5 * log(-b * r),
        "bco_pair": lambda: -log(b * c) - log(-b * r),
        "sppo_hard": lambda: (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
        "aot": lambda: _smoothed(b * ((p["pc"] - p["pr"]).sort()[0] - (p["pc"] - c - p["pr"] + r).sort()[0]), e),
        "aot_unpaired": lambda: _smoothed(b * (c.sort()[0] - r.sort()[0]), e),
        "apo_zero": lambda: 1 - sig(b * c) + sig(b * r),
        "apo_down": lambda: sig(b * c) + 1 - sig(d),
        "discopop": lambda: -log(d) * (1 - sig(d / 0.05)) + torch.exp(-d) * sig(d / 0.05),
        "sft": lambda: -p["pc"].sum() / p["lc"].sum(),
    }
    return float(values[loss]().mean())


def _smoothed(d: torch.Tensor, e: float) -> torch.Tensor:
    log = torch.nn.functional.logsigmoid
    return -(1 - e) * log(d) - e * log(-d)


def test_every_loss_is_what_its_paper_writes(tiny_model: Path, tmp_path: Path) -> None:
    encoded = scored(tiny_model)
    trainer = made(tmp_path, tiny_model, encoded, label_smoothing=0.1)
    parts = logprobs(tiny_model, encoded)
    batch = trainer._prepare_inputs(trainer.data_collator(encoded.rows))
    names = get_args(Loss)
    assert len(names) == 15
    trainer.fields = {"label_smoothing": 0.1, "discopop_tau": 0.05}
    for name in names:
        trainer.losses = [WeightedLoss(Method(PAIR_LOSSES[name]), 1.0)]
        with torch.no_grad():
            actual = float(trainer.compute_loss(trainer.model, batch))
        assert actual == pytest.approx(expected(name, parts), rel=2e-4, abs=2e-4), name
    trainer.losses = [WeightedLoss(Method(PAIR_LOSSES["sigmoid"]), 2.0), WeightedLoss(Method(PAIR_LOSSES["sft"]), 0.25)]
    with torch.no_grad():
        actual = float(trainer.compute_loss(trainer.model, batch))
    assert actual == pytest.approx(2 * expected("sigmoid", parts) + 0.25 * expected("sft", parts), rel=2e-4)


DIVERGENCES = {
    "reverse_kl": None,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": partial(alpha_divergence, alpha=0.5),
}


@pytest.mark.parametrize(
    ("divergence", "options"),
    [("reverse_kl", {}), ("reverse_kl", {"ld_alpha": 0.25}), ("reverse_kl", {"use_weighting": True})]
    + [(name, {}) for name in DIVERGENCES if name != "reverse_kl"],
)
def test_losses_and_metrics_equal_trl(
    tiny_model: Path, tmp_path: Path, divergence: str, options: dict[str, Any]
) -> None:
    """Every loss, its gradient and the curves, with each option that changes the log-ratios, to the last bit."""
    encoded = scored(tiny_model)
    # References near the policy, since the exponential of a drift of 50 nats is no number.
    sums = logprobs(tiny_model, encoded)
    for index, row in enumerate(encoded.rows):
        row["ref_chosen_logps"] = float(sums["pc"][index]) - 0.3 * index  # type: ignore[assignment]
        row["ref_rejected_logps"] = float(sums["pr"][index]) + 0.2 * index - 0.5  # type: ignore[assignment]
    trainer = made(tmp_path, tiny_model, encoded, label_smoothing=0.1, discopop_tau=0.05, **options)
    trainer.fields = {"label_smoothing": 0.1, "discopop_tau": 0.05}
    trainer.f_divergence_type, trainer.divergence = divergence, DIVERGENCES[divergence]
    trainer.f_alpha_divergence_coef = 0.5
    batch = trainer._prepare_inputs(trainer.data_collator(encoded.rows))
    weight = trainer.model.get_input_embeddings().weight
    names = sorted(set(get_args(Loss)) if divergence == "reverse_kl" else DIFFERENCES)
    if options.get("use_weighting"):
        # trl 1.16 multiplies in place, which fails after relu and expand. The AOT losses have no pairs.
        names = [name for name in names if name not in ("hinge", "sft", "aot", "aot_unpaired")]
    for name in names:
        trainer.losses, trainer.loss_types = [WeightedLoss(Method(PAIR_LOSSES[name]), 0.75)], [name]
        trainer.loss_weights = [0.75]
        results = []
        for compute in (DPOTrainer._compute_loss, PreparedDPO._compute_loss):
            trainer._metrics["train"].clear()
            trainer._total_train_tokens = 0
            loss = compute(trainer, trainer.model, batch, False)
            (gradient,) = torch.autograd.grad(loss, weight)
            results.append(
                (loss.detach(), gradient, {key: values[-1] for key, values in trainer._metrics["train"].items()})
            )
        theirs, ours = results
        assert torch.equal(theirs[0], ours[0]), name
        assert torch.equal(theirs[1], ours[1]), name
        assert theirs[2] == pytest.approx(ours[2], rel=1e-6), name


def test_tokens_beyond_the_shorter_side_count_ld_alpha(tiny_model: Path, tmp_path: Path) -> None:
    encoded = scored(tiny_model)
    trainer = made(tmp_path, tiny_model, encoded, ld_alpha=0.25)
    policy, losses = load_policy(tiny_model), []
    for row in encoded.rows:
        sums = []
        shared = min(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for side in ("chosen", "rejected"):
            answer = row[f"{side}_ids"]
            ids = torch.tensor([row["prompt_ids"] + answer])
            with torch.no_grad():
                every = policy(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[-len(answer) :, 0]
            weighted = float(every[:shared].sum() + 0.25 * every[shared:].sum())
            sums.append(weighted - row[f"ref_{side}_logps"])  # type: ignore[operator]
        losses.append(-torch.nn.functional.logsigmoid(torch.tensor(0.5 * (sums[0] - sums[1]))))
    with torch.no_grad():
        actual = float(
            trainer.compute_loss(trainer.model, trainer._prepare_inputs(trainer.data_collator(encoded.rows)))
        )
    assert actual == pytest.approx(float(torch.stack(losses).mean()), rel=2e-4)


def test_the_reference_is_the_column_and_no_adapter_is_copied(tiny_model: Path, tmp_path: Path) -> None:
    """trl would copy the adapter as its reference; the policy then has one adapter, and the columns decide."""
    model = apply_tuning(load_policy(tiny_model), LoraTuning(rank=4), 0)
    encoded = scored(tiny_model)
    trainer = made(tmp_path, tiny_model, encoded, model)
    assert trainer.ref_model is None
    assert trainer.model.peft_config.keys() == {"default"}
    parts = logprobs(tiny_model, encoded)
    actual = held_out.preferences(trainer, encoded)
    assert actual["margin"] == pytest.approx(0.5 * float((parts["c"] - parts["r"]).mean()), rel=1e-4)
    assert actual["accuracy"] == pytest.approx(float((parts["c"] > parts["r"]).float().mean()))


def test_beta_follows_the_steps(tiny_model: Path, tmp_path: Path) -> None:
    encoded = scored(tiny_model)
    trainer = made(tmp_path, tiny_model, encoded)
    batch = trainer._prepare_inputs(trainer.data_collator(encoded.rows))
    parts = logprobs(tiny_model, encoded)
    trainer._beta_at = lambda step: beta_at(step, 5, 0.5, 0.1, "linear")
    for step, beta in ((0, 0.5), (2, 0.3), (4, 0.1), (5, 0.1)):
        trainer.state.global_step = step
        with torch.no_grad():
            loss = float(trainer.compute_loss(trainer.model, batch))
        assert loss == pytest.approx(expected("sigmoid", parts, b=beta), rel=2e-4)
    assert beta_at(2, 5, 0.5, 0.1, "cosine") == pytest.approx(0.3)
    assert beta_at(1, 5, 0.5, 0.1, "cosine") == pytest.approx(0.1 + 0.4 * (1 + math.cos(math.pi / 4)) / 2)
    assert beta_at(0, 1, 0.5, 0.1, "linear") == 0.5
    assert beta_at(3, 5, 0.5, None, "constant") == 0.5


def test_what_is_overridden_in_trl_is_there() -> None:
    """An upgrade that moves one of these would leave our override unused, and trl would score a reference itself."""
    for name in ("_prepare_dataset", "_precompute_ref_logps", "_get_train_sampler", "create_model_card"):
        assert callable(getattr(DPOTrainer, name)), name
    assert DPOTrainer.__dict__["compute_loss"]
