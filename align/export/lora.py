"""Export a LoRA adapter as peft and vLLM load it, and check that vLLM can add an adapter to its base.

A stage that trains by LoRA saves the merged model, and the bare adapter next to it in ``adapter/``
(``align.models.tuning``). The adapter is copied as it is; its config then names the base instead of a path.
Torch-free.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.export.export import Source, read_json
from align.models.checkpoints.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_header
from align.models.checkpoints.folder_checks import check_adapter
from align.store.json_files import write_atomically

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's ``--max-lora-rank`` (0.31)."""
TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Type in a safetensors header → its name in transformers."""
REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole matrices that it replaces (modules_to_save)",
    "rank_pattern": "ranks that differ between layers",
    "alpha_pattern": "scales that differ between layers",
    "layer_replication": "layers that are repeated",
    "trainable_token_indices": "rows of the embedding",
    "target_parameters": "adapters of expert tensors",
    "lora_bias": "biases",
}
"""Field of an adapter's config → its meaning, which vLLM does not load."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that vLLM loads."""

    folder: Path
    rank: int
    parameters: int
    dtype: str


def bare_adapter(source: Source) -> Path | None:
    """Return the folder of a checkpoint's adapter: the adapter itself, or ``adapter/`` next to the merged model."""
    if source.adapter is not None:
        return source.adapter
    folder = source.folder.resolve().parent / "adapter"
    return folder if (folder / ADAPTER_CONFIG).is_file() else None


def require_adapter(source: Source) -> Adapter:
    """Return the adapter of a checkpoint. Raises ``UserError`` if it has none, or none that vLLM loads."""
    folder = bare_adapter(source)
    if folder is None:
        raise UserError(
            f"{source.folder}: --format lora is for checkpoints that were trained by LoRA, and there is no adapter "
            "next to this model. Its weights cannot be separated into a base and an adapter. Use --format transformers."
        )
    return check_lora(folder)


def check_lora(folder: Path) -> Adapter:
    """Return the adapter in a folder. Raises ``UserError`` for an adapter that is damaged, or that vLLM cannot load."""
    check_adapter(folder)
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{folder}: is an adapter of type {config.get('peft_type')}, and vLLM loads LoRA only. Merge it into its "
            "base: --format transformers."
        )
    reason = next((text for name, text in REFUSED.items() if config.get(name)), None)
    if config.get("bias") not in (None, "none"):
        reason = REFUSED["lora_bias"]
    entries = read_header(folder / ADAPTER_WEIGHTS)
    if reason is None and any("embed_tokens" in name or "lm_head" in name for name in entries):
        reason = "adapters of the embedding or the head"
    if reason is not None:
        raise UserError(f"{folder}: has {reason}, which vLLM does not load. Merge it: --format transformers.")
    rank = int(config.get("r") or 0)
    if not 0 < rank <= RANKS[-1]:
        raise UserError(f"{folder}: has rank {rank}, and vLLM loads adapters of rank 1 to {RANKS[-1]}.")
    count = sum(math.prod(entry.shape) for entry in entries.values())
    dtypes = {TYPES.get(entry.dtype, entry.dtype) for entry in entries.values()}
    return Adapter(folder, rank, count, " and ".join(sorted(dtypes)))


def allowed_rank(rank: int) -> int:
    """Return the smallest of vLLM's ranks that holds an adapter of a rank."""
    return next(value for value in RANKS if value >= rank)


def write_lora(adapter: Adapter, out: Path, base_name: str) -> None:
    """Write the adapter to a new folder ``out``; its config names ``base_name`` as its base."""
    out.mkdir(parents=True)
    config: dict[str, Any] = read_json(adapter.folder / ADAPTER_CONFIG)
    # The path of the base on this machine helps no reader.
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    write_atomically(out / ADAPTER_CONFIG, config)
    shutil.copyfile(adapter.folder / ADAPTER_WEIGHTS, out / ADAPTER_WEIGHTS)
