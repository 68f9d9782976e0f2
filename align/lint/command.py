"""Lints rows or a built dataset for a model, without training; behind ``align data lint``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from align.data.rows import Row, is_text, iter_rows, split_files
from align.errors import UserError
from align.lint.encodings import UNPAIRED, encoding_of
from align.lint.findings import Finding
from align.lint.linter import Linter, Options
from align.lint.tokens import Limits
from align.training.unpaired import unpair

MAX_SCORED_PAIRS = 500
"""Pairs of a split that a reward model scores; each takes some 0.2 s with 135M parameters on two cores."""


def lint_rows(rows: Iterable[Row], tokenizer: Any, kind: str, settings: Options | None = None) -> list[Finding]:
    """Lint rows as ``tokenizer`` and its template encode them for a training stage.

    ``kind`` is a recipe's kind of rows, or a kind of training stage; it decides ``settings.stage``.
    Raises ``UserError`` for a tokenizer without chat template and for an unknown kind.
    """
    linter = _linter(tokenizer, replace(settings or Options(), stage=kind))
    linter.look("rows", list(rows), linter.encoding.default_collator(tokenizer))
    return linter.result()


def lint_dataset(
    folder: Path,
    model: str,
    kind: str | None = None,
    *,
    max_length: int | None = None,
    rows: int | None = Options.rows,
    seed: int = 0,
    reward: Path | None = None,
) -> list[Finding]:
    """Lint both splits of a built dataset for a model: a folder, or a built-in model's name.

    ``kind`` is a recipe's kind of rows or a kind of training stage; None takes the kind of rows that the columns show.
    ``reward`` is the folder of a reward model that scores up to
    ``MAX_SCORED_PAIRS`` pairs of each split, to detect swapped sides. Raises ``UserError`` for a folder without
    splits or a model without chat template.
    """
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
        linter = _linter(tokenizer, Options(stage, limits=limits, ends=ends, rows=rows, seed=seed))
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
    from align.lint.pairs import check_with_reward_model
    from align.models.reward import RewardModel

    if not linter.encoding.is_pair:
        raise UserError("--reward: only pairs have two sides to compare; leave it out.")
    model = RewardModel(folder)
    for rows in linter.rows.values():
        check_with_reward_model(rows[:MAX_SCORED_PAIRS], model.score, linter.findings)


def _linter(tokenizer: Any, options: Options) -> Linter:
    from align.models.chat.render import require_chat_template

    require_chat_template(tokenizer, "lint: the tokenizer")
    return Linter(tokenizer, options)


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
    from align.models import embedded
    from align.models.checkpoints.source import BUILT_IN, TINY
    from align.models.tiny import make_tiny

    if model == embedded.NAME:
        return embedded.fetch()
    if model == TINY:
        return make_tiny(scratch / TINY)
    for folder in (Path(model), Path(model) / "model"):
        if (folder / "tokenizer_config.json").is_file():
            return folder
    raise UserError(
        f"lint: '{model}' is neither a folder with a tokenizer nor a built-in model ({', '.join(BUILT_IN)})."
        f"{suggest(model, BUILT_IN)} A Hub model comes in through a model stage; name the artifact's folder."
    )
