"""align's side of ``episodes``: its GRPO trainer on scripted episodes, set up as the ``grpo`` stage does.

    python -m benchmarks.episodes_align WORK OUT --method full [--engine auto]   (called by episodes)

Added is a script around the session that samples turns; everything else, the journal included, is the stage's own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from align.environments.episode import Episode
from align.environments.journal import Journal
from align.environments.player import EnvironmentPlayer, EpisodeTask, Progress
from align.inference.protocol import Response, Session, TurnRequest
from align.inference.sessions import open_session
from benchmarks.episodes_work import NO_MARKUP, EpisodeShape, Markup, Script, ScriptedTurn, load_tokenizer, read_work
from benchmarks.ppo_align import TUNINGS
from benchmarks.ppo_trl import LEARNING_RATE
from benchmarks.ppo_work import TRL_METHODS


class ScriptedSession:
    """A session whose turns have given lengths and endings; a ``Session``."""

    def __init__(self, session: Session, script: Script, tokenizer: Any, markup: Markup = NO_MARKUP) -> None:
        self.session, self.script, self.tokenizer, self.markup = session, script, tokenizer, markup
        self.is_lockstep = session.is_lockstep
        self._turns = [0] * len(script)
        """Turns of each episode that were asked for."""

    @property
    def pending(self) -> int:
        """Turns in flight."""
        return self.session.pending

    def submit(self, request: TurnRequest) -> None:
        """Submit a turn of the script's length. Raises ``RuntimeError`` where the episode has less room."""
        turn = self.script[request.key][self._turns[request.key]]
        self._turns[request.key] += 1
        if request.max_tokens < turn.length:
            raise RuntimeError(f"episode {request.key} has {request.max_tokens} tokens left of {turn.length}")
        self.session.submit(TurnRequest(request.key, request.prompt, turn.length, request.seed))

    def poll(self, timeout: float | None = None) -> list[tuple[int, Response]]:
        """Return finished turns, with the script's endings."""
        return [(key, self._complete(key, response)) for key, response in self.session.poll(timeout)]

    def _complete(self, key: int, response: Response) -> Response:
        turn: ScriptedTurn = self.script[key][self._turns[key] - 1]
        ids = turn.complete(response.token_ids, self.markup)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Response(ids, response.logprobs[: len(ids)], True, text)

    def cache_statistics(self) -> dict[str, float] | None:
        """Return the engine's."""
        return self.session.cache_statistics()

    def close(self) -> None:
        """Close the session."""
        self.session.close()


@contextmanager
def forced_lengths(engine: Any) -> Iterator[None]:
    """Have turns end at their limit alone: the end token is not sampled by vLLM, and ends nothing in transformers."""
    if engine.name != "vllm":
        end, engine.eos = engine.eos, -1
        try:
            yield
        finally:
            engine.eos = end
        return
    make_params = engine.sampling_params

    def forced(*arguments: Any) -> Any:
        params = make_params(*arguments)
        params.min_tokens = params.max_tokens
        return params

    engine.sampling_params = forced
    try:
        yield
    finally:
        engine.sampling_params = make_params


class ScriptedPlayer(EnvironmentPlayer):
    """Plays the episodes of one script after another."""

    def __init__(self, *arguments: Any, scripts: Sequence[Script]) -> None:
        super().__init__(*arguments)
        self._scripts, self._markup = iter(scripts), Markup.of(self.tokenizer)
        self.counts: list[dict[str, int]] = []
        """Tokens and calls of each update."""

    def play(
        self,
        engine: Any,
        tasks: Sequence[EpisodeTask],
        *,
        temperature: float,
        journal: Journal | None = None,
        on_progress: Progress | None = None,
        weights_update: int | None = None,
        thinking_budget: int | None = None,
    ) -> list[Episode]:
        """Return an episode for each task, in order. Raises ``RuntimeError`` for one that leaves the script."""
        assert thinking_budget is None, "scripted turns have no thoughts"
        script = next(self._scripts)
        with forced_lengths(engine):
            session = ScriptedSession(open_session(engine, temperature), script, self.tokenizer, self._markup)
            try:
                episodes = self.play_in(session, tasks, journal, on_progress, weights_update)
            finally:
                self.cache_statistics = session.cache_statistics()
                session.close()
        check_played(episodes, script)
        self.counts.append(count_tokens(episodes))
        return episodes


def check_played(episodes: Sequence[Episode], script: Script) -> None:
    """Raise ``RuntimeError`` for an episode with other turns than the script's, or a call that did not work."""
    for index, (episode, turns) in enumerate(zip(episodes, script, strict=True)):
        failure = episode.failure or next((call.result for call in episode.calls if call.error), "")
        if failure or len(episode.turns) != len(turns) or len(episode.calls) != len(turns) - 1:
            raise RuntimeError(
                f"episode {index} has {len(episode.turns)} turns and {len(episode.calls)} calls; the script has "
                f"{len(turns)} turns. {failure}"
            )


def count_tokens(episodes: Sequence[Episode]) -> dict[str, int]:
    """Return the tokens of prompts, those that were sampled, those between turns, and the calls."""
    sampled = sum(sum(episode.mask) for episode in episodes)
    return {
        "prompt_tokens": sum(len(episode.prompt_ids) for episode in episodes),
        "sampled_tokens": sampled,
        "tool_tokens": sum(episode.length for episode in episodes) - sampled,
        "calls": sum(len(episode.calls) for episode in episodes),
    }


def open_player(
    shape: EpisodeShape, tokenizer: Any, scripts: Sequence[Script], workers: int, isolation: str = "thread"
) -> ScriptedPlayer:
    """Return the player of the benchmark's environment."""
    from align.config.environment import EnvironmentConfig
    from align.environments.sources import open_environment

    config = EnvironmentConfig.model_validate(
        {
            "class": "benchmarks.episodes_work:ShelfEnvironment",
            "arguments": {"words": shape.result_words, "seconds": shape.tool_seconds},
            "max_turns": shape.turns,
            "max_tokens": shape.max_tokens,
            "workers": workers,
            "isolation": isolation,
        }
    )
    return ScriptedPlayer(config, open_environment(config), tokenizer, 1024, "benchmark", scripts=scripts)


def open_work_engine(work: dict[str, Any], engine: str, batch: int) -> Any:
    """Return an engine for the work's model."""
    from align.config.runtime import EngineConfig, Runtime
    from align.inference.engine import open_engine
    from align.models.compute.processes import use_threads

    runtime = Runtime(device="cpu", engine=EngineConfig(name=engine, batch_size=batch))  # type: ignore[arg-type]
    use_threads(runtime)
    shape: EpisodeShape = work["shape"]
    length = 1024 + shape.max_tokens
    return open_engine(work["model"], runtime, precision="bfloat16", max_length=length, seed=shape.seed, warn=print)


def make_trainer(work: dict[str, Any], options: argparse.Namespace, folder: str) -> Any:
    """Return the trainer of stage ``grpo``."""
    from align.models.loading import load_policy
    from align.rl import GrpoConfig, GRPOTrainer

    shape: EpisodeShape = work["shape"]
    tokenizer = load_tokenizer(work["model"])
    engine = open_work_engine(work, options.engine, batch=128)
    return GRPOTrainer(
        model=load_policy(work["model"]),
        config=GrpoConfig.for_trainer(
            updates=shape.updates,
            rollout_batch=shape.batch,
            samples_per_prompt=shape.samples,
            max_tokens=shape.max_tokens,
            micro_batch_size=shape.micro_batch,
            learning_rate=LEARNING_RATE[TRL_METHODS[options.method]],
            kl_coef=options.kl,
            precision="bfloat16",
            tuning=TUNINGS[options.method],
        ),
        options={
            "output_dir": folder,
            "reuse_forward": options.reuse_forward,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": shape.seed,
        },
        train_dataset=work["rows"],
        processing_class=tokenizer,
        scorer=None,
        engine=engine,
        episodes=open_player(shape, tokenizer, work["script"], options.workers),
    )


def measure(work: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Run all updates; return seconds and tokens of each, and the peak memory of this process in GiB."""
    import torch
    from transformers import TrainerCallback

    from align.rl.metrics import peak_memory_gib

    ends: list[float] = []
    logged: list[dict[str, float]] = []

    class Updates(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "score" in logs:
                ends.append(time.perf_counter())
                logged.append(logs)

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(work, options, folder)
        player = trainer.sampler.episodes
        trainer.add_callback(Updates())
        trainer.train()
        trainer.engine.close()
        player.close()
    updates = [
        {
            # trl brings new weights to its engine within its sampling.
            "sampling": logs["seconds_sync"] + logs["seconds_sampling"],
            **{phase: logs[f"seconds_{phase}"] for phase in ("scoring", "measuring", "learning")},
            "seconds": end - start,
            "prefix_hit_rate": logs.get("prefix_hit_rate"),
            "episodes": work["shape"].batch,
            **counts,
        }
        for logs, (start, end), counts in zip(logged, itertools.pairwise(ends), player.counts, strict=True)
    ]
    return {
        "updates": updates,
        "peak_gib": peak_memory_gib(),
        "engine": trainer.engine.name,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure, and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=TUNINGS, required=True)
    parser.add_argument("--engine", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--kl", type=float, default=0.04)
    parser.add_argument("--reuse-forward", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=16)
    options = parser.parse_args()
    results = measure(read_work(options.work), options)
    options.out.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
