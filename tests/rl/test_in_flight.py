"""Weights that change between the turns of episodes: versions of tokens, metrics by version, resume, and refusals."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.environment import EnvironmentConfig
from align.config.tuning import LoraTuning
from align.environments.episode import Episode, PolicyTurn
from align.environments.player import EnvironmentPlayer, EpisodePlayer
from align.environments.sources import open_environment
from align.errors import UserError
from align.inference.servers.pool import PoolEngine
from align.inference.sessions import PoolSession
from align.inference.trainer_engine import RemoteRankEngine
from align.models.loading import load_policy, load_tokenizer
from align.rl import GrpoConfig, GRPOTrainer, PpoConfig
from align.rl.checkpoint import last_checkpoint
from align.rl.losses import importance_weights
from align.rl.metrics import Averages, add_staleness
from align.rl.prefetch import RolloutPrefetcher
from align.rl.prompts import Prompts
from align.rl.rollout import Rollout, make_rollout
from tests.support.environments.buttons import FORMAT, Buttons, make_presser
from tests.support.inference.model_server import ModelServer
from tests.support.inference.server_harness import served_at, wait_for
from tests.support.rl.arguments import settings
from tests.support.rl.runs import Killed
from tests.support.rl.trainers import make_engine, options_in

ROWS = [{"id": str(i), "prompt": [{"role": "user", "content": "go"}]} for i in range(8)]
CONTINUE: dict[str, Any] = {"in_flight": "continue", "max_staleness": 1}


# ---- tokens ----


def two_versions() -> Rollout:
    """Update 4's rollout of one episode: two tokens by the weights of update 2, two of a tool, one by those of 4."""
    prompts = Prompts.__new__(Prompts)
    prompts.rows, prompts.token_ids = [{"id": "0"}], [[1]]
    turns = [PolicyTurn([5, 6], [-1.0, -0.5], True, "a", 2), PolicyTurn([7], [-0.25], True, "b", 4)]
    rollout = make_rollout(prompts, [0], [[Episode([1], turns, [[8, 9]])]], 4, 3)
    rollout.tensors["logprobs"] = torch.tensor([[-0.8, -0.6, 0.0, 0.0, -0.25]])
    return rollout


def test_tokens_have_version_and_weight_of_their_turn() -> None:
    rollout = two_versions()
    mask = rollout.tensors["response_mask"]
    assert rollout.tensors["weights_update"][mask].tolist() == [2, 2, 4]
    assert rollout.staleness.tolist() == [2, 2, 0]
    weights = importance_weights(rollout.tensors["logprobs"], rollout.tensors["sampler_logprobs"], mask, 2.0)
    # e^(-0.8 + 1.0), e^(-0.6 + 0.5); the current weights' token has the same probability in both; tools' tokens have 1.
    assert weights[0].tolist() == pytest.approx([math.exp(0.2), math.exp(-0.1), 1, 1, 1])


def test_staleness_and_parity_gap_are_counted_by_version() -> None:
    averages = Averages()
    statistics = add_staleness(averages, two_versions())
    assert statistics == {"staleness": pytest.approx(4 / 3), "staleness_max": 2.0}
    # |-0.8 + 1.0| and |-0.6 + 0.5| by the old weights, nothing by the current ones: no sign that engine and trainer
    # hold different models.
    assert averages.means(lambda totals: totals) == pytest.approx(
        {"parity_gap_stale_0": 0.0, "parity_gap_stale_2": (0.2 + 0.1) / 2}
    )
    rollout = two_versions()
    rollout.tensors["weights_update"][:] = 3
    assert add_staleness(averages, rollout) == {"staleness": 1.0, "staleness_max": 1.0}
    assert averages.means(lambda totals: totals) == {}  # of one age: ``parity_gap`` says it all


def test_a_turn_without_a_version_has_that_of_its_rollout() -> None:
    """Journals and checkpoints of older versions of align have none."""
    stored = {"token_ids": [5], "logprobs": [-1.0], "finished": True, "text": ""}
    content = Episode([1], [PolicyTurn(**stored), PolicyTurn([6], [-1.0], True, "", 4)], [[8]]).to_json()
    del content["turns"][0]["weights_update"]
    prompts = Prompts.__new__(Prompts)
    prompts.rows, prompts.token_ids = [{"id": "0"}], [[1]]
    rollout = make_rollout(prompts, [0], [[Episode.from_json(content)]], 4, 3)
    assert rollout.tensors["weights_update"].tolist() == [[3, 3, 4]]


# ---- rollouts ahead ----


class Offering(PoolEngine):
    """Servers that take weights, which are numbers."""

    takes_folders = True

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def write_weights(self, weights: Any) -> int:
        return int(weights)

    def offer(self, version: int, update: int) -> None:
        self.events.append(("offer", update))

    def adopt(self, version: int) -> None:
        self.events.append(("adopt", version))


def tokens(update: int, weights_update: int) -> Rollout:
    tensors = {"response_mask": torch.ones(1, 1, dtype=torch.bool), "weights_update": torch.tensor([[weights_update]])}
    return Rollout(update, [], [], [], [], [""], tensors)


def test_weights_are_offered_at_once_and_saving_does_not_wait() -> None:
    engine, go = Offering(), threading.Event()

    def sample(update: int, weights_update: int) -> Rollout:
        engine.events.append(("sample", update))
        if update == 1:
            wait_for(lambda: ("offer", 1) in engine.events)
            go.wait(20)
        return tokens(update, weights_update)

    prefetcher = RolloutPrefetcher(engine, sample, 1, 3, "continue")
    try:
        prefetcher.set_weights(0, 0)  # type: ignore[arg-type]
        assert prefetcher.get(0) is not None
        wait_for(lambda: ("sample", 1) in engine.events)
        assert prefetcher.state_dict() == []  # what is being sampled is in its journal
        prefetcher.set_weights(1, 1)  # type: ignore[arg-type]
        assert engine.events[-2:] == [("sample", 1), ("offer", 1)]
        go.set()
        prefetcher.wait()
        assert engine.events[-1] == ("adopt", 1)
        assert [entry["update"] for entry in prefetcher.state_dict()] == [1]
        restored = RolloutPrefetcher(engine, sample, 1, 3, "continue")
        restored.load_state_dict(prefetcher.state_dict(), lambda update, responses, weights: tokens(update, weights))
        rollout = restored._rollouts[1].result()
        assert rollout is not None and rollout.staleness.tolist() == [1]
    finally:
        prefetcher.close()


@pytest.mark.parametrize(("age", "refused"), [(1, False), (2, True), (-1, True)])
def test_age_of_tokens_is_from_0_to_max_staleness(age: int, refused: bool) -> None:
    prefetcher = RolloutPrefetcher(Offering(), lambda update, _: tokens(update, update - age), 1, 3, "continue")
    try:
        prefetcher.set_weights(0, 0)  # type: ignore[arg-type]
        if refused:
            with pytest.raises(RuntimeError, match=f"weights that are {age} to {age} updates old, and max_staleness"):
                prefetcher.get(0)
        else:
            assert prefetcher.get(0) is not None
    finally:
        prefetcher.close()


def test_the_other_processes_of_a_stage_leave_it_to_the_first() -> None:
    prefetcher = RolloutPrefetcher(RemoteRankEngine(torch.float32), lambda *_: None, 1, 3, "continue")
    assert prefetcher.continuing_objection() is None
    for update in range(3):
        prefetcher.set_weights(update, [])
        assert prefetcher.get(update) is None
    assert prefetcher.state_dict() == []


# ---- a trainer and servers ----


@pytest.fixture(scope="module")
def presser(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_presser(tiny_model, tmp_path_factory.mktemp("presser"))


class Run:
    """A trainer of episodes at two servers. New weights come in the middle of every rollout but the first of all.

    They wait for some turns, and buttons answer when they were offered.
    """

    def __init__(self, presser: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.servers = [ModelServer(presser), ModelServer(presser)]
        addresses = [server.address for server in self.servers]
        self.pool = PoolEngine(served_at(presser, addresses, timeout=200, batch_size=8))
        self.player = make_player(presser)
        self.trainer = make_trainer(
            presser, folder, self.pool, self.player, updates=3, learning_rate=5e-3, save_strategy="steps", **CONTINUE
        )
        self.offered = self.playing = -1
        """Updates of the weights that were offered last, and of the rollout that is being played."""
        self.turns = 0
        """Turns of that rollout."""
        self.rollouts: list[Rollout] = []
        offer, compute, press = self.pool.offer, self.trainer.compute_advantages, Buttons._press
        sample, take_turns = self.trainer.prefetcher._sample, EpisodePlayer._take_turns

        def note_offer(version: int, update: int) -> None:
            if self.playing >= 0:
                wait_for(lambda: self.playing >= update and self.turns >= 4, 60)
            offer(version, update)
            self.offered = update

        def note_playing(update: int, weights_update: int) -> Rollout | None:
            self.playing, self.turns = update, 0
            return sample(update, weights_update)

        def press_late(buttons: Buttons, name: str) -> str:
            wait_for(lambda: self.offered >= self.playing, 60)
            return press(buttons, name)

        def note_turns(player: EpisodePlayer, responses: list[Any]) -> None:
            take_turns(player, responses)
            self.turns += len(responses)

        def note_rollout(rollout: Rollout) -> None:
            self.rollouts.append(rollout)
            compute(rollout)

        monkeypatch.setattr(self.pool, "offer", note_offer)
        monkeypatch.setattr(self.trainer.prefetcher, "_sample", note_playing)
        monkeypatch.setattr(self.trainer, "compute_advantages", note_rollout)
        monkeypatch.setattr(Buttons, "_press", press_late)
        monkeypatch.setattr(EpisodePlayer, "_take_turns", note_turns)

    def close(self) -> None:
        self.pool.close()
        self.player.close()
        for server in self.servers:
            server.stop()


def make_player(presser: Path) -> EnvironmentPlayer:
    config = EnvironmentConfig.model_validate(
        {
            "class": "tests.support.environments.buttons:Buttons",
            "tool_format": FORMAT,
            "max_turns": 3,
            "max_tokens": 40,
            "turn_max_tokens": 8,
        }
    )
    return EnvironmentPlayer(config, open_environment(config), load_tokenizer(presser), 64, "test")


def make_trainer(presser: Path, folder: Path, engine: Any, episodes: Any, **fields: Any) -> GRPOTrainer:
    options = options_in(folder) | {"rollout_batch": 16, "samples_per_prompt": 4, "max_tokens": 40}
    options |= {"per_device_train_batch_size": 4, "tuning": LoraTuning(rank=4, alpha=8)}
    torch.manual_seed(0)
    return GRPOTrainer(
        model=load_policy(presser),
        **settings(GrpoConfig, **(options | fields)),
        train_dataset=ROWS,
        processing_class=load_tokenizer(presser),
        scorer=None if episodes is not None else (lambda rows, texts: [0.0] * len(texts)),
        engine=engine,
        episodes=episodes,
    )


@pytest.fixture
def run(presser: Path, tmp_path: Path) -> Iterator[Any]:
    """Opens runs in one folder; buttons are as they were when the test ends."""
    runs: list[Run] = []
    with pytest.MonkeyPatch.context() as patched:

        def open_run() -> Run:
            patched.undo()
            runs.append(Run(presser, tmp_path, patched))
            return runs[-1]

        yield open_run
    for entry in runs:
        entry.close()


def check_versions(rollout: Rollout) -> None:
    """Tokens of the current weights have the trainer's probabilities, and versions of an episode never go back."""
    gap = (rollout.tensors["logprobs"] - rollout.tensors["sampler_logprobs"]).abs()[rollout.tensors["response_mask"]]
    assert gap[rollout.staleness == 0].max() < 1e-4
    for episode in rollout.episodes or []:
        updates = [turn.weights_update for turn in episode.turns]
        assert updates == sorted(updates), updates  # type: ignore[type-var]


def test_episodes_continue_with_newly_learned_weights(run: Any) -> None:
    """Also, the checkpoint of each update waits for no episode, or the run would never end."""
    first = run()
    first.trainer.train()
    assert len(first.rollouts) == 3
    assert set(first.rollouts[0].staleness.tolist()) == {0}
    for rollout in first.rollouts[1:]:
        assert set(rollout.staleness.tolist()) == {0, 1}
        check_versions(rollout)
    logs = [entry for entry in first.trainer.state.log_history if "score" in entry]
    assert [entry["staleness_max"] for entry in logs] == [0, 1, 1]
    for entry in logs[1:]:
        assert 0 < entry["staleness"] < 1
        assert entry["parity_gap_stale_0"] < 1e-4 < entry["parity_gap_stale_1"]


def test_turns_of_a_killed_run_keep_their_versions(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, poll, seen = run(), PoolSession.poll, []

    def die(session: PoolSession, timeout: float | None = None) -> Any:
        if len(seen) > 2:
            raise Killed  # what came before is in the journal
        turns = poll(session, timeout)
        seen.extend(response for _, response in turns if response.weights_update == 1)
        return turns

    with monkeypatch.context() as patched:
        patched.setattr(PoolSession, "poll", die)
        with pytest.raises(Killed):
            first.trainer.train()
    (journal,) = (tmp_path / "run" / "episodes").glob("000001-*.jsonl")
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    played = {
        (entry["episode"], entry["turn"]): PolicyTurn(**entry["entry"])
        for line in entries
        for entry in line.get("entries", [])
        if entry["kind"] == "turn"
    }
    assert {turn.weights_update for turn in played.values()} == {0, 1}
    second = run()
    checkpoint = last_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint.name == "checkpoint-1"
    second.trainer.train(resume_from_checkpoint=str(checkpoint))
    rollout = second.rollouts[0]
    assert rollout.update == 1 and rollout.episodes is not None
    for (episode, number), turn in played.items():
        assert rollout.episodes[episode].turns[number] == turn
    check_versions(second.rollouts[-1])
    assert len([entry for entry in second.trainer.state.log_history if "score" in entry]) == 3


def test_trainers_refuse_what_cannot_continue(presser: Path, tmp_path: Path) -> None:
    engine, player = make_engine(presser), make_player(presser)
    try:
        with pytest.raises(UserError, match="engine transformers samples in this process. Pass an engine of vLLM"):
            make_trainer(presser, tmp_path, engine, player, **CONTINUE)
        with pytest.raises(UserError, match=r"grpo: in_flight is continue.*one turn\. Pass `episodes`"):
            make_trainer(presser, tmp_path, engine, None, **CONTINUE)
    finally:
        player.close()
    options = options_in(tmp_path) | {"samples_per_prompt": 2, "per_device_train_batch_size": 4}
    with pytest.raises(ValueError, match="in_flight is continue, but max_staleness is 0"):
        settings(PpoConfig, **options, in_flight="continue")
    with pytest.raises(ValueError, match="in_flight\n  Input should be 'wait' or 'continue'"):
        settings(PpoConfig, **options, in_flight="go")
