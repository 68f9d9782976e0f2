"""LoRA and its variants: low-rank adapters beside frozen matrices (arXiv 2106.09685), put there by peft.

Adapters that start from the weights themselves (PiSSA, OLoRA) take their part out of them, so the model without its
adapters is no longer the one that came in: ``keep_start`` notes where they started, and ``initial_policy`` in
``apply.py`` goes back there.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from align.config.tuning import LowRank
from align.config.validation import nearest
from align.errors import UserError
from align.models.parameter_groups import layer_stack
from align.models.tuning.exchange import exchanged

START = "align_start"
"""Attribute of a peft model: its adapters' first weights by name, where these are part of the model as it came in."""
EVA_ROWS, EVA_BATCH = 256, 8
"""Training rows that EVA looks at, at most, and at a time."""


def wrap(model: Any, tuning: LowRank, seed: int, rows: Sequence[Sequence[int]] | None = None) -> Any:
    """``model`` with LoRA adapters drawn from ``seed``; ``rows``, token ids, are what ``init: eva`` looks at.

    A reward model's score head is trained in full and saved with the adapters. The caller's randomness is untouched,
    and so are tensors that ``model`` shares with another. Raises ``UserError`` where the targets fit no module or are
    tied to another.
    """
    from peft import get_peft_model

    if tuning.init == "eva" and not rows:
        raise UserError("tuning.init: eva looks at training rows, and there are none here; take another init.")
    if isinstance(tuning.targets, list):
        check_names(model, tuning.targets, "tuning.targets")
    check_names(model, tuning.save_modules, "tuning.save_modules")
    if tuning.starts_from_weights:
        _own_matrices(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = get_peft_model(model, _config(model, tuning))
        except ValueError as error:
            raise UserError(f"tuning.targets: {tuning.targets} fits no module of this model: {error}") from None
        check_ties(made)
        if tuning.init == "eva":
            _start_from_rows(made, rows or ())
    config = made.peft_config["default"]  # it has started: an adapter loaded from a checkpoint starts nothing
    config.init_lora_weights, config.eva_config = True, None
    if tuning.starts_from_weights:
        keep_start(made)
    return made


def _config(model: Any, tuning: LowRank) -> Any:
    from peft import EvaConfig, LoraConfig, TaskType

    classifier = hasattr(model, "score")
    saved = [*tuning.save_modules, *(["score"] if classifier else [])]
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)) and not classifier
    starts: dict[str, Any] = {"default": True, "loftq": True}
    return LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]  # peft divides it, so a fraction is fine
        lora_dropout=tuning.dropout,
        target_modules=_targets(model, tuning),
        use_rslora=tuning.rslora,
        use_dora=tuning.dora,
        init_lora_weights=starts.get(tuning.init, tuning.init),
        # rho 1 keeps the rank of every layer, so that a checkpoint fits whatever the data were
        eva_config=EvaConfig(rho=1.0) if tuning.init == "eva" else None,
        task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        modules_to_save=saved or None,
        ensure_weight_tying=tied and bool(tuning.save_modules),
    )


def _targets(model: Any, tuning: LowRank) -> str | list[str]:
    """What peft is to put adapters on; whole names where the layers are told apart, since peft knows none otherwise."""
    if tuning.last_layers is None:
        return tuning.targets
    from transformers.pytorch_utils import Conv1D

    stack, layers = layer_stack(model)
    if tuning.last_layers > len(layers):
        raise UserError(f"tuning.last_layers is {tuning.last_layers}, and this model has {len(layers)} layers.")
    matrices = [
        f"{stack}.{number}.{name}"
        for number in range(len(layers) - tuning.last_layers, len(layers))
        for name, module in layers[number].named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    ]
    if tuning.targets == "all-linear":
        return matrices
    chosen = {one: [name for name in matrices if f".{name}".endswith(f".{one}")] for one in tuning.targets}
    for one, names in chosen.items():
        if not names:
            raise UserError(f"tuning.targets: '{one}' fits no matrix of the last {tuning.last_layers} layers.")
    return sorted({name for names in chosen.values() for name in names})


def check_names(model: Any, names: Sequence[str], place: str) -> None:
    """``UserError`` for a name that is that of no module, nor the end of one after a dot: peft passes over it."""
    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            ends = {module.rpartition(".")[2] for module in modules}
            close = nearest(name, sorted(end for end in ends if not end.isdigit()))
            hint = f" Did you mean '{close}'?" if close else ""
            raise UserError(f"{place}: '{name}' fits no module of this model.{hint}")


def check_ties(made: Any) -> None:
    """Refuse an adapter on one of two tied matrices: what is saved has one matrix for both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = made.get_base_model()
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False) or hasattr(base, "score"):
        return
    for part in (base.get_input_embeddings(), base.get_output_embeddings()):
        if isinstance(part, BaseTunerLayer):
            raise UserError(
                "tuning.targets: this model's head is tied to its embeddings, so an adapter on one of them would have "
                "to be on both. Leave both out, or train them whole: `save_modules: [embed_tokens]`."
            )


def _own_matrices(model: Any) -> None:
    """Give matrices parameters of their own over the same numbers: peft is about to put other numbers there."""
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not embedding:
            module.weight = torch.nn.Parameter(module.weight.data, requires_grad=module.weight.requires_grad)


def keep_start(made: Any) -> None:
    """Note the adapters' weights as part of the model that came in."""
    setattr(made, START, {name: p.detach().clone() for name, p in _adapter_weights(made)})


def _adapter_weights(made: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, parameter in made.named_parameters():
        if ".lora_" in name:
            yield name, parameter


@contextlib.contextmanager
def at_start(made: Any) -> Iterator[Any]:
    """The model with its adapters where they started, and with the modules beside them as they came in."""
    from peft.utils import ModulesToSaveWrapper

    whole = [module for module in made.modules() if isinstance(module, ModulesToSaveWrapper)]
    with exchanged(dict(_adapter_weights(made)), getattr(made, START)):
        for module in whole:
            module.enable_adapters(False)
        try:
            yield made
        finally:
            for module in whole:
                module.enable_adapters(True)


def save_adapter(made: Any, folder: Path) -> None:
    """Write the bare adapter, to be put on the model that came in (with ``qlora``, on that model in 4 bits).

    One that started from the weights is written as an ordinary one of twice the rank: what it is, less what it was.
    """
    start, config = getattr(made, START, None), made.peft_config["default"]
    if start is None or getattr(made, "align_quantized", False):
        made.save_pretrained(str(folder), safe_serialization=True)
        return
    state = made.state_dict()
    for name, first in start.items():
        if ".lora_A." in name:
            state[name] = torch.cat([state[name], first.to(state[name].device)])
        elif ".lora_B." in name:
            state[name] = torch.cat([state[name], -first.to(state[name].device)], dim=1)
    double = copy.copy(config)
    double.r, double.lora_alpha = 2 * config.r, config.lora_alpha * (2**0.5 if config.use_rslora else 2)
    made.peft_config["default"] = double
    try:
        made.save_pretrained(str(folder), safe_serialization=True, state_dict=state)
    finally:
        made.peft_config["default"] = config


def _start_from_rows(made: Any, rows: Sequence[Sequence[int]]) -> None:
    """EVA: the adapters' inputs span what the matrices' inputs vary in most on ``rows``."""
    from peft import initialize_lora_eva_weights

    device = next(made.parameters()).device
    was_training = made.training
    made.eval()
    try:
        initialize_lora_eva_weights(made, _batches(rows[:EVA_ROWS], device), show_progress_bar=False)
    except ValueError as error:
        raise UserError(f"tuning.init: eva does not work on these training rows: {error}") from None
    finally:
        made.train(was_training)


def _batches(rows: Sequence[Sequence[int]], device: Any) -> list[dict[str, torch.Tensor]]:
    """Padded batches of equal size; rows are taken again from the front to fill the last one."""
    count = -(-len(rows) // EVA_BATCH) * EVA_BATCH
    filled = list(itertools.islice(itertools.cycle(rows), count))
    made = []
    for at in range(0, count, EVA_BATCH):
        part = filled[at : at + EVA_BATCH]
        width = max(map(len, part))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in part], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part], device=device)
        made.append({"input_ids": ids, "attention_mask": mask})
    return made
