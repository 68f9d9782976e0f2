"""Work for stages that are measured: rows as long as asked for, inputs, and one run of a real stage on them."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.capacity.plan import estimator_of
from align.capacity.sharding import Job
from align.config.runtime import Runtime
from align.models.compute.architecture import Architecture
from align.pipeline.context import StageContext
from align.pipeline.registry import find_stage
from align.store.artifacts import Artifact, Kind

WORDS = ("red", "green", "blue", "house", "water", "paper", "music", "river", "stone", "light", "garden", "winter")
FIELD = {"sft": "model", "reward": "model", "dpo": "policy", "ppo": "policy", "grpo": "policy", "sample": "policy"}
"""Stages that can be measured, and what each calls the model it trains, or samples from."""
ROLLOUTS = ("ppo", "grpo")
"""Those that learn from rollouts, which a reward model scores."""
PROMPTED = (*ROLLOUTS, "sample")
"""Those that answer prompts."""
TEST_ROWS = 4
"""Rows of the test split of the data."""


def plan_job(kind: str, config: Any, models: Mapping[str, list[Architecture]], runtime: Runtime) -> Job:
    """Return the job that ``align plan`` counts the memory of. Raises ``ValueError`` for a kind without an estimate."""
    estimator = estimator_of(find_stage(kind))
    if estimator is None:
        raise ValueError(f"align plan estimates nothing for stage {kind}")
    job: Job = estimator.job(config, models, runtime)
    return job


def config_of(kind: str, fields: Mapping[str, Any]) -> Any:
    """The stage's config, with names for what it reads."""
    named: dict[str, Any] = {FIELD[kind]: "m", **fields}
    named |= {"prompts" if kind in PROMPTED else "data": "d"}
    if kind != "sample":
        named["learning_rate"] = 1e-5
    if reads_reward(kind, fields):
        named |= {"reward": "r", "reward_floor": None}
    return find_stage(kind).config_class().model_validate(named)


def reads_reward(kind: str, fields: Mapping[str, Any]) -> bool:
    """Return True if a reward model as large as the policy scores the stage's rollouts."""
    return kind in ROLLOUTS and "score" not in fields


def run_stage(
    root: Path, kind: str, fields: Mapping[str, Any], model: Path, length: int, rows: int, runtime: Runtime
) -> dict[str, Any]:
    """Run a stage below ``root`` on ``model`` and on ``rows`` rows of ``length`` tokens; returns its metrics."""
    from align.models.loading import load_tokenizer

    inputs: dict[str, Any] = {FIELD[kind]: _holder(root / "source", model)}
    data = _data(root / "data", load_tokenizer(model), kind, length, rows)
    if kind in ROLLOUTS:
        reward = _reward(root, model) if reads_reward(kind, fields) else None
        inputs |= {"prompts": data, "reward": reward, "ptx": None}
    elif kind == "sample":
        reward = None if fields.get("reward") is None else _reward(root, model)
        inputs |= {"prompts": data, "reward": reward}
    else:
        inputs |= {"data": data, "replay": None, "reference": None}
    for folder in ("output", "checkpoints"):
        (root / folder).mkdir(parents=True)
    config = config_of(kind, fields)
    context = StageContext(
        kind, config, inputs, 17, runtime, root / "output", root / "checkpoints", root / "events", kind=kind
    )
    return find_stage(kind).runner()(context)


def _holder(root: Path, model: Path) -> Artifact:
    root.mkdir(parents=True)
    (root / "model").symlink_to(model)
    return Artifact("m", Kind.MODEL, root, {"key": "0"})


def by_length(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    """A score that no two responses are likely to share."""
    return [float(len(response)) for response in responses]


def _reward(root: Path, model: Path) -> Artifact:
    """Write a reward model with a head that gives few answers the same score, so that there is something to learn."""
    import torch

    from align.models.checkpoints.conversion import stored_types
    from align.models.loading import load_tokenizer, new_reward

    folder = root / "reward" / "model"
    is_narrow = stored_types(model) == {"BF16"}
    reward_model = new_reward(model, torch.bfloat16 if is_narrow else torch.float32)
    reward_model.score.weight.data.fill_(0.01)[..., ::2] *= -1
    reward_model.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return Artifact("r", Kind.REWARD, root / "reward", {"key": "1"})


def _data(root: Path, tokenizer: Any, kind: str, length: int, count: int) -> Artifact:
    from align.data.rows import assistant, user, write_rows

    def row(number: int) -> dict[str, Any]:
        if kind in PROMPTED:
            return {"prompt": _filled(tokenizer, length, number, prompt=True)}
        answer = _filled(tokenizer, length, number, prompt=False)
        other = [assistant(_text(number + 5, len(answer[0]["content"].split())))]
        return {"prompt": [user(f"{number}")], "completion": answer, "chosen": answer, "rejected": other}

    root.mkdir(parents=True)
    for split, start in (("train", 0), ("test", count)):
        rows = [
            {"id": f"{start + index}", "source": "made", "checks": "", **row(start + index)}
            for index in range(count if split == "train" else TEST_ROWS)
        ]
        write_rows(root / f"{split}.parquet", rows)
    return Artifact("d", Kind.PROMPTS if kind in PROMPTED else Kind.PREFERENCES, root, {"key": "2"})


def _text(number: int, words: int) -> str:
    return " ".join(WORDS[(number * 7 + index * (1 + number % 5)) % len(WORDS)] for index in range(words))


def _filled(tokenizer: Any, length: int, number: int, prompt: bool) -> list[dict[str, Any]]:
    """Return the last turn of a row of ``length`` tokens, or of few less: a prompt, or the answer to a short question.

    Raises ``ValueError`` where no word fits.
    """
    from align.data.rows import assistant, user

    def turns(words: int) -> list[dict[str, Any]]:
        text = _text(number, words)
        return [user(text)] if prompt else [user(f"{number}"), assistant(text)]

    def tokens(words: int) -> int:
        return len(tokenizer.apply_chat_template(turns(words), add_generation_prompt=prompt, return_dict=False))

    # A word has at least one token, so a row has at most ``length`` words.
    words = bisect.bisect_right(range(1, length + 1), length, key=tokens)
    if words == 0:
        raise ValueError(f"no row fits into {length} tokens")
    return turns(words)[-1:]
