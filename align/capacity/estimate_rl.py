"""Memory of ppo, grpo, rloo, online_dpo and rejection, counted from the config. Never imports torch.

A stage without a critic is counted as a stage with a value head, minus the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from align.capacity.memory import (
    Choice,
    CriticKind,
    Estimate,
    Memory,
    engine_memory,
    ppo_memory,
    resolve_engine,
    state_note,
)
from align.capacity.sampling_ways import user_load, user_memory, user_of
from align.capacity.sharding import Job, Setting
from align.config.runtime import Runtime
from align.config.stages.rl import RolloutFields
from align.config.tuning import FullTuning, LoraTuning, TuningBase
from align.models.compute.architecture import Architecture
from align.models.compute.compute_types import resolved
from align.models.compute.estimates import FLOAT, SHORT

Models = Mapping[str, Sequence[Architecture]]


def estimate(config: RolloutFields, models: Models, runtime: Runtime) -> Estimate:
    """Return the memory of every tuning with every possible critic; the configured one is marked.

    The alternative tuning is LoRA with its default rank if full tuning is chosen, else full tuning.
    """
    policy, rewards = models["policy"][0], models.get("reward", ())
    tunings: tuple[TuningBase, ...] = (config.tuning, FullTuning())
    if config.tuning.trains_all:
        tunings = (LoraTuning(), config.tuning)
    source = getattr(config, "critic_source", None)
    critics: tuple[CriticKind, ...] = ("reward", "policy", "head") if rewards else ("policy", "head")
    if source is None:
        # A kind without a critic has a single choice, and its critic counts as 0 below.
        critics = ("head",)
    setting = Setting(
        config.micro_batch,
        accumulated=config.responses_per_step > config.micro_batch,
        checkpointing=_checkpointing(config),
        gpu=resolve_engine(runtime)[1],
    )
    choices = []
    for tuning in tunings:
        for critic in critics:
            memory = rollout_memory(config, models, runtime, tuning=tuning, critic=critic, setting=setting)
            chosen = tuning == config.tuning and source in (None, critic)
            settings = {"tuning": tuning.label}
            if source is not None:
                settings["critic"] = critic
            choices.append(Choice(settings, memory, chosen))
    return Estimate(policy.parameters, tuple(choices), (*_notes(config, runtime), state_note(choices, runtime)))


def rollout_memory(
    config: RolloutFields,
    models: Models,
    runtime: Runtime,
    *,
    tuning: TuningBase,
    critic: CriticKind,
    setting: Setting,
) -> Memory:
    """Return the memory of one process with its engine, trained with ``tuning``, ``critic`` and ``setting``.

    A rollout is divided among the processes.
    """
    policy, rewards = models["policy"][0], _reward_models(models)
    # The planned device may be another than this machine's.
    if setting.gpu != resolve_engine(runtime)[1]:
        runtime = runtime.model_copy(update={"device": "cuda" if setting.gpu else "cpu"})
    engine, cache, released = engine_memory(
        policy,
        runtime,
        precision=resolved(config.precision),
        sequences=-(-config.rollout_batch // setting.processes),
        length=config.max_prompt_tokens + config.max_tokens,
    )
    memory = ppo_memory(
        policy,
        rewards,
        tuning=tuning,
        critic=critic,
        precision=resolved(config.precision),
        checkpointing=setting.checkpointing,
        sequential=setting.processes == 1,
        gpu=setting.gpu,
        flash=setting.gpu or config.max_prompt_tokens + config.max_tokens > SHORT,
    )
    user, user_cache = _user_memory(config, models, runtime, setting)
    memory = replace(
        memory,
        reward=memory.reward + user,
        engine=engine,
        kv_cache=cache + user_cache,
        released=released,
        accumulated=setting.accumulated,
        in_heap=not setting.gpu,
    )
    return replace(memory, critic=0) if getattr(config, "critic_source", None) is None else memory


def _user_memory(config: RolloutFields, models: Models, runtime: Runtime, setting: Setting) -> tuple[int, int]:
    """Return the bytes of the checkpoint that plays the user, and of its key-value cache; 0 without one."""
    user = user_load(config.environment, user_of(models), config.max_prompt_tokens)
    if user is None:
        return 0, 0
    return user_memory(user, runtime, resolved(config.precision), -(-config.rollout_batch // setting.processes))


def _checkpointing(config: RolloutFields) -> bool:
    return bool(config.trainer.get("gradient_checkpointing"))


def _reward_models(models: Models) -> Sequence[Architecture]:
    """Return the models of ``reward``, the first of which may be the critic, and the models of ``score``."""
    return (*models.get("reward", ()), *models.get("score.reward", ()))


def job(config: RolloutFields, models: Models, runtime: Runtime) -> Job:
    """Return the load of the stage."""
    policy, rewards, tuning = models["policy"][0], _reward_models(models), config.tuning
    critic: CriticKind = getattr(config, "critic_source", None) or "head"
    critic_base = {"reward": rewards[0] if rewards else None, "policy": policy, "head": None}[critic]
    memory = rollout_memory(config, models, runtime, tuning=tuning, critic=critic, setting=Setting(1))
    responses_per_prompt = config.samples_per_prompt if config.trainer.get("share_prompts", True) else 1

    return Job(
        model=policy,
        tuning=tuning,
        precision=resolved(config.precision),
        batch=config.responses_per_step,
        micro_batch=config.micro_batch,
        row="responses",
        tokens=lambda count: _micro_batch_tokens(config, count, responses_per_prompt),
        memory=lambda setting: rollout_memory(config, models, runtime, tuning=tuning, critic=critic, setting=setting),
        run_micro_batch=config.micro_batch_of,
        objection=config.model_copy(update={"micro_batch_size": None}).processes_objection,
        unit=config.indivisible_responses,
        trained=memory.gradients // FLOAT + memory.critic // (4 * FLOAT),
        gathered=policy.parameters + (critic_base.trunk if critic_base is not None and tuning.trains_all else 0),
        checkpointing=_checkpointing(config),
        checkpointing_field="trainer.gradient_checkpointing",
        notes=tuple(_notes(config, runtime)[2:]),
    )


def _micro_batch_tokens(config: RolloutFields, responses: int, responses_per_prompt: int) -> int:
    """Return the tokens of a micro-batch of the longest prompts and responses."""
    return -(-responses // responses_per_prompt) * config.max_prompt_tokens + responses * config.max_tokens


def _notes(config: RolloutFields, runtime: Runtime) -> list[str]:
    name, gpu = resolve_engine(runtime)
    prompts = -(-config.micro_batch // config.samples_per_prompt)
    notes = [
        f"+: activations of a micro-batch, here {config.micro_batch} responses of up to {config.max_tokens} tokens "
        f"and {prompts} prompts.",
        "Not counted: Python and its libraries (about 0.6 GiB, 1.2 with vLLM), scratch space of kernels.",
    ]
    if runtime.rollouts.addresses:
        notes.append("Servers that run already sample; their memory is not counted.")
    elif name != "transformers" and gpu:
        asleep = ", but asleep while the trainer learns" if name == "vllm" and runtime.engine.sleep else ""
        notes.append(
            f"vLLM uses {runtime.engine.gpu_memory:g} of the card (gpu_memory) for engine and cache, needed or "
            f"not{asleep}."
        )
    elif name == "transformers":
        notes.append("The cache is for prompts of max_prompt_tokens, the longest possible.")
    if config.trainer.get("reuse_forward"):
        share = config.trainer["reuse_forward"]
        notes.append(
            f"reuse_forward: activations of policy and critic together, and of {share:g} of an optimizer step's "
            "micro-batches at once."
        )
    if config.environment is not None and config.environment.user is not None:
        user = config.environment.user
        counted = "is counted with the reward models" if user.model else "is not counted"
        notes.append(f"{user.label}, which plays the user, {counted}.")
    if "optim" in config.trainer:
        notes.append(f"AdamW's state is counted; optim {config.trainer['optim']} may need another amount.")
    return notes
