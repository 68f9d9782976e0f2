"""Rewards with the mistakes that people make, rows that show them, and a stage whose models do not exist."""

from __future__ import annotations

import difflib
import random
import re
from pathlib import Path
from typing import Any

from align.config.runtime import Runtime
from align.data.rows import Row, assistant, user, write_rows
from align.pipeline.context import StageContext
from align.pipeline.registry import STAGES
from align.store.artifacts import Artifact, Kind

MODULE = "tests.support.stages.broken_rewards"
ANSWERS = (7, 12, 1080, 33, 24500, 48, 91, 3200, 5, 260, 1975, 14, 640, 87, 2021, 402, 66, 119, 10400, 8, 77, 53)
_NUMBER = re.compile(r"-?\d[\d,]*")
_random = random.Random(3)


def problem_rows() -> list[Row]:
    """Word problems with solutions as in GSM8K. ``cut`` is the first digit, ``shuffled`` the next row's answer."""
    rows = []
    for index, answer in enumerate(ANSWERS):
        text = f"A farmer has {answer - 3} sheep and buys three more at fair number {index + 1}. How many has she?"
        solution = f"She has {answer - 3} + 3 = {answer:,} sheep.\n#### {answer:,}"
        row = {"id": f"r{index}", "source": "t", "prompt": [user(text)], "completion": [assistant(solution)]}
        row |= {"checks": "", "answer": str(answer), "cut": str(answer)[0], "year": str(1990 + index)}
        rows.append(row | {"shuffled": str(ANSWERS[(index + 1) % len(ANSWERS)])})
    return rows


def _last_number(text: str) -> str | None:
    numbers = _NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else None


def right(row: Row, response: str, column: str = "answer") -> float:
    """Correct for ``answer``; ``shuffled`` and ``cut`` are references of a broken data set."""
    return float(_last_number(response) == row[column])


def without_separators(row: Row, response: str) -> float:
    """The parser stops at the comma of 1,080."""
    numbers = re.findall(r"\d+", response)
    return float(bool(numbers) and numbers[-1] == row["answer"])


def constant(rows: list[Row], responses: list[str]) -> list[float]:
    return [0.5 for _ in responses]


def by_prompt(rows: list[Row], responses: list[str]) -> list[float]:
    """Ignores the answer."""
    return [len(row["prompt"][-1]["content"]) / 100 for row in rows]


def fails_at_nothing(row: Row, response: str) -> float:
    """The last word, of which an empty answer has none."""
    return float(response.split()[-1].replace(",", "") == row["answer"])


def drawn(row: Row, response: str) -> float:
    """Right answers score more, with noise."""
    return right(row, response) + _random.random()


def copied(row: Row, response: str) -> float:
    """Similarity to the prompt."""
    return difflib.SequenceMatcher(None, response, row["prompt"][-1]["content"]).ratio()


def brief(rows: list[Row], responses: list[str]) -> list[float]:
    return [1.0 / (1.0 + len(text)) for text in responses]


def vowels(rows: list[Row], responses: list[str]) -> list[float]:
    """A style, which depends on no row."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in responses]


def make_stage_without_models(kind: str, root: Path, score: Any, **fields: Any) -> StageContext:
    """A context of ``kind`` whose policy is an empty folder: a stage that loads a model fails in another way."""
    settings: dict[str, Any] = {"policy": "policy", "prompts": "prompts", "score": score, "precision": "float32"}
    if kind != "sample":
        settings |= {"learning_rate": 1e-3, "updates": 1, "rollout_batch": 32}
    config = STAGES[kind].config_class()(**settings | fields)
    for name in ("output", "checkpoints", "data", "policy"):
        (root / name).mkdir(parents=True)
    write_rows(root / "data" / "train.parquet", problem_rows())
    write_rows(root / "data" / "test.parquet", problem_rows()[:3])
    inputs: dict[str, Any] = {
        "policy": Artifact("policy", Kind.POLICY, root / "policy", {}),
        "prompts": Artifact("prompts", Kind.INSTRUCTIONS, root / "data", {}),
        "ptx": None,
        "reward": None,
    }
    runtime = Runtime.model_validate({"device": "cpu", "engine": {"name": "transformers"}, "threads": 1})
    return StageContext(kind, config, inputs, 5, runtime, root / "output", root / "checkpoints", root / "events.jsonl")
