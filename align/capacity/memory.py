"""Memory of training in bytes, counted from the models' sizes and not measured. Torch-free.

``align plan --memory``, ``align plan --hardware`` and the notice before a stage's first step all use it. A trained
parameter needs 16 bytes: weight, gradient and AdamW's state in float32. Frozen matrices, of a base below adapters, a
reference or a reward model, are in bfloat16 if that is the ``precision`` (``align.models.compute.precision``).

Excluded: the interpreter and its libraries, and what a GPU's allocator keeps for itself. ``align.capacity.sharding``
divides the parts among devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from align.config.base import Precision
from align.config.runtime import HostPart, Runtime
from align.config.stages.continue_from import LARGEST_STATE, size_text
from align.config.tuning import LowRank, QloraTuning, TuningBase
from align.models.compute.architecture import Architecture
from align.models.compute.costs import FLOAT, SIZES, activations_per_token

ADAMW = 2 * FLOAT
"""Bytes of AdamW's two averages of a trained parameter."""
BLOCK_STATES = {"8bit": 2 * (1 + FLOAT / 256), "4bit": 2 * (1 / 2 + FLOAT / 128)}
"""The same in 8 bits (bitsandbytes, torchao) and in 4 bits (torchao), with a scale for every 256 or 128 numbers."""
CACHED_SEQUENCES = 16
"""Sequences of the greatest length for which the plan leaves room in vLLM's cache on a GPU; vLLM queues the others."""
HEAP_BYTES = 100 * 2**20
HEAP_SHARE = 0.06
"""Bytes of rows, tokenizer and buffers of a process on a CPU, and the share of all memory that is in gaps between the
blocks of C's heap, whose pages are of 2 MiB. Fitted to ``benchmarks.memory_plan``: 20 stages of SmolLM2-135M."""
LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**24}
"""Logits of a block (``align.models.fast.token_logprobs.LOGITS``)."""

CriticKind = Literal["reward", "policy", "head"]
Released = Literal["nothing", "cache", "all"]


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by purpose."""

    weights: int
    """The policy's weights, adapters included."""
    gradients: int
    """The policy's gradients, from the first micro-batch of an optimizer step to its end."""
    optimizer: int
    """AdamW's state for the policy."""
    reference: int = 0
    """Models other than the trained model: a reference, a teacher, averages of weights, a critic's frozen matrices."""
    critic: int = 0
    """Weights, gradients and AdamW's state of what only the critic trains: ``2 * FLOAT + state`` bytes a parameter."""
    state: float = ADAMW
    """Bytes of the optimizer's state of a trained parameter."""
    base: int = 0
    """Bytes of ``weights`` that never change, so that they can leave the device while an engine samples."""
    rests: bool = False
    """True if ``base`` and ``reference`` are in the machine's memory while an engine samples."""
    reward: int = 0
    """Frozen models that only read or answer: reward models, and the model that plays the user of an environment."""
    copies: int = 0
    """Autocast's bfloat16 copies of float32 matrices, kept from a forward pass to its backward pass."""
    logits: int = 0
    """Logits of a chunk of tokens, tensors computed from them, and the head's gradient while it is accumulated."""
    scoring: int = 0
    """Work space of passes without gradients over held-out rows."""
    engine: int = 0
    """The rollout engine's weights."""
    kv_cache: int = 0
    """Keys and values of sampled sequences."""
    released: Released = "cache"
    """Memory that the engine releases while the trainer trains."""
    activations: int | None = None
    """Activations per token of a micro-batch; policy and critic train one after the other. None without a rule."""
    saving: int = 0
    """Bytes that saving needs in addition to the model: a reward model read back to be checked."""
    accumulated: bool = True
    """True if an earlier micro-batch's gradients are in memory during the next one's passes."""
    buffers: int = 0
    """Buffers in which devices exchange gradients and weights."""
    in_heap: bool = False
    """True on a CPU, where all of it is in C's heap."""

    @property
    def total(self) -> int:
        """Peak bytes without activations."""
        return self.peak(0)

    @property
    def heap(self) -> int:
        """Bytes of a CPU process's heap that no other part counts, without activations; 0 on a GPU."""
        return self.fullest(0).get("heap", 0)

    @property
    def per_token(self) -> float | None:
        """Bytes for each token of a micro-batch, the heap's share included; None without a rule."""
        share = 1 + HEAP_SHARE if self.in_heap else 1.0
        return None if self.activations is None else share * self.activations

    def peak(self, tokens: int) -> int:
        """Return the peak in bytes with micro-batches of ``tokens`` tokens; without activations if these are None."""
        return sum(self.fullest(tokens).values())

    def fullest(self, tokens: int) -> dict[str, int]:
        """Return the bytes of the fullest phase, by purpose."""
        return max(self.phases(tokens).values(), key=lambda parts: sum(parts.values()))

    def phases(self, tokens: int) -> dict[str, dict[str, int]]:
        """Return the bytes by purpose while a stage samples, trains, steps the optimizer, scores rows and saves."""
        # Phases follow each other and share what lasts; the peak is the fullest phase, not the sum of all.
        lasting = {name: getattr(self, name) for name in ("weights", "optimizer", "reference", "critic", "reward")}
        lasting["buffers"] = self.buffers
        engine = {"engine": self.engine, "kv_cache": self.kv_cache}
        # what remains of the engine while the trainer trains
        remaining = {
            "nothing": engine,
            "cache": {"engine": self.engine, "kv_cache": 0},
            "all": {"engine": 0, "kv_cache": 0},
        }[self.released]
        asleep = lasting | remaining
        learning = {"activations": tokens * (self.activations or 0), "copies": self.copies, "logits": self.logits}
        if self.accumulated:
            # a single micro-batch frees its activations while its gradients appear, so only earlier gradients count
            learning["gradients"] = self.gradients
        resting = {"weights": self.weights - self.base, "reference": 0} if self.rests else {}
        phases = {
            "sampling": lasting | resting | engine,
            "learning": asleep | learning,
            "stepping": asleep | {"gradients": self.gradients},
            "scoring": asleep | {"logits": self.scoring},
            "saving": asleep | {"saving": self.saving},
        }
        if self.in_heap:
            for parts in phases.values():
                parts["heap"] = HEAP_BYTES + int(HEAP_SHARE * sum(parts.values()))
        return phases

    @property
    def critic_state(self) -> int:
        """Bytes of the optimizer's state in ``critic``."""
        return round(self.critic * self.state / (2 * FLOAT + self.state))


def on_host(memory: Memory, parts: Sequence[HostPart]) -> Memory:
    """Return the memory of a process that keeps ``parts`` in the machine's memory, the activations not counted."""
    if "optimizer" in parts:
        memory = replace(memory, optimizer=0, critic=memory.critic - memory.critic_state, state=0.0)
    return replace(memory, rests="base" in parts)


def state_bytes(optim: str | None) -> float:
    """Return the bytes of the optimizer's state for a trained parameter, by transformers' name of the optimizer.

    Another optimizer counts as AdamW.
    """
    name = optim or ""
    return next((size for bits, size in BLOCK_STATES.items() if "adamw" in name and bits in name), ADAMW)


@dataclass(frozen=True)
class Choice:
    """Memory of one choice of settings, which are named as the config names them."""

    settings: dict[str, str]
    memory: Memory
    chosen: bool


def state_note(choices: Sequence[Choice], runtime: Runtime) -> str:
    """Return a sentence about the trainer's state of the chosen settings on disk, and whether it is kept."""
    memory = next(choice.memory for choice in choices if choice.chosen)
    # Weights and the optimizer's state are stored, gradients are not.
    critic_weights = (memory.critic - memory.critic_state) // 2
    size = memory.gradients + memory.optimizer + critic_weights + memory.critic_state
    keep = runtime.keep_state
    is_kept = size <= LARGEST_STATE if keep == "auto" else keep
    outcome = "kept with the result, for continue_from" if is_kept else "not kept with the result"
    return f"On disk, a checkpoint's state takes about {size_text(size)}; it is {outcome} (runtime.keep_state: {keep})."


@dataclass(frozen=True)
class Estimate:
    """Memory of a stage's choices; ``notes`` explain the numbers, one sentence each."""

    parameters: int
    """Parameters of the trained model."""
    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return every choice in bytes and words, with its heap and total."""
        choices = [asdict(choice) for choice in self.choices]
        for shown, choice in zip(choices, self.choices, strict=True):
            shown["memory"] |= {"heap": choice.memory.heap, "total": choice.memory.total}
        return {"parameters": self.parameters, "choices": choices, "notes": list(self.notes)}


def ppo_memory(
    policy: Architecture,
    rewards: Sequence[Architecture],
    *,
    tuning: TuningBase,
    critic: CriticKind,
    precision: Precision,
    checkpointing: bool = False,
    sequential: bool = True,
    gpu: bool = False,
    flash: bool = False,
    state: float = ADAMW,
    offload: bool = False,
) -> Memory:
    """Return the memory of PPO in one process, without its engine.

    ``rewards`` are reward models; ``critic: reward`` starts from the first. ``flash`` and ``offload`` are as in
    ``activations_per_token``, ``state`` are the optimizer's bytes for a trained parameter.

    With adapters the reference is the policy with them off, and the critic has adapters on weights that are in memory
    anyway (it needs its own matrices in 4 bits, and its own matrices if adapters are initialized from the weights).
    With full tuning reference and critic are separate models (``align.rl.model``, ``align.rl.model``).

    A critic with a trunk has finished its backward pass before the policy's forward pass starts, so only the larger of
    both counts. With several processes (not ``sequential``) both are in memory together.
    Raises ``ValueError`` for ``critic: reward`` without a reward model.
    """
    # Count policy and critic separately, then combine: their passes follow each other in one process.
    full = tuning.trains_all
    low = precision == "bfloat16"
    trained = policy.parameters if full else policy.adapters(tuning, "model")
    quantized = isinstance(tuning, QloraTuning)
    if critic == "reward" and not rewards:
        raise ValueError("critic is reward, but there is no reward model")
    critic_base = {"reward": rewards[0] if rewards else None, "policy": policy, "head": None}[critic]
    critic_trained = policy.hidden + 1  # the value head and its bias
    # A base in bfloat16 needs no copies for its products.
    is_narrow = tuning.base_type(precision) == "bfloat16"
    # Both lists have an entry for the policy, and another for the critic if it has a trunk.
    copies = [0 if is_narrow else (0 if quantized else copied_parameters(policy, tuning, checkpointing)) + policy.head]
    options: Any = {"checkpointing": checkpointing, "flash": flash, "offload": offload}
    per_token = [activations_per_token(policy, tuning, precision, **options)]
    if critic_base is not None:
        trunk = critic_base.trunk if full else critic_base.adapters(tuning, "trunk")
        critic_trained = critic_base.hidden + 1 + trunk
        # the matrices of a frozen reward model are in bfloat16 already, and need no copy
        is_float32 = full or (critic == "policy" and not quantized and not is_narrow)
        copies.append(copied_parameters(critic_base, tuning, checkpointing) if is_float32 else 0)
        per_token.append(activations_per_token(critic_base, tuning, precision, **options))
    combine = max if sequential else sum
    amounts = [amount for amount in per_token if amount is not None]
    reference = _reference_bytes(policy, low) if full else 0
    if critic_base is not None:
        reference += _unshared_matrices(critic_base, tuning, critic)
    weights = model_bytes(policy, tuning, precision)
    return Memory(
        weights=weights + (0 if full else FLOAT * trained),
        gradients=FLOAT * trained,
        optimizer=round(state * trained),
        reference=reference,
        critic=round((2 * FLOAT + state) * critic_trained),
        state=state,
        base=0 if full else weights - _scale_bytes(policy, tuning),
        reward=sum(_frozen_bytes(reward, low) + FLOAT * reward.hidden for reward in rewards),
        copies=2 * combine(copies) if low else 0,
        logits=head_work_space(policy, full, low, LOGITS_AT_ONCE["cuda" if gpu else "cpu"]),
        activations=combine(amounts) if len(amounts) == len(per_token) else None,
    )


def copied_parameters(model: Architecture, tuning: TuningBase, checkpointing: bool) -> int:
    """Return the parameters of the matrices that autocast copies for a backward pass.

    With checkpointing they are one layer's. Autocast does not reach the products of experts.
    """
    if checkpointing:
        return model.largest.matrices
    return sum(block.matrices for block in model.blocks[model.layers - model.learning_layers(tuning) :])


def model_bytes(model: Architecture, tuning: TuningBase, precision: Precision, *, with_head: bool = True) -> int:
    """Return the bytes of a model's weights under ``tuning``, without the adapters; ``with_head`` is a causal model's.

    Norms, biases and embeddings that scale their rows are float32. Only linear layers are quantized.
    """
    size = SIZES[tuning.base_type(precision)]
    rounded = model.rounded + model.expert_matrices
    vectors = FLOAT * (model.trunk - rounded)
    head = size * (model.parameters - model.trunk) if with_head else 0
    if not isinstance(tuning, QloraTuning):
        return size * rounded + vectors + head
    quantized = model.matrices - model.biases
    return size * (rounded - quantized) + vectors + head + _quantized_bytes(quantized, tuning)


def _scale_bytes(model: Architecture, tuning: TuningBase) -> int:
    """Return the bytes of a quantized model's scales, which stay on the device."""
    if not isinstance(tuning, QloraTuning):
        return 0
    quantized = model.matrices - model.biases
    return _quantized_bytes(quantized, tuning) - quantized // 2


def _quantized_bytes(weights: int, tuning: QloraTuning) -> int:
    """Return the bytes of matrices in 4 bits with a scale for every 64 weights.

    A scale is in float32, or with double quantization in 8 bits with one float32 scale for every 256 of them.
    """
    scales = weights / 64
    return round(weights / 2 + (scales + FLOAT * scales / 256 if tuning.double_quantization else FLOAT * scales))


def _unshared_matrices(model: Architecture, tuning: TuningBase, critic: CriticKind) -> int:
    """Return the bytes of frozen matrices that a critic cannot share with the model it starts from."""
    if isinstance(tuning, QloraTuning):
        return _quantized_bytes(model.matrices, tuning) if critic == "reward" else 0
    return FLOAT * model.matrices if isinstance(tuning, LowRank) and tuning.starts_from_weights else 0


def _frozen_bytes(model: Architecture, low: bool) -> int:
    """Return the bytes of a trunk that is neither trained nor saved; ``low`` rounds its matrices to bfloat16."""
    return FLOAT * model.trunk - (2 * model.rounded if low else 0)


def _reference_bytes(model: Architecture, low: bool) -> int:
    """Return the bytes of a frozen copy of the policy with its head."""
    head = 0 if model.tied else (2 if low else FLOAT) * model.head
    return _frozen_bytes(model, low) + head


def head_work_space(model: Architecture, head_trained: bool, low: bool, block: int) -> int:
    """Return the work space of ``align.models.fast.token_logprobs``, whose backward pass is the fuller one.

    ``block`` is the most logits of a block; some numbers of tokens have as few as half of it. While a block's logits
    are computed, the former block's are still in memory. While the head's gradient is rounded, its float32 sum is.
    """
    low_bytes = 2 if low else 0
    # Two blocks alive at once, each in float32 and, under autocast, also in bfloat16.
    computing = (2 * FLOAT + 2 * low_bytes) * block
    if not head_trained:
        return computing
    # Two blocks and the gradient's float32 sum, or one block, the sum and its rounded copy.
    return max(computing + FLOAT * model.head, (FLOAT + low_bytes) * block + (FLOAT + low_bytes) * model.head)


def engine_memory(
    model: Architecture, runtime: Runtime, *, precision: Precision, sequences: int, length: int
) -> tuple[int, int, Released]:
    """Return the bytes of the engine's weights and of its key-value cache, and what it releases during training.

    ``sequences`` of at most ``length`` tokens are sampled at once. On a CPU vLLM's cache has ``cpu_kv_cache_gb``. On a
    GPU it fills vLLM's share of the card, so only what the sequences need is counted, as with transformers. Servers
    that run already (``addresses``) need no memory here; servers started on this machine need as much each.
    """
    engine = runtime.engine
    name, gpu = resolve_engine(runtime)
    if runtime.rollouts.addresses:
        return 0, 0, "cache"
    size = SIZES[precision if engine.dtype == "auto" else engine.dtype]
    weights = size * model.parameters
    if name != "transformers" and not gpu:
        if model.tied:
            weights += size * model.head  # vLLM's CPU backend packs a copy of the head
        servers = max(1, runtime.rollouts.servers)
        return servers * weights, servers * int(engine.cpu_kv_cache_gb * 2**30), "nothing"
    # Keys and values of every token, and the states of every sequence in a batch.
    cache = size * (model.token_cache * length + model.state) * min(sequences, engine.batch_size)
    released: Released = "nothing"
    if name == "transformers":
        released = "cache"
    elif name == "vllm" and engine.sleep:
        released = "all"
    return weights, cache, released


def engine_share(runtime: Runtime) -> str:
    """Return what vLLM uses of a card, in words."""
    share = runtime.engine.gpu_memory
    return (
        "what else is free of the card (gpu_memory auto)" if share == "auto" else f"{share:g} of the card (gpu_memory)"
    )


def resolve_engine(runtime: Runtime) -> tuple[str, bool]:
    """Return the engine's name with ``auto`` resolved, and whether it samples on a GPU; imports neither library."""
    gpu = runtime.device == "cuda" or (runtime.device == "auto" and Path("/dev/nvidia0").exists())
    return runtime.engine_name, gpu
