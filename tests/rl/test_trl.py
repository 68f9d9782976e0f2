"""PPO's numbers against those of trl 1.12's PPO on the same responses (fixture: ``make_trl_fixture.py``).

Equal within 1e-5 once these intended differences are accounted for; each is asserted below under its number:

1. trl puts the score one slot after EOS where there is one, and goes on from that slot's value; ours is on EOS itself.
2. trl's critic also learns the value of that slot.
3. trl whitens with the unbiased variance (Bessel's n - 1), we with the population's.
4. trl averages micro-batch means; our mean is over the tokens of the whole optimizer step.
5. trl ignores ``max_grad_norm``; we clip policy and critic, each by its own norm.
6. trl's ``num_mini_batches`` adds no optimizer step; ours does.
7. On the last batch of its data trl steps after every micro-batch, whatever the accumulation.
8. trl's logged means take in slots never written and padding, and its logged score has the penalty in it.
9. trl whitens rewards over the tokens and that slot; we over the tokens.
10. trl takes k3 as a reward; we refuse it, as its gradient is not the KL's.
11. Our value head has a bias, which starts at zero; trl's has none.
12. trl divides logits by the temperature + 1e-7.
13. trl marks padding with a log-probability of 1, we with 0.
14. trl corrects for no gap to the sampler; ours is off here. It has no value after a cut; ours is an option.
15. Defaults: see ``test_defaults_differ_on_purpose``.
"""

from __future__ import annotations

import pytest
import torch

from align.rl import PpoConfig
from align.rl.advantages import gae
from align.rl.arguments import rollout_arguments
from align.rl.losses import value_loss
from align.rl.masking import last_index, response_mask, whiten
from align.rl.packing import pack
from align.rl.rewards import adjust_scores, estimate_kl, shape_rewards
from tests.support.rl.make_trl_fixture import PAD
from tests.support.rl.policy_losses import make_tokens, policy_loss
from tests.support.rl.trl_runs import fill, of, ours, read_fixture, theirs


@pytest.fixture(scope="module")
def trl():
    return read_fixture()


def close(first, second, label):
    assert first.shape == second.shape, label
    gap = ((first - second).abs() / second.abs().clamp(min=1)).max().item()  # float32 knows large numbers less well
    assert gap <= 1e-5, f"{label}: {gap:.1e} apart"


def close_all(first, second, label):
    assert first.keys() == second.keys(), label
    for name, tensor in first.items():
        close(tensor, second[name], f"{label} of {name}")


def bessel(mask):
    """What makes a whitening by the population's variance one by the unbiased variance (difference 3)."""
    return ((mask.sum() - 1) / mask.sum()) ** 0.5


def with_slot(mask):
    """The response mask and, where the length allowed leaves one, the slot after EOS (differences 1, 2 and 9)."""
    return torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)


def penalized(trl, t):
    return adjust_scores(t["scores"], t["finished"], missing_eos_penalty=trl.settings["missing_eos_penalty"])


def advantages_of(trl, t, rewards):
    """Our advantages and returns for rewards that reach into the slot: to us it is one more token."""
    mask, gamma, lam = with_slot(t["response_mask"]), trl.settings["gamma"], trl.settings["lam"]
    ended = torch.ones_like(t["finished"])
    return gae(rewards, t["values"], mask, ended, gamma=gamma, lam=lam, truncation="terminal")


def experience(trl, t):
    """Rewards, advantages and returns by our functions, with the score where trl has it."""
    slot, kl_coef = with_slot(t["response_mask"]), trl.settings["kl_coef"]
    rewards, kl = shape_rewards(penalized(trl, t), t["logprobs"], t["ref_logprobs"], slot, kl_coef)
    advantages, returns = advantages_of(trl, t, rewards)
    return {"kl": kl, "rewards": rewards, "raw_advantages": advantages, "returns": returns}


def norm_of(gradients, prefix=""):
    return torch.cat([g.flatten() for n, g in gradients.items() if n.startswith(prefix)]).norm().item()


def mean_of(steps, name):
    """Over the micro-batches of all steps, as trl averages."""
    values = [micro[name] for step in steps for micro in step["micro_batches"]]
    return sum(values) / len(values)


@pytest.mark.parametrize("run", ["full", "ragged"])
def test_what_is_measured_is_the_same(trl, tmp_path, run):
    assert trl.made_with["trl"] == "1.12.0"
    t, actual = ours(trl, run, tmp_path, learning_rate=0.0).tensors, of(trl, run)
    mask, responses = t["response_mask"], trl.runs[run]["responses"]
    assert mask.equal(response_mask([len(row) for row in responses]))
    for row, prompt, response in zip(actual["query_responses"], trl.prompts, responses, strict=True):
        assert row[row != PAD].tolist() == prompt + response
    for name in ("logprobs", "ref_logprobs"):
        close(t[name][mask], actual[name][mask], name)
        assert (t[name][~mask] == 0).all() and (actual[name][~mask] == 1).all()  # difference 13
    close(t["values"][:, :-1], actual["values"], "values")
    close(penalized(trl, t), actual["scores"], "scores")
    close(t["kl"], actual["kl"], "kl")


def test_an_update_without_early_ends_is_the_same(trl, tmp_path):
    def account(tensors, order):
        tensors["advantages"] *= bessel(tensors["response_mask"])

    run, actual, reference_run = ours(trl, "full", tmp_path, account), of(trl, "full"), trl.runs["full"]
    t, mask = run.tensors, run.tensors["response_mask"]
    assert mask.all() and t["finished"].any() and not t["finished"].all()
    t["advantages"] *= bessel(mask)
    for name in ("rewards", "raw_advantages", "advantages", "returns"):
        close(t[name], actual[name], name)
    assert len(run.steps.gradients) == len(reference_run["steps"]) == 2
    for step, gradients in enumerate(run.steps.gradients):
        close_all(gradients, of(trl, f"full/step{step}/micro1/gradient"), f"gradient {step}")
    close_all(run.steps.weights[-1], of(trl, "full/step1/after"), "weight")
    # Micro-batches have as many tokens as each other here, so that the mean of their means is the tokens' mean.
    assert run.logged["loss"] == pytest.approx(mean_of(reference_run["steps"], "loss"), abs=1e-5)
    assert run.logged["value_loss"] == pytest.approx(mean_of(reference_run["steps"], "vf_loss"), abs=1e-5)
    assert run.logged["importance_weight"] == 1.0 and run.logged["parity_gap_max"] < 1e-5
    # trl's means over the update are half of what they should be: as many slots again are never written (difference 8)
    fill(run.trainer.model, run.steps.weights[0], theirs)
    second = run.trainer.model(pack(trl.prompts, reference_run["responses"], range(8), PAD, "padded"))
    entropy = (t["entropy"].mean() + second["entropy"].mean()) / 2
    logged = {
        "policy/clipfrac_avg": run.logged["clipfrac"] / 2,
        "val/clipfrac_avg": run.logged["value_clipfrac"] / 2,
        "policy/approxkl_avg": run.logged["approx_kl"] / 2,
        "val/ratio": run.logged["ratio"] / 2,
        "policy/entropy_avg": entropy.item() / 2,
        "loss/policy_avg": mean_of(reference_run["steps"], "pg_loss") / 2,
        "objective/kl": run.logged["kl"],
        "objective/entropy": -t["logprobs"].sum(dim=1).mean().item(),
        "objective/scores": penalized(trl, t).mean().item(),
        "objective/rlhf_reward": run.logged["reward"],
    }
    assert logged == pytest.approx({name: reference_run["metrics"][name] for name in logged}, abs=1e-5)
    assert run.logged["score"] == pytest.approx(t["scores"].mean().item(), abs=1e-5)
    assert run.logged["clipfrac"] > 0.1 and run.logged["value_clipfrac"] > 0.1


def test_the_logged_policy_loss_is_the_same(trl, tmp_path):
    def account(tensors, order):
        tensors["advantages"] *= bessel(tensors["response_mask"])

    logged = ours(trl, "full", tmp_path, account).logged
    assert logged["policy_loss"] == pytest.approx(mean_of(trl.runs["full"]["steps"], "pg_loss"), abs=1e-5)


def test_the_score_is_on_eos_and_not_one_slot_after_it(trl, tmp_path):
    t, actual = ours(trl, "ragged", tmp_path, learning_rate=0.0).tensors, of(trl, "ragged")
    mask, scores, placed = t["response_mask"], penalized(trl, t), experience(trl, t)
    early = with_slot(mask).sum(dim=1) > mask.sum(dim=1)
    assert early.sum() == 5 and t["finished"][~early].any() and not t["finished"].all()
    for name, tensor in placed.items():
        close(tensor, actual[name], name)
    whitened = whiten(placed["raw_advantages"], mask, shift_mean=True) * bessel(mask)
    close(whitened, actual["advantages"], "whitened advantages")
    # What that does to a response of L tokens with score s: its last delta has s in place of gamma V_L + gamma lam
    # (s - V_L), and token t hears of it by (gamma lam)^(L - 1 - t). Responses with no slot to spare are the same.
    gamma, decay = trl.settings["gamma"], trl.settings["gamma"] * trl.settings["lam"]
    for i, length in enumerate(mask.sum(dim=1).tolist()):
        after, score = t["values"][i, length], scores[i]
        shift = gamma * after + decay * (score - after) - score if early[i] else torch.zeros(())
        expected = t["raw_advantages"][i, :length] + shift * decay ** (length - 1.0 - torch.arange(length))
        close(expected, actual["raw_advantages"][i, :length], f"advantages of {i}")
        assert early[i] == (abs(shift) > 0.01)


def test_an_update_with_early_ends_is_the_same_by_parts(trl, tmp_path):
    run, actual, s = ours(trl, "ragged", tmp_path, learning_rate=0.0), of(trl, "ragged"), trl.settings
    t, mask, model = run.tensors, run.tensors["response_mask"], run.trainer.model
    slot, reference_run = with_slot(mask), trl.runs["ragged"]
    t |= experience(trl, t)
    advantages = whiten(t["raw_advantages"], mask, shift_mean=True) * bessel(mask)
    logged = dict.fromkeys(("val/ratio", "policy/approxkl_avg", "policy/clipfrac_avg", "val/clipfrac_avg"), 0.0)
    for step, micro_batches in enumerate(entry["micro_batches"] for entry in reference_run["steps"]):
        model.zero_grad()
        for place, micro in enumerate(micro_batches):
            rows, index = micro["indices"], f"step{step}/micro{place}"
            texts = [trl.prompts[i] for i in rows], [reference_run["responses"][i] for i in rows]
            out = model(pack(*texts, rows, PAD, "padded"))
            assert out["logprobs"].shape == mask[rows].shape  # each micro-batch has a response of full length
            close(out["logprobs"][mask[rows]], actual[f"{index}/new_logprobs"][mask[rows]], "new log-probabilities")
            close(out["values"][:, :-1], actual[f"{index}/new_values"], "new values")
            tokens = make_tokens(out["logprobs"], t["logprobs"][rows], advantages[rows], mask[rows])
            policy = policy_loss(tokens, mask[rows].sum(), low=s["cliprange"], high=s["cliprange"])
            value = value_loss(  # over the slots too: difference 2
                *(out["values"][:, :-1], t["values"][rows, :-1], t["returns"][rows], slot[rows], slot[rows].sum()),
                value_clip_range=s["cliprange_value"],
            )
            assert policy.loss.item() == pytest.approx(micro["pg_loss"], abs=1e-5)
            assert value.loss.item() == pytest.approx(micro["vf_loss"], abs=1e-5)
            ((policy.loss + s["vf_coef"] * value.loss) / 2).backward()  # a mean of micro-batch means: difference 4
            gradients = {theirs(n): p.grad for n, p in model.named_parameters() if p.requires_grad}
            if step == 0 or place == 1:
                close_all(gradients, of(trl, f"ragged/{index}/gradient"), f"gradient {index}")
            cells, padding = mask[rows].numel(), (~mask[rows]).sum()
            logged["val/ratio"] += ((policy.sums["ratio"] + padding) / cells).item() / 4  # pads count: difference 8
            logged["policy/approxkl_avg"] += (policy.sums["approx_kl"] / cells).item() / 4
            logged["policy/clipfrac_avg"] += (policy.sums["clipfrac"] / mask[rows].sum()).item() / 4
            logged["val/clipfrac_avg"] += (value.sums["value_clipfrac"] / slot[rows].sum()).item() / 4
        if step == 0:
            fill(model, of(trl, "ragged/step0/after"), theirs)
    assert logged == pytest.approx({name: reference_run["metrics"][name] for name in logged}, abs=1e-5)


@pytest.mark.parametrize("max_grad_norm", [1e9, 1e-3])
def test_mean_is_over_the_step_and_clipping_is_by_part(trl, tmp_path, max_grad_norm):
    actual = of(trl, "ragged")

    def account(tensors, order):
        tensors["advantages"] = actual["advantages"][order]

    run = ours(trl, "ragged", tmp_path, account, max_grad_norm=max_grad_norm)
    lengths = run.tensors["response_mask"].sum(dim=1)
    # trl's micro-batches m have means g_m, of which it takes half each; ours is sum(n_m g_m) / n, for n_m tokens.
    first, both = (of(trl, f"ragged/step0/micro{place}/gradient") for place in (0, 1))
    shares = [lengths[m["indices"]].sum() / lengths.sum() for m in trl.runs["ragged"]["steps"][0]["micro_batches"]]
    assert abs(shares[0] - 0.5) > 0.05
    policy = {n: 2 * (shares[0] * first[n] + shares[1] * (both[n] - first[n])) for n in both if n.startswith("policy.")}
    scale = min(max_grad_norm / norm_of(policy), 1.0)
    gradients = run.steps.gradients[0]
    close_all({n: gradients[n] / scale for n in policy}, policy, "gradient of the policy")
    if max_grad_norm < 1:
        for prefix in ("policy.", "value_model."):
            assert norm_of(gradients, prefix) == pytest.approx(max_grad_norm, rel=1e-3)
    assert trl.settings["max_grad_norm"] == 1e-3  # and yet:
    assert all(step["gradient_norm"] > 1 for step in trl.runs["ragged"]["steps"])


def test_whitened_rewards_differ_by_the_slot_and_by_the_variance(trl, tmp_path):
    t, actual = ours(trl, "ragged", tmp_path, learning_rate=0.0).tensors, of(trl, "whitened")
    mask, slot = t["response_mask"], with_slot(t["response_mask"])
    kl = estimate_kl(t["logprobs"], t["ref_logprobs"], "k3") * mask
    close(kl, actual["kl"], "k3")
    rewards = -trl.settings["kl_coef"] * kl
    rewards[range(8), last_index(slot)] += penalized(trl, t)
    close(rewards, actual["raw_rewards"], "rewards before whitening")
    mean = rewards[slot].mean()
    whitened = torch.where(
        slot, (whiten(rewards, slot, shift_mean=False) - mean) * bessel(slot) + mean, torch.zeros(())
    )
    close(whitened, actual["rewards"], "whitened rewards")
    advantages, returns = advantages_of(trl, t, whitened)
    close(advantages, actual["raw_advantages"], "advantages")
    close(returns, actual["returns"], "returns")
    close(whiten(advantages, mask, shift_mean=True) * bessel(mask), actual["advantages"], "whitened advantages")
    with pytest.raises(ValueError, match="kl_estimator is k3"):  # difference 10
        PpoConfig.for_trainer(learning_rate=1e-6, kl_estimator="k3")


def test_truncated_responses_end_as_in_trl_by_default(trl, tmp_path):
    t = ours(trl, "full", tmp_path, learning_rate=0.0, truncation="bootstrap").tensors
    decay = (trl.settings["gamma"] * trl.settings["lam"]) ** (9.0 - torch.arange(10))
    further = trl.settings["gamma"] * t["values"][:, -1:] * decay * ~t["finished"][:, None]
    close(t["raw_advantages"] - further, of(trl, "full")["raw_advantages"], "advantages")
    assert (further[~t["finished"]].abs().amax(dim=1) > 1e-3).all()


def test_steps_follow_from_the_settings(trl, tmp_path):
    runs = trl.runs
    assert runs["full"]["settings"] == {"num_mini_batches": 2} and len(runs["full"]["steps"]) == 2  # difference 6
    config = PpoConfig.for_trainer(learning_rate=1e-6, num_epochs=2, num_mini_batches=2)
    assert config.steps_per_update == 4
    assert len(runs["last batch of the data"]["steps"]) == 4  # difference 7
    assert all(len(step["micro_batches"]) == 1 for step in runs["last batch of the data"]["steps"])


def test_defaults_differ_on_purpose(trl, tmp_path):
    config = PpoConfig.for_trainer(learning_rate=1e-6)
    arguments = rollout_arguments(config, output_dir=str(tmp_path), use_cpu=True)

    def source(name):
        return config if name in PpoConfig.model_fields else arguments

    names = {"clip_range": "cliprange", "value_clip_range": "cliprange_value", "num_epochs": "num_ppo_epochs"}
    both = {
        name: (
            getattr(config if name in PpoConfig.model_fields else arguments, name),
            trl.defaults[names.get(name, name)],
        )
        for name in (*names, *(n for n in trl.defaults if n not in names.values()))
    }
    assert config.drift_estimator == trl.defaults["kl_estimator"]
    assert {name: pair for name, pair in both.items() if pair[0] != pair[1] and name != "kl_estimator"} == {
        "adam_epsilon": (1e-5, 1e-8),  # PPO's usual one (arXiv 2403.17031, detail 7), for the policy
        "lr_scheduler_type": ("constant_with_warmup", "linear"),  # without a warm-up
        "num_epochs": (1, 4),
        "temperature": (1.0, 0.7),
        "value_clip_range": (0.5, 0.2),
        "vf_coef": (1.0, 0.1),  # our critic has weights and a learning rate of its own
    }
    assert arguments.critic_adam_epsilon == trl.defaults["adam_epsilon"]  # of trl's whole model
    assert config.truncation == "terminal" and config.truncated == "learn"
