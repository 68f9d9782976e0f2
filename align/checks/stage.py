"""A stage's checkpoints: those it is given, before anything is loaded, and the one it made, before it is published.

Called by the stage's process for every stage there is, so no stage can forget it. Left out: files that changed since
their record was written, which the runner finds first (``Store.problems``).
"""

from __future__ import annotations

from typing import Any

from align.checks.facts import facts_of, read_facts, template_text, token_ids, write_facts
from align.checks.faults import Fault, refuse
from align.checks.floor import below_floor
from align.checks.folder import ADAPTER, look
from align.checks.weights import read_tensors, weights_digest
from align.pipeline.context import StageContext
from align.store.artifacts import GENERATORS, Artifact, Kind

CHECKPOINTS = (*GENERATORS, Kind.REWARD)
TRAINED = (Kind.POLICY, Kind.REWARD)


def check_inputs(context: StageContext, makes: Kind | None) -> None:
    """Look at every checkpoint the stage is given. Raises ``UserError`` that names each fault.

    ``makes`` is the stage's kind of result: what is trained together must speak one template and one vocabulary.
    """
    given = checkpoints(context)
    faults: list[Fault] = []
    for _, artifact in given:
        # Weights that a stage of ours wrote were read for NaN before they were published.
        faults += look(artifact.model, artifact.kind == Kind.REWARD, values=read_facts(artifact.model) is None)
    if not faults and makes in TRAINED:
        faults = [*_unlike(context.config, given), *below_floor(context.config, given, context.warn)]
    refuse(context.name, faults, context.runtime.handover.waive)


def checkpoints(context: StageContext) -> list[tuple[str, Artifact]]:
    """Config field and artifact of every model among the inputs."""
    found = []
    for name, value in context.inputs.items():
        for artifact in value if isinstance(value, list) else [value]:
            if isinstance(artifact, Artifact) and artifact.kind in CHECKPOINTS:
                found.append((name, artifact))
    return found


def _unlike(config: Any, given: list[tuple[str, Artifact]]) -> list[Fault]:
    """Models whose token ids meet: all that write, and a reward model that the critic starts from."""
    meeting = [
        (field, artifact)
        for field, artifact in given
        if artifact.kind in GENERATORS or getattr(config, "critic_source", None) == "reward"
    ]
    if len(meeting) < 2:
        return []
    (first_field, first), rest = meeting[0], meeting[1:]
    faults = []
    for field, artifact in rest:
        pair = f"{field} ('{artifact.stage}') and {first_field} ('{first.stage}')"
        if token_ids(artifact.model) != token_ids(first.model):
            faults.append(Fault("tokenizer-changed", pair, "give tokens different ids"))
        elif template_text(artifact.model) != template_text(first.model):
            faults.append(Fault("template-changed", pair, "have different chat templates"))
    return faults


def check_made(context: StageContext, kind: str, makes: Kind | None, metrics: dict[str, Any]) -> None:
    """Look at the checkpoint that the stage made, and write down what it is.

    Raises ``UserError`` that names each fault; a score head that learned nothing is one.
    """
    folder = context.output / "model"
    if makes not in CHECKPOINTS or not folder.is_dir() or folder.is_symlink():
        return
    refuse(f"{context.name}, of its own result", look(folder, makes == Kind.REWARD), context.runtime.handover.waive)
    tensors = read_tensors(folder)
    if kind == "artifact" and read_facts(folder) is not None:
        return  # taken as it is, facts and all
    base = weights_digest(tensors) if (folder / ADAPTER).is_dir() else None
    write_facts(folder, facts_of(folder, kind, tensors, metrics, base))
    _note_base(context)


def _note_base(context: StageContext) -> None:
    """Beside the bare adapter that some stages keep: what it was trained on, for whoever merges it."""
    from align.checks.adapters import note_base

    folder = context.output / "adapter"
    sources = [artifact for _, artifact in checkpoints(context) if artifact.kind in GENERATORS]
    if folder.is_dir() and sources:
        note_base(folder, sources[0].model)
