"""The trainers of scripts, one class per method: they build the models and the objective of an ``RLTrainer``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from transformers import TrainerCallback

from align.config.stages.ppo import PpoConfig
from align.config.stages.rl import RolloutFields
from align.environments.player import EnvironmentPlayer
from align.models.fast.ragged_rows import can_run_ragged, enable_ragged
from align.models.tuning.apply import apply_tuning
from align.rl.arguments import RolloutArguments, rollout_arguments
from align.rl.model import PolicyAndCritic, PolicyAndReference, make_critic
from align.rl.objectives import Objective
from align.rl.objectives.grpo import GRPOObjective, RLOOObjective
from align.rl.objectives.ppo import PPOObjective
from align.rl.objectives.selection import BestOfNObjective, OnlineDPOObjective
from align.rl.packing import Form
from align.rl.prompts import derive_seed
from align.rl.refusals import RolloutInputs, Rows
from align.rl.sampler import AnyScorer
from align.rl.trainer import RLTrainer

logger = logging.getLogger(__name__)


class PPOTrainer(RLTrainer):
    """Trains ``model`` to earn higher scores on the prompts of ``train_dataset`` (arXiv 1707.06347, 1909.08593).

    Args:
        model: A causal language model in float32.
        config: The settings; ``tuning`` and ``critic`` are among them.
        train_dataset: Rows with a ``prompt``, a text or messages.
        scorer: Gives each response a score. ``None`` if only the environment of ``episodes`` scores.
        engine: Samples responses (``align.inference``).
        options: Options of ``TrainingArguments``, such as ``output_dir`` and ``seed`` (``rollout_arguments``).
        reward_model: A sequence classifier that the critic starts from, unless ``config.critic`` says otherwise.
        gold: Gives each response another score that is only logged.
        eval_dataset: Prompts for validations.
        ptx_dataset: Rows with ``prompt`` and ``completion`` messages for ``ptx_coef``.
        episodes: Plays episodes in an environment instead of sampling single responses.
        notify: Called with each alarm; by default it logs a warning.
    """

    model: PolicyAndCritic

    def __init__(
        self,
        model: Any,
        config: PpoConfig,
        train_dataset: Rows,
        processing_class: Any,
        scorer: AnyScorer | None,
        *,
        engine: Any,
        options: Mapping[str, Any],
        reward_model: Any = None,
        gold: AnyScorer | None = None,
        eval_dataset: Rows | None = None,
        ptx_dataset: Rows | None = None,
        episodes: EnvironmentPlayer | None = None,
        callbacks: list[TrainerCallback] | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> None:
        args = rollout_arguments(config, **options)
        tuning = config.tuning
        value_model = make_critic(config.critic, model, reward_model, tuning, derive_seed(args.seed, "critic"))
        trunks = [] if value_model.trunk is None else [value_model.trunk]
        form = choose_form([model, *trunks], args)
        # Last: the critic above was built on the model without adapters.
        policy = apply_tuning(model, tuning, derive_seed(args.seed, "policy"))
        super().__init__(
            PolicyAndCritic(policy, value_model, config.temperature, config.critic_detach),
            PPOObjective(config),
            form,
            args,
            processing_class,
            inputs=RolloutInputs(train_dataset, scorer, engine, gold, eval_dataset, ptx_dataset, episodes),
            callbacks=callbacks,
            notify=notify,
        )


class CriticFreeTrainer(RLTrainer):
    """Trains ``model`` on responses it samples itself to the prompts of ``train_dataset``, without a critic.

    The arguments are ``PPOTrainer``'s.
    """

    objective_class: ClassVar[type[Objective]]

    def __init__(
        self,
        model: Any,
        config: RolloutFields,
        train_dataset: Rows,
        processing_class: Any,
        scorer: AnyScorer | None,
        *,
        engine: Any,
        options: Mapping[str, Any],
        gold: AnyScorer | None = None,
        eval_dataset: Rows | None = None,
        ptx_dataset: Rows | None = None,
        episodes: EnvironmentPlayer | None = None,
        callbacks: list[TrainerCallback] | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> None:
        args = rollout_arguments(config, **options)
        form = choose_form([model], args)
        policy = apply_tuning(model, config.tuning, derive_seed(args.seed, "policy"))
        super().__init__(
            PolicyAndReference(policy, config.temperature),
            self.objective_class(config),
            form,
            args,
            processing_class,
            inputs=RolloutInputs(train_dataset, scorer, engine, gold, eval_dataset, ptx_dataset, episodes),
            callbacks=callbacks,
            notify=notify,
        )


class GRPOTrainer(CriticFreeTrainer):
    """Group-relative policy optimization (arXiv 2402.03300) and its variants; settings: ``GrpoConfig``."""

    objective_class = GRPOObjective


class RLOOTrainer(CriticFreeTrainer):
    """REINFORCE with the mean of the other responses as baseline (arXiv 2402.14740); settings: ``RlooConfig``."""

    objective_class = RLOOObjective


class OnlineDPOTrainer(CriticFreeTrainer):
    """DPO on pairs of the policy's own responses (arXiv 2402.04792); settings: ``OnlineDpoConfig``."""

    objective_class = OnlineDPOObjective


class BestOfNTrainer(CriticFreeTrainer):
    """Best-of-N fine-tuning in rounds (RAFT, arXiv 2304.06767); settings: ``RejectionConfig``."""

    objective_class = BestOfNObjective


def choose_form(models: list[Any], args: RolloutArguments) -> Form:
    """Return the packing of micro-batches, and prepare the models for it. Call it before adapters and copies exist."""
    if not (args.padding_free and all(map(can_run_ragged, models))):
        return "padded"
    for model in models:
        enable_ragged(model)
    return "shared" if args.share_prompts else "ragged"
