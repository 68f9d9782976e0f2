"""Memory of a synthesize stage, counted from the config. Never imports torch.

Models that servers hold are named and not counted.
"""

from __future__ import annotations

from align.capacity.estimate_sampling import Models, reward_models, user_notes
from align.capacity.sampling import Inference, SamplingLoad, reward_scoring, user_load, user_of
from align.config.runtime.rollouts import EPISODES_TOGETHER, SYNTHESIS_CHUNK
from align.extensions.synthesis.config import InstructionsTask, SynthesizeConfig
from align.models.compute.costs import resolved


def inference(config: SynthesizeConfig, models: Models) -> Inference:
    """Return the answers, the reward models that score them, and the checkpoint that compares them."""
    call = SYNTHESIS_CHUNK if config.environment is None else EPISODES_TOGETHER
    if isinstance(config.task, InstructionsTask):
        call = min(SYNTHESIS_CHUNK, config.task.at_once)
    answering = [
        SamplingLoad(
            name="model",
            model=model,
            prompt_tokens=config.max_prompt_tokens,
            response_tokens=config.max_tokens,
            call=call,
            uses_top_p=config.top_p < 1,
            user=user_load(config.environment, user_of(models), config.max_prompt_tokens),
        )
        for model in models.get("model", ())
    ]
    judging = [
        SamplingLoad(
            name="judge",
            model=model,
            prompt_tokens=config.max_prompt_tokens,
            response_tokens=0 if config.judge is None else config.judge.max_tokens,
            call=SYNTHESIS_CHUNK,
            # A process of vLLM holds one architecture, so a judge of another architecture samples with transformers.
            needs_transformers=any(model != load.model for load in answering),
        )
        for model in models.get("judge_model", ())
    ]
    length = config.max_prompt_tokens + config.max_tokens
    duties = {"answers": config.endpoint, "judges": None if config.judge is None else config.judge.endpoint}
    servers = [f"{server.model}, a server, {duty}" for duty, server in duties.items() if server is not None]
    scoring = tuple(reward_scoring("reward", model, length) for model in reward_models(models))
    is_counted = bool(answering or judging or scoring)
    notes = [f"{server}; that is not counted." for server in servers if is_counted]
    return Inference(
        precision=resolved(config.precision),
        sampling=(*answering, *judging),
        scoring=scoring,
        external=", and ".join(servers),
        notes=(*user_notes(config.environment), *notes),
    )
