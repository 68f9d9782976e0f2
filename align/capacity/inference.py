"""What a stage that samples and scores asks of devices: sequences, passes, their bytes and operations. Torch-free.

The counterpart of ``align.capacity.job`` for stages that learn nothing. Each kind of stage makes its own
(``align.capacity.memory_sample``, ``align.capacity.memory_evaluate``, ``align.capacity.memory_synthesize``);
what devices make of it is counted in ``align.capacity``. Left out: what an allocator keeps for itself, and kernels'
scratch space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.capacity.memory import engine_memory
from align.config.batch_sizes import CPU_STEP_TOKENS, SCORED_AT_ONCE
from align.config.runtime import Runtime
from align.models.activations import FLOAT, SIZES, passing_per_token
from align.models.architecture import Architecture
from align.models.flops import forward_flops

if TYPE_CHECKING:
    from align.models.precision import Precision

HEAD_ROWS = 256
"""Tokens whose logits are in float32 at a time (``align.evaluation.logprobs``)."""
GPU_STEP_TOKENS = 16384
"""Prompt tokens that vLLM reads in one step on a GPU: the largest of vLLM's own defaults, which begin at 2,048."""


@dataclass(frozen=True)
class Rows:
    """How many rows a stage's data has; without a record of it, ``stand_in`` takes the place of a split."""

    train: int | None = None
    test: int | None = None
    stand_in: int = 0

    @property
    def known(self) -> bool:
        """Whether its record says so."""
        return self.train is not None or self.test is not None

    def both(self, most_train: int | None, most_test: int | None) -> int:
        """Of both splits, at most so many of each; a stand-in is of the train split."""
        if not self.known:
            return _at_most(self.stand_in, most_train)
        return _at_most(self.train or 0, most_train) + _at_most(self.test or 0, most_test)

    def held_out(self, most: int | None) -> int:
        """Of the test split."""
        return _at_most((self.test or 0) if self.known else self.stand_in, most)


def _at_most(number: int, most: int | None) -> int:
    return number if most is None else min(number, most)


@dataclass(frozen=True)
class Lot:
    """Sequences that an engine samples from one checkpoint, each of the greatest length."""

    who: str
    model: Architecture
    sequences: int | None
    """None where their number is not known before: they take memory and no time then."""
    prompts: int
    """Different prompts among them: vLLM reads one once for all its sequences."""
    prompt: int
    """Tokens of the longest prompt."""
    response: int
    call: int
    """Sequences that the stage hands to its engines at a time."""
    cut: bool = False
    """Whether ``top_p`` sorts the vocabulary for each token."""
    plain: bool = False
    """Whether transformers samples them wherever the engine is in the stage's own process."""

    @property
    def length(self) -> int:
        """Tokens of a whole sequence."""
        return self.prompt + self.response

    def flops(self, share: float = 1.0, shared_prompts: bool = True) -> float:
        """Operations of all of them, of ``share`` of the greatest length."""
        prompt, length = share * self.prompt, share * self.length
        read = forward_flops(self.model, prompt, prompt)
        whole = forward_flops(self.model, length, length, share * self.response)
        number = self.sequences or 0
        return (self.prompts if shared_prompts else number) * read + number * (whole - read)


@dataclass(frozen=True)
class Reading:
    """Passes without gradients over given rows, by a model that the stage itself loads, in float32 with autocast."""

    who: str
    model: Architecture
    length: int
    """Tokens of the longest row."""
    together: int
    """Tokens of a pass."""
    rows: int | None = None
    """None where their number, or how long they are, is not known before: they take memory and no time then."""
    words: int = 0
    """Tokens of a row that logits are made for; 0 for a reward model."""
    beside: tuple[Architecture, ...] = ()
    """Other policies that are there meanwhile."""

    def flops(self, share: float = 1.0) -> float:
        """Operations of all rows, of ``share`` of the greatest length."""
        length = share * self.length
        return (self.rows or 0) * forward_flops(self.model, length, length, share * self.words)


@dataclass(frozen=True)
class Inference:
    """One stage that samples or scores and does not learn."""

    precision: Precision
    lots: tuple[Lot, ...]
    readings: tuple[Reading, ...]
    row: str
    """What ``rows`` counts: ``prompts``."""
    rows: int
    """Those that are answered, or as many as are counted for."""
    known: bool
    """Whether ``rows`` comes from the data's record or the config, rather than from a stand-in."""
    elsewhere: str = ""
    """What other servers do, in words; it is not counted."""
    partly: bool = False
    """Whether something of it takes time that is not counted, as the notes say."""
    notes: tuple[str, ...] = ()

    @property
    def timed(self) -> bool:
        """Whether any of it takes time that is known."""
        return any(lot.sequences is not None for lot in self.lots) or any(one.rows is not None for one in self.readings)

    @property
    def models(self) -> tuple[Architecture, ...]:
        """All that sample or read, each once."""
        found = [*(lot.model for lot in self.lots), *(reading.model for reading in self.readings)]
        return tuple(dict.fromkeys([*found, *(model for one in self.readings for model in one.beside)]))


def scored(who: str, model: Architecture, rows: int | None, length: int) -> Reading:
    """Rows that a reward model scores."""
    return Reading(who, model, length, SCORED_AT_ONCE * length, rows)


def sampling_memory(
    lot: Lot, runtime: Runtime, precision: Precision, sequences: int, engine: str, gpu: bool
) -> dict[str, int]:
    """Bytes by part of one whole engine that decodes ``sequences`` at a time.

    ``runtime`` names the device and the engine, and servers none. Transformers reads the prompts of all sequences in
    one padded pass; vLLM so many tokens at a time, and on a CPU its cache is set aside whatever is sampled.
    """
    wanted = runtime.engine.dtype
    size = SIZES[precision if wanted == "auto" else wanted]
    weights, cache, _ = engine_memory(lot.model, runtime, precision=precision, sequences=sequences, length=lot.length)
    tokens = sequences * lot.prompt
    masks = 0
    if engine == "transformers":
        masks = (1 + size) * tokens * lot.prompt  # what each token of a padded prompt sees, and as it is added
    else:
        tokens = min(tokens, GPU_STEP_TOKENS if gpu else max(CPU_STEP_TOKENS, lot.length))
    return {
        "engine": weights,
        "kv_cache": cache,
        "activations": tokens * passing_per_token(lot.model, size, size) + masks,
        "logits": sequences * lot.model.vocabulary * _sampled_bytes(size, lot.cut),
    }


def _sampled_bytes(size: int, cut: bool) -> int:
    """Of one word of a token that is drawn: its logit, log-probability and probability, and a copy in blocks.

    With ``top_p`` before that: sorted values and their places, probabilities, their sums, and what was ahead.
    """
    return size + 3 * FLOAT if not cut else size + 5 * FLOAT + 8


def reading_memory(reading: Reading, precision: Precision) -> dict[str, int]:
    """Bytes by part while given rows are read."""
    model, size = reading.model, SIZES[precision]
    low, scores = precision == "bfloat16", not reading.words
    widest = max((linear.parameters for linear in model.linears), default=0)
    own = FLOAT * (model.trunk + model.hidden if scores else model.parameters)
    kept = round(reading.together * reading.words / reading.length)
    chunk = 3 * FLOAT * min(HEAD_ROWS, kept) * model.vocabulary  # in float32, scaled, and their sum's work space
    return {
        "reward" if scores else "weights": own,
        "reference": sum(FLOAT * other.parameters for other in reading.beside),
        "copies": 2 * max(widest, 0 if scores else model.head) if low else 0,
        "activations": reading.together * passing_per_token(model, size, FLOAT),
        "logits": 2 * size * kept * model.vocabulary + chunk,
    }
