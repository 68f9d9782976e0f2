"""Kinds of stages that make weights."""

from __future__ import annotations

from align.pipeline.registry import STAGES
from align.store.artifacts import Kind

TRAINED = [kind for kind, stage in STAGES.items() if stage.makes in (Kind.POLICY, Kind.REWARD)]
"""Kinds with a ``tuning`` and a ``trainer`` block."""
METHODS = [*TRAINED, "merge"]
"""Every kind that makes a policy or a reward model."""
