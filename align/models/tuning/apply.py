"""Load a model for a stage's ``tuning``, apply it, return to the initial policy, save the result.

This module dispatches; each family of methods has its own module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from align.config.tuning import (
    AdaptersTuning,
    FullTuning,
    Ia3Tuning,
    LoraTuning,
    PeftTuning,
    QloraTuning,
    TuningBase,
    VirtualTokens,
)
from align.models.freezing import freeze
from align.models.loading import load_policy, load_tokenizer, new_reward
from align.models.malloc import trim_malloc
from align.models.tuning import stored, token_rows, virtual_tokens
from align.models.tuning.lora import START, at_initial_values, save_adapter
from align.models.tuning.merged_weights import merged_weights
from align.models.tuning.stored import is_stored
from align.patches.transformers import save_everything


def load_for_tuning(source: Path, tuning: TuningBase, *, reward: bool = False) -> Any:
    """Load the checkpoint in ``source`` for ``tuning``: a policy, or a reward model with a new score head.

    float32 on the CPU, whatever the stage's precision (``align.models.precision``); 4 bits for ``qlora``.
    """
    model = new_reward(source) if reward else load_policy(source)
    if isinstance(tuning, QloraTuning):
        from align.models.tuning.quantized import quantize

        quantize(model, tuning)
    if isinstance(tuning, VirtualTokens) and not stored.is_stored(source):
        tokenizer = stored.tokenizer_for(load_tokenizer(source), source, tuning)
        virtual_tokens.add_embedding_rows(model, tokenizer.new_virtual_tokens)
    token_rows.note_ids(model, source, tuning)
    return model


def apply_tuning(
    model: Any,
    tuning: TuningBase,
    seed: int,
    *,
    tokenizer: Any = None,
    rows: Sequence[Sequence[int]] | None = None,
) -> Any:
    """Prepare ``model`` for training by ``tuning`` and return it; random weights come from ``seed``.

    Methods that add tokens need ``tokenizer``; methods that initialize from data need ``rows``, the token ids of
    training rows. The caller's random state is unchanged.
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
    """Inside, ``model`` is the policy before training, the reference of DPO and PPO.

    Adapters are disabled, or reset to their initial values if those were part of the model. A model that trains its own
    weights cannot go back; it stays as it is.
    """
    if hasattr(model, START):
        # Adapters that started from the weights took their part out of them, so switching them off is not enough.
        with at_initial_values(model):
            yield model
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield model
    else:
        yield model


def save_tuned(model: Any, tokenizer: Any, out_dir: Path) -> None:
    """Write ``model`` (a policy or a reward model) to ``out_dir`` as a plain folder, adapters merged in float32.

    The live model does not change. A bare adapter goes to ``adapter/`` beside ``out_dir``, and into ``out_dir`` when it
    cannot be merged (``stored.py``).
    """
    from peft import PeftModel

    # Merging needs float32 copies of matrices, one at a time, so return what training has freed.
    trim_malloc()
    plain = model
    # The bare adapter is kept beside the merged model.
    if isinstance(model, PeftModel):
        save_adapter(model, out_dir.parent / "adapter")
        plain = model.get_base_model()
    weights = {name: tensor.detach() for name, tensor in merged_weights(model)}
    config = plain.config
    # Other tools read these tokens from the configs, not from the tokenizer.
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation = getattr(plain, "generation_config", None)
    if generation is not None:
        generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    # Merging may widen or untie matrices, and the written config must say so.
    weights, changes = stored.prepare_save(plain, weights, tokenizer, out_dir)
    with stored.config_with(config, changes):
        save_everything(plain, save_directory=out_dir, state_dict=weights, is_main_process=True)
    tokenizer.save_pretrained(out_dir)


def engine_source(source: Path, tuning: Any, scratch: Path) -> Path:
    """Return a model folder whose shapes have room for everything that ``tuning`` trains in the policy ``source``.

    That is ``source`` itself where its shapes fit, else a checkpoint of the untrained adapters, written to ``scratch``.
    """
    if not isinstance(tuning, AdaptersTuning) or is_stored(source):
        return source
    if not (scratch / "config.json").is_file():
        model = apply_tuning(
            load_for_tuning(source, tuning), tuning, seed=0
        )  # the seed changes nothing: all start at 0
        save_tuned(model, load_tokenizer(source), scratch)
    return scratch
