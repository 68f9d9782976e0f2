"""Names that trl, peft, transformers, axolotl, LLaMA-Factory, OpenRLHF and verl give to fields of align. Torch-free.

An unknown key that is such a name is answered with the field: "In align this is 'learning_rate'."
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from align.config.field_descriptions import nested_models

ELSEWHERE = {
    "model": "'{}' of a stage of kind model",
    "data": "'{}' of a stage of kind data",
    "recipe": "'{}' of a data recipe",
    "pipeline": "'{}' at the top of the file",
    "runtime": "'runtime.{}' at the top of the file",
}
"""Blocks that a target may name before a colon: ``runtime:engine.gpu_memory``."""
OWN_FIELDS = {"pipeline": {"stages", "runtime"}, "data": {"recipe", "dataset"}}
"""Fields by which a block of ``ELSEWHERE`` is told from others that have a field of the same name."""
ADAPTER = "Write `tuning: {{method: lora, {}: …}}`."


@dataclass(frozen=True)
class Synonym:
    """A field of align, and the names that others give to it."""

    target: str
    """Path of the field below a stage's block, ``tuning.rank``, or below a block of ``ELSEWHERE``."""
    names: str
    """The names, separated by spaces."""
    note: str = ""
    """Sentence on a value that is written in another way, or counts something else."""


SYNONYMS = (
    # the optimizer and its schedule
    Synonym("learning_rate", "lr actor_learning_rate actor_lr policy_lr"),
    Synonym("scheduler", "lr_scheduler_type lr_scheduler"),
    Synonym(
        "warmup_ratio",
        "warmup_steps lr_warmup_ratio lr_warmup_steps lr_warmup_steps_ratio num_warmup_steps",
        "It is a share of the steps.",
    ),
    Synonym("min_lr_ratio", "min_lr min_lr_rate cosine_min_lr_ratio lr_min_ratio", "It is a share of the peak rate."),
    Synonym("weight_decay", "l2"),
    Synonym("max_grad_norm", "max_norm gradient_clipping grad_clip clip_grad"),
    Synonym("ema", "ema_decay ema_beta"),
    # length of the training, and batches
    Synonym("epochs", "num_train_epochs num_epochs max_epochs total_epochs train_epochs n_epochs"),
    Synonym(
        "updates",
        "num_train_epochs epochs max_steps num_episodes total_episodes total_epochs num_updates total_steps "
        "total_training_steps num_total_batches",
        "An update samples 'rollout_batch' responses and learns from them.",
    ),
    Synonym("num_epochs", "num_ppo_epochs ppo_epochs num_iterations max_epochs noptepochs"),
    Synonym(
        "micro_batch_size",
        "per_device_train_batch_size per_device_eval_batch_size micro_train_batch_size ppo_micro_batch_size_per_gpu "
        "ppo_micro_batch_size micro_batch_size_per_gpu per_gpu_train_batch_size local_rollout_forward_batch_size",
        "It is the rows in one forward pass, and changes no result.",
    ),
    Synonym(
        "batch_size",
        "gradient_accumulation_steps train_batch_size global_batch_size accumulate_grad_batches effective_batch_size",
        "It is the rows of an optimizer step, over all devices and micro-batches.",
    ),
    Synonym(
        "rollout_batch",
        "gradient_accumulation_steps rollout_batch_size train_batch_size batch_size generation_batch_size "
        "global_batch_size",
        "It is the responses of an update, over all devices and micro-batches.",
    ),
    Synonym(
        "num_mini_batches",
        "mini_batch_size ppo_mini_batch_size num_minibatches",
        "It is the number of optimizer steps per pass over an update's responses.",
    ),
    Synonym("save_updates", "save_steps save_freq"),
    Synonym("save_steps", "save_freq"),
    Synonym("eval_updates", "eval_steps test_freq eval_freq"),
    Synonym("eval_steps", "test_freq eval_freq"),
    Synonym("keep", "load_best_model_at_end save_best", "`keep: best` needs 'eval_steps' or 'eval_updates'."),
    Synonym("early_stopping.patience", "early_stopping_patience", "Write `early_stopping: {patience: …}`."),
    Synonym("max_rows", "max_samples max_train_samples num_samples"),
    Synonym("max_prompts", "max_samples max_train_samples limit num_prompts"),
    Synonym("eval_rows", "max_eval_samples"),
    # numbers and memory
    Synonym("precision", "bf16 fp16 mixed_precision torch_dtype dtype", "Its values are auto, bfloat16 and float32."),
    Synonym(
        "gradient_checkpointing", "activation_checkpointing enable_gradient_checkpointing use_gradient_checkpointing"
    ),
    # adapters
    Synonym("tuning.rank", "lora_r lora_rank r", ADAPTER.format("rank")),
    Synonym("tuning.alpha", "lora_alpha", ADAPTER.format("alpha")),
    Synonym("tuning.dropout", "lora_dropout", ADAPTER.format("dropout")),
    Synonym(
        "tuning.targets",
        "lora_target_modules lora_target target_modules lora_target_linear",
        ADAPTER.format("targets"),
    ),
    Synonym(
        "tuning.save_modules", "lora_modules_to_save modules_to_save additional_target", ADAPTER.format("save_modules")
    ),
    Synonym("tuning.dora", "use_dora peft_use_dora", ADAPTER.format("dora")),
    Synonym("tuning.rslora", "use_rslora peft_use_rslora", ADAPTER.format("rslora")),
    Synonym("tuning.init", "init_lora_weights peft_init_lora_weights", ADAPTER.format("init")),
    Synonym(
        "tuning.method",
        "adapter finetuning_type use_peft use_lora peft_type method",
        "Write `tuning: {method: lora, rank: …}`.",
    ),
    Synonym(
        "tuning.quantization",
        "load_in_4bit load_in_8bit quantization_bit bnb_4bit_quant_type",
        "Write `tuning: {method: qlora, rank: …}`.",
    ),
    Synonym("tuning.freeze", "freeze_layers freeze_trainable_layers", "Write `tuning: {method: full, freeze: […]}`."),
    Synonym("tuning.lisa", "lisa_n_layers lisa_step_interval", "Write `tuning: {method: full, lisa: {layers: …}}`."),
    # models and data
    Synonym("policy", "model model_name_or_path base_model actor actor_path pretrain", "It names an earlier stage."),
    Synonym("base", "base_model", "It names an earlier stage."),
    Synonym("policies", "models systems checkpoints", "It names earlier stages."),
    Synonym("model", "policy model_name_or_path base_model pretrain", "It names an earlier stage."),
    Synonym("reference", "ref_model ref_model_path ref_pretrain reference_model", "It names an earlier stage."),
    Synonym(
        "reward",
        "reward_model reward_models reward_model_path reward_pretrain reward_model_name_or_path",
        "It names an earlier stage.",
    ),
    Synonym("teacher", "teacher_model teacher_model_name_or_path teacher_model_path", "It names an earlier stage."),
    Synonym(
        "data",
        "dataset dataset_name datasets train_file train_files train_dataset data_path dataset_path",
        "It names a stage of kind data, which has a `recipe` or a `dataset`.",
    ),
    Synonym(
        "prompts",
        "data dataset dataset_name datasets train_file train_files prompt_data train_dataset data_path",
        "It names a stage of kind data, which has a `recipe` or a `dataset`.",
    ),
    Synonym("source", "model_name_or_path base_model name_or_path path repo_id"),
    Synonym("revision", "model_revision revision_of_model"),
    Synonym("model:source", "model_name_or_path base_model path"),
    Synonym("model:revision", "model_revision"),
    Synonym("model:chat_template", "chat_template template chat_template_path chat_template_jinja"),
    Synonym("model:trust_remote_code", "trust_remote_code"),
    Synonym("model:add_tokens", "new_special_tokens additional_special_tokens added_tokens add_special_tokens"),
    Synonym("data:dataset", "dataset_name datasets train_file train_files dataset_path data_path hf_dataset path"),
    Synonym("data:name", "dataset_config dataset_config_name subset"),
    Synonym("data:split", "dataset_split dataset_train_split train_split"),
    Synonym("data:test_split", "dataset_test_split eval_split validation_split"),
    Synonym(
        "data:test_size",
        "val_set_size val_size test_fraction eval_dataset eval_datasets validation_file",
        "The rows that it holds out are those that every stage is measured on.",
    ),
    Synonym("recipe:test_size", "val_set_size val_size test_fraction"),
    Synonym("recipe:sources", "dataset dataset_name datasets"),
    Synonym("max_length", "max_seq_length max_seq_len cutoff_len sequence_len max_len model_max_length max_token_len"),
    Synonym("packing", "sample_packing pack use_packing pack_sequences"),
    Synonym("neftune", "neftune_noise_alpha noisy_embedding_alpha"),
    Synonym(
        "supervise",
        "assistant_only_loss mask_history train_on_inputs train_on_prompt completion_only_loss roles_to_train",
        "Answers alone are learned: the last one, or `supervise: all`.",
    ),
    # preferences and rewards
    Synonym("beta", "pref_beta dpo_beta orpo_alpha"),
    Synonym("loss", "loss_type pref_loss policy_loss_type loss_variant"),
    Synonym("losses", "loss_weights", "It maps each loss to its weight."),
    Synonym("sft_weight", "rpo_alpha pref_ftx nll_loss_coef nll_loss_weight"),
    Synonym("desirable_weight", "kto_chosen_weight kto_desirable_weight"),
    Synonym("undesirable_weight", "kto_rejected_weight kto_undesirable_weight"),
    Synonym("center_rewards", "center_rewards_coefficient"),
    Synonym("on_policy", "lmbda on_policy_fraction"),
    Synonym("jsd_beta", "beta"),
    # sampling
    Synonym(
        "max_tokens",
        "max_new_tokens max_completion_length response_length max_response_length generate_max_len max_gen_len "
        "completion_max_len",
    ),
    Synonym("max_prompt_tokens", "max_prompt_length prompt_max_len max_prompt_len"),
    Synonym(
        "samples_per_prompt",
        "num_generations n_samples_per_prompt num_return_sequences rollout_n group_size n",
    ),
    Synonym("n", "num_generations n_samples_per_prompt num_return_sequences samples_per_prompt num_samples best_of_n"),
    Synonym("temperature", "sampling_temperature rollout_temperature"),
    # PPO and the other online methods
    Synonym(
        "score",
        "reward_funcs reward_weights reward_fn reward_function reward_functions custom_reward_function",
    ),
    Synonym("kl_coef", "beta init_kl_coef kl_coeff kl_loss_coef kl_penalty_coef kl_ctl"),
    Synonym("kl_in", "use_kl_loss use_kl_in_reward", "Its values are reward and loss."),
    Synonym("kl_estimator", "kl_loss_type kl_penalty", "Its values are k1, k2 and k3."),
    Synonym("kl_target", "target_kl"),
    Synonym("kl_horizon", "horizon"),
    Synonym("kl_controller", "adap_kl_ctrl kl_ctrl", "Its values are fixed and adaptive."),
    Synonym(
        "clip_range",
        "cliprange epsilon eps_clip clip_eps clip_ratio clip_ratio_low clip_coef clip_epsilon eps_clip_low",
    ),
    Synonym("clip_range_high", "epsilon_high clip_ratio_high eps_clip_high clip_higher"),
    Synonym("dual_clip", "clip_ratio_c delta"),
    Synonym("value_clip_range", "cliprange_value value_clip cliprange_v clip_range_vf"),
    Synonym("vf_coef", "value_loss_coef critic_loss_coef vf_loss_coef"),
    Synonym("lam", "gae_lambda lambd lambda_gae"),
    Synonym("entropy_coef", "entropy_coeff ent_coef entropy_loss_coef"),
    Synonym("critic_learning_rate", "critic_lr value_learning_rate value_lr"),
    Synonym("critic_warmup_updates", "critic_warmup freezing_actor_steps", "It counts updates."),
    Synonym("whiten_advantages", "normalize_advantage normalize_advantages norm_adv whiten_advantage"),
    Synonym("normalize_scores", "normalize_reward use_score_norm use_score_scaling normalize_rewards"),
    Synonym("score_clip", "reward_clip reward_clip_range cliprange_reward"),
    Synonym("loss_aggregation", "loss_agg_mode"),
    Synonym("scale_rewards", "norm_adv_by_std_in_grpo"),
    Synonym("zero_variance", "dynamic_filtering filter_groups", "`zero_variance: resample` samples other prompts."),
    Synonym("truncated", "mask_truncated_completions overlong_filtering", "Write `truncated: mask`."),
    Synonym("overlong_buffer", "overlong_buffer_len soft_punish_cache"),
    Synonym("overlong_penalty", "overlong_penalty_factor"),
    Synonym("importance_cap", "vllm_importance_sampling_cap tis_imp_ratio_cap rollout_is_threshold"),
    Synonym("max_staleness", "async_steps staleness_threshold max_async_level"),
    Synonym(
        "in_flight",
        "partial_rollout partial_rollouts in_flight_weight_updates inflight_weight_updates in_flight_weight_update",
        "Its values are wait and continue.",
    ),
    Synonym("ptx_coef", "ptx_loss_coef"),
    Synonym("completions", "num_completions_to_print log_completions"),
    # where and how a run happens
    Synonym("runtime:store", "output_dir save_path ckpt_path default_local_dir"),
    Synonym("pipeline:seed", "data_seed random_seed"),
    Synonym("pipeline:name", "run_name experiment_name wandb_run_name wandb_name"),
    Synonym("runtime:report_to", "report_to use_wandb use_tensorboard logger use_mlflow"),
    Synonym("runtime:tracking.project", "wandb_project project_name project"),
    Synonym("runtime:engine.gpu_memory", "vllm_gpu_memory_utilization gpu_memory_utilization"),
    Synonym("runtime:engine.name", "use_vllm vllm_mode rollout_backend infer_backend rollout_engine"),
    Synonym(
        "runtime:rollouts.tensor_parallel",
        "vllm_tensor_parallel_size tensor_parallel_size tensor_model_parallel_size tp_size",
    ),
    Synonym("runtime:rollouts.servers", "vllm_num_engines num_engines"),
    Synonym("runtime:rollouts.addresses", "vllm_server_host vllm_server_base_url"),
    Synonym("runtime:launch.strategy", "fsdp fsdp_config", "Write `launch: {strategy: fsdp2}`."),
    Synonym("runtime:launch.deepspeed.stage", "deepspeed zero_stage", "Write `launch: {strategy: deepspeed}`."),
    Synonym("runtime:launch.processes", "num_processes n_gpus_per_node nproc_per_node num_gpus_per_node"),
    Synonym("runtime:launch.nodes", "num_machines nnodes num_nodes"),
    Synonym("runtime:workers", "num_proc preprocessing_num_workers dataset_num_proc dataset_processes"),
    Synonym("runtime:device", "use_cpu no_cuda"),
    Synonym("runtime:deterministic", "full_determinism use_deterministic_algorithms"),
)
"""Every field once. If several fields have a name, the answer is the first field that the block can have."""


VALUES = {"gpu": "cuda", "bf16": "bfloat16", "fp32": "float32"}
"""Other words for a value → the value."""


TAGS = {
    "dora": "DoRA is `{method: lora, dora: true}`.",
    "rslora": "rsLoRA is `{method: lora, rslora: true}`.",
    "pissa": "PiSSA is `{method: lora, init: pissa}`.",
    "freeze": "Frozen layers are `{method: full, freeze: […]}`.",
    "lisa": "LISA is `{method: full, lisa: {layers: …}}`.",
}
"""Other words for a ``method`` of tuning → how it is written."""
COMMANDS = {"train": "run", "fit": "run", "launch": "run", "evaluate": "eval", "test": "eval", "validate": "plan"}
"""Other words for a command → the command."""


def find_synonym(name: str, models: Sequence[type[BaseModel]]) -> str | None:
    """Return "In align this is 'learning_rate'." for a key that no block of ``models`` has, or None."""
    named = [synonym for synonym in SYNONYMS if name in synonym.names.split()]
    for synonym in named:
        path = _path_in(synonym.target, models)
        if path is not None:
            # The note says how to write a path that begins at the stage; inside the block the name is enough.
            is_complete = path == synonym.target
            return _sentence(f"'{path}'", synonym.note if is_complete else "")
    for synonym in named:
        block, _, path = synonym.target.rpartition(":")
        if block:
            return _sentence(ELSEWHERE[block].format(path), synonym.note)
    if not _include("pipeline", models):
        return None
    if named:
        return _sentence(f"'{named[0].target}' of a stage, below 'stages'", named[0].note)
    is_field_of_stages = any(synonym.target == name for synonym in SYNONYMS)
    return f"'{name}' belongs to a stage, below 'stages'." if is_field_of_stages else None


def _sentence(field: str, note: str) -> str:
    return f"In align this is {field}. {note}".strip()


def _include(block: str, models: Sequence[type[BaseModel]]) -> bool:
    return any(OWN_FIELDS[block] <= model.model_fields.keys() for model in models)


def _path_in(target: str, models: Sequence[type[BaseModel]]) -> str | None:
    """Return the path that leads from a block of ``models`` to the field ``target``; None without a path.

    From the block ``tuning`` itself, ``tuning.rank`` is ``rank``.
    """
    block, _, path = target.rpartition(":")
    if block in OWN_FIELDS and not _include(block, models):
        return None
    while path:
        if has_field(path.split("."), models):
            return path
        path = path.partition(".")[2]
    return None


def has_field(path: Sequence[str], models: Sequence[type[BaseModel]]) -> bool:
    """Return True if a path of names leads from a block of ``models`` to a field."""
    name, *below = path
    fields = [model.model_fields[name] for model in models if name in model.model_fields]
    if not below or not fields:
        return bool(fields)
    return has_field(below, [model for field in fields for model in nested_models(field.annotation)])
