"""Continued pre-training: the model reads a domain's plain texts, before it is taught to answer (arXiv 2004.10964)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from align.config.base import stage_input
from align.config.stages.training import TrainingFields, checked_options
from align.pipeline.context import StageContext
from align.store.artifacts import GENERATORS, Kind


class PretrainConfig(TrainingFields):
    """Loss on every token of every text. ``batch_size`` counts packs of ``max_length`` tokens.

    Texts are packed: whole windows of documents share a row of ``max_length`` tokens, none sees another. To keep what
    the model knew, mix general texts in by the recipe's ``mix`` step, train few weights (``tuning``) or hold it near
    its start (``anchor``).
    """

    model: stage_input(*GENERATORS)  # type: ignore[valid-type]
    """Stage whose checkpoint is trained further."""
    data: stage_input(Kind.TEXTS)  # type: ignore[valid-type]
    """Stage with the texts: its ``train`` split is learned, its ``test`` split only scored."""
    document_end: str | None = Field(None, min_length=1)
    """Token behind every document, the tokenizer's EOS by default. A chat model's EOS ends a turn: name what its
    pre-training had (``<|endoftext|>``), or it is taught that texts end as turns do."""

    @field_validator("trainer")
    @classmethod
    def _trainer_exists(cls, options: dict[str, Any]) -> dict[str, Any]:
        return checked_options(
            "sft", options, {"packing", "padding_free", "assistant_only_loss", "completion_only_loss"}
        )

    @model_validator(mode="after")
    def _tuning_reads_packs(self) -> PretrainConfig:
        if self.tuning.input_only:
            raise ValueError(
                f"tuning: {self.tuning.method} acts on a row's beginning, and packed texts share rows; take full, lora "
                "or another method that acts on modules."
            )
        return self


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed, and held-out loss, perplexity and bits per byte.

    Raises ``UserError`` for texts without tokens and for a model that cannot keep packed rows apart.
    """
    from align.models.threads import use_threads

    use_threads(context.runtime)
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig as Arguments

    from align.models.loading import load_tokenizer
    from align.models.tuning.apply import apply_tuning, load_for_tuning
    from align.training import held_out
    from align.training.arguments import training_arguments
    from align.training.fit import fit
    from align.training.input_checks import check_encoded, check_model
    from align.training.packing import Flat, check_separate, fill, form_of, packed, run_flat
    from align.training.rows import read_splits
    from align.training.saving import save
    from align.training.texts import document_ends, encode_texts
    from align.training.trainers import PreparedSFT, label_positions_only

    config: PretrainConfig = context.config
    source = context.artifact("model").model
    tokenizer, model = load_tokenizer(source, config.tuning), load_for_tuning(source, config.tuning)
    check_model(context.name, model, tokenizer)
    ends = document_ends(tokenizer, config.document_end, f"{context.name}.document_end")
    stored, splits = read_splits(context), {}
    for split, rows in stored.items():
        splits[split] = encode_texts(tokenizer, rows, config.max_length, ends, learn_end=split == "train")
        check_encoded(context.name, splits[split], len(rows), split, config.max_length, context.warn)
    train = splits["train"]
    packs = packed(train, config.max_length)
    model = apply_tuning(
        model,
        config.tuning,
        context.seed,
        tokenizer=tokenizer,
        warn=context.warn,
        rows=[row["input_ids"] for row in train.rows],
    )
    label_positions_only()
    form = form_of(model)
    run_flat(model, form)
    trainer = PreparedSFT(
        model=model,
        args=training_arguments(Arguments, context, len(packs)),
        data_collator=Flat(form),
        train_dataset=Dataset.from_list(packs),
        processing_class=tokenizer,
    )
    trainer.row_lengths = [len(pack["input_ids"]) for pack in packs]
    gap = check_separate(context.name, trainer, train)
    sizes = {split: sum(len(row["text"].encode()) for row in rows) for split, rows in stored.items()}
    metrics = fit(trainer, context, lambda split: held_out.texts(trainer, splits[split], sizes[split]))
    save(context, trainer, tokenizer)
    facts = {"packs": len(packs), "texts": len(stored["train"])}
    facts |= {f"{split}_texts": len(rows) for split, rows in stored.items() if split != "train"}
    return {**metrics, **facts, "pack_fill": fill(packs, config.max_length), "pack_difference": gap}
