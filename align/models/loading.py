"""Load tokenizers, policies and reward models from checkpoints of the store.

All go through ``pretrained.py``, which refuses damaged or hostile files. Excluded: models from outside
(``conversion.py``), and preparing them for training and saving them (``tuning/apply.py``).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from align.errors import UserError
from align.models.chat.render import require_chat_template
from align.models.checkpoints.files import read_header, weight_files
from align.models.checkpoints.folder_checks import FLOATS, tensor_entries
from align.models.compute.precision import cast_frozen_to_bf16, widen_vectors
from align.models.pretrained import Task, open_model, open_tokenizer
from align.models.tuning.stored import load_adapter, tokenizer_for

HEAD = "score.weight"

SCORING: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
"""Config of a reward model: one number, used as it is. Without the problem type vLLM applies a sigmoid."""


def load_tokenizer(model_dir: Path, tuning: Any = None) -> Any:
    """Load a checkpoint's tokenizer; for a stage that trains by ``tuning``, with the virtual tokens that this adds.

    Raises ``UserError`` when it has no chat template, no end token, or pads with its end token.
    """
    tokenizer = open_tokenizer(model_dir)
    require_chat_template(tokenizer, f"the tokenizer in {model_dir}")
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise UserError(
            f"the tokenizer in {model_dir} has eos {tokenizer.eos_token!r} and pad {tokenizer.pad_token!r}; both are "
            "needed and must differ, or the end of a turn is never learned. Bring the model in through a model stage."
        )
    if tuning is not None:
        return tokenizer_for(tokenizer, model_dir, tuning)
    return tokenizer


def load_policy(model_dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a checkpoint's causal language model to the CPU, in eval mode.

    Training uses float32 weights whatever the stage's precision, which is the type of the matrix products
    (``precision.py``).
    """
    return _load("causal", model_dir, dtype)[0]


def load_reward(model_dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a trained reward model: one score per sequence, at its last token that is not padding.

    Raises ``UserError`` when the checkpoint lacks its score head: transformers would put a random one there.
    """
    model, missing = _load("classifier", model_dir, dtype, may_lack={HEAD}, **SCORING)
    if missing:
        raise UserError(
            f"{model_dir} is not a trained reward model: it has no {HEAD}. Point at the output of a reward stage."
        )
    return model


def load_rounded_reward(model_dir: Path) -> Any:
    """Load a trained reward model with the matrices of its trunk in bfloat16 (``cast_frozen_to_bf16``).

    A trunk whose files are in bfloat16 is never in memory in float32.
    """
    entries = tensor_entries(model_dir)
    if {entry.dtype for name, entry in entries.items() if name != HEAD} & FLOATS == {"BF16"}:
        model = load_reward(model_dir, torch.bfloat16).requires_grad_(False)
        widen_vectors(model)
        for parameter in model.parameters():
            if parameter.dim() == 3:  # experts, which autocast does not reach
                parameter.data = parameter.data.float()
        # The head, in full.
        file = next(file for file in weight_files(model_dir) if HEAD in read_header(file))
        with safe_open(file, framework="pt") as tensors:
            model.score.weight.data = tensors.get_tensor(HEAD).float()
        return model
    model = load_reward(model_dir).requires_grad_(False)
    round_reward(model)
    return model


def round_reward(model: PreTrainedModel) -> None:
    """Keep the matrices of a frozen reward model's trunk in bfloat16, in place."""
    cast_frozen_to_bf16(getattr(model, model.base_model_prefix))
    # The head still belongs to the memory-mapped file, which would stay in memory as a whole.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def new_reward(model_dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load a reward model to train: the trunk of a causal checkpoint with a new score head.

    The head starts at zero, so all first scores are 0 and the first loss is log 2. N(0, 1/(d+1)), as in arXiv
    2403.17031 (detail 4), suits features of unit size; SmolLM2's are larger, and the first steps only undid the wide
    scores. A head that the checkpoint already has is kept.
    """
    model, missing = _load("classifier", model_dir, dtype, may_lack={HEAD}, **SCORING)
    if missing:
        model.score.weight.data.zero_()
    return model


def _load(
    task: Task, model_dir: Path, dtype: torch.dtype, may_lack: Collection[str] = (), **options: Any
) -> tuple[Any, set[str]]:
    """Return the model and the names of ``may_lack`` that the checkpoint lacks.

    Any other missing tensor is an error.
    """
    model, missing = open_model(task, model_dir, dtype, may_lack=may_lack, **options)
    # transformers finds the last real token of a sequence by the pad token.
    pad = getattr(model.config, "pad_token_id", None)
    if "num_labels" in options and pad is None:
        raise UserError(f"{model_dir}/config.json names no pad token, so the last token of a batch cannot be found.")
    return load_adapter(model, model_dir).eval(), missing
