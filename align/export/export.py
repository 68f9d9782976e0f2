"""One ordinary transformers folder of a checkpoint: an adapter merged onto its base, safetensors, tokenizer, template.

The adapter is added in float32 by peft, once, onto a base that nobody uses afterwards; then the weights take the type
they are written in. Left out: whether the folder answers as the checkpoint did (``align.export.verify``),
quantized weights, and adapters that are no change of weights (prefix tuning, sequential bottlenecks, LLaMA-Adapter).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.models.folder_checks import check_adapter, check_folder

ADAPTER = "adapter_config.json"
STORED = Path("adapter", "adapter.json")
"""In a model folder, what describes an adapter of our own (``align.models.tuning.stored``)."""
SHARD = "5GB"
"""Largest file of weights; a larger model is split, with an index."""


@dataclass(frozen=True)
class Source:
    """What is exported: a model folder, and an adapter's folder that is merged onto it, if any."""

    folder: Path
    adapter: Path | None = None

    def is_reward(self) -> bool:
        """Whether it scores rather than writes: a sequence classifier."""
        if self.adapter is not None:
            return str(read_json(self.adapter / ADAPTER).get("task_type")) == "SEQ_CLS"
        kinds = read_json(self.folder / "config.json").get("architectures") or []
        return any(str(kind).endswith("ForSequenceClassification") for kind in kinds)

    @property
    def tokenizer_folder(self) -> Path:
        """Where its tokenizer is: with the adapter, if that brings one."""
        own = self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file()
        return self.adapter if own and self.adapter is not None else self.folder


@dataclass(frozen=True)
class Written:
    """What was written."""

    is_reward: bool
    dtype: str
    parameters: int
    architecture: str
    files: dict[str, int]
    """Bytes by name."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ``UserError`` for one that is missing or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected an object, found {type(found).__name__}.")
    return found


def check_source(source: Source) -> None:
    """Raise ``UserError`` for pickled or quantized weights and for code that comes with a model. Imports no torch."""
    check_folder(source.folder)
    if source.adapter is not None:
        check_adapter(source.adapter)
    stored = source.folder / STORED
    if stored.is_file():
        method = (read_json(stored).get("tuning") or {}).get("method")
        raise UserError(
            f"{source.folder}: its adapter of tuning {method} is no change of weights, so no ordinary folder can hold "
            "it, and elsewhere the weights alone would answer as before the training. Use the checkpoint here, or "
            "train with a tuning that is folded: lora, prompt, p_tuning, or adapters with position parallel."
        )
    config = read_json(source.folder / "config.json")
    if "auto_map" in config:
        raise UserError(
            f"{source.folder}/config.json names Python code that comes with the model, which is not run here; bring "
            "the model in through a model stage."
        )


def load_source(source: Source, dtype: str = "float32") -> Any:
    """The model on the CPU, in eval mode, of type ``dtype``; an adapter is merged in float32 before.

    Raises ``UserError`` for weights that are missing or do not fit, and for an adapter that cannot be merged.
    """
    import torch

    from align.models.loading import load_policy, load_reward, new_reward

    wanted = getattr(torch, dtype)
    if source.adapter is None:
        return (load_reward if source.is_reward() else load_policy)(source.folder, wanted)
    base = (new_reward if source.is_reward() else load_policy)(source.folder)
    return attach(base, source.adapter, merge=True).to(wanted)


def attach(base: Any, adapter: Path, merge: bool) -> Any:
    """``base`` with the adapter of a folder, merged or beside it; ``base`` itself is changed by it."""
    from align.models.pretrained import adapter_config, attach_adapter

    kind = adapter_config(adapter).peft_type
    try:
        model, warned = attach_adapter(base, adapter)
    except (ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()
        detail = next((line.strip() for line in reversed(first) if line.strip()), type(error).__name__)
        raise UserError(f"{adapter}: does not fit this base: {detail.rstrip('.')}. Name its own with --base.") from None
    missing = [text.splitlines()[0] for text in warned if "missing adapter keys" in text]
    if missing:
        raise UserError(f"{adapter}: {missing[0][:300]} The file is damaged, or belongs to another base; see --base.")
    if not hasattr(model, "merge_and_unload") or model.active_peft_config.is_prompt_learning:
        raise UserError(
            f"{adapter}: {str(kind).rpartition('.')[2]} is no change of weights, so it cannot be merged; use the "
            "adapter beside its base."
        )
    if merge:
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise UserError(f"{adapter}: cannot be merged: {error}.") from None
    return model.eval()


def export(source: Source, out: Path, dtype: str | None = None, shard: str = SHARD) -> Written:
    """Write ``source`` to the folder ``out``; ``dtype`` is float32, bfloat16 or None for the type of its weights.

    Raises ``UserError`` for whatever :func:`check_source` and :func:`load_source` refuse, and for weights that are not
    finite.
    """
    from align.models.conversion import require_sane
    from align.models.loading import load_tokenizer
    from align.models.steps import Steps

    check_source(source)
    tokenizer = load_tokenizer(source.tokenizer_folder)
    chosen = dtype or stored_type(source.folder)
    model = load_source(source, chosen)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{source.tokenizer_folder}: its tokenizer has {len(tokenizer)} tokens and {source.folder} embeds {rows}; "
            "the adapter was trained on a base with added tokens. Name that one with --base."
        )
    require_sane(model, source.folder)
    for config in (model.config, getattr(model, "generation_config", None)):
        if config is not None:
            _state_ends(config, tokenizer)
    model.save_pretrained(out, max_shard_size=shard)
    tokenizer.save_pretrained(out)
    steps = Steps.read(source.folder)
    if steps is not None:  # without them a process reward model would be read as one of whole answers
        steps.write(out)
    return Written(
        is_reward=source.is_reward(),
        dtype=chosen,
        parameters=sum(weight.numel() for weight in model.parameters()),
        architecture=type(model).__name__,
        files={file.name: file.stat().st_size for file in sorted(out.iterdir()) if file.is_file()},
    )


def _state_ends(config: Any, tokenizer: Any) -> None:
    """Have a config name the tokenizer's end and padding tokens; further ends that it names stay."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id


def stored_type(folder: Path) -> str:
    """The type that a model folder's weights have; float32 where its config does not say or says a rare one."""
    config = read_json(folder / "config.json")
    found = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return found if found in ("float32", "bfloat16", "float16") else "float32"


def round_weights(model: Any, dtype: str) -> Any:
    """``model``, its weights rounded to ``dtype`` and still of their own type: what a written file of it holds.

    ``model.to`` would round what is no weight, too: a rotary embedding's frequencies, which moves log-probabilities by
    thousandths.
    """
    import torch

    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(getattr(torch, dtype)))
    return model
