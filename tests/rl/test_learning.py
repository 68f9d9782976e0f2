"""It learns, over seeds; and without the critic, or without the KL penalty, it does not, or drifts."""

from __future__ import annotations

import pytest

from align.config.tuning import FullTuning, LoraTuning
from tests.support.rl.runs import SETTINGS, StopOnceLearned, history
from tests.support.rl.trainers import share_of_vowels

SEEDS = [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))]
LETTERS = [{"id": str(i), "prompt": [{"role": "user", "content": f"say {'abcdefgh'[i] * 4}"}]} for i in range(8)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("tuning", [FullTuning(), LoraTuning(rank=8, alpha=16)], ids=["full", "lora"])
def test_it_learns_a_reward_that_is_known(make_trainer, tuning, seed):
    """Share of vowels among a response's bytes: 5/260 at the start, 1 at best; 0.9 is reached on every seed.

    LoRA cannot touch the tiny model's head, whose short rows bound a logit near 6: at temperature 1 the best byte would
    have a probability of about 0.5, at 0.5 nearly 1.
    """
    learned = StopOnceLearned(score=0.9)
    entries = history(make_trainer(tuning=tuning, updates=20, kl_coef=0.0, seed=seed, callbacks=[learned], **SETTINGS))
    scores = [entry["score"] for entry in entries]
    assert scores[0] < 0.1
    assert min(scores[-3:]) > 0.9, scores


def by_prompt(rows, texts):
    """What is learned, and how good an answer to this prompt is whatever it says: the critic can take that out."""
    return [0.5 * (int(row["id"]) - 3.5) + share for row, share in zip(rows, share_of_vowels(rows, texts), strict=True)]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_critic_matters(make_trainer, seed):
    """Prompts differ by far more than answers: without a baseline for each, their noise drowns the signal.

    With a critic, twelve seeds took 13 to 30 updates. Which seed takes how many depends on the processor's rounding.
    """
    learned = {}
    updates = 48
    for name, rate in (("on", 5e-3), ("off", 1e-30)):
        trainer = make_trainer(
            rows=LETTERS, scorer=by_prompt, gold=share_of_vowels, updates=updates, kl_coef=0.0, seed=seed,
            critic_learning_rate=rate, callbacks=[StopOnceLearned(gold=0.7, explained_variance=0.9)], **SETTINGS,
        )  # fmt: skip
        entries = history(trainer)
        updates = len(entries)  # without a critic it is given no more
        learned[name] = entries[-1]["gold"]
        assert (entries[-1]["explained_variance"] > 0.9) == (name == "on")
    assert learned["on"] > 0.7 > 2 * learned["off"], learned


def share_of_lower_case(rows, texts):
    """A tenth of random bytes, so that there is something to learn from the first update on."""
    return [sum(c.islower() for c in text) / max(len(text), 1) for text in texts]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kl_penalty_matters(make_trainer, seed):
    """What drift costs holds it back, and with it the score: a frontier, with no penalty at its far end."""
    last = []
    for kl_coef in (0.0, 0.05):
        trainer = make_trainer(
            scorer=share_of_lower_case, updates=16, kl_coef=kl_coef, seed=seed,
            **(SETTINGS | {"learning_rate": 2e-3, "temperature": 1.0}),
        )  # fmt: skip
        last.append(history(trainer)[-1])
    drift, scores = ([entry[name] for entry in last] for name in ("kl_k3", "score"))
    assert drift[0] > 2 * drift[1], drift
    assert scores[0] > 0.9 and 0.3 < scores[1] < 0.8, scores
