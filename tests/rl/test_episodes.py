"""Trainers that learn from episodes: masks, metrics, learning, failures, and kills in the middle of an episode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from align.config.environment import EnvironmentConfig
from align.environments.player import EnvironmentPlayer
from align.environments.sources import open_environment
from align.errors import UserError
from align.inference.sessions import LockstepSession
from align.models.loading import load_tokenizer
from align.rl.checkpoint import last_checkpoint
from tests.support.environments.buttons import FORMAT, make_presser
from tests.support.rl.runs import Killed, outcome
from tests.support.rl.trainers import EPISODE_METHODS, make_episode_trainer, rollouts_of

ROWS = [{"id": str(i), "prompt": [{"role": "user", "content": "go"}]} for i in range(8)]


@pytest.fixture(scope="module")
def presser(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_presser(tiny_model, tmp_path_factory.mktemp("presser"))


@pytest.fixture
def make_trainer(presser, tmp_path):
    """``make_trainer(kind, environment fields, **trainer fields)`` returns a trainer of episodes."""
    players = []

    def make(kind="grpo", environment=(), folder=None, **fields):
        config = EnvironmentConfig.model_validate(
            {
                "class": "tests.support.environments.buttons:Buttons",
                "tool_format": FORMAT,
                "max_turns": 3,
                "max_tokens": 60,
                "turn_max_tokens": 8,
            }
            | dict(environment)
        )
        player = EnvironmentPlayer(config, open_environment(config), load_tokenizer(presser), 64, "test")
        players.append(player)
        fields = {"max_tokens": 60} | fields
        return make_episode_trainer(presser, kind, player, ROWS, folder or tmp_path, **fields)

    yield make
    for player in players:
        player.close()


def history(trainer):
    return [entry for entry in trainer.state.log_history if "score" in entry]


@pytest.mark.parametrize("kind", EPISODE_METHODS)
def test_an_update_learns_from_the_policys_own_tokens_alone(make_trainer, kind):
    trainer = make_trainer(kind, updates=1)
    (rollout,) = rollouts_of(trainer)
    mask, episodes = rollout.tensors["response_mask"], rollout.episodes
    assert any(len(episode.turns) > 1 for episode in episodes)
    for row, episode in enumerate(episodes):
        sampled = [token for turn in episode.turns for token in turn.token_ids]
        assert torch.tensor(rollout.responses[row])[mask[row, : episode.length]].tolist() == sampled
        # The environment's tokens have no number at all.
        for name in ("logprobs", "ref_logprobs", "entropy", "advantages", "kl"):
            assert rollout.tensors[name][row][~mask[row]].abs().sum() == 0, name
    # The trainer's log-probabilities are those that the turns were sampled with: no text was tokenized again.
    gap = (rollout.tensors["logprobs"] - rollout.tensors["sampler_logprobs"])[mask].abs().max()
    assert gap < 1e-4
    (entry,) = history(trainer)
    assert entry["turns"] == pytest.approx(sum(len(episode.turns) for episode in episodes) / 16)
    assert entry["calls"] > 0 and entry["score"] == pytest.approx(rollout.tensors["scores"].mean().item())
    assert entry["length"] == pytest.approx(mask.sum().item() / 16)


@pytest.mark.parametrize("kind", EPISODE_METHODS)
def test_it_learns_which_button_pays(make_trainer, kind):
    trainer = make_trainer(kind, updates=10, rollout_batch=32, learning_rate=5e-3, kl_coef=0.02)
    trainer.train()
    scores = [entry["score"] for entry in history(trainer)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.5, scores


def test_failed_environment_is_recorded_and_has_no_loss(make_trainer):
    trainer = make_trainer(
        "grpo",
        {"class": "tests.support.environments.buttons:Fragile"},
        updates=1,
        missing_eos_penalty=3.0,
        length_penalty=0.5,
    )
    rollouts = []
    compute = trainer.compute_advantages
    trainer.compute_advantages = lambda rollout: rollouts.append(rollout) or compute(rollout)
    trainer.train()
    (rollout,) = rollouts
    failed = rollout.tensors["failed"]
    assert failed.any() and not failed.all()
    assert not rollout.tensors["learn_mask"][failed].any()
    for episode, is_failed in zip(rollout.episodes, failed.tolist(), strict=True):
        assert ("the machine fell over" in episode.failure) == is_failed
    # A failed episode moves no other's advantage: it counts as the mean of its group.
    groups = torch.tensor(rollout.groups)
    for group in set(rollout.groups):
        members = groups == group
        others = rollout.tensors["scores"][members & ~failed]
        if len(others):
            for score in rollout.tensors["scores"][members & failed].tolist():
                assert score == pytest.approx(others.mean().item())
    # Nor by the penalties for its length and its missing end: compared with its group, it is the mean.
    assert rollout.tensors["advantages"][failed].abs().max() < 1e-5
    for group in set(rollout.groups):
        others = (groups == group) & ~failed
        assert rollout.tensors["advantages"][others, 0].sum().abs() < 1e-4
    (entry,) = history(trainer)
    assert entry["failure_rate"] == pytest.approx(failed.float().mean().item())


def presses(logs):
    """Number of calls that pressed a button, over all updates of 16 episodes."""
    return round(sum(16 * (entry["calls"] - entry["tool_errors"] - entry["malformed_calls"]) for entry in logs))


@pytest.mark.parametrize(("saves", "kept"), [("no", False), ("steps", False), ("never yet", True)])
def test_a_run_from_the_start_reads_no_episodes_of_an_older_run(make_trainer, tmp_path, saves, kept):
    """But a run that has not saved yet goes on from its journal."""
    folder = tmp_path / "run"
    older = folder / "episodes" / "000005-0123456789ab-0.jsonl"
    older.parent.mkdir(parents=True)
    older.write_text("{}\n")
    if saves == "steps":
        (folder / "checkpoint-1").mkdir()
    strategy = "no" if saves == "no" else "steps"
    make_trainer("grpo", folder=tmp_path, updates=1, save_strategy=strategy).train()
    assert older.exists() == kept


@pytest.mark.parametrize("environment", ["Buttons", "SavedButtons"])
@pytest.mark.parametrize("kind", EPISODE_METHODS)
def test_a_kill_in_the_middle_of_an_episode_changes_nothing(make_trainer, tmp_path, monkeypatch, kind, environment):
    fields = {"updates": 3, "save_strategy": "steps", "save_updates": 1}
    chosen = {"class": f"tests.support.environments.buttons:{environment}"}
    whole = make_trainer(kind, chosen, tmp_path / "whole", **fields)
    whole.train()

    poll, polls = LockstepSession.poll, []

    def dies(self, timeout=None):
        polls.append(None)
        # In the second update, when some episodes have a turn behind them.
        if len(polls) == 5:
            raise Killed
        return poll(self, timeout)

    with monkeypatch.context() as patched:
        patched.setattr(LockstepSession, "poll", dies)
        log = {"arguments": {"log": str(tmp_path / "log")}}
        killed = make_trainer(kind, chosen | log, tmp_path / "killed", **fields)
        with pytest.raises(Killed):
            killed.train()
    journals = list((tmp_path / "killed" / "run" / "episodes").glob("*.jsonl"))
    assert [path.name[:6] for path in journals] == ["000001"]  # that of the first update went with its checkpoint
    resumed = make_trainer(kind, chosen | log, tmp_path / "killed", **fields)
    checkpoint = last_checkpoint(Path(resumed.args.output_dir))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    (expected, expected_logs), (actual, logs) = outcome(whole), outcome(resumed)
    assert logs == expected_logs
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    if environment == "SavedButtons":
        # A tool of an environment with a state is called once for each call, however often the run is killed.
        assert len((tmp_path / "log").read_text().splitlines()) == presses(logs)


@pytest.mark.parametrize("kind", EPISODE_METHODS)
def test_episodes_that_all_fail_alike_end_the_run(make_trainer, kind):
    trainer = make_trainer(kind, {"class": "tests.support.environments.buttons:Broken"}, updates=3)
    with pytest.raises(UserError, match=r"update 1: all 16 episodes failed: .*no such machine"):
        trainer.train()
    assert history(trainer) == []
