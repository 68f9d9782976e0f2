"""Estimator of ``sample``: what the stage asks of devices, from its config alone. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from align.capacity.inference import (
    Inference,
    Rows,
    SamplingLoad,
    environment_notes,
    reward_scoring,
    user_load,
    user_of,
)
from align.config.batch_sizes import EPISODES_TOGETHER, SAMPLE_CHUNK
from align.config.scores import describe_score
from align.config.stages.sample import SampleConfig
from align.models.architecture import Architecture
from align.models.compute_types import resolved


def inference(
    config: SampleConfig, models: Mapping[str, Sequence[Architecture]], rows: Mapping[str, Rows]
) -> Inference:
    """Return the prompts of both splits, ``n`` responses to each, and a reward model's scores of them.

    An episode counts as one response of ``max_tokens``.
    """
    prompts = rows["prompts"].count_both(config.max_prompts.train, config.max_prompts.test)
    load = SamplingLoad(
        name="policy",
        model=models["policy"][0],
        sequences=prompts * config.n,
        prompts=prompts,
        prompt_tokens=config.max_prompt_tokens,
        response_tokens=config.max_tokens,
        call=SAMPLE_CHUNK * config.n if config.environment is None else EPISODES_TOGETHER,
        uses_top_p=config.top_p < 1,
        user=user_load(config.environment, user_of(models), config.max_prompt_tokens),
    )
    rewards = (*models.get("reward", ()), *models.get("score.reward", ()))
    scoring = [reward_scoring("reward", model, load.sequences, load.length) for model in rewards]
    notes = []
    if config.environment is not None:
        notes += environment_notes(config.environment)
    if config.score not in (None, "gold"):
        notes.append(f"The time of {describe_score(config.score)}, which scores, is not counted.")
    return Inference(
        precision=resolved(config.precision),
        sampling=(load,),
        scoring=tuple(scoring),
        row="prompts",
        rows=prompts,
        rows_are_known=rows["prompts"].is_known,
        notes=tuple(notes),
    )
