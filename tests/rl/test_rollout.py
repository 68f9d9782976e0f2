"""Sampling an update: the same requests, with the same seeds, however many processes share them."""

from types import MethodType, SimpleNamespace

import pytest

from align.inference.protocol import Response
from align.rl import rollout_trainer
from align.rl.prompts import Prompts, derive_seed
from align.rl.rollout import turn_of


class Recorder:
    """An engine that notes each request and answers with one token."""

    name = "recorder"

    def __init__(self):
        self.requests = []

    def generate(self, prompts, sampling, on_progress=None):
        self.requests += [
            (tuple(prompt), sampling.request_seed(place, sample))
            for place, prompt in enumerate(prompts)
            for sample in range(sampling.n)
        ]
        return [[Response([2], [-1.0], True, "")] * sampling.n for _ in prompts]


def requests(world_size, update, seed=3):
    prompts = Prompts.__new__(Prompts)
    prompts.rows = [{"id": str(at)} for at in range(6)]
    prompts.token_ids = [[10 + at] for at in range(6)]
    args = SimpleNamespace(rollout_batch=8, samples_per_prompt=2, seed=seed, max_tokens=4, temperature=1.0)
    turn, found = turn_of(args, update), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rollout_trainer, "gathered", lambda own: [own])
        patched.setenv("WORLD_SIZE", str(world_size))
        for process in range(world_size):
            patched.setenv("RANK", str(process))
            trainer = SimpleNamespace(engine=Recorder(), prompts=prompts, args=args, score=lambda rollout: None)
            indices = prompts.draw(turn.start, len(turn), seed)
            seeds = [derive_seed(seed, "sampling", number) for number in turn]
            for name in ("_own", "together"):
                setattr(trainer, name, MethodType(getattr(rollout_trainer.RolloutTrainer, name), trainer))
            rollout_trainer.RolloutTrainer.draw(trainer, update, indices, seeds)
            found += trainer.engine.requests
    return found


@pytest.mark.parametrize("update", [0, 5])
def test_processes_share_out_the_requests_of_one(update):
    assert requests(2, update) == requests(1, update) == requests(3, update)


def test_a_prompt_that_comes_again_is_answered_anew():
    seeds = [seed for update in range(4) for _, seed in requests(1, update)]
    assert len(set(seeds)) == len(seeds)
    assert requests(1, 0) != requests(1, 0, seed=4)
