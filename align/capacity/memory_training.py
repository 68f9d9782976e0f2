"""What a stage that trains with trl costs in memory and in work, from its config alone. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from align.capacity.job import Job, Setting, Work
from align.capacity.memory import Choice, Estimate, Memory, copied, engine_of, model_bytes
from align.config.runtime import Runtime
from align.config.tuning import FullTuning, LoraTuning, LowRank, TuningBase
from align.models.activations import FLOAT, SIZES, activations_of_layer, activations_per_token
from align.models.architecture import Architecture, UnknownArchitecture
from align.models.flops import forward_flops, learning_flops

if TYPE_CHECKING:
    from align.config.stages.training import TrainingFields
    from align.models.precision import Precision

TRAINED_FIELDS = ("model", "policy", "student")
"""Input fields that name what is trained."""
SCORED_TOKENS = 4096
"""Padded tokens of a pass without gradients (``align.training.trainers.SCORING_TOKENS``)."""
TILE = (4096, 32768)
"""Tokens and words whose logits trl's fused head has at a time."""

Models = Mapping[str, Sequence[Architecture]]


def trained_model(models: Models) -> Architecture:
    """The architecture that is trained; ``UnknownArchitecture`` where the config names none."""
    field = next((name for name in TRAINED_FIELDS if models.get(name)), None)
    if field is None:
        raise UnknownArchitecture("the config names no checkpoint that is trained")
    return models[field][0]


def estimate(config: TrainingFields, models: Models, runtime: Runtime) -> Estimate:
    """The chosen tuning, and full tuning and LoRA beside it; ``models`` as for ``TrainingFields.memory``."""
    model = trained_model(models)
    others: tuple[TuningBase, ...] = (FullTuning(), LoraTuning())
    tunings = [config.tuning, *(other for other in others if other.method != config.tuning.method)]
    setting = _as_configured(config, runtime)
    choices = tuple(
        Choice({"tuning": tuning.label}, training_memory(config, models, tuning, setting), tuning is config.tuning)
        for tuning in tunings
    )
    return Estimate(model.parameters, choices, tuple(_notes(config)))


def _as_configured(config: TrainingFields, runtime: Runtime) -> Setting:
    return Setting(
        config.micro_batch,
        accumulated=config.batch_size > config.micro_batch,
        checkpointing=config.gradient_checkpointing,
        gpu=engine_of(runtime)[1],
    )


def training_memory(config: TrainingFields, models: Models, tuning: TuningBase, setting: Setting) -> Memory:
    """Of one process. A reward model has a score head in the place of its vocabulary head."""
    model = trained_model(models)
    scores = not config.has_vocabulary
    weights = model_bytes(model, tuning)
    if scores and not model.tied:
        weights -= FLOAT * model.head
    head = model.hidden if scores else 0
    if tuning.trains_all:
        added, trained = head, (model.trunk if scores else model.parameters) + head
    else:
        added = trained = model.adapters(tuning, "trunk" if scores else "model") + head
    low, learned = config.precision == "bfloat16", rows_to_tokens(config, setting.rows)
    kept = {"low_residual": False, "checkpointing": setting.checkpointing}
    return Memory(
        weights=weights + FLOAT * added,
        gradients=FLOAT * trained,
        optimizer=2 * FLOAT * trained,
        reference=_beside(config, models, trained),
        copies=_copies(model, tuning, setting.checkpointing) if low else 0,
        logits=0 if scores else _learning_logits(model, learned, config.precision, tuning.trains_all, setting.gpu),
        scoring=_scoring(config, models, tuning, setting.gpu),
        saving=_saving(config, model, tuning, setting.gpu),
        activations=activations_per_token(model, tuning, config.precision, **kept),
        accumulated=setting.accumulated,
    )


def _copies(model: Architecture, tuning: TuningBase, checkpointing: bool) -> int:
    """Bytes of float32 matrices in bfloat16."""
    return 0 if tuning.method == "qlora" else 2 * copied(model, tuning, checkpointing)


def rows_to_tokens(config: TrainingFields, rows: int) -> int:
    """Tokens of ``rows`` rows of the greatest length; a pair is two."""
    return rows * config.sides * config.max_length


def _beside(config: TrainingFields, models: Models, trained: int) -> int:
    """Bytes of a moving average, of the start that an anchor pulls towards, and of a teacher that stays."""
    copies = (config.ema is not None) + (config.anchor is not None and config.anchor.to == "l2")
    teachers = models.get("teacher", ()) if getattr(config, "top_k", None) is None else ()
    return copies * FLOAT * trained + sum(FLOAT * teacher.parameters for teacher in teachers)


def _learning_logits(model: Architecture, tokens: int, precision: Precision, trained: bool, gpu: bool) -> int:
    """Work space of trl's fused head in its backward pass (``trl.kernels.chunked_logprob``).

    All tokens are taken to have a label. On a GPU a tile becomes its own gradient in place; elsewhere torch makes eight
    more of it, the logits, their log-probabilities, probabilities, gradients, the targets among them, in float32.
    """
    size, width = SIZES[precision], min(model.vocabulary, TILE[1])
    tile = min(tokens, TILE[0]) * width
    words = width * model.hidden
    summed = FLOAT * (tokens * model.hidden + (model.head if trained else 0))
    part = (size if precision == "bfloat16" else 0) * words
    widened = FLOAT * (tile + words) if precision == "bfloat16" else 0
    return size * tile + part + summed + (widened if gpu else max(29 * tile, widened))


def _scoring(config: TrainingFields, models: Models, tuning: TuningBase, gpu: bool) -> int:
    """Work space of a pass over held-out rows: of the vocabulary, or of one layer where there is none.

    A ``reference`` that is another model is there while it scores the rows.
    """
    model = trained_model(models)
    size = SIZES[config.precision]
    other = sum(FLOAT * reference.parameters for reference in models.get("reference", ()))
    tokens = min(SCORED_TOKENS, rows_to_tokens(config, config.eval_rows))
    if not config.has_vocabulary:
        return tokens * (activations_of_layer(model, tuning, config.precision, False, True) or 0)
    tile = tokens * min(model.vocabulary, TILE[1])
    return other + (size if gpu else size + 3 * FLOAT) * tile + FLOAT * tokens * model.hidden


def _saving(config: TrainingFields, model: Architecture, tuning: TuningBase, gpu: bool) -> int:
    """Matrices with their adapters folded in, all at once; a reward model is read back once these are gone."""
    folded = FLOAT * model.matrices if isinstance(tuning, LowRank) and not gpu else 0
    return folded if config.has_vocabulary else max(folded, FLOAT * model.trunk)


def job(config: TrainingFields, models: Models, runtime: Runtime | None) -> Job:
    """What the stage asks of devices."""
    model, tuning = trained_model(models), config.tuning
    trained = training_memory(config, models, tuning, Setting(1)).gradients // FLOAT

    def work(share: float) -> Work:
        length = share * config.max_length
        tokens = config.sides * length
        head = tokens if config.has_vocabulary else 0.0
        forward = forward_flops(model, tokens, length, head)
        others = models.get("teacher", ()) or (model,) * config.refers
        reference = sum(forward_flops(other, tokens, length, head) for other in others)
        return Work(learning_flops(model, tuning, tokens, length, head), forward, reference, tokens)

    def rows(given: int | None) -> int | None:
        most = None if config.max_steps is None else config.max_steps * config.batch_size
        if given is None:
            return most
        given = given if config.max_rows is None else min(given, config.max_rows)
        learned = math.ceil(given * config.epochs)
        return learned if most is None else min(learned, most)

    return Job(
        model=model,
        tuning=tuning,
        precision=config.precision,
        batch=config.batch_size,
        micro_batch=config.micro_batch,
        row="pairs" if config.sides == 2 else "rows",
        tokens=lambda count: rows_to_tokens(config, count),
        memory=lambda setting: training_memory(config, models, tuning, setting),
        work=work,
        rows=rows,
        steps=lambda count: math.ceil(count / config.batch_size),
        trained=trained,
        gathered=model.parameters,
        checkpointing=config.gradient_checkpointing,
        notes=tuple(_notes(config)[2:]),
    )


def _notes(config: TrainingFields) -> list[str]:
    tuning = config.tuning
    notes = [
        f"+: activations of a micro-batch, here {config.micro_batch} rows of up to {config.max_length} tokens, padded.",
        "Not counted: Python and its libraries (about 0.6 GiB).",
        *(["Every token is taken to have a label."] if config.has_vocabulary else []),
    ]
    if isinstance(tuning, FullTuning) and (tuning.freeze or tuning.scheduled):
        notes.append("freeze, unfreeze, lisa: gradients and AdamW's state of what is open, at most what is counted.")
    if "optim" in config.trainer:
        notes.append(f"AdamW's state is counted; optim {config.trainer['optim']} may need another amount.")
    return notes
