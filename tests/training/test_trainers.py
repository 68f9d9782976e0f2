"""trl's trainers as we drive them: masters in float32, exact held-out means."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import trl.trainer.utils

from align.config.stages.reward import RewardConfig
from align.errors import UserError
from align.models.loading import load_policy, new_reward
from align.models.tuning.apply import apply_tuning
from align.training import held_out, order
from align.training.fit import fit
from align.training.progress import ReportProgress
from align.training.trainers import set_head_learning_rate
from tests.support.training.sft_setup import make_sft_trainer


def test_small_update_survives_in_float32_but_not_in_bfloat16(tiny_model: Path, tmp_path: Path) -> None:
    trainer, trained_model, encoded = make_sft_trainer(
        tmp_path, tiny_model, learning_rate=1e-6, warmup_ratio=0, max_steps=1
    )
    name = "model.layers.0.mlp.up_proj.weight"
    before = trainer.model.get_parameter(name).detach().clone()
    fit(trainer, trained_model, lambda split: held_out.supervised(trainer, encoded))
    after = trainer.model.get_parameter(name).detach()
    assert trainer.args.bf16
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert all(s["exp_avg"].dtype == torch.float32 for s in trainer.optimizer.state.values())
    step = after - before
    # AdamW's first step is the learning rate along the gradient's sign, wherever there is a gradient.
    assert (step.abs() > 5e-7).float().mean() > 0.9
    # The same step on bfloat16 weights: nearly every weight rounds back to what it was.
    narrow = before.bfloat16()
    assert ((narrow + step.bfloat16()) == narrow).float().mean() > 0.99


@pytest.mark.parametrize(
    ("tuning", "inputs", "wanted"), [("lora", None, 1e-4), ("lora", 3e-5, 3e-5), ("full", None, 1e-3)]
)
def test_a_score_head_learns_at_its_own_rate(
    tiny_model: Path, tuning: str, inputs: float | None, wanted: float
) -> None:
    config = RewardConfig(
        model="model", data="data", tuning={"method": tuning}, learning_rate=1e-3, head_learning_rate=inputs
    )  # type: ignore[arg-type]
    model = apply_tuning(new_reward(tiny_model), config.tuning, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    set_head_learning_rate(optimizer, model, config.head_rate)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {id(p) for p in trained.values()}
    for name, p in trained.items():
        assert rates[id(p)] == (wanted if "score." in name else 1e-3), name


def test_held_out_loss_is_the_mean_over_tokens(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _, encoded = make_sft_trainer(tmp_path, tiny_model, precision="float32")
    full = held_out.supervised(trainer, encoded)
    monkeypatch.setattr(held_out, "SCORING_TOKENS", 1)  # one row at a time: no padding at all
    counts: list[tuple[int, int]] = []
    trainer.report_scored = lambda done, total: counts.append((done, total))
    single = held_out.supervised(trainer, encoded)
    assert counts == [(done, len(encoded.rows)) for done in range(1, len(encoded.rows) + 1)]
    assert single["loss"] == pytest.approx(full["loss"], rel=1e-5)
    ids = [torch.tensor([row["input_ids"]]) for row in encoded.rows]
    labels = [torch.tensor([row["labels"]]) for row in encoded.rows]
    plain = load_policy(tiny_model)
    tokens = sum(int((y[:, 1:] != -100).sum()) for y in labels)
    with torch.no_grad():
        outputs = [plain(i, labels=y) for i, y in zip(ids, labels, strict=True)]
    total = sum(float(out.loss) * int((y[:, 1:] != -100).sum()) for out, y in zip(outputs, labels, strict=True))
    right = sum(int((out.logits[:, :-1].argmax(-1) == y[:, 1:]).sum()) for out, y in zip(outputs, labels, strict=True))
    assert full["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert full["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert full["token_accuracy"] == pytest.approx(right / tokens)


def test_only_labeled_positions_reach_the_vocabulary(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _, encoded = make_sft_trainer(tmp_path, tiny_model)
    calls: list[int] = []
    original = trl.trainer.utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        trl.trainer.utils._ChunkedLogProbFunction, "apply", lambda *a: calls.append(len(a[0])) or original(*a)
    )
    held_out.supervised(trainer, encoded)
    assert sum(calls) == sum(label != -100 for row in encoded.rows for label in row["labels"])


def test_rows_are_seen_in_our_order(tiny_model: Path, tmp_path: Path) -> None:
    trainer, _, encoded = make_sft_trainer(tmp_path, tiny_model, micro_batch_size=2)
    loader = trainer.get_train_dataloader()
    loader.batch_sampler.set_epoch(3)
    # Rows are grouped by the batch here, whatever the micro-batch is.
    expected = order.grouped_order(encoded.lengths, 4, 4, trainer.args.seed, 3)
    actual = [batch["input_ids"].shape[1] for step in loader for batch in step.micro_batches(2)]
    assert actual == [max(encoded.lengths[row] for row in expected[index : index + 2]) for index in range(0, 16, 2)]


def test_a_loss_that_is_not_finite_stops_the_stage(tiny_model: Path, tmp_path: Path) -> None:
    trainer, trained_model, _ = make_sft_trainer(tmp_path, tiny_model)
    with torch.no_grad():
        trainer.model.get_parameter("model.norm.weight").fill_(float("nan"))
    trainer.add_callback(ReportProgress(trained_model))
    with pytest.raises(UserError, match=r"training loss is nan at step 1\. Lower learning_rate"):
        trainer.train()


def test_trainer_options_reach_trl(tiny_model: Path, tmp_path: Path) -> None:
    trainer, _, _ = make_sft_trainer(tmp_path, tiny_model, trainer={"adam_beta2": 0.9}, gradient_checkpointing=True)
    assert trainer.args.adam_beta2 == 0.9
    assert trainer.args.gradient_checkpointing
