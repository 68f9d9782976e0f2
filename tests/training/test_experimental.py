"""trl's CPO and ORPO trainers as we drive them: our forward pass gives what trl's own logits give, without them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from align.errors import UserError
from align.models.loading import load_policy, load_tokenizer
from align.pipeline.registry import STAGES
from align.store.artifacts import Kind
from align.training import held_out as scores
from align.training.arguments import training_arguments
from align.training.experimental import CPO, ORPO, experimental, held_out, load_trainer
from align.training.fused_head import use_blockwise_head
from align.training.rows import Encoded, encode_pairs
from tests.support.training.harness import context, data_artifact, rows


def made(root: Path, model: Path, kind: str, **options: Any) -> tuple[Any, Encoded]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    tokenizer = load_tokenizer(model)
    encoded = encode_pairs(tokenizer, rows(8), 128)
    config = STAGES[kind].config_class()(
        policy="m", data="d", learning_rate=1e-2, batch_size=8, max_length=128, precision="float32"
    )
    inputs = context(root, config, model, data_artifact(root / "data", Kind.PREFERENCES), "policy")
    use_blockwise_head()
    prompt_too = options.pop("prompt_too", None)
    trainer_class, arguments = load_trainer(ORPO if kind == "orpo" else CPO, kind)
    trainer = trainer_class(
        **({} if prompt_too is None else {"prompt_too": prompt_too}),
        model=load_policy(model),
        args=training_arguments(arguments, inputs, 8, max_length=128, remove_unused_columns=False, **options),
        data_collator=DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id),
        train_dataset=encoded.rows,
        processing_class=tokenizer,
    )
    trainer.row_lengths = encoded.lengths
    return trainer, encoded


def of_trl(trainer: Any, batch: dict[str, torch.Tensor]) -> float:
    """The loss of trl's own class on the same batch, by its own forward pass over all logits."""
    pairs = len(batch["input_ids"]) // 2
    theirs: dict[str, torch.Tensor] = {}
    for side, part in (("chosen", slice(None, pairs)), ("rejected", slice(pairs, None))):
        theirs[f"{side}_input_ids"] = batch["input_ids"][part]
        theirs[f"{side}_attention_mask"] = batch["attention_mask"][part]
        theirs[f"{side}_labels"] = batch["input_ids"][part].masked_fill(batch["completion_mask"][part] == 0, -100)
    method = "orpo" if isinstance(trainer, ORPO) else "cpo"
    base = experimental(method, f"{method.upper()}Trainer").concatenated_forward
    trainer.concatenated_forward = lambda model, inputs: base(trainer, model, theirs)
    with torch.no_grad():
        loss = trainer.get_batch_loss_metrics(trainer.model, batch)[0]
    del trainer.concatenated_forward
    return float(loss)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cpo", {"loss_type": "sigmoid", "label_smoothing": 0.1}),
        ("cpo", {"loss_type": "hinge"}),
        ("cpo", {"loss_type": "ipo"}),
        ("cpo", {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}),
        ("cpo", {"loss_type": "alphapo", "alpha": 0.25, "beta": 2.0}),
        ("orpo", {"prompt_too": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("loss_type", ""),
)
def test_the_loss_is_trl_s_own(kind: str, options: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    trainer, encoded = made(tmp_path, tiny_model, kind, **options)
    batch = trainer._prepare_inputs(trainer.data_collator(encoded.rows))
    with torch.no_grad():
        actual = float(trainer.compute_loss(trainer.model, batch))
    assert actual == pytest.approx(of_trl(trainer, batch), rel=1e-5)
    scored = held_out(trainer, encoded)
    assert scored["loss"] == pytest.approx(actual, rel=1e-4)


def test_orpo_s_own_loss_can_leave_out_the_prompt(tiny_model: Path, tmp_path: Path) -> None:
    trainer, encoded = made(tmp_path, tiny_model, "orpo", prompt_too=False)
    total, tokens, plain = 0.0, 0, load_policy(tiny_model)
    for row in encoded.rows:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            every = plain(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        total -= float(every[-len(row["chosen_ids"]) :].sum())
        tokens += len(row["chosen_ids"])
    assert held_out(trainer, encoded)["nll"] == pytest.approx(total / tokens, rel=1e-4)


def test_held_out_scores_do_not_move_with_the_batches(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, encoded = made(tmp_path, tiny_model, "cpo")
    full = held_out(trainer, encoded)
    monkeypatch.setattr(scores, "SCORING_TOKENS", 1)
    assert held_out(trainer, encoded) == pytest.approx(full, rel=1e-4)


def test_a_trl_without_it_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.experimental.cpo", None)
    with pytest.raises(
        UserError, match=r"^trl 1\S+ has no trl\.experimental\.cpo\.CPOTrainer, an experimental .*'dpo'"
    ):
        experimental("cpo", "CPOTrainer")
    with pytest.raises(UserError, match=r"has no trl\.experimental\.orpo\.OtherTrainer"):
        experimental("orpo", "OtherTrainer")


def test_what_is_overridden_in_trl_is_there() -> None:
    """Names that our classes override or call; an upgrade that moves one would train by another loss, or fail late."""
    for trainer, names in (
        (experimental("cpo", "CPOTrainer"), ("concatenated_forward", "cpo_loss", "get_batch_loss_metrics")),
        (experimental("orpo", "ORPOTrainer"), ("concatenated_forward", "odds_ratio_loss", "get_batch_loss_metrics")),
    ):
        for name in names:
            assert name in trainer.__dict__, (trainer, name)
        assert callable(trainer._get_train_sampler)
