"""Scored responses to the prompts of an update, sampled by all processes together."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.config.runtime.launch import rank
from align.environments.journal import Journal
from align.environments.player import EnvironmentPlayer, EpisodeTask, row_tasks
from align.errors import UserError
from align.inference.protocol import RolloutEngine, Sampling
from align.inference.thoughts import generate
from align.inference.trainer_engine import PROBE_TOKENS, Parity, ask_each, part_for, probe, returns
from align.models.compute.processes import all_gather
from align.rl.prompts import Prompts, derive_seed
from align.rl.rollout import STEP_REWARDS, Rollout, join_rollouts, make_rollout
from align.rl.scores import AnyScorer, add_environment_scores, as_scorer, place_steps, score_rollout
from align.store.fingerprint import digest

if TYPE_CHECKING:
    from align.rl.arguments import RolloutArguments

logger = logging.getLogger(__name__)

USER_FAILURE = "user:"
"""Beginning of the reason of an episode that failed in its simulated user."""


class RolloutSampler:
    """Samples and scores responses. Prompts and seeds depend only on the run's seed and the update.

    So a resumed run samples the same responses as an uninterrupted run, in any number of processes.
    """

    report_phase: Callable[[str], None] = staticmethod(lambda text: None)
    """Gets counts of this process's responses, such as ``sampling 32/64`` and ``validating 8/16``; a stage sets it."""

    def __init__(
        self,
        prompts: Prompts,
        engine: Any,
        scorer: AnyScorer | None,
        gold: AnyScorer | None,
        args: RolloutArguments,
        *,
        episodes: EnvironmentPlayer | None = None,
    ) -> None:
        """``episodes`` plays episodes in an environment instead of sampling single responses; it scores them, and
        ``scorer``, which may then be None, adds to that."""
        self.prompts = prompts
        self.engine = engine
        self.scorer = as_scorer(scorer)
        self.gold = as_scorer(gold)
        self.args = args
        self.config = args.config
        self.episodes = episodes

    def sample_local(self, update: int, weights_update: int) -> Rollout | None:
        """Return this process's part of an update's rollout, unscored; None if other processes sample all of it.

        ``weights_update`` is the update whose weights the engine has. Does not communicate with other processes, so it
        may run in a thread at any time.
        """
        numbers = self.prompt_range(update)
        indices = self.prompts.next(numbers, self.args.seed)
        seeds = [derive_seed(self.args.seed, "sampling", number) for number in numbers]
        return self._sample_part(update, indices, seeds, weights_update)

    def sample(self, update: int, indices: list[int], seeds: list[int]) -> Rollout:
        """Return scored responses to the prompts at ``indices``, with a seed for each; every process samples a part."""
        started = time.perf_counter()
        return self.gather_rollouts(self._sample_part(update, indices, seeds, update), started)

    def gather_rollouts(self, local: Rollout | None, started: float) -> Rollout:
        """Score this process's part and return the parts of all processes as one rollout, the same in each of them.

        ``started``: time (``perf_counter``) since which ``local`` was sampled or waited for.
        """
        sampled = time.perf_counter()
        # Score before gathering, so each process scores its part at the same time.
        if local is not None:
            self.report_phase(f"scoring {len(local)} responses")
            self.score(local)
        rollout = join_rollouts([part for part in all_gather(local) if part is not None])
        rollout.tensors["place"] = torch.arange(len(rollout))
        rollout.seconds = {"sampling": sampled - started, "scoring": time.perf_counter() - sampled}
        return rollout

    @property
    def cache_statistics(self) -> dict[str, float]:
        """Share of the prompt tokens of episodes' turns that the engine had in its prefix cache, if it reports them."""
        return {} if self.episodes is None else self.episodes.cache_statistics or {}

    def score(self, rollout: Rollout) -> None:
        """Add scores, and gold scores if there is a gold function."""
        # The order matters: the environment's scores are added to the scorer's.
        if self.scorer is not None:
            scored = score_rollout(rollout, self.scorer)
            if scored.steps is not None:
                rollout.tensors[STEP_REWARDS] = place_steps(rollout, scored.steps, self.prompts.reader.tokenizer)
            rollout.explanations = scored.explanations()
        if rollout.episodes is not None:
            add_environment_scores(rollout)
        if self.gold is not None:
            score_rollout(rollout, self.gold, "gold")

    def restore(self, update: int, responses: list[Any], weights_update: int) -> Rollout | None:
        """Return the rollout of an update from a checkpoint's responses; all of it belongs to the first process."""
        if rank() > 0:
            return None
        # The prompts follow from the update's number, so a checkpoint stores only the responses.
        numbers = self.prompt_range(update)
        indices = self.prompts.next(numbers, self.args.seed)
        return make_rollout(self.prompts, indices, responses, update, weights_update)

    def prompt_range(self, update: int) -> range:
        """Return the numbers of an update's prompts in the endless sequence of all updates' prompts."""
        count = self.config.prompts_per_update
        return range(update * count, (update + 1) * count)

    def answer(self, prompts: Prompts) -> Rollout:
        """Return one scored response to each of ``prompts``, sampled alike at every call; for validation."""
        local_range = part_for(self.engine, len(prompts))
        local = None
        if local_range:
            # The same at every call, in any number of processes: only the policy differs between two validations.
            seeds = [derive_seed(self.args.seed, "validation", index) for index in local_range]
            responses = self._respond(prompts, list(local_range), seeds, samples=1)
            local = make_rollout(prompts, list(local_range), responses, update=0)
            self.score(local)
        return join_rollouts([part for part in all_gather(local) if part is not None])

    def _sample_part(
        self, update: int, indices: list[int], seeds: Sequence[int], weights_update: int
    ) -> Rollout | None:
        # Of servers, the first process asks for all; an engine in each process gets its share of the prompts.
        local_range = part_for(self.engine, len(indices))
        if not local_range:
            return None
        part = slice(local_range.start, local_range.stop)
        local_indices = indices[part]
        samples = self.config.samples_per_prompt
        responses = self._respond(self.prompts, local_indices, seeds[part], samples, update, weights_update)
        count = sum(map(len, responses))
        expected = len(local_indices) * self.config.samples_per_prompt
        if count != expected:
            raise RuntimeError(f"engine {self.engine.name} returned {count} responses; expected {expected}")
        return make_rollout(self.prompts, local_indices, responses, update, weights_update)

    def _respond(
        self,
        prompts: Prompts,
        indices: list[int],
        seeds: Sequence[int],
        samples: int,
        update: int | None = None,
        weights_update: int | None = None,
    ) -> Sequence[Sequence[Any]]:
        """Return ``samples`` responses, or episodes, to each of the prompts at ``indices``.

        ``update``: the update whose rollout they belong to; None for a validation, which is not journaled.
        ``weights_update``: the update whose weights the engine has.
        """
        phase = "validating" if update is None else "sampling"

        def report_count(completed: int, total: int) -> None:
            self.report_phase(f"{phase} {completed}/{total}")

        if self.episodes is None:
            sampling = Sampling(
                max_tokens=self.config.max_tokens,
                temperature=self.config.temperature,
                n=samples,
                seeds=tuple(seeds),
                thinking_budget=self.config.thinking_budget,
            )
            token_ids = [prompts.token_ids[index] for index in indices]
            return generate(self.engine, prompts.reader, token_ids, sampling, report_count)
        tasks: list[EpisodeTask] = []
        for index, seed in zip(indices, seeds, strict=True):
            episode_seeds = [derive_seed(seed, "episode", sample) for sample in range(samples)]
            tasks += row_tasks(prompts.rows[index], episode_seeds)
        journal = None if update is None else self._journal(update, tasks)
        episodes = self.episodes.play(
            self.engine,
            tasks,
            temperature=self.config.temperature,
            journal=journal,
            on_progress=report_count,
            weights_update=weights_update,
            thinking_budget=self.config.thinking_budget,
        )
        # play() keeps the order of the tasks, so a prompt's episodes follow each other.
        return [episodes[start : start + samples] for start in range(0, len(episodes), samples)]

    def _journal(self, update: int, tasks: Sequence[EpisodeTask]) -> Journal:
        """Return the journal of an update's episodes. A journal of other episodes or settings is not read."""
        identity = digest(
            {
                "fingerprint": self.args.fingerprint(),
                "update": update,
                "tasks": [[task.row.get("prompt"), task.seed] for task in tasks],
            }
        )
        # An update may sample more than once, so each set of episodes has a separate file.
        name = f"{update:06d}-{identity[:12]}-{rank()}.jsonl"
        return Journal(journal_folder(self.args.output_dir) / name, identity)


def journal_folder(output_dir: Any) -> Path:
    """Return the folder of the journals of a run's episodes."""
    return Path(str(output_dir)) / "episodes"


def drop_journals(output_dir: Any, updates: float = math.inf) -> None:
    """Delete the journals of the first ``updates`` updates, by default of all, because they are no longer needed."""
    for path in journal_folder(output_dir).glob("*.jsonl"):
        if int(path.name.partition("-")[0]) < updates:
            path.unlink(missing_ok=True)


class ParityProbe:
    """Checks from time to time that the engine holds the trainer's weights, by comparing log-probabilities."""

    def __init__(self, engine: Any, prompts: Prompts, args: RolloutArguments) -> None:
        self.engine = engine
        self.prompts = prompts
        self.args = args
        self.config = args.config
        self.metrics: dict[str, float] = {}
        """``router_disagreement`` of the last probe of a mixture of experts, until it is logged."""
        self._has_run = False
        self._server_returns = 0
        """Times that a server had come back when the probe last ran."""

    def is_due(self, update: int) -> bool:
        """Return True at the start, every ``probe_updates``, and when a server came back since the last probe."""
        if not self.args.probe_parity:
            return False
        came_back = returns(self.engine) > self._server_returns
        return not self._has_run or update % self.config.probe_updates == 0 or came_back

    def run(self, policy: Any) -> None:
        """Compare on a few prompts. Raises ``ParityError`` if the engine holds another model than ``policy``."""

        def compare(engine: RolloutEngine) -> Parity:
            # A server refuses more tokens than the run's responses may have.
            max_tokens = min(PROBE_TOKENS, self.config.max_tokens)
            prompts = self.prompts.token_ids[:4]
            temperature = self.config.temperature
            return probe(engine, policy, prompts, temperature=temperature, max_tokens=max_tokens)

        # Read the count before the probe, so a server that comes back during it is probed next time.
        self._server_returns = returns(self.engine)
        for parity in ask_each(self.engine, compare):
            logger.info(
                "parity of %s and trainer: %.2g nats per token over %d tokens",
                self.engine.name,
                parity.mean_gap,
                parity.tokens,
            )
            if parity.router_disagreement is not None:
                self.metrics["router_disagreement"] = parity.router_disagreement
        self._has_run = True

    def pop_metrics(self) -> dict[str, float]:
        """Return the metrics of a probe that has run since the last call."""
        metrics = self.metrics
        self.metrics = {}
        return metrics


def require_some_episode(rollout: Rollout, stage: str) -> None:
    """Raise ``UserError`` if all episodes of a rollout failed for one reason: no later update would do better.

    Failures for several reasons raise the alarm *failures* instead. So do failures of a simulated user, whose server
    may be back in the next update.
    """
    failures = [episode.failure for episode in rollout.episodes or ()]
    is_outage = any(failure.startswith(USER_FAILURE) for failure in failures)
    if failures and all(failures) and len(set(failures)) == 1 and not is_outage:
        raise UserError(
            f"{stage}: update {rollout.update + 1}: all {len(failures)} episodes failed: {failures[0]}. Correct the "
            "environment; the last checkpoint is from before this update. `align rollout` plays single episodes."
        )
