"""Options under a stage's ``trainer:``, checked against the config class of trl or align that they go to. Torch-free.

A stage's config names the class (``trainer_class``), whose fields ``field_dumps`` has. Rules across fields are left to
the class itself when the stage runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from align.config.class_options import refuse_unknown_option
from align.config.field_dumps import class_options

OWNED: dict[str, str] = {
    "learning_rate": "set 'learning_rate' beside 'trainer'",
    "num_train_epochs": "set 'epochs' beside 'trainer'",
    "max_steps": "set 'max_steps' beside 'trainer'",
    "per_device_train_batch_size": "set 'micro_batch_size' beside 'trainer'",
    "per_device_eval_batch_size": "set 'micro_batch_size' beside 'trainer'",
    "gradient_accumulation_steps": "set 'batch_size' and 'micro_batch_size' beside 'trainer'",
    "max_length": "set 'max_length' beside 'trainer'",
    "truncation_mode": "rows are cut, and counted, before the trainer sees them",
    "warmup_steps": "set 'warmup_ratio' beside 'trainer'",
    "lr_scheduler_type": "set 'scheduler' beside 'trainer'",
    "weight_decay": "set 'weight_decay' beside 'trainer'",
    "max_grad_norm": "set 'max_grad_norm' beside 'trainer'",
    "bf16": "set 'precision' beside 'trainer'",
    "fp16": "set 'precision' beside 'trainer'",
    "bf16_full_eval": "set 'precision' beside 'trainer'",
    "fp16_full_eval": "set 'precision' beside 'trainer'",
    "seed": "the pipeline's 'seed' decides",
    "data_seed": "the pipeline's 'seed' decides",
    "output_dir": "the store decides where files go",
    "save_strategy": "set 'save_steps' beside 'trainer'",
    "save_steps": "set 'save_steps' beside 'trainer'",
    "save_total_limit": "the last two checkpoints are kept until the stage is done",
    "save_only_model": "a checkpoint without its optimizer cannot resume exactly",
    "enable_jit_checkpoint": "checkpoints follow 'save_steps'",
    "resume_from_checkpoint": "a killed stage resumes by itself",
    "ignore_data_skip": "a killed stage resumes by itself",
    "load_best_model_at_end": "the last weights are the result",
    "eval_strategy": "set 'eval_steps' beside 'trainer'",
    "eval_steps": "set 'eval_steps' beside 'trainer'",
    "eval_on_start": "held-out rows are scored before and after training anyway",
    "logging_strategy": "every step is logged",
    "logging_steps": "every step is logged",
    "logging_first_step": "every step is logged",
    "logging_nan_inf_filter": "a loss that is not finite stops the stage",
    "report_to": "set 'runtime.report_to'",
    "run_name": "a tracker's run is called as the stage",
    "project": "set 'runtime.tracking.project'",
    "disable_tqdm": "the console shows progress",
    "include_num_input_tokens_seen": "real tokens are always counted",
    "train_sampling_strategy": "rows are always grouped by length",
    "length_column_name": "rows are always grouped by length",
    "dataloader_num_workers": "rows are tokenized before training",
    "remove_unused_columns": "rows are tokenized before training",
    "dataset_num_proc": "rows are tokenized before training",
    "dataset_text_field": "rows are tokenized before training",
    "dataset_kwargs": "rows are tokenized before training",
    "model_init_kwargs": "the stage loads the model",
    "trust_remote_code": "the 'model' stage decides what code a model may bring",
    "chat_template_path": "the model's own chat template is used",
    "eos_token": "the model's own tokenizer is used",
    "pad_token": "the model's own tokenizer is used",
    "use_cpu": "set 'runtime.device'",
    "push_to_hub": "publish the finished artifact instead",
}
"""Options that every training stage sets itself, with what to do instead."""

OWNED_BY_ROLLOUTS: dict[str, str] = {
    "num_train_epochs": "set 'updates' and 'num_epochs' beside 'trainer'",
    "max_steps": "set 'updates' beside 'trainer'",
    "per_device_eval_batch_size": "held-out prompts are the 'evaluate' stage's",
    "gradient_accumulation_steps": "set 'rollout_batch', 'num_mini_batches' and 'micro_batch_size' beside 'trainer'",
    "save_strategy": "set 'save_updates' beside 'trainer'",
    "save_steps": "set 'save_updates' beside 'trainer'",
    "enable_jit_checkpoint": "checkpoints follow 'save_updates'",
    "eval_strategy": "held-out prompts are the 'evaluate' stage's",
    "eval_steps": "held-out prompts are the 'evaluate' stage's",
    "eval_on_start": "held-out prompts are the 'evaluate' stage's",
    "logging_strategy": "every update is logged",
    "logging_steps": "every update is logged",
    "logging_first_step": "every update is logged",
    "train_sampling_strategy": "prompts are shuffled by the seed",
    "length_column_name": "prompts are shuffled by the seed",
}
"""The same for the stages that learn from rollouts, if their remedy differs."""


def check_trainer_options(
    trainer_class: str, options: Mapping[str, Any], fields: Collection[str], owned: Mapping[str, str]
) -> None:
    """Check a ``trainer:`` block against the class ``trainer_class`` (``package.module:Name``) that it goes to.

    ``fields`` names the stage's own fields, ``owned`` the options that the stage sets itself, with the remedy. Raises
    ``ValueError`` for the first key that does not exist (with the nearest name), that is a field of the stage, or that
    the stage sets itself, for a value of the wrong type, and for a class that cannot be read.
    """
    if not options:
        return
    try:
        known = class_options(trainer_class)
    except LookupError as error:
        raise ValueError(f"the class of its options, {trainer_class}, cannot be read: {error}") from None
    for name, value in options.items():
        # An unknown name first: a misspelling should not be told that the stage decides it.
        refuse_unknown_option(name, {*known, *fields}, trainer_class.partition(":")[2])
        if name in owned:
            raise ValueError(f"'{name}' is not set here: {owned[name]}.")
        if name in fields:
            raise ValueError(f"'{name}' is not set here: set '{name}' beside 'trainer'.")
        known[name].check(value)


def remedy_for_option(trainer_class: str, owned: Mapping[str, str], name: str) -> str | None:
    """Return the remedy for an option of the class ``trainer_class`` that was set outside ``trainer``.

    None for a name that is no option. ``owned`` names the options that the stage sets itself, with the reason.
    """
    if name in owned:
        reason = owned[name].removesuffix(" beside 'trainer'")
        return f"Leave it out: {reason}."
    try:
        is_option = name in class_options(trainer_class)
    except LookupError:
        return None
    return f"It goes under 'trainer': `trainer: {{{name}: …}}`." if is_option else None
