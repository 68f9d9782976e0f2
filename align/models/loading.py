"""Checkpoints of the store: loading policies and reward models, adding LoRA, saving with LoRA merged.

Only safetensors are read, and no code that comes with a model is run. Left out: models from outside
(``conversion.py``) and merging itself (``merging.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from align.errors import UserError
from align.models.merging import merged_weights
from align.models.render import require_chat_template
from align.tuning import FullTuning, LoraTuning

HEAD = "score.weight"


def load_tokenizer(model_dir: Path) -> Any:
    """The tokenizer of a checkpoint.

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

    model, missing = _load(AutoModelForSequenceClassification, model_dir, dtype, num_labels=1)
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

    model, missing = _load(AutoModelForSequenceClassification, model_dir, dtype, num_labels=1)
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
    return model.eval(), missing


def add_lora(model: Any, tuning: LoraTuning | FullTuning, seed: int) -> Any:
    """Wrap ``model`` in LoRA adapters drawn from ``seed``, or return it as it is for full tuning.

    A reward model's score head is trained in full and saved with the adapters. The caller's randomness is untouched.
    """
    if isinstance(tuning, FullTuning):
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    classifier = hasattr(model, "score")
    config = LoraConfig(
        r=tuning.rank,
        lora_alpha=tuning.alpha,  # type: ignore[arg-type]  # peft divides it, so a fraction is fine
        lora_dropout=tuning.dropout,
        target_modules=tuning.targets,
        task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        modules_to_save=["score"] if classifier else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"tuning.targets: {tuning.targets} fits no module of this model: {error}") from None


def save_policy(model: Any, tokenizer: Any, out_dir: Path) -> None:
    """Write ``model`` (a policy or a reward model) to ``out_dir`` as an ordinary folder, LoRA merged in float32.

    The live model is left as it is. With LoRA, the bare adapter goes to ``adapter/`` beside ``out_dir``.
    """
    from peft import PeftModel

    plain = model
    if isinstance(model, PeftModel):
        model.save_pretrained(str(out_dir.parent / "adapter"), safe_serialization=True)
        plain = model.get_base_model()
    weights = {name: tensor.detach() for name, tensor in merged_weights(model)}
    config = plain.config
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation = getattr(plain, "generation_config", None)
    if generation is not None:
        generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    plain.save_pretrained(out_dir, state_dict=weights, is_main_process=True)
    tokenizer.save_pretrained(out_dir)
