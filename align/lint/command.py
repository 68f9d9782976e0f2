"""Lint rows or a built dataset for a model, without training: what ``align data lint`` calls."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import pyarrow.parquet as pq

from align.data.rows import Row, is_text, iter_rows, split_files
from align.errors import UserError
from align.lint.batches import Collator
from align.lint.findings import Finding
from align.lint.linter import Linter, Options, StageKind
from align.lint.tokens import Limits

STAGE_OF: dict[str, StageKind] = {
    "instructions": "sft", "preferences": "dpo", "unpaired": "sft", "prompts": "prompts",
    "sft": "sft", "distill": "sft", "reward": "reward", "dpo": "dpo", "orpo": "dpo", "cpo": "dpo", "simpo": "dpo",
    "ppo": "prompts",
    "grpo": "prompts", "rloo": "prompts", "online_dpo": "prompts", "rejection": "prompts",
}  # fmt: skip
"""Kinds of data, and of training stages: how rows of each become tokens."""


MOST_SCORED = 500
"""Pairs of a split that a reward model scores: some 0.2 s each for a model of 135M parameters on two cores."""


def lint_rows(rows: Iterable[Row], tokenizer: Any, kind: str, settings: Options | None = None) -> list[Finding]:
    """Look at rows as ``tokenizer`` and its template will write them for a training stage.

    ``kind`` is a recipe's kind, or a training stage's where that differs (``reward``); it decides ``settings.stage``.
    Raises ``UserError`` for a tokenizer without chat template.
    """
    linter = _linter(tokenizer, _options(kind, settings or Options()))
    linter.look("rows", list(rows), collator_of(linter.options.stage, tokenizer))
    return linter.result()


def lint_dataset(
    folder: Path,
    model: str,
    kind: str | None = None,
    max_length: int | None = None,
    rows: int | None = Options.rows,
    seed: int = 0,
    reward: Path | None = None,
) -> list[Finding]:
    """Look at both splits of a built dataset for a model: a folder, or a built-in model's name.

    ``kind`` is found from the columns when it is None. ``reward`` is the folder of a reward model that scores up to
    ``MOST_SCORED`` pairs of each split, to tell whether sides were swapped. Raises ``UserError`` for a folder without
    splits or a model without chat template.
    """
    splits = find_splits(folder)
    found = kind or kind_of(next(iter_rows(next(iter(splits)))), folder)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer, limits, ends = load(model, Path(scratch), max_length)
        linter = _linter(tokenizer, _options(found, Options(limits=limits, ends=ends, rows=rows, seed=seed)))
        for path, total in splits.items():
            wanted = set(linter.sample(total))
            drawn = ((number, row) for number, row in enumerate(iter_rows(path)) if number in wanted)
            linter.look_at_these(path.stem, drawn, total, collator_of(linter.options.stage, tokenizer))
        if reward is not None:
            _check_with_reward_model(linter, reward)
        return linter.result()


def _check_with_reward_model(linter: Linter, folder: Path) -> None:
    from align.lint.swapped_sides import check_with_reward_model
    from align.models.reward import RewardModel

    if linter.options.stage not in ("dpo", "reward"):
        raise UserError("--reward: only pairs have two sides to compare; leave it out.")
    model = RewardModel(folder)
    for rows in linter.rows.values():
        check_with_reward_model(rows[:MOST_SCORED], model.score, linter.found)


def print_findings(findings: Sequence[Finding], file: TextIO | None = None) -> int:
    """Print findings with their examples and remedies; returns the exit code, 1 where there are errors."""
    out = file or sys.stdout
    for finding in findings:
        print("\n".join(finding.lines()), file=out)
    counts = {severity: sum(f.severity == severity for f in findings) for severity in ("error", "warning", "note")}
    print(", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items()), file=out)
    return 1 if counts["error"] else 0


def _options(kind: str, settings: Options) -> Options:
    if kind not in STAGE_OF:
        raise UserError(f"lint: unknown kind '{kind}'; known are {', '.join(STAGE_OF)}.")
    return Options(
        STAGE_OF[kind], settings.limits, settings.supervise, settings.ends, settings.rows, settings.seed
    )  # fmt: skip


def _linter(tokenizer: Any, options: Options) -> Linter:
    from align.models.render import require_chat_template

    require_chat_template(tokenizer, "lint: the tokenizer")
    return Linter(tokenizer, options)


def collator_of(stage: StageKind, tokenizer: Any) -> Collator | None:
    """The collator that trl's trainer of a stage makes by default; None for prompts, which are sampled from."""
    if stage == "prompts":
        return None
    from trl.trainer import dpo_trainer, reward_trainer, sft_trainer

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    made: dict[str, Any] = {
        "sft": sft_trainer.DataCollatorForLanguageModeling,
        "dpo": dpo_trainer.DataCollatorForPreference,
        "reward": reward_trainer.DataCollatorForPreference,
    }
    return made[stage](pad_token_id=pad)  # type: ignore[no-any-return]


def find_splits(folder: Path) -> dict[Path, int]:
    """``train.parquet`` and ``test.parquet`` (or the names of their shards' whole), with the rows of each.

    Raises ``UserError`` for a folder that has neither, or no rows.
    """
    found: dict[Path, int] = {}
    for path in (folder / "train.parquet", folder / "test.parquet"):
        files = [file for file in split_files(path) if file.is_file()]
        total = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
        if total:
            found[path] = total
    if not found:
        raise UserError(f"{folder}: no rows in train or test Parquet files; name the folder of a built dataset.")
    return found


def kind_of(row: Row, folder: Path) -> str:
    """The kind that a row's columns show."""
    if row.get("chosen") and row.get("rejected"):
        return "preferences"
    if row.get("completion"):
        return "unpaired" if row.get("label") is not None else "instructions"
    if row.get("prompt"):
        return "prompts"
    if is_text(row):
        raise UserError(f"{folder}: plain texts, which have no turns, so no template and nothing that lint looks for.")
    raise UserError(f"{folder}: a row has {', '.join(row) or 'no fields'}; expected 'prompt' and answers.")


def load(model: str, scratch: Path, max_length: int | None) -> tuple[Any, Limits, frozenset[int]]:
    """Tokenizer, sizes and end tokens of a model, read from its folder; no weights are loaded.

    Unlike for training, a tokenizer that pads with eos is taken: the linter says what is wrong with it.
    """
    from align.models.files import read_optional
    from align.models.pretrained import open_tokenizer

    folder = model_folder(model, scratch)
    tokenizer = open_tokenizer(folder)  # checks the folder first
    config = read_optional(folder / "config.json")
    sizes = {**config, **config.get("text_config", {})}
    generation = read_optional(folder / "generation_config.json").get("eos_token_id")
    ends = [] if generation is None else generation if isinstance(generation, list) else [generation]
    limits = Limits(max_length, sizes.get("max_position_embeddings"), sizes.get("vocab_size"))
    return tokenizer, limits, frozenset(map(int, ends))


def model_folder(model: str, scratch: Path) -> Path:
    """The transformers folder that ``model`` names: itself, its ``model/``, or a built-in model's.

    Raises ``UserError`` for a name that is none of these.
    """
    from align.config.validation import suggest
    from align.models import embedded
    from align.models.source import BUILT_IN, TINY
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
