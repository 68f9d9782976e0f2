"""Stored rollouts for tests: as rows, and written from a few fields."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.store.rollouts import SCHEMA, RolloutFiles, make_table, open_rollouts, rollout_rows


def stored_rows(folder: Path) -> list[dict[str, Any]]:
    """Return all rows of a folder of rollouts."""
    return list(rollout_rows(open_rollouts(folder)))


def write_lines(folder: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """Write lines of the report page (``align.report.scorecard.stored_rollouts``) as stored rollouts into a folder."""
    files = RolloutFiles(folder.parent, 10**9, {}, print)
    files.write(make_table([_row(line) for line in lines]), folder.name)
    return folder


def _row(line: dict[str, Any]) -> dict[str, Any]:
    row = {name: value for name, value in line.items() if name in SCHEMA.names}
    row["scores"] = {name[6:]: value for name, value in line.items() if name.startswith("score_")}
    if "sampled" in line:
        row["response_mask"] = line["sampled"]
    if "by_token" in line:
        texts, kl, values, advantages = zip(*line["by_token"], strict=True)
        row |= {"token_texts": texts, "token_kl": kl, "values": values, "raw_advantages": advantages}
    return row
