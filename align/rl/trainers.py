"""The trainers of scripts, one class per method: they build the models and the objective of an ``RLTrainer``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers import TrainerCallback

from align.config.stages.rl import RolloutFields
from align.environments.player import EnvironmentPlayer
from align.models.fast.ragged_rows import try_ragged
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
from align.rl.scores import AnyScorer
from align.rl.trainer import RLTrainer

logger = logging.getLogger(__name__)


class MethodTrainer(RLTrainer):
    """Builds the models and the objective of a method, here without a critic; ``PPOTrainer`` lists the arguments."""

    objective_class: ClassVar[type[Objective]]

    def __init__(
        self,
        model: Any,
        config: RolloutFields,
        train_dataset: Rows,
        processing_class: Any,
        scorer: AnyScorer | None,
        *,
        engine: Any = None,
        options: Mapping[str, Any],
        reward_model: Any = None,
        gold: AnyScorer | None = None,
        eval_dataset: Rows | None = None,
        ptx_dataset: Rows | None = None,
        episodes: EnvironmentPlayer | None = None,
        replay: Path | None = None,
        callbacks: list[TrainerCallback] | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> None:
        # A stage's config has numbers already.
        config = config.model_copy(update=config.default_rates(model.num_parameters()))
        args = rollout_arguments(config, **options)
        trained, form = self.build_model(model, reward_model, args)
        super().__init__(
            trained,
            self.objective_class(config),
            form,
            args,
            processing_class,
            inputs=RolloutInputs(train_dataset, scorer, engine, gold, eval_dataset, ptx_dataset, episodes, replay),
            callbacks=callbacks,
            notify=notify,
        )

    def build_model(self, model: Any, reward_model: Any, args: RolloutArguments) -> tuple[PolicyAndReference, Form]:
        """Return the module to train, with adapters on ``model``, and the packing of its micro-batches."""
        if reward_model is not None:
            raise TypeError(f"{type(self).__name__} has no critic that could start from a reward_model")
        form = choose_form([model], args)
        policy = apply_tuning(model, args.config.tuning, derive_seed(args.seed, "policy"))
        return PolicyAndReference(policy, args.config.temperature), form


class PPOTrainer(MethodTrainer):
    """Trains ``model`` to earn higher scores on the prompts of ``train_dataset`` (arXiv 1707.06347, 1909.08593).

    Args:
        model: A causal language model in float32.
        config: The settings; ``tuning`` and ``critic`` are among them.
        train_dataset: Rows with a ``prompt``, a text or messages.
        processing_class: The tokenizer.
        scorer: Gives each response a score. ``None`` if only the environment of ``episodes`` scores.
        engine: Samples responses (``align.inference``).
        options: Options of ``TrainingArguments``, such as ``output_dir`` and ``seed`` (``rollout_arguments``).
        reward_model: A sequence classifier that the critic starts from, unless ``config.critic`` says otherwise.
        gold: Gives each response another score that is only logged.
        eval_dataset: Prompts for validations.
        ptx_dataset: Rows with ``prompt`` and ``completion`` messages for ``ptx_coef``.
        episodes: Plays episodes in an environment instead of sampling single responses.
        replay: Folder of stored rollouts to learn from instead of sampling. ``engine`` and ``scorer`` may then be None.
        callbacks: Callbacks of the Trainer.
        notify: Called with each alarm; by default it logs a warning.
    """

    model: PolicyAndCritic
    objective_class = PPOObjective

    def build_model(self, model: Any, reward_model: Any, args: RolloutArguments) -> tuple[PolicyAndReference, Form]:
        """Return policy, reference and critic in one module, and the packing of its micro-batches."""
        config: Any = args.config
        critic = make_critic(config.critic, model, reward_model, config.tuning, derive_seed(args.seed, "critic"))
        trunks = [] if critic.trunk is None else [critic.trunk]
        form = choose_form([model, *trunks], args)
        # Last: the critic above was built on the model without adapters.
        policy = apply_tuning(model, config.tuning, derive_seed(args.seed, "policy"))
        return PolicyAndCritic(policy, critic, config.temperature, config.critic_detach), form


class GRPOTrainer(MethodTrainer):
    """Group-relative policy optimization (arXiv 2402.03300) and its variants; settings: ``GrpoConfig``.

    The arguments are ``PPOTrainer``'s, without ``reward_model``.
    """

    objective_class = GRPOObjective


class RLOOTrainer(MethodTrainer):
    """REINFORCE with the mean of the other responses as baseline (arXiv 2402.14740); settings: ``RlooConfig``."""

    objective_class = RLOOObjective


class OnlineDPOTrainer(MethodTrainer):
    """DPO on pairs of the policy's own responses (arXiv 2402.04792); settings: ``OnlineDpoConfig``."""

    objective_class = OnlineDPOObjective


class BestOfNTrainer(MethodTrainer):
    """Best-of-N fine-tuning in rounds (RAFT, arXiv 2304.06767); settings: ``RejectionConfig``."""

    objective_class = BestOfNObjective


def choose_form(models: list[Any], args: RolloutArguments) -> Form:
    """Return the packing of micro-batches, and prepare the models for it. Call it before adapters and copies exist."""
    if not (args.padding_free and all(map(try_ragged, models))):
        return "padded"
    return "shared" if args.share_prompts else "ragged"
