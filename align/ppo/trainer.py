"""PPO with a critic as a ``transformers.Trainer``: its loop, callbacks, accumulation, schedules and checkpoints.

The Trainer asks its data loader for micro-batches; ours makes a rollout when the first of an update is asked for.
Everything is normalised by counts over the whole optimizer step, so micro-batching, padding and the number of
processes change nothing. Left out: sharded training (FSDP, DeepSpeed), ptx mixing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from align.errors import UserError
from align.models.loading import add_lora, save_policy
from align.models.merging import merged_weights
from align.ppo import checkpoint, metrics
from align.ppo.config import PPOConfig
from align.ppo.critic import critic_from_policy, critic_from_reward
from align.ppo.kl import make_controller
from align.ppo.losses import loss_count
from align.ppo.masking import local
from align.ppo.model import PolicyAndCritic, can_share_prompts
from align.ppo.normalise import RunningScale
from align.ppo.objective import LEARNED_FROM, ppo_loss
from align.ppo.optimizer import clip_by_part, make_optimizer
from align.ppo.packing import plan
from align.ppo.prompts import Prompts, derive_seed
from align.ppo.rollout import AnyScorer, Rollout, RolloutLoader, add_advantages, sample_rollout, score_rollout
from align.stage import FullTuning, LoraTuning


class PPOTrainer(Trainer):
    """Trains ``model`` to earn higher scores on the prompts of ``train_dataset`` (arXiv 1707.06347, 1909.08593).

    ``model`` is a causal language model in float32; ``tuning`` says whether all of it or LoRA adapters are trained.
    ``train_dataset`` yields rows with a ``prompt``, a text or messages. ``scorer`` gives each response a score,
    ``gold`` another that is only logged. ``reward_model``, a sequence classifier, is what the critic starts from;
    without it the critic starts from the policy. ``engine`` samples (``align.rollouts``).
    """

    args: PPOConfig
    model: PolicyAndCritic
    processing_class: Any

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
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        tuning = tuning or FullTuning()
        seed = derive_seed(args.seed, "critic")
        critic = (
            critic_from_policy(model, tuning, seed)
            if reward_model is None
            else critic_from_reward(reward_model, tuning, seed)
        )
        both = PolicyAndCritic(add_lora(model, tuning, derive_seed(args.seed, "policy")), critic, args.temperature)
        super().__init__(model=both, args=args, processing_class=processing_class, callbacks=callbacks)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError("ppo: sharded training (FSDP, DeepSpeed) is not supported; use one process or DDP.")
        self.prompts = Prompts(train_dataset, processing_class, args.max_prompt_tokens)
        self.scorer, self.gold, self.engine = scorer, gold, engine
        # compute_loss divides by num_items_in_batch itself: without this the Trainer would divide once more.
        self.model_accepts_loss_kwargs = True
        self.share_prompts = args.share_prompts and all(map(can_share_prompts, (model, critic.trunk)))
        self.kl_controller = make_controller(args.kl_controller, args.kl_coef, args.kl_target, args.kl_horizon)
        self.totals = {"episodes": 0, "tokens": 0}
        self._averages = metrics.Averages()
        self._extra: dict[str, float] = {}
        self.scale = RunningScale() if args.normalise_scores else None
        self.stopped: str | None = None
        """Why the run ended before its last update, if it did."""
        self._probed = False
        self._loss_kl_coef = 0.0
        self._draft: Path | None = None

    # ---- rollouts ----

    def get_train_dataloader(self) -> Any:
        """Micro-batches of all updates still to come."""
        per_update = self.args.steps_per_update * self.args.gradient_accumulation_steps
        return RolloutLoader(self._micro_batches, lambda: self.update, self.args.updates, per_update)

    @property
    def update(self) -> int:
        """Number of finished updates."""
        return int(self.state.global_step) // self.args.steps_per_update

    def num_examples(self, dataloader: Any) -> int:
        """Prompts in the data set."""
        return len(self.prompts)

    def _micro_batches(self, update: int) -> Iterator[dict[str, Any]]:
        """Make a rollout and yield the micro-batches of its epochs."""
        rollout = self._sample(update)
        for epoch in range(self.args.num_epochs):
            planned = self._plan(rollout, epoch)
            if epoch == 0:
                # The first epoch's own micro-batches: the ratio is then exactly 1 at the first step, in bf16 too.
                self._measure(rollout, [micro for mini in planned for micro in mini])
                self._finish(rollout)
                if self.stopped:
                    return
            for indices in (micro for mini in planned for micro in mini):
                pack = rollout.pack(indices, self._pad_id, self.share_prompts)
                yield {"pack": pack, "learn": rollout.select(indices, LEARNED_FROM)}

    def _sample(self, update: int) -> Rollout:
        clock = time.perf_counter()
        self.engine.load_weights(merged_weights(self.model.policy))
        if self.args.probe_parity and (not self._probed or update % self.args.probe_updates == 0):
            self._probe_parity()
        synced = time.perf_counter()
        rollout = sample_rollout(self.engine, self.prompts, self.args, update)
        sampled = time.perf_counter()
        score_rollout(rollout, self.scorer)
        if self.gold is not None:
            score_rollout(rollout, self.gold, "gold")
        rollout.seconds = {
            "sync": synced - clock,
            "sampling": sampled - synced,
            "scoring": time.perf_counter() - sampled,
        }
        return rollout

    def _plan(self, rollout: Rollout, epoch: int) -> list[list[list[int]]]:
        seed = derive_seed(self.args.seed, "order", rollout.update, epoch, self.args.process_index)
        return plan(
            rollout.groups,
            rollout.lengths,
            num_mini_batches=self.args.num_mini_batches,
            micro_batch_size=self.args.per_device_train_batch_size,
            generator=torch.Generator().manual_seed(seed),
        )

    @torch.no_grad()
    def _measure(self, rollout: Rollout, micro_batches: list[list[int]]) -> None:
        """Log-probabilities, reference log-probabilities, entropies and values at the rollout's weights."""
        clock = time.perf_counter()
        self.model.eval()
        for indices in micro_batches:
            batch = self._prepare_inputs(rollout.pack(indices, self._pad_id, self.share_prompts))
            rollout.store(indices, self.model_wrapped(batch, reference=True))
        rollout.seconds["measuring"] = time.perf_counter() - clock

    def _finish(self, rollout: Rollout) -> None:
        """Advantages, the controller's next coefficient, and the metrics known before learning."""
        kl_coef = self.kl_controller.value
        in_loss = self.args.kl_in == "loss"
        self._loss_kl_coef = kl_coef if in_loss else 0.0
        add_advantages(rollout, self.args, 0.0 if in_loss else kl_coef, self._reduce, self.scale)
        statistics = metrics.add_rollout(self._averages, rollout, self._reduce)
        tokens = float(self._reduce(rollout.tensors["response_mask"].sum().double()))
        kl = float(self._reduce(rollout.tensors["kl"].double().sum())) / self.args.rollout_batch
        self.kl_controller.update(kl, self.args.rollout_batch)
        if self.args.kl_budget is not None and kl > self.args.kl_budget:
            self.stopped = (
                f"update {rollout.update + 1}: the KL to the reference is {kl:.3g} nats a response, over kl_budget "
                f"{self.args.kl_budget:g}"
            )
        self.totals["episodes"] += self.args.rollout_batch
        self.totals["tokens"] += int(tokens)
        seconds = {f"seconds_{name}": value for name, value in rollout.seconds.items()}
        speed = {"sampled_tokens_per_second": tokens / max(rollout.seconds["sampling"], 1e-9)}
        self._extra = {**statistics, "kl_coef": kl_coef, **seconds, **speed}
        self._learning_since = time.perf_counter()

    def _probe_parity(self) -> None:
        from align.rollouts.parity import probe

        with self.accelerator.autocast():
            found = probe(self.engine, self.model.policy, self.prompts.token_ids[:4], temperature=self.args.temperature)
        print(
            f"parity of {self.engine.name} and trainer: {found.mean_gap:.2g} nats per token over {found.tokens} tokens"
        )
        self._probed = True

    # ---- learning ----

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """One micro-batch's share of the optimizer step's loss; ``num_items_in_batch`` counts that whole step."""
        args, mask = self.args, inputs["learn"]["learn_mask"]
        warming = self.update < args.critic_warmup_updates
        # Under DDP every parameter must take part in the backward pass, so the policy runs during warm-up too.
        out = model(inputs["pack"], policy=not warming or args.world_size > 1)
        loss, sums = ppo_loss(out, inputs["learn"], mask, num_items_in_batch, args, warming, self._loss_kl_coef)
        for name, total in sums.items():
            self._averages.add(name, total, mask.sum())
        self._require_finite("loss", loss)
        loss = loss * args.world_size  # DDP averages gradients; ours are shares of one sum
        return (loss, out) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        masks = [sample["learn"]["learn_mask"] for sample in batch_samples]
        count = loss_count(masks, self.args.loss_aggregation, self.args.max_tokens)
        return self._reduce(torch.tensor(count, device=device)).clamp(min=1)  # without any token the sums are 0

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

    def _reduce(self, total: torch.Tensor) -> torch.Tensor:
        """Sum over all processes."""
        if self.args.world_size == 1:
            return local(total)
        summed: torch.Tensor = self.accelerator.reduce(total.to(self.args.device), "sum").to(total.device)
        return summed

    @property
    def _pad_id(self) -> int:
        return int(self.processing_class.pad_token_id)

    # ---- logging and checkpoints ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        prompts = self.state.global_step / self.args.steps_per_update * self.args.rollout_batch
        self.state.epoch = prompts / self.args.samples_per_prompt / len(self.prompts)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the update's metrics to what the Trainer logs after its last optimizer step."""
        if "loss" in logs and self._extra:
            means = metrics.finish(self._averages.means(self._reduce))
            learning = time.perf_counter() - self._learning_since
            logs = {**logs, **means, **self._extra, **self.totals, "update": self.update, "seconds_learning": learning}
            logs["seconds"] = sum(value for name, value in logs.items() if name.startswith("seconds_"))
            logs["peak_memory_gib"] = metrics.peak_memory_gib()
            self._extra = {}
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._draft or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Write a checkpoint under another name and rename it: at any moment it is whole or not there."""
        output_dir = Path(super()._get_output_dir(trial))
        self._draft = output_dir / checkpoint.DRAFT
        checkpoint.clear(self._draft, self.accelerator)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            draft, self._draft = self._draft, None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.publish(draft, output_dir, self.args.save_total_limit)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy, LoRA merged, as an ordinary model folder; inside a checkpoint, all that is trained."""
        folder = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:
            return
        if not _internal_call:
            save_policy(self.model.policy, self.processing_class, folder)
            return
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_trained(self.model, folder)
        state = {"kl": self.kl_controller.state_dict(), "totals": self.totals, "fingerprint": self.args.fingerprint()}
        if self.scale is not None:
            state["scale"] = self.scale.state_dict()
        checkpoint.save_state(folder, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        state = checkpoint.load_state(folder, self.args.fingerprint())
        checkpoint.load_trained(self.model, folder)
        self.kl_controller.load_state_dict(state["kl"])
        if self.scale is not None:
            self.scale.load_state_dict(state["scale"])
        self.totals = state["totals"]
