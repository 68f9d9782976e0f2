"""Estimator of ``synthesize``: what the stage asks of this pipeline's devices, from its config alone. Torch-free.

Answers and judgments of a server are named, and not counted.
"""

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
from align.config.batch_sizes import EPISODES_TOGETHER, SYNTHESIS_CHUNK
from align.config.stages.synthesis_tasks import InstructionsTask
from align.config.stages.synthesize import SynthesizeConfig
from align.models.architecture import Architecture
from align.models.compute_types import resolved


def inference(
    config: SynthesizeConfig, models: Mapping[str, Sequence[Architecture]], rows: Mapping[str, Rows]
) -> Inference:
    """Return the answers, a reward model's scores of them, and a checkpoint's judgments of every two answers."""
    task, data = config.task, rows.get("prompts", Rows(0, 0))
    if isinstance(task, InstructionsTask):
        prompts, samples, row = task.max_requests or task.count, 1, "requests"
        call, rows_are_known = min(SYNTHESIS_CHUNK, task.at_once), True
    else:
        prompts = data.count_both(config.max_prompts.train, config.max_prompts.test)
        samples, row = task.n, "prompts"
        call = SYNTHESIS_CHUNK if config.environment is None else EPISODES_TOGETHER
        rows_are_known = data.is_known
    answers = prompts * samples
    answering = [
        SamplingLoad(
            name="model",
            model=model,
            sequences=answers,
            prompts=prompts,
            prompt_tokens=config.max_prompt_tokens,
            response_tokens=config.max_tokens,
            call=call,
            uses_top_p=config.top_p < 1,
            user=user_load(config.environment, user_of(models), config.max_prompt_tokens),
        )
        for model in models.get("model", ())
    ]
    # Every two of n answers in both orders: n (n - 1) judgments a prompt.
    judging = [_judging(config, model, answers * (samples - 1), answering) for model in models.get("judge_model", ())]
    length = config.max_prompt_tokens + config.max_tokens
    rewards = (*models.get("reward", ()), *models.get("score.reward", ()))
    scoring = tuple(reward_scoring("reward", model, answers, length) for model in rewards)
    servers = _servers(config)
    notes = [] if config.environment is None else environment_notes(config.environment)
    is_counted = bool(answering or judging or scoring)
    return Inference(
        precision=resolved(config.precision),
        sampling=(*answering, *judging),
        scoring=scoring,
        row=row,
        rows=prompts,
        rows_are_known=rows_are_known,
        external=", and ".join(servers),
        is_partial=bool(servers),
        notes=(*notes, *(f"{server}; that is not counted." for server in servers if is_counted)),
    )


def _judging(
    config: SynthesizeConfig, model: Architecture, judgments: int, answering: Sequence[SamplingLoad]
) -> SamplingLoad:
    """Return the judgments of every two answers to a prompt, in both orders."""
    assert config.judge is not None
    return SamplingLoad(
        name="judge",
        model=model,
        sequences=judgments,
        prompts=judgments,
        prompt_tokens=config.max_prompt_tokens,
        response_tokens=config.judge.max_tokens,
        call=SYNTHESIS_CHUNK,
        # one process of vLLM holds one architecture, so a judge of another one samples with transformers
        needs_transformers=any(model != load.model for load in answering),
    )


def _servers(config: SynthesizeConfig) -> list[str]:
    """Return what servers do for the stage, in words."""
    judge = None if config.judge is None else config.judge.endpoint
    duties = (("answers", config.endpoint), ("judges", judge))
    return [f"{endpoint.model}, a server, {duty}" for duty, endpoint in duties if endpoint is not None]
