"""Memory of the kinds that train, counted from the config: with trl, or on rollouts. Never imports torch.

A stage on rollouts without a critic is counted as a stage with a value head, minus the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from align.capacity.memory import (
    ADAMW,
    LOGITS_AT_ONCE,
    Choice,
    CriticKind,
    Estimate,
    Memory,
    copied_parameters,
    engine_memory,
    engine_share,
    head_work_space,
    model_bytes,
    on_host,
    ppo_memory,
    resolve_engine,
    state_bytes,
    state_note,
)
from align.capacity.sampling import user_load, user_memory, user_of
from align.capacity.sharding import Job, Setting
from align.config.base import Precision
from align.config.runtime import HostPart, Runtime
from align.config.stages.rl import RolloutFields
from align.config.stages.training import TrainingFields
from align.config.tuning import FullTuning, LoraTuning, TuningBase
from align.models.compute.architecture import Architecture, UnknownArchitecture
from align.models.compute.costs import FLOAT, SHORT, SIZES, activations_per_token, passing_per_token, resolved

TRAINED_FIELDS = ("model", "policy", "student")
"""Input fields that name the trained checkpoint."""
SCORED_TOKENS = 4096
"""Padded tokens of a pass without gradients (``align.training.trainers.SCORING_TOKENS``)."""
TILE = (4096, 32768)
"""Tokens and words of the vocabulary whose logits trl's fused head has in memory at a time, on a GPU."""

Models = Mapping[str, Sequence[Architecture]]


def estimate(config: TrainingFields | RolloutFields, models: Models, runtime: Runtime) -> Estimate:
    """Return the memory of the configured choice, which is marked, and of others for comparison.

    A stage with trl is compared with full tuning and LoRA. A stage on rollouts is compared with every possible critic
    and one alternative tuning: LoRA with its default rank if full tuning is chosen, else full tuning.
    """
    if isinstance(config, RolloutFields):
        return _estimate_rollouts(config, models, runtime)
    others: tuple[TuningBase, ...] = (FullTuning(), LoraTuning())
    tunings = [config.tuning, *(other for other in others if other.method != config.tuning.method)]
    setting = Setting(
        config.micro_batch,
        accumulated=config.batch_size > config.micro_batch,
        checkpointing=config.recomputes,
        gpu=resolve_engine(runtime)[1],
    )
    choices = tuple(
        Choice({"tuning": tuning.label}, training_memory(config, models, tuning, setting), tuning is config.tuning)
        for tuning in tunings
    )
    return Estimate(trained_model(models).parameters, choices, (*_notes(config), state_note(choices, runtime)))


def job(config: TrainingFields | RolloutFields, models: Models, runtime: Runtime | None) -> Job:
    """Return the load of the stage; ``runtime`` is needed only for stages on rollouts."""
    if isinstance(config, RolloutFields):
        assert runtime is not None
        return _rollout_job(config, models, runtime)
    model = trained_model(models)
    tuning = config.tuning
    return Job(
        model=model,
        tuning=tuning,
        precision=resolved(config.precision),
        batch=config.batch_size,
        micro_batch=config.micro_batch,
        row="pairs" if config.sides == 2 else "rows",
        tokens=lambda count: rows_to_tokens(config, count),
        memory=lambda setting: training_memory(config, models, tuning, setting),
        objection=config.model_copy(update={"micro_batch_size": "auto"}).processes_objection,
        # If the losses of micro-batches do not add up, another size would be another training.
        unit=1 if config.rows_add_up else config.micro_batch,
        trained=training_memory(config, models, tuning, Setting(1)).gradients // FLOAT,
        gathered=model.parameters,
        checkpointing=config.recomputes,
        **_hosting(config, runtime),
        notes=tuple(_notes(config)[2:]),
    )


# ---- with trl ----


def trained_model(models: Models) -> Architecture:
    """Return the trained architecture; raise ``UnknownArchitecture`` if the config names none."""
    field = next((name for name in TRAINED_FIELDS if models.get(name)), None)
    if field is None:
        raise UnknownArchitecture("the config names no checkpoint that is trained")
    return models[field][0]


def training_memory(config: TrainingFields, models: Models, tuning: TuningBase, setting: Setting) -> Memory:
    """Return the memory of one process. A reward model has a score head instead of its vocabulary head."""
    model = trained_model(models)
    scores = not config.has_vocabulary
    precision = resolved(config.precision)
    # A reward model is loaded without the vocabulary's head.
    weights = model_bytes(model, tuning, precision, with_head=not scores)
    # ``added`` counts the parameters that are not the model's own: adapters and the score head.
    head = model.hidden if scores else 0
    if tuning.trains_all:
        added = head
        trained = (model.trunk if scores else model.parameters) + head
    else:
        added = trained = model.adapters(tuning, "trunk" if scores else "model") + head
    learned = rows_to_tokens(config, setting.rows)
    logits = 0 if scores else _learning_logits(model, learned, precision, tuning.trains_all, setting.gpu)
    state = state_bytes(config.trainer.get("optim"))
    # transformers has bitsandbytes keep the state of embeddings in 32 bits.
    wide = model.embedded if tuning.trains_all and state < ADAMW and "torch" not in config.trainer["optim"] else 0
    memory = Memory(
        weights=weights + FLOAT * added,
        gradients=FLOAT * trained,
        optimizer=round(state * (trained - wide)) + ADAMW * wide,
        reference=_other_models(config, models, trained),
        copies=_copies(model, tuning, precision, setting.checkpointing),
        logits=logits,
        scoring=_scoring(config, models, tuning, setting.gpu),
        # A reward model is read back to be checked, on a GPU after the trained one has left it. Folding has one matrix
        # in memory at a time.
        saving=FLOAT * model.trunk if scores and not setting.gpu else 0,
        activations=activations_per_token(
            model,
            tuning,
            precision,
            checkpointing=setting.checkpointing,
            flash=setting.gpu or config.max_length > SHORT,
            offload="activations" in setting.host,
        ),
        accumulated=setting.accumulated,
        in_heap=not setting.gpu,
    )
    return on_host(memory, setting.host)


def _copies(model: Architecture, tuning: TuningBase, precision: Precision, checkpointing: bool) -> int:
    """Return the bytes of autocast's bfloat16 copies of float32 matrices."""
    is_cast = precision == "bfloat16" and tuning.base_type(precision) == "float32" and tuning.method != "qlora"
    return 2 * copied_parameters(model, tuning, checkpointing) if is_cast else 0


def rows_to_tokens(config: TrainingFields, rows: int) -> int:
    """Return the tokens of ``rows`` rows of the greatest length; a pair has two texts."""
    return rows * config.sides * config.max_length


def _other_models(config: TrainingFields, models: Models, trained: int) -> int:
    """Return the bytes of a moving average, of an L2 anchor's start weights, and of a teacher that stays in memory."""
    copies = (config.ema is not None) + (config.anchor is not None and config.anchor.to == "l2")
    # With top_k the teacher's probabilities are computed beforehand, and the teacher is freed.
    teachers = models.get("teacher", ()) if getattr(config, "top_k", None) is None else ()
    return copies * FLOAT * trained + sum(FLOAT * teacher.parameters for teacher in teachers)


def _learning_logits(model: Architecture, tokens: int, precision: Precision, trained: bool, gpu: bool) -> int:
    """Return the work space of the head in its backward pass; all tokens are assumed to have a label.

    On a CPU it runs in blocks that stay in cache (``align.models.fast.token_logprobs``), on a GPU in trl's tiles.
    """
    states = FLOAT * tokens * model.hidden  # their gradients' float32 sum
    if not gpu:
        return head_work_space(model, trained, precision == "bfloat16", LOGITS_AT_ONCE["cpu"]) + states
    size = SIZES[precision]
    width = min(model.vocabulary, TILE[1])
    # A tile of logits becomes its own gradient in place.
    tile = min(tokens, TILE[0]) * width
    head_tile = width * model.hidden
    summed = states + (FLOAT * model.head if trained else 0)
    # Under autocast a tile has a bfloat16 copy of the head's part, and float32 copies while gradients are summed.
    copies = size * head_tile + FLOAT * (tile + head_tile) if precision == "bfloat16" else 0
    return size * tile + copies + summed


def _scoring(config: TrainingFields, models: Models, tuning: TuningBase, gpu: bool) -> int:
    """Return the work space of a pass over held-out rows: of the vocabulary's logits, or of one layer.

    A separate ``reference`` model is in memory while it scores the rows.
    """
    model = trained_model(models)
    size = SIZES[resolved(config.precision)]
    references = sum(FLOAT * reference.parameters for reference in models.get("reference", ()))
    tokens = min(SCORED_TOKENS, rows_to_tokens(config, config.eval_rows))
    layer = tokens * passing_per_token(model, size, size)
    if not config.has_vocabulary:
        return layer
    if gpu:
        logits = size * tokens * min(model.vocabulary, TILE[1])
    else:
        logits = head_work_space(model, False, resolved(config.precision) == "bfloat16", LOGITS_AT_ONCE["cpu"])
    return references + max(layer, logits + FLOAT * tokens * model.hidden)


def _notes(config: TrainingFields) -> list[str]:
    tuning = config.tuning
    notes = [
        f"+: activations of a micro-batch, here {config.micro_batch} rows of up to {config.max_length} tokens.",
        "Not counted: Python and its libraries (about 0.6 GiB).",
    ]
    if config.has_vocabulary:
        notes.append("Every token is assumed to have a label.")
    if isinstance(tuning, FullTuning) and (tuning.freeze or tuning.scheduled):
        notes.append(
            "freeze, unfreeze, lisa: an upper bound, since only trainable weights have gradients and AdamW's state."
        )
    return [*notes, *_optimizer_notes(config)]


def _hosting(config: TrainingFields | RolloutFields, runtime: Runtime | None, *, rests: bool = False) -> dict[str, Any]:
    """Return the fields of ``Job`` about the machine's memory; the base ``rests`` there while an engine samples."""
    optim = config.trainer.get("optim", "")
    is_paged = "paged" in optim
    possible: dict[HostPart, bool] = {
        "optimizer": is_paged or optim in ("adamw_8bit", "adamw_bnb_8bit"),
        "activations": True,
        "base": rests,
    }
    host: tuple[HostPart, ...] | None = ("optimizer",) if is_paged else None
    if runtime is not None and runtime.offload != "auto":
        host = tuple(part for part in possible if part in runtime.offload or (part == "optimizer" and is_paged))
    return {"host": host, "host_parts": tuple(part for part, can_go in possible.items() if can_go)}


def _optimizer_notes(config: TrainingFields | RolloutFields) -> list[str]:
    """Return a note on an optimizer without a rule; empty for AdamW."""
    optim = config.trainer.get("optim", "adamw")
    return [] if "adamw" in optim else [f"AdamW's state is counted; optim {optim} may need another amount."]


# ---- on rollouts ----


def _estimate_rollouts(config: RolloutFields, models: Models, runtime: Runtime) -> Estimate:
    policy = models["policy"][0]
    tunings: tuple[TuningBase, ...] = (config.tuning, FullTuning())
    if config.tuning.trains_all:
        tunings = (LoraTuning(), config.tuning)
    source = getattr(config, "critic_source", None)
    critics: tuple[CriticKind, ...] = ("reward", "policy", "head") if models.get("reward") else ("policy", "head")
    if source is None:
        # A kind without a critic has a single choice, and its critic counts as 0 below.
        critics = ("head",)
    setting = Setting(
        config.micro_batch,
        accumulated=config.responses_per_step > config.micro_batch,
        checkpointing=config.recomputes,
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
    return Estimate(policy.parameters, tuple(choices), (*_rollout_notes(config, runtime), state_note(choices, runtime)))


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
    policy = models["policy"][0]
    sequences = -(-config.rollout_batch // setting.processes)
    # The planned device may be another than this machine's.
    if setting.gpu != resolve_engine(runtime)[1]:
        runtime = runtime.model_copy(update={"device": "cuda" if setting.gpu else "cpu"})
    engine, cache, released = engine_memory(
        policy,
        runtime,
        precision=resolved(config.precision),
        # vLLM fills what is free on a GPU, and queues the sequences that do not fit.
        sequences=sequences if runtime.engine_name == "transformers" else min(sequences, setting.cached),
        length=config.max_prompt_tokens + config.max_tokens,
    )
    memory = ppo_memory(
        policy,
        _reward_models(models),
        tuning=tuning,
        critic=critic,
        precision=resolved(config.precision),
        checkpointing=setting.checkpointing,
        sequential=setting.processes == 1,
        gpu=setting.gpu,
        flash=setting.gpu or config.max_prompt_tokens + config.max_tokens > SHORT,
        state=state_bytes(config.trainer.get("optim")),
        offload="activations" in setting.host,
    )
    user = 0
    user_cache = 0
    load = user_load(config.environment, user_of(models), config.max_prompt_tokens)
    if load is not None:
        user, user_cache = user_memory(load, runtime, resolved(config.precision), sequences)
    memory = replace(
        memory,
        reward=memory.reward + user,
        engine=engine,
        kv_cache=cache + user_cache,
        released=released,
        accumulated=setting.accumulated,
        in_heap=not setting.gpu,
    )
    if getattr(config, "critic_source", None) is None:
        memory = replace(memory, critic=0)
    return on_host(memory, setting.host)


def _reward_models(models: Models) -> Sequence[Architecture]:
    """Return the models of ``reward``, the first of which may be the critic, and the models of ``score``."""
    return (*models.get("reward", ()), *models.get("score.reward", ()))


def _rollout_job(config: RolloutFields, models: Models, runtime: Runtime) -> Job:
    policy = models["policy"][0]
    rewards = _reward_models(models)
    tuning = config.tuning
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
        # The longest prompts and responses of a micro-batch; a prompt is read once for its responses.
        tokens=lambda count: -(-count // responses_per_prompt) * config.max_prompt_tokens + count * config.max_tokens,
        memory=lambda setting: rollout_memory(config, models, runtime, tuning=tuning, critic=critic, setting=setting),
        objection=config.model_copy(update={"micro_batch_size": "auto"}).processes_objection,
        unit=config.indivisible_responses,
        trained=memory.gradients // FLOAT + (memory.critic - memory.critic_state) // (2 * FLOAT),
        gathered=policy.parameters + (critic_base.trunk if critic_base is not None and tuning.trains_all else 0),
        checkpointing=config.recomputes,
        engine_share=_engine_share(runtime),
        # The base and an engine that sleeps take turns on one GPU.
        **_hosting(config, runtime, rests=runtime.engine_name == "vllm" and runtime.engine.sleep),
        notes=tuple(_rollout_notes(config, runtime)[2:]),
    )


def _engine_share(runtime: Runtime) -> float | None:
    """Return the share of a GPU that the settings give to vLLM in the stage's process; None for ``auto``."""
    share = runtime.engine.gpu_memory
    return None if share == "auto" or runtime.engine_name != "vllm" or runtime.rollouts.pooled else share


def _rollout_notes(config: RolloutFields, runtime: Runtime) -> list[str]:
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
        notes.append(f"vLLM uses {engine_share(runtime)} for engine and cache, needed or not{asleep}.")
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
    return [*notes, *_optimizer_notes(config)]
