"""Supervised text beside PPO: its own loss by hand, PPO's gradients untouched, and drawn from the seed alone."""

from __future__ import annotations

import pytest
import torch

from align.config.tuning import FullTuning, LoraTuning
from align.errors import UserError
from align.models.chat.render import split_turn
from align.models.loading import load_policy, load_tokenizer
from align.rl.prompts import PtxRows, split_outputs
from tests.support.rl.gradients import TEXTS, Gradients, sft_gradient


def first_gradients(make_trainer, **fields):
    capture = Gradients()
    make_trainer(callbacks=[capture], updates=1, max_grad_norm=1e9, **fields).train()
    return capture.found[0]


@pytest.mark.parametrize(
    ("micro", "critic", "temperature"),
    [(2, "policy", 1.0), (8, "policy", 0.6), (2, "head", 0.6), (8, "head", 1.0)],
)
def test_ptx_gradient_is_the_sum_of_ppo_and_sft(make_trainer, tiny_model, micro, critic, temperature):
    plain = first_gradients(make_trainer, critic=critic, temperature=temperature)
    mixed = first_gradients(
        make_trainer, critic=critic, ptx_dataset=TEXTS, ptx_coef=0.5, ptx_rows=3, per_device_train_batch_size=micro,
        temperature=temperature,
    )  # fmt: skip

    policy = load_policy(tiny_model)
    sft_gradient(policy, PtxRows(TEXTS, load_tokenizer(tiny_model), 1000).draw(0, 3, seed=3))
    for parameter in policy.parameters():
        parameter.grad *= 0.5
    for name, parameter in policy.named_parameters():
        expected = plain[f"policy.{name}"] + parameter.grad
        assert torch.allclose(mixed[f"policy.{name}"], expected, atol=1e-5), name
    for name, gradient in plain.items():
        if name.startswith("critic."):
            assert torch.allclose(mixed[name], gradient, atol=1e-5), name


def test_it_is_logged_and_remembers(make_trainer):
    losses = {}
    for coef in (1e-9, 1.0):
        trainer = make_trainer(updates=10, learning_rate=1e-2, ptx_dataset=TEXTS, ptx_coef=coef, ptx_rows=5)
        trainer.train()
        losses[coef] = [entry["ptx_loss"] for entry in trainer.state.log_history if "ptx_loss" in entry][-1]
    assert losses[1.0] < losses[1e-9] - 1.0


def test_rows_are_drawn_by_step_and_long_ones_left_out(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    rows = PtxRows(TEXTS, tokenizer, 1000)
    epoch = rows.draw(0, 3, 7) + rows.draw(1, 3, 7)
    assert sorted(epoch[:5]) == sorted(split_turn(tokenizer, r["prompt"], r["completion"]) for r in TEXTS)
    assert rows.draw(1, 3, 7) == rows.draw(1, 3, 7) != rows.draw(1, 3, 8)
    lengths = sorted(len(prompt) + len(answer) for prompt, answer in rows.texts)
    assert PtxRows(TEXTS, tokenizer, lengths[1]).dropped == 3
    with pytest.raises(UserError, match="no ptx row is left: 5 are longer"):
        PtxRows(TEXTS, tokenizer, 3)
    with pytest.raises(UserError, match="needs a 'prompt' and a 'completion'; found"):
        PtxRows([{"prompt": "x"}], tokenizer, 100)


def test_an_episode_is_a_text_for_each_of_its_turns(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    prompt, told = [{"role": "user", "content": "a"}], {"role": "user", "content": "c"}
    turns = [{"role": "assistant", "content": "b"}, told, {"role": "assistant", "content": "d"}]
    texts = PtxRows([{"prompt": prompt, "completion": turns}], tokenizer, 1000).texts
    assert texts == [
        split_turn(tokenizer, prompt, turns[:1]), split_turn(tokenizer, [*prompt, *turns[:2]], turns[2:])
    ]  # fmt: skip


def test_outputs_without_texts_pass_through():
    out = {"logprobs": torch.ones(2, 3)}
    assert split_outputs(out, {}, 3) == (out, None, 0.0)


@pytest.mark.parametrize("tuning", [FullTuning(), LoraTuning(rank=4)], ids=["full", "lora"])
def test_texts_wait_while_only_the_critic_learns(make_trainer, tuning):
    trainer = make_trainer(
        tuning=tuning, updates=1, critic_warmup_updates=1, ptx_dataset=TEXTS, ptx_coef=1.0, ptx_rows=4
    )
    before = {n: p.detach().clone() for n, p in trainer.model.policy.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.policy.named_parameters())


def test_a_weight_without_rows_is_refused(make_trainer):
    with pytest.raises(ValueError, match="no ptx_dataset is given"):
        make_trainer(ptx_coef=1.0)
