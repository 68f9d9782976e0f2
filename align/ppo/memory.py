"""What ppo and its kind cost in memory, for each choice of tuning and critic, from the config alone. Torch-free.

A stage without a critic is one whose critic is a head, less that head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from align.models.architecture import Architecture
from align.models.memory import Choice, CriticKind, Estimate, engine_memory, engine_of, ppo_memory
from align.runtime import Runtime
from align.tuning import FullTuning, LoraTuning, TuningBase

if TYPE_CHECKING:
    from align.ppo.fields import RolloutFields


def estimate(config: RolloutFields, models: Mapping[str, Sequence[Architecture]], runtime: Runtime) -> Estimate:
    """Every tuning with every critic there can be; the chosen one is marked. ``models`` as for the config's ``memory``.

    The other tuning is LoRA with its default rank where full tuning is chosen.
    """
    policy, rewards = models["policy"][0], models.get("reward", ())
    engine, cache, lent = engine_memory(
        policy,
        runtime,
        precision=config.precision,
        sequences=config.rollout_batch,
        length=config.max_prompt_tokens + config.max_tokens,
    )
    full = config.tuning.trains_all
    tunings: tuple[TuningBase, ...] = (LoraTuning(), config.tuning) if full else (config.tuning, FullTuning())
    source = getattr(config, "critic_source", None)
    critics: tuple[CriticKind, ...] = ("reward", "policy", "head") if rewards else ("policy", "head")
    critics = ("head",) if source is None else critics
    choices = []
    for tuning in tunings:
        for critic in critics:
            memory = ppo_memory(
                policy,
                rewards,
                tuning=tuning,
                critic=critic,
                precision=config.precision,
            )
            memory = replace(memory, engine=engine, kv_cache=cache, lent=lent)
            if source is None:
                memory = replace(memory, critic=0)
            chosen = tuning == config.tuning and source in (None, critic)
            settings = {"tuning": tuning.label} | ({} if source is None else {"critic": critic})
            choices.append(Choice(settings, memory, chosen))
    return Estimate(policy.parameters, tuple(choices), tuple(_notes(config, runtime)))


def _notes(config: RolloutFields, runtime: Runtime) -> list[str]:
    name, gpu = engine_of(runtime)
    prompts = -(-config.micro_batch // config.samples_per_prompt)
    notes = [
        f"+: activations of a micro-batch, here {config.micro_batch} responses of up to {config.max_tokens} tokens "
        f"and {prompts} prompts.",
        "Not counted: Python and its libraries (about 0.6 GiB, 1.2 with vLLM), scratch space of kernels.",
    ]
    if runtime.engine.address is not None:
        notes.append("The engine is a server that runs already; its memory is not counted.")
    elif name != "transformers" and gpu:
        asleep = ", but asleep while the trainer learns" if name == "vllm" and runtime.engine.sleep else ""
        notes.append(
            f"vLLM takes {runtime.engine.gpu_memory:g} of the card (gpu_memory) for engine and cache, needed or "
            f"not{asleep}."
        )
    elif name == "transformers":
        notes.append("The cache is for prompts of max_prompt_tokens, the longest there can be.")
    if config.trainer.get("gradient_checkpointing"):
        notes.append("gradient_checkpointing: far fewer activations than counted here.")
    if config.trainer.get("reuse_forward"):
        share = config.trainer["reuse_forward"]
        notes.append(
            f"reuse_forward: activations of policy and critic together, and of {share:g} of an optimizer step's "
            "micro-batches at once."
        )
    if "optim" in config.trainer:
        notes.append(f"AdamW's state is counted; optim {config.trainer['optim']} may need another amount.")
    return notes
