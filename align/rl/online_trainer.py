"""A trainer that learns from its own rollouts, whatever the method: what it logs, when it stops, what it keeps.

How a rollout comes about stands in ``experience.py``, what is saved in ``saving.py``; PPO's loss in ``trainer.py``, the
losses without a critic in ``align.rl``. Everything is normalized by counts over the whole optimizer step, so
micro-batching, padding and the number of processes change nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from align.config.launch import rank
from align.errors import UserError
from align.models.fast.ragged_rows import can_run_ragged, run_ragged
from align.models.merging import merged_weights
from align.models.precision import low_residual, round_frozen
from align.models.processes import agreed
from align.models.sharding import forget_gathered, full, whole
from align.rl import metrics
from align.rl.alarms import Alarm, alarms
from align.rl.arguments import RolloutArguments
from align.rl.checkpoint import BEST, last_checkpoint
from align.rl.kl import make_controller
from align.rl.model import PolicyAndReference
from align.rl.packing import Form
from align.rl.ppo.optimizer import PARTS, clip_by_part, make_optimizer
from align.rl.prefetch import RolloutsAhead
from align.rl.prompts import Prompts
from align.rl.ptx import make_ptx
from align.rl.rollout import AnyScorer, Rollout, rollout_of, turn_of
from align.rl.rollout_trainer import RolloutTrainer
from align.rl.score_scale import RunningScale
from align.rl.validation import make_validation
from align.training.checkpoints import link
from align.training.zero import clip_part

logger = logging.getLogger(__name__)

Rows = Iterable[Mapping[str, Any]]


class OnlineTrainer(RolloutTrainer):
    """What ``PPOTrainer`` and the trainers of ``align.rl`` share; a subclass says what is learned from a rollout."""

    def __init__(
        self,
        both: PolicyAndReference,
        form: Form,
        args: RolloutArguments,
        train_dataset: Rows,
        processing_class: Any,
        scorer: AnyScorer,
        engine: Any,
        gold: AnyScorer | None = None,
        eval_dataset: Rows | None = None,
        ptx_dataset: Rows | None = None,
        callbacks: list[TrainerCallback] | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> None:
        self.form = form
        if args.bf16:
            low_residual(both)
            if both.reference is not None:
                round_frozen(both.reference)
        super().__init__(model=both, args=args, processing_class=processing_class, callbacks=callbacks)
        if self.is_fsdp_enabled or (self.is_deepspeed_enabled and not hasattr(args, "launch")):
            raise UserError(
                f"{self.method}: accelerate's FSDP and DeepSpeed plugins are not supported here. Run it as a stage "
                "with `runtime: {launch: {strategy: fsdp2}}`, or by DDP."
            )
        self.share_out()
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
        self.scale = RunningScale() if args.normalize_scores else None
        self.alarms: list[Alarm] = []
        self.stopped: str | None = None
        """Why the run ended before its last update, if it did."""
        self._probed = False
        self._norms: dict[str, torch.Tensor] = {}
        self._loss_kl_coef = 0.0

        self.ahead = RolloutsAhead(engine, self.own_turn, args.max_staleness, args.updates)
        if args.max_staleness and args.world_size > 1 and not self.ahead.shared:
            raise UserError(
                f"{self.method}: max_staleness {args.max_staleness} in several processes needs servers, since an "
                "engine of each would sample while it learns. Set runtime.rollouts, or max_staleness 0."
            )

    # ---- learning ----

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """What this optimizer step's loss and ptx loss are divided by, (2,): counts over all processes."""
        count = self.count_learned([sample["learn"] for sample in batch_samples])
        ptx = sum(float(sample["pack"]["response_mask"][-int(n) :].sum()) for sample in batch_samples
                  if (n := sample["pack"].get("ptx", 0)))  # fmt: skip
        return self.reduce(torch.tensor([count, ptx], device=device)).clamp(min=1)  # without any token the sums are 0

    def create_optimizer(self, model: Any = None) -> Any:
        """AdamW with a learning rate of its own for a critic."""
        if self.optimizer is None:
            forget_gathered(self.model)
            self.optimizer = make_optimizer(self, self.model if model is None else model)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """Clip policy and critic separately: a critic far off must not shrink the policy's step."""
        if self.is_deepspeed_enabled:
            norms = self._norms  # clipped already, and the step is made
        else:
            norms = clip_by_part(self.accelerator.unwrap_model(model), self.args.max_grad_norm)
        norms = {name: full(norm) for name, norm in norms.items()}
        for name, norm in norms.items():
            self._require_finite(f"gradient of the {name}", norm)
            self._averages.add(f"grad_norm_{name}", norm)
        total: torch.Tensor = torch.stack(list(norms.values())).norm()
        return total

    clips_itself = True

    def clip_in_parts(self) -> None:
        """As ``_clip_grad_norm``, where DeepSpeed holds the gradients."""
        trained = {part: getattr(self.model, part, None) for part in PARTS}
        self._norms = {
            part: clip_part([p for p in model.parameters() if p.requires_grad], self.args.max_grad_norm)
            for part, model in trained.items() if model is not None
        }  # fmt: skip

    def _require_finite(self, what: str, value: torch.Tensor) -> None:
        if not bool(torch.isfinite(value)):
            rates = f"learning_rate (now {self.args.learning_rate:g})"
            rates += ", critic_learning_rate" if hasattr(self.model, "critic") else ""
            raise UserError(
                f"{self.method}: update {self.update + 1} (optimizer step {self.state.global_step + 1}): the {what} is "
                f"{value.item()}. The last checkpoint is from before it. Lower {rates} or max_grad_norm "
                f"({self.args.max_grad_norm:g})."
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

    @property
    def is_over(self) -> bool:
        """True when no update is left, or when the run had ended early before its checkpoint was written."""
        return self.stopped is not None or super().is_over

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, validate what came out, and put the best policy in the last one's place if ``keep`` says so."""
        if resume_from_checkpoint is True:
            newest = agreed(lambda: last_checkpoint(Path(str(self.args.output_dir)), self.notify))
            resume_from_checkpoint = True if newest is None else str(newest)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            self.ahead.settle()  # a run that ended early may have drawn ahead
        finally:
            self.ahead.close()
        if self.validation is not None:
            if self.update not in [entry["update"] for entry in self.state.log_history if "eval_score" in entry]:
                with whole(self.model) as model:
                    self.engine.load_weights(merged_weights(model.policy))
                super().log({**self.validation.run(self, self.update), "update": self.update})
            if self.args.keep != "last":
                self.accelerator.wait_for_everyone()
                self.validation.restore(self.model)
        return result

    def state_to_save(self) -> dict[str, Any]:
        """KL controller, totals, alarms, running scale, best validation, rollouts drawn ahead, and the fields that
        decide the data order."""
        state: dict[str, Any] = {"kl": self.kl_controller.state_dict(), "totals": self.totals}
        state |= {"alarms": [asdict(alarm) for alarm in self.alarms], "stopped": self.stopped}
        state["fingerprint"] = self.args.fingerprint()
        if self.scale is not None:
            state["scale"] = self.scale.state_dict()
        if self.args.max_staleness:
            state["ahead"] = self.ahead.state_dict()
        return state | ({} if self.validation is None else {"best": self.validation.best})

    def take_state(self, state: dict[str, Any]) -> None:
        """Take a checkpoint's state."""
        self.kl_controller.load_state_dict(state["kl"])
        if self.scale is not None:
            self.scale.load_state_dict(state["scale"])
        if self.validation is not None:
            self.validation.best = state["best"]
        self.totals = state["totals"]
        self.alarms, self.stopped = [Alarm(**alarm) for alarm in state["alarms"]], state["stopped"]
        self.ahead.load_state_dict(state.get("ahead", []), self._restored)

    def _restored(self, update: int, answers: list[Any]) -> Rollout | None:
        if rank() > 0:
            return None  # the first process had all of it
        turn = turn_of(self.args, update)
        return rollout_of(self.prompts, self.prompts.draw(turn.start, len(turn), self.args.seed), answers, update)

    def save_extras(self, folder: Path) -> None:
        """Add the weights of the best policy so far."""
        if self.validation is not None and self.validation.weights is not None:
            link(self.validation.weights, folder / BEST)

    def load_extras(self, folder: Path) -> None:
        """Put them where the validation keeps them."""
        if self.validation is not None and self.validation.weights is not None:
            self.validation.weights.parent.mkdir(exist_ok=True)
            link(folder / BEST, self.validation.weights)

    def after_saving(self) -> None:
        """Weights of former best policies are needed no more."""
        if self.validation is not None:
            self.validation.tidy()


def choose_form(models: list[Any], args: RolloutArguments) -> Form:
    """How micro-batches are packed, and the models made ready for it; before adapters and copies are made."""
    if not (args.padding_free and all(map(can_run_ragged, models))):
        return "padded"
    for model in models:
        run_ragged(model)
    return "shared" if args.share_prompts else "ragged"
