"""A table of sampled responses, a few from every update: what the numbers do not show.

One JSON line a response, one file an update, so that a resumed run rewrites what it repeats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.models.token_texts import token_texts
from align.rl.rollout import COMPONENT, Rollout
from align.store.atomic_write import write_text_atomically

FOLDER = "completions"
PER_TOKEN = ("kl", "values", "raw_advantages")


def write(folder: Path, rollout: Rollout, count: int, tokenizer: Any) -> None:
    """Write the first ``count`` responses of a rollout: ``update``, ``prompt``, ``response``, scores, length, KL.

    ``by_token`` has ``[text, KL to the reference, the critic's value before the token, advantage]`` of each token:
    where a response strays, and what the critic expected there.
    """
    path = folder / FOLDER / f"{rollout.update + 1:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(_line(rollout, index, tokenizer), ensure_ascii=False) for index in range(min(count, len(rollout)))
    ]
    write_text_atomically(path, "".join(f"{line}\n" for line in lines))


def _line(rollout: Rollout, index: int, tokenizer: Any) -> dict[str, Any]:
    tensors = rollout.tensors
    scores = {name: float(tensors[name][index]) for name in tensors if name.startswith(COMPONENT)}
    gold = {"gold": float(tensors["gold"][index])} if "gold" in tensors else {}
    return {
        "update": rollout.update + 1,
        "prompt": rollout.rows[index]["prompt"],
        "response": rollout.texts[index],
        "score": float(tensors["scores"][index]),
        **scores,
        **gold,
        "kl": float(tensors["kl"][index].sum()),
        "tokens": len(rollout.responses[index]),
        "finished": bool(tensors["finished"][index]),
        "by_token": _by_token(rollout, index, tokenizer),
    }


def _by_token(rollout: Rollout, index: int, tokenizer: Any) -> list[list[Any]]:
    ids = rollout.responses[index]
    nothing = [0.0] * len(ids)  # a method without a critic has no values
    columns = [rollout.tensors[name][index].tolist() if name in rollout.tensors else nothing for name in PER_TOKEN]
    numbers = zip(*columns, strict=False)  # values: one more
    return [
        [text, *(round(value, 4) for value in own)]
        for text, own in zip(token_texts(tokenizer, ids), numbers, strict=False)
    ]


def gather(folder: Path, target: Path) -> None:
    """Put all updates' responses into one file."""
    files = sorted((folder / FOLDER).glob("*.jsonl"))
    if files:
        target.write_text("".join(file.read_text(encoding="utf-8") for file in files), encoding="utf-8")
