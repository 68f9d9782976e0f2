"""Sampling an update: the same requests, with the same seeds, however many processes share them."""

from types import SimpleNamespace

import pytest

from align.ppo.prompts import Prompts
from align.ppo.rollout import sample_rollout
from align.rollouts.protocol import Response


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
    found = []
    for process in range(world_size):
        engine = Recorder()
        args = SimpleNamespace(
            local_batch=8 // world_size, samples_per_prompt=2, world_size=world_size, process_index=process, seed=seed,
            max_tokens=4, temperature=1.0,
        )  # fmt: skip
        sample_rollout(engine, prompts, args, update)
        found += engine.requests
    return found


@pytest.mark.parametrize("update", [0, 5])
def test_processes_share_out_the_requests_of_one(update):
    assert requests(2, update) == requests(1, update) == requests(4, update)


def test_a_prompt_that_comes_again_is_answered_anew():
    seeds = [seed for update in range(4) for _, seed in requests(1, update)]
    assert len(set(seeds)) == len(seeds)
    assert requests(1, 0) != requests(1, 0, seed=4)
