"""PPO with a critic as a ``transformers.Trainer``: its loop, callbacks, accumulation, schedules and checkpoints.

Here is the critic, and what is learned from a rollout with it. The rest is shared with methods that have none
(``online.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from transformers import TrainerCallback

from align.config.tuning import FullTuning, TuningBase
from align.models.tuning.apply import apply_tuning
from align.rl.model import PolicyAndCritic
from align.rl.online_trainer import OnlineTrainer, choose_form
from align.rl.ppo.config import PPOConfig
from align.rl.ppo.critic import make_critic
from align.rl.ppo.losses import loss_count
from align.rl.ppo.objective import LEARNED_FROM, ppo_loss
from align.rl.prompts import derive_seed
from align.rl.ptx import take_out
from align.rl.rollout import AnyScorer, Rollout, add_advantages

logger = logging.getLogger(__name__)


class PPOTrainer(OnlineTrainer):
    """Trains ``model`` to earn higher scores on the prompts of ``train_dataset`` (arXiv 1707.06347, 1909.08593).

    ``model`` is a causal language model in float32; ``tuning`` says whether all of it or LoRA adapters are trained.
    ``train_dataset`` yields rows with a ``prompt``, a text or messages. ``scorer`` gives each response a score,
    ``gold`` another that is only logged. ``critic`` starts from ``reward_model``, a sequence classifier, by default
    where there is one, else from the ``policy``; or it is a ``head`` on the policy's trunk. ``engine`` samples
    (``align.inference``). ``eval_dataset`` has prompts for validations, ``ptx_dataset`` rows with ``prompt`` and
    ``completion`` messages for ``ptx_coef``. ``notify`` hears alarms, by default the log does.
    """

    method: ClassVar[str] = "ppo"
    learned_from: ClassVar[tuple[str, ...]] = LEARNED_FROM
    args: PPOConfig
    model: PolicyAndCritic

    def __init__(
        self,
        model: Any,
        args: PPOConfig,
        train_dataset: Iterable[Mapping[str, Any]],
        processing_class: Any,
        scorer: AnyScorer,
        engine: Any,
        reward_model: Any = None,
        gold: AnyScorer | None = None,
        tuning: TuningBase | None = None,
        critic: Literal["reward", "policy", "head"] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        ptx_dataset: Iterable[Mapping[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> None:
        tuning = tuning or FullTuning()
        made = make_critic(critic, model, reward_model, tuning, derive_seed(args.seed, "critic"))
        form = choose_form([model, *([] if made.trunk is None else [made.trunk])], args)
        policy = apply_tuning(model, tuning, derive_seed(args.seed, "policy"))
        super().__init__(
            PolicyAndCritic(policy, made, args.temperature, args.critic_detach),
            form,
            args,
            train_dataset,
            processing_class,
            scorer,
            engine,
            gold=gold,
            eval_dataset=eval_dataset,
            ptx_dataset=ptx_dataset,
            callbacks=callbacks,
            notify=notify,
        )

    def estimate(self, rollout: Rollout, kl_coef: float) -> None:
        """Rewards per token, advantages by the critic, and returns."""
        add_advantages(rollout, self.args, kl_coef, scale=self.scale)

    def count_learned(self, learns: list[dict[str, torch.Tensor]]) -> float:
        """Tokens or responses of an optimizer step, by ``loss_aggregation``."""
        masks = [learn["learn_mask"] for learn in learns]
        return loss_count(masks, self.args.loss_aggregation, self.args.max_tokens)

    def _passes_to_keep(self, update: int, micro_batches: int) -> int:
        return 0 if update < self.args.critic_warmup_updates else super()._passes_to_keep(update, micro_batches)

    @property
    def warming(self) -> bool:
        """Whether the critic learns alone in this update."""
        return self.update < self.args.critic_warmup_updates

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As ever; while the critic warms up, the policy has no gradients afterwards.

        Under DDP it has some, zeros or a shared trunk's, with which AdamW would decay it and count steps.
        """
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.warming:
            for parameter in self.model.policy.parameters():
                parameter.grad = None
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """One micro-batch's share of the optimizer step's loss; ``num_items_in_batch`` counts that whole step."""
        args, mask = self.args, inputs["learn"]["learn_mask"]
        count, ptx_count = num_items_in_batch.unbind()
        warming = self.warming
        out = inputs.pop("out", None)
        value_part: torch.Tensor | float = 0.0
        if out is None:
            apart = self._learns_apart and not warming
            if apart:
                value_part = self._learn_values(model, inputs, count)
            # Under DDP every parameter must take part in the backward pass, so the policy runs during warm-up too.
            out = model(inputs["pack"], policy=not warming or args.world_size > 1, critic=not apart)
        out, ptx_loss, ptx_tokens = take_out(out, inputs["pack"], mask.shape[1])
        loss, sums = ppo_loss(out, inputs["learn"], mask, count, args, warming, self._loss_kl_coef)
        if ptx_loss is not None:
            loss = loss + (0.0 if warming else args.ptx_coef) * ptx_loss / ptx_count
        if self.ptx is not None:
            self._averages.add("ptx_loss", 0.0 if ptx_loss is None else ptx_loss.detach(), ptx_tokens)
        for name, total in sums.items():
            self._averages.add(name, total, mask.sum())
        self._require_finite("loss", loss)
        loss = loss * args.world_size + value_part  # DDP averages gradients; ours are shares of one sum
        return (loss, out) if return_outputs else loss

    @property
    def _learns_apart(self) -> bool:
        """Whether the critic's backward pass can be over before the policy's forward pass, which halves activations.

        It cannot where they share a trunk, nor under DDP, which knows one backward pass for each forward pass.
        """
        return self.args.world_size == 1 and self.model.critic.trunk is not None

    def _learn_values(self, model: Any, inputs: dict[str, Any], count: torch.Tensor) -> torch.Tensor:
        """Forward and backward pass of the critic; returns its part of the loss, without a graph."""
        mask = inputs["learn"]["learn_mask"]
        out, _, _ = take_out(model(inputs["pack"], policy=False), inputs["pack"], mask.shape[1])
        loss, sums = ppo_loss(out, inputs["learn"], mask, count, self.args, warming=False)
        for name, total in sums.items():
            self._averages.add(name, total, mask.sum())
        self._require_finite("loss", loss)
        with torch.autocast(loss.device.type, enabled=False):  # as the Trainer's own backward pass is
            self.accelerator.backward(loss)
        return loss.detach()
