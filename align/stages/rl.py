"""The work of the ``ppo`` stage and its kind: models, scorers, engine from artifacts; the trainer's run; its metrics.

Left out: how a method's trainer is made, which its stage passes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.config.launch import rank, world_size
from align.data.rows import read_rows
from align.data.scoring import Scorer, function_scorer
from align.errors import UserError
from align.inference.engine import open_engine
from align.inference.server_client import EngineLost
from align.lint.trainer import Split, lint_prompts
from align.models.loading import load_tokenizer
from align.models.processes import agreed
from align.models.reward import RewardModel
from align.models.threads import device_of, use_threads
from align.models.tuning.apply import load_for_tuning
from align.models.tuning.notice import notice, parameter_counts
from align.models.tuning.stored import engine_source
from align.pipeline.context import StageContext
from align.rl.arguments import RolloutArguments
from align.rl.checkpoint import last_checkpoint
from align.rl.completions import gather
from align.rl.online_trainer import OnlineTrainer
from align.rl.ppo.config import PPOConfig
from align.rl.ppo.trainer import PPOTrainer
from align.rl.scoring import Ensemble, Part, RewardScorer, WeightedSum
from align.training.arguments import parallel_options
from align.training.input_checks import check_model, check_same_vocabulary
from align.training.rows import held_back
from align.training.stop_request import StopWhenAsked
from align.training.tracking import follow, tracking_options

if TYPE_CHECKING:
    from align.config.stages.rl import RolloutFields
    from align.stages.ppo import PpoConfig

Arguments = TypeVar("Arguments", bound=RolloutArguments)

SCHEDULERS = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}

PASSED_ON = (
    *("updates", "rollout_batch", "samples_per_prompt", "max_prompt_tokens", "max_tokens", "temperature", "num_epochs"),
    *("num_mini_batches", "learning_rate", "critic_learning_rate", "critic_head_learning_rate"),
    *("critic_warmup_updates", "weight_decay", "max_grad_norm"),
    *("kl_coef", "kl_in", "kl_estimator", "kl_budget", "kl_controller", "kl_target", "kl_horizon", "gamma", "lam"),
    *("truncation", "truncated", "length_penalty", "normalize_scores", "importance_sequence_cap", "probe_updates"),
    "max_staleness",
    *("missing_eos_penalty", "score_clip", "whiten_rewards", "whiten_advantages", "clip_range", "dual_clip"),
    *("value_clip_range", "vf_coef", "entropy_coef", "loss_aggregation", "importance_cap", "save_updates"),
    *("critic_detach", "ptx_coef", "ptx_rows", "eval_updates", "keep", "keep_kl", "on_alarm", "completions"),
)
"""Fields with the same name and meaning in ``PpoConfig`` and ``PPOConfig``."""


@dataclass(frozen=True)
class Start:
    """What a run starts from; ``options`` are the arguments that every ``OnlineTrainer`` takes."""

    context: StageContext
    rewards: list[RewardModel]
    options: dict[str, Any]


def train(context: StageContext) -> dict[str, Any]:
    """See ``align.stages.ppo.run``."""
    return run_online(context, _ppo_trainer)


def _ppo_trainer(start: Start) -> OnlineTrainer:
    config: PpoConfig = start.context.config
    first = start.rewards[0] if start.rewards and config.critic_source == "reward" else None
    return PPOTrainer(
        **start.options,
        args=arguments(start.context, PPOConfig, PASSED_ON),
        reward_model=None if first is None else first.model,
        critic=config.critic_source,
    )


def run_online(context: StageContext, make: Callable[[Start], OnlineTrainer]) -> dict[str, Any]:
    """Train with the trainer that ``make`` gives, save ``model/``, and return the run's metrics."""
    use_threads(context.runtime)
    config: RolloutFields = context.config
    source = context.artifact("policy").model
    tokenizer, policy = load_tokenizer(source), load_for_tuning(source, config.tuning)
    check_model(context.name, policy, tokenizer)
    rows, validation = _prompts(context)
    lint_prompts(context, tokenizer, policy, {"train": Split(rows)}, config.max_prompt_tokens)
    rewards = _reward_models(context)
    if rewards and getattr(config, "critic_source", None) == "reward":
        check_same_vocabulary(context.name, tokenizer, rewards[0].tokenizer, ("the policy", "the reward model"))
    engine = open_engine(
        agreed(lambda: engine_source(source, config.tuning, context.checkpoints / "engine" / "model")),
        context.runtime,
        precision=config.precision,
        max_length=config.max_prompt_tokens + config.max_tokens,
        seed=context.seed % 2**32,
        warn=context.warn,
        on_hang=context.fail_at_once,
        together=True,
    )
    try:
        options = {
            "model": policy,
            "train_dataset": rows,
            "processing_class": tokenizer,
            "scorer": _scorer(config, rewards),
            "engine": engine,
            "gold": None if config.gold is None else function_scorer(config.gold),
            "tuning": config.tuning,
            "eval_dataset": validation,
            "ptx_dataset": _rows(context, "ptx", "train", None) if config.ptx else None,
            "callbacks": [ReportUpdates(context)],
            "notify": lambda text: context.warn(f"{context.name}: {text}"),
        }
        trainer = make(Start(context, rewards, options))
        trainer.add_callback(StopWhenAsked(context, every=trainer.args.steps_per_update))
        for reward in rewards:
            reward.round_weights()  # only now: a critic that is trained in full has taken its float32 copy
        if trainer.prompts.dropped:
            context.warn(
                f"{context.name}: {trainer.prompts.dropped} of {len(rows)} prompts are longer than "
                f"max_prompt_tokens {config.max_prompt_tokens} and were left out."
            )
        checkpoint = agreed(lambda: last_checkpoint(context.checkpoints, options["notify"]))
        if checkpoint is not None:
            print(f"resuming from {checkpoint}")
        context.note(
            notice(trainer.model.policy, config.tuning, config.precision, low_residual=True, whole=trainer.model)
        )
        updates = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2]) // trainer.args.steps_per_update
        with _saying_what_is_kept(context), follow(context, trainer, updates + 1 if checkpoint else 0):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if trainer.stopped:
            context.warn(f"{context.name} ended early, at {trainer.stopped}")
        trainer.save_model(str(context.output / "model"))
        if rank() == 0:
            gather(context.checkpoints, context.output / "completions.jsonl")
        facts: dict[str, Any] = {"engine": engine.name, "prompts": len(trainer.prompts)}
        if trainer.validation is not None:
            facts[f"{_validation_split(config)}_prompts"] = len(trainer.validation.prompts)
        return {**facts, **summary(trainer)}
    finally:
        engine.close()


@contextmanager
def _saying_what_is_kept(context: StageContext) -> Iterator[None]:
    """Add to the loss of a server what its loss costs: whether the next run starts anew or goes on."""
    try:
        yield
    except EngineLost as error:
        kept = last_checkpoint(context.checkpoints)
        start = "start anew, since no checkpoint was written yet" if kept is None else f"go on from {kept.name}"
        raise EngineLost(f"{error}\nWith a server that answers, run again to {start}.") from error


def _rows(context: StageContext, field: str, split: str, most: int | None) -> list[dict[str, Any]]:
    rows = read_rows(context.artifact(field).split(split))
    if not rows:
        raise UserError(f"{context.name}: {field} has no {split} rows; give its stage some.")
    return rows[:most]


def _validation_split(config: RolloutFields) -> str:
    """What validations are of: prompts that choose the policy are none of the ``test`` split's."""
    return "test" if config.keep == "last" else "validation"


def _prompts(context: StageContext) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Prompts to learn from, and to validate on where the config asks for it."""
    config: RolloutFields = context.config
    rows, validation = _rows(context, "prompts", "train", None), None
    if config.eval_updates and _validation_split(config) == "test":
        validation = _rows(context, "prompts", "test", config.eval_prompts)
    elif config.eval_updates:
        rows, validation = held_back(context, rows, config.eval_prompts)
    return rows[: config.max_prompts], validation


class ReportUpdates(TrainerCallback):
    """One point of the curves and one progress event per update."""

    def __init__(self, context: StageContext) -> None:
        self.context = context

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """``logs`` holds ``score`` after an update, ``eval_score`` after a validation, else run totals."""
        if not state.is_world_process_zero or not logs:
            return
        if "eval_score" in logs:
            split = _validation_split(self.context.config)
            found = {name.replace("eval", split, 1): float(value) for name, value in logs.items() if "eval_" in name}
            self.context.log(int(logs["update"]), **found)
        if "score" not in logs:
            return
        update, tokens = int(logs["update"]), int(logs["tokens"])
        points = {name: float(value) for name, value in logs.items() if name not in ("update", "total_flos")}
        self.context.log(update, **points)
        shown = {name: float(logs[name]) for name in ("score", "gold", "kl") if name in logs}
        total = args.updates  # type: ignore[attr-defined]  # a PPOConfig
        self.context.progress(update, total, unit="updates", tokens=tokens, **shown)


def summary(trainer: OnlineTrainer) -> dict[str, Any]:
    """Metrics of the whole run, first and last ones as means over a few updates; seconds are sums over all updates.

    ``trainable_parameters`` and ``parameters`` are the policy's, the critic and a frozen reference aside: so they
    compare with those of stages that have neither.
    """
    history = [entry for entry in trainer.state.log_history if "score" in entry]
    found: dict[str, Any] = {"updates": len(history), **trainer.totals}
    few = max(1, min(3, len(history) // 4))
    for name in ("score", "gold", "kl", "length", "eos_rate", "entropy", "explained_variance", "parity_gap"):
        if history and name in history[0]:
            for label, part in (("first", history[:few]), ("last", history[-few:])):
                found[f"{name}_{label}"] = sum(entry[name] for entry in part) / len(part)
    phases = [name for name in history[-1] if name.startswith("seconds")] if history else []
    found |= {name: sum(entry[name] for entry in history) for name in phases}
    if history:
        found["kl_coef_last"] = history[-1]["kl_coef"]
        found["tokens_per_second"] = trainer.totals["tokens"] / max(found["seconds"], 1e-9)
        found["peak_memory_gib"] = max(entry["peak_memory_gib"] for entry in history)
    if trainer.validation is not None and trainer.validation.best is not None:
        found["kept"] = trainer.validation.best
    if trainer.alarms:
        found["alarms"] = [f"update {alarm.update}: {alarm.name}" for alarm in trainer.alarms]
    found |= dict(zip(("trainable_parameters", "parameters"), parameter_counts(trainer.model.policy), strict=True))
    critic = getattr(trainer.model, "critic", None)
    if critic is not None:
        found["trainable_parameters_critic"] = parameter_counts(critic)[0]
    return found | ({"stopped": trainer.stopped} if trainer.stopped else {})


def _reward_models(context: StageContext) -> list[RewardModel]:
    given = context.inputs["reward"] or []
    device = device_of(context.runtime)
    return [
        RewardModel(artifact.model, device=device, precision=context.config.precision, share_beginnings=True)
        for artifact in (given if isinstance(given, list) else [given])
    ]


def _scorer(config: RolloutFields, rewards: list[RewardModel]) -> WeightedSum:
    parts: list[Part] = []
    if rewards:
        members: tuple[Scorer, ...] = tuple(map(RewardScorer, rewards))
        ensemble = Ensemble(members, config.ensemble, config.uncertainty_weight)
        parts.append(Part("reward", config.reward_weight, members[0] if len(members) == 1 else ensemble))
    if config.score is not None:
        parts.append(Part("function", config.score_weight, function_scorer(config.score)))
    return WeightedSum(tuple(parts))


def arguments(context: StageContext, made: type[Arguments], passed_on: Iterable[str]) -> Arguments:
    """A trainer's arguments from a stage's config: the fields ``passed_on`` by their names, the rest by ours."""
    config: RolloutFields = context.config
    on_gpu = device_of(context.runtime).type == "cuda"
    options: dict[str, Any] = {name: getattr(config, name) for name in passed_on}
    options |= {
        "output_dir": str(context.checkpoints),
        "seed": context.seed % 2**32,
        "use_cpu": not on_gpu,
        "bf16": config.precision == "bfloat16",
        "per_device_train_batch_size": config.micro_batch_of(world_size()),
        "ddp_timeout": math.ceil(context.runtime.launch.timeout),
        "lr_scheduler_type": SCHEDULERS[config.scheduler],
        "warmup_steps": config.warmup_ratio,
        "save_strategy": "steps",
        "save_total_limit": 2,
        "disable_tqdm": True,
        **tracking_options(context),
        **parallel_options(context, on_gpu),
    }
    arguments = made(**(options | config.trainer))
    arguments.launch, arguments.precision = context.runtime.launch, config.precision  # type: ignore[attr-defined]
    return arguments
