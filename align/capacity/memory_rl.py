"""What ppo and its kind cost in memory and in work, for each tuning and critic, from the config alone. Torch-free.

A stage without a critic is one whose critic is a head, less that head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from align.capacity.job import Job, Setting, Work
from align.capacity.memory import Choice, CriticKind, Estimate, Memory, engine_memory, engine_of, ppo_memory
from align.config.runtime import Runtime
from align.config.tuning import FullTuning, LoraTuning, TuningBase
from align.models.activations import FLOAT, SHORT
from align.models.architecture import Architecture
from align.models.flops import forward_flops, learning_flops

if TYPE_CHECKING:
    from align.config.stages.rl import RolloutFields


Models = Mapping[str, Sequence[Architecture]]


def estimate(config: RolloutFields, models: Models, runtime: Runtime) -> Estimate:
    """Every tuning with every critic there can be; the chosen one is marked. ``models`` as for the config's ``memory``.

    The other tuning is LoRA with its default rank where full tuning is chosen.
    """
    policy, rewards = models["policy"][0], models.get("reward", ())
    full = config.tuning.trains_all
    tunings: tuple[TuningBase, ...] = (LoraTuning(), config.tuning) if full else (config.tuning, FullTuning())
    source = getattr(config, "critic_source", None)
    critics: tuple[CriticKind, ...] = ("reward", "policy", "head") if rewards else ("policy", "head")
    critics = ("head",) if source is None else critics
    setting = Setting(
        config.micro_batch,
        accumulated=_responses_a_step(config) > config.micro_batch,
        checkpointing=_checkpointing(config),
        gpu=engine_of(runtime)[1],
    )
    choices = []
    for tuning in tunings:
        for critic in critics:
            memory = rollout_memory(config, models, runtime, tuning, critic, setting)
            chosen = tuning == config.tuning and source in (None, critic)
            settings = {"tuning": tuning.label} | ({} if source is None else {"critic": critic})
            choices.append(Choice(settings, memory, chosen))
    return Estimate(policy.parameters, tuple(choices), tuple(_notes(config, runtime)))


def rollout_memory(
    config: RolloutFields, models: Models, runtime: Runtime, tuning: TuningBase, critic: CriticKind, setting: Setting
) -> Memory:
    """Of one process, its engine included; a rollout is shared out among the processes."""
    policy, rewards = models["policy"][0], models.get("reward", ())
    engine, cache, lent = engine_memory(
        policy,
        runtime if setting.gpu == engine_of(runtime)[1] else runtime.model_copy(update={"device": _kind(setting)}),
        precision=config.precision,
        sequences=-(-config.rollout_batch // setting.processes),
        length=config.max_prompt_tokens + config.max_tokens,
    )
    memory = ppo_memory(
        policy,
        rewards,
        tuning=tuning,
        critic=critic,
        precision=config.precision,
        checkpointing=setting.checkpointing,
        apart=setting.processes == 1,
        gpu=setting.gpu,
        flash=setting.gpu or config.max_prompt_tokens + config.max_tokens > SHORT,
    )
    memory = replace(memory, engine=engine, kv_cache=cache, lent=lent, accumulated=setting.accumulated)
    return replace(memory, critic=0) if getattr(config, "critic_source", None) is None else memory


def _kind(setting: Setting) -> str:
    return "cuda" if setting.gpu else "cpu"


def _checkpointing(config: RolloutFields) -> bool:
    return bool(config.trainer.get("gradient_checkpointing"))


def _responses_a_step(config: RolloutFields) -> int:
    return config.rollout_batch // config.samples_per_prompt * config.kept_per_prompt // config.num_mini_batches


def job(config: RolloutFields, models: Models, runtime: Runtime) -> Job:
    """What the stage asks of devices."""
    policy, rewards, tuning = models["policy"][0], models.get("reward", ()), config.tuning
    critic: CriticKind = getattr(config, "critic_source", None) or "head"
    beside = {"reward": rewards[0] if rewards else None, "policy": policy, "head": None}[critic]
    memory = rollout_memory(config, models, runtime, tuning, critic, Setting(1))
    kept = config.kept_per_prompt / config.samples_per_prompt
    shared = config.samples_per_prompt if config.trainer.get("share_prompts", True) else 1

    def work(share: float) -> Work:
        length = share * (config.max_prompt_tokens + config.max_tokens)
        sampled = share * config.max_tokens
        tokens = share * config.max_prompt_tokens / shared + sampled
        learned, measured = 0.0, forward_flops(policy, tokens, length, sampled)
        forward = measured
        for model, head in ((policy, sampled), (beside, 0.0)):
            if model is not None:
                learned += learning_flops(model, tuning, tokens, length, head)
                measured += forward_flops(model, tokens, length, head)
        measured += sum(forward_flops(reward, length, length) for reward in rewards)
        if not tuning.trains_all:  # the reference goes on from the policy's states below the first adapter
            measured -= forward_flops(policy, tokens, length) * (1 - policy.learning_layers(tuning) / policy.layers)
        again = forward + (0.0 if beside is None else forward_flops(beside, tokens, length))
        epochs = config.num_epochs * kept
        return Work(epochs * learned, epochs * again, measured, epochs * tokens, sampled)

    return Job(
        model=policy,
        tuning=tuning,
        precision=config.precision,
        batch=_responses_a_step(config),
        micro_batch=config.micro_batch,
        row="responses",
        tokens=lambda count: _tokens(config, count, shared),
        memory=lambda setting: rollout_memory(config, models, runtime, tuning, critic, setting),
        work=work,
        rows=lambda _: config.updates * config.rollout_batch,
        steps=lambda count: count // config.rollout_batch * config.num_epochs * config.num_mini_batches,
        rollout=config.rollout_batch,
        trained=memory.gradients // FLOAT + memory.critic // (4 * FLOAT),
        gathered=policy.parameters + (beside.trunk if beside is not None and tuning.trains_all else 0),
        checkpointing=_checkpointing(config),
        checkpointing_field="trainer.gradient_checkpointing",
        notes=tuple(_notes(config, runtime)[2:]),
    )


def _tokens(config: RolloutFields, responses: int, shared: int) -> int:
    """Of a micro-batch of the longest prompts and responses."""
    return -(-responses // shared) * config.max_prompt_tokens + responses * config.max_tokens


def _notes(config: RolloutFields, runtime: Runtime) -> list[str]:
    name, gpu = engine_of(runtime)
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
            f"vLLM takes {runtime.engine.gpu_memory:g} of the card (gpu_memory) for engine and cache, needed or "
            f"not{asleep}."
        )
    elif name == "transformers":
        notes.append("The cache is for prompts of max_prompt_tokens, the longest there can be.")
    if config.trainer.get("reuse_forward"):
        share = config.trainer["reuse_forward"]
        notes.append(
            f"reuse_forward: activations of policy and critic together, and of {share:g} of an optimizer step's "
            "micro-batches at once."
        )
    if "optim" in config.trainer:
        notes.append(f"AdamW's state is counted; optim {config.trainer['optim']} may need another amount.")
    return notes
