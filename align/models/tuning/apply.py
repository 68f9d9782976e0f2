"""The four things a stage does with its ``tuning``: load a model for it, apply it, refer to the start, save the result.

Each family of methods has a module of its own beside this one; here is only which.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from align.config.tuning import FullTuning, Ia3Tuning, LoraTuning, PeftTuning, QloraTuning, TuningBase, VirtualTokens
from align.models.freezing import freeze
from align.models.loading import load_policy, load_tokenizer, new_reward
from align.models.malloc import give_back
from align.models.merging import merged_weights
from align.models.tuning import stored, virtual_tokens
from align.models.tuning.inserted import plain_save
from align.models.tuning.lora import START, at_start, save_adapter


def load_for_tuning(source: Path, tuning: TuningBase, *, reward: bool = False) -> Any:
    """The checkpoint in ``source`` as ``tuning`` trains it: a policy, or a reward model with a new score head.

    float32 on the CPU, whatever the stage's precision (``align.models.precision``); in 4 bits for ``qlora``.
    """
    model = new_reward(source) if reward else load_policy(source)
    if isinstance(tuning, QloraTuning):
        from align.models.tuning.quantized import quantize

        quantize(model, tuning)
    if isinstance(tuning, VirtualTokens) and not stored.is_stored(source):
        new = stored.tokenizer_for(load_tokenizer(source), source, tuning)
        virtual_tokens.make_room(model, new.new_virtual_tokens)
    return model


def apply_tuning(
    model: Any,
    tuning: TuningBase,
    seed: int,
    *,
    tokenizer: Any = None,
    warn: Callable[[str], object] = print,
    rows: Sequence[Sequence[int]] | None = None,
) -> Any:
    """``model`` made ready to be trained by ``tuning``; what is drawn at random is drawn from ``seed``.

    ``tokenizer`` is for methods that add tokens, ``rows`` (token ids of training rows) for those that look at data.
    The caller's randomness is untouched.
    """
    stored.require_same(model, tuning)
    if isinstance(tuning, stored.Inserted):
        return stored.apply(model, tuning, seed, tokenizer)
    if isinstance(tuning, FullTuning):
        freeze(model, tuning.freeze)
        return model
    if isinstance(tuning, LoraTuning):
        from align.models.tuning import lora

        return lora.wrap(model, tuning, seed, rows)
    if isinstance(tuning, QloraTuning):
        from align.models.tuning import quantized

        return quantized.wrap(model, tuning, seed, rows)
    if isinstance(tuning, (Ia3Tuning, PeftTuning)):
        from align.models.tuning import peft_method

        return peft_method.wrap(model, tuning, seed)
    raise TypeError(f"nothing here applies {type(tuning).__name__}")


@contextlib.contextmanager
def initial_policy(model: Any) -> Iterator[Any]:
    """``model`` as it came in, before anything was learned: what DPO and PPO call the reference.

    Adapters are switched off, or put back where they started if that was part of the model. A model that trains its own
    weights has no such thing inside it; for one, its weights as they are now.
    """
    if hasattr(model, START):
        with at_start(model):
            yield model
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield model
    else:
        yield model


def save_tuned(model: Any, tokenizer: Any, out_dir: Path) -> None:
    """Write ``model`` (a policy or a reward model) to ``out_dir`` as an ordinary folder, adapters merged in float32.

    The live model is left as it is. With adapters, the bare adapter goes to ``adapter/`` beside ``out_dir``; one that
    no ordinary weights can hold goes into ``out_dir`` (``stored.py``).
    """
    from peft import PeftModel

    give_back()
    plain = model
    if isinstance(model, PeftModel):
        save_adapter(model, out_dir.parent / "adapter")
        plain = model.get_base_model()
    weights = {name: tensor.detach() for name, tensor in merged_weights(model)}
    config = plain.config
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation = getattr(plain, "generation_config", None)
    if generation is not None:
        generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    weights, changes = stored.settle(plain, weights, tokenizer, out_dir)
    with stored.config_with(config, changes):
        plain_save(plain, out_dir, weights)
    tokenizer.save_pretrained(out_dir)
