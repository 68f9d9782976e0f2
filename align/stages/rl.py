"""Stages ``ppo``, ``grpo``, ``rloo``, ``online_dpo`` and ``rejection``, which learn from their own rollouts.

The stage loads models, scorers and the engine from artifacts, builds the kind's trainer, runs it, and returns metrics.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align.config.runtime.launch import rank, world_size
from align.config.stages.best_of_n import OnlineDpoConfig, RejectionConfig
from align.config.stages.policy_gradient import GrpoConfig, PpoConfig, RlooConfig
from align.config.stages.rl import RolloutFields
from align.config.stages.stored_rollouts import ReplayFolder
from align.config.user_paths import user_path
from align.data.rows import read_rows
from align.environments.player import open_player
from align.environments.user_models import check_user_rows, playing_processes
from align.errors import StageFailed, UserError
from align.evaluation.score_validation.stage import note_reference_scores, validate_stage_score
from align.inference.engine import open_engine
from align.inference.protocol import RolloutEngine
from align.inference.servers.server_client import EngineLost
from align.inference.thoughts import check_stage_room
from align.lint.trainer import Split, lint_prompts
from align.models.chat.render import render_prompt
from align.models.compute.processes import broadcast, device_of, use_threads
from align.models.experts import freeze_routers
from align.models.loading import load_tokenizer
from align.models.reward import RewardModel
from align.models.tuning.apply import engine_source, load_for_tuning, notice, refuse_untrainable
from align.pipeline.context import StageContext
from align.rl.checkpoint import change_settings, last_checkpoint
from align.rl.evaluations import rest_base
from align.rl.model import may_round_reward
from align.rl.replay import ReplayEngine, StoredUpdates
from align.rl.rollout_tables import merge
from align.rl.run import continue_prompts, keep_rollout_state, summarize
from align.rl.trainer import RLTrainer
from align.rl.trainers import BestOfNTrainer, GRPOTrainer, OnlineDPOTrainer, PPOTrainer, RLOOTrainer
from align.scoring.functions import function_scorer
from align.scoring.models import Ensemble, RewardScorer
from align.scoring.score import Part, WeightedSum, open_parts
from align.scoring.scored import Scorer
from align.stages.update_reports import ReportUpdates, validation_split
from align.store.artifacts import Artifact
from align.store.rollouts import ROLLOUTS
from align.training.arguments import offload_options, parallel_options
from align.training.input_checks import check_model, check_same_vocabulary
from align.training.kept_state import OwnSettings, change_facts, continued_facts, refuse_no_steps, restore_checkpoint
from align.training.rows import hold_back_validation, refuse_long_rows
from align.training.stopping import EndAfter, StopOnRequest
from align.training.task_evaluations import TaskEvaluations
from align.training.tracking import follow, tracking_options

logger = logging.getLogger(__name__)
BEFORE_ALARM = "before-alarm"
"""Folder of the policy from before an alarm that ended the stage, below the checkpoints."""
MOST_MEASURED = 2000
"""Prompts whose lengths are measured before a model is loaded."""
TRAINERS: dict[type[RolloutFields], type[RLTrainer]] = {
    PpoConfig: PPOTrainer,
    GrpoConfig: GRPOTrainer,
    RlooConfig: RLOOTrainer,
    OnlineDpoConfig: OnlineDPOTrainer,
    RejectionConfig: BestOfNTrainer,
}
"""Config class of a kind, which a user's stage may inherit, and its trainer."""


def run(context: StageContext) -> dict[str, Any]:
    """Train, save ``model/``, and return scores, KL, lengths, speeds and times of the run.

    Resumes from the last complete checkpoint. Raises ``UserError`` for prompts or models that do not fit, and
    ``ParityError`` when the engine and the trainer hold different models.
    """
    use_threads(context.runtime)
    config: RolloutFields = context.config
    source = context.artifact("policy").model
    replay = _open_replay(context)
    # All checks come before the engine, because its start may last minutes.
    prompts, validation_prompts = _read_prompts(context)
    if config.environment is not None and replay is None:
        check_user_rows(config.environment, [*prompts, *(validation_prompts or ())], context.name)
    # Stored rollouts have their scores.
    parts = [] if replay else _open_parts(context)
    validation_facts: dict[str, Any] = {}
    if replay is None:
        # One process validates: a judge is asked once.
        validation_facts = broadcast(lambda: validate_stage_score(context, parts, prompts, validation_prompts or ()))
    tokenizer = load_tokenizer(source)
    check_stage_room(context, tokenizer)
    _check_prompt_lengths(context, tokenizer, prompts)
    # A rollout is used once, so a server's outage may fail episodes: the update continues.
    player = None if replay else open_player(context, load_tokenizer(source), outage_fails_episodes=True)
    context.phase("loading models")
    refuse_untrainable(source, config.tuning, samples=True)
    policy = load_for_tuning(source, config.tuning, context.precision)
    check_model(context.name, policy, tokenizer)
    # A router that learns changes the experts of tokens, and with them ratios that should be near 1.
    frozen = 0 if config.train_router else freeze_routers(policy)
    lint_prompts(context, tokenizer, policy, {"train": Split(prompts)}, config.max_prompt_tokens)
    reward_models = _load_reward_models(context)
    scorer = None if replay else _make_scorer(context, reward_models, parts)
    reference_facts = validation_facts | note_reference_scores(context, scorer, prompts)
    if reward_models and getattr(config, "critic_source", None) == "reward":
        check_same_vocabulary(context.name, tokenizer, reward_models[0].tokenizer, ("the policy", "the reward model"))
    tasks = None if config.evaluate is None else TaskEvaluations(context, tokenizer)
    engine: RolloutEngine | ReplayEngine = ReplayEngine()
    if replay is None:
        engine = _open_engine(context, source, 0 if tasks is None else tasks.tasks.max_length)
    try:
        trainer = _make_trainer(
            context,
            reward_models,
            train_dataset=prompts,
            eval_dataset=validation_prompts,
            scorer=scorer,
            model=policy,
            processing_class=tokenizer,
            engine=engine,
            episodes=player,
            replay=replay,
        )
        trainer.tasks = tasks
        _report_phases(context, trainer)
        if trainer.prompts.dropped:
            context.warn(
                f"{context.name}: {trainer.prompts.dropped} of {len(prompts)} prompts are longer than "
                f"max_prompt_tokens {config.max_prompt_tokens} and were skipped."
            )
        context.note(
            notice(trainer.model.policy, config.tuning, context.precision, low_residual=True, loaded=trainer.model)
        )
        if player is not None and rank() < playing_processes(context.runtime):
            # Load the user here, not in the thread that samples ahead: loading also changes the trainer's default type.
            player.load_user()
        _resume_and_train(context, trainer)
        # Every process participates, because sharded weights are gathered; the first process writes.
        trainer.save_model(str(context.output / "model"))
        if rank() == 0:
            merge(context.checkpoints, context.output, context.warn)
        usage = {} if scorer is None else scorer.facts()
        usage |= {} if player is None else player.user_usage()
        if frozen:
            reference_facts |= {"frozen_router_parameters": frozen}
        return {"engine": engine.name, **reference_facts, **_facts(context, trainer), **summarize(trainer), **usage}
    finally:
        engine.close()
        if player is not None:
            player.close()


def _open_replay(context: StageContext) -> Path | None:
    """Return the folder of the stored rollouts that the stage learns from, after checking them; None if it samples."""
    config: RolloutFields = context.config
    if config.replay is None:
        return None
    if isinstance(config.replay, ReplayFolder):
        folder = user_path(config.replay.folder)
    else:
        folder = context.artifact("replay").path / ROLLOUTS
    StoredUpdates(folder, config, f"stages.{context.name}.replay")
    return folder


def _open_engine(context: StageContext, source: Path, task_length: int) -> RolloutEngine:
    """Open the engine that samples with the policy in ``source``, prepared for the stage's tuning.

    It holds at least ``task_length`` tokens of a conversation and its answer.
    """
    config: RolloutFields = context.config
    context.phase("starting the engine")
    # The first process prepares the folder that the engine loads; the others wait for it.
    return open_engine(
        broadcast(lambda: engine_source(source, config.tuning, context.checkpoints / "engine" / "model")),
        context.runtime,
        precision=context.precision,
        max_length=max(config.max_prompt_tokens + config.max_tokens, task_length),
        seed=context.seed % 2**32,
        warn=context.warn,
        on_hang=context.fail_at_once,
        shared_engine=True,
    )


def _facts(context: StageContext, trainer: RLTrainer) -> dict[str, Any]:
    """Keep the trainer's state, and return the numbers of prompts, of updates before this stage, and of its bytes."""
    facts: dict[str, Any] = {"prompts": len(trainer.prompts)}
    if trainer.validation is not None:
        facts[f"{validation_split(context.config)}_prompts"] = len(trainer.validation.prompts)
    continued = continued_facts(context)
    facts["continued_from_update"] = 0
    if continued is not None:
        facts["continued_from_update"] = continued.steps // trainer.config.steps_per_update
    facts["state_bytes"] = keep_rollout_state(context, trainer)
    return facts | change_facts(context)


def _make_trainer(context: StageContext, reward_models: list[RewardModel], **options: Any) -> RLTrainer:
    """Return the stage's trainer; ``options`` are its prompts, scorer, model, tokenizer and engine."""
    config: RolloutFields = context.config
    own_settings: list[TrainerCallback] = [] if config.continue_from is None else [OwnSettings()]
    options |= {
        "config": config,
        "options": trainer_options(context),
        "ptx_dataset": _read_rows(context, "ptx", "train") if config.ptx else None,
        "gold": None if config.gold is None else function_scorer(config.gold),
        "callbacks": [ReportUpdates(context), *own_settings],
        "notify": lambda text: context.warn(f"{context.name}: {text}"),
    }
    if isinstance(config, PpoConfig):
        options["reward_model"] = reward_models[0].model if config.critic_source == "reward" else None
    trainer_class = next(trainer for config_class, trainer in TRAINERS.items() if isinstance(config, config_class))
    trainer = trainer_class(**options)
    if config.end_after is not None:
        trainer.add_callback(EndAfter(config.end_after * config.steps_per_update))
    # A stop is only possible between updates: half an update cannot be resumed.
    trainer.add_callback(StopOnRequest(context, every=config.steps_per_update))
    for reward_model in reward_models:
        reward_model.round_weights()  # only now: a fully tuned critic has copied the float32 weights
        reward_model.share_tensors(trainer.model.policy)
    rest_base(trainer, context.runtime, [reward_model.model for reward_model in reward_models])
    return trainer


def _report_phases(context: StageContext, trainer: RLTrainer) -> None:
    """Report the phases of an update, and how many responses are sampled."""

    def report_sampling(text: str) -> None:
        # A thread that samples ahead reports only while the trainer waits for it: otherwise the trainer learns.
        if threading.current_thread() is threading.main_thread() or trainer.prefetcher.is_waiting:
            context.phase(text)

    trainer.report_phase = context.phase
    trainer.sampler.report_phase = report_sampling


def _resume_and_train(context: StageContext, trainer: RLTrainer) -> None:
    """Train from the last checkpoint, or from the start if there is none."""
    refuse_no_steps(context, trainer.args.max_steps, "updates", trainer.config.steps_per_update)
    # The continuation is set before the first update, because it decides the order of the prompts.
    trainer.prompts.continuation = continue_prompts(context, trainer)
    # One process chooses, so all resume from the same checkpoint even if a file appears meanwhile.
    checkpoint: Path | None = broadcast(
        lambda: (
            last_checkpoint(context.checkpoints, trainer.notify)
            or restore_checkpoint(
                context,
                lambda folder, changed: change_settings(folder, trainer, changed),
                trainer.config.steps_per_update,
            )
        )
    )
    first_update = 0
    if checkpoint is not None:
        logger.info("resuming from %s", checkpoint)
        # The folder's name counts optimizer steps, of which an update has several.
        steps = int(checkpoint.name.rpartition("-")[2])
        first_update = steps // trainer.config.steps_per_update + 1
    with _explain_lost_engine(context), follow(context, trainer, first_update):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.alarm_stop:
        _end_by_alarm(context, trainer)
    if trainer.stopped:
        context.warn(f"{context.name} ended early, at {trainer.stopped}")


def _end_by_alarm(context: StageContext, trainer: RLTrainer) -> None:
    """Save the policy from before the alarm, and raise ``StageFailed``: such a stage has no artifact."""
    policy = "No checkpoint was written before it; the stage's own policy is from before the alarm."
    if trainer.returned_to is not None:
        folder = context.checkpoints / BEFORE_ALARM
        trainer.save_model(str(folder))
        policy = f"The policy of update {trainer.returned_to}, from before it, is the `source` {folder}."
    raise StageFailed(
        f"{context.name} ended by an alarm (on_alarm: stop), at {trainer.alarm_stop} {policy} Correct what the alarm "
        "names, or write `on_alarm: warn` to train on."
    )


@contextmanager
def _explain_lost_engine(context: StageContext) -> Iterator[None]:
    """Add the next run's starting point to an ``EngineLost``."""
    try:
        yield
    except EngineLost as error:
        checkpoint = last_checkpoint(context.checkpoints)
        none_yet = "start over, since no checkpoint was written yet"
        start = none_yet if checkpoint is None else f"resume from {checkpoint.name}"
        raise EngineLost(f"{error}\nOnce the server answers, run again to {start}.") from error


def _read_rows(context: StageContext, field: str, split: str) -> list[dict[str, Any]]:
    rows = read_rows(context.artifact(field).split(split))
    if not rows:
        raise UserError(f"{context.name}: {field} has no {split} rows; use a stage (a test_size) that has some.")
    return rows


def _read_prompts(context: StageContext) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return rows with prompts to learn from, and rows to validate on if the config asks for it."""
    config: RolloutFields = context.config
    rows = _read_rows(context, "prompts", "train")
    validation = None
    if config.eval_updates and validation_split(config) == "test":
        validation = _read_rows(context, "prompts", "test")[: config.eval_prompts]
    elif config.eval_updates:
        rows, validation = hold_back_validation(context, rows, config.eval_prompts)
    return rows[: config.max_prompts], validation


def _check_prompt_lengths(context: StageContext, tokenizer: Any, prompts: list[dict[str, Any]]) -> None:
    """Refuse prompts that are mostly too long, before a model is loaded. Of many prompts every n-th is rendered."""
    config: RolloutFields = context.config
    if config.long_rows == "skip":
        return
    some = prompts[:: len(prompts) // MOST_MEASURED + 1]
    lengths = [len(render_prompt(tokenizer, row["prompt"], row.get("tools"))) for row in some]
    refuse_long_rows(context.name, "max_prompt_tokens", config.max_prompt_tokens, lengths, "prompts")


def _load_reward_models(context: StageContext) -> list[RewardModel]:
    config: RolloutFields = context.config
    if config.replay is not None and getattr(config, "critic_source", None) != "reward":
        return []  # stored rollouts have their scores
    artifacts = context.inputs["reward"] or []
    if not isinstance(artifacts, list):
        artifacts = [artifacts]
    return [_load_reward_model(context, artifact) for artifact in artifacts]


def _load_reward_model(context: StageContext, artifact: Artifact) -> RewardModel:
    device = device_of(context.runtime)
    rounded = may_round_reward(context.config, context.precision)
    model = RewardModel(artifact.model, device, context.precision, share_beginnings=True, rounded=rounded)
    model.on_progress = lambda done, total: context.phase(f"scoring {done}/{total} by '{artifact.stage}'")
    return model


def _open_parts(context: StageContext) -> list[Part]:
    """Return the parts of ``score``, before a model is loaded: functions and judges are checked now."""

    def load(artifact: Artifact) -> RewardModel:
        model = _load_reward_model(context, artifact)
        model.round_weights()  # no critic starts from it
        return model

    # score_weight is the weight of a single function; a list has its own weights, and score_weight 1.
    weight = context.config.score_weight
    return [replace(part, weight=weight * part.weight) for part in open_parts(context, load, world_size())]


def _make_scorer(
    context: StageContext, reward_models: list[RewardModel], score_parts: list[Part]
) -> WeightedSum | None:
    """Return the sum of ``reward`` and ``score``, with all reward models loaded; None if only an environment scores."""
    config: RolloutFields = context.config
    parts: list[Part] = []
    members: tuple[Scorer, ...] = tuple(map(RewardScorer.of, reward_models))
    if members:
        ensemble = Ensemble(members, config.ensemble, config.uncertainty_weight)
        parts.append(Part("reward", config.reward_weight, members[0] if len(members) == 1 else ensemble))
    for part in score_parts:
        part.scorer.open()
    return WeightedSum((*parts, *score_parts), isinstance(config.score, list)) if parts or score_parts else None


def trainer_options(context: StageContext) -> dict[str, Any]:
    """Return the options of a trainer's arguments that are not in its config: the stage's own, then ``trainer``."""
    config: RolloutFields = context.config
    on_gpu = device_of(context.runtime).type == "cuda"
    continued = continued_facts(context)
    options: dict[str, Any] = {
        "output_dir": str(context.checkpoints),
        "seed": context.seed % 2**32,
        "use_cpu": not on_gpu,
        "launch": context.runtime.launch,
        "precision": context.precision,
        "guess": context.guess,
        "ddp_timeout": math.ceil(context.runtime.launch.timeout),
        "save_strategy": "steps",
        "save_total_limit": 2,
        "disable_tqdm": True,
        **tracking_options(context),
        **parallel_options(context, on_gpu),
    }
    if continued is not None:
        options["warmup_steps"] = continued.warmup_steps  # of the stage that this stage continues
    return options | config.trainer | offload_options(context, on_gpu)
