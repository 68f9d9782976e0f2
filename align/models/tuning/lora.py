"""Adapters that peft adds next to frozen matrices: LoRA and its variants, IA3, and any method that can be merged.

LoRA (arXiv 2106.09685) that is initialized from the weights (PiSSA, OLoRA) subtracts its part from them. Without its
adapters the model is then no longer the initial one, so ``store_initial_values`` stores their initial values and
``initial_policy`` in ``apply.py`` restores them.

``tuning.train_tokens`` trains the rows of a few tokens next to low-rank adapters, by peft's trainable tokens. The rows
of the embedding, and of an untied head, are their own parameters; all other rows stay frozen. A base model learns the
tokens of its new chat template that way, at the cost of a few thousand parameters.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, TaskType, get_peft_config, get_peft_model, initialize_lora_eva_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from align.config.tuning import IA3_INPUTS, IA3_OUTPUTS, Ia3Tuning, LowRank, PeftTuning, TuningBase
from align.config.validation import hint_nearest, nearest
from align.errors import UserError
from align.models.checkpoints.folder_checks import TOKENIZER, token_ids
from align.models.compute.architecture import TIED
from align.models.compute.layers import FEED_FORWARD
from align.models.compute.precision import float32_products, widen_trained
from align.models.experts import default_targets, expert_matrices, has_experts
from align.models.parameter_groups import layer_stack
from align.models.tuning.inserted import swapped_values
from align.models.tuning.peft_layers import fuse_lora, merge_layer, set_dora_magnitudes, tuner_layers
from align.patches.peft import float32_adapters

START = "align_start"
"""Attribute of a peft model: its adapters' initial weights by name, where these are part of the initial model."""
EVA_ROWS = 256
EVA_BATCH = 8
"""Training rows that EVA reads at most, and rows per batch."""


def wrap(model: PreTrainedModel, tuning: LowRank, seed: int, rows: Sequence[Sequence[int]] | None = None) -> Any:
    """Return ``model`` with LoRA adapters drawn from ``seed``; ``init: eva`` reads ``rows``, lists of token ids.

    A reward model's score head is trained in full and saved with the adapters. The caller's random state and tensors
    that ``model`` shares with another model are unchanged. Raises ``UserError`` if the targets match no module or
    are tied to another.
    """
    if tuning.init == "eva" and not rows:
        raise UserError("tuning.init: eva reads training rows, and this stage has none; use another init.")
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
            with float32_adapters():
                peft_model = get_peft_model(model, _config(model, tuning))
        except ValueError as error:
            raise UserError(f"tuning.targets: {tuning.targets} fits no module of this model: {error}") from None
        check_ties(peft_model)
        prepare(peft_model)
        widen_trained(peft_model)
        if tuning.dora and model.dtype != torch.float32:
            set_dora_magnitudes(peft_model)
        if tuning.init == "eva":
            _start_from_rows(peft_model, rows or ())
    # The adapters are initialized: loading one from a checkpoint must not do it again.
    config = peft_model.peft_config["default"]
    config.init_lora_weights = True
    config.eva_config = None
    if tuning.starts_from_weights:
        store_initial_values(peft_model)
    fuse_lora(peft_model)
    return peft_model


def _config(model: PreTrainedModel, tuning: LowRank) -> Any:
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


def _targets(model: PreTrainedModel, tuning: LowRank) -> str | list[str]:
    """Return the target modules for peft: full names where only the last layers are adapted."""
    if tuning.last_layers is None and isinstance(tuning.targets, list):
        experts = expert_targets(model, tuning)
        return [name for name in tuning.targets if name not in experts]
    if tuning.last_layers is None:
        return default_targets(model)
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


def expert_targets(model: nn.Module, tuning: LowRank) -> list[str]:
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


def check_names(model: nn.Module, names: Sequence[str], place: str) -> None:
    """Raise ``UserError`` for a name that matches no module, nor the end of one after a dot: peft would ignore it."""
    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            ends = {module.rpartition(".")[2] for module in modules}
            hint = hint_nearest(name, sorted(end for end in ends if not end.isdigit()))
            raise UserError(f"{place}: '{name}' fits no module of this model.{hint}")


def check_ties(peft_model: Any) -> None:
    """Refuse an adapter on either of two tied matrices: the saved model has one matrix for both."""
    base = peft_model.get_base_model()
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False) or hasattr(base, "score"):
        return
    for part in (base.get_input_embeddings(), base.get_output_embeddings()):
        if isinstance(part, BaseTunerLayer):
            raise UserError(f"tuning.targets: {TIED}")


def _unshare_matrices(model: PreTrainedModel) -> None:
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
    start = getattr(peft_model, START, None)
    config = peft_model.peft_config["default"]
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
    doubled.r = 2 * config.r
    doubled.lora_alpha = config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    peft_model.peft_config["default"] = doubled
    try:
        peft_model.save_pretrained(str(folder), safe_serialization=True, state_dict=state)
    finally:
        peft_model.peft_config["default"] = config


def _start_from_rows(peft_model: Any, rows: Sequence[Sequence[int]]) -> None:
    """Initialize by EVA: adapters read the directions in which the matrices' inputs vary most on ``rows``."""
    device = next(peft_model.parameters()).device
    was_training = peft_model.training
    peft_model.eval()
    try:
        with float32_products(peft_model):
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


IDS = "align_token_ids"
"""Attribute of a model: the ids of the tokens to train."""


def note_ids(model: nn.Module, source: Path, tuning: TuningBase) -> None:
    """Look the tokens of ``tuning`` up in the vocabulary of the checkpoint ``source``, for :func:`rows_by_module`.

    Raises ``UserError`` for a token that is not there.
    """
    if not isinstance(tuning, LowRank) or not tuning.train_tokens:
        return
    ids = token_ids(source / TOKENIZER)
    for token in tuning.train_tokens:
        if token not in ids:
            close = nearest(token, [name for name in ids if name.startswith(token[:1])])
            hint = f" Did you mean '{close}'?" if close else ""
            raise UserError(
                f"tuning.train_tokens: the vocabulary of {source} has no token {token!r}.{hint} `add_tokens` of a "
                "model stage adds one."
            )
    setattr(model, IDS, [ids[token] for token in tuning.train_tokens])


def rows_by_module(model: PreTrainedModel, tokens: Sequence[str]) -> dict[str, list[int]] | None:
    """Return, for peft, the rows to train by the names of embedding and untied head; None without tokens."""
    if not tokens:
        return None
    ids = getattr(model, IDS, None)
    if ids is None:
        raise UserError("tuning.train_tokens: this model was not loaded from a checkpoint with a tokenizer.json.")
    names = {id(module): name for name, module in model.named_modules()}
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    rows = {names[id(embedding)]: list(ids)}
    # peft trains the rows of a tied head together with the embedding's.
    if head is not None and head.weight is not embedding.weight:
        rows[names[id(head)]] = list(ids)
    return rows


def require_plain(model: PreTrainedModel) -> None:
    """Raise ``UserError`` for a head with a bias, which peft's layer would leave out."""
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(
            "tuning.train_tokens: this model's head has a bias, which peft's trained rows leave out. Take "
            "`save_modules` with the names of embedding and head instead."
        )


def prepare(peft_model: Any) -> None:
    """Give wrapped heads the attribute ``bias``, which trl's fused loss and align's losses read and peft hides."""
    for module in peft_model.modules():
        if isinstance(module, TrainableTokensWrapper):
            module.bias = None  # type: ignore[assignment]


STARTS: dict[str, dict[str, Any]] = {"c3a": {"init_weights": True}, "fourierft": {"init_weights": True}}
"""Options with which a method starts as the initial model, where peft's defaults do not."""
WITHOUT_TARGETS = ("ln_tuning",)
"""Methods that do not act on linear layers and choose their modules themselves."""


def wrap_method(model: nn.Module, tuning: Ia3Tuning | PeftTuning, seed: int) -> Any:
    """Return ``model`` with the method's parameters, drawn from ``seed``; the caller's random state is unchanged.

    A reward model's score head is trained in full and saved with them. Raises ``UserError`` for options that conflict
    or do not fit the model, and for a method that cannot be merged.
    """
    place = "tuning" if isinstance(tuning, Ia3Tuning) else "tuning.options"
    options: dict[str, Any] = {"targets": tuning.targets} if isinstance(tuning, Ia3Tuning) else tuning.options
    for name in ("targets", "target_modules", "modules_to_save"):
        if isinstance(options.get(name), list):
            check_names(model, options[name], f"{place}.{name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with float32_adapters():
                peft_model: Any = get_peft_model(model, get_peft_config(_method_options(model, tuning)))  # type: ignore[no-untyped-call]
        except (ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
            raise UserError(f"{place}: {tuning.label} does not fit this model: {error}") from None
    check_ties(peft_model)
    widen_trained(peft_model)
    layers = tuner_layers(peft_model)
    if not layers:
        raise UserError(f"{place}: {tuning.label} changes no module of this model.")
    # Merge one layer as a test, unless the model has no weights yet (meta device).
    first = next(iter(layers.values()))
    try:
        if not any(weight.is_meta for weight in first.parameters()):
            merge_layer(first)
    except ValueError as error:
        raise UserError(f"{place}: {error} Its result would run in no engine; use another method.") from None
    return peft_model


def _method_options(model: nn.Module, tuning: Ia3Tuning | PeftTuning) -> dict[str, Any]:
    classifier = hasattr(model, "score")
    options: dict[str, Any] = {"task_type": "SEQ_CLS" if classifier else "CAUSAL_LM"}
    if isinstance(tuning, Ia3Tuning):
        names = [name for name, _ in model.named_modules()]
        # IA3 scales outputs of keys and values and inputs of the MLP's last matrix, by the names that this model has.
        present = [end for end in (*IA3_OUTPUTS, *IA3_INPUTS) if any(name.endswith(f".{end}") for name in names)]
        inner = [end for end in IA3_INPUTS if end in present] if tuning.feedforward is None else tuning.feedforward
        options |= {"peft_type": "IA3", "target_modules": tuning.targets or present, "feedforward_modules": inner}
        return options | ({"modules_to_save": ["score"]} if classifier else {})
    options |= {"peft_type": tuning.type.upper(), **STARTS.get(tuning.type, {})}
    if tuning.type not in WITHOUT_TARGETS:
        options["target_modules"] = "all-linear"
    options |= tuning.options
    if classifier:
        options["modules_to_save"] = sorted({*(options.get("modules_to_save") or ()), "score"})
    return options
