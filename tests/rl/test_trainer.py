"""The trainer as a whole: what must not move does not, small steps survive, errors are named, it learns."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from align.config.tuning import FullTuning, LoraTuning
from align.errors import UserError
from align.models.loading import load_policy
from tests.support.rl.gradients import FlatGradients as Gradients

LORA = LoraTuning(rank=4, alpha=8)
LOGGED = {
    *("score", "score_std", "gold", "kl", "kl_k3", "kl_coef", "entropy", "ratio", "clipfrac", "approx_kl"),
    *("explained_variance", "policy_loss", "value_loss", "value_clipfrac", "advantage", "advantage_std", "return"),
    *("value", "length", "eos_rate", "grad_norm_policy", "grad_norm_critic", "parity_gap", "parity_gap_max"),
    *("parity_ratio", "importance_weight", "seconds_sync", "seconds_sampling", "seconds_scoring", "seconds_measuring"),
    *("truncation_rate", "score_length_correlation"),
    *("seconds_learning", "seconds", "sampled_tokens_per_second", "peak_memory_gib", "episodes", "tokens"),
}


def updates(trainer):
    return [entry for entry in trainer.state.log_history if "score" in entry]


@pytest.mark.parametrize("tuning", [FullTuning(), LORA], ids=["full", "lora"])
def test_without_learning_nothing_drifts(make_trainer, tuning):
    trainer = make_trainer(tuning=tuning, learning_rate=0.0, updates=3, num_epochs=2)
    trainer.train()
    for entry in updates(trainer):
        assert entry["kl"] == 0.0 and entry["kl_k3"] == 0.0
        assert entry["ratio"] == 1.0 and entry["clipfrac"] == 0.0
        assert entry["parity_gap_max"] < 1e-4


def test_train_loss_is_the_mean_over_updates(make_trainer):
    trainer = make_trainer(updates=2, num_epochs=2)
    add = trainer.update_log.add_step
    parts = []
    trainer.update_log.add_step = lambda loss, *rest: (parts.append(float(loss)), add(loss, *rest))
    output = trainer.train()
    losses = [entry["loss"] for entry in updates(trainer)]
    assert len(losses) == 2
    assert output.training_loss == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert sum(losses) / 2 == pytest.approx(sum(parts) / trainer.state.global_step, rel=1e-5)
    # Without held-out prompts no time goes to them.
    assert not any("seconds_validating" in entry for entry in updates(trainer))


def test_ratio_is_exactly_1_at_first_step_in_bfloat16(make_trainer):
    trainer = make_trainer(updates=1, bf16=True, per_device_train_batch_size=2, num_epochs=1)
    trainer.train()
    (entry,) = updates(trainer)
    assert entry["ratio"] == 1.0 and entry["approx_kl"] == 0.0


def test_a_small_step_survives_because_weights_are_float32(make_trainer):
    trainer = make_trainer(updates=1, bf16=True, learning_rate=1e-6)
    before = {name: p.detach().clone() for name, p in trainer.model.policy.named_parameters()}
    trainer.train()
    after = dict(trainer.model.policy.named_parameters())
    moved = lost = total = 0
    for name, old in before.items():
        assert after[name].dtype == torch.float32
        moved += int((after[name] != old).sum())
        lost += int(((after[name] != old) & (after[name].bfloat16() == old.bfloat16())).sum())
        total += old.numel()
    assert moved > 0.5 * total
    assert lost > 0.9 * moved  # what bfloat16 weights would have thrown away


@pytest.mark.parametrize(
    "changed",
    [{"per_device_train_batch_size": 1}, {"share_prompts": False}, {"padding_free": False}, {"reuse_forward": 1.0}],
)
def test_micro_batches_and_shared_prompts_change_no_gradient(make_trainer, changed):
    gradients = []
    for fields in ({"per_device_train_batch_size": 4}, changed):
        capture = Gradients()
        make_trainer(callbacks=[capture], updates=1, entropy_coef=0.1, **fields).train()
        gradients.append(capture.found[0])
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[0].norm()


def test_lora_trains_adapters_and_head_and_shares_weights(make_trainer):
    trainer = make_trainer(tuning=LORA, updates=1)
    model = trainer.model
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.startswith("critic.head") for name in trained)
    assert model.reference is None
    policy = {p.data_ptr() for p in model.policy.parameters() if not p.requires_grad}
    critic = {p.data_ptr() for p in model.critic.trunk.parameters() if not p.requires_grad}
    assert critic <= policy
    trainer.train()


def test_a_critic_on_the_reward_model_leaves_its_scores_alone(make_trainer, tiny_reward):
    trainer = make_trainer(tuning=LORA, reward=True, updates=2, learning_rate=1e-2)
    trainer.train()
    from align.models.loading import load_reward

    fresh = load_reward(tiny_reward).state_dict()
    trunk = {n: p for n, p in trainer.model.critic.trunk.named_parameters() if not p.requires_grad}
    for name, tensor in trunk.items():
        assert torch.equal(tensor, fresh["model." + name.replace(".base_layer", "")])


def test_critic_warm_up_leaves_the_policy(make_trainer):
    trainer = make_trainer(updates=2, critic_warmup_updates=2)
    before = [p.detach().clone() for p in trainer.model.policy.parameters()]
    critic = [p.detach().clone() for p in trainer.model.critic.parameters()]
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.policy.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(critic, trainer.model.critic.parameters(), strict=True))


def run_policy_in_warm_up(trainer):
    """Have the policy's pass be part of the critic's backward pass, as it must be under DDP."""
    forward = trainer.model.forward

    def forced(batch, policy=True, **options):
        return forward(batch, policy=policy or trainer.update < trainer.config.critic_warmup_updates, **options)

    trainer.model.forward = forced


@pytest.mark.parametrize("tuning", [FullTuning(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"per_device_train_batch_size": 2}, {"critic": "head", "critic_detach": False}, {"max_grad_norm": 0.0}],
    ids=["critic", "accumulated", "shared_trunk", "unclipped"],
)
def test_critic_warm_up_ignores_zero_gradients_of_the_policy(make_trainer, tuning, fields):
    """AdamW takes no step with the policy: no decay, no moments, no count."""
    outcomes = []
    for forced in (False, True):
        trainer = make_trainer(tuning=tuning, updates=3, critic_warmup_updates=2, weight_decay=0.1, **fields)
        start = {name: p.detach().clone() for name, p in trainer.model.policy.named_parameters()}
        if forced:
            run_policy_in_warm_up(trainer)
        steps = []
        trainer.add_callback(AfterWarmUp(trainer, start, steps))
        trainer.train()
        assert steps == [0] * 2
        outcomes.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad})
    first, second = outcomes
    assert first.keys() == second.keys()
    assert all(torch.allclose(tensor, second[name], atol=1e-6) for name, tensor in first.items())


class AfterWarmUp(TrainerCallback):
    """Notes, after each step of the warm-up, how often AdamW has counted a step of the policy, which has not moved."""

    def __init__(self, trainer, start, steps):
        self.trainer, self.start, self.steps = trainer, start, steps

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        config = self.trainer.config
        if state.global_step > config.critic_warmup_updates * config.steps_per_update:
            return
        policy = dict(self.trainer.model.policy.named_parameters())
        assert all(torch.equal(policy[name], tensor) for name, tensor in self.start.items())
        counts = [int(optimizer.state[p]["step"]) for p in policy.values() if p in optimizer.state]
        self.steps.append(max(counts, default=0))


def test_policy_and_critic_have_learning_rates_of_their_own(make_trainer):
    trainer = make_trainer(learning_rate=1e-3, critic_learning_rate=5e-3, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    rates = [1e-3, 1e-3, 5e-3, 5e-3, 5e-3, 5e-3]  # policy, critic, value head; each with and without weight decay
    assert [(g["lr"], g["weight_decay"]) for g in groups] == list(zip(rates, [0.1, 0.0] * 3, strict=True))
    assert [g["eps"] for g in groups] == [1e-5, 1e-5, 1e-8, 1e-8, 1e-8, 1e-8]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert sum(p.numel() for g in groups for p in g["params"]) == trained


@pytest.mark.parametrize(("inputs", "wanted"), [(None, 5e-4), (2e-5, 2e-5)])
def test_a_value_head_beside_adapters_learns_more_slowly(make_trainer, inputs, wanted):
    trainer = make_trainer(tuning=LORA, learning_rate=1e-3, critic_learning_rate=5e-3, critic_head_learning_rate=inputs)
    head = {id(p) for p in trainer.model.critic.head.parameters()}
    for group in trainer.create_optimizer().param_groups:
        assert (group["lr"] == wanted) == any(id(p) in head for p in group["params"])


def test_a_value_head_beside_frozen_weights_has_the_critics_rate(make_trainer):
    trainer = make_trainer(tuning=FullTuning(freeze=["model.layers.0"]), critic_learning_rate=5e-3)
    head = {id(p) for p in trainer.model.critic.head.parameters()}
    rates = {g["lr"] for g in trainer.create_optimizer().param_groups if any(id(p) in head for p in g["params"])}
    assert rates == {5e-3}


def test_trunk_below_a_zero_head_learns_from_the_start(make_trainer):
    """Its first gradients are of the size of the head: with PPO's epsilon of 1e-5 Adam's steps would vanish."""
    moved = {}
    for epsilon in (1e-8, 1e-5):
        trainer = make_trainer(
            tuning=LORA, updates=3, critic_learning_rate=1e-3, critic_head_learning_rate=1e-6,
            critic_adam_epsilon=epsilon,
        )  # fmt: skip
        trainer.train()
        weights = [p for name, p in trainer.model.critic.named_parameters() if "lora_B" in name]
        moved[epsilon] = max(float(p.detach().abs().max()) for p in weights)
    assert moved[1e-8] > 1e-3 > 10 * moved[1e-5], moved


def test_every_update_logs_what_is_needed_to_judge_it(make_trainer):
    trainer = make_trainer(gold=lambda rows, texts: [0.25] * len(texts), updates=2)
    trainer.train()
    entries = updates(trainer)
    assert [entry["update"] for entry in entries] == [1, 2]
    assert entries[-1].keys() >= LOGGED
    assert entries[-1]["gold"] == 0.25 and entries[-1]["episodes"] == 16
    assert entries[-1]["epoch"] == 1.0  # 2 updates of 4 prompts over 8 prompts


def test_infinite_loss_stops_the_run_and_names_the_update(make_trainer):
    trainer = make_trainer(updates=3)
    sample = trainer.sample

    def poisoned(update):
        rollout = sample(update)
        if update == 1:
            rollout.tensors["scores"][0] = float("nan")
        return rollout

    trainer.sample = poisoned
    with pytest.raises(UserError, match=r"update 2 .*loss is nan"):
        trainer.train()


def test_a_scorer_that_misbehaves_is_named(make_trainer):
    with pytest.raises(UserError, match="update 1: the scorer gave nan"):
        make_trainer(scorer=lambda rows, texts: [float("nan")] * len(texts)).train()
    with pytest.raises(UserError, match="1 scores for 8 responses"):
        make_trainer(scorer=lambda rows, texts: [0.0]).train()


def test_saved_policy_has_the_adapter_merged(make_trainer, tmp_path):
    trainer = make_trainer(tuning=LORA, updates=1, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "out" / "model"))
    saved = load_policy(tmp_path / "out" / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.allclose(saved(ids).logits, trainer.model.policy(ids).logits, atol=1e-4)


def test_sizes_that_do_not_divide_are_refused(make_trainer):
    with pytest.raises(ValueError, match="rollout_batch 8 is not a multiple"):
        make_trainer(per_device_train_batch_size=3)
    with pytest.raises(ValueError, match="samples_per_prompt 3"):
        make_trainer(samples_per_prompt=3)


def test_a_spent_kl_budget_ends_the_run_before_it_learns_more(make_trainer, tmp_path):
    trainer = make_trainer(updates=6, learning_rate=5e-2, kl_budget=0.5)
    weights = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            weights.append({n: p.detach().clone() for n, p in trainer.model.policy.named_parameters()})

    trainer.add_callback(Watch())
    trainer.train()
    assert "over kl_budget 0.5" in trainer.stopped
    done = len(updates(trainer))
    assert 0 < done < 6 and len(weights) == done
    assert f"update {done + 1}:" in trainer.stopped
    for name, parameter in trainer.model.policy.named_parameters():
        assert torch.equal(parameter, weights[-1][name])


def test_a_kl_term_in_the_loss_holds_the_policy_back(make_trainer):
    drift = {}
    for kl_coef in (0.0, 3.0):
        trainer = make_trainer(updates=12, rollout_batch=32, learning_rate=1e-2, kl_in="loss", kl_coef=kl_coef)
        trainer.train()
        for entry in updates(trainer):  # nothing is paid in the reward
            assert entry["reward"] == pytest.approx(entry["score"])
        drift[kl_coef] = updates(trainer)[-1]["kl_k3"]
    assert drift[3.0] < drift[0.0] / 4


def test_masked_truncated_responses_teach_nothing(make_trainer):
    trainer = make_trainer(updates=1, max_tokens=1, truncated="mask")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    (entry,) = updates(trainer)
    assert entry["truncation_rate"] == 1.0
    assert entry["loss"] == 0.0
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


@pytest.mark.parametrize(("place", "estimator"), [("reward", "k3"), ("reward", "k2"), ("loss", "k1")])
def test_an_estimator_without_the_right_gradient_is_refused(make_trainer, place, estimator):
    with pytest.raises(ValueError, match=f"kl_estimator is {estimator}"):
        make_trainer(kl_in=place, kl_estimator=estimator)


def test_the_probe_comes_back_every_so_many_updates(make_trainer, caplog):
    caplog.set_level("INFO", logger="align")
    make_trainer(updates=5, probe_parity=True, probe_updates=2).train()
    assert caplog.text.count("parity of") == 3  # before updates 1, 3 and 5


def test_the_probe_asks_for_no_more_tokens_than_the_run_does(make_trainer):
    trainer = make_trainer(updates=1, probe_parity=True, max_tokens=3)
    asked, generate = [], trainer.engine.generate

    def record(prompts, sampling, **options):
        asked.append(sampling.max_tokens)
        return generate(prompts, sampling, **options)

    trainer.engine.generate = record
    trainer.train()
    assert asked == [3, 3]


@pytest.mark.parametrize("tuning", [FullTuning(), LORA], ids=["full", "lora"])
def test_value_head_on_policy_trunk_is_detached_by_default(make_trainer, tuning):
    def policy_gradient(**fields):
        capture = Gradients()
        trainer = make_trainer(
            tuning=tuning,
            critic="head",
            callbacks=[capture],
            updates=2,
            learning_rate=1e-2,
            max_grad_norm=1e9,
            **fields,
        )
        trainer.train()
        assert trainer.model.critic.trunk is None
        head = sum(p.numel() for p in trainer.model.critic.parameters())
        return capture.found[1][:-head], updates(trainer)  # the head's gradient comes last

    detached, entries = policy_gradient(vf_coef=1.0)
    assert entries[1]["value"] != 0.0  # the head learns
    # the first update's values are zero in both, so whatever vf_coef changes comes through the trunk
    again, _ = policy_gradient(vf_coef=1.0)
    assert torch.equal(detached, again)
    attached, _ = policy_gradient(vf_coef=1.0, critic_detach=False)
    assert (attached - detached).norm() > 1e-4 * detached.norm()


def test_a_critic_from_nothing_is_refused(make_trainer):
    with pytest.raises(ValueError, match="no reward_model is given"):
        make_trainer(critic="reward")


@pytest.mark.parametrize(("on_alarm", "done"), [("warn", 6), ("stop", 4)])
def test_an_alarm_is_told_once_and_stops_if_asked(make_trainer, monkeypatch, on_alarm, done):
    from align.rl.alarms import Alarm

    monkeypatch.setattr(
        "align.rl.alarms.alarms",
        lambda history: [Alarm("collapse", len(history), "the entropy is gone")] if len(history) >= 4 else [],
    )
    messages = []
    trainer = make_trainer(updates=6, on_alarm=on_alarm, notify=messages.append)
    trainer.train()
    assert messages == ["update 4: collapse: the entropy is gone."]
    assert len(updates(trainer)) == done
    assert trainer.stopped == (messages[0] if on_alarm == "stop" else None)


def test_alarm_that_returns_is_only_counted(make_trainer, monkeypatch):
    from align.rl.alarms import Alarm
    from align.rl.run import summarize

    # It holds at updates 2, 4 and 6, so it begins three times.
    monkeypatch.setattr(
        "align.rl.alarms.alarms",
        lambda history: [Alarm("KL", len(history), "too far")] if history and len(history) % 2 == 0 else [],
    )
    messages = []
    trainer = make_trainer(updates=6, notify=messages.append)
    trainer.train()
    assert messages == ["update 2: KL: too far.", "alarms that were raised again: update 2: KL, again at 4, 6"]
    assert summarize(trainer)["alarms"] == ["update 2: KL, again at 4, 6"]


def test_components_of_a_score_are_logged(make_trainer):
    from align.scoring.models import Ensemble
    from align.scoring.score import Part, WeightedSum
    from tests.support.rl.trainers import Fixed

    members = tuple(Fixed(*[value] * 8) for value in (1.0, 3.0))
    sum_ = WeightedSum((Part("reward", 1.0, Ensemble(members, "mean")), Part("function", 0.5, Fixed(*[2.0] * 8))))
    trainer = make_trainer(updates=1, scorer=sum_)
    trainer.train()
    (entry,) = updates(trainer)
    names = ("score", "score_reward", "score_reward_spread", "score_function")
    assert [entry[name] for name in names] == [3.0, 2.0, 1.0, 2.0]


def counted(model):
    """A list that grows by one with every forward pass."""
    calls, forward = [], model.forward
    model.forward = lambda *args, **options: calls.append(1) or forward(*args, **options)
    return calls


@pytest.mark.parametrize("tuning", [FullTuning(), LORA], ids=["full", "lora"])
def test_reused_passes_change_no_weight_and_save_passes(make_trainer, tuning):
    weights, passes = [], []
    for reuse in (0.0, 0.5, 1.0):
        trainer = make_trainer(tuning=tuning, updates=3, critic_warmup_updates=1, reuse_forward=reuse, reward=True)
        passes.append(counted(trainer.model))
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    for some in weights[1:]:
        assert all(torch.allclose(weights[0][name], tensor, atol=1e-6) for name, tensor in some.items())
    # Two micro-batches an update: measured, then critic and policy learn in passes of their own (one warms up):
    # 4 + 6 + 6. Where one measuring pass serves, 4 an update are left, where both do, 2; warming up keeps its 4.
    assert [len(some) for some in passes] == [16, 12, 8]


def test_only_first_step_learns_from_measuring_passes(make_trainer):
    weights, passes = [], []
    for reuse in (0.0, 1.0):
        trainer = make_trainer(updates=2, num_epochs=2, num_mini_batches=2, per_device_train_batch_size=2,
                               reuse_forward=reuse, reward=True)  # fmt: skip
        passes.append(counted(trainer.model))
        trainer.train()
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert all(torch.allclose(weights[0][name], tensor, atol=1e-6) for name, tensor in weights[1].items())
    first_step = trainer.args.gradient_accumulation_steps
    assert len(passes[0]) - len(passes[1]) == 2 * 2 * first_step  # two updates, critic and policy


def test_a_share_of_passes_outside_zero_to_one_is_refused(make_trainer):
    with pytest.raises(ValueError, match="reuse_forward is 2.0; it is a share"):
        make_trainer(reuse_forward=2.0)


@pytest.mark.parametrize("on_alarm", ["warn", "stop"])
def test_constant_score_is_told_with_an_example(make_trainer, on_alarm):
    """A check that no response passes: five updates of advantages 0 would end with a green tick."""
    from tests.support.rl.trainers import ROWS

    rows = [row | {"answer": "4"} for row in ROWS]
    messages = []
    trainer = make_trainer(
        rows=rows,
        scorer=lambda rows, responses: [0.0] * len(responses),
        updates=4,
        on_alarm=on_alarm,
        notify=messages.append,
    )
    trainer.train()
    # The untrained model never ends, which is another alarm.
    (message,) = [text for text in messages if "truncation" not in text]
    assert message.startswith("update 2: constant score: every response of 2 updates scored 0, so the policy learns")
    assert "Example: reference '4', response " in message and message.endswith("score 0.")
    assert len(updates(trainer)) == (2 if on_alarm == "stop" else 4)
