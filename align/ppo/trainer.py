"""PPO with a critic as a ``transformers.Trainer``: its loop, callbacks, accumulation, schedules and checkpoints.

Here is what is learnt from a rollout; how one comes about stands in ``experience.py``, what is saved in ``saving.py``.
Everything is normalised by counts over the whole optimizer step, so micro-batching, padding and the number of
processes change nothing. Left out: sharded training (FSDP, DeepSpeed).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from align.errors import UserError
from align.models.merging import merged_weights
from align.models.precision import low_residual, round_frozen
from align.models.ragged import can_run_ragged, run_ragged
from align.models.tuning.apply import apply_tuning
from align.ppo import metrics
from align.ppo.alarms import Alarm, alarms
from align.ppo.config import PPOConfig
from align.ppo.critic import make_critic
from align.ppo.experience import RolloutTrainer
from align.ppo.kl import make_controller
from align.ppo.losses import loss_count
from align.ppo.model import PolicyAndCritic
from align.ppo.normalise import RunningScale
from align.ppo.objective import ppo_loss
from align.ppo.optimizer import clip_by_part, make_optimizer
from align.ppo.packing import Form
from align.ppo.prompts import Prompts, derive_seed
from align.ppo.ptx import make_ptx, take_out
from align.ppo.rollout import AnyScorer
from align.ppo.validation import make_validation
from align.tuning import FullTuning, LoraTuning

logger = logging.getLogger(__name__)


class PPOTrainer(RolloutTrainer):
    """Trains ``model`` to earn higher scores on the prompts of ``train_dataset`` (arXiv 1707.06347, 1909.08593).

    ``model`` is a causal language model in float32; ``tuning`` says whether all of it or LoRA adapters are trained.
    ``train_dataset`` yields rows with a ``prompt``, a text or messages. ``scorer`` gives each response a score,
    ``gold`` another that is only logged. ``critic`` starts from ``reward_model``, a sequence classifier, by default
    where there is one, else from the ``policy``; or it is a ``head`` on the policy's trunk. ``engine`` samples
    (``align.rollouts``). ``eval_dataset`` has prompts for validations, ``ptx_dataset`` rows with ``prompt`` and
    ``completion`` messages for ``ptx_coef``. ``notify`` hears alarms, by default the log does.
    """

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
        tuning: FullTuning | LoraTuning | None = None,
        critic: Literal["reward", "policy", "head"] | None = None,
        eval_dataset: Iterable[Mapping[str, Any]] | None = None,
        ptx_dataset: Iterable[Mapping[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> None:
        tuning = tuning or FullTuning()
        made = make_critic(critic, model, reward_model, tuning, derive_seed(args.seed, "critic"))
        self.form: Form = _choose_form([model, *([] if made.trunk is None else [made.trunk])], args)
        policy = apply_tuning(model, tuning, derive_seed(args.seed, "policy"))
        both = PolicyAndCritic(policy, made, args.temperature, args.critic_detach)
        if args.bf16:
            low_residual(both)
            if both.reference is not None:
                round_frozen(both.reference)
        super().__init__(model=both, args=args, processing_class=processing_class, callbacks=callbacks)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError("ppo: sharded training (FSDP, DeepSpeed) is not supported; use one process or DDP.")
        self.prompts = Prompts(train_dataset, processing_class, args.max_prompt_tokens)
        self.scorer, self.gold, self.engine, self.notify = scorer, gold, engine, notify
        self.validation = make_validation(args, eval_dataset, processing_class)
        self.ptx = make_ptx(args, ptx_dataset, processing_class)
        # compute_loss divides by num_items_in_batch itself: without this the Trainer would divide once more.
        self.model_accepts_loss_kwargs = True
        self.kl_controller = make_controller(args.kl_controller, args.kl_coef, args.kl_target, args.kl_horizon)
        self.totals = {"episodes": 0, "tokens": 0}
        self._averages = metrics.Averages()
        self._extra: dict[str, float] = {}
        self.scale = RunningScale() if args.normalise_scores else None
        self.alarms: list[Alarm] = []
        self.stopped: str | None = None
        """Why the run ended before its last update, if it did."""
        self._probed = False
        self._loss_kl_coef = 0.0

    # ---- learning ----

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """One micro-batch's share of the optimizer step's loss; ``num_items_in_batch`` counts that whole step."""
        args, mask = self.args, inputs["learn"]["learn_mask"]
        count, ptx_count = num_items_in_batch.unbind()
        warming = self.update < args.critic_warmup_updates
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

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """What this optimizer step's PPO loss and ptx loss are divided by, (2,): counts over all processes."""
        masks = [sample["learn"]["learn_mask"] for sample in batch_samples]
        count = loss_count(masks, self.args.loss_aggregation, self.args.max_tokens)
        ptx = sum(float(sample["pack"]["response_mask"][-int(n) :].sum()) for sample in batch_samples
                  if (n := sample["pack"].get("ptx", 0)))  # fmt: skip
        return self.reduce(torch.tensor([count, ptx], device=device)).clamp(min=1)  # without any token the sums are 0

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with a learning rate of its own for the critic."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self, self.model if model is None else model)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """Clip policy and critic separately: a critic far off must not shrink the policy's step."""
        norms = clip_by_part(self.accelerator.unwrap_model(model), self.args.max_grad_norm)
        for name, norm in norms.items():
            self._require_finite(f"gradient of the {name}", norm)
            self._averages.add(f"grad_norm_{name}", norm)
        total: torch.Tensor = torch.stack(list(norms.values())).norm()
        return total

    def _require_finite(self, what: str, value: torch.Tensor) -> None:
        if not bool(torch.isfinite(value)):
            raise UserError(
                f"ppo: update {self.update + 1} (optimizer step {self.state.global_step + 1}): the {what} is "
                f"{value.item()}. The last checkpoint is from before it. Lower learning_rate (now "
                f"{self.args.learning_rate:g}), critic_learning_rate or max_grad_norm ({self.args.max_grad_norm:g})."
            )

    # ---- logging and checkpoints ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        prompts = self.state.global_step / self.args.steps_per_update * self.args.rollout_batch
        self.state.epoch = prompts / self.args.samples_per_prompt / len(self.prompts)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the update's metrics to what the Trainer logs after its last optimizer step."""
        if "loss" in logs and self._extra:
            means = metrics.finish(self._averages.means(self.reduce))
            learning = time.perf_counter() - self._learning_since
            logs = {**logs, **means, **self._extra, **self.totals, "update": self.update, "seconds_learning": learning}
            logs["seconds"] = sum(value for name, value in logs.items() if name.startswith("seconds_"))
            logs["peak_memory_gib"] = metrics.peak_memory_gib()
            self._extra = {}
        super().log(logs, start_time)
        if "score" in logs:
            self._raise_alarms()

    def _raise_alarms(self) -> None:
        """Tell of alarms that did not hold at the update before, and stop the run if asked to."""
        history = [entry for entry in self.state.log_history if "score" in entry]
        before = {alarm.name for alarm in alarms(history[:-1])}
        for alarm in alarms(history):
            if alarm.name in before:
                continue
            self.alarms.append(alarm)
            text = f"update {alarm.update}: {alarm.name}: {alarm.text}."
            if self.is_world_process_zero():
                self.notify(text)
            if self.args.on_alarm == "stop":
                self.stopped = self.stopped or text
                self.control.should_training_stop = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, validate what came out, and put the best policy in the last one's place if ``keep`` says so."""
        result = super().train(*args, **kwargs)
        if self.validation is not None:
            if self.update not in [entry["update"] for entry in self.state.log_history if "eval_score" in entry]:
                self.engine.load_weights(merged_weights(self.model.policy))
                super().log({**self.validation.run(self, self.update), "update": self.update})
            if self.args.keep != "last":
                self.accelerator.wait_for_everyone()
                self.validation.restore(self.model)
        return result

    def state_to_save(self) -> dict[str, Any]:
        """KL controller, totals, running scale, best validation, and the fields that decide the data order."""
        state = {"kl": self.kl_controller.state_dict(), "totals": self.totals, "fingerprint": self.args.fingerprint()}
        if self.scale is not None:
            state["scale"] = self.scale.state_dict()
        return state | ({} if self.validation is None else {"best": self.validation.best})

    def take_state(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's state."""
        self.kl_controller.load_state_dict(state["kl"])
        if self.scale is not None:
            self.scale.load_state_dict(state["scale"])
        if self.validation is not None:
            self.validation.best = state["best"]
        self.totals = state["totals"]

    def after_saving(self) -> None:
        """Weights of former best policies are needed no more."""
        if self.validation is not None:
            self.validation.tidy()


def _choose_form(models: list[Any], args: PPOConfig) -> Form:
    """How micro-batches are packed, and the models made ready for it."""
    if not (args.padding_free and all(map(can_run_ragged, models))):
        return "padded"
    for model in models:
        run_ragged(model)
    return "shared" if args.share_prompts else "ragged"
