"""The trainer of all methods that learn from their own rollouts; ``RLTrainer.train`` is the loop.

The trainer has a sampler (``sampler.py``), a buffer that cuts rollouts into mini-batches and micro-batches
(``buffer.py``), and an objective (``objectives/``). Methods differ only in the objective. Other files start, resume and
end a run (``run.py``), compute the passes of an update (``update_steps.py``), validate (``evaluations.py``), clip
(``clipping.py``), save (``checkpoint.py``), log (``update_log.py``) and refuse inputs (``refusals.py``).

Everything is normalized by counts over the entire optimizer step, so micro-batching, padding and the number of
processes do not change the result.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from align.config.stages.rl import RolloutFields
from align.models.checkpoints.sharding import reshard
from align.models.compute.precision import cast_frozen_to_bf16, low_residual
from align.rl import checkpoint, run
from align.rl.alarms import Alarm
from align.rl.arguments import RolloutArguments
from align.rl.buffer import MicroBatch, MiniBatch, RolloutBuffer
from align.rl.clipping import clip_gradients
from align.rl.evaluations import prepare_engine
from align.rl.model import PolicyAndReference
from align.rl.objectives import Objective, Step
from align.rl.packing import Form
from align.rl.prefetch import RolloutPrefetcher
from align.rl.prompts import Prompts, make_ptx
from align.rl.refusals import RolloutInputs, refuse_inputs, refuse_options, refuse_plugins, refuse_rollout
from align.rl.replay import ReplaySampler, make_sampler
from align.rl.rewards import KLPenalty, make_controller
from align.rl.rollout import Rollout
from align.rl.rollout_tables import RolloutRecorder
from align.rl.sampler import ParityProbe
from align.rl.update_log import UpdateLog
from align.rl.update_steps import make_optimizer, measure_passes, micro_batch_loss
from align.rl.validation import make_best, make_validation
from align.training.micro_batches import StepMemory
from align.training.sharded import shard_model
from align.training.task_evaluations import TaskEvaluations

logger = logging.getLogger(__name__)


class RLTrainer(Trainer):  # type: ignore[misc]
    """Samples rollouts from the policy and learns from them; the objective says how.

    ``trainers.py`` has one class per method, which builds the models and the objective.
    """

    args: RolloutArguments
    config: RolloutFields
    model: PolicyAndReference
    objective: Objective
    processing_class: Any
    optimizer: Any
    lr_scheduler: Any
    report_phase: Callable[[str], None] = staticmethod(lambda text: None)
    """Gets the names of an update's phases, such as ``learning 2/4``; a stage sets it."""
    tasks: TaskEvaluations | None = None
    """Evaluations during training; a stage sets them."""

    def __init__(
        self,
        model: PolicyAndReference,
        objective: Objective,
        form: Form,
        args: RolloutArguments,
        processing_class: Any,
        *,
        inputs: RolloutInputs,
        callbacks: list[TrainerCallback] | None = None,
        notify: Callable[[str], None] = logger.warning,
    ) -> None:
        refuse_options(objective.name, args)
        # The policy stays float32, because bf16 would round small updates away. The frozen reference may be bf16.
        if args.bf16:
            low_residual(model)
            if model.reference is not None:
                cast_frozen_to_bf16(model.reference)
        self.config = config = args.config
        self.objective = objective
        self.notify = notify
        self.memory = StepMemory(args)
        self.memory.notify = notify
        super().__init__(model=model, args=args, processing_class=processing_class, callbacks=callbacks)
        refuse_plugins(self)
        shard_model(self)
        self.prompts = Prompts(inputs.train_dataset, processing_class, config.max_prompt_tokens)
        self.sampler = make_sampler(self.prompts, inputs, args)
        self.engine = self.sampler.engine
        self.validation = make_validation(args, inputs.eval_dataset, processing_class)
        self.best = self.validation or make_best(args)
        self.ptx = make_ptx(config, inputs.ptx_dataset, processing_class)
        pad_id = int(processing_class.pad_token_id)
        self.buffer = RolloutBuffer(objective, args, form, pad_id, self.ptx, self.memory)
        self.probe = ParityProbe(self.engine, self.prompts, args)
        drift = args.drift
        self.prefetcher = RolloutPrefetcher(
            self.engine, self.sampler.sample_local, drift.max_staleness, config.updates, drift.in_flight
        )
        refuse_inputs(self, inputs)
        self.kl_controller = make_controller(drift.kl_controller, drift.kl_coef, drift.kl_target, drift.kl_horizon)
        self.kl_penalty = KLPenalty()  # of the current update
        self.totals = {"episodes": 0, "tokens": 0}
        self.alarms: list[Alarm] = []
        self.stopped: str | None = None  # reason why the run ended before its last update, if it did
        self.alarm_stop: str | None = None  # the alarm that ended the run, with `on_alarm: stop`
        self.returned_to: int | None = None  # update of the checkpoint whose policy it ended with
        self.recorder = RolloutRecorder(args, processing_class, objective.name, notify)
        self.update_log = UpdateLog(self)

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:  # type: ignore[override]
        """Train, validate the last policy, and restore the best policy if ``keep`` says so.

        An alarm with ``on_alarm: stop`` ends the run with the policy of the last checkpoint, from before the alarm.

        ``resume_from_checkpoint`` is a checkpoint's folder, or True for the newest checkpoint in ``output_dir``.
        """
        config = self.config
        run.begin(self, resume_from_checkpoint)
        try:
            # After a resume ``self.update`` is the checkpoint's number of updates, so the loop continues behind them.
            for update in range(self.update, config.updates):
                if self.is_stopping:
                    break
                rollout = self.sample(update)
                self.measure(rollout)
                self.compute_advantages(rollout)
                if self.is_stopping:  # the KL is over kl_budget
                    break
                for epoch in range(config.num_epochs):
                    for mini_batch in self.buffer.plan(rollout, epoch):
                        self.learn(mini_batch)
                self.update_log.write()
                if self.alarm_stop:
                    checkpoint.return_to_last(self)
                    break
                self.save()
            self.prefetcher.wait()  # a run that ended early may be prefetching
        finally:
            self.prefetcher.close()
        return run.end(self)

    @property
    def update(self) -> int:
        """Number of finished updates."""
        return int(self.state.global_step) // self.config.steps_per_update

    @property
    def is_stopping(self) -> bool:
        """True if no further update may start: the run stopped itself, or a callback asked for it."""
        return self.stopped is not None or bool(self.control.should_training_stop)

    def sample(self, update: int) -> Rollout:
        """Return scored responses to learn from: sampled with the policy's weights, or stored rollouts to replay.

        A policy that samples is also probed, validated and evaluated if it is time.
        """
        self.report_phase("sampling")
        if isinstance(self.sampler, ReplaySampler):
            return self._select(self.sampler.replay(update))
        # 1. Give the engine the current weights; probe, evaluate and validate them before anything is learned.
        seconds = prepare_engine(self, update)
        # 2. Wait for the rollout of this update. With max_staleness it was started earlier, with older weights.
        candidates = self.sampler.gather_rollouts(self.prefetcher.get(update), time.perf_counter())
        candidates.seconds |= seconds
        refuse_rollout(candidates, self.objective.name, self.config)
        return self._select(candidates)

    def _select(self, candidates: Rollout) -> Rollout:
        """Return the responses that the method learns from, maybe after sampling more of them."""
        rollout = self.objective.select(candidates, self.sampler)
        rollout.seconds = candidates.seconds
        return rollout

    def measure(self, rollout: Rollout) -> None:
        """Add log-probabilities, the reference's, entropies and values at the current weights to the rollout.

        They are measured in the first epoch's own micro-batches, so the ratio is exactly 1 at the first step, also in
        bf16. The buffer keeps the outputs of the passes that are reused, with their graphs.
        """
        self.report_phase("measuring")
        started = time.perf_counter()

        def cut() -> tuple[list[list[int]], list[list[int]]]:
            first, *others = (batch.micro_batches(self.memory.rows) for batch in self.buffer.plan(rollout, epoch=0))
            reused = self.buffer.count_reused(rollout.update, len(first))
            # Passes to reuse come last, so their activations wait as briefly as possible.
            return [*first[reused:], *(part for parts in others for part in parts)], first[:reused]

        self.buffer.kept_outputs = measure_passes(self, rollout, cut)
        rollout.seconds["measuring"] = time.perf_counter() - started

    def compute_advantages(self, rollout: Rollout) -> None:
        """Compute advantages, update the KL penalty's coefficient, and stop the run if the KL is over ``kl_budget``."""
        drift = self.args.drift
        kl_coef = self.kl_controller.value
        self.kl_penalty = KLPenalty(in_loss=kl_coef) if drift.kl_in == "loss" else KLPenalty(in_reward=kl_coef)
        self.objective.advantages(rollout, self.kl_penalty)
        # Nats per response: the unit of kl_target and kl_budget. Failed episodes do not count.
        judged = rollout.judged
        count = int(judged.sum())
        kl = float(rollout.tensors["kl"][judged].double().sum()) / max(1, count)
        if count:
            self.kl_controller.update(kl, count)  # for the next update
        self.totals["episodes"] += sum(len(part) for part in rollout.sampled)
        self.totals["tokens"] += sum(part.tokens for part in rollout.sampled)
        self.update_log.begin(rollout, kl_coef)
        if drift.kl_budget is not None and kl > drift.kl_budget:
            self.stopped = (
                f"update {rollout.update + 1}: the KL to the reference is {kl:.3g} nats a response, over kl_budget "
                f"{drift.kl_budget:g}"
            )

    def learn(self, mini_batch: MiniBatch) -> None:
        """Make one optimizer step: forward, loss and backward of each micro-batch, then clip and step."""
        handler = self.callback_handler
        self.control = handler.on_step_begin(self.args, self.state, self.control)
        averages = copy.deepcopy(self.objective.averages)

        def undo() -> None:
            self.objective.averages = copy.deepcopy(averages)
            self.buffer.kept_outputs = []  # their graphs may be used up

        loss = self.memory.run(self, lambda: self._accumulate(mini_batch), undo)
        self.memory.finish(self.model)
        norm = clip_gradients(self)
        self.control = handler.on_pre_optimizer_step(self.args, self.state, self.control)
        self.optimizer.step()
        self.control = handler.on_optimizer_step(self.args, self.state, self.control)
        self.update_log.add_step(loss, norm, self.lr_scheduler.get_last_lr()[0])
        self.lr_scheduler.step()
        self.model_wrapped.zero_grad()
        self.state.global_step += 1
        # An epoch is one pass over the prompts.
        prompts = self.state.global_step / self.config.steps_per_update * self.config.rollout_batch
        self.state.epoch = prompts / self.config.samples_per_prompt / len(self.prompts)
        self.control = handler.on_step_end(self.args, self.state, self.control)

    def _accumulate(self, mini_batch: MiniBatch) -> torch.Tensor:
        """Run the passes of a step's micro-batches, and return the sum of their losses, a scalar."""
        handler = self.callback_handler
        micro_batches = self.buffer.load(mini_batch)
        step = self._describe_step(micro_batches)
        total = torch.zeros((), device=self.args.device)
        for number, micro_batch in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            self.update_log.report_micro_batch(number, len(micro_batches))
            with self.memory.one_pass(self, is_last=is_last):
                total += self.backward(micro_batch, step)
            if not is_last:
                self.control = handler.on_substep_end(self.args, self.state, self.control)
        return total

    def _describe_step(self, micro_batches: list[MicroBatch]) -> Step:
        """Return the divisors of an optimizer step's losses, counted over all its micro-batches and processes."""
        tokens = self.objective.token_count([micro_batch.tensors for micro_batch in micro_batches])
        ptx_tokens = sum(micro_batch.ptx_tokens for micro_batch in micro_batches)
        counts = self.reduce(torch.tensor([tokens, ptx_tokens], device=self.args.device))
        count, ptx_count = counts.clamp(min=1).unbind()  # without any token the sums are 0
        return Step(self.update, count, self.kl_penalty, ptx_count)

    def backward(self, micro_batch: MicroBatch, step: Step) -> torch.Tensor:
        """Add a micro-batch's gradients, without the policy's while only the critic learns; return its loss, a scalar.

        Under DDP a resting policy has gradients, zeros or a shared trunk's, with which AdamW would decay its weights
        and count steps.
        """
        self.model_wrapped.train()
        micro_batch = micro_batch.to(self.args.device)
        with self.compute_loss_context_manager():
            loss = micro_batch_loss(self, micro_batch, step)
        # The loss is divided by the counts of the step, so DeepSpeed must not divide it by the micro-batches.
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **options)
        if self.objective.rests_policy(step.update):
            for parameter in self.model.policy.parameters():
                parameter.grad = None
        return loss.detach()

    def save(self) -> None:
        """Write a checkpoint if one is due after this update, or if a callback asked for it."""
        if self.control.should_save:
            checkpoint.save_checkpoint(self)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy, LoRA merged, as an ordinary model folder."""
        checkpoint.save_policy(self, output_dir)

    def create_optimizer(self, model: Any = None) -> Any:
        """Return AdamW, with separate learning rates for a critic."""
        if self.optimizer is None:
            reshard(self.model)
            self.optimizer = make_optimizer(self, self.model if model is None else model)
        return self.optimizer

    def reduce(self, total: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes of their parts of an optimizer step, of any shape."""
        if self.args.world_size > 1:
            self.memory.check_others()
            total = self.accelerator.reduce(total.to(self.args.device), "sum").to(total.device)
        return total
