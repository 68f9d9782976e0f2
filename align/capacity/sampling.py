"""Memory of a stage that samples and scores on one device. Never imports torch.

The phases of a stage follow each other: engines sample and are closed, then reward models score, then checkpoints
read. The fullest phase decides. vLLM on a GPU may use ``runtime.engine.gpu_memory`` of it and no more. Scratch space
of kernels and the reserve of an allocator are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.capacity.hardware import GIB, Device, Hardware, Way, largest_that_fits
from align.capacity.memory import engine_memory, engine_share, resolve_engine
from align.config.base import Precision
from align.config.environment import USER_INPUT, EnvironmentConfig
from align.config.runtime import Runtime
from align.config.runtime.rollouts import CPU_STEP_TOKENS, SCORED_AT_ONCE, RolloutsConfig
from align.models.compute.architecture import Architecture
from align.models.compute.costs import FLOAT, SIZES, passing_per_token

HEAD_ROWS = 256
"""Tokens whose logits are in float32 at a time (``align.evaluation.logprobs``)."""
GPU_STEP_TOKENS = 16384
"""Prompt tokens that vLLM reads in one step on a GPU: the largest of vLLM's own defaults, which begin at 2,048."""
MAX_SEQUENCES = 1 << 20
"""Greatest number of sequences at a time that is tried."""


@dataclass(frozen=True)
class UserLoad:
    """A checkpoint that plays the user of episodes: transformers samples it in the stage's own process."""

    model: Architecture
    length: int
    """Tokens of the longest conversation, under the user's own prompt."""


@dataclass(frozen=True)
class SamplingLoad:
    """Sequences that an engine samples from one checkpoint, each of the greatest length."""

    name: str
    """Role of the model: ``policy``, ``judge``, or a checkpoint's name."""
    model: Architecture
    prompt_tokens: int
    """Tokens of the longest prompt."""
    response_tokens: int
    """Tokens of the longest response."""
    call: int
    """Sequences that the stage hands to its engine at a time."""
    uses_top_p: bool = False
    """True if ``top_p`` sorts the vocabulary for each token."""
    needs_transformers: bool = False
    """True if transformers samples them, whatever the engine of the run."""
    user: UserLoad | None = None
    """The checkpoint that answers between the turns of episodes, if there is one."""

    @property
    def length(self) -> int:
        """Tokens of the longest prompt with its response."""
        return self.prompt_tokens + self.response_tokens


@dataclass(frozen=True)
class ScoringLoad:
    """Passes without gradients over texts, by a model that the stage itself loads, in float32 with autocast."""

    name: str
    """Role of the model: ``reward``, or a checkpoint's name."""
    model: Architecture
    length: int
    """Tokens of the longest row."""
    pass_tokens: int
    """Tokens of one forward pass."""
    logit_tokens: int = 0
    """Tokens of a row that need logits; 0 for a reward model."""
    is_rounded: bool = False
    """True if bfloat16 means that the matrices are rounded once, when they are loaded."""

    @property
    def is_reward_model(self) -> bool:
        """True if the model has a score head, no vocabulary head."""
        return not self.logit_tokens

    @property
    def phase(self) -> str:
        """Name of the phase in which the model reads."""
        return f"scoring by {self.name}" if self.is_reward_model else f"reading by {self.name}"


@dataclass(frozen=True)
class Inference:
    """Load of one stage that samples or scores and does not train."""

    precision: Precision
    sampling: tuple[SamplingLoad, ...] = ()
    scoring: tuple[ScoringLoad, ...] = ()
    external: str = ""
    """Work of other servers, in words; it is not counted."""
    notes: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[Architecture, ...]:
        """Every model that samples or reads, each once."""
        models = [*(load.model for load in self.sampling), *(load.model for load in self.scoring)]
        return tuple(dict.fromkeys(models))


def reward_scoring(name: str, model: Architecture, length: int) -> ScoringLoad:
    """Return the load of a reward model that scores rows of ``length`` tokens."""
    return ScoringLoad(name, model, length, SCORED_AT_ONCE * length)


def user_of(models: Mapping[str, Sequence[Architecture]]) -> Architecture | None:
    """Return the checkpoint that plays the user of a stage's episodes, of its models by input; None without one."""
    return next(iter(models.get(USER_INPUT, ())), None)


def user_load(
    environment: EnvironmentConfig | None, checkpoint: Architecture | None, prompt_tokens: int
) -> UserLoad | None:
    """Return the load of a checkpoint that plays the user of episodes after such prompts; None without one."""
    user = None if environment is None else environment.user
    if environment is None or user is None or checkpoint is None:
        return None
    # The user reads the conversation without tools, under a separate prompt.
    return UserLoad(checkpoint, prompt_tokens + environment.max_tokens + user.max_tokens)


# ---- bytes of a load ----


def user_memory(user: UserLoad, runtime: Runtime, precision: Precision, sequences: int) -> tuple[int, int]:
    """Return the bytes of the weights and of the cache of a user in ``sequences`` episodes at a time."""
    weights, cache, _ = engine_memory(
        user.model, runtime.with_transformers(), precision=precision, sequences=sequences, length=user.length
    )
    return weights, cache


def sampling_memory(
    load: SamplingLoad, runtime: Runtime, precision: Precision, sequences: int, engine: str, *, gpu: bool
) -> dict[str, int]:
    """Return the bytes of one engine that decodes ``sequences`` at a time, by purpose.

    ``runtime`` names the device and the engine, and no servers. Transformers reads the prompts of all sequences in one
    padded pass. vLLM reads a limited number of tokens at a time, and on a CPU its cache has a fixed size.
    """
    size = _bytes_per_number(runtime, precision)
    weights, cache, _ = engine_memory(load.model, runtime, precision=precision, sequences=sequences, length=load.length)
    tokens = sequences * load.prompt_tokens
    masks = 0
    if engine == "transformers":
        # The boolean mask of a padded batch, and the same mask as it is added to attention's scores.
        masks = (1 + size) * tokens * load.prompt_tokens
    else:
        tokens = min(tokens, GPU_STEP_TOKENS if gpu else max(CPU_STEP_TOKENS, load.length))
    # A token that is sampled has for each word its logit, log-probability and probability, and a copy in blocks.
    per_word = size + 3 * FLOAT
    if load.uses_top_p:
        # The sorted values and their indices, probabilities, their cumulative sum and the sum before each word.
        per_word = size + 5 * FLOAT + 8
    return {
        "engine": weights,
        "kv_cache": cache,
        "activations": tokens * passing_per_token(load.model, size, size) + masks,
        "logits": sequences * load.model.vocabulary * per_word,
    }


def _bytes_per_number(runtime: Runtime, precision: Precision) -> int:
    dtype = runtime.engine.dtype
    return SIZES[precision if dtype == "auto" else dtype]


def scoring_memory(load: ScoringLoad, precision: Precision, *, gpu: bool = False) -> dict[str, int]:
    """Return the bytes of one device while texts are scored, by purpose."""
    model, size = load.model, SIZES[precision]
    # Without gradients autocast keeps no copy of a matrix, so only the widest one counts.
    widest = max(matrix.parameters for block in model.blocks for matrix in (*block.linears, *block.experts))
    purpose, parameters = "weights", model.parameters
    if load.is_reward_model:
        purpose, parameters = "reward", model.trunk + model.hidden
    else:
        widest = max(widest, model.head)
    weights = {purpose: FLOAT * parameters}
    if load.is_rounded and precision == "bfloat16":
        # On a CPU the rounded weights and the file that they are read from are in memory together.
        # Embeddings that scale their rows stay float32. A head that is tied to them is cast in every pass.
        rounded_bytes = size * parameters + (FLOAT - size) * model.unrounded
        weights = {purpose: rounded_bytes, "file": 0 if gpu else FLOAT * parameters}
        is_cast = model.tied and model.scaled_embeddings and not load.is_reward_model
        widest = model.embedded if is_cast else 0
    # Only positions that predict a wanted token have logits.
    logit_rows = round(load.pass_tokens * load.logit_tokens / load.length)
    # One chunk of logits in float32, scaled, and the work space of their sum.
    chunk = 3 * FLOAT * min(HEAD_ROWS, logit_rows) * model.vocabulary
    return weights | {
        "copies": 2 * widest if precision == "bfloat16" else 0,
        "activations": load.pass_tokens * passing_per_token(model, size, FLOAT),
        "logits": 2 * size * logit_rows * model.vocabulary + chunk,
    }


# ---- one stage on one device ----


@dataclass(frozen=True, kw_only=True)
class SamplingWay(Way):
    """One engine on one device."""

    engine: str | None
    """None if only reward models and checkpoints read."""
    phase: str
    """Name of the fullest phase: ``loading``, ``sampling``, ``scoring by …``, ``reading by …``."""
    wanted: int
    """Sequences at a time that the settings ask for."""

    def to_json(self) -> dict[str, Any]:
        """Return everything in words and bytes."""
        return super().to_json() | {
            "engine": self.engine,
            "fullest_while": self.phase,
            "sequences_at_once": self.batch or None,
            "largest_at_once": self.largest or None,
        }


def counted_engine(runtime: Runtime) -> str | None:
    """Return the engine whose memory is counted, with ``auto`` resolved for this machine.

    None if servers that already run sample, or servers with a model on several devices.
    """
    rollouts = runtime.rollouts
    if rollouts.addresses or rollouts.tensor_parallel > 1:
        return None
    if rollouts.servers:
        return "vllm"
    name = resolve_engine(_with_one_engine(runtime))[0]
    return "transformers" if name == "transformers" else "vllm"


def _with_one_engine(runtime: Runtime, **fields: Any) -> Runtime:
    return runtime.model_copy(update={"rollouts": RolloutsConfig(), **fields})


def sampling_way(inference: Inference, runtime: Runtime, hardware: Hardware) -> SamplingWay:
    """Return the memory of the stage on one device, with the most sequences at a time that fit."""
    device = hardware.device
    engine = counted_engine(runtime) if inference.sampling else None
    engines = []
    if engine is not None:
        settings = _with_one_engine(runtime, device="cuda" if device.gpu else "cpu")
        for load in inference.sampling:
            by_transformers = load.needs_transformers and not runtime.rollouts.pooled
            engine_name = "transformers" if by_transformers else engine
            engines.append(_Engine(load, engine_name, inference.precision, settings, device))
    obstacle = ""
    largest = 0
    if engines:
        # Engines of one stage run one after the other, so each must fit, and the tightest sets the limit.
        largest = min(sampler.largest for sampler in engines)
        if largest == 0:
            obstacle = next(sampler.shortage for sampler in engines if not sampler.fits(1))
    requested = max((sampler.wanted for sampler in engines), default=0)
    phases = _phases(inference, engines, largest or 1, device)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    usable = device.usable + device.context
    for name, parts in phases.items():
        needed = sum(parts.values())
        if not obstacle and name not in ("sampling", "loading") and needed > usable:
            obstacle = f"{name} needs {needed / GIB:.1f} GiB on one device, usable are {usable / GIB:.1f}"
    return SamplingWay(
        label="one device" if engine is None else f"one engine ({engine})",
        engine=engine,
        batch=0 if obstacle else min(requested, largest),
        largest=largest,
        parts=phases[phase],
        obstacle=obstacle,
        phase=phase,
        wanted=requested,
    )


@dataclass(frozen=True)
class _Engine:
    """One engine that samples one load on a device."""

    load: SamplingLoad
    name: str
    precision: Precision
    runtime: Runtime
    """Settings of one engine in one process on the planned device."""
    device: Device

    @property
    def wanted(self) -> int:
        """Sequences that the engine gets at a time, at most ``runtime.engine.batch_size``."""
        return min(self.load.call, self.runtime.engine.batch_size)

    def parts(self, sequences: int) -> dict[str, int]:
        """Return the bytes of the engine while it decodes ``sequences`` at a time, by purpose."""
        # ``engine_memory`` counts at most ``batch_size`` sequences, so a larger number needs a larger setting.
        batch_size = max(sequences, self.runtime.engine.batch_size)
        engine = self.runtime.engine.model_copy(update={"name": self.name, "batch_size": batch_size})
        runtime = self.runtime.model_copy(update={"engine": engine})
        parts = sampling_memory(self.load, runtime, self.precision, sequences, self.name, gpu=self.device.gpu)
        if self.load.user is not None:
            user, user_cache = user_memory(self.load.user, runtime, self.precision, sequences)
            parts |= {"user": user, "kv_cache": parts["kv_cache"] + user_cache}
        return parts

    @property
    def share(self) -> int:
        """Bytes of the device that the engine may use: on a GPU vLLM has a share of them."""
        share = self.runtime.engine.gpu_memory
        has_share = self.name == "vllm" and self.device.gpu and share != "auto"
        return int(share * self.device.memory) if has_share else self.device.memory

    @property
    def room(self) -> int:
        """Bytes that the engine can use, the driver of its process included."""
        return min(self.device.usable + self.device.context, self.share)

    def fits(self, sequences: int) -> bool:
        """Return whether the engine can decode ``sequences`` at a time."""
        parts = self.parts(sequences)
        if self.name == "vllm" and not self.device.gpu:
            # On a CPU vLLM's cache has a fixed size, which must hold the sequences.
            model = self.load.model
            numbers = sequences * (model.token_cache * self.load.length + model.state)
            if _bytes_per_number(self.runtime, self.precision) * numbers > parts["kv_cache"]:
                return False
        return sum(parts.values()) + self.device.context <= self.room

    @property
    def largest(self) -> int:
        """The most sequences at a time that fit; 0 for none."""
        return largest_that_fits(self.fits, MAX_SEQUENCES)

    @property
    def shortage(self) -> str:
        """Reason why not even one sequence fits."""
        length, room, settings = self.load.length, self.room, self.runtime.engine
        needed = sum(self.parts(1).values()) + self.device.context
        if needed <= room:
            size = f"{settings.cpu_kv_cache_gb:g} GiB (runtime.engine.cpu_kv_cache_gb)"
            return f"one sequence of {length} tokens does not fit into a cache of {size}"
        limit = f" (runtime.engine.gpu_memory {settings.gpu_memory})" if room == self.share else ""
        return f"one sequence of {length} tokens needs {needed / GIB:.1f} GiB, the engine has {room / GIB:.1f}{limit}"

    def phases(self, sequences: int) -> dict[str, dict[str, int]]:
        """Return the bytes while the engine samples, and on a CPU while transformers loads, by purpose."""
        parts = self.parts(sequences)
        phases = {"sampling": parts}
        if not self.device.gpu and self.name == "transformers":
            # The system reclaims the pages of a mapped file when it needs them, so they fill only free memory.
            weights = parts["engine"]
            file = FLOAT * self.load.model.parameters
            mapped = min(file, max(0, self.device.usable - weights)) if weights < file else 0
            phases["loading"] = {"engine": weights, "file": mapped}
        return phases


def _phases(
    inference: Inference, engines: Sequence[_Engine], largest: int, device: Device
) -> dict[str, dict[str, int]]:
    """Return the bytes of the device in each phase, by purpose; the fullest of a phase that repeats."""
    phases = [phase for engine in engines for phase in engine.phases(min(engine.wanted, largest)).items()]
    for load in inference.scoring:
        phases.append((load.phase, scoring_memory(load, inference.precision, gpu=device.gpu)))
    fullest: dict[str, dict[str, int]] = {}
    for name, parts in phases:
        present = {part: amount for part, amount in parts.items() if amount} | {"context": device.context}
        if sum(present.values()) > sum(fullest.get(name, {}).values()):
            fullest[name] = present
    return fullest or {"waiting": {"context": device.context}}


def sampling_notes(inference: Inference, runtime: Runtime, hardware: Hardware) -> list[str]:
    """Return the notes about the numbers of a stage, one sentence each."""
    notes = list(inference.notes)
    if not inference.sampling:
        return notes
    rollouts = runtime.rollouts
    engine = counted_engine(runtime)
    if rollouts.addresses:
        notes.append("Servers that already run sample; their memory is not counted.")
    elif engine is None:
        notes.append(f"Servers with tensor_parallel {rollouts.tensor_parallel} sample; their memory is not counted.")
    elif rollouts.servers > 1 or runtime.samplers.count > 1:
        notes.append(f"Of {max(rollouts.servers, runtime.samplers.count)} engines, one is counted.")
    if engine is not None and runtime.engine.name == "auto" and not rollouts.pooled:
        notes.append(f"runtime.engine.name is auto, which means {engine} on this machine.")
    if hardware.device.gpu and engine == "vllm":
        notes.append(f"vLLM uses {engine_share(runtime)} for engine and cache, needed or not.")
    return notes
