"""Rollouts drawn ahead: with which weights, the same beside the trainer as in it, kept by checkpoints, learned from."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError

from align.config.stages.best_of_n import OnlineDpoConfig, RejectionConfig
from align.config.stages.policy_gradient import GrpoConfig, PpoConfig
from align.config.tuning import LoraTuning
from align.inference.servers.pool import PoolEngine
from align.inference.servers.server_client import BadReply
from align.inference.transformers import TransformersEngine
from align.rl.checkpoint import last_checkpoint
from align.rl.prefetch import RolloutPrefetcher
from align.rl.rollout import Rollout
from tests.support.inference.model_server import ModelServer
from tests.support.inference.server_harness import served_at
from tests.support.rl.arguments import settings
from tests.support.rl.runs import FIELDS, SETTINGS, KillAt, Killed, history, outcome
from tests.support.rl.trainers import options_in

AHEAD = {**FIELDS, "updates": 5, "num_epochs": 1, "probe_parity": False}
"""Two steps an update."""


class WeightsRecorder:
    """An engine that only records its last weights."""

    def __init__(self) -> None:
        self.holds = -1

    def load_weights(self, weights) -> None:
        self.holds = weights


def described(engine, update: int, weights_update: int) -> Rollout:
    """A rollout of one token, whose text is what the engine holds."""
    tensors = {"response_mask": torch.ones(1, 1, dtype=torch.bool), "weights_update": torch.tensor([[weights_update]])}
    return Rollout(update, [], [], [], [], [str(engine.holds)], tensors)


def sampled_with(staleness: int, updates: int) -> list[tuple]:
    """(update, weights that sampled it, the update they are recorded for), as the trainer would get them."""
    engine = WeightsRecorder()

    prefetcher = RolloutPrefetcher(engine, lambda *told: described(engine, *told), staleness, updates)
    values = []
    for update in range(updates):
        prefetcher.set_weights(update, update)
        rollout = prefetcher.get(update)
        values.append((rollout.update, int(rollout.texts[0]), rollout.update - int(rollout.staleness.max())))
    return values


def test_weights_are_as_old_as_is_said() -> None:
    assert sampled_with(0, 4) == [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)]
    assert sampled_with(1, 4) == [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 2, 2)]
    assert sampled_with(2, 5) == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 1, 1), (4, 2, 2)]
    assert sampled_with(9, 3) == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]  # no rollout behind the last update


def test_prefetcher_waits_only_inside_get() -> None:
    engine = WeightsRecorder()
    waits = []

    def sample(update: int, weights_update: int) -> Rollout:
        waits.append(prefetcher.is_waiting)
        return described(engine, update, weights_update)

    prefetcher = RolloutPrefetcher(engine, sample, 0, 2)
    prefetcher.set_weights(0, 0)
    assert not prefetcher.is_waiting
    prefetcher.get(0)
    assert waits == [True] and not prefetcher.is_waiting


class Rejecting(PoolEngine):
    """Servers that take every version of the weights but those in ``rejected``, and go on with what they hold."""

    takes_folders = True

    def __init__(self, rejected: set[int]) -> None:
        self.rejected, self.holds = rejected, -1

    def write_weights(self, weights) -> int:
        return weights

    def adopt(self, version: int) -> None:
        if version in self.rejected:
            raise BadReply(f"weights {version} were rejected")
        self.holds = version


@pytest.mark.parametrize(("staleness", "rejected", "draws"), [(1, 0, 0), (1, 1, 2), (1, 2, 3), (2, 1, 3)])
def test_no_rollout_is_drawn_after_weights_were_rejected(staleness: int, rejected: int, draws: int) -> None:
    """Later versions that would be taken hide nothing: the run ends at the first rollout of the rejected weights."""
    engine = Rejecting({rejected})

    prefetcher = RolloutPrefetcher(engine, lambda *told: described(engine, *told), staleness, updates=6)
    chosen = []
    try:
        with pytest.raises(BadReply, match=f"weights {rejected} were rejected"):
            for update in range(6):
                prefetcher.set_weights(update, update)
                chosen.append(prefetcher.get(update))
        with pytest.raises(BadReply):
            prefetcher.wait()
    finally:
        prefetcher.close()
    assert len(chosen) == draws
    assert all(int(rollout.texts[0]) == rollout.update - int(rollout.staleness.max()) for rollout in chosen)


def test_weights_rejected_after_last_rollout_end_the_run() -> None:
    engine = Rejecting({1})
    prefetcher = RolloutPrefetcher(engine, lambda *told: described(engine, *told), 1, updates=2)
    try:
        for update in range(2):
            prefetcher.set_weights(update, update)
            prefetcher.get(update)
        with pytest.raises(BadReply, match="weights 1 were rejected"):
            prefetcher.wait()
    finally:
        prefetcher.close()


@pytest.fixture
def pool(tiny_model) -> Iterator[PoolEngine]:
    """Two stand-ins with real models behind them, each of which answers one request at a time."""
    servers = [ModelServer(tiny_model), ModelServer(tiny_model)]
    engine = PoolEngine(served_at(tiny_model, [server.address for server in servers], timeout=200))
    yield engine
    engine.close()
    for server in servers:
        server.stop()


def alone(tiny_model) -> TransformersEngine:
    """The same arithmetic in this process: one response at a time."""
    return TransformersEngine(tiny_model, device=torch.device("cpu"), dtype=torch.float32, batch_size=1)


@pytest.mark.parametrize("staleness", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_servers_beside_the_trainer_change_nothing(make_trainer, tiny_model, tmp_path, pool, staleness) -> None:
    """Bit for bit what an engine in the process gives, which draws when it is asked: nothing depends on a clock.

    At 0 that is the run without any of this: nothing is drawn before its update begins.
    """
    actual = []
    for name, engine in (("alone", alone(tiny_model)), ("pool", pool)):
        trainer = make_trainer(engine=engine, output_dir=str(tmp_path / name), max_staleness=staleness, **AHEAD)
        assert trainer.prefetcher.in_background == (name == "pool" and staleness > 0)
        trainer.train()
        actual.append(outcome(trainer))
    (weights, logs), (others, other_logs) = actual
    assert logs == other_logs
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    stale = [entry.get("staleness", 0) for entry in logs]
    assert stale == [min(update, staleness) for update in range(5)]
    ratios = [abs(entry["parity_ratio"] - 1) for entry in logs]
    assert max(ratios[:1]) < 1e-4
    assert (max(ratios) > 1e-3) == (staleness > 0), ratios  # older weights say other probabilities


def test_the_trainer_learns_while_servers_sample(make_trainer, tmp_path, pool, monkeypatch) -> None:
    """The second update's rollout is still being drawn when the first update has been learned from."""
    learned, waited = threading.Event(), []
    generate = pool.generate
    rounds = []

    def slow(*inputs):
        rounds.append(None)
        if len(rounds) == 2:
            waited.append(learned.wait(100))
        return generate(*inputs)

    monkeypatch.setattr(pool, "generate", slow)
    trainer = make_trainer(engine=pool, output_dir=str(tmp_path / "run"), max_staleness=1, **AHEAD)
    backward = trainer.backward

    def noted(*inputs, **options):
        backward(*inputs, **options)
        learned.set()

    monkeypatch.setattr(trainer, "backward", noted)
    trainer.train()
    assert waited == [True]


@pytest.mark.parametrize(
    ("staleness", "killed_at"),
    [(2, 5), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 4), (1, 5), (2, 4)))],
)  # at the boundary after two updates; in the middle of the third
def test_a_killed_run_resumes_bit_for_bit(make_trainer, tmp_path, staleness, killed_at) -> None:
    """What was drawn ahead is in the checkpoint: the weights that drew it are no more."""
    fields = {**AHEAD, "max_staleness": staleness, "tuning": LoraTuning(rank=4, alpha=8)}
    uninterrupted = make_trainer(output_dir=str(tmp_path / "whole"), **fields)
    uninterrupted.train()
    folder = tmp_path / "killed"
    with pytest.raises(Killed):
        make_trainer(output_dir=str(folder), callbacks=[KillAt(killed_at)], **fields).train()
    torch.manual_seed(12345)
    second = make_trainer(output_dir=str(folder), **fields)
    assert last_checkpoint(folder) == folder / "checkpoint-4"
    second.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    (weights, logs), (expected, expected_logs) = outcome(second), outcome(uninterrupted)
    assert logs == expected_logs and len(logs) == 5
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_validation_sees_the_policy_as_it_is(make_trainer, tmp_path, pool) -> None:
    """And a rollout that is drawn meanwhile does not see validation's."""
    held_out = [{"id": "h", "prompt": "tell zz"}]
    actual = []
    for staleness in (0, 2):
        options = {**AHEAD, "eval_updates": 2, "learning_rate": 1e-30, "max_staleness": staleness, "updates": 3}
        trainer = make_trainer(engine=pool, eval_dataset=held_out, output_dir=str(tmp_path / str(staleness)), **options)
        trainer.train()
        actual.append([entry for entry in trainer.state.log_history if "eval_score" in entry])
    assert [entry["update"] for entry in actual[0]] == [0, 2, 3]
    assert [entry["eval_score"] for entry in actual[0]] == [entry["eval_score"] for entry in actual[1]]


@pytest.mark.slow
def test_it_learns_a_reward_that_is_known(make_trainer) -> None:
    """As ``test_learning.py`` has it without staleness."""
    entries = history(make_trainer(updates=30, kl_coef=0.0, seed=1, max_staleness=1, **SETTINGS))
    scores = [entry["score"] for entry in entries]
    assert scores[0] < 0.1
    assert min(scores[-3:]) > 0.9, scores


def test_what_cannot_be_corrected_is_refused(tmp_path) -> None:
    fields = {"policy": "p", "prompts": "q", "score": "gold", "learning_rate": 1e-3, "max_staleness": 1}
    with pytest.raises(ValidationError, match="max_staleness is 1, so older weights sample, which importance_cap"):
        PpoConfig.model_validate({**fields, "importance_cap": None})
    with pytest.raises(ValidationError, match="`zero_variance: resample` samples more for the current"):
        GrpoConfig.model_validate({**fields, "zero_variance": "resample"})
    options = options_in(tmp_path) | {"max_staleness": 1, "samples_per_prompt": 2, "per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match="older weights sample, which importance_cap corrects for. Set importance_cap"):
        settings(PpoConfig, **options, importance_cap=None)
    for kind in (OnlineDpoConfig, RejectionConfig):
        # Their losses have no importance weights, so they have no such setting.
        assert "max_staleness" not in kind.model_fields
    with pytest.raises(ValueError, match="`zero_variance: resample` samples more for the current"):
        settings(GrpoConfig, **options, zero_variance="resample")
    with pytest.raises(ValueError, match="max_staleness\n  Input should be greater than or equal to 0"):
        settings(PpoConfig, **{**options, "max_staleness": -1})
