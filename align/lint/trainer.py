"""Lints a trainer's batches, in a training stage or in a script with trl's trainers; or a built dataset for a model."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from align.config.stages.lint import MAX_ROWS, LintSettings
from align.data.rows import Row, is_text, iter_rows, split_files
from align.errors import UserError
from align.lint.chat_format import ChatFormat
from align.lint.encodings import UNPAIRED, Collator, encoding_of
from align.lint.findings import Finding, Findings
from align.lint.linter import Linter, Options
from align.lint.tokens import Limits, Supervise
from align.models.chat.template_settings import State, TemplateSettings
from align.pipeline.context import StageContext
from align.store.json_files import write_text_atomically
from align.training.rows import Encoded
from align.training.unpaired import unpair

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

FILE = "findings.json"
TRAINER_STAGES = {"SFTTrainer": "sft", "DPOTrainer": "dpo", "RewardTrainer": "reward", "KTOTrainer": "kto"}
"""Class of trl → the stage that trains with it."""
NEAR_MEAN = 0.02
"""Distance of an embedding from the mean of all, as a share of the usual distance, below which resizing put it there:
transformers draws new rows from a normal distribution of 1e-9 times the others' covariance."""
SAMPLED_EMBEDDINGS = 2048
"""Embeddings from which the mean and the usual distance are estimated."""


@dataclass(frozen=True)
class Split:
    """A split's rows, and their encoding (None for prompts, which the linter renders as the stage does)."""

    rows: Sequence[Row]
    encoded: Encoded | None = None


def model_limits(model: Any, max_length: int | None) -> Limits:
    """Return the sizes of a loaded model."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    embeddings = model.get_input_embeddings().weight.shape[0]
    return Limits(max_length, context if isinstance(context, int) else None, int(embeddings))


def generation_ends(model: nn.Module) -> frozenset[int]:
    """Return the ids at which the model's generation config stops."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [int(ends)])


def lint_stage(
    context: StageContext,
    trainer: Any,
    splits: Mapping[str, Split],
    *,
    supervise: Supervise = "last",
    kind: str | None = None,
) -> list[Finding]:
    """Lint ``splits`` through the trainer's own dataset and collator, write ``findings.json``, and warn.

    The record of the stage's kind says how it reads a row (``Stage.lint``); ``kind`` names another kind, for a stage
    that reads rows in several ways. Rows have at most ``context.config.max_length`` tokens. Raises ``UserError`` for
    errors that the stage's ``lint.waive`` does not name.
    """
    started = time.perf_counter()
    options = _options(context, kind or context.kind, trainer.model, context.config.max_length)
    linter = Linter(trainer.processing_class, replace(options, supervise=supervise))
    check_embeddings(trainer.model, linter.chat_format, linter.findings)
    for name, split in splits.items():
        _look(linter, name, split, trainer.train_dataset if name == "train" else None, trainer.data_collator)
    return _report(context, linter, started)


def lint_prompts(
    context: StageContext, tokenizer: Any, model: PreTrainedModel, splits: Mapping[str, Split], max_length: int
) -> list[Finding]:
    """Lint prompts of at most ``max_length`` tokens, which ``model`` will answer; else as :func:`lint_stage`."""
    started = time.perf_counter()
    linter = Linter(tokenizer, _options(context, "prompts", model, max_length))
    for name, split in splits.items():
        linter.look(name, split.rows, None)
    return _report(context, linter, started)


def _options(context: StageContext, kind: str, model: PreTrainedModel, max_length: int) -> Options:
    """Return the linter's options for a stage that trains ``model`` on rows of at most ``max_length`` tokens."""
    settings: LintSettings = context.config.lint
    return Options(
        stage=kind,
        limits=model_limits(model, max_length),
        ends=generation_ends(model),
        rows=settings.rows,
        seed=context.seed % 2**32,
    )


def _report(context: StageContext, linter: Linter, started: float) -> list[Finding]:
    """Write, log and warn of the findings, and raise ``UserError`` for errors that are not waived."""
    findings = linter.result(context.config.lint.waive)
    # Every process looks, so all of them stop at an error; the first one writes.
    if int(os.environ.get("RANK", "0")) == 0:
        seconds = round(time.perf_counter() - started, 2)
        totals = {name: {"rows": count, "of": total} for name, (count, total) in linter.totals.items()}
        report = {"looked_at": totals, "seconds": seconds, "findings": [finding.to_json() for finding in findings]}
        text = json.dumps(report, indent=1, ensure_ascii=True)
        write_text_atomically(context.output / FILE, text + "\n")
        _log(context, findings, linter, seconds)
    refuse(context.name, findings)
    return findings


def _look(linter: Linter, name: str, split: Split, dataset: Any, collator: Collator) -> None:
    assert split.encoded is not None
    # Encoded rows refer to their sources by identity: skipped rows have no entry.
    indices = {id(row): index for index, row in enumerate(split.encoded.sources)}
    encoded: Any = split.encoded.rows if dataset is None else dataset

    def prepared(number: int) -> dict[str, Any] | None:
        index = indices.get(id(split.rows[number]))
        return None if index is None else dict(encoded[index])

    linter.look(name, split.rows, collator, prepared)


def _log(context: StageContext, findings: Sequence[Finding], linter: Linter, seconds: float) -> None:
    """Log all findings, and warn of those that the user should see at once."""
    splits = []
    for name, (count, total) in linter.totals.items():
        splits.append(f"{name} {count} of {total} rows" + (", drawn by the seed" if count < total else ""))
    logger.info("lint: %s: %d kinds of finding in %s s", ", ".join(splits), len(findings), seconds)
    for finding in findings:
        logger.info("\n".join(finding.lines()))
        # A waiver silences a warning; but a waived error is worth a warning itself.
        if finding.waived == (finding.severity == "error") and finding.severity != "note" and not finding.counted:
            context.warn(f"{context.name}: {finding.headline()} See {FILE}.")


def refuse(name: str, findings: Sequence[Finding]) -> None:
    """Raise ``UserError`` for errors that are not waived."""
    errors = [finding for finding in findings if finding.severity == "error" and not finding.waived]
    if not errors:
        return
    lines = [line for finding in errors for line in finding.lines()]
    names = ", ".join(finding.name for finding in errors)
    first = f"{name}: the rows would teach something wrong; nothing was trained."
    last = f"Waive intended ones in the stage: `lint: {{waive: [{names}]}}` (docs/lint.md)."
    raise UserError("\n".join([first, *lines, last]))


def lint_trainer(
    trainer: Any,
    rows: Sequence[Row] | None = None,
    supervise: Supervise | None = None,
    max_rows: int | None = MAX_ROWS,
    seed: int = 0,
) -> list[Finding]:
    """Lint the training set of a trl ``SFTTrainer``, ``DPOTrainer`` or ``RewardTrainer``, before ``trainer.train()``.

    ``rows`` are the dataset's source rows in its order (``prompt`` with ``completion``, or with ``chosen`` and
    ``rejected``); without them, or if the trainer packed or dropped some, only the tokens are checked.
    ``supervise`` names the answers of a conversation that are to be learned; with ``assistant_only_loss`` all of them.
    Raises ``UserError`` for a trainer of another kind.
    """
    names = [kind.__name__ for kind in type(trainer).__mro__]
    stage = next((TRAINER_STAGES[name] for name in names if name in TRAINER_STAGES), None)
    if stage is None:
        raise UserError(f"lint: {names[0]} is none of the trainers that can be linted: {', '.join(TRAINER_STAGES)}.")
    args = trainer.args
    dataset = trainer.train_dataset
    supervised: Supervise = supervise or ("all" if getattr(args, "assistant_only_loss", False) else "last")
    max_length = getattr(trainer.data_collator, "max_length", None) or getattr(args, "max_length", None)
    limits = model_limits(trainer.model, max_length)
    options = Options(stage, limits, supervised, generation_ends(trainer.model), max_rows, seed)
    linter = Linter(trainer.processing_class, options)
    check_embeddings(trainer.model, linter.chat_format, linter.findings)
    _check_dropped_rows(dataset, rows, linter.findings)
    # Unequal numbers mean that rows were packed or dropped, so only the tokens can be checked.
    if rows is not None and len(rows) == len(dataset):
        linter.look("train", rows, trainer.data_collator, lambda number: dict(dataset[number]))
    else:
        linter.look_at_documents("train", dataset, trainer.data_collator)
    return linter.result()


def _check_dropped_rows(dataset: Any, rows: Sequence[Row] | None, findings: Findings) -> None:
    """Compare the trainer's dataset with its rows. A packed dataset holds documents, so it may be shorter."""
    if len(dataset) == 0:
        findings.add("no-rows-left", None, "" if rows is None else f"0 of {len(rows)} rows are left")
        return
    is_packed = "seq_lengths" in dataset.column_names
    if rows is not None and len(dataset) < len(rows) and not is_packed:
        findings.add("rows-dropped", None, f"{len(dataset)} of {len(rows)} rows are left")


def check_embeddings(model: Any, chat_format: ChatFormat, findings: Findings) -> None:
    """Report control tokens of the template whose embedding is zero, the mean of all, or equal to another's.

    Such a token was added and never trained.
    """
    import torch

    weight = model.get_input_embeddings().weight.detach()  # (V, H)
    # New virtual tokens are vectors that this stage trains in the tokens' place.
    virtual = set(getattr(chat_format.tokenizer, "new_virtual_tokens", []))
    ids = {name: chat_format.special[name] for name in sorted(chat_format.template_tokens)}
    ids = {name: index for name, index in ids.items() if index < len(weight) and index not in virtual}
    if not ids or weight.is_meta or weight.dim() != 2:
        return
    # Rows at regular distances are enough for the mean, and spare a float32 copy of the table.
    step = max(1, len(weight) // SAMPLED_EMBEDDINGS)
    sample = weight[::step].float()
    mean = sample.mean(dim=0)
    usual_distance = float((sample - mean).norm(dim=1).median())
    rows = {name: weight[index].float() for name, index in ids.items()}
    for name, row in rows.items():
        equal = [other_name for other_name, values in rows.items() if other_name != name and torch.equal(values, row)]
        if not bool(row.any()):
            findings.add("untrained-token", None, f"{name!r} is embedded as zeros")
        elif float((row - mean).norm()) < NEAR_MEAN * usual_distance:
            findings.add("untrained-token", None, f"{name!r} is embedded as the mean of all tokens")
        elif equal:
            findings.add("untrained-token", None, f"{name!r} has the embedding of {equal[0]!r}")


MAX_SCORED_PAIRS = 500
"""Pairs of a split that a reward model scores; each takes some 0.2 s with 135M parameters on two cores."""


def lint_dataset(
    folder: Path,
    model: str,
    kind: str | None = None,
    *,
    max_length: int | None = None,
    rows: int | None = Options.rows,
    seed: int = 0,
    reward: Path | None = None,
    thinking: State | None = None,
) -> list[Finding]:
    """Lint both splits of a built dataset for a model: a folder, or a built-in model's name.

    ``kind`` is a recipe's kind of rows or a kind of training stage; None takes the kind of rows that the columns show.
    ``reward`` is the folder of a reward model that scores up to
    ``MAX_SCORED_PAIRS`` pairs of each split, to detect swapped sides. ``thinking`` sets the template's switch. Raises
    ``UserError`` for a folder without splits or a model without chat template.
    """
    from align.models.chat.render import require_chat_template

    splits = find_splits(folder)
    first = next(iter_rows(next(iter(splits))))
    stage = kind or detect_kind(first, folder)
    # What cannot be is refused before a model is loaded.
    encoding = encoding_of(stage)
    splits_pairs = encoding is UNPAIRED and bool(first.get("chosen"))
    if not splits_pairs and not encoding.fits(first):
        raise UserError(
            f"--kind {stage}: it reads {' and '.join(encoding.needed)}, and {folder} has rows of kind "
            f"{detect_kind(first, folder)}. Name the kind of a stage that reads these, or leave --kind out."
        )
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer, limits, ends = load_tokenizer_and_limits(model, Path(scratch), max_length)
        require_chat_template(tokenizer, "lint: the tokenizer")
        TemplateSettings(thinking).apply(tokenizer, "lint: ")
        linter = Linter(tokenizer, Options(stage, limits=limits, ends=ends, rows=rows, seed=seed))
        for path, total in splits.items():
            # Draw first, then stream: only the drawn rows of a large dataset are encoded.
            numbers = set(linter.sample(total))
            sampled = ((number, row) for number, row in enumerate(iter_rows(path)) if number in numbers)
            if splits_pairs:  # as the stage does
                sampled = ((number, answer) for number, row in sampled for answer in unpair([row]))
            linter.look_at_rows(path.stem, sampled, total, linter.encoding.default_collator(tokenizer))
        if reward is not None:
            _check_with_reward_model(linter, reward)
        return linter.result()


def _check_with_reward_model(linter: Linter, folder: Path) -> None:
    from align.lint.across_rows import check_with_reward_model
    from align.models.reward import RewardModel

    if not linter.encoding.is_pair:
        raise UserError("--reward: only pairs have two sides to compare; leave it out.")
    model = RewardModel(folder)
    for rows in linter.rows.values():
        check_with_reward_model(rows[:MAX_SCORED_PAIRS], model.score, linter.findings)


def find_splits(folder: Path) -> dict[Path, int]:
    """Return ``train.parquet`` and ``test.parquet`` (or the paths that their shards make up), with the rows of each.

    Raises ``UserError`` for a folder that has neither, or no rows.
    """
    splits: dict[Path, int] = {}
    for path in (folder / "train.parquet", folder / "test.parquet"):
        files = [file for file in split_files(path) if file.is_file()]
        total = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
        if total:
            splits[path] = total
    if not splits:
        raise UserError(f"{folder}: no rows in train or test Parquet files; name the folder of a built dataset.")
    return splits


def detect_kind(row: Row, folder: Path) -> str:
    """Return the kind of data that a row's columns show."""
    if row.get("chosen") and row.get("rejected"):
        return "preferences"
    if row.get("completion"):
        return "unpaired" if row.get("label") is not None else "instructions"
    if row.get("prompt"):
        return "prompts"
    if is_text(row):
        raise UserError(f"{folder}: plain texts, which have no turns and no template, so there is nothing to lint.")
    raise UserError(f"{folder}: a row has {', '.join(row) or 'no fields'}; expected 'prompt' and answers.")


def load_tokenizer_and_limits(model: str, scratch: Path, max_length: int | None) -> tuple[Any, Limits, frozenset[int]]:
    """Return a model's tokenizer, sizes and end tokens, read from its folder; no weights are loaded.

    Unlike in training, a tokenizer that pads with eos is accepted: the linter reports it.
    """
    from align.models.checkpoints.files import read_optional
    from align.models.pretrained import open_tokenizer

    folder = model_folder(model, scratch)
    tokenizer = open_tokenizer(folder)  # checks the folder first
    config = read_optional(folder / "config.json")
    # Multimodal configs have the text model's sizes under ``text_config``.
    sizes = {**config, **config.get("text_config", {})}
    ends = read_optional(folder / "generation_config.json").get("eos_token_id")
    if not isinstance(ends, list):
        ends = [] if ends is None else [ends]
    limits = Limits(max_length, sizes.get("max_position_embeddings"), sizes.get("vocab_size"))
    return tokenizer, limits, frozenset(map(int, ends))


def model_folder(model: str, scratch: Path) -> Path:
    """Return the transformers folder that ``model`` names: itself, its ``model/``, or a built-in model's.

    Raises ``UserError`` for a name that is none of these.
    """
    from align.config.validation import suggest
    from align.models.built_in import NAME, fetch, make_tiny
    from align.models.checkpoints.source import BUILT_IN, TINY

    if model == NAME:
        return fetch()
    if model == TINY:
        return make_tiny(scratch / TINY)
    for folder in (Path(model), Path(model) / "model"):
        if (folder / "tokenizer_config.json").is_file():
            return folder
    raise UserError(
        f"lint: '{model}' is neither a folder with a tokenizer nor a built-in model ({', '.join(BUILT_IN)})."
        f"{suggest(model, BUILT_IN)} A Hub model comes in through a model stage; name the artifact's folder."
    )
