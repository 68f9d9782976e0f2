"""Stage ``synthesize``: instructions, responses, best answers or preference pairs from a model, here or by HTTP."""

from __future__ import annotations

from typing import Any

from align.pipeline.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Ask, choose, and write ``train.parquet``, ``test.parquet``, ``samples.jsonl``, ``dropped.jsonl`` and
    ``ledger.json``; of pairs ``ties.parquet`` too. Returns counts, tokens and cost.
    """
    from align.synthesis.run import synthesize

    metrics: dict[str, Any] = synthesize(context)
    return metrics
