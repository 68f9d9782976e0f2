"""The private names of transformers' and trl's trainers that align's supervised trainers override or restore.

``RLTrainer`` has a separate loop and overrides none. The supervised trainers keep the loop of transformers, which calls
these methods and has no hooks in their place.
"""

from __future__ import annotations

import copy
from typing import Any

from align.patches.signatures import private_name

TRAINER = {
    "_clip_grad_norm": ["model"],  # gather the norm of sharded gradients
    "_get_num_items_in_batch": ["batch_samples", "device"],  # skip copies of micro-batches
    "_get_train_sampler": ["train_dataset"],  # order rows by length, alike in any number of processes
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],  # load full weights into a sharded model
    "_load_optimizer_and_scheduler": ["checkpoint"],  # load a full state into shards
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],  # DeepSpeed's full states
    "_run_epoch": [  # make no step after resuming from the last step
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_save_optimizer_and_scheduler": ["output_dir"],  # write full states of a sharded optimizer
    "_set_signature_columns_if_needed": [],  # keep columns of align's rows
    "_track_num_input_tokens": ["inputs"],  # count copies of micro-batches once
}
"""Methods of ``transformers.Trainer``, with their parameters. Written for transformers 5.17."""
TRL = (
    "trl.trainer.sft_trainer:SFTTrainer._prepare_dataset",  # rows are tokenized already
    "trl.trainer.dpo_trainer:DPOTrainer._compute_loss",  # the loss is a function of DPORow
    "trl.trainer.dpo_trainer:DPOTrainer._precompute_ref_logps",  # rows have the reference's log-probabilities
)
"""Methods of trl that are replaced entirely, whatever their parameters are. Written for trl 1.16."""


def check_overrides() -> None:
    """Raise ``UserError`` if a method that a supervised trainer overrides is missing or has other parameters."""
    for method, parameters in TRAINER.items():
        private_name("transformers", f"transformers:Trainer.{method}", ["self", *parameters])
    for path in TRL:
        private_name("trl", path)


METRICS = ("_metrics", "_stored_metrics", "_total_train_tokens")
"""Attributes in which trl's trainers collect the metrics of a step. Written for trl 1.16."""


def copy_metrics(trainer: Any) -> dict[str, Any]:
    """Return a copy of the metrics that a trainer of trl has collected."""
    return {name: copy.deepcopy(value) for name, value in vars(trainer).items() if name in METRICS}


def restore_metrics(trainer: Any, metrics: dict[str, Any]) -> None:
    """Reset a trainer's metrics to a copy, so that a repeated step is counted once."""
    for name, value in copy.deepcopy(metrics).items():
        setattr(trainer, name, value)
