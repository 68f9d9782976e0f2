"""What the stage ``synthesize`` asks of devices of this pipeline, from its config alone. Torch-free.

What a server answers or judges is said in words, and not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from align.capacity.inference import Inference, Lot, Rows, scored
from align.config.batch_sizes import SYNTHESIS_CHUNK
from align.config.stages.synthesis_tasks import InstructionsTask
from align.models.architecture import Architecture

if TYPE_CHECKING:
    from align.config.stages.synthesize import SynthesizeConfig


def inference(
    config: SynthesizeConfig, models: Mapping[str, Sequence[Architecture]], rows: Mapping[str, Rows]
) -> Inference:
    """The answers, a reward model's scores of them, and a checkpoint's verdicts: two of every two answers."""
    task, given = config.task, rows.get("prompts", Rows(0, 0))
    if isinstance(task, InstructionsTask):
        prompts, samples, row = task.max_requests or task.count, 1, "requests"
        call = min(SYNTHESIS_CHUNK, task.at_once)
    else:
        prompts = given.both(config.max_prompts.train, config.max_prompts.test)
        samples, row, call = task.n, "prompts", SYNTHESIS_CHUNK
    lots, answers = [], prompts * samples
    made = models.get("model", ())
    for model in made:
        lots.append(
            Lot("model", model, answers, prompts, config.max_prompt_tokens, config.max_tokens, call, config.top_p < 1)
        )
    for model in models.get("judge_model", ()):
        assert config.judge is not None
        asked = answers * (samples - 1)  # every two answers of a prompt, in both orders
        other = any(model != one for one in made)  # vLLM's process holds one architecture
        lots.append(
            Lot(
                "judge",
                model,
                asked,
                asked,
                config.max_prompt_tokens,
                config.judge.max_tokens,
                SYNTHESIS_CHUNK,
                plain=other,
            )
        )
    length = config.max_prompt_tokens + config.max_tokens
    readings = tuple(scored("reward", model, answers, length) for model in models.get("reward", ()))
    judge = None if config.judge is None else config.judge.endpoint
    servers = (("answers", config.endpoint), ("judges", judge))
    named = [f"{one.model}, a server, {does}" for does, one in servers if one is not None]
    counted = bool(lots or readings)
    return Inference(
        config.precision,
        tuple(lots),
        readings,
        row,
        prompts,
        given.known or isinstance(task, InstructionsTask),
        elsewhere=", and ".join(named),
        partly=bool(named),
        notes=tuple(f"{one}; that is not counted." for one in named if counted),
    )
