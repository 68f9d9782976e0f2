"""Stored rollouts for tests: as rows, and written from a few fields."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from align.store.rollout_writer import RolloutFiles
from align.store.rollouts import SCHEMA, SETTINGS_KEY, make_table, open_rollouts, rollout_rows


def stored_rows(folder: Path) -> list[dict[str, Any]]:
    """Return all rows of a folder of rollouts."""
    return list(rollout_rows(open_rollouts(folder)))


def write_lines(folder: Path, lines: Sequence[dict[str, Any]]) -> Path:
    """Write lines of the report page (``align.report.scorecard.stored_rollouts``) as stored rollouts into a folder."""
    files = RolloutFiles(folder.parent, 10**9, {}, print)
    files.write(make_table([_row(line) for line in lines]), folder.name)
    return folder


def update_table(update: int, text: str = "answer") -> pa.Table:
    """Return four rows of an update."""
    rows = [
        {"update": update, "index": index, "prompt": [{"role": "user", "content": "q"}], "response": f"{text} {update}",
         "score": index / 4, "scores": {"form": 0.5}, "token_ids": [1, 2], "logprobs": [-0.5, -0.25]}
        for index in range(4)
    ]  # fmt: skip
    return make_table(rows)


def write_rollouts(table: pa.Table, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a file under a name of its own, which no manifest lists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({SETTINGS_KEY: json.dumps(settings)}), path)


def _row(line: dict[str, Any]) -> dict[str, Any]:
    row = {name: value for name, value in line.items() if name in SCHEMA.names}
    row["scores"] = {name[6:]: value for name, value in line.items() if name.startswith("score_")}
    if "sampled" in line:
        row["response_mask"] = line["sampled"]
    if "by_token" in line:
        texts, kl, values, advantages = zip(*line["by_token"], strict=True)
        row |= {"token_texts": texts, "token_kl": kl, "values": values, "raw_advantages": advantages}
    return row
