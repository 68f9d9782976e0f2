"""Checkpoints of the store: loading tokenizers, policies and reward models.

Only safetensors are read, and no code that comes with a model is run. Left out: models from outside
(``conversion.py``), and making them trainable and saving them (``tuning/apply.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from align.errors import UserError
from align.models.render import require_chat_template

HEAD = "score.weight"

SCORING: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
"""What a reward model's config says: it gives one number, taken as it is. vLLM would put it through a sigmoid."""


def load_tokenizer(model_dir: Path, tuning: Any = None) -> Any:
    """The tokenizer of a checkpoint; for a stage that trains it by ``tuning``, with the virtual tokens that this adds.

    Raises ``UserError`` when it has no chat template, no end token, or pads with its end token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    require_chat_template(tokenizer, f"the tokenizer in {model_dir}")
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise UserError(
            f"the tokenizer in {model_dir} has eos {tokenizer.eos_token!r} and pad {tokenizer.pad_token!r}; both are "
            "needed and must differ, or the end of a turn is never learned. Bring the model in through a model stage."
        )
    if tuning is not None:
        from align.models.tuning.stored import tokenizer_for

        return tokenizer_for(tokenizer, model_dir, tuning)
    return tokenizer


def load_policy(model_dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model of a checkpoint, on the CPU, in eval mode.

    Train in float32 whatever the stage's precision: that is the type of the matrix products (``precision.py``).
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, model_dir, dtype)[0]


def load_reward(model_dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A trained reward model: one score per sequence, read at its last token that is no padding.

    Raises ``UserError`` when the checkpoint lacks its score head: transformers would put a random one there.
    """
    from transformers import AutoModelForSequenceClassification

    model, missing = _load(AutoModelForSequenceClassification, model_dir, dtype, **SCORING)
    if missing:
        raise UserError(
            f"{model_dir} is not a trained reward model: it has no {', '.join(sorted(missing))}. "
            "Point at the output of a reward stage."
        )
    return model


def new_reward(model_dir: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A reward model to train, made from a causal checkpoint: its trunk, and a new score head.

    The head starts at zero, so all first scores are 0 and the first loss is log 2. N(0, 1/(d+1)), as in arXiv
    2403.17031 (detail 4), suits features of unit size; SmolLM2's are larger, and the first steps went into taking wide
    scores back. A head that the checkpoint already has is kept.
    """
    from transformers import AutoModelForSequenceClassification

    model, missing = _load(AutoModelForSequenceClassification, model_dir, dtype, **SCORING)
    if missing - {HEAD}:
        raise UserError(f"{model_dir} lacks the weights {', '.join(sorted(missing - {HEAD}))}; it is damaged.")
    if missing:
        model.score.weight.data.zero_()
    return model


def _load(model_class: Any, model_dir: Path, dtype: torch.dtype, **options: Any) -> tuple[Any, set[str]]:
    """Load, and say which weights the checkpoint lacked. A causal model that lacks any is an error here."""
    rng = torch.get_rng_state()  # transformers draws a head's first values from the caller's randomness
    model, info = model_class.from_pretrained(
        model_dir, use_safetensors=True, dtype=dtype, output_loading_info=True, **options
    )
    torch.set_rng_state(rng)
    missing = set(info["missing_keys"])
    if missing and "num_labels" not in options:
        raise UserError(
            f"{model_dir} lacks the weights {', '.join(sorted(missing)[:3])}; it is damaged or not a policy."
        )
    pad = getattr(model.config, "pad_token_id", None)
    if "num_labels" in options and pad is None:
        raise UserError(f"{model_dir}/config.json names no pad token, so the last token of a batch cannot be found.")
    from align.models.tuning.stored import attach  # here, because that package loads models too

    return attach(model, model_dir).eval(), missing
