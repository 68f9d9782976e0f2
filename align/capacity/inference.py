"""Load of a stage that samples and scores: its sequences and passes, their bytes and operations. Torch-free.

The counterpart of ``align.capacity.job`` for stages that do not train. The estimators of ``sample``, ``evaluate`` and
``synthesize`` build an ``Inference``; ``align.capacity.sampling_ways`` places it on devices. Left out: what an
allocator keeps for itself, and kernels' scratch space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align.capacity.memory import engine_memory
from align.config.base import Precision
from align.config.batch_sizes import CPU_STEP_TOKENS, SCORED_AT_ONCE
from align.config.environment import EnvironmentConfig
from align.config.runtime import Runtime
from align.config.simulated_user import USER_INPUT, SimulatedUserConfig
from align.models.activations import FLOAT, SIZES, passing_per_token
from align.models.architecture import Architecture
from align.models.flops import forward_flops

HEAD_ROWS = 256
"""Tokens whose logits are in float32 at a time (``align.evaluation.logprobs``)."""
GPU_STEP_TOKENS = 16384
"""Prompt tokens that vLLM reads in one step on a GPU: the largest of vLLM's own defaults, which begin at 2,048."""
UNKNOWN_CALL = 1 << 20
"""Sequences handed over at a time where their number is not known: as many as an engine takes."""


@dataclass(frozen=True)
class Rows:
    """Numbers of rows of a stage's data; ``stand_in`` replaces them if the data has no record."""

    train: int | None = None
    test: int | None = None
    stand_in: int = 0

    @property
    def is_known(self) -> bool:
        """True if the data's record has a number."""
        return self.train is not None or self.test is not None

    def count_both(self, max_train: int | None, max_test: int | None) -> int:
        """Return the rows of both splits, each up to its limit; a stand-in counts as the train split."""
        if not self.is_known:
            return _limit(self.stand_in, max_train)
        return _limit(self.train or 0, max_train) + _limit(self.test or 0, max_test)

    def count_test(self, maximum: int | None) -> int:
        """Return the rows of the test split, up to ``maximum``."""
        return _limit((self.test or 0) if self.is_known else self.stand_in, maximum)


def _limit(number: int, maximum: int | None) -> int:
    return number if maximum is None else min(number, maximum)


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
    """Who samples: ``policy``, ``judge``, or a checkpoint's name."""
    model: Architecture
    sequences: int | None
    """None if their number is not known in advance: they count for memory, not for time."""
    prompts: int
    """Different prompts among them; vLLM reads each once for all of its sequences."""
    prompt_tokens: int
    """Tokens of the longest prompt."""
    response_tokens: int
    """Tokens of the longest response."""
    call: int
    """Sequences that the stage hands to its engines at a time."""
    uses_top_p: bool = False
    """Whether ``top_p`` sorts the vocabulary for each token."""
    needs_transformers: bool = False
    """Whether transformers samples them if the engine is in the stage's own process."""
    user: UserLoad | None = None
    """The checkpoint that answers between the turns of episodes, if there is one."""

    @property
    def length(self) -> int:
        """Tokens of the longest prompt with its response."""
        return self.prompt_tokens + self.response_tokens

    def flops(self, fill: float = 1.0, shares_prompts: bool = True) -> float:
        """Return the operations of all sequences, whose mean length is ``fill`` of the greatest.

        With ``shares_prompts`` each prompt is read once for all of its sequences.
        """
        prompt, length = fill * self.prompt_tokens, fill * self.length
        prompt_flops = forward_flops(self.model, prompt, prompt)
        sequence_flops = forward_flops(self.model, length, length, fill * self.response_tokens)
        sequences = self.sequences or 0
        # A shared prompt is read once; each of its sequences then pays for its own tokens only.
        prompts = self.prompts if shares_prompts else sequences
        return prompts * prompt_flops + sequences * (sequence_flops - prompt_flops)


@dataclass(frozen=True)
class ScoringLoad:
    """Passes without gradients over texts, by a model that the stage itself loads, in float32 with autocast."""

    name: str
    """Who scores: ``reward``, or a checkpoint's name."""
    model: Architecture
    length: int
    """Tokens of the longest row."""
    pass_tokens: int
    """Tokens of one forward pass."""
    rows: int | None = None
    """None if their number or length is not known in advance: they count for memory, not for time."""
    logit_tokens: int = 0
    """Tokens of a row that need logits; 0 for a reward model."""
    is_rounded: bool = False
    """True where bfloat16 means that the matrices are rounded once, when they are loaded."""

    @property
    def is_reward_model(self) -> bool:
        """True if the model has a score head, no vocabulary head."""
        return not self.logit_tokens

    def flops(self, fill: float = 1.0) -> float:
        """Return the operations of all rows, whose mean length is ``fill`` of the greatest."""
        length = fill * self.length
        return (self.rows or 0) * forward_flops(self.model, length, length, fill * self.logit_tokens)


@dataclass(frozen=True)
class Inference:
    """One stage that samples or scores and does not train."""

    precision: Precision
    sampling: tuple[SamplingLoad, ...]
    scoring: tuple[ScoringLoad, ...]
    row: str
    """Name of a row in the plural, such as ``prompts``."""
    rows: int
    """Rows that are processed, or assumed to be."""
    rows_are_known: bool
    """Whether ``rows`` comes from the data's record or the config, not from a stand-in."""
    external: str = ""
    """What other servers do, in words; it is not counted."""
    is_partial: bool = False
    """Whether some of the time is not counted, as the notes say."""
    notes: tuple[str, ...] = ()

    @property
    def has_known_time(self) -> bool:
        """True if the size of any load is known."""
        sizes = [load.sequences for load in self.sampling] + [load.rows for load in self.scoring]
        return any(size is not None for size in sizes)

    @property
    def models(self) -> tuple[Architecture, ...]:
        """Every model that samples or reads, each once."""
        models = [*(load.model for load in self.sampling), *(load.model for load in self.scoring)]
        return tuple(dict.fromkeys(models))


def reward_scoring(name: str, model: Architecture, rows: int | None, length: int) -> ScoringLoad:
    """Return the load of a reward model that scores ``rows`` rows of ``length`` tokens."""
    return ScoringLoad(name, model, length, SCORED_AT_ONCE * length, rows)


def user_memory(user: UserLoad, runtime: Runtime, precision: Precision, sequences: int) -> tuple[int, int]:
    """Return the bytes of the weights and of the cache of a user who takes part in ``sequences`` episodes at a time."""
    weights, cache, _ = engine_memory(
        user.model, runtime.with_transformers(), precision=precision, sequences=sequences, length=user.length
    )
    return weights, cache


def user_of(models: Mapping[str, Sequence[Architecture]]) -> Architecture | None:
    """Return the checkpoint that plays the user of a stage's episodes, of its models by input; None without one."""
    return next(iter(models.get(USER_INPUT, ())), None)


def user_load(
    environment: EnvironmentConfig | None, checkpoint: Architecture | None, prompt_tokens: int
) -> UserLoad | None:
    """Return what a checkpoint that plays the user of episodes after such prompts reads; None without one."""
    user = None if environment is None else environment.user
    if environment is None or user is None or checkpoint is None:
        return None
    # It reads the conversation, tools left out, under a prompt of its own.
    return UserLoad(checkpoint, prompt_tokens + environment.max_tokens + user.max_tokens)


def sampling_memory(
    load: SamplingLoad, runtime: Runtime, precision: Precision, sequences: int, engine: str, *, gpu: bool
) -> dict[str, int]:
    """Return the bytes of one engine on one device that decodes ``sequences`` at a time, by purpose.

    ``runtime`` names the device and the engine, and no servers. Transformers reads the prompts of all sequences in one
    padded pass. vLLM reads a limited number of tokens at a time, and on a CPU its cache has a fixed size.
    """
    dtype = runtime.engine.dtype
    size = SIZES[precision if dtype == "auto" else dtype]
    weights, cache, _ = engine_memory(load.model, runtime, precision=precision, sequences=sequences, length=load.length)
    tokens = sequences * load.prompt_tokens
    masks = 0
    if engine == "transformers":
        # the boolean mask of a padded batch, and the same mask as it is added to attention's scores
        masks = (1 + size) * tokens * load.prompt_tokens
    else:
        tokens = min(tokens, GPU_STEP_TOKENS if gpu else max(CPU_STEP_TOKENS, load.length))
    return {
        "engine": weights,
        "kv_cache": cache,
        "activations": tokens * passing_per_token(load.model, size, size) + masks,
        "logits": sequences * load.model.vocabulary * _sampler_bytes(size, load.uses_top_p),
    }


def _sampler_bytes(size: int, uses_top_p: bool) -> int:
    """Return the bytes per word of the vocabulary while a token is sampled.

    They hold the logit, its log-probability and probability, and a copy in blocks. ``top_p`` needs sorted values and
    their indices, probabilities, their cumulative sum and the sum before each word.
    """
    return size + 5 * FLOAT + 8 if uses_top_p else size + 3 * FLOAT


def scoring_memory(load: ScoringLoad, precision: Precision, *, gpu: bool = False) -> dict[str, int]:
    """Return the bytes of one device while texts are scored, by purpose."""
    model, size = load.model, SIZES[precision]
    # Without gradients autocast keeps no copy of a matrix, so only the widest one counts.
    widest = max((linear.parameters for linear in model.linears), default=0)
    purpose, parameters = "weights", model.parameters
    if load.is_reward_model:
        purpose, parameters = "reward", model.trunk + model.hidden
    else:
        widest = max(widest, model.head)
    weights = {purpose: FLOAT * parameters}
    if load.is_rounded and precision == "bfloat16":
        # The rounded weights are in memory beside the file that they are read from, but for a GPU's memory.
        # Embeddings that scale their rows stay float32. A head that is tied to them is cast in every pass.
        unrounded = model.embedded if model.scaled_embeddings else 0
        rounded_bytes = size * parameters + (FLOAT - size) * unrounded
        weights = {purpose: rounded_bytes, "file": 0 if gpu else FLOAT * parameters}
        widest = unrounded if model.tied and not load.is_reward_model else 0
    # Only positions that predict a wanted token have logits.
    logit_rows = round(load.pass_tokens * load.logit_tokens / load.length)
    # one chunk of logits in float32, scaled, and the work space of their sum
    chunk = 3 * FLOAT * min(HEAD_ROWS, logit_rows) * model.vocabulary
    return weights | {
        "copies": 2 * widest if precision == "bfloat16" else 0,
        "activations": load.pass_tokens * passing_per_token(model, size, FLOAT),
        "logits": 2 * size * logit_rows * model.vocabulary + chunk,
    }


def environment_notes(environment: EnvironmentConfig) -> list[str]:
    """Return what is left out of the estimate of a stage that plays episodes."""
    notes = ["The time of the environment and its tools is not counted."]
    if environment.user is not None:
        notes.append(user_note(environment.user))
    return notes


def user_note(user: SimulatedUserConfig) -> str:
    """Return what is counted of the model that plays the user of episodes."""
    counted = "is counted, its time is not" if user.model else "is not counted"
    return f"{user.label}, which plays the user, {counted}."
