"""Stage ``synthesize``: instructions, responses, best answers or pairs from a local model or an HTTP endpoint."""

from __future__ import annotations

from typing import Any

from align.pipeline.context import StageContext


def run(context: StageContext) -> dict[str, Any]:
    """Generate and select rows; return counts, tokens and cost.

    Writes ``train.parquet``, ``test.parquet``, ``samples.jsonl``, ``dropped.jsonl``, ``ledger.json``, and
    ``ties.parquet`` for pairs.
    """
    from align.synthesis.run import synthesize

    metrics: dict[str, Any] = synthesize(context)
    return metrics
