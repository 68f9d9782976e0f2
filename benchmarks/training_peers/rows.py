"""Rows of a work: read from LLaMA-Factory's demo files, chosen so that nobody cuts or drops one, written for each side.

A row is one user turn and one answer (SFT, KTO) or two (pairs). Only rows whose every sequence fits the work's
``max_length`` are taken, in the order of the file. The expected tokens are those of the rendered conversations, padding
left out; a pair counts its prompt twice, once for each answer. Torch-free.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.errors import UserError
from benchmarks.training_peers.works import Kind, Work

Row = dict[str, Any]
Count = Callable[[list[dict[str, str]]], int]
"""Tokens of a conversation."""

FILES: dict[Kind, str] = {
    "sft": "alpaca_en_demo.json",
    "reward": "dpo_en_demo.json",
    "dpo": "dpo_en_demo.json",
    "kto": "kto_en_demo.json",
}


def data_folder() -> Path:
    """Return the folder of the demo files below ``$ALIGN_DATA``. Raises ``UserError`` where there is none."""
    root = os.environ.get("ALIGN_DATA")
    folder = Path(root or ".") / "llamafactory-demo"
    if root is None or not folder.is_dir():
        raise UserError(
            f"{folder} is no folder: set ALIGN_DATA to a folder with llamafactory-demo/, which holds "
            f"{', '.join(sorted(set(FILES.values())))} of the LLaMA-Factory repository (data/), or name it with --data."
        )
    return folder


def read_rows(kind: Kind, folder: Path) -> list[Row]:
    """Return the rows of a kind: ``prompt`` with ``completion``, ``chosen`` and ``rejected``, or a ``label``."""
    records = json.loads((folder / FILES[kind]).read_text(encoding="utf-8"))
    convert = {"sft": _of_alpaca, "reward": _of_pair, "dpo": _of_pair, "kto": _of_labeled}[kind]
    return [row for row in map(convert, records) if row is not None]


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _assistant(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def _of_alpaca(record: Row) -> Row | None:
    prompt = "\n".join(part for part in (record["instruction"], record["input"]) if part)
    return {"prompt": _user(prompt), "completion": _assistant(record["output"])} if record["output"] else None


def _of_pair(record: Row) -> Row | None:
    turns = record["conversations"]
    if len(turns) != 1 or turns[0]["from"] != "human":
        return None
    answers = {side: _assistant(record[side]["value"]) for side in ("chosen", "rejected")}
    return {"prompt": _user(turns[0]["value"]), **answers} if answers["chosen"] != answers["rejected"] else None


def _of_labeled(record: Row) -> Row | None:
    turns = record["messages"]
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        return None
    prompt, completion = (turn["content"] for turn in turns)
    return {"prompt": _user(prompt), "completion": _assistant(completion), "label": bool(record["label"])}


def conversations(row: Row) -> list[list[dict[str, str]]]:
    """Return the sequences that a model reads of a row: one, or two of a pair."""
    return [row["prompt"] + row[side] for side in ("completion", "chosen", "rejected") if side in row]


def choose_rows(rows: list[Row], work: Work, number: int, count: Count) -> tuple[list[Row], int]:
    """Return the first ``number`` rows that fit, and their tokens. Raises ``UserError`` where there are fewer.

    A prompt is taken once, and as many labels of each kind: align would merge equal prompts into one group, and KTO
    with one label only is another loss.
    """
    chosen: list[Row] = []
    prompts: set[str] = set()
    labels = {True: 0, False: 0}
    total = 0
    for row in rows:
        if len(chosen) == number:
            break
        lengths = [count(conversation) for conversation in conversations(row)]
        text = row["prompt"][0]["content"]
        if max(lengths) > work.max_length or text in prompts:
            continue
        if "label" in row:
            if labels[row["label"]] >= (number + 1) // 2:
                continue
            labels[row["label"]] += 1
        prompts.add(text)
        chosen.append(row)
        total += sum(lengths)
    if len(chosen) < number:
        raise UserError(f"{work.name}: {len(chosen)} rows fit {work.max_length} tokens; ask for at most these (--rows)")
    return chosen, total


def write_rows(rows: list[Row], kind: Kind, folder: Path) -> None:
    """Write ``train.jsonl`` in trl's columns, which align reads too, and ``dataset_info.json`` for LLaMA-Factory."""
    trl, factory = folder / "rows", folder / "llamafactory"
    trl.mkdir(parents=True)
    factory.mkdir()
    _write_lines(trl / "train.jsonl", rows)
    _write_lines(factory / "train.jsonl", [_for_llamafactory(row) for row in rows])
    info = json.dumps({"train": _dataset_info(kind)}, indent=1)
    (factory / "dataset_info.json").write_text(info + "\n", encoding="utf-8")


def _write_lines(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _for_llamafactory(row: Row) -> Row:
    """Return a row as sharegpt messages; a pair's answers are single messages."""
    if "chosen" in row:
        return {"messages": row["prompt"], "chosen": row["chosen"][0], "rejected": row["rejected"][0]}
    labels = {"label": row["label"]} if "label" in row else {}
    return {"messages": row["prompt"] + row["completion"], **labels}


def _dataset_info(kind: Kind) -> dict[str, Any]:
    columns = {"messages": "messages"}
    info: dict[str, Any] = {"file_name": "train.jsonl", "formatting": "sharegpt", "columns": columns}
    if kind in ("reward", "dpo"):
        info["ranking"] = True
        columns |= {"chosen": "chosen", "rejected": "rejected"}
    elif kind == "kto":
        columns["kto_tag"] = "label"
    info["tags"] = {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    }
    return info
