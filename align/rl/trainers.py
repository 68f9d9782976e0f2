"""The trainers of scripts, one class per method: they build the models and the objective of an ``RLTrainer``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from transformers import TrainerCallback

from align.config.tuning import FullTuning, TuningBase
from align.environments.player import EnvironmentPlayer
from align.models.fast.ragged_rows import can_run_ragged, enable_ragged
from align.models.tuning.apply import apply_tuning
from align.rl.arguments import PPOConfig, RolloutArguments
from align.rl.critic import make_critic
from align.rl.inputs import RolloutInputs, Rows
from align.rl.model import PolicyAndCritic, PolicyAndReference
from align.rl.objectives.base import Objective
from align.rl.objectives.best_of_n import BestOfNObjective
from align.rl.objectives.grpo import GRPOObjective
from align.rl.objectives.online_dpo import OnlineDPOObjective
from align.rl.objectives.ppo import PPOObjective
from align.rl.objectives.rloo import RLOOObjective
from align.rl.packing import Form
from align.rl.prompts import derive_seed
from align.rl.sampler import AnyScorer
from align.rl.trainer import RLTrainer

logger = logging.getLogger(__name__)


class PPOTrainer(RLTrainer):
    """Trains ``model`` to earn higher scores on the prompts of ``train_dataset`` (arXiv 1707.06347, 1909.08593).

    ``model`` is a causal language model in float32; ``tuning`` selects full tuning or adapters. ``train_dataset``
    yields rows with a ``prompt``, a text or messages. ``scorer`` gives each response a score, ``gold`` another that is
    only logged. ``engine`` samples (``align.inference``). ``critic`` starts from ``reward_model``, a sequence
    classifier, by default where there is one, else from the ``policy``; or it is a ``head`` on the policy's trunk.
    ``eval_dataset`` has prompts for validations, ``ptx_dataset`` rows with ``prompt`` and ``completion`` messages for
    ``ptx_coef``. ``episodes`` plays episodes in an environment instead of single responses; ``scorer`` is then None, or
    adds to what the environment scores. ``notify`` is called with each alarm; by default it logs a warning.
    """

    args: PPOConfig
    model: PolicyAndCritic

    def __init__(
        self,
        model: Any,
        args: PPOConfig,
        train_dataset: Rows,
        processing_class: Any,
        scorer: AnyScorer | None,
        *,
        engine: Any,
        reward_model: Any = None,
        gold: AnyScorer | None = None,
        tuning: TuningBase | None = None,
        critic: Literal["reward", "policy", "head"] | None = None,
        eval_dataset: Rows | None = None,
        ptx_dataset: Rows | None = None,
        episodes: EnvironmentPlayer | None = None,
        callbacks: list[TrainerCallback] | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> None:
        tuning = tuning or FullTuning()
        value_model = make_critic(critic, model, reward_model, tuning, derive_seed(args.seed, "critic"))
        trunks = [] if value_model.trunk is None else [value_model.trunk]
        form = choose_form([model, *trunks], args)
        # Last: the critic above was built on the model without adapters.
        policy = apply_tuning(model, tuning, derive_seed(args.seed, "policy"))
        super().__init__(
            PolicyAndCritic(policy, value_model, args.temperature, args.critic_detach),
            PPOObjective(args),
            form,
            args,
            processing_class,
            inputs=RolloutInputs(train_dataset, scorer, engine, gold, eval_dataset, ptx_dataset, episodes),
            callbacks=callbacks,
            notify=notify,
        )


class CriticFreeTrainer(RLTrainer):
    """Trains ``model`` on responses it samples itself to the prompts of ``train_dataset``, without a critic.

    The arguments are those of ``PPOTrainer``.
    """

    objective_class: ClassVar[type[Objective]]

    def __init__(
        self,
        model: Any,
        args: RolloutArguments,
        train_dataset: Rows,
        processing_class: Any,
        scorer: AnyScorer | None,
        *,
        engine: Any,
        gold: AnyScorer | None = None,
        tuning: TuningBase | None = None,
        eval_dataset: Rows | None = None,
        ptx_dataset: Rows | None = None,
        episodes: EnvironmentPlayer | None = None,
        callbacks: list[TrainerCallback] | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> None:
        form = choose_form([model], args)
        policy = apply_tuning(model, tuning or FullTuning(), derive_seed(args.seed, "policy"))
        super().__init__(
            PolicyAndReference(policy, args.temperature),
            self.objective_class(args),
            form,
            args,
            processing_class,
            inputs=RolloutInputs(train_dataset, scorer, engine, gold, eval_dataset, ptx_dataset, episodes),
            callbacks=callbacks,
            notify=notify,
        )


class GRPOTrainer(CriticFreeTrainer):
    """Group-relative policy optimization (arXiv 2402.03300) and its variants; arguments: ``GRPOConfig``."""

    objective_class = GRPOObjective


class RLOOTrainer(CriticFreeTrainer):
    """REINFORCE with the mean of the other responses as baseline (arXiv 2402.14740); arguments: ``RLOOConfig``."""

    objective_class = RLOOObjective


class OnlineDPOTrainer(CriticFreeTrainer):
    """DPO on pairs of the policy's own responses (arXiv 2402.04792); arguments: ``OnlineDPOConfig``."""

    objective_class = OnlineDPOObjective


class BestOfNTrainer(CriticFreeTrainer):
    """Best-of-N fine-tuning in rounds (RAFT, arXiv 2304.06767); arguments: ``BestOfNConfig``."""

    objective_class = BestOfNObjective


def choose_form(models: list[Any], args: RolloutArguments) -> Form:
    """Return how micro-batches are packed, and prepare the models for it. Call it before adapters and copies exist."""
    if not (args.padding_free and all(map(can_run_ragged, models))):
        return "padded"
    for model in models:
        enable_ragged(model)
    return "shared" if args.share_prompts else "ragged"
