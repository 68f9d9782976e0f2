"""Lint what a trainer is about to see: in a training stage before its first step, or in a script with trl's."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.config.stages.lint import MOST_ROWS, LintSettings
from align.data.rows import Row
from align.errors import UserError
from align.lint.batches import Collator
from align.lint.embeddings import check_embeddings
from align.lint.findings import Finding, Findings
from align.lint.labels import Supervise
from align.lint.linter import Linter, Options, StageKind
from align.lint.tokens import Limits
from align.pipeline.context import StageContext
from align.training.rows import Encoded

FILE = "findings.json"
KINDS: dict[str, StageKind] = {
    "SFTTrainer": "sft", "DPOTrainer": "dpo", "RewardTrainer": "reward", "KTOTrainer": "kto",
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """A split as read, and what became of it (None for prompts, which the linter renders as the stage does)."""

    rows: Sequence[Row]
    encoded: Encoded | None = None


def limits_of(model: Any, max_length: int | None) -> Limits:
    """Sizes of a loaded model."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    embeddings = model.get_input_embeddings().weight.shape[0]
    return Limits(max_length, context if isinstance(context, int) else None, int(embeddings))


def ends_of(model: Any) -> frozenset[int]:
    """The ids at which the model's generation config stops."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset() if ends is None else frozenset(ends if isinstance(ends, list) else [int(ends)])


def lint_stage(
    context: StageContext,
    stage: StageKind,
    trainer: Any,
    splits: Mapping[str, Split],
    max_length: int,
    supervise: Supervise = "last",
) -> list[Finding]:
    """Look at ``splits`` through the trainer's own dataset and collator, write ``findings.json``, and warn.

    Raises ``UserError`` for errors that the stage's ``lint.waive`` does not name.
    """
    began = time.perf_counter()
    linter = _linter(context, stage, trainer.processing_class, trainer.model, max_length, supervise)
    check_embeddings(trainer.model, linter.dialect, linter.found)
    for name, split in splits.items():
        _look(linter, name, split, trainer.train_dataset if name == "train" else None, trainer.data_collator)
    return _report(context, linter, began)


def lint_prompts(
    context: StageContext, tokenizer: Any, model: Any, splits: Mapping[str, Split], max_length: int
) -> list[Finding]:
    """The same for prompts of at most ``max_length`` tokens, which ``model`` will answer."""
    began = time.perf_counter()
    linter = _linter(context, "prompts", tokenizer, model, max_length)
    for name, split in splits.items():
        linter.look(name, split.rows, None)
    return _report(context, linter, began)


def _linter(
    context: StageContext,
    stage: StageKind,
    tokenizer: Any,
    model: Any,
    max_length: int,
    supervise: Supervise = "last",
) -> Linter:
    settings: LintSettings = context.config.lint
    limits, ends = limits_of(model, max_length), ends_of(model)
    return Linter(tokenizer, Options(stage, limits, supervise, ends, settings.rows, context.seed % 2**32))


def _report(context: StageContext, linter: Linter, began: float) -> list[Finding]:
    """Write and say what was found, and refuse what must not be trained on."""
    findings = linter.result(context.config.lint.waive)
    if int(os.environ.get("RANK", "0")) == 0:
        seconds = round(time.perf_counter() - began, 2)
        looked = {name: {"rows": some, "of": all_} for name, (some, all_) in linter.totals.items()}
        report = {"looked_at": looked, "seconds": seconds, "findings": [finding.to_json() for finding in findings]}
        text = json.dumps(report, indent=1, ensure_ascii=True)
        (context.output / FILE).write_text(text + "\n", encoding="utf-8")
        _say(context, findings, linter, seconds)
    refuse(context.name, findings)
    return findings


def _look(linter: Linter, name: str, split: Split, dataset: Any, collator: Collator) -> None:
    assert split.encoded is not None
    at = {id(row): number for number, row in enumerate(split.encoded.sources)}
    kept: Any = split.encoded.rows if dataset is None else dataset

    def prepared(number: int) -> dict[str, Any] | None:
        found = at.get(id(split.rows[number]))
        return None if found is None else dict(kept[found])

    linter.look(name, split.rows, collator, prepared)


def _say(context: StageContext, findings: Sequence[Finding], linter: Linter, seconds: float) -> None:
    looked = ", ".join(
        f"{name} {some}" + (f" of {all_} rows, drawn by the seed" if some < all_ else f" of {all_} rows")
        for name, (some, all_) in linter.totals.items()
    )
    print(f"lint: {looked}: {len(findings)} kinds of finding in {seconds} s")
    for finding in findings:
        print("\n".join(finding.lines()))
        # A waiver silences a warning; that an error was waived is worth a warning itself.
        if finding.waived == (finding.severity == "error") and finding.severity != "note" and not finding.counted:
            context.warn(f"{context.name}: {finding.headline()} See {FILE}.")


def refuse(name: str, findings: Sequence[Finding]) -> None:
    """``UserError`` for errors that are not waived."""
    errors = [finding for finding in findings if finding.severity == "error" and not finding.waived]
    if not errors:
        return
    lines = [line for finding in errors for line in finding.lines()]
    names = ", ".join(finding.name for finding in errors)
    raise UserError(
        "\n".join([
            f"{name}: the rows would teach something wrong; nothing was trained.",
            *lines,
            f"What is meant can be waived, in the stage: `lint: {{waive: [{names}]}}` (docs/lint.md).",
        ])
    )  # fmt: skip


def lint_trainer(
    trainer: Any,
    rows: Sequence[Row] | None = None,
    supervise: Supervise | None = None,
    most_rows: int | None = MOST_ROWS,
    seed: int = 0,
) -> list[Finding]:
    """Lint the training set of a trl ``SFTTrainer``, ``DPOTrainer`` or ``RewardTrainer``, before ``trainer.train()``.

    ``rows`` are those the dataset was made from, in its order (``prompt`` with ``completion``, or with ``chosen`` and
    ``rejected``); without them, or where the trainer packed or dropped some, only the tokens are judged.
    ``supervise`` says which answers of a conversation are to be learned; with ``assistant_only_loss`` all of them.
    Raises ``UserError`` for a trainer of another kind.
    """
    names = [kind.__name__ for kind in type(trainer).__mro__]
    stage = next((KINDS[name] for name in names if name in KINDS), None)
    if stage is None:
        raise UserError(f"lint: {names[0]} is none of the trainers that can be linted: {', '.join(KINDS)}.")
    args, dataset = trainer.args, trainer.train_dataset
    wanted: Supervise = supervise or ("all" if getattr(args, "assistant_only_loss", False) else "last")
    cut_at = getattr(trainer.data_collator, "max_length", None) or getattr(args, "max_length", None)
    limits = limits_of(trainer.model, cut_at)
    options = Options(stage, limits, wanted, ends_of(trainer.model), most_rows, seed)
    linter = Linter(trainer.processing_class, options)
    check_embeddings(trainer.model, linter.dialect, linter.found)
    _check_dropped_rows(dataset, rows, linter.found)
    if rows is not None and len(rows) == len(dataset):
        linter.look("train", rows, trainer.data_collator, lambda number: dict(dataset[number]))
    else:
        linter.look_at_documents("train", dataset, trainer.data_collator)
    return linter.result()


def _check_dropped_rows(dataset: Any, rows: Sequence[Row] | None, found: Findings) -> None:
    """Compare the trainer's dataset with its rows. A packed dataset holds documents, so it may be shorter."""
    if len(dataset) == 0:
        found.add("no-rows-left", None, "" if rows is None else f"0 of {len(rows)} rows are left")
        return
    is_packed = "seq_lengths" in dataset.column_names
    if rows is not None and len(dataset) < len(rows) and not is_packed:
        found.add("rows-dropped", None, f"{len(dataset)} of {len(rows)} rows are left")
