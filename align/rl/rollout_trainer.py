"""Where micro-batches come from: weights to the engine, responses, scores, log-probabilities, advantages.

The Trainer asks its data loader for micro-batches; the loader makes a rollout when the first of an update is asked for.
"""

from __future__ import annotations

import contextlib
import math
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from align.inference.parity import Parity, probe
from align.inference.protocol import RolloutEngine
from align.inference.shared_engine import ask_each, part_for, returns
from align.models.merging import merged_weights
from align.models.precision import frozen_rounded
from align.models.processes import gathered, summed, turns
from align.models.sharding import forget_gathered, is_sharded, whole
from align.rl import completions, metrics
from align.rl.arguments import RolloutArguments
from align.rl.kl import KLController
from align.rl.masking import local
from align.rl.model import PolicyAndReference
from align.rl.packing import Form, plan
from align.rl.prefetch import RolloutsAhead
from align.rl.prompts import Prompts, derive_seed
from align.rl.ptx import PtxRows
from align.rl.rollout import AnyScorer, Rollout, RolloutLoader, joined, sample_prompts, score_rollout, turn_of
from align.rl.saving import SavingTrainer
from align.rl.score_scale import RunningScale
from align.rl.validation import Validation


class RolloutTrainer(SavingTrainer):
    """A Trainer that samples what it learns from; ``OnlineTrainer`` fills in the attributes."""

    method: ClassVar[str]
    """As messages call it."""
    learned_from: ClassVar[tuple[str, ...]]
    """Tensors of a rollout that the loss needs, ``learn_mask`` among them."""
    learns_likelihood: ClassVar[bool] = False
    """Whether responses are learned as in SFT, by their log-probabilities at temperature 1 and not at sampling's."""

    args: RolloutArguments
    model: PolicyAndReference
    processing_class: Any
    prompts: Prompts
    engine: Any
    scorer: AnyScorer
    gold: AnyScorer | None
    validation: Validation | None
    ptx: PtxRows | None
    scale: RunningScale | None
    ahead: RolloutsAhead
    kl_controller: KLController
    form: Form
    totals: dict[str, int]
    stopped: str | None
    _averages: metrics.Averages
    _extra: dict[str, float]
    _probed: bool
    _returns: int = 0
    _loss_kl_coef: float
    _learning_since: float

    @abstractmethod
    def estimate(self, rollout: Rollout, kl_coef: float) -> None:
        """From scores and log-probabilities to what is learned: adds ``learned_from`` and ``kl`` to the rollout.

        ``kl_coef`` is what a nat of drift from the reference costs in the reward.
        """

    @abstractmethod
    def count_learned(self, learns: list[dict[str, torch.Tensor]]) -> float:
        """What this process's part of an optimizer step's loss is divided by; ``learns`` has its micro-batches."""

    def choose(self, rollout: Rollout) -> Rollout:
        """Of a scored rollout, what is measured and learned from: ``args.local_learned`` responses; all by default."""
        return rollout

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
                keep = self._passes_to_keep(update, len(planned[0]))
                if keep:
                    planned[0].reverse()  # the longest first: their passes save most
                # The first epoch's own micro-batches: the ratio is then exactly 1 at the first step, in bf16 too.
                outputs = self.measure(rollout, [micro for mini in planned for micro in mini], keep=keep)
                self._finish(rollout)
                if self.stopped:
                    return
            for at, mini in enumerate(planned):
                texts = self._ptx_texts(update * self.args.steps_per_update + epoch * len(planned) + at)
                for place, indices, _ in turns(mini):
                    pack = rollout.pack(indices, self._pad_id, self.form, texts[place :: len(mini)])
                    if self.learns_likelihood:
                        pack["supervised"] = torch.tensor(len(pack["response_mask"]))
                    made = {"pack": pack, "learn": rollout.select(indices, self.learned_from)}
                    yield made | {"out": outputs.pop(0)} if outputs else made

    def _passes_to_keep(self, update: int, micro_batches: int) -> int:
        """Of the first optimizer step's micro-batches, those learned from the passes that measured them.

        Same rows and, before that step, same weights. Supervised texts are not measured, and nothing is at another
        temperature than sampling's, so with either it is none.
        """
        differs = self.ptx is not None or (self.learns_likelihood and self.args.temperature != 1.0)
        return 0 if differs else math.floor(self.args.reuse_forward * micro_batches)

    def _ptx_texts(self, step: int) -> list[tuple[list[int], list[int]]]:
        """The supervised texts of one optimizer step, which its micro-batches share out."""
        return [] if self.ptx is None else self.ptx.draw(step, self.args.ptx_rows, self.args.seed)

    def _sample(self, update: int) -> Rollout:
        clock = time.perf_counter()
        with whole(self.model) as model:
            self.ahead.give(update, merged_weights(model.policy))
            probes, validates = self._must_probe(update), self._must_validate(update)
            if probes or validates:
                self.ahead.settle()  # they ask the engine themselves, about these weights
            if probes:
                self._probe_parity(model.policy)
        synced = time.perf_counter()
        if validates:
            self._validate(update)
        validated = time.perf_counter()
        drawn = self.together(self.ahead.take(update), validated)
        drawn.seconds["sync"] = synced - clock
        if self.validation is not None:
            drawn.seconds["validating"] = validated - synced
        rollout = self.choose(drawn)
        rollout.seconds = drawn.seconds
        return rollout

    def own_turn(self, update: int) -> Rollout | None:
        """This process's part of an update's responses, none where others have it all; no other process is asked."""
        turn = turn_of(self.args, update)
        indices = self.prompts.draw(turn.start, len(turn), self.args.seed)
        return self._own(update, indices, [derive_seed(self.args.seed, "sampling", number) for number in turn])

    def draw(self, update: int, indices: list[int], seeds: list[int]) -> Rollout:
        """Scored responses to the prompts at ``indices``, each with its seed, of which every process samples a part."""
        clock = time.perf_counter()
        return self.together(self._own(update, indices, seeds), clock)

    def _own(self, update: int, indices: list[int], seeds: list[int]) -> Rollout | None:
        mine = part_for(self.engine, len(indices))
        if not mine:
            return None
        at = slice(mine.start, mine.stop)
        return sample_prompts(self.engine, self.prompts, self.args, update, indices[at], seeds[at])

    def together(self, own: Rollout | None, clock: float) -> Rollout:
        """The parts of all processes, scored; what was sampled since ``clock`` is this one's.

        All processes have all of them, so that what follows from them is the same however many there are.
        """
        sampled = time.perf_counter()
        if own is not None:
            self.score(own)
        rollout = joined([part for part in gathered(own) if part is not None])
        rollout.seconds = {"sampling": sampled - clock, "scoring": time.perf_counter() - sampled}
        return rollout

    def score(self, rollout: Rollout) -> None:
        """Add scores, and gold scores where there are any."""
        score_rollout(rollout, self.scorer)
        if self.gold is not None:
            score_rollout(rollout, self.gold, "gold")

    def _plan(self, rollout: Rollout, epoch: int) -> list[list[list[int]]]:
        seed = derive_seed(self.args.seed, "order", rollout.update, epoch, 0)
        return plan(
            rollout.groups,
            rollout.lengths,
            num_mini_batches=self.args.num_mini_batches,
            micro_batch_size=self.args.per_device_train_batch_size,
            generator=torch.Generator().manual_seed(seed),
        )

    def _must_validate(self, update: int) -> bool:
        return self.validation is not None and update % int(self.args.eval_updates or 1) == 0

    def _validate(self, update: int) -> None:
        """Validate the policy as it is after ``update`` updates; the engine holds its weights."""
        assert self.validation is not None
        found = self.validation.run(self, update)
        super().log({**found, "update": update})

    def measure(self, rollout: Rollout, micro_batches: list[list[int]], keep: int = 0) -> list[dict[str, Any]]:
        """Log-probabilities, reference log-probabilities, entropies and values at the rollout's weights.

        Every process measures some of the micro-batches, and has all results. The outputs of the first ``keep`` are
        returned with their graphs, one dict each, to learn from.
        """
        clock = time.perf_counter()
        self.model.eval()
        kept = []
        measured: set[str] = set()
        # Kept ones come last, so that their activations wait no longer than they must. Each loop rounds the weights to
        # autocast's type once, and for itself: what is rounded without gradients has no way back to the weights.
        with self._frozen_rounded_once():
            for part, with_graph in ((micro_batches[keep:], False), (micro_batches[:keep], True)):
                with torch.set_grad_enabled(with_graph), self._weights_rounded_once():
                    for _, indices, counts in turns(part):
                        batch = self._prepare_inputs(rollout.pack(indices, self._pad_id, self.form))
                        out = self.model_wrapped(batch, reference=True)
                        measured |= out.keys()
                        mine = (
                            indices if counts else []
                        )  # of a pass that does not count only a place for others' results
                        rollout.store(mine, {name: tensor.detach()[: len(mine)] for name, tensor in out.items()})
                        if with_graph:
                            kept.append({name: tensor for name, tensor in out.items() if name != "ref_logprobs"})
        if not keep:
            forget_gathered(self.model)
        for name in sorted(measured):  # zeros where another process measured
            rollout.tensors[name] = summed(rollout.tensors[name])
        rollout.seconds["measuring"] = time.perf_counter() - clock
        return kept

    def _weights_rounded_once(self) -> Any:
        """Autocast around several passes; of a sharded model, which would then be held whole, around each alone."""
        return contextlib.nullcontext() if is_sharded(self.model) else self.accelerator.autocast()

    def _frozen_rounded_once(self) -> Any:
        plain = self.args.bf16 and not is_sharded(self.model)
        return frozen_rounded(self.model) if plain else contextlib.nullcontext()

    def _finish(self, rollout: Rollout) -> None:
        """Advantages, the controller's next coefficient, and the metrics known before learning."""
        kl_coef = self.kl_controller.value
        in_loss = self.args.kl_in == "loss"
        self._loss_kl_coef = kl_coef if in_loss else 0.0
        self.estimate(rollout, 0.0 if in_loss else kl_coef)
        statistics = metrics.add_rollout(self._averages, rollout, local)
        drawn = [rollout.drawn or rollout, *rollout.redrawn]
        responses, tokens = sum(map(len, drawn)), sum(some.tokens for some in drawn)
        kl = float(rollout.tensors["kl"].double().sum()) / len(rollout)
        self.kl_controller.update(kl, len(rollout))
        if self.args.kl_budget is not None and kl > self.args.kl_budget:
            self.stopped = (
                f"update {rollout.update + 1}: the KL to the reference is {kl:.3g} nats a response, over kl_budget "
                f"{self.args.kl_budget:g}"
            )
        if self.args.completions and self.is_world_process_zero():
            completions.write(Path(str(self.args.output_dir)), rollout, self.args.completions, self.processing_class)
        self.totals["episodes"] += responses
        self.totals["tokens"] += tokens
        seconds = {f"seconds_{name}": value for name, value in rollout.seconds.items()}
        took = rollout.drawing if self.args.max_staleness else rollout.seconds["sampling"]
        speed = {"sampled_tokens_per_second": tokens / max(took, 1e-9)}
        stale = {"staleness": float(rollout.update - rollout.weights_of)} if self.args.max_staleness else {}
        self._extra = {**statistics, "kl_coef": kl_coef, **stale, **seconds, **speed}
        self._learning_since = time.perf_counter()

    def _probe_parity(self, policy: Any) -> None:
        def ask(engine: RolloutEngine) -> Parity:
            return probe(engine, policy, self.prompts.token_ids[:4], temperature=self.args.temperature)

        self._returns = returns(self.engine)
        with self.accelerator.autocast():
            for found in ask_each(self.engine, ask):
                print(
                    f"parity of {self.engine.name} and trainer: {found.mean_gap:.2g} nats per token over "
                    f"{found.tokens} tokens"
                )
        self._probed = True

    def _must_probe(self, update: int) -> bool:
        """At the start, every so often, and when a server came back since the last time."""
        due = not self._probed or update % self.args.probe_updates == 0 or returns(self.engine) > self._returns
        return self.args.probe_parity and due

    def reduce(self, total: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, of what each has of an optimizer step; rollouts are the same in all of them."""
        if self.args.world_size == 1:
            return local(total)
        summed: torch.Tensor = self.accelerator.reduce(total.to(self.args.device), "sum").to(total.device)
        return summed

    @property
    def _pad_id(self) -> int:
        return int(self.processing_class.pad_token_id)
