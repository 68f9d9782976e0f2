"""A trainer without a critic: the policy, its reference, and a loss that a method fills in."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from align.config.tuning import FullTuning, TuningBase
from align.models.tuning.apply import apply_tuning
from align.rl.arguments import RolloutArguments
from align.rl.model import PolicyAndReference
from align.rl.online_trainer import OnlineTrainer, choose_form
from align.rl.prompts import derive_seed
from align.rl.ptx import take_out
from align.rl.rollout import AnyScorer

logger = logging.getLogger(__name__)


class CriticFreeTrainer(OnlineTrainer):
    """Trains ``model`` on responses it samples itself to the prompts of ``train_dataset``.

    ``model`` is a causal language model in float32; ``tuning`` says how it is fitted. ``train_dataset`` yields rows
    with a ``prompt``, a text or messages. ``scorer`` gives each response a score, ``gold`` another that is only logged.
    ``engine`` samples (``align.inference``). ``eval_dataset`` has prompts for validations, ``ptx_dataset`` rows with
    ``prompt`` and ``completion`` messages for ``ptx_coef``. ``notify`` hears alarms, by default the log does.
    """

    def __init__(
        self,
        model: Any,
        args: RolloutArguments,
        train_dataset: Iterable[Mapping[str, Any]],
        processing_class: Any,
        scorer: AnyScorer,
        engine: Any,
        gold: AnyScorer | None = None,
        tuning: TuningBase | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        ptx_dataset: Iterable[Mapping[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> None:
        form = choose_form([model], args)
        policy = apply_tuning(model, tuning or FullTuning(), derive_seed(args.seed, "policy"))
        super().__init__(
            PolicyAndReference(policy, args.temperature),
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

    @abstractmethod
    def loss_of(
        self, out: dict[str, torch.Tensor], learn: dict[str, torch.Tensor], count: torch.Tensor
    ) -> torch.Tensor:
        """A micro-batch's share of the optimizer step's loss; what is worth logging goes into ``_averages``.

        ``out`` is what the policy says now (``logprobs``, ``entropy``), ``learn`` what the rollout said
        (``learned_from``), ``count`` what ``count_learned`` came to over the whole step.
        """

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """One micro-batch's share of the optimizer step's loss; ``num_items_in_batch`` counts that whole step."""
        count, ptx_count = num_items_in_batch.unbind()
        out = inputs.pop("out", None)
        if out is None:
            out = model(inputs["pack"])
        out, ptx_loss, ptx_tokens = take_out(out, inputs["pack"], inputs["learn"]["learn_mask"].shape[1])
        loss = self.loss_of(out, inputs["learn"], count)
        if ptx_loss is not None:
            loss = loss + self.args.ptx_coef * ptx_loss / ptx_count
        if self.ptx is not None:
            self._averages.add("ptx_loss", 0.0 if ptx_loss is None else ptx_loss.detach(), ptx_tokens)
        self._require_finite("loss", loss)
        loss = loss * self.args.world_size  # DDP averages gradients; ours are shares of one sum
        return (loss, out) if return_outputs else loss
