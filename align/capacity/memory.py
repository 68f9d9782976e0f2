"""What training needs in memory, in bytes, from the models' sizes alone: counted, not measured. Torch-free.

The one model of memory: `align plan --memory`, `--hardware` and what a stage says before its first step all come from
here. A trained parameter takes 16 bytes: weight, gradient and AdamW's state in float32. Frozen models that are never
saved, the reference and reward models, are in bfloat16 where that is the ``precision`` (``align.models.precision``).

Left out: the interpreter and its libraries, what an allocator keeps for itself. How parts are shared out among devices
stands in ``align.capacity.sharing``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from align.config.runtime import Runtime
from align.config.tuning import LowRank, QloraTuning, TuningBase
from align.models.activations import FLOAT, SIZES, activations_per_token
from align.models.architecture import Architecture

if TYPE_CHECKING:
    from align.models.precision import Precision

TRAINED = 4 * FLOAT
"""Bytes of a trained parameter: weight, gradient, and AdamW's two averages."""
LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**24}
"""Logits of a block (``align.rl.logprobs.LOGITS``)."""

CriticKind = Literal["reward", "policy", "head"]
Lent = Literal["nothing", "cache", "all"]


@dataclass(frozen=True)
class Memory:
    """Bytes that one process holds when it is fullest, by what they are for."""

    weights: int
    """Of the policy, adapters included."""
    gradients: int
    """Of the policy; there while an optimizer step is prepared, and given back after it."""
    optimizer: int
    """AdamW's state for the policy."""
    reference: int = 0
    """Models of the start that are not trained: a reference, a teacher, averages of the weights."""
    critic: int = 0
    """Weights, gradients and AdamW's state that are the critic's alone."""
    reward: int = 0
    """Reward models, frozen."""
    copies: int = 0
    """Of float32 matrices in bfloat16, kept from a forward pass to its backward pass."""
    logits: int = 0
    """Those of a chunk of tokens, what is computed from them, and the head's gradient while it is summed up."""
    scoring: int = 0
    """Work space of passes without gradients over rows that are only scored."""
    engine: int = 0
    """The rollout engine's own weights."""
    kv_cache: int = 0
    """Keys and values of sampled sequences."""
    lent: Lent = "cache"
    """What of the engine is not there while the trainer learns."""
    activations: int | None = None
    """Per token of a micro-batch; policy and critic learn one after the other. None where there is no rule."""
    saving: int = 0
    """What writing the finished model takes beside it: folded matrices, and the model read back to be checked."""
    accumulated: bool = True
    """Whether the gradients of an earlier micro-batch are there while the next one's pass is made."""
    buffers: int = 0
    """What devices that work together hold to exchange gradients and weights."""

    @property
    def total(self) -> int:
        """All of it but activations; where sampling needs more than learning, these partly stand in its place."""
        return self.peak(0)

    def peak(self, tokens: int) -> int:
        """Most bytes held at a time, with micro-batches of ``tokens`` tokens; without activations if these are None."""
        return sum(self.fullest(tokens).values())

    def fullest(self, tokens: int) -> dict[str, int]:
        """The parts that are there when most is."""
        return max(self.phases(tokens).values(), key=lambda parts: sum(parts.values()))

    def phases(self, tokens: int) -> dict[str, dict[str, int]]:
        """Bytes by part while a stage samples, learns, takes an optimizer step, scores rows, and is saved."""
        lasting = {name: getattr(self, name) for name in ("weights", "optimizer", "reference", "critic", "reward")}
        kept = {"nothing": (self.engine, self.kv_cache), "cache": (self.engine, 0), "all": (0, 0)}[self.lent]
        lasting["buffers"] = self.buffers
        asleep = lasting | {"engine": kept[0], "kv_cache": kept[1]}
        needed = {"activations": tokens * (self.activations or 0), "copies": self.copies, "logits": self.logits}
        return {
            "sampling": lasting | {"engine": self.engine, "kv_cache": self.kv_cache},
            # A micro-batch that is alone gives its activations back as its gradients come about.
            "learning": asleep | needed | ({"gradients": self.gradients} if self.accumulated else {}),
            "stepping": asleep | {"gradients": self.gradients},
            "scoring": asleep | {"logits": self.scoring},
            "saving": asleep | {"saving": self.saving},
        }


@dataclass(frozen=True)
class Choice:
    """One way to set a stage up: ``settings`` are the config's words for it."""

    settings: dict[str, str]
    memory: Memory
    chosen: bool


@dataclass(frozen=True)
class Estimate:
    """What a stage's ways cost; ``notes`` say what to know about the numbers, one sentence each."""

    parameters: int
    """Of the model that is trained."""
    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Bytes and words of every choice, each sum included."""
        choices = [asdict(choice) for choice in self.choices]
        for shown, choice in zip(choices, self.choices, strict=True):
            shown["memory"]["total"] = choice.memory.total
        return {"parameters": self.parameters, "choices": choices, "notes": list(self.notes)}


def ppo_memory(
    policy: Architecture,
    rewards: Sequence[Architecture],
    *,
    tuning: TuningBase,
    critic: CriticKind,
    precision: Precision,
    checkpointing: bool = False,
    apart: bool = True,
    gpu: bool = False,
    flash: bool = False,
) -> Memory:
    """PPO in one process without its engine. ``rewards`` are reward models; ``critic: reward`` starts from the first.

    With adapters the reference is the policy with them off, and the critic adapters on weights that are there anyway
    (matrices in 4 bits, or less what adapters took out of them, are its own); with full tuning both are models of their
    own (``align.rl.ppo.critic``, ``align.rl.model``). A critic with a
    trunk has learned before the policy's forward pass starts, so of what both keep until then only the larger counts,
    unless they are not ``apart``, as with several processes. ``flash``: see ``activations_per_token``.
    Raises ``ValueError`` for ``critic: reward`` without a reward model.
    """
    full, low = tuning.trains_all, precision == "bfloat16"
    trained = policy.parameters if full else policy.adapters(tuning, "model")
    quantized = isinstance(tuning, QloraTuning)
    if critic == "reward" and not rewards:
        raise ValueError("critic is reward, but there is no reward model")
    beside = {"reward": rewards[0] if rewards else None, "policy": policy, "head": None}[critic]
    own = policy.hidden + 1  # the value head and its bias
    copies = [(0 if quantized else copied(policy, tuning, checkpointing)) + policy.head]
    per_token = [activations_per_token(policy, tuning, precision, checkpointing=checkpointing, flash=flash)]
    if beside is not None:
        own = beside.hidden + 1 + (beside.trunk if full else beside.adapters(tuning, "trunk"))
        mine = full or (critic == "policy" and not quantized)  # a frozen reward model is in bfloat16
        copies.append(copied(beside, tuning, checkpointing) if mine else 0)
        per_token.append(activations_per_token(beside, tuning, precision, checkpointing=checkpointing, flash=flash))
    together = max if apart else sum
    known = [amount for amount in per_token if amount is not None]
    return Memory(
        weights=model_bytes(policy, tuning) + (0 if full else FLOAT * trained),
        gradients=FLOAT * trained,
        optimizer=2 * FLOAT * trained,
        reference=_frozen(policy, low) + (0 if policy.tied else (FLOAT - 2 * low) * policy.head) if full else 0,
        critic=TRAINED * own + (0 if beside is None else _own_matrices(beside, tuning, critic)),
        reward=sum(_frozen(reward, low) + FLOAT * reward.hidden for reward in rewards),
        copies=2 * together(copies) if low else 0,
        logits=_logits(policy, full, low, LOGITS_AT_ONCE["cuda" if gpu else "cpu"]),
        activations=together(known) if len(known) == len(per_token) else None,
    )


def copied(model: Architecture, tuning: TuningBase, checkpointing: bool) -> int:
    """Parameters of the matrices whose copies autocast makes and a backward pass needs; a layer's where passes are made
    again."""
    return model.matrices // model.layers * (1 if checkpointing else model.learning_layers(tuning))


def model_bytes(model: Architecture, tuning: TuningBase) -> int:
    """Weights of a causal model as ``tuning`` holds them, in bytes, without what it puts beside them."""
    if not isinstance(tuning, QloraTuning):
        return FLOAT * model.parameters
    biases = model.layers * sum(linear.bias * linear.outputs for linear in model.linears)
    return FLOAT * (model.parameters - model.matrices + biases) + _quantized(model.matrices - biases, tuning)


def _quantized(weights: int, tuning: QloraTuning) -> int:
    """Bytes of matrices in 4 bits: a scale for 64 weights, in float32, or in 8 bits with one for 256 scales."""
    scales = weights / 64
    return round(weights / 2 + (scales + FLOAT * scales / 256 if tuning.double_quantization else FLOAT * scales))


def _own_matrices(model: Architecture, tuning: TuningBase, critic: CriticKind) -> int:
    """Bytes of frozen matrices that a critic cannot share with the model it starts from."""
    if isinstance(tuning, QloraTuning):
        return _quantized(model.matrices, tuning) if critic == "reward" else 0
    return FLOAT * model.matrices if isinstance(tuning, LowRank) and tuning.starts_from_weights else 0


def _frozen(model: Architecture, low: bool) -> int:
    """Bytes of a trunk that is neither trained nor saved."""
    return FLOAT * model.trunk - (2 * model.rounded if low else 0)


def _logits(model: Architecture, head_trained: bool, low: bool, block: int) -> int:
    """Work space of ``align.rl.logprobs``, whose backward pass is the fuller one.

    While a block's logits are made, the former block's and what came of them are still there; while the head's gradient
    is rounded, its sum is.
    """
    spare = 2 if low else 0
    making = (2 * FLOAT + 2 * spare) * block
    if not head_trained:
        return making
    return max(making + FLOAT * model.head, (FLOAT + spare) * block + (FLOAT + spare) * model.head)


def engine_memory(
    model: Architecture, runtime: Runtime, *, precision: Precision, sequences: int, length: int
) -> tuple[int, int, Lent]:
    """The engine's weights, its key-value cache, and what of them it lends to the trainer.

    ``sequences`` of at most ``length`` tokens are sampled at once. On a CPU vLLM's cache is ``cpu_kv_cache_gb``; on a
    GPU it fills vLLM's share of the card, so what the sequences need is counted, as with transformers. Servers that
    run already (``addresses``) cost nothing here; of those that are started on this machine, each costs as much.
    """
    engine = runtime.engine
    name, gpu = engine_of(runtime)
    if runtime.rollouts.addresses:
        return 0, 0, "cache"
    size = SIZES[precision if engine.dtype == "auto" else engine.dtype]
    weights = size * model.parameters
    if name != "transformers" and model.tied and not gpu:
        weights += size * model.head  # its CPU backend packs a copy of the head
    if name != "transformers" and not gpu:
        servers = max(1, runtime.rollouts.servers)
        return servers * weights, servers * int(engine.cpu_kv_cache_gb * 2**30), "nothing"
    per_token = 2 * size * model.key_value_width * model.layers
    lent: Lent = "cache" if name == "transformers" else "all" if name == "vllm" and engine.sleep else "nothing"
    return weights, per_token * min(sequences, engine.batch_size) * length, lent


def engine_of(runtime: Runtime) -> tuple[str, bool]:
    """The name that ``auto`` comes to here, and whether it samples on a GPU; told without importing either library."""
    name: str = "vllm-server" if runtime.rollouts.pooled else runtime.engine.name
    if name == "auto":
        name = "vllm" if importlib.util.find_spec("vllm") is not None else "transformers"
    gpu = runtime.device == "cuda" or (runtime.device == "auto" and Path("/dev/nvidia0").exists())
    return name, gpu
