"""What a stage that trains with trl costs in memory, for each tuning, from its config alone. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from align.models.architecture import Architecture, UnknownArchitecture
from align.models.memory import FLOAT, Choice, Estimate, Memory, activations_per_token, model_bytes
from align.tuning import FullTuning, LoraTuning, TuningBase

if TYPE_CHECKING:
    from align.training.config import TrainingFields

TRAINED_FIELDS = ("model", "policy", "student")
"""Input fields that name what is trained."""


def estimate(config: TrainingFields, models: Mapping[str, Sequence[Architecture]]) -> Estimate:
    """The chosen tuning, and full tuning and LoRA beside it; ``models`` as for ``TrainingFields.memory``."""
    field = next((name for name in TRAINED_FIELDS if models.get(name)), None)
    if field is None:
        raise UnknownArchitecture("the config names no checkpoint that is trained")
    model = models[field][0]
    others: tuple[TuningBase, ...] = (FullTuning(), LoraTuning())
    tunings = [config.tuning, *(other for other in others if other.method != config.tuning.method)]
    choices = tuple(
        Choice({"tuning": tuning.label}, training_memory(config, model, tuning), tuning is config.tuning)
        for tuning in tunings
    )
    return Estimate(model.parameters, choices, tuple(_notes(config)))


def training_memory(config: TrainingFields, model: Architecture, tuning: TuningBase) -> Memory:
    """Of one process. A reward model has a score head in the place of its vocabulary head."""
    scores = not config.has_vocabulary
    weights = model_bytes(model, tuning)
    if scores and not model.tied:
        weights -= FLOAT * model.head
    head = model.hidden if scores else 0
    if tuning.trains_all:
        added, trained = head, (model.trunk if scores else model.parameters) + head
    else:
        added = trained = model.adapters(tuning, "trunk" if scores else "model") + head
    quantised = tuning.method == "qlora"
    matrices = (0 if quantised else model.matrices) + (0 if scores else model.head)
    return Memory(
        weights=weights + FLOAT * added,
        gradients=FLOAT * trained,
        optimizer=2 * FLOAT * trained,
        copies=2 * matrices if config.precision == "bfloat16" else 0,
        activations=activations_per_token(model, tuning, config.precision, low_residual=False),
    )


def _notes(config: TrainingFields) -> list[str]:
    tuning = config.tuning
    notes = [
        f"+: activations of a micro-batch, here {config.micro_batch} rows of up to {config.max_length} tokens, padded.",
        "Not counted: Python and its libraries (about 0.6 GiB), a chunk of logits, scratch space of kernels.",
    ]
    if isinstance(tuning, FullTuning) and (tuning.freeze or tuning.scheduled):
        notes.append("freeze, unfreeze, lisa: gradients and AdamW's state of what is open, at most what is counted.")
    if config.trainer.get("gradient_checkpointing"):
        notes.append("gradient_checkpointing: far fewer activations than counted here.")
    if "optim" in config.trainer:
        notes.append(f"AdamW's state is counted; optim {config.trainer['optim']} may need another amount.")
    return notes
