"""Validation of a stage's score: the notes of the stage, the facts of its record, and the refusal. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.config.scores import ScoreValidation
from align.config.verifiers import EnvironmentVerifier
from align.data.rows import Row
from align.data.scoring import Part
from align.evaluation.score_validation.probing import kind_of
from align.evaluation.score_validation.validation import (
    Validation,
    check_references,
    columns_of,
    refuse_problems,
    validate_parts,
)
from align.pipeline.context import StageContext
from align.verifiers.scorer import open_verifier


def validate_stage_score(
    context: StageContext, parts: Sequence[Part], rows: Sequence[Row], held_out: Sequence[Row] = ()
) -> dict[str, Any]:
    """Validate the score of a stage that learns from it, and return facts for the record.

    In episodes only verifiers are validated, since other rewards may read what a single answer lacks.

    Args:
        context: The stage's context, whose config has ``score_validation``.
        parts: Rewards of ``score`` with their weights. Reward models among them are not loaded.
        rows: Rows whose prompts the policy answers.
        held_out: Rows that the stage only measures on. Their references are also read.

    Raises:
        UserError: The score fails a check, a function fails at an answer, or a verifier cannot use a reference.
    """
    config: Any = context.config
    settings: ScoreValidation = config.score_validation
    columns = columns_of(config.score)
    if config.environment is not None:
        verifier = config.environment.score
        parts = [part for part in parts if kind_of(part) == "verifier"]
        if isinstance(verifier, EnvironmentVerifier) and verifier.criteria is None:
            parts = [*parts, Part(verifier.label, 1.0, open_verifier(verifier, "environment.score"))]
            columns.append(str(getattr(verifier, verifier.label)))
    if all(kind_of(part) == "model" for part in parts):
        return {}
    context.phase("validating the score")
    check_references(parts, [*rows, *held_out])
    decides_sum = config.environment is None and not config.reward
    validation = validate_parts(parts, rows, settings, place=context.name, columns=columns, decides_sum=decides_sum)
    for line in validation.lines():
        context.note(f"{context.name}: {line}")
    refuse_problems(validation, context.name)
    return _facts(validation)


def _facts(validation: Validation) -> dict[str, Any]:
    """Return the reports, and the mean score of the references if all of the score was validated."""
    if not validation.reports:
        return {}
    facts: dict[str, Any] = {"score_validation": validation.to_json()}
    if validation.is_complete:
        facts["reference_score"] = validation.reports[-1].means()["reference"]
    return facts
