"""Check a stage's input checkpoints before anything is loaded, and its own before it is published.

The stage's process calls this for every stage. Left out: files that changed since their record was written, which the
runner finds first (``Store.problems``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from align.checks.facts import facts_of, read_facts, template_text, token_ids, write_base_digest, write_facts
from align.checks.faults import Fault, refuse
from align.checks.folder import ADAPTER, check_folder
from align.checks.weights import read_tensors, weights_digest
from align.config.stages.continue_from import CONTINUE
from align.evaluation.statistics import wilson
from align.pipeline.context import StageContext
from align.store.artifacts import GENERATORS, Artifact, Kind

CHECKPOINTS = (*GENERATORS, Kind.REWARD)
TRAINED = (Kind.POLICY, Kind.REWARD)


def check_inputs(context: StageContext, makes: Kind | None) -> None:
    """Check every input checkpoint of the stage. Raises ``UserError`` that names each fault.

    ``makes`` is the stage's kind of result: models that are trained together need one template and one vocabulary.
    """
    models = input_checkpoints(context)
    faults: list[Fault] = []
    for _, artifact in models:
        # Most weights were checked for NaN before they were published.
        facts = read_facts(artifact.model)
        is_verified = facts is not None and facts.finite
        faults += check_folder(artifact.model, artifact.kind == Kind.REWARD, values=not is_verified)
    if not faults and makes in TRAINED:
        faults = [*_unlike(context.config, models), *below_floor(context.config, models, context.warn)]
    refuse(context.name, faults, context.runtime.handover.waive)


def input_checkpoints(context: StageContext) -> list[tuple[str, Artifact]]:
    """Return config field and artifact of every model among the inputs.

    Left out is the stage that this one continues, of which only the trainer's state is read.
    """
    models = []
    for name, value in context.inputs.items():
        if name == CONTINUE:
            continue
        for artifact in value if isinstance(value, list) else [value]:
            if isinstance(artifact, Artifact) and artifact.kind in CHECKPOINTS:
                models.append((name, artifact))
    return models


def _unlike(config: Any, models: list[tuple[str, Artifact]]) -> list[Fault]:
    """Return faults of models whose token ids are combined: all generators, and a reward model that starts a critic."""
    critic = getattr(config, "critic_source", None)
    combined = [
        (field, artifact)
        for field, artifact in models
        if artifact.kind in GENERATORS or (critic == "reward" and not field.startswith("score."))
    ]
    if len(combined) < 2:
        return []
    # Compare all models with the first one.
    (first_field, first), rest = combined[0], combined[1:]
    faults = []
    for field, artifact in rest:
        fields = f"{field} ('{artifact.stage}') and {first_field} ('{first.stage}')"
        if token_ids(artifact.model) != token_ids(first.model):
            faults.append(Fault("tokenizer-changed", fields, "give tokens different ids"))
        elif template_text(artifact.model) != template_text(first.model):
            faults.append(Fault("template-changed", fields, "have different chat templates"))
    return faults


def check_output(context: StageContext, kind: str, makes: Kind | None, metrics: dict[str, Any]) -> None:
    """Check the stage's own checkpoint and record its facts.

    Raises ``UserError`` that names each fault, such as a score head of zeros.
    """
    folder = context.output / "model"
    if makes not in CHECKPOINTS or not folder.is_dir() or folder.is_symlink():
        return
    faults = check_folder(folder, makes == Kind.REWARD)
    refuse(f"{context.name}, of its own result", faults, context.runtime.handover.waive)
    # After the checks, so that nothing is recorded of a checkpoint with faults that were not waived.
    tensors = read_tensors(folder)
    if kind == "artifact" and read_facts(folder) is not None:
        return  # an imported artifact keeps its facts
    base = weights_digest(tensors) if (folder / ADAPTER).is_dir() else None
    write_facts(folder, facts_of(folder, kind, tensors, metrics, verified=not faults, adapter_base=base))
    _record_base(context)


def _record_base(context: StageContext) -> None:
    """Record the base of the bare adapter that some stages write, to be checked when it is merged."""
    folder = context.output / "adapter"
    sources = [artifact for _, artifact in input_checkpoints(context) if artifact.kind in GENERATORS]
    if folder.is_dir() and sources:
        write_base_digest(folder, sources[0].model)


def below_floor(config: Any, models: list[tuple[str, Artifact]], warn: Callable[[str], None]) -> list[Fault]:
    """Return reward models whose 95 % interval (Wilson) on held-out pairs is not above ``config.reward_floor``.

    A policy follows whatever a reward model prefers, also when that is noise. A config without that field uses no
    reward model. A reward model without a recorded accuracy causes a warning.
    """
    floor = getattr(config, "reward_floor", None)
    if floor is None:
        return []
    faults = []
    for field, artifact in models:
        if artifact.kind != Kind.REWARD:
            continue
        facts = read_facts(artifact.model)
        if facts is None or facts.accuracy is None or not facts.pairs:
            warn(
                f"reward_floor is {floor:g}, and no accuracy of '{artifact.stage}' on held-out pairs is recorded; "
                "an evaluate stage with `pairs` measures it."
            )
            continue
        # The interval, not the estimate, must be above the floor: few pairs prove little.
        estimate = wilson(facts.accuracy * facts.pairs, facts.pairs)
        if estimate.low <= floor:
            problem = (
                f"('{artifact.stage}') orders {facts.accuracy:.3f} of {facts.pairs} held-out pairs as labeled, "
                f"interval [{estimate.low:.3f}, {estimate.high:.3f}], which is not above reward_floor {floor:g}"
            )
            faults.append(Fault("reward-floor", field, problem))
    return faults
