"""The part of ``sample`` that plays episodes in an environment, scores them and pairs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from align.data.rows import Row, kept_columns
from align.environments.player import play_in_parts
from align.inference.engine import open_engine
from align.inference.protocol import RolloutEngine
from align.pipeline.context import StageContext
from align.scoring.score import WeightedSum
from align.stages.prompt_episodes import EpisodeParts, Policy, episode_rates, report_failures
from align.stages.prompt_responses import PromptResponses, pair_responses, score_all
from align.stages.sample_rollouts import SampledRollouts

COUNTS = ("prompts_too_few", "compared", "identical", "tied", "pairs", "flipped")
"""Counts of ``make_pairs`` that hold for episodes."""


@dataclass
class SampledSplit:
    """The stage's results for one split."""

    split: str
    lines: list[dict[str, Any]]
    """Lines of ``samples.jsonl``."""
    pairs: list[Row]
    metrics: dict[str, float]
    """Counts and rates, without the split's name."""


class LateEngine:
    """The engine of the stage's policy, opened when something is sampled: a stage that was complete needs none."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self._engine: RolloutEngine | None = None

    def open(self) -> RolloutEngine:
        """Return the engine."""
        if self._engine is None:
            context = self.context
            config = self.context.config
            context.phase("starting the engine")
            self._engine = open_engine(
                context.artifact("policy").model,
                context.runtime,
                precision=context.precision,
                max_length=config.max_prompt_tokens + config.max_tokens,
                seed=context.seed,
                warn=context.warn,
                on_hang=context.fail_at_once,
            )
        return self._engine

    def close(self) -> None:
        """Free the engine before scoring, which may load another model."""
        if self._engine is not None:
            self._engine.close()


def sample_episodes(
    context: StageContext, tokenizer: Any, scorer: WeightedSum | None, rows: dict[str, list[Row]]
) -> tuple[list[SampledSplit], dict[str, Any]]:
    """Play ``n`` episodes of each row, by split; return samples, pairs and counts, and the engine's name and speed.

    Raises ``UserError`` if the environment does not fit the policy, or if every episode fails.
    """
    config = context.config
    engine = LateEngine(context)
    total = config.n * sum(map(len, rows.values()))
    policy = Policy(tokenizer, context.artifact("policy").weights, engine.open, config.max_prompt_tokens)
    parts = EpisodeParts(context, policy, total)
    responses: dict[str, list[PromptResponses]] = {}
    try:
        for split, split_rows in rows.items():
            episodes = play_in_parts(parts.play_part, split, split_rows, config.n, context.seed)
            responses[split] = [
                PromptResponses.of_episodes(row, row_episodes, parts.tools)
                for row, row_episodes in zip(split_rows, episodes, strict=True)
            ]
        usage = parts.user_usage()
    finally:
        parts.close()
        engine.close()
    report_failures(
        context, [episode for prompts in responses.values() for prompt in prompts for episode in prompt.episodes]
    )
    for prompts in responses.values():
        score_all(prompts, scorer)
        if config.cut_off_score is not None:
            _score_cut_off(prompts, config.cut_off_score)
    rollouts = SampledRollouts(context, tokenizer)
    for split, prompts in responses.items():
        rollouts.write_episodes(split, prompts)
    results = [_result(context, split, prompts) for split, prompts in responses.items()]
    return results, {"engine": parts.engine_name, **parts.speed(), **usage}


def _score_cut_off(prompts: list[PromptResponses], score: float) -> None:
    """Give ``score`` to every episode that reached its maximum of tokens."""
    for prompt in prompts:
        prompt.scores = [
            score if episode.stop == "truncated" else value
            for episode, value in zip(prompt.episodes, prompt.scores, strict=True)
        ]


def _result(context: StageContext, split: str, prompts: list[PromptResponses]) -> SampledSplit:
    # Both answers of a pair must follow the same prompt.
    comparable = [prompt for prompt in prompts if prompt.begins_alike]
    if len(comparable) < len(prompts):
        context.warn(
            f"{len(prompts) - len(comparable)} of {len(prompts)} {split} prompts make no pair, because their episodes "
            "begin differently; let `reset` depend on the row only"
        )
    pairs, counts = _make_pairs(context, comparable)
    lines = [_line(prompt, split) for prompt in prompts]
    episodes = [episode for prompt in prompts for episode in prompt.episodes]
    metrics = {
        **counts,
        "prompts": len(prompts),
        "different_beginnings": len(prompts) - len(comparable),
        "failed_episodes": sum(episode.stop == "failed" for episode in episodes),
        **episode_rates(episodes),
    }
    return SampledSplit(split, lines, pairs, metrics)


def _line(prompt: PromptResponses, split: str) -> dict[str, Any]:
    columns = kept_columns(prompt.row)
    return prompt.to_json(split) | ({"row": columns} if columns else {})


def _make_pairs(context: StageContext, prompts: list[PromptResponses]) -> tuple[list[Row], dict[str, int]]:
    """Pair the whole episodes of each prompt; return the pairs and their counts."""
    config = context.config
    pairs: list[Row] = []
    counts = dict.fromkeys(COUNTS, 0)
    for prompt in prompts:
        scores = {place: prompt.score_of(place) for place in prompt.usable}
        prompt_pairs, prompt_counts = pair_responses(prompt, scores, config.pairs, context.seed, noise=config.noise)
        pairs += prompt_pairs
        counts = {name: count + prompt_counts[name] for name, count in counts.items()}
    return pairs, counts
