"""Validations: what they measure, the best policy kept, resumed as if nothing had happened."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from align.errors import UserError
from align.models.loading import load_tokenizer
from align.rl.checkpoint import last_checkpoint
from align.rl.rollout import Rollout
from align.rl.validation import Validation, make_validation
from tests.support.rl.runs import KillAt, Killed, outcome
from tests.support.stored_rollouts import stored_rows

HELD_OUT = [{"id": f"h{i}", "prompt": [{"role": "user", "content": f"tell {'z' * i}"}]} for i in range(6)]
FIELDS = {"eval_dataset": HELD_OUT, "eval_updates": 2, "updates": 5}


def validations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_score" in entry]


def weights_of(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_start_and_end_are_validated_and_what_lies_between(make_trainer):
    trainer = make_trainer(**FIELDS, gold=lambda rows, texts: [1.0] * len(texts))
    trainer.train()
    actual = validations(trainer)
    assert [entry["update"] for entry in actual] == [0, 2, 4, 5]
    assert actual[0]["eval_kl"] == 0.0 and actual[-1]["eval_kl"] != 0.0
    assert all(entry["eval_gold"] == 1.0 and entry["eval_length"] >= 1 for entry in actual)


def test_validating_changes_nothing_of_the_training(make_trainer):
    without, with_ = make_trainer(updates=5), make_trainer(**FIELDS)
    without.train(), with_.train()
    ours, theirs = weights_of(with_), weights_of(without)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


class Rising:
    """Scores what the test says, by how often it was asked; held-out prompts are told by their id."""

    def __init__(self, *validated):
        self.validated = list(validated)

    def __call__(self, rows, texts):
        held_out = str(rows[0]["id"]).startswith("h")
        return [self.validated.pop(0) if held_out else 0.5] * len(texts)


def test_the_best_policy_takes_the_last_ones_place(make_trainer, tmp_path):
    trainer = make_trainer(**FIELDS, keep="best", scorer=Rising(0.1, 0.9, 0.3, 0.2))
    observations = {}
    validate = trainer.validation.run
    trainer.validation.run = lambda *inputs: observations.update({inputs[1]: weights_of(trainer)}) or validate(*inputs)
    trainer.train()
    assert trainer.validation.best["update"] == 2
    assert any(not torch.equal(tensor, observations[5][name]) for name, tensor in observations[2].items())
    assert all(torch.equal(tensor, observations[2][name]) for name, tensor in weights_of(trainer).items())


def test_a_kl_limit_leaves_out_what_drifted_too_far(make_trainer):
    trainer = make_trainer(**FIELDS, keep="best", keep_kl=1e-9, scorer=Rising(0.1, 0.9, 0.3, 0.2), learning_rate=1e-2)
    trainer.train()
    drifted = [entry for entry in validations(trainer) if entry["eval_kl"] > 1e-9]
    assert drifted, "the limit was never reached"
    assert trainer.validation.best["update"] not in [entry["update"] for entry in drifted]


def test_gold_can_decide(make_trainer):
    gold = Rising(0.1, 0.2, 0.9, 0.3)
    trainer = make_trainer(**FIELDS, keep="best_gold", gold=gold, scorer=Rising(0.1, 0.9, 0.3, 0.2))
    trainer.train()
    assert trainer.validation.best["update"] == 4


@pytest.mark.parametrize("killed_at", [2, 3])
def test_a_killed_run_keeps_the_same_best(make_trainer, tmp_path, killed_at):
    fields = FIELDS | {"keep": "best", "save_strategy": "steps", "save_updates": 1, "learning_rate": 1e-2}
    uninterrupted = make_trainer(output_dir=str(tmp_path / "whole"), **fields)
    uninterrupted.train()
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        make_trainer(output_dir=str(folder), callbacks=[KillAt(killed_at)], **fields).train()
    second = make_trainer(output_dir=str(folder), **fields)
    second.train(resume_from_checkpoint=str(last_checkpoint(folder)))
    assert second.validation.best == uninterrupted.validation.best
    assert validations(second) == validations(uninterrupted)
    expected, actual = outcome(uninterrupted), outcome(second)
    assert actual[1] == expected[1]
    assert all(torch.equal(actual[0][name], tensor) for name, tensor in expected[0].items())


def test_a_prompt_is_answered_alike_in_any_number_of_processes(make_trainer, monkeypatch):
    trainer = make_trainer(**FIELDS, temperature=2.0)
    monkeypatch.setattr("align.rl.sampler.all_gather", lambda local_values: [local_values])
    answers = {}
    for world in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            responses = trainer.sampler.answer(trainer.validation.prompts)
            for row, response in zip(responses.rows, responses.responses, strict=True):
                answers.setdefault(row["id"], []).append(response)
    assert list(answers) == [row["id"] for row in HELD_OUT]
    assert all(entry == two for entry, two in answers.values())
    assert len({tuple(entry) for entry, _ in answers.values()}) == len(answers)  # sampled, and each by itself


def test_failed_episodes_count_in_no_score():
    """Two of four fail; counted as 0, they would win where scores are negative."""

    def validated(scores, failed, gold):
        tensors = {
            "scores": torch.tensor(scores),
            "failed": torch.tensor(failed),
            "gold": torch.tensor(gold),
            "score_style": torch.tensor(scores),
            "finished": torch.ones(4, dtype=torch.bool),
            "response_mask": torch.ones(4, 2, dtype=torch.bool),
            "logprobs": torch.zeros(4, 2),
            "ref_logprobs": torch.zeros(4, 2),
        }
        lists = [[1]] * 4
        return Rollout(0, [{}] * 4, [0, 1, 2, 3], lists, lists, ["a"] * 4, tensors)

    validation = Validation.__new__(Validation)
    config = SimpleNamespace(keep="best", keep_kl=None, best_metric=None)
    validation.args = SimpleNamespace(config=config, should_save=False)
    validation.best = {"update": 0.0, "score": -0.9}
    validation._save = lambda model, update: None
    halved = validation.run(
        validated([-1.0, -1.0, 0.0, 0.0], [False, False, True, True], [3.0, 1.0, 9.0, 9.0]), 1, None
    )
    assert (halved["eval_score"], halved["eval_gold"], halved["eval_score_style"]) == (-1.0, 2.0, -1.0)
    outage = validation.run(validated([0.0] * 4, [True] * 4, [9.0] * 4), 2, None)
    assert outage.keys() == {"eval_kl", "eval_length", "eval_eos_rate"}
    assert validation.best == {"update": 0.0, "score": -0.9}


def test_validations_write_answers_to_the_same_prompts(make_trainer, tmp_path):
    trainer = make_trainer(**FIELDS, learning_rate=1e-2, gold=lambda rows, texts: [0.25] * len(texts))
    trainer.train()
    rows = stored_rows(tmp_path / "run" / "validations")
    assert [row["update"] for row in rows] == [0] * 6 + [2] * 6 + [4] * 6 + [5] * 6
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in HELD_OUT] * 4
    assert [row["prompt_id"] for row in rows] == [row["id"] for row in HELD_OUT] * 4
    assert {row["gold"] for row in rows} == {0.25} and not any(row["learned"] for row in rows)
    assert rows[0]["kl"] == 0.0 and any(row["kl"] != 0.0 for row in rows[-6:])
    assert [row["response"] for row in rows[:6]] != [row["response"] for row in rows[-6:]]


def test_wrong_settings_are_refused(make_trainer):
    with pytest.raises(ValueError, match="keep is best, which needs validations"):
        make_trainer(keep="best")
    with pytest.raises(ValueError, match="no eval_dataset is given"):
        make_trainer(eval_updates=1)


def test_fewer_prompts_than_processes_are_the_users_error(tiny_model, tmp_path):
    config = SimpleNamespace(eval_updates=1, max_prompt_tokens=None)
    args = SimpleNamespace(config=config, world_size=3, output_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"2 prompts to validate on, 0 longer prompts were skipped, for 3 processes"):
        make_validation(args, HELD_OUT[:2], load_tokenizer(tiny_model))
