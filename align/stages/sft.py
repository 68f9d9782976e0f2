"""Stage ``sft``: supervised fine-tuning on answers, with trl's SFTTrainer.

The loss is on answers only. A row becomes a part of the loss in five steps:

1. ``training.rows.encode_supervised`` renders and tokenizes the row. Labels outside answers are -100.
2. ``training.order.GroupedOrder`` puts rows of similar length into one micro-batch (``trainers.Prepared.row_order``).
3. trl's collator pads the micro-batch, or ``training.packing.FlatCollator`` concatenates its rows.
4. ``models.fast.real_tokens.compute_real_tokens`` has the layers compute real tokens only, and a beginning that rows
   share only once. ``trainers.Prepared`` prepares the model by ``trainers.reduce_work``.
5. ``training.fused_head.use_blockwise_head`` has trl's fused head compute the logits of labeled tokens only, in blocks.
   ``trainers.Prepared.compute_loss`` adds terms such as replay. transformers divides by the labels of the entire step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from align.config.stages.sft import SftConfig
from align.pipeline.context import StageContext

if TYPE_CHECKING:
    from align.data.rows import Row
    from align.training.rows import Encoded
    from align.training.trainers import PreparedSFT


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed and held-out loss before and after.

    Raises ``UserError`` for a model without chat template, data without usable rows, or rows that never contain the end
    of an answer.
    """
    from align.models.compute.threads import use_threads

    use_threads(context.runtime)
    from align.lint.trainer import Split, lint_stage
    from align.models.loading import load_tokenizer
    from align.models.tuning.apply import apply_tuning, load_for_tuning
    from align.training import held_out
    from align.training.fit import fit
    from align.training.input_checks import check_model
    from align.training.packing import check_separate, fill_ratio, pack_rows
    from align.training.rows import counts, read_splits
    from align.training.save import save
    from align.training.sft_trainer import check_kernels, lint_rows, noisy

    config: SftConfig = context.config
    # Before anything is loaded: kernels that are not installed are refused at once.
    check_kernels(context.name, config.trainer, context.runtime)
    source = context.artifact("model").model
    tokenizer, model = load_tokenizer(source, config.tuning), load_for_tuning(source, config.tuning)
    check_model(context.name, model, tokenizer)
    stored = read_splits(context)
    splits = _encode(context, tokenizer, stored)
    train = splits["train"]
    model = apply_tuning(
        model,
        config.tuning,
        context.seed,
        tokenizer=tokenizer,
        rows=[row["input_ids"] for row in train.rows],
    )
    rows = pack_rows(train, config.max_length) if config.packing else train.rows
    trainer = _make_trainer(context, model, tokenizer, rows)
    linted = {name: Split(stored[name], splits[name]) for name in splits}
    lint_stage(context, lint_rows(trainer, train), linted, supervise=config.supervise)
    facts: dict[str, Any] = {"rows": len(train.rows), **counts(splits, "rows")}
    if config.packing or config.padding_free:
        # Check before training, because rows that attend to each other would silently corrupt it.
        facts |= {"pack_difference": check_separate(context.name, trainer, train)}
    if config.packing:
        facts |= {"packs": len(rows), "pack_fill": fill_ratio(rows, config.max_length)}
    with noisy(trainer.model, config.neftune):
        metrics = fit(trainer, context, lambda split: held_out.supervised(trainer, splits[split]))
    save(context, trainer, tokenizer)
    return {**metrics, **facts}


def _encode(context: StageContext, tokenizer: Any, stored: Mapping[str, list[Row]]) -> dict[str, Encoded]:
    """Return the encoded rows of each split.

    Raises ``UserError`` for a split without usable rows, and for training rows without the end of an answer.
    """
    from align.training.input_checks import check_encoded, check_ends
    from align.training.rows import encode_answers, encode_supervised

    config: SftConfig = context.config
    encode = encode_answers if config.supervise == "all" else encode_supervised
    splits = {}
    for split, rows in stored.items():
        splits[split] = encode(tokenizer, rows, config.max_length)
        check_encoded(context, splits[split], len(rows), split)
    check_ends(context.name, splits["train"], tokenizer)
    return splits


def _make_trainer(context: StageContext, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> PreparedSFT:
    """Return the trainer of ``rows``, which it concatenates if ``packing`` or ``padding_free`` is set."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig as Arguments

    from align.training.arguments import training_arguments
    from align.training.fused_head import use_blockwise_head
    from align.training.packing import FlatCollator, enable_flat, packing_form
    from align.training.trainers import PreparedSFT

    use_blockwise_head()
    # Packed documents must not attend to each other; the form tells this model the ends of documents.
    form = packing_form(model) if context.config.packing or context.config.padding_free else None
    if form is not None:
        enable_flat(model, form)
    trainer = PreparedSFT(
        model=model,
        args=training_arguments(Arguments, context, len(rows), router_aux_loss_coef=None),
        data_collator=None if form is None else FlatCollator(form),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.row_lengths = [len(row["input_ids"]) for row in rows]
    return trainer
