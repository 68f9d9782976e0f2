"""Stage ``pretrain``: continued pre-training on plain texts (arXiv 2004.10964)."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl.trainer.sft_config import SFTConfig as Arguments

from align.config.stages.sft import PretrainConfig
from align.models.compute.processes import use_threads
from align.models.tuning.apply import apply_tuning
from align.pipeline.context import StageContext
from align.training import held_out
from align.training.arguments import training_arguments
from align.training.fit import fit
from align.training.fused_head import use_blockwise_head
from align.training.input_checks import encode_splits, load_model
from align.training.packing import FlatCollator, check_separate, enable_flat, fill_ratio, pack_rows, packing_form
from align.training.rows import document_ends, encode_texts, read_splits
from align.training.save import save
from align.training.trainers import PreparedSFT


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed, and held-out loss, perplexity and bits per byte.

    Raises ``UserError`` for texts without tokens and for a model that cannot keep packed rows apart.
    """
    use_threads(context.runtime)
    config: PretrainConfig = context.config
    tokenizer, model = load_model(context)
    ends = document_ends(tokenizer, config.document_end, f"{context.name}.document_end")
    stored = read_splits(context)
    # Held-out texts get no end token, because bits per byte count only the text's own bytes.
    splits = encode_splits(
        context,
        stored,
        lambda rows, split: encode_texts(tokenizer, rows, config.max_length, ends, learn_end=split == "train"),
    )
    train = splits["train"]
    packs = pack_rows(train, config.max_length)
    sequences = [row["input_ids"] for row in train.rows]
    model = apply_tuning(model, config.tuning, context.seed, tokenizer=tokenizer, rows=sequences)
    use_blockwise_head()
    form = packing_form(model)
    enable_flat(model, form)
    trainer = PreparedSFT(
        model=model,
        args=training_arguments(Arguments, context, len(packs), router_aux_loss_coef=None),
        data_collator=FlatCollator(form),
        train_dataset=Dataset.from_list(packs),
        processing_class=tokenizer,
    )
    trainer.row_lengths = [len(pack["input_ids"]) for pack in packs]
    gap = check_separate(context.name, trainer, train)
    # Bytes of the raw text make bits per byte comparable between models with different tokenizers.
    sizes = {split: sum(len(row["text"].encode()) for row in rows) for split, rows in stored.items()}
    metrics = fit(trainer, context, lambda split: held_out.texts(trainer, splits[split], sizes[split]))
    save(context, trainer, tokenizer)
    facts = {"packs": len(packs), "texts": len(stored["train"])}
    facts |= {f"{split}_texts": len(rows) for split, rows in stored.items() if split != "train"}
    return {**metrics, **facts, "pack_fill": fill_ratio(packs, config.max_length), "pack_difference": gap}
