"""A whole PPO update against a plain implementation: one response at a time, loops over tokens, float64."""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from align.config.tuning import FullTuning
from align.environments.episode import Episode, PolicyTurn
from align.inference.protocol import Sampling
from tests.support.rl.trainers import make_engine

KL_COEF, GAMMA, LAM, CLIP, DUAL, VALUE_CLIP, VF, ENTROPY, CAP, PENALTY, TEMPERATURE = (
    0.3, 0.97, 0.9, 0.01, 1.02, 0.01, 0.7, 0.02, 1.1, 0.25, 0.9,
)  # fmt: skip
MAX_TOKENS = 9


class NoisyEngine:
    """An engine whose log-probabilities are off, so that the correction has something to correct."""

    name = "noisy"

    def __init__(self, engine):
        self.engine = engine
        self.load_weights = engine.load_weights

    def generate(self, prompts, sampling, on_progress=None):
        answers = self.engine.generate(prompts, sampling, on_progress)
        noise = iter(torch.randn(10_000, generator=torch.Generator().manual_seed(9)).tolist())
        return [
            [
                dataclasses.replace(a, logprobs=[p + 0.3 * next(noise) for p in a.logprobs])
                for a in (cut_at_eos(group[0], 2 + place), *group[1:])
            ]
            for place, group in enumerate(answers)
        ]


class TwoTurns:
    """Episodes of two turns with an environment's tokens between them; one in four has a single turn.

    Turns have scores of their own where ``by_turn`` says so.
    """

    OBSERVATION = [11, 12, 13]
    cache_statistics = None

    def __init__(self, by_turn):
        self.by_turn = by_turn

    def play(
        self, engine, tasks, *, temperature, journal=None, on_progress=None, weights_update=None, thinking_budget=None
    ):
        episodes = [Episode([3 + number % 2, 20, 21 + number // 2]) for number in range(len(tasks))]
        playing = list(range(len(tasks)))
        for turn in range(2):
            if turn == 1:
                playing = [number for number in playing if number % 4]
                for number in playing:
                    episodes[number].observations.append(self.OBSERVATION)
            seeds = tuple(tasks[number].seed + turn for number in playing)
            prompts = [episodes[number].context_ids() for number in playing]
            responses = engine.engine.generate(prompts, Sampling(3, temperature, seeds=seeds))
            for number, (response, *_) in zip(playing, responses, strict=True):
                ended = number % 2 == 1
                response = cut_at_eos(response, 2) if ended else response
                # Off, so that the correction has something to correct.
                logprobs = [p + 0.3 * (-1) ** (number + t) for t, p in enumerate(response.logprobs)]
                turn = PolicyTurn(response.token_ids, logprobs, ended, response.text)
                episodes[number].turns.append(turn)
        for number, episode in enumerate(episodes):
            episode.stop = "finished" if episode.turns[-1].finished else "truncated"
            episode.score = 0.25 * (number % 3) - 0.1
            episode.turn_scores = [0.3 * (number % 3), -0.1][: len(episode.turns)] if self.by_turn else None
        return episodes


def cut_at_eos(answer, length):
    """The answer as if its ``length``-th token had been EOS, which the tiny model seldom samples."""
    ids = [*answer.token_ids[: length - 1], 2]
    return dataclasses.replace(answer, token_ids=ids, logprobs=answer.logprobs[:length], finished=True)


class Capture(TrainerCallback):
    """Weights before and gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        weights = copy.deepcopy(model).double()
        self.steps.append((weights, {n: p.grad.clone() for n, p in trained.items()}))


def forward(model, prompt, response):
    """Log-probabilities, entropies (T) and values (T+1) of one response, by the plain forward pass."""
    ids = torch.tensor([prompt + response])
    log_p = torch.log_softmax(model.policy(ids).logits[0] / TEMPERATURE, dim=-1)
    hidden = model.critic.trunk(ids).last_hidden_state[0]
    first = len(prompt) - 1
    values = (hidden @ model.critic.head.weight[0] + model.critic.head.bias)[first : first + len(response) + 1]
    logprobs = [log_p[first + t][token] for t, token in enumerate(response)]
    entropies = [-(log_p[first + t].exp() * log_p[first + t]).sum() for t in range(len(response))]
    return logprobs, entropies, list(values)


def experience(model, reference, rollout, truncation, options):
    """Rewards, advantages (before whitening) and returns of every response, as lists of floats."""
    outcome = []
    scores, std = rollout.tensors["scores"].double().tolist(), 1.0
    if options.get("normalize_scores"):
        mean = sum(scores) / len(scores)
        std = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
        scores = [(score - mean) / std for score in scores]
    for i in range(len(rollout)):
        prompt, response = rollout.prompts[i], rollout.responses[i]
        with torch.no_grad():
            old, _, values = forward(model, prompt, response)
            ref, _, _ = forward(reference, prompt, response)
        finished = response[-1] == 2
        last = len(response) - 1
        own, ends = policy_tokens(rollout, i)
        rewards = [0.0] * len(response)
        for t in own:
            rewards[t] = 0.0 if options.get("kl_in") == "loss" else -KL_COEF * (old[t].item() - ref[t].item())
        rewards[last] += scores[i] - (0.0 if finished else PENALTY)
        rewards[last] -= options.get("length_penalty", 0.0) * len(own)
        for end, score in zip(ends, (rollout.episodes and rollout.episodes[i].turn_scores) or [], strict=False):
            rewards[end] += score / std
            rewards[last] -= score / std
        advantages, returns = [0.0] * len(response), [0.0] * len(response)
        following = 0.0
        after = values[last + 1].item() if truncation == "bootstrap" and not finished else 0.0
        for t in reversed(own):
            gamma = GAMMA * options.get("turn_discount", 1.0) if t in ends[:-1] else GAMMA
            delta = rewards[t] + gamma * after - values[t].item()
            following = delta + gamma * LAM * following
            after = values[t].item()
            advantages[t] = following
            returns[t] = following + values[t].item()
        learned = finished or options.get("truncated") != "mask"
        outcome.append(
            {"old": old, "ref": ref, "values": values, "rewards": rewards, "advantages": advantages, "returns": returns}
            | {"learned": learned, "own": own}
        )
    return outcome


def policy_tokens(rollout, i):
    """Indices of the tokens of response i that the policy sampled, and of the last one of each turn."""
    if rollout.episodes is None:
        return list(range(len(rollout.responses[i]))), [len(rollout.responses[i]) - 1]
    own, ends, start = [], [], 0
    for turn in rollout.episodes[i].turns:
        own += range(start, start + len(turn.token_ids))
        ends.append(own[-1])
        start += len(turn.token_ids) + len(TwoTurns.OBSERVATION)
    return own, ends


def whitened(result):
    everything = [row["advantages"][t] for row in result if row["learned"] for t in row["own"]]
    mean = sum(everything) / len(everything)
    variance = sum((a - mean) ** 2 for a in everything) / len(everything)
    return [[(a - mean) / math.sqrt(variance + 1e-8) for a in row["advantages"]] for row in result]


def loss_of(model, result, advantages, rollout, members, aggregation, options):
    """The loss of one optimizer step over the responses in ``members``."""
    members = [i for i in members if result[i]["learned"]]
    tokens = sum(len(result[i]["own"]) for i in members)
    share_of = {
        "token": lambda length: 1 / tokens,
        "sequence": lambda length: 1 / length / len(members),
        "constant": lambda length: 1 / MAX_TOKENS / len(members),
    }[aggregation]
    total = torch.zeros((), dtype=torch.float64)
    for i in members:
        response = rollout.responses[i]
        new, entropies, values = forward(model, rollout.prompts[i], response)
        gaps = [
            result[i]["old"][t].item() - rollout.tensors["sampler_logprobs"][i, t].item()
            if t in result[i]["own"]
            else 0.0
            for t in range(len(response))
        ]
        dropped = abs(sum(gaps)) > math.log(options.get("importance_sequence_cap", math.inf))
        for t in result[i]["own"]:
            advantage, old, old_value = advantages[i][t], result[i]["old"][t].item(), result[i]["values"][t].item()
            ratio = torch.exp(new[t] - old)
            policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - CLIP, 1 + CLIP))
            if advantage < 0:
                policy = torch.minimum(policy, torch.tensor(-DUAL * advantage, dtype=torch.float64))
            weight = 0.0 if dropped else min(math.exp(gaps[t]), CAP)
            drift = new[t] - result[i]["ref"][t].item()
            penalty = {None: drift**2 / 2, "k3": torch.exp(-drift) - 1 + drift}[options.get("kl_estimator")]
            kl = KL_COEF * penalty if options.get("kl_in") == "loss" else 0.0
            near = old_value + (values[t] - old_value).clamp(-VALUE_CLIP, VALUE_CLIP)
            target = result[i]["returns"][t]
            value = torch.maximum((values[t] - target) ** 2, (near - target) ** 2) / 2
            share = share_of(len(result[i]["own"]))
            total = total + share * (weight * policy + VF * value - ENTROPY * entropies[t] + kl)
    return total


def close(ours, theirs, label):
    gap = (ours.double() - theirs.double()).abs().max().item()
    assert gap <= 1e-5, f"{label}: {gap:.1e} apart"


def close_gradients(ours, theirs, scale, label):
    """Within 1e-5 of ``scale``, the largest norm in the update: in steps that clip most tokens the sum cancels."""
    apart = ((ours.double() - theirs).norm() / scale).item()
    assert apart <= 1e-5, f"{label}: {apart:.1e} apart, relative to the update's gradients"


@pytest.mark.parametrize(
    ("aggregation", "micro", "truncation", "options"),
    [
        ("token", 1, "bootstrap", {}),
        ("token", 4, "terminal", {}),
        ("sequence", 1, "bootstrap", {}),
        ("sequence", 4, "terminal", {}),
        ("constant", 4, "terminal", {}),
        ("token", 2, "terminal", {"kl_in": "loss"}),
        ("sequence", 2, "terminal", {"kl_in": "loss", "kl_estimator": "k3"}),
        ("token", 1, "terminal", {"truncated": "mask"}),
        ("sequence", 2, "bootstrap", {"truncated": "mask"}),
        ("token", 4, "terminal", {"length_penalty": 0.05, "normalize_scores": True}),
        ("constant", 2, "terminal", {"importance_sequence_cap": 2.0}),
        ("token", 4, "bootstrap", {"episodes": TwoTurns(by_turn=False)}),
        ("sequence", 2, "terminal", {"episodes": TwoTurns(by_turn=True), "turn_discount": 0.8}),
        ("constant", 1, "bootstrap", {"episodes": TwoTurns(by_turn=True), "length_penalty": 0.05}),
        ("token", 2, "terminal", {"episodes": TwoTurns(by_turn=True), "normalize_scores": True}),
    ],
)
def test_a_whole_update_equals_the_plain_implementation(
    make_trainer, tiny_model, aggregation, micro, truncation, options
):
    capture = Capture()
    trainer = make_trainer(
        reward=True,
        tuning=FullTuning(),
        engine=NoisyEngine(make_engine(tiny_model)),
        callbacks=[capture],
        updates=1,
        num_epochs=2,
        num_mini_batches=2,
        max_tokens=MAX_TOKENS,
        per_device_train_batch_size=micro,
        loss_aggregation=aggregation,
        truncation=truncation,
        kl_coef=KL_COEF,
        gamma=GAMMA,
        lam=LAM,
        clip_range=CLIP,
        dual_clip=DUAL,
        value_clip_range=VALUE_CLIP,
        vf_coef=VF,
        entropy_coef=ENTROPY,
        importance_cap=CAP,
        missing_eos_penalty=PENALTY,
        temperature=TEMPERATURE,
        max_grad_norm=1e9,
        probe_parity=False,
        **options,
    )
    with torch.no_grad():
        for parameter in trainer.model.policy.parameters():  # away from the reference, so that KL is not zero
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    learned, rollouts = [], []
    learn, compute_advantages = trainer.learn, trainer.compute_advantages
    trainer.learn = lambda mini_batch: learned.append(mini_batch.micro_batches(micro)) or learn(mini_batch)
    trainer.compute_advantages = lambda rollout: rollouts.append(rollout) or compute_advantages(rollout)
    trainer.train()

    (rollout,) = rollouts
    finished = rollout.tensors["finished"]
    assert finished.any() and not finished.all()
    start = capture.steps[0][0]
    reference = SimpleNamespace(policy=start.reference, critic=start.critic)
    actual = experience(start, reference, rollout, truncation, options)
    advantages = whitened(actual)
    for i, row in enumerate(actual):
        length = len(rollout.responses[i])
        close(rollout.tensors["rewards"][i, :length], torch.tensor(row["rewards"]), "rewards")
        close(rollout.tensors["raw_advantages"][i, :length], torch.tensor(row["advantages"]), "advantages")
        if row["learned"]:
            own = row["own"]
            close(rollout.tensors["advantages"][i, own], torch.tensor(advantages[i])[own], "whitened advantages")
        close(rollout.tensors["returns"][i, :length], torch.tensor(row["returns"]), "returns")

    assert len(capture.steps) == 4
    losses, pairs = [], {"policy": [], "critic": []}
    for (weights, gradients), mini in zip(capture.steps, learned, strict=True):
        members = [i for micro_batch in mini for i in micro_batch]
        loss = loss_of(weights, actual, advantages, rollout, members, aggregation, options)
        losses.append(loss.item())
        weights.zero_grad()
        loss.backward()
        expected = {n: p.grad for n, p in weights.named_parameters() if p.grad is not None}
        assert expected.keys() == gradients.keys()
        for part, found_pairs in pairs.items():
            ours = torch.cat([g.flatten() for n, g in gradients.items() if n.startswith(part)])
            theirs = torch.cat([g.flatten() for n, g in expected.items() if n.startswith(part)])
            found_pairs.append((ours, theirs))
    for part, found_pairs in pairs.items():
        scale = max(theirs.norm() for _, theirs in found_pairs)
        for ours, theirs in found_pairs:
            close_gradients(ours, theirs, scale, f"gradient of the {part}")
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(sum(losses) / 4, abs=1e-5)
    assert logged["clipfrac"] > 0 and logged["value_clipfrac"] > 0
