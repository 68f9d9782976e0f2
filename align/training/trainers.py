"""trl's trainers for tokenized rows, in an order that a resumed run repeats.

They override private methods of trl and transformers, which ``align.patches.trainer`` lists and checks.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_trainer import SFTTrainer

from align.config.runtime.launch import rank, world_size
from align.methods.call import Method
from align.methods.records import AnswerTokens
from align.models.checkpoints.conversion import plain_of
from align.models.compute.precision import low_residual
from align.models.compute.processes import all_gather
from align.models.experts import has_experts, return_router_logits, router_loss_weight
from align.models.fast.real_tokens import compute_real_tokens, computes_real_tokens
from align.models.parameter_groups import ParameterGroup, layer_stack, parameter_groups
from align.patches.trainer import check_overrides, copy_metrics, restore_metrics
from align.training.arguments import ROUTER_LOSS
from align.training.micro_batches import SHARE, StepMemory, StepRows, gather_uneven, is_copy, step_loader
from align.training.order import GroupedOrder
from align.training.row_history import Continuation, ContinuedOrder
from align.training.rows import ROW, Row
from align.training.sharded import ShardingTrainer, shard_model

ROUTER_FIELDS = ("output_router_logits", ROUTER_LOSS)
"""Fields of a config that trl sets for the load-balancing loss. A saved model has the values that it came with."""
COUNTED = ("labels", "shift_labels")
"""Inputs from which transformers counts the tokens that a step's loss is divided by."""
SCORING_TOKENS = 4096
"""Padded tokens per forward pass without gradients."""


def reduce_work(model: Any, *, bfloat16: bool, shared_prefixes: bool) -> None:
    """Let ``model`` compute less for results that differ by rounding; a second call has no effect.

    ``bfloat16``: activations between layers have the type of the matrix products (``precision.low_residual``).
    ``shared_prefixes``: real tokens only, and prefixes that rows share once (``fast.real_tokens``). A policy and its
    reference must compute alike, or their difference would not start at 0.
    """
    if bfloat16:
        low_residual(model)
    if shared_prefixes and not computes_real_tokens(model):
        compute_real_tokens(model)


def prepare_router_loss(model: Any, arguments: Any) -> dict[str, Any]:
    """Set the weight of a mixture's load-balancing loss, and return the fields of its config that change.

    A weight of None in ``arguments`` becomes the config's weight; it is 0 for a model without experts. Trainers without
    this option read the config, which then asks for no such loss.
    """
    plain = plain_of(model)
    config = plain.config.get_text_config()
    return_router_logits(plain)
    fields = {name: getattr(config, name) for name in ROUTER_FIELDS if hasattr(config, name)}
    if not hasattr(arguments, ROUTER_LOSS):
        if fields:
            config.output_router_logits = False
    elif getattr(arguments, ROUTER_LOSS) is None:
        setattr(arguments, ROUTER_LOSS, router_loss_weight(plain))
    if has_experts(config) and not hasattr(config, "num_experts"):
        config.num_experts = config.num_local_experts  # Granite 4 lacks the name that trl reads
    return fields


class _Float32Head(torch.nn.Linear):
    """A linear layer that stays in float32 under autocast."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, H) -> (B, T, 1) float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.nn.functional.linear(hidden.float(), self.weight, self.bias)


def score_in_float32(model: Any) -> None:
    """Compute a reward model's score in float32: in bfloat16, scores near 4 are 1/32 apart and pairs tie.

    The module is replaced instead of its ``forward``, so peft's copy of the head is one as well.
    """
    score = model.score
    head = _Float32Head(score.in_features, score.out_features, bias=score.bias is not None, device="meta")
    head.weight = score.weight
    head.bias = score.bias
    model.score = head


ReportCount = Callable[[int, int], None]
"""Gets the number of rows that are done, and of all."""


def report_nothing(done: int, total: int) -> None:
    """Report nothing, as outside a stage."""


class LossTerm(Protocol):
    """A term that is added to a micro-batch's loss."""

    has_own_rows: bool
    """True for a term over other rows than the micro-batch's, which counts in copies of micro-batches as well."""

    def watching(self) -> AbstractContextManager[None]:
        """Return a context around trl's own forward pass, for a term that reads its activations."""

    def loss(self, trainer: Any, model: Any, inputs: Any) -> torch.Tensor:
        """Return this micro-batch's part of the step's scalar term, scaled by ``part_of_step``."""


class Prepared(ShardingTrainer):
    """Mixin before a trl trainer: tokenized rows, grouped by length, and no model card."""

    train_dataset: Any
    row_lengths: list[int]
    layer_decay: float = 1.0
    """Each layer's learning rate as a share of the next layer's (``learning_rate_share``)."""
    router_fields: Mapping[str, Any]
    """Values of the config's fields before trl changed them."""
    continuation: Continuation | None = None
    """Order of the rows of a stage that continues another with other rows."""
    terms: Sequence[LossTerm] = ()
    """Terms added to trl's loss while training (``align.training.fit``)."""
    report_scored: ReportCount = staticmethod(report_nothing)
    """Gets counts while held-out rows are scored (``align.training.fit``)."""
    step_tokens: int = 0
    """Answer tokens of the step's micro-batches, in all processes; counted for ``terms`` only."""
    memory: StepMemory
    """Size of the micro-batches, and repetition of steps that run out of memory."""
    part: tuple[int, int] = (0, 1)
    """Number of the micro-batch that is computed, and of all in its step, over all processes."""

    def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
        check_overrides()
        self.memory = StepMemory(kwargs["args"])
        router_fields = prepare_router_loss(model, kwargs["args"])
        super().__init__(*args, model=model, **kwargs)  # type: ignore[call-arg]
        self.router_fields = router_fields
        reduce_work(self.model, bfloat16=self.args.bf16, shared_prefixes=getattr(self.args, "shared_prefixes", True))
        shard_model(self)
        if self.args.world_size > 1:
            # trl gathers metrics by row, and the last micro-batches of an epoch differ in size between processes.
            self.accelerator.gather = gather_uneven(self.accelerator.gather, self.memory.check_others)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if is_new and self.layer_decay < 1:
            set_layer_learning_rates(optimizer, self.model if model is None else model, self.layer_decay)
        return optimizer

    def training_step(self, model: Any, inputs: StepRows, num_items_in_batch: Any = None) -> torch.Tensor:  # type: ignore[override]
        """Run the forward and backward passes of an optimizer step, and return its loss, a scalar."""
        metrics = copy_metrics(self)
        loss = self.memory.run(
            self,
            lambda: self._learn(inputs, num_items_in_batch),
            undo=lambda: restore_metrics(self, metrics),
        )
        self.memory.finish(self.model)
        return loss

    def _learn(self, step: StepRows, num_items: Any) -> torch.Tensor:
        """Run the passes of a step's micro-batches, and return the sum of their losses, a scalar."""
        model = self.memory.model(self)
        batches = step.micro_batches(self.memory.rows)
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(batches):
            self.part = (number * world_size() + rank(), len(batches) * world_size())
            with self.memory.one_pass(self, is_last=number == len(batches) - 1):
                total += super().training_step(model, send_to_device(batch, self.args.device), num_items)  # type: ignore[misc]
        return total

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the scalar loss: trl's and the terms, weighted by the rows' share of the step."""
        # The weight is not an input of the model.
        share = inputs.pop(SHARE, None) if isinstance(inputs, dict) else None
        terms = self.terms if self.model.training else ()
        with contextlib.ExitStack() as stack:
            for term in terms:
                stack.enter_context(term.watching())
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        loss, *rest = result if return_outputs else (result,)
        is_counted: Any = 1.0
        if share is not None:
            # A loss divided by the step's items is already a part of the step's sum; only copies get weight 0.
            is_counted = (share > 0).to(share.dtype)
            loss = loss * (share if num_items_in_batch is None else is_counted)
        for term in terms:
            term_loss = term.loss(self, model, inputs)
            loss = loss + (term_loss if term.has_own_rows else term_loss * is_counted)
        return (loss, *rest) if return_outputs else loss

    def add_metric(self, name: str, value: float) -> None:
        """Add a metric that trl logs with the step, as a mean over micro-batches; trl stores metrics in two ways."""
        # Most of trl's trainers have _metrics; CPO's and ORPO's have store_metrics.
        metrics = getattr(self, "_metrics", None)
        if metrics is not None:
            metrics["train"][name].append(value)
        else:
            self.store_metrics({name: value}, train_eval="train")  # type: ignore[attr-defined]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        order = self.row_order()
        return order if self.continuation is None else ContinuedOrder(order, self.continuation)

    def row_order(self) -> Any:
        """Return the sampler of a run that begins with these rows."""
        return GroupedOrder(self.row_lengths, self.row_group, self.rows_per_step, self.args.seed)

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all processes."""
        rows: int = self.args.train_batch_size * max(1, self.args.world_size)
        return rows

    @property
    def row_group(self) -> int:
        """Rows of similar length that follow each other, whatever the micro-batch."""
        return int(getattr(self.args, "row_group", self.memory.rows))

    def get_train_dataloader(self) -> Any:
        """Return a loader of optimizer steps, each with the rows of all processes."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        sampler = self._get_train_sampler(self.train_dataset)
        return step_loader(loader.dataset, loader.collate_fn, sampler, self.rows_per_step)

    def _get_num_items_in_batch(self, batch_samples: list[StepRows], device: Any) -> Any:
        """Count the items that the step's loss is divided by, without copies of other micro-batches."""
        batches = [batch for step in batch_samples for batch in step.micro_batches(self.memory.rows)]
        counted = [_without_labels(batch) if is_copy(batch) else batch for batch in batches]
        if self.terms:
            masks = [answer_mask(batch) for batch in batches if not is_copy(batch)]
            tokens = sum(int(mask.sum()) for mask in masks if mask is not None)
            self.step_tokens = sum(all_gather(tokens))
        return super()._get_num_items_in_batch(counted, device)  # type: ignore[misc]

    def _track_num_input_tokens(self, inputs: StepRows) -> None:
        for batch in inputs.micro_batches(self.memory.rows):
            # A copy's tokens are counted with the micro-batch that it repeats.
            seen = {"attention_mask": torch.zeros_like(batch["input_ids"])} if is_copy(batch) else {}
            super()._track_num_input_tokens({**batch, **seen})  # type: ignore[misc]

    def floating_point_ops(self, inputs: StepRows) -> int:  # type: ignore[override]
        """Return the operations of a step as transformers counts them."""
        return sum(super(Prepared, self).floating_point_ops(batch) for batch in inputs.micro_batches(self.memory.rows))  # type: ignore[misc]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Skip trl's card, which it would write into every checkpoint folder; the artifact's record says more."""


def part_of_step(total: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return a micro-batch's sum over tokens, a scalar, as its part of a mean over the step's ``tokens``.

    Gradients are averaged over processes, which is undone.
    """
    return total / max(1, tokens) * world_size()


def answer_mask(batch: Any) -> torch.Tensor | None:
    """Return the mask (B, T - 1) of places that predict an answer's token; None for a batch that marks no answers."""
    if "labels" in batch:
        return batch["labels"][:, 1:] != -100  # type: ignore[no-any-return]
    if "completion_mask" in batch:
        return batch["completion_mask"][:, 1:] != 0  # type: ignore[no-any-return]
    return None


def _without_labels(batch: Any) -> Any:
    return {**batch, **{name: torch.full_like(batch[name], -100) for name in COUNTED if name in batch}}


class _OwnTokenLoss(SFTTrainer):  # type: ignore[misc]
    model: Any
    _signature_columns: Any
    own_loss: Method | None = None
    sources: Sequence[Row] = ()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return trl's loss, which sums ``-log_probs`` over the step's tokens; an own loss takes their place."""
        method = self.own_loss
        if method is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        rows = [self.sources[row] for row in inputs.pop(ROW).tolist()]

        def model_of_losses(**inputs: Any) -> Any:
            outputs = model(**inputs)
            lengths = row_lengths(inputs["position_ids"]) if "attention_mask" not in inputs else None
            tokens = AnswerTokens(_unflatten(outputs.log_probs, lengths), _unflatten(outputs.label_mask, lengths), rows)
            result = method(tokens, tuple(tokens.mask.shape), f"at step {self.state.global_step + 1}")
            for name, value in result.means(tokens.mask).items():
                self._metrics["train" if self.model.training else "eval"][name].append(value)
            outputs.log_probs = -_flatten(result.values * tokens.mask, lengths)
            return outputs

        return super().compute_loss(model_of_losses, inputs, return_outputs, num_items_in_batch)


def row_lengths(position_ids: torch.Tensor) -> list[int]:
    """Return the lengths of concatenated rows from positions (1, N) that restart with every row."""
    starts = [*(position_ids[0] == 0).nonzero()[:, 0].tolist(), position_ids.shape[1]]
    return [end - start for start, end in itertools.pairwise(starts)]


def _unflatten(values: torch.Tensor, lengths: Sequence[int] | None) -> torch.Tensor:
    """Return values of next tokens, (1, N - 1) of concatenated rows, as (B, T); those of padded rows as they are."""
    if lengths is None:
        return values
    # The last value of a row belongs to the first token of the next row, which has no label.
    flat = torch.nn.functional.pad(values[0], (0, 1))
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(list(lengths))), batch_first=True)


def _flatten(values: torch.Tensor, lengths: Sequence[int] | None) -> torch.Tensor:
    """Undo ``_unflatten``."""
    if lengths is None:
        return values
    return torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])[None, :-1]


class PreparedSFT(Prepared, _OwnTokenLoss):  # type: ignore[misc]
    """Rows: ``input_ids``, ``labels``, and for an own loss ``row_number``, a list: a pack has several rows."""

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [*(self._signature_columns or []), ROW]


class PreparedReward(Prepared, RewardTrainer):  # type: ignore[misc]
    """Rows: ``chosen_ids``, ``rejected_ids``. The score head is trained with ``head_learning_rate``."""

    head_learning_rate: float

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if is_new:
            set_head_learning_rate(optimizer, self.model if model is None else model, self.head_learning_rate)
        return optimizer


def set_head_learning_rate(optimizer: torch.optim.Optimizer, model: Any, rate: float) -> None:
    """Move a reward model's trained head into a parameter group with the learning rate ``rate``."""
    # peft names the trained copy of the head score.modules_to_save.
    head = {id(p): p for name, p in model.named_parameters() if "score." in name and p.requires_grad}
    for group in list(optimizer.param_groups):
        head_parameters = [p for p in group["params"] if id(p) in head]
        group["params"] = [p for p in group["params"] if id(p) not in head]
        if head_parameters:
            optimizer.add_param_group({**group, "params": head_parameters, "lr": rate})


def learning_rate_share(group: ParameterGroup, layers: int, decay: float) -> float:
    """Return the share of the learning rate for a parameter group (discriminative fine-tuning, arXiv 1801.06146).

    1 for the last layer and everything after it; each layer below has ``decay`` times the share of the next one. The
    embeddings count as one below the first layer.
    """
    if group == "embeddings":
        return float(decay**layers)
    if isinstance(group, int):
        return float(decay ** (layers - 1 - group))
    return 1.0


def set_layer_learning_rates(optimizer: torch.optim.Optimizer, model: Any, decay: float) -> None:
    """Split the optimizer's groups by depth, each with its share of the group's learning rate.

    Call it before a scheduler is created: a scheduler multiplies each group's rate at that time.
    """
    _, stack = layer_stack(model)
    group_of = parameter_groups(model)
    shares = {id(p): learning_rate_share(group_of[name], len(stack), decay) for name, p in model.named_parameters()}
    for group in list(optimizer.param_groups):
        by_share: dict[float, list[torch.nn.Parameter]] = {}
        for parameter in group["params"]:
            by_share.setdefault(shares[id(parameter)], []).append(parameter)
        # The rate is read once, because the group itself gets a new rate below.
        rate = group["lr"]
        for index, share in enumerate(sorted(by_share, reverse=True)):
            if index == 0:
                group["params"], group["lr"] = by_share[share], rate * share
            else:
                optimizer.add_param_group({**group, "params": by_share[share], "lr": rate * share})
