"""Rows in one line are what they are alone: losses, gradients and trained weights; packs lose nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from align.config.tuning import LoraTuning
from align.errors import UserError
from align.models.fast.ragged_rows import make_layout
from align.models.loading import load_policy, load_tokenizer
from align.models.tuning.apply import apply_tuning
from align.pipeline.registry import STAGES
from align.stages.sft import run
from align.training import packing
from align.training.packing import (
    FlatCollator,
    best_fit,
    check_separate,
    enable_flat,
    fill_ratio,
    pack_rows,
    packing_form,
)
from align.training.rows import MASKED, Encoded, encode_supervised
from align.training.trainers import PreparedSFT
from tests.support.models.families import family_model
from tests.support.training.harness import events, losses, rows
from tests.support.training.killed_stage import Killed, dying
from tests.support.training.sft_setup import make_packing_stage, make_sft_trainer


@limits(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90))
def test_packs_hold_every_row_once_and_no_more_than_fits(lengths: list[int], capacity: int) -> None:
    packs = best_fit(lengths, capacity)
    assert sorted(row for pack in packs for row in pack) == list(range(len(lengths)))
    sizes = [sum(lengths[row] for row in pack) for pack in packs]
    assert max(sizes, default=0) <= capacity
    # Two packs that fit into one would have been one; best fit needs 11/9 of the best and a little.
    assert all(first + second > capacity for index, first in enumerate(sizes) for second in sizes[index + 1 :])


def test_the_fullest_pack_with_room_is_taken() -> None:
    # 9 and 8 open a pack each; 6 a third; 2 fits beside 8 exactly, which is better than beside 6
    assert best_fit([6, 2, 9, 8, 1], 10) == [[2, 4], [3, 1], [0]]
    with pytest.raises(ValueError, match="11 tokens fits no pack of 10"):
        best_fit([11], 10)


def test_the_fill_is_the_share_of_the_room() -> None:
    assert fill_ratio([{"input_ids": [1] * 6}, {"input_ids": [1] * 9}], 10) == 0.75


def test_a_row_s_first_token_has_no_label_in_a_pack() -> None:
    # as of plain texts, whose every token is learned
    encoded = Encoded([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}], [3, 2])
    (pack,) = pack_rows(encoded, 6)
    assert pack == {"input_ids": [1, 2, 3, 4, 5], "labels": [MASKED, 2, 3, MASKED, 5], "seq_lengths": [3, 2]}


def flat_and_padded(root: Path, model: Path, form: str, lora: bool = False) -> tuple[PreparedSFT, Any, Any, Any]:
    trainer, _, encoded = make_sft_trainer(root, model, precision="float32")
    if lora:
        trainer.model = apply_tuning(trainer.model, LoraTuning(rank=4), 0)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    padded = trainer._prepare_inputs(trainer.data_collator(encoded.rows[:5]))
    enable_flat(trainer.model, form)  # type: ignore[arg-type]
    flat = trainer._prepare_inputs(FlatCollator(form)(encoded.rows[:5]))  # type: ignore[arg-type]
    return trainer, padded, flat, encoded


def gradients(trainer: PreparedSFT, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("form", "lora"), [("ragged", False), ("ragged", True), ("blocks", False)])
def test_loss_and_gradient_are_those_of_padded_rows(form: str, lora: bool, tiny_model: Path, tmp_path: Path) -> None:
    trainer, padded, flat, _ = flat_and_padded(tmp_path, tiny_model, form, lora)
    assert "attention_mask" not in flat and flat["input_ids"].shape[0] == 1
    assert flat["input_ids"].numel() == int(padded["attention_mask"].sum())
    wanted, expected = gradients(trainer, padded)
    actual, got = gradients(trainer, flat)
    assert actual == pytest.approx(wanted, rel=1e-6)
    assert expected.keys() == got.keys() and len(got) > 10
    for name, gradient in expected.items():
        assert torch.allclose(got[name], gradient, rtol=1e-4, atol=1e-6), name


def test_packs_restart_positions_and_have_no_label_across_rows(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    encoded = encode_supervised(tokenizer, rows(16), 128)
    packs = pack_rows(encoded, 128)
    assert len(packs) < 16 and sum(len(p["seq_lengths"]) for p in packs) == 16
    batch = FlatCollator("flash")(packs[:2])
    sizes = [size for pack in packs[:2] for size in pack["seq_lengths"]]
    assert batch["position_ids"][0].tolist() == [place for size in sizes for place in range(size)]
    assert batch["cu_seq_lens_q"].tolist() == [0, *torch.tensor(sizes).cumsum(0).tolist()]
    assert batch["max_length_q"] == max(sizes)
    starts = batch["cu_seq_lens_q"][:-1].long()
    assert (batch["labels"][0][starts] == MASKED).all()
    full = FlatCollator("ragged")([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}])
    assert full["labels"].tolist() == [[MASKED, 2, 3]]


def test_a_model_that_lets_rows_see_each_other_is_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _, _, encoded = flat_and_padded(tmp_path, tiny_model, "ragged")
    trainer.data_collator = FlatCollator("ragged")
    trainer.model.train()
    assert check_separate("sft", trainer, encoded) < 1e-4
    monkeypatch.setattr(packing, "make_layout", lambda lengths: make_layout([sum(lengths)]))
    with pytest.raises(UserError, match=r"sft: this model does not keep rows in one line apart.*packing"):
        check_separate("sft", trainer, encoded)
    assert trainer.model.training  # as it was


@pytest.mark.parametrize("gap", [1.0, -1.0, float("nan")])
def test_a_gap_on_either_side_and_no_number_are_refused(
    gap: float, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _, encoded = make_sft_trainer(tmp_path, tiny_model, precision="float32")
    trainer.data_collator = FlatCollator("ragged")
    message = iter([torch.zeros(3), torch.zeros(3), torch.tensor([0.0] * 5 + [gap])])
    monkeypatch.setattr(packing, "_logprobs", lambda *inputs: next(message))
    with pytest.raises(UserError, match="does not keep rows in one line apart"):
        check_separate("sft", trainer, encoded)


def test_models_are_run_as_they_can_be(tiny_model: Path) -> None:
    small = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    small["num_key_value_heads"] = 1
    assert packing_form(load_policy(tiny_model)) == "ragged"
    assert packing_form(MistralForCausalLM(MistralConfig(**small, sliding_window=4))) == "blocks"
    assert packing_form(LlamaForCausalLM(LlamaConfig(**small, attention_dropout=0.1))) == "blocks"
    flash = LlamaForCausalLM(LlamaConfig(**small))
    flash.config._attn_implementation = "flash_attention_2"
    assert packing_form(flash) == "flash"
    flash.config._attn_implementation = "something"
    with pytest.raises(UserError, match="the attention 'something' of this llama cannot keep rows"):
        packing_form(flash)


def test_states_that_no_hook_resets_are_refused() -> None:
    assert packing_form(family_model("lfm2")) == "ragged"
    with pytest.raises(UserError, match="layers of this mamba2 carry a state from token to token"):
        packing_form(family_model("mamba2"))


def test_padding_free_training_is_training(tiny_model: Path, tmp_path: Path) -> None:
    padded, flat = (
        make_packing_stage(tmp_path / str(on), tiny_model, padding_free=on, epochs=1) for on in (False, True)
    )
    expected, actual = run(padded), run(flat)
    assert actual["tokens"] == expected["tokens"] and actual["steps"] == expected["steps"] == 20
    for step, loss in losses(padded).items():
        assert losses(flat)[step] == pytest.approx(loss, rel=2e-3)
    assert actual["test_loss_before"] == pytest.approx(expected["test_loss_before"], rel=1e-6)
    assert actual["test_loss_after"] == pytest.approx(expected["test_loss_after"], rel=1e-2)


def test_packed_training_learns_and_takes_fewer_steps(tiny_model: Path, tmp_path: Path) -> None:
    stage = make_packing_stage(tmp_path, tiny_model, packing=True, epochs=16, learning_rate=1e-2)
    metrics = run(stage)
    assert metrics["packs"] < 50 and metrics["pack_fill"] > 0.75 and metrics["rows"] == 80
    assert metrics["test_loss_after"] < metrics["test_loss_before"] / 4
    assert not events(stage, "warning")
    # What is saved is an ordinary folder, and answers as the packed model was scored.
    saved = stage.output / "model"
    assert "ragged" not in (saved / "config.json").read_text()
    encoded = encode_supervised(load_tokenizer(saved), rows(12, start=80), 128)
    model, nats, tokens = load_policy(saved), 0.0, 0
    for row in encoded.rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            nats += float(model(ids, labels=labels).loss) * int((labels[:, 1:] != MASKED).sum())
        tokens += int((labels[:, 1:] != MASKED).sum())
    assert nats / tokens == pytest.approx(metrics["test_loss_after"], rel=1e-4)


def test_resumed_packed_run_equals_the_uninterrupted_one(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    settings: dict[str, Any] = {"packing": True, "neftune": 5.0, "epochs": 2, "save_steps": 4}
    uninterrupted, parts = (make_packing_stage(tmp_path / name, tiny_model, **settings) for name in ("whole", "parts"))
    run(uninterrupted)
    with pytest.raises(Killed):
        run(dying(parts, 10))
    assert run(parts)["resumed_from_step"] == 8
    assert losses(parts) == losses(uninterrupted)
    expected, actual = (load_file(c.output / "model" / "model.safetensors") for c in (uninterrupted, parts))
    assert all(expected[name].equal(actual[name]) for name in expected)


@pytest.mark.parametrize("tuning", ["prompt", "prefix"])
def test_tunings_of_the_input_do_not_go_with_one_line(tuning: str) -> None:
    with pytest.raises(ValueError, match=f"packing concatenates rows, and tuning {tuning} changes the beginning"):
        STAGES["sft"].config_class()(model="m", data="d", learning_rate=1, packing=True, tuning={"method": tuning})
