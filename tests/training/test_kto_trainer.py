"""trl's KTO trainer as we drive it: its loss on our groups is the paper's, and held-out scores are exact."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from align.config.stages.preference import KtoConfig
from align.models.loading import load_policy, load_tokenizer
from align.store.artifacts import Kind
from align.training import preference_trainers
from align.training.arguments import training_arguments
from align.training.fused_head import use_blockwise_head
from align.training.micro_batches import SHARE
from align.training.preference_trainers import PreparedKTO, held_out
from align.training.rows import Encoded
from align.training.unpaired import add_mismatched, encode_unpaired, fixed_groups, unpair
from tests.support.training.harness import context, data_artifact, rows

BETA, WANTED = 0.5, 1.5


def made(root: Path, model: Path, loss: str = "kto") -> tuple[PreparedKTO, Encoded]:
    encoded = encode_unpaired(load_tokenizer(model), unpair(rows(8)), 128)
    groups = fixed_groups(encoded.lengths, 4, 8, 1)
    add_mismatched(encoded.rows, groups, 128)
    for index, row in enumerate(encoded.rows):  # a made-up reference
        row["ref_logps"] = -5.5 * len(row["completion_ids"]) + index % 3  # type: ignore[assignment]
        row["ref_KL_logps"] = -6.0 * len(row["KL_completion_ids"])  # type: ignore[assignment]
    config = KtoConfig(policy="m", data="d", learning_rate=1e-2, batch_size=8, micro_batch_size=4, precision="float32")
    inputs = context(root, config, model, data_artifact(root / "data", Kind.PREFERENCES), "policy")
    use_blockwise_head()
    trainer = PreparedKTO(
        model=load_policy(model),
        beta_at=lambda step: BETA,
        args=training_arguments(
            KTOConfig, inputs, 16, loss_type=loss, desirable_weight=WANTED, precompute_ref_log_probs=True
        ),
        train_dataset=Dataset.from_list(encoded.rows),
        processing_class=load_tokenizer(model),
    )
    trainer.groups = groups
    return trainer, encoded


plain = functools.cache(load_policy)


def drift(model: Path, row: dict[str, list[int]], answer: str, reference: str) -> float:
    ids = torch.tensor([row["prompt_ids"] + row[answer]])
    with torch.no_grad():
        every = plain(model)(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return float(every[-len(row[answer]) :].sum()) - float(row[reference])  # type: ignore[arg-type]


def loss_of(row: dict[str, list[int]], drifted: float, point: float) -> float:
    """Equations 7 and 8 of arXiv 2402.01306."""
    gain = drifted - point if row["label"] else point - drifted
    return float((WANTED if row["label"] else 1.0) * (1 - torch.sigmoid(torch.tensor(BETA * gain))))


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_a_group_s_loss_is_measured_from_its_mismatched_answers(loss: str, tiny_model: Path, tmp_path: Path) -> None:
    trainer, encoded = made(tmp_path, tiny_model, loss)
    loader = trainer.get_train_dataloader()
    loader.batch_sampler.set_epoch(2)
    batches = [batch for step in loader for batch in step.micro_batches(trainer.memory.rows)]
    trainer_groups = [
        next(g for g in trainer.groups if sorted(len(encoded.rows[index]["completion_ids"]) for index in g) == lengths)
        for lengths in (sorted(batch["completion_mask"].sum(dim=1).tolist()) for batch in batches)
    ]
    for batch, group in list(zip(batches, trainer_groups, strict=True))[:2]:
        members = [encoded.rows[index] for index in group]
        mismatched = [drift(tiny_model, row, "KL_completion_ids", "ref_KL_logps") for row in members]
        point = max(0.0, sum(mismatched) / len(group)) if loss == "kto" else 0.0
        losses = [loss_of(row, drift(tiny_model, row, "completion_ids", "ref_logps"), point) for row in members]
        inputs = {name: value for name, value in batch.items() if name != SHARE}
        with torch.no_grad():
            actual = float(trainer.compute_loss(trainer.model, trainer._prepare_inputs(inputs)))
        assert actual == pytest.approx(sum(losses) / len(group), rel=1e-4)


def test_held_out_scores_have_one_reference_point(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, encoded = made(tmp_path, tiny_model)
    actual = held_out(trainer, encoded)
    monkeypatch.setattr(preference_trainers, "SCORING_TOKENS", 1)
    assert held_out(trainer, encoded) == pytest.approx(actual, rel=1e-4)
    drifts = [drift(tiny_model, row, "completion_ids", "ref_logps") for row in encoded.rows]
    mismatched = [drift(tiny_model, row, "KL_completion_ids", "ref_KL_logps") for row in encoded.rows]
    point = max(0.0, sum(mismatched) / len(mismatched))
    losses = [loss_of(row, drifted, point) for row, drifted in zip(encoded.rows, drifts, strict=True)]
    assert point > 0
    assert actual["reference_point"] == pytest.approx(point, rel=1e-4)
    assert actual["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    right = [(drifted > point) == bool(row["label"]) for row, drifted in zip(encoded.rows, drifts, strict=True)]
    assert actual["accuracy"] == pytest.approx(sum(right) / len(right))
    sides = [
        [d for r, d in zip(encoded.rows, drifts, strict=True) if bool(r["label"]) is side] for side in (True, False)
    ]
    assert actual["margin"] == pytest.approx(BETA * (sum(sides[0]) / 8 - sum(sides[1]) / 8), rel=1e-4)


def test_what_is_overridden_in_trl_is_there() -> None:
    for name in ("_prepare_dataset", "_precompute_ref_logps", "_get_train_sampler", "create_model_card"):
        assert callable(getattr(KTOTrainer, name)), name
