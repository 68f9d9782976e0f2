"""Files that readers of the documents are said to have, and the pipeline that a fragment of a document is part of."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from align.models.built_in import make_tiny

Values = dict[str, Any]
ROWS = 24
RL = {"policy": "sft", "prompts": "data", "learning_rate": 1.0e-5, "score": "gsm8k_answer"}
HOST: dict[str, Values] = {
    "model": {"source": "tiny", "chat_template": "chatml-tools"},
    "data": {"recipe": "host.yaml"},
    "talks": {"stage": "data", "dataset": "chats.jsonl"},
    "preferences": {"stage": "data", "dataset": "host_pairs.jsonl"},
    "sft": {"model": "model", "data": "data", "learning_rate": 1.0e-5},
    "judge": {"stage": "model", "source": "judge", "chat_template": "chatml-tools"},
    "judge_sft": {"stage": "sft", "model": "judge", "data": "data", "learning_rate": 1.0e-5},
    "sample": {"policy": "sft", "prompts": "data", "score": "gsm8k_answer"},
    "rm": {"stage": "reward", "model": "sft", "data": "preferences", "learning_rate": 1.0e-5},
    "ppo": RL,
    "grpo": RL,
    "evaluate": {"policies": ["sft"], "reference": "sft", "prompts": "data", "score": "gsm8k_answer"},
}
"""The pipeline that a fragment of the documents is part of."""
KEPT = ("answer", "schema", "tests", "rubric", "capital", "goal", "orders", "wanted")


def host_row(number: int) -> Values:
    """A row with every column that a fragment reads."""
    first = 1 + number % 2
    total = str(first + 3)
    return {
        "prompt": f"Question {number}: {first} + 3 = ?",
        "completion": f"```python\ndef f(x):\n    return x + {number}\n```\n#### {total}",
        "checks": json.dumps({"answer": total}),
        "answer": total,
        "schema": json.dumps({"type": "integer"}),
        "tests": json.dumps([f"assert f(1) == {number + 1}"]),
        "rubric": json.dumps(["It is short.", {"criterion": "It is right.", "weight": 2}]),
        "capital": "Paris",
        "goal": "Your name is Ada. You want to cancel the order of a lamp.",
        "orders": [{"number": "1234", "customer": "Ada", "item": "lamp", "place": "Bath"}],
        "wanted": {"1234": "cancelled"},
    }


def write_jsonl(path: Path, rows: list[Values]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_files(folder: Path) -> None:
    """Write the files that the documents' readers are said to have."""
    numbers = range(ROWS)
    turns = [("user", "Say {}."), ("assistant", "{}, of course.")]
    chats = [[{"role": role, "content": text.format(number)} for role, text in turns] for number in numbers]
    write_jsonl(folder / "chats.jsonl", [{"messages": messages} for messages in chats])
    pairs = [f"What is {number}?,It is {number}.,No idea {number}.\n" for number in numbers]
    (folder / "pairs.csv").write_text("question,better,worse\n" + "".join(pairs))
    (folder / "my.csv").write_text("question,answer\n" + "".join(f"What is {n}?,It is {n}.\n" for n in range(90)))
    write_jsonl(folder / "sums.jsonl", [{"question": f"{n} + 3 = ?", "answer": n + 3} for n in numbers])
    problems = [{"question": f"{n} eggs and 2?", "answer": f"A sum.\n#### {n + 2}"} for n in numbers]
    write_jsonl(folder / "problems.jsonl", problems)
    write_jsonl(folder / "train.jsonl", problems)
    (folder / "my").mkdir()
    with gzip.open(folder / "my" / "chats.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in chats)
    (folder / "my" / "pairs.csv").write_text((folder / "pairs.csv").read_text())
    make_base(folder / "base")
    write_jsonl(folder / "host.jsonl", [host_row(number) for number in numbers])
    write_jsonl(folder / "host_pairs.jsonl", [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"No idea {n}."} for n in numbers
    ])  # fmt: skip
    recipe = {
        "kind": "instructions",
        "sources": [{"type": "files", "paths": ["host.jsonl"], "keep": list(KEPT)}],
        "test_size": 0.25,
        "near_duplicate_prompts": None,
    }
    for name in ("host", "mine"):
        (folder / f"{name}.yaml").write_text(json.dumps(recipe))
    block = {"class": "examples.calculator:Calculator", "max_turns": 2, "max_tokens": 128}
    ppo = {name: value for name, value in HOST["ppo"].items() if name != "score"}
    tasks = {"sums": {"task": "environment", "environment": block, "rows": "data"}}
    changed = {"ppo": {**ppo, "environment": block}, "evaluate": {**HOST["evaluate"], "rows": ["data"], "tasks": tasks}}
    (folder / "pipeline.yaml").write_text(json.dumps({"name": "host", "stages": {**HOST, **changed}}))


def make_base(path: Path) -> None:
    """Write a tiny model without a chat template, as a base model is."""
    make_tiny(path)
    for file in path.glob("chat_template*"):
        file.unlink()
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
