"""Rows from a set of annotations: preferences with margins, labeled answers, and rewritten answers.

A pair's value is the mean of its annotators' first verdicts, from 2 (``a`` is much better) to -2. Its sign decides
which answer is chosen, and its size is the margin. Each record has the verdicts of one pair, so the ledger counts why a
pair makes no row: a tie, two bad answers, annotators that disagree, a gold question.
"""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from align.config.recipe.source_settings import AnnotationsSource
from align.config.user_paths import user_path
from align.data.rows import Dropped, Row, assistant
from align.errors import UserError
from align.store.annotations import AnnotationSet, Answer, Pair, find_set

ANNOTATION = "_annotation"
"""Field of a record with the verdicts of one pair."""
DEFAULT_STORE = "store"


def annotation_set(source: AnnotationsSource, base: Path) -> AnnotationSet:
    """Return the set that a source names. Raises ``UserError`` if there is none."""
    word = source.store or os.environ.get("ALIGN_STORE") or DEFAULT_STORE
    # An address of a bucket names no folder.
    folder = DEFAULT_STORE if "://" in word else word
    return find_set(user_path(folder, base), source.set)


def annotation_identity(source: AnnotationsSource, base: Path) -> dict[str, str]:
    """Return the digest of the set's pairs and journal."""
    return {f"annotations {source.set}": annotation_set(source, base).content_digest()}


def annotation_ledger(source: AnnotationsSource, base: Path) -> dict[str, Any]:
    """Return who answered and when, by pseudonym, for the ledger of a build."""
    lines = annotation_set(source, base).ledger()
    return {name: line for name, line in lines.items() if source.annotators is None or name in source.annotators}


def read_annotations(source: AnnotationsSource, base: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a record for each pair with an answer.

    Raises ``UserError`` for a set without answers, and for an annotator who has none.
    """
    annotations = annotation_set(source, base)
    answers = annotations.answers()
    for name in source.annotators or ():
        if not any(answer.annotator == name for answer in answers):
            names = ", ".join(annotations.annotators()) or "nobody"
            raise UserError(f"{source.label}: there are no answers of '{name}'; answers are by {names}.")
    # An annotator's first answer to a pair counts. Hidden repeats only measure consistency.
    by_pair: dict[str, dict[str, Answer]] = {}
    for answer in answers:
        is_selected = source.annotators is None or answer.annotator in source.annotators
        if is_selected and not answer.repeat:
            by_pair.setdefault(answer.pair, {}).setdefault(answer.annotator, answer)
    if not by_pair:
        raise UserError(f"{source.label}: has no answers yet; `align annotate {source.set} --name NAME` collects them.")
    pairs = annotations.pairs()
    for number, name in enumerate(sorted(by_pair.keys() & pairs.keys()), start=1):
        verdicts = [by_pair[name][annotator].model_dump() for annotator in sorted(by_pair[name])]
        record = {"prompt": pairs[name].prompt, ANNOTATION: {"pair": pairs[name].model_dump(), "answers": verdicts}}
        yield f"{source.label}: pair {number} ({name})", record


def annotated_drafts(record: dict[str, Any], kind: str) -> list[Row | Dropped]:
    """Return the rows of ``kind`` that the verdicts on a pair give, or the reason why there are none."""
    pair = Pair.model_validate(record[ANNOTATION]["pair"])
    answers = [Answer.model_validate(fields) for fields in record[ANNOTATION]["answers"]]
    row: Row = {"prompt": pair.prompt, "checks": ""}
    if pair.tools:
        row["tools"] = pair.tools
    if kind == "prompts":
        return [row]
    if pair.gold is not None:
        return [Dropped("a gold question")]
    if kind == "instructions":
        rewrites = [answer.rewrite for answer in answers if answer.rewrite.strip()]
        rows: list[Row | Dropped] = [{**row, "completion": [assistant(text)]} for text in dict.fromkeys(rewrites)]
        return rows or [Dropped("no rewritten answer")]
    if kind == "unpaired" and 2 * sum(answer.verdict == "both_bad" for answer in answers) > len(answers):
        return [{**row, "completion": [assistant(text)], "label": False} for text in (pair.a, pair.b)]
    # For kind ``unpaired`` the caller makes two labeled rows of a pair.
    return [_compare(pair, answers, row)]


def _compare(pair: Pair, answers: Sequence[Answer], row: Row) -> Row | Dropped:
    value = statistics.fmean(answer.value for answer in answers)
    if value == 0:
        return _undecided(answers)
    chosen = pair.a if value > 0 else pair.b
    rejected = pair.b if value > 0 else pair.a
    scores = {"chosen_score": abs(value), "rejected_score": 0.0}
    return {**row, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], **scores}


def _undecided(answers: Sequence[Answer]) -> Dropped:
    verdicts = Counter(answer.verdict for answer in answers)
    detail = {"verdicts": dict(verdicts)}
    if set(verdicts) == {"both_bad"}:
        return Dropped("both answers are bad", detail)
    if set(verdicts) <= {"tie", "both_bad"}:
        return Dropped("a tie", detail)
    return Dropped("annotators disagree", detail)
