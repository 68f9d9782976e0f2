"""One engine for several checkpoints: opened for the first, then loaded with the weights of the next. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from align.inference.protocol import RolloutEngine
from align.store.fingerprint import digest

VOLATILE_FIELDS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
"""Fields of ``config.json`` that do not affect which weights fit."""


class SwitchingEngine:
    """The rollout engine of this process, with the weights of the checkpoint in use."""

    def __init__(self, open_checkpoint: Callable[[Path], RolloutEngine]) -> None:
        """Set up without an engine; ``open_checkpoint`` opens one on a model folder."""
        self._open_checkpoint = open_checkpoint
        self._engine: RolloutEngine | None = None
        self._architecture = ""
        self._loaded = Path()

    def with_weights(self, model_dir: Path) -> RolloutEngine:
        """Return the engine with the weights of a checkpoint; another architecture needs another engine."""
        required = architecture(model_dir)
        if self._engine is not None and required == self._architecture:
            # Only the weights are replaced, which spares the engine's start.
            if self._loaded != model_dir:
                # Imported late, because it imports torch.
                from align.inference.weights import checkpoint_weights

                self._engine.load_weights(checkpoint_weights(model_dir))
        else:
            # A process can hold only one vLLM engine.
            self.close()
            self._engine = self._open_checkpoint(model_dir)
            self._architecture = required
        self._loaded = model_dir
        return self._engine

    def close(self) -> None:
        """Free the engine, before other models are loaded."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def architecture(model_dir: Path) -> str:
    """Return a digest of shapes and end tokens; an engine can load another checkpoint's weights if it is equal."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    generation = model_dir / "generation_config.json"
    ends = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id") if generation.is_file() else None
    # Fields that a save rewrites without any effect on shapes must not force a new engine.
    shapes = {key: value for key, value in config.items() if key not in VOLATILE_FIELDS}
    # An adapter that is stored next to the weights (align.models.tuning.stored) is part of the architecture.
    adapter = model_dir / "adapter" / "adapter.json"
    inserted = {"adapter": adapter.read_text(encoding="utf-8")} if adapter.is_file() else {}
    return digest({"shapes": json.dumps(shapes, sort_keys=True), "ends": json.dumps(ends)} | inserted)


def max_positions(model_dir: Path) -> int | None:
    """Return the longest sequence of a checkpoint in tokens, or None if its ``config.json`` does not say."""
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    limit = config.get("max_position_embeddings")
    return limit if isinstance(limit, int) and limit > 0 else None
