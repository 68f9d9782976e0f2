"""Kinds of artifacts: the files that a stage's folder holds once its record is written.

Torch-free. An artifact is a folder; its kind says which files a later stage may rely on. A trained checkpoint may also
have ``state/``, the trainer's state for ``continue_from``, and the artifact of a stage that samples ``rollouts/`` and
``validations/``, its responses (``align.store.rollouts``):

=================  =====================================================================================
kind               files
=================  =====================================================================================
ModelCheckpoint    ``model/``: an ordinary transformers folder (safetensors, tokenizer, chat template,
                   generation_config), loadable by transformers and vLLM
PolicyCheckpoint   the same, trained by a stage (LoRA already merged); ``adapter/`` if there is one
RewardCheckpoint   ``model/``: a ``...ForSequenceClassification`` folder with one label, its score head saved
InstructionData    ``train.parquet`` and ``test.parquet``: ``prompt`` and ``completion`` (lists of messages)
PreferenceData     the same files: ``prompt``, ``chosen``, ``rejected`` (lists of messages)
PromptData         the same files: ``prompt``
UnpairedData       the same files: ``prompt``, ``completion`` and ``label``, whether it is wanted
TextData           the same files: ``text``, a document without turns
Scorecard          ``scorecard.json`` and ``samples.jsonl``
Report             ``report.html``; ``figures/`` and ``tables/``, what it shows as files
=================  =====================================================================================
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class Kind(StrEnum):
    """Kind of an artifact."""

    MODEL = "ModelCheckpoint"
    POLICY = "PolicyCheckpoint"
    REWARD = "RewardCheckpoint"
    INSTRUCTIONS = "InstructionData"
    PREFERENCES = "PreferenceData"
    PROMPTS = "PromptData"
    UNPAIRED = "UnpairedData"
    TEXTS = "TextData"
    SCORECARD = "Scorecard"
    REPORT = "Report"


GENERATORS = (Kind.MODEL, Kind.POLICY)
"""Checkpoints that can answer a prompt."""

PROMPT_SOURCES = (Kind.PROMPTS, Kind.INSTRUCTIONS, Kind.PREFERENCES, Kind.UNPAIRED)
"""Data artifacts with a ``prompt`` column: all but plain texts."""

DATASETS = (*PROMPT_SOURCES, Kind.TEXTS)
"""Every kind of data artifact."""


@dataclass(frozen=True)
class Artifact:
    """A finished stage's folder, as a later stage sees it.

    ``stage`` is the name in the pipeline, ``record`` the parsed ``record.json``.
    """

    stage: str
    kind: Kind
    path: Path
    record: dict[str, Any]

    @property
    def key(self) -> str:
        """Key of its contents: its own, or the key of the artifact from which it was copied."""
        return original_key(self.record)

    @property
    def weights(self) -> str:
        """Digest of a checkpoint's files, which may differ between runs of one key; the key if none is recorded."""
        outputs = self.record.get("outputs") or {}
        # Training is not exactly repeatable on every device, so equal keys do not mean equal weights.
        files = [f"{name} {entry['sha256']}" for name, entry in sorted(outputs.items()) if name.startswith("model/")]
        return hashlib.sha256("\n".join(files).encode()).hexdigest() if files else self.key

    @property
    def model(self) -> Path:
        """The transformers folder of a checkpoint."""
        return self.path / "model"

    def split(self, name: str) -> Path:
        """Return the Parquet file of one split (``train`` or ``test``) of a data artifact."""
        return self.path / f"{name}.parquet"


def original_key(record: dict[str, Any]) -> str:
    """Return the key under which an artifact's files were made; stage ``artifact`` only copies them."""
    metrics = record.get("metrics") or {}
    if record.get("kind") == "artifact" and metrics.get("key"):
        return str(metrics["key"])
    return str(record["key"])


VERSION = "0.3.0"
"""The version of align, which every record holds."""
EVENTS = "events.jsonl"
"""Progress, curves, warnings: one JSON object per line."""
LOG = "log.txt"
"""Standard output and standard error of the stage's process."""
OUTPUT = "output"
"""The folder that becomes the artifact."""
CHECKPOINTS = "checkpoints"
"""The trainer's checkpoints, from which a killed stage resumes."""
