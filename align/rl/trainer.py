"""The trainer of all methods that learn from their own rollouts, a ``transformers.Trainer``.

An update, from top to bottom of the class: sample -> score -> measure -> advantages -> learn -> log -> save. The
Trainer's loop asks the data loader for micro-batches, and the loader makes a rollout when the first one of an update is
asked for. The trainer has a sampler (``sampler.py``), a buffer that cuts rollouts into micro-batches (``buffer.py``),
and an objective (``objectives/``), which is all that differs between methods.

Everything is normalized by counts over the entire optimizer step, so micro-batching, padding and the number of
processes change nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from align.environments.player import EpisodeSource
from align.errors import UserError
from align.models.precision import cast_frozen_to_bf16, frozen_in_bf16, low_residual
from align.models.processes import all_reduce, broadcast, split_by_rank
from align.models.sharding import full_model, full_tensor, is_sharded, reshard
from align.models.tuning.merged_weights import merged_weights
from align.rl import completions, metrics
from align.rl.alarms import CONSTANT_SCORE, Alarm, new_alarms
from align.rl.arguments import RolloutArguments
from align.rl.buffer import RolloutBuffer, UpdateLoader
from align.rl.checkpoint import BEST, last_checkpoint
from align.rl.kl import KLPenalty, make_controller
from align.rl.model import PolicyAndReference
from align.rl.objectives.base import Objective, Step
from align.rl.optimizer import PARTS, clip_by_part, make_optimizer
from align.rl.packing import Batch, Form
from align.rl.prefetch import RolloutPrefetcher
from align.rl.prompts import Prompts
from align.rl.ptx import make_ptx, split_outputs
from align.rl.rollout import Rollout
from align.rl.sampler import AnyScorer, ParityProbe, RolloutSampler, drop_journals, require_some_episode
from align.rl.saving import AtomicCheckpoints
from align.rl.validation import make_validation
from align.training.checkpoints import link
from align.training.sharded import ShardingTrainer
from align.training.zero import clip_grad_norm

logger = logging.getLogger(__name__)

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class RolloutInputs:
    """The parts of rollouts and validations, as the trainers' arguments of these names."""

    train_dataset: Rows
    scorer: AnyScorer | None
    """None where an environment scores all there is."""
    engine: Any
    gold: AnyScorer | None = None
    eval_dataset: Rows | None = None
    ptx_dataset: Rows | None = None
    episodes: EpisodeSource | None = None
    """Plays episodes in an environment, instead of single responses."""


class RLTrainer(AtomicCheckpoints, ShardingTrainer, Trainer):  # type: ignore[misc]
    """Samples rollouts from the policy and learns from them; the objective says how.

    ``trainers.py`` has one class per method, which builds the models and the objective.
    """

    args: RolloutArguments
    model: PolicyAndReference
    processing_class: Any
    objective: Objective
    report_phase: Callable[[str], None] = staticmethod(lambda text: None)
    """Gets the names of an update's phases, such as ``learning 2/4``; a stage sets it."""
    _learned = 0
    """Micro-batches of the current update that were learned from."""
    _example = ""
    """A response of the current update with its score, for an alarm."""

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
        # The policy keeps float32 weights: in bf16 a small update would be rounded away. The frozen reference is never
        # updated, so it may be bf16.
        if args.bf16:
            low_residual(model)
            if model.reference is not None:
                cast_frozen_to_bf16(model.reference)
        self.objective = objective
        self.notify = notify
        super().__init__(model=model, args=args, processing_class=processing_class, callbacks=callbacks)
        if self.is_fsdp_enabled or (self.is_deepspeed_enabled and not hasattr(args, "launch")):
            raise UserError(
                f"{objective.name}: accelerate's FSDP and DeepSpeed plugins are not supported here. Run it as a stage "
                "with `runtime: {launch: {strategy: fsdp2}}`, or by DDP."
            )
        self.shard_model()
        self.engine = inputs.engine
        self.prompts = Prompts(inputs.train_dataset, processing_class, args.max_prompt_tokens)
        self.sampler = RolloutSampler(self.prompts, inputs.engine, inputs.scorer, inputs.gold, args, inputs.episodes)
        self.validation = make_validation(args, inputs.eval_dataset, processing_class)
        self.ptx = make_ptx(args, inputs.ptx_dataset, processing_class)
        self.buffer = RolloutBuffer(objective, args, form, int(processing_class.pad_token_id), self.ptx)
        self.probe = ParityProbe(inputs.engine, self.prompts, args)
        self.prefetcher = RolloutPrefetcher(
            inputs.engine, self.sampler.sample_local, args.max_staleness, args.updates, args.in_flight
        )
        if args.max_staleness and args.world_size > 1 and not self.prefetcher.shared_engine:
            raise UserError(
                f"{objective.name}: max_staleness {args.max_staleness} in several processes needs servers: an engine "
                "in each process would sample while it learns. Set runtime.rollouts, or max_staleness 0."
            )
        if args.in_flight == "continue":
            self._refuse_continuing(inputs)
        # compute_loss divides by num_items_in_batch itself: without this the Trainer would divide once more.
        self.model_accepts_loss_kwargs = True
        self.kl_controller = make_controller(args.kl_controller, args.kl_coef, args.kl_target, args.kl_horizon)
        self.kl_penalty = KLPenalty()
        """Of the current update."""
        self.totals = {"episodes": 0, "tokens": 0}
        self.alarms: list[Alarm] = []
        self.stopped: str | None = None
        """Reason why the run ended before its last update, if it did."""
        self._update_metrics: dict[str, float] = {}
        """Metrics of the current update that are no means over micro-batches; empty once they are logged."""
        self._learning_started = 0.0
        self._gradient_norms: dict[str, torch.Tensor] = {}

    def _refuse_continuing(self, inputs: RolloutInputs) -> None:
        """Raise ``UserError`` where no weights can change between the turns of episodes."""
        problem = self.prefetcher.continuing_objection()
        if inputs.episodes is None:
            problem = "single responses have one turn. Pass `episodes`"
        if problem is not None:
            raise UserError(
                f"{self.objective.name}: in_flight is continue, by which servers take new weights between turns, but "
                f"{problem}, or `in_flight='wait'`."
            )

    @property
    def update(self) -> int:
        """Number of finished updates."""
        return int(self.state.global_step) // self.args.steps_per_update

    @property
    def _micro_batches(self) -> int:
        """Micro-batches of an update that this process learns from."""
        return int(self.args.steps_per_update * self.args.gradient_accumulation_steps)

    def num_examples(self, dataloader: Any) -> int:
        """Return the number of prompts."""
        return len(self.prompts)

    def get_train_dataloader(self) -> Any:
        """Return the micro-batches of all updates to come."""
        return UpdateLoader(self.make_micro_batches, lambda: self.update, self.args.updates, self._micro_batches)

    def make_micro_batches(self, update: int) -> Iterator[dict[str, Any]]:
        """Make the rollout of an update and yield its micro-batches; none where the run stops before learning."""
        rollout = self.sample(update)
        for epoch in range(self.args.num_epochs):
            # Every epoch cuts the same rollout anew. Its old log-probabilities and advantages stay the same.
            mini_batches = self.buffer.plan(rollout, epoch)
            outputs: list[Batch] = []
            if epoch == 0:
                reused = self._count_reused(update, len(mini_batches[0]))
                if reused:
                    mini_batches[0].reverse()  # the longest first: reusing their passes saves most
                # Measured in the first epoch's own micro-batches: the ratio is then exactly 1 at the first step, in
                # bf16, too.
                micro_batches = [micro_batch for mini_batch in mini_batches for micro_batch in mini_batch]
                outputs = self.measure(rollout, micro_batches, reused)
                self.compute_advantages(rollout)
                # The KL is over kl_budget. An update without micro-batches ends the loader, and so the run.
                if self.stopped:
                    return
            yield from self.buffer.micro_batches(rollout, epoch, mini_batches, outputs)

    # ---- sample and score ----

    def sample(self, update: int) -> Rollout:
        """Give the engine the policy's weights, validate if it is time, and return scored responses to learn from."""
        started = time.perf_counter()
        self.report_phase("sampling")
        # 1. Give the engine the current weights. A pool that samples in the background writes them now, and its servers
        # load them once the running rollouts are done.
        with full_model(self.model) as model:
            # Sharded weights are gathered for the engine, and freed again when it has them.
            self.prefetcher.set_weights(update, merged_weights(model.policy))
            is_probing = self.probe.is_due(update)
            is_validating = self.validation is not None and update % int(self.args.eval_updates or 1) == 0
            if is_probing or is_validating:
                self.prefetcher.wait()  # both ask the engine themselves, about these weights
            if is_probing:
                with self.accelerator.autocast():
                    self.probe.run(model.policy)
        synchronized = time.perf_counter()
        # 2. Validate these weights, before anything is learned in this update.
        if is_validating:
            self.validate(update)
        validated = time.perf_counter()
        # 3. Take the rollout of this update. With max_staleness it was started earlier, with older weights.
        candidates = self.sampler.gather_rollouts(self.prefetcher.get(update), validated)
        candidates.seconds["sync"] = synchronized - started
        require_some_episode(candidates, self.objective.name)
        if self.validation is not None:
            candidates.seconds["validating"] = validated - synchronized
        # Some methods learn from a part of the responses, and may ask for more of them.
        rollout = self.objective.select(candidates, self.sampler)
        rollout.seconds = candidates.seconds
        return rollout

    def validate(self, update: int) -> None:
        """Log how the policy does on held-out prompts after ``update`` updates. The engine must hold its weights."""
        assert self.validation is not None
        rollout = self.sampler.answer(self.validation.prompts)
        # For the KL to the reference: a policy that is too far from it does not count as the best.
        self.measure(rollout, self.buffer.by_length(rollout))
        means = self.validation.run(rollout, update, self.model)
        super().log({**means, "update": update})

    # ---- measure ----

    def _count_reused(self, update: int, micro_batches: int) -> int:
        """Return how many micro-batches of the first optimizer step are learned from the passes that measured them.

        These passes have the same rows and, before that step, the same weights. None where the passes differ: measuring
        has no supervised texts, and uses no temperature but the sampling temperature.
        """
        has_own_temperature = self.objective.learns_likelihood and self.args.temperature != 1.0
        if self.ptx is not None or has_own_temperature or self.objective.rests_policy(update):
            return 0
        return math.floor(self.args.reuse_forward * micro_batches)

    def measure(self, rollout: Rollout, micro_batches: list[list[int]], reused: int = 0) -> list[Batch]:
        """Add log-probabilities, the reference's, entropies and values at the current weights to the rollout.

        Every process measures some of the micro-batches, and gets all results. Returns the outputs of the first
        ``reused`` micro-batches with their graphs, to learn from.
        """
        started = time.perf_counter()
        self.report_phase("measuring")
        self.model.eval()
        outputs_to_reuse = []
        names: set[str] = set()
        # Those to reuse come last, so that their activations wait no longer than they must. Each loop rounds the
        # weights to autocast's type once, for itself: copies made without gradients have no graph to the weights.
        with self._frozen_weights_rounded():
            for part, with_graph in ((micro_batches[reused:], False), (micro_batches[:reused], True)):
                with torch.set_grad_enabled(with_graph), self._autocast_cached():
                    for _, indices, counts in split_by_rank(part):
                        batch = self._prepare_inputs(self.buffer.pack(rollout, indices))
                        outputs = self.model_wrapped(batch, reference=True)
                        names |= outputs.keys()
                        # A pass that does not count only keeps the processes in step.
                        rows = indices if counts else []
                        rollout.store(rows, {name: output.detach()[: len(rows)] for name, output in outputs.items()})
                        if with_graph:
                            # The reference has no graph, and the loss reads its values from the rollout.
                            outputs.pop("ref_logprobs")
                            outputs_to_reuse.append(outputs)
        # No backward pass follows these passes, so free what FSDP2 keeps gathered for one.
        if not reused:
            reshard(self.model)
        for name in sorted(names):  # zeros where another process measured
            rollout.tensors[name] = all_reduce(rollout.tensors[name])
        rollout.seconds["measuring"] = time.perf_counter() - started
        return outputs_to_reuse

    def _autocast_cached(self) -> Any:
        """Return autocast around several passes; of a sharded model, which it would hold gathered, around each."""
        return contextlib.nullcontext() if is_sharded(self.model) else self.accelerator.autocast()

    def _frozen_weights_rounded(self) -> Any:
        can_round = self.args.bf16 and not is_sharded(self.model)
        return frozen_in_bf16(self.model) if can_round else contextlib.nullcontext()

    # ---- advantages ----

    def compute_advantages(self, rollout: Rollout) -> None:
        """Compute advantages and the metrics known before learning, and update the KL penalty's coefficient."""
        kl_coef = self.kl_controller.value
        is_in_loss = self.args.kl_in == "loss"
        self.kl_penalty = KLPenalty(in_loss=kl_coef) if is_in_loss else KLPenalty(in_reward=kl_coef)
        self.objective.advantages(rollout, self.kl_penalty)
        # Nats per response: the unit of kl_target and kl_budget.
        kl = float(rollout.tensors["kl"].double().sum()) / len(rollout)
        self.kl_controller.update(kl, len(rollout))  # for the next update
        self.totals["episodes"] += sum(len(part) for part in rollout.sampled)
        self.totals["tokens"] += sum(part.tokens for part in rollout.sampled)
        statistics = metrics.rollout_statistics(self.objective.averages, rollout, self.args.max_staleness > 0)
        self._update_metrics = statistics | {"kl_coef": kl_coef} | self.sampler.cache_statistics
        if self.args.kl_budget is not None and kl > self.args.kl_budget:
            self.stopped = (
                f"update {rollout.update + 1}: the KL to the reference is {kl:.3g} nats a response, over kl_budget "
                f"{self.args.kl_budget:g}"
            )
        self._example = completions.example(rollout.candidates or rollout)
        if self.args.completions and self.is_world_process_zero():
            completions.write(Path(str(self.args.output_dir)), rollout, self.args.completions, self.processing_class)
        self._learning_started = time.perf_counter()
        self._learned = 0

    # ---- learn ----

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Return the divisors of this optimizer step's loss and supervised loss, (2,), counted over all processes."""
        # The Trainer calls this once per optimizer step, with all its micro-batches, before the first forward pass.
        count = self.objective.token_count([sample["rollout"] for sample in batch_samples])
        ptx_tokens = 0.0
        for sample in batch_samples:
            texts = int(sample["pack"].get("ptx", 0))
            if texts:
                ptx_tokens += float(sample["pack"]["response_mask"][-texts:].sum())
        counts = torch.tensor([count, ptx_tokens], device=device)
        return self.reduce(counts).clamp(min=1)  # without any token the sums are 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Add a micro-batch's gradients, without the policy's while only the critic learns; return the loss, a scalar.

        Under DDP it has some, zeros or a shared trunk's, with which AdamW would decay its weights and count steps.
        """
        self._learned += 1
        self.report_phase(f"learning {self._learned}/{self._micro_batches}")
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self.objective.rests_policy(self.update):
            for parameter in self.model.policy.parameters():
                parameter.grad = None
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return a micro-batch's share of the optimizer step's loss; ``num_items_in_batch`` counts the entire step."""
        count, ptx_count = num_items_in_batch.unbind()
        step = Step(self.update, count, self.kl_penalty)
        outputs, critic_loss = self._forward(model, inputs, step)
        outputs, ptx_loss, ptx_tokens = split_outputs(outputs, inputs["pack"], _width(inputs))
        loss = self.objective.loss(outputs, inputs["rollout"], step)
        if ptx_loss is not None:
            # The term is multiplied by 0, not left out: under DDP every parameter needs a gradient.
            ptx_coef = 0.0 if self.objective.rests_policy(step.update) else self.args.ptx_coef
            loss = loss + ptx_coef * ptx_loss / ptx_count
        if self.ptx is not None:
            # Added even without texts: the sums are reduced by position, so all processes must add the same names.
            self.objective.averages.add("ptx_loss", 0.0 if ptx_loss is None else ptx_loss.detach(), ptx_tokens)
        self._require_finite("loss", loss)
        loss = loss * self.args.world_size + critic_loss  # DDP averages gradients; ours are shares of one sum
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: Any, inputs: dict[str, Any], step: Step) -> tuple[Batch, torch.Tensor | float]:
        """Return the outputs to learn from, and the loss of a critic that has learned already, without a graph.

        The critic's backward pass may be over before the policy's forward pass, which halves activations. Not where
        they share a trunk, nor under DDP, which expects one backward pass for each forward pass.
        """
        if "outputs" in inputs:
            return inputs.pop("outputs"), 0.0  # kept from measuring
        if self._critic is None:
            return model(inputs["pack"]), 0.0
        policy_rests = self.objective.rests_policy(step.update)
        if self.args.world_size == 1 and self._critic.trunk is not None and not policy_rests:
            critic_loss = self._learn_critic(model, inputs, step)
            return model(inputs["pack"], critic=False), critic_loss
        # Under DDP every parameter must take part in the backward pass, so a resting policy runs, too.
        return model(inputs["pack"], policy=not policy_rests or self.args.world_size > 1), 0.0

    @property
    def _critic(self) -> Any:
        return getattr(self.model, "critic", None)

    def _learn_critic(self, model: Any, inputs: dict[str, Any], step: Step) -> torch.Tensor:
        """Run the critic's forward and backward pass; return its part of the loss, without a graph."""
        outputs, _, _ = split_outputs(model(inputs["pack"], policy=False), inputs["pack"], _width(inputs))
        loss = self.objective.loss(outputs, inputs["rollout"], step)
        self._require_finite("loss", loss)
        with torch.autocast(loss.device.type, enabled=False):  # as the Trainer's own backward pass is
            self.accelerator.backward(loss)
        return loss.detach()

    def create_optimizer(self, model: Any = None) -> Any:
        """Return AdamW, with learning rates of its own for a critic."""
        if self.optimizer is None:
            reshard(self.model)
            self.optimizer = make_optimizer(self, self.model if model is None else model)
        return self.optimizer

    clips_itself = True

    def clip_in_parts(self) -> None:
        """Clip as ``_clip_grad_norm`` does, where DeepSpeed holds the gradients."""
        self._gradient_norms = {}
        for part in PARTS:
            model = getattr(self.model, part, None)
            if model is not None:
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                self._gradient_norms[part] = clip_grad_norm(trained, self.args.max_grad_norm)

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """Clip policy and critic separately: a critic that is far off must not shrink the policy's step."""
        # DeepSpeed has clipped them already, and made the step.
        clipped = self.is_deepspeed_enabled
        norms = self._gradient_norms if clipped else clip_by_part(self.model, self.args.max_grad_norm)
        norms = {name: full_tensor(norm) for name, norm in norms.items()}
        for name, norm in norms.items():
            self._require_finite(f"gradient of the {name}", norm)
            self.objective.averages.add(f"grad_norm_{name}", norm)
        total: torch.Tensor = torch.stack(list(norms.values())).norm()
        return total

    def _require_finite(self, quantity: str, value: torch.Tensor) -> None:
        if not bool(torch.isfinite(value)):
            rates = f"learning_rate (now {self.args.learning_rate:g})"
            rates += ", critic_learning_rate" if self._critic is not None else ""
            raise UserError(
                f"{self.objective.name}: update {self.update + 1} (optimizer step {self.state.global_step + 1}): the "
                f"{quantity} is {value.item()}. The last checkpoint is from before it. Lower {rates} or max_grad_norm "
                f"({self.args.max_grad_norm:g})."
            )

    def reduce(self, total: torch.Tensor) -> torch.Tensor:
        """Return the sum over all processes of what each has of an optimizer step, of any shape."""
        if self.args.world_size == 1:
            return total
        reduced: torch.Tensor = self.accelerator.reduce(total.to(self.args.device), "sum").to(total.device)
        return reduced

    # ---- log ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # An epoch is one pass over the prompts. The Trainer's count is of the loader, which covers the whole run.
        prompts = self.state.global_step / self.args.steps_per_update * self.args.rollout_batch
        self.state.epoch = prompts / self.args.samples_per_prompt / len(self.prompts)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the update's metrics to what the Trainer logs after its last optimizer step."""
        if "loss" in logs and self._update_metrics:
            # Called after an update's last optimizer step: the means over its micro-batches are complete now.
            means = metrics.finish(self.objective.averages.means(self.reduce))
            logs = {**logs, **means, **self._update_metrics, **self.totals, "update": self.update}
            logs["seconds_learning"] = time.perf_counter() - self._learning_started
            logs["seconds"] = sum(value for name, value in logs.items() if name.startswith("seconds_"))
            logs["peak_memory_gib"] = metrics.peak_memory_gib()
            self._update_metrics = {}
        super().log(logs, start_time)
        # Alarms read log_history, which has this update only after it was logged.
        if "score" in logs:
            self._raise_alarms()

    def _raise_alarms(self) -> None:
        """Notify of alarms that are new in this update, and stop the run if ``on_alarm`` says so."""
        for alarm in new_alarms([entry for entry in self.state.log_history if "score" in entry]):
            self.alarms.append(alarm)
            example = f" Example: {self._example}" if alarm.name == CONSTANT_SCORE else ""
            text = f"update {alarm.update}: {alarm.name}: {alarm.text}.{example}"
            if self.is_world_process_zero():
                self.notify(text)
            if self.args.on_alarm == "stop":
                self.stopped = self.stopped or text
                self.control.should_training_stop = True

    # ---- save ----

    @property
    def is_over(self) -> bool:
        """True when no update is left, or when the run had ended early before its checkpoint was written."""
        return self.stopped is not None or super().is_over

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, validate the last policy, and restore the best one if ``keep`` says so."""
        if resume_from_checkpoint is True:
            # Only one process looks for it, because the search moves damaged checkpoints away.
            newest = broadcast(lambda: last_checkpoint(Path(str(self.args.output_dir)), self.notify))
            resume_from_checkpoint = True if newest is None else str(newest)
        if not resume_from_checkpoint:
            self._drop_older_journals()
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            self.prefetcher.wait()  # a run that ended early may be prefetching
        finally:
            self.prefetcher.close()
        if self.validation is not None:
            validated = [entry["update"] for entry in self.state.log_history if "eval_kl" in entry]
            # The last update's policy, unless its validation was due anyway.
            if self.update not in validated:
                with full_model(self.model) as model:
                    self.engine.load_weights(merged_weights(model.policy))
                self.validate(self.update)
            if self.args.keep != "last":
                # The first process may still be writing the best weights that all processes read next.
                self.accelerator.wait_for_everyone()
                self.validation.restore(self.model)
        return result

    def _drop_older_journals(self) -> None:
        """Delete the journals in ``output_dir`` where they are another run's.

        They are where this run could not go on from them: one with a checkpoint would have resumed from it, and one
        that saves nothing never does. Without a checkpoint it may be this run, killed early, which reads its journal.
        """
        folder = Path(str(self.args.output_dir))
        is_older = self.args.save_strategy == "no" or any(folder.glob("checkpoint-*"))
        if is_older and self.is_world_process_zero():
            drop_journals(folder)
        self.accelerator.wait_for_everyone()

    def state_to_save(self) -> dict[str, Any]:
        """Return KL controller, totals, alarms, score scale, best validation, prefetched rollouts, and fingerprint."""
        state: dict[str, Any] = {
            "kl": self.kl_controller.state_dict(),
            "totals": self.totals,
            "alarms": [asdict(alarm) for alarm in self.alarms],
            "stopped": self.stopped,
            "fingerprint": self.args.fingerprint(),
        }
        if self.objective.scale is not None:
            state["scale"] = self.objective.scale.state_dict()
        if self.args.max_staleness:
            # Older weights sampled these rollouts. A resumed run has no copy of them to sample from again.
            state["ahead"] = self.prefetcher.state_dict()
        if self.validation is not None:
            state["best"] = self.validation.best
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.kl_controller.load_state_dict(state["kl"])
        # The run before may have neither scaled scores nor validated.
        if self.objective.scale is not None and "scale" in state:
            self.objective.scale.load_state_dict(state["scale"])
        if self.validation is not None:
            self.validation.best = state.get("best")
        self.totals = state["totals"]
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
        self.stopped = state["stopped"]
        self.prefetcher.load_state_dict(state.get("ahead", []), self.sampler.restore)

    def save_extra_files(self, folder: Path) -> None:
        """Add the weights of the best policy so far."""
        if self.validation is not None and self.validation.weights is not None:
            # A link: the checkpoint keeps these weights when tidy deletes the folder of a former best policy.
            link(self.validation.weights, folder / BEST)

    def load_extra_files(self, folder: Path) -> None:
        """Restore the weights of the best policy so far."""
        if self.validation is not None and self.validation.weights is not None:
            # tidy may have deleted the folder, if a later checkpoint that is now lost had a better policy.
            self.validation.weights.parent.mkdir(exist_ok=True)
            link(folder / BEST, self.validation.weights)

    def after_saving(self) -> None:
        """Delete the weights of former best policies, and the journals of episodes that were learned from."""
        drop_journals(self.args.output_dir, self.update)
        if self.validation is not None:
            self.validation.tidy()


def _width(inputs: dict[str, Any]) -> int:
    """Return the columns of the responses' tensors in a micro-batch."""
    return int(inputs["rollout"]["learn_mask"].shape[1])
