"""SFT trainers and stages on a few rows of the tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl.trainer.sft_config import SFTConfig

from align.config.stages.sft import SftConfig
from align.models.loading import load_policy, load_tokenizer
from align.pipeline.context import StageContext
from align.store.artifacts import Kind
from align.training.arguments import training_arguments
from align.training.fused_head import use_blockwise_head
from align.training.rows import encode_supervised
from align.training.trainers import PreparedSFT
from tests.support.training.harness import context, data_artifact, rows


def make_sft_trainer(root: Path, model: Path, **fields: Any) -> tuple[PreparedSFT, StageContext, Any]:
    """Return a trainer on 16 rows, its context and the encoded rows."""
    config = SftConfig(
        model="model", data="data", **{"learning_rate": 1e-3, "batch_size": 4, "max_length": 128, **fields}
    )
    stage = context(root, config, model, data_artifact(root / "data", Kind.INSTRUCTIONS))
    tokenizer = load_tokenizer(model)
    encoded = encode_supervised(tokenizer, rows(16), 128)
    use_blockwise_head()
    trainer = PreparedSFT(
        model=load_policy(model),
        args=training_arguments(SFTConfig, stage, len(encoded.rows)),
        train_dataset=Dataset.from_list(encoded.rows),
        processing_class=tokenizer,
    )
    trainer.row_lengths = encoded.lengths
    return trainer, stage, encoded


def make_packing_stage(root: Path, model: Path, **fields: Any) -> StageContext:
    """Return the context of an SFT stage on 80 rows, for packing and batches without padding."""
    defaults = {"learning_rate": 3e-3, "batch_size": 4, "max_length": 128, "precision": "float32"}
    config = SftConfig(model="model", data="data", **{**defaults, **fields})
    return context(root, config, model, data_artifact(root / "data", Kind.INSTRUCTIONS, train=80))
