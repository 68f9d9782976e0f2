"""LoRA and its variants: low-rank adapters next to frozen matrices (arXiv 2106.09685), by peft.

Adapters that are initialized from the weights (PiSSA, OLoRA) subtract their part from them. Without its adapters the
model is then no longer the initial one, so ``store_initial_values`` stores their initial values and ``initial_policy``
in ``apply.py`` restores them.

Compute a LoRA layer as one function: fewer passes over its activations than peft's sum of two products.

peft computes ``x W^T + s (x A^T) B^T`` with a tensor of the output's size for each product, for the scaled one and for
the sum, and autograd goes through four more in the backward pass. Here the low-rank product is added to the other by
the product itself. ``align.patches.peft`` puts the layer here in the place of peft's.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch.autograd.function import once_differentiable

from align.config.tuning import LowRank
from align.config.validation import hint_nearest
from align.errors import UserError
from align.models.experts import FEED_FORWARD, expert_matrices, has_experts, matrices_outside_experts
from align.models.parameter_groups import layer_stack
from align.models.tuning.inserted import swapped_values
from align.models.tuning.layers import prepare, require_plain, rows_by_module
from align.patches.peft import has_hooks, replace_lora_linear

START = "align_start"
"""Attribute of a peft model: its adapters' initial weights by name, where these are part of the initial model."""
EVA_ROWS, EVA_BATCH = 256, 8
"""Training rows that EVA reads at most, and rows per batch."""


def wrap(model: Any, tuning: LowRank, seed: int, rows: Sequence[Sequence[int]] | None = None) -> Any:
    """Return ``model`` with LoRA adapters drawn from ``seed``; ``init: eva`` reads ``rows``, lists of token ids.

    A reward model's score head is trained in full and saved with the adapters. The caller's random state and tensors
    that ``model`` shares with another model are unchanged. Raises ``UserError`` if the targets match no module or
    are tied to another.
    """
    from peft import get_peft_model

    if tuning.init == "eva" and not rows:
        raise UserError("tuning.init: eva reads training rows, and this stage has none; take another init.")
    experts = expert_targets(model, tuning)
    if isinstance(tuning.targets, list):
        check_names(model, [name for name in tuning.targets if name not in experts], "tuning.targets")
    check_names(model, tuning.save_modules, "tuning.save_modules")
    if tuning.train_tokens:
        require_plain(model)
    if tuning.starts_from_weights:
        _unshare_matrices(model)
    # peft draws the adapters from torch's global generator, which is restored afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft_model = get_peft_model(model, _config(model, tuning))
        except ValueError as error:
            raise UserError(f"tuning.targets: {tuning.targets} fits no module of this model: {error}") from None
        check_ties(peft_model)
        prepare(peft_model)
        if tuning.init == "eva":
            _start_from_rows(peft_model, rows or ())
    # The adapters are initialized: loading one from a checkpoint must not do it again.
    config = peft_model.peft_config["default"]
    config.init_lora_weights, config.eva_config = True, None
    if tuning.starts_from_weights:
        store_initial_values(peft_model)
    fuse_lora(peft_model)
    return peft_model


def _config(model: Any, tuning: LowRank) -> Any:
    from peft import EvaConfig, LoraConfig, TaskType

    classifier = hasattr(model, "score")
    saved = [*tuning.save_modules, *(["score"] if classifier else [])]
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)) and not classifier
    # peft draws default values for LoftQ. quantized.py replaces them later.
    starts: dict[str, Any] = {"default": True, "loftq": True}
    return LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]  # peft divides it, so a fraction is fine
        lora_dropout=tuning.dropout,
        target_modules=_targets(model, tuning),
        target_parameters=expert_targets(model, tuning) or None,
        use_rslora=tuning.rslora,
        use_dora=tuning.dora,
        init_lora_weights=starts.get(tuning.init, tuning.init),
        # rho 1 keeps the rank of every layer, so a checkpoint fits whatever the data are.
        eva_config=EvaConfig(rho=1.0) if tuning.init == "eva" else None,
        task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        modules_to_save=saved or None,
        ensure_weight_tying=tied and bool(tuning.save_modules),
        trainable_token_indices=rows_by_module(model, tuning.train_tokens),
    )


def _targets(model: Any, tuning: LowRank) -> str | list[str]:
    """Return the target modules for peft: full names where only the last layers are adapted."""
    if tuning.last_layers is None and isinstance(tuning.targets, list):
        experts = expert_targets(model, tuning)
        return [name for name in tuning.targets if name not in experts]
    if tuning.last_layers is None:
        return matrices_outside_experts(model) if has_experts(model.config) else tuning.targets
    from transformers.pytorch_utils import Conv1D

    stack, layers = layer_stack(model)
    if tuning.last_layers > len(layers):
        raise UserError(f"tuning.last_layers is {tuning.last_layers}, and this model has {len(layers)} layers.")
    # peft selects modules by name and cannot express a range of layers, so every matrix is named in full.
    matrices = [
        f"{stack}.{number}.{name}"
        for number in range(len(layers) - tuning.last_layers, len(layers))
        for name, module in layers[number].named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    ]
    if tuning.targets == "all-linear":
        return matrices
    chosen = {target: [name for name in matrices if f".{name}".endswith(f".{target}")] for target in tuning.targets}
    for target, names in chosen.items():
        if not names:
            raise UserError(f"tuning.targets: '{target}' fits no matrix of the last {tuning.last_layers} layers.")
    return sorted({name for names in chosen.values() for name in names})


def expert_targets(model: Any, tuning: LowRank) -> list[str]:
    """Return the targets that name expert matrices, such as ``experts.gate_up_proj``, for peft's target_parameters.

    Raises ``UserError`` for settings with which peft cannot adapt them, and for a name that peft would move from a
    dense layer to the experts.
    """
    if not isinstance(tuning.targets, list) or not has_experts(model.config):
        return []
    available = expert_matrices(model)
    experts = [name for name in tuning.targets if name in available]
    moved = [name for name in tuning.targets if name.rpartition(".")[2] in FEED_FORWARD and name not in available]
    if moved:
        raise UserError(
            f"tuning.targets: {', '.join(moved)} would adapt the experts of this model. Name their matrices instead: "
            f"{', '.join(available)}."
        )
    if experts and (tuning.dropout or tuning.dora or tuning.last_layers is not None):
        raise UserError(
            f"tuning.targets: {', '.join(experts)} cannot be adapted with dropout, dora or last_layers. Remove these "
            "settings, or the experts."
        )
    return experts


def check_names(model: Any, names: Sequence[str], place: str) -> None:
    """Raise ``UserError`` for a name that matches no module, nor the end of one after a dot: peft would ignore it."""
    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            ends = {module.rpartition(".")[2] for module in modules}
            hint = hint_nearest(name, sorted(end for end in ends if not end.isdigit()))
            raise UserError(f"{place}: '{name}' fits no module of this model.{hint}")


def check_ties(peft_model: Any) -> None:
    """Refuse an adapter on one of two tied matrices: the saved model has one matrix for both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = peft_model.get_base_model()
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False) or hasattr(base, "score"):
        return
    for part in (base.get_input_embeddings(), base.get_output_embeddings()):
        if isinstance(part, BaseTunerLayer):
            raise UserError(
                "tuning.targets: this model's head is tied to its embeddings, so an adapter on one of them would have "
                "to be on both. Leave both out, or train them in full: `save_modules: [embed_tokens]`."
            )


def _unshare_matrices(model: Any) -> None:
    """Give matrices new parameters over the same memory: peft replaces their data, which other models may share."""
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    for module in model.modules():
        # A tied head must keep the embedding's parameter.
        if isinstance(module, torch.nn.Linear) and module.weight is not embedding:
            module.weight = torch.nn.Parameter(module.weight.data, requires_grad=module.weight.requires_grad)


def store_initial_values(peft_model: Any) -> None:
    """Store the adapters' weights as part of the initial model."""
    setattr(peft_model, START, {name: p.detach().clone() for name, p in _adapter_weights(peft_model)})


def _adapter_weights(peft_model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            yield name, parameter


@contextlib.contextmanager
def at_initial_values(peft_model: Any) -> Iterator[Any]:
    """Inside, the model has its adapters' initial values and the initial modules next to them."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    saved_modules = [module for module in peft_model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    with swapped_values(dict(_adapter_weights(peft_model)), getattr(peft_model, START)):
        for module in saved_modules:
            module.enable_adapters(False)
        try:
            yield peft_model
        finally:
            for module in saved_modules:
                module.enable_adapters(True)


def save_adapter(peft_model: Any, folder: Path) -> None:
    """Write the bare adapter, which fits the initial model (with ``qlora``, that model in 4 bits).

    An adapter that was initialized from the weights is written as an adapter of twice the rank: its product now minus
    its initial product.
    """
    start, config = getattr(peft_model, START, None), peft_model.peft_config["default"]
    if start is None or getattr(peft_model, "align_quantized", False):
        peft_model.save_pretrained(str(folder), safe_serialization=True)
        return
    state = peft_model.state_dict()
    # A = [A_now; A_initial] and B = [B_now, -B_initial], so B A is the difference of the two products.
    for name, initial in start.items():
        if ".lora_A." in name:
            state[name] = torch.cat([state[name], initial.to(state[name].device)])
        elif ".lora_B." in name:
            state[name] = torch.cat([state[name], -initial.to(state[name].device)], dim=1)
    doubled = copy.copy(config)
    # peft scales by alpha / r, or alpha / sqrt(r) with rslora. Alpha grows so the scale stays the same.
    doubled.r, doubled.lora_alpha = 2 * config.r, config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    peft_model.peft_config["default"] = doubled
    try:
        peft_model.save_pretrained(str(folder), safe_serialization=True, state_dict=state)
    finally:
        peft_model.peft_config["default"] = config


def _start_from_rows(peft_model: Any, rows: Sequence[Sequence[int]]) -> None:
    """Initialize by EVA: adapters read the directions in which the matrices' inputs vary most on ``rows``."""
    from peft import initialize_lora_eva_weights

    device = next(peft_model.parameters()).device
    was_training = peft_model.training
    peft_model.eval()
    try:
        initialize_lora_eva_weights(peft_model, _batches(rows[:EVA_ROWS], device), show_progress_bar=False)
    except ValueError as error:
        raise UserError(f"tuning.init: eva does not work on these training rows: {error}") from None
    finally:
        peft_model.train(was_training)


def _batches(rows: Sequence[Sequence[int]], device: Any) -> list[dict[str, torch.Tensor]]:
    """Return padded batches of equal size; the first rows are repeated to fill the last batch."""
    count = -(-len(rows) // EVA_BATCH) * EVA_BATCH
    filled = list(itertools.islice(itertools.cycle(rows), count))
    batches = []
    for start in range(0, count, EVA_BATCH):
        batch_rows = filled[start : start + EVA_BATCH]
        width = max(map(len, batch_rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch_rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch_rows], device=device)
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


class FusedLoraLinear(Linear):
    """peft's LoRA layer on a matrix; calls that the fused function does not cover use peft's forward pass."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map x of shape (..., in) to (..., out)."""
        adapter = None if args or kwargs else self._find_only_adapter()
        weight: Any = self.base_layer.weight
        if adapter is None or not _is_whole(weight):
            return super().forward(x, *args, **kwargs)
        low, high = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        bias: Any = self.base_layer.bias
        tensors: list[Any] = [x, weight, low, high, *([] if bias is None else [bias])]
        device_type = x.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            tensors = [tensor.to(dtype) for tensor in tensors]
        elif len({tensor.dtype for tensor in tensors}) > 1:
            return super().forward(x)
        x, weight, low, high, *biases = tensors
        output: torch.Tensor = _LowRankSum.apply(
            x, weight, biases[0] if biases else None, low, high, self.scaling[adapter]
        )
        return output

    def _find_only_adapter(self) -> str | None:
        """Return the one active adapter, where it is plain LoRA without any other part."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1:
            return None
        name, base = names[0], self.base_layer
        dropout = self.lora_dropout[name]
        if isinstance(dropout, torch.nn.Dropout) and dropout.training and dropout.p > 0:
            return None
        matrices = (base, self.lora_A[name], self.lora_B[name])
        are_plain = name not in self.lora_variant and all(type(matrix) is torch.nn.Linear for matrix in matrices)
        if not are_plain or self.lora_B[name].bias is not None or base.weight.requires_grad:
            return None
        return None if any(map(has_hooks, (*matrices, dropout))) else name


def fuse_lora(model: Any) -> None:
    """Compute ``model``'s LoRA layers on plain matrices by the fused function, in place."""
    replace_lora_linear(model, FusedLoraLinear)


def _is_whole(weight: torch.Tensor) -> bool:
    """Return True for a weight that no wrapper has shared out among processes."""
    return type(weight) in (torch.nn.Parameter, torch.Tensor) and weight.dim() == 2 and not hasattr(weight, "ds_id")


class _LowRankSum(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T of x (..., in), frozen W (out, in) and b (out,), trained A (r, in) and B (out, r)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        low: torch.Tensor,
        high: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Map x of shape (..., in) to (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        narrow = rows @ low.t()  # (N, r)
        output = torch.nn.functional.linear(rows, weight, bias)
        # The product is added in place, without another tensor of the output's size.
        output.addmm_(narrow, high.t(), alpha=scale)
        # Views: a parameter whose values are swapped before the backward pass leaves them as they were.
        ctx.save_for_backward(rows, narrow, weight, low.t(), high.t())
        ctx.scale, ctx.shape = scale, x.shape
        return output.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """(..., out) -> gradients of x, A and B in their shapes."""
        rows, narrow, weight, low_view, high_view = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        # The gradient of x A^T, which the gradients of x and A share.
        grad_narrow = (grad @ high_view.t()).mul_(ctx.scale)  # (N, r)
        grad_x = grad_low = grad_high = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_narrow, low_view.t()).view(ctx.shape)
        if ctx.needs_input_grad[3]:
            grad_low = grad_narrow.t() @ rows
        if ctx.needs_input_grad[4]:
            # The narrow matrix goes first: the product is several times as fast on a CPU.
            grad_high = (narrow.t() @ grad).mul_(ctx.scale).t()
        return grad_x, None, None, grad_low, grad_high, None
