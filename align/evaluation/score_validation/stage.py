"""Validation of a stage's score: the notes of the stage, the facts of its record, and the refusal. Torch-free."""

from __future__ import annotations

import ast
import contextlib
import statistics
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.config.scores import MetricFunction, RewardEntry, ScoreValidation
from align.config.user_functions import full_path, read_module
from align.config.verifiers import PROGRAMS, EnvironmentVerifier, VerifierFields
from align.data.rows import Row
from align.errors import UserError, shorten
from align.evaluation.score_validation.references import reference_of
from align.evaluation.score_validation.validation import (
    Validation,
    check_references,
    columns_of,
    refuse_problems,
    validate_parts,
)
from align.pipeline.context import StageContext
from align.scoring.score import Part, WeightedSum, open_entry
from align.scoring.verifiers import open_verifier
from align.verifiers.verdict import reference_value

REFERENCE_ROWS = 32
"""Rows whose references reward models score; few, because a model may be slow."""
PLANNED_ROWS = 200
"""Rows whose references a plan reads."""
PLANNED_SECONDS = 20.0
"""Time after which a plan no longer waits for a function of the user's."""
HEAVY = frozenset({"torch", "transformers", "vllm", "trl", "tensorflow", "jax", "sentence_transformers"})
"""Packages whose import alone takes longer than a plan."""


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
        parts = [part for part in parts if part.scorer.kind == "verifier"]
        if isinstance(verifier, EnvironmentVerifier) and verifier.criteria is None:
            parts = [*parts, Part(verifier.label, 1.0, open_verifier(verifier, "environment.score"))]
            columns.append(str(getattr(verifier, verifier.label)))
    if all(part.scorer.kind == "model" for part in parts):
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


# ---- reward models ----


@dataclass(frozen=True)
class ReferenceScores:
    """Scores of the reference answers of some rows, and of an empty answer to each."""

    answers: list[str]
    scores: list[float]
    empty_scores: list[float]

    @property
    def mean(self) -> float:
        """Mean score of the references."""
        return statistics.fmean(self.scores)

    def describe(self) -> str:
        """Return a sentence for the stage's notes."""
        empty = statistics.fmean(self.empty_scores)
        return (
            f"the reference answers of {len(self.scores)} rows score {self.mean:.3g} on average "
            f"({min(self.scores):.3g} to {max(self.scores):.3g}), empty answers {empty:.3g}"
        )

    def warning(self) -> str | None:
        """Return a warning if the reward gives references and empty answers one and the same score, else None."""
        if len({*self.scores, *self.empty_scores}) > 1:
            return None
        return (
            f"the reward model scores {self.scores[0]:g} for every reference answer and for an empty one, so it cannot "
            f"tell a right answer. Example: reference {shorten(repr(self.answers[0]))}. Train it again"
        )


def note_reference_scores(context: StageContext, scorer: WeightedSum | None, rows: Sequence[Row]) -> dict[str, float]:
    """Note how the reward models score the rows' references, and return the mean; warn if they reject them all.

    Nothing is scored in episodes, of which a reward model reads only the last turn.
    """
    scored = None
    if scorer is not None and context.config.environment is None:
        scored = score_references(scorer, rows)
    if scored is None:
        return {}
    context.note(f"{context.name}: {scored.describe()}")
    warning = scored.warning()
    if warning is not None:
        context.warn(f"{context.name}: {warning}.")
    return {"reference_score": scored.mean}


def score_references(scorer: WeightedSum, rows: Sequence[Row]) -> ReferenceScores | None:
    """Score the references of the first rows that have one; None without any, and without a reward model."""
    models = replace(scorer, parts=tuple(part for part in scorer.parts if part.scorer.kind == "model"))
    references = [(row, reference_of(row)) for row in rows]
    referenced = [(row, answer) for row, answer in references if answer is not None][:REFERENCE_ROWS]
    if not models.parts or not referenced:
        return None
    scored_rows = [row for row, _ in referenced]
    answers = [answer for _, answer in referenced]
    are_finished = [False] * len(answers)
    return ReferenceScores(
        answers,
        models.score(scored_rows, answers, are_finished).total,
        models.score(scored_rows, [""] * len(answers), are_finished).total,
    )


# ---- plans ----


def check_planned_references(config: Any, rows: Sequence[Row], place: str, are_final: bool) -> None:
    """Read the references of the verifiers of a planned stage: of ``score``, ``metrics`` and ``environment``.

    Programs are not run. ``are_final`` is False for rows that a recipe's steps may still change or drop: then a problem
    counts only if all rows have it. Raises ``UserError``, which begins with ``place``, as the stage would.
    """
    for where, entry in _planned_verifiers(config, place):
        kind = str(entry.verifier)
        column = getattr(entry, kind)
        if kind == "regex" or not isinstance(column, str):
            continue
        names = ("instruction_id_list", "kwargs") if column == "instruction_id_list" else (column,)
        problems = [_missing(row, names, f"{where}.{kind}") for row in rows]
        present = [row for row, problem in zip(rows, problems, strict=True) if problem is None]
        missing = next((problem for problem in problems if problem is not None), None)
        if missing is not None and (are_final or not present):
            raise missing
        if kind in PROGRAMS and kind != "code":
            _check_readable(entry, present[:PLANNED_ROWS], where, are_final)


def _planned_verifiers(config: Any, place: str) -> list[tuple[str, VerifierFields]]:
    entries: list[tuple[str, VerifierFields]] = []
    for field in ("score", "metrics"):
        value = getattr(config, field, None)
        for index, entry in enumerate(value if isinstance(value, list) else ()):
            if isinstance(entry, RewardEntry | MetricFunction) and entry.verifier is not None:
                entries.append((f"{place}.{field}[{index}]", entry))
    verifier = getattr(getattr(config, "environment", None), "score", None)
    return [*entries, (f"{place}.environment.score", verifier)] if isinstance(verifier, VerifierFields) else entries


def _missing(row: Row, columns: Sequence[str], place: str) -> UserError | None:
    try:
        for column in columns:
            reference_value(row, column, place)
    except UserError as error:
        return error
    return None


def _check_readable(entry: VerifierFields, rows: Sequence[Row], place: str, are_final: bool) -> None:
    scorer = open_verifier(entry, place)
    try:
        scorer.check_references(rows)
    except UserError:
        for row in () if are_final else rows:
            with contextlib.suppress(UserError):
                scorer.check_references([row])
                return
        raise


def validate_planned_score(config: Any, rows: Sequence[Row], place: str) -> list[str] | None:
    """Validate the score of a planned stage as the stage will, if its parts take no longer than a plan may.

    Returns notes; None for a score that only the stage validates, because a judge, a reward model, a program of
    ``code``, an async function or a slow import has a part in it. Raises ``UserError``, which begins with ``place``, as
    the stage would.
    """
    entries = [RewardEntry(function=config.score)] if isinstance(config.score, str) else config.score
    if not all(_is_cheap(entry, place) for entry in entries):
        return None
    outcome: list[Validation | BaseException] = []

    def work() -> None:
        try:
            # A failing call is not repeated: its pauses belong to the stage.
            once = [entry.model_copy(update={"retries": 0}) for entry in entries]
            parts = [
                Part(entry.label, entry.weight, open_entry(entry, f"score[{index}]"))
                for index, entry in enumerate(once)
            ]
            if any(part.scorer.waits for part in parts):
                return
            columns = columns_of(config.score)
            decides_sum = not getattr(config, "reward", None)
            settings: ScoreValidation = config.score_validation
            outcome.append(validate_parts(parts, rows, settings, place=place, columns=columns, decides_sum=decides_sum))
        except BaseException as error:
            outcome.append(error)

    # A thread that ends with the process: a function that hangs must not hold up the plan.
    thread = threading.Thread(target=work, name="planned-score", daemon=True)
    with contextlib.redirect_stdout(sys.stderr):
        thread.start()
        thread.join(PLANNED_SECONDS)
    if not outcome:
        return None
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    refuse_problems(outcome[0], place)
    return outcome[0].notes


def _is_cheap(entry: RewardEntry, place: str) -> bool:
    """Return True for a verifier that starts no program, and for a function whose module imports nothing heavy."""
    if entry.verifier is not None:
        return entry.verifier in PROGRAMS and entry.verifier != "code"
    if entry.function is None:
        return False
    tree = read_module(full_path(entry.function, place).partition(":")[0], entry.function, place)
    return tree is not None and not _imported(tree) & HEAVY


def _imported(tree: ast.Module) -> set[str]:
    """Return the packages that a module imports, also inside its functions."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.partition(".")[0])
    return names
