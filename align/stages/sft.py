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

from typing import Any

from datasets import Dataset
from trl.trainer.sft_config import SFTConfig as Arguments

from align.config.own_function import OwnFunction
from align.config.stages.sft import SftConfig
from align.lint.trainer import Split, lint_stage
from align.methods.call import Method
from align.methods.contract import ANSWERS, check
from align.models.compute.processes import use_threads
from align.models.tuning.apply import apply_tuning
from align.pipeline.context import StageContext
from align.training import held_out
from align.training.arguments import training_arguments
from align.training.fit import fit
from align.training.fused_head import use_blockwise_head
from align.training.input_checks import check_ends, encode_splits, load_model
from align.training.packing import FlatCollator, check_separate, enable_flat, fill_ratio, pack_rows, packing_form
from align.training.rows import counts, encode_answers, encode_supervised, number_rows, read_splits
from align.training.save import save
from align.training.sft_trainer import AnswerCollator, check_kernels, lint_rows, noisy
from align.training.thoughts import check_thoughts, thought_facts
from align.training.trainers import PreparedSFT


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/`` and return steps, tokens, speed and held-out loss before and after.

    Raises ``UserError`` for a model without chat template, data without usable rows, or rows that never contain the end
    of an answer.
    """
    use_threads(context.runtime)
    config: SftConfig = context.config
    # Before anything is loaded: kernels that are not installed are refused at once.
    check_kernels(context.name, config.trainer, context.runtime)
    place = f"{context.name}.loss"
    own_loss = Method.own(config.loss, place) if isinstance(config.loss, OwnFunction) else None
    tokenizer, model = load_model(context)
    stored = read_splits(context)
    check_thoughts(context.name, tokenizer, stored["train"])
    encode = encode_answers if config.supervise == "all" else encode_supervised
    splits = encode_splits(context, stored, lambda rows, _: encode(tokenizer, rows, config.max_length))
    train = splits["train"]
    check_ends(context.name, train, tokenizer)
    sources = []
    if own_loss is not None:
        sources = number_rows(splits, as_list=True)
        check(own_loss, ANSWERS, place, sources)
    sequences = [row["input_ids"] for row in train.rows]
    model = apply_tuning(model, config.tuning, context.seed, tokenizer=tokenizer, rows=sequences)
    rows = pack_rows(train, config.max_length) if config.packing else train.rows
    trainer = _make_trainer(context, model, tokenizer, rows)
    trainer.own_loss, trainer.sources = own_loss, sources
    linted = {name: Split(stored[name], splits[name]) for name in splits}
    lint_stage(context, lint_rows(trainer, train), linted, supervise=config.supervise)
    facts: dict[str, Any] = {"rows": len(train.rows), **counts(splits, "rows")}
    facts |= thought_facts(tokenizer, train)
    if config.packing or config.padding_free:
        # Check before training, because rows that attend to each other would silently corrupt it.
        facts |= {"pack_difference": check_separate(context.name, trainer, train)}
    if config.packing:
        facts |= {"packs": len(rows), "pack_fill": fill_ratio(rows, config.max_length)}
    with noisy(trainer.model, config.neftune):
        metrics = fit(trainer, context, lambda split: held_out.supervised(trainer, splits[split]))
    save(context, trainer, tokenizer)
    return {**metrics, **facts}


def _make_trainer(context: StageContext, model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> PreparedSFT:
    """Return the trainer of ``rows``, which it concatenates if ``packing`` or ``padding_free`` is set."""
    use_blockwise_head()
    # Packed documents must not attend to each other; the form tells this model the ends of documents.
    form = packing_form(model) if context.config.packing or context.config.padding_free else None
    if form is not None:
        enable_flat(model, form)
    numbered = AnswerCollator(tokenizer.pad_token_id) if isinstance(context.config.loss, OwnFunction) else None
    collator = numbered if form is None else FlatCollator(form)
    trainer = PreparedSFT(
        model=model,
        args=training_arguments(Arguments, context, len(rows), router_aux_loss_coef=None),
        data_collator=collator,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.row_lengths = [len(row["input_ids"]) for row in rows]
    return trainer
