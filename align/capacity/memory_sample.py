"""What the stage ``sample`` asks of devices, from its config alone. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from align.capacity.inference import Inference, Lot, Rows, scored
from align.config.batch_sizes import SAMPLE_CHUNK
from align.models.architecture import Architecture

if TYPE_CHECKING:
    from align.config.stages.sample import SampleConfig


def inference(
    config: SampleConfig, models: Mapping[str, Sequence[Architecture]], rows: Mapping[str, Rows]
) -> Inference:
    """Both splits' prompts, ``n`` responses each, and a reward model's scores of them."""
    given = rows["prompts"]
    prompts = given.both(config.max_prompts.train, config.max_prompts.test)
    lot = Lot(
        who="policy",
        model=models["policy"][0],
        sequences=prompts * config.n,
        prompts=prompts,
        prompt=config.max_prompt_tokens,
        response=config.max_tokens,
        call=SAMPLE_CHUNK * config.n,
        cut=config.top_p < 1,
    )
    readings = [scored("reward", model, lot.sequences, lot.length) for model in models.get("reward", ())]
    notes = [] if config.score in (None, "gold") else [f"The time of {config.score}, which scores, is not counted."]
    return Inference(config.precision, (lot,), tuple(readings), "prompts", prompts, given.known, notes=tuple(notes))
