"""A base model with a template by name and added tokens goes through training, rewards and PPO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.models.loading import load_policy, load_tokenizer
from tests.support.refusals import Refused

TOKENS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
SHORT = {"max_steps": 2, "batch_size": 4, "max_length": 128, "learning_rate": 1.0e-3}
LORA = {"method": "lora", "rank": 2, "train_tokens": TOKENS[1:]}


@pytest.mark.slow  # five stages train
@pytest.mark.usefixtures("stages_in_process")
def test_new_tokens_go_through_every_kind_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"Say {chr(97 + n % 26) * 5} {n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(40)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    stages: dict[str, Any] = {
        "model": {"source": "tiny", "chat_template": "phi3", "add_tokens": TOKENS},
        "data": {"dataset": "pairs.jsonl"},
        "prompts": {"stage": "data", "dataset": "pairs.jsonl", "kind": "instructions"},
        "sft": {"model": "model", "data": "prompts", "tuning": LORA, **SHORT},
        "dpo": {"policy": "sft", "data": "data", "tuning": LORA, **SHORT},
        "reward": {"model": "sft", "data": "data", "tuning": LORA, **SHORT},
        "ppo": {
            "policy": "sft",
            "reward": "reward",
            "prompts": "prompts",
            "tuning": LORA,
            "updates": 1,
            "learning_rate": 1.0e-3,
            "rollout_batch": 4,
            "max_tokens": 4,
        },
    }
    runtime = {"engine": {"name": "transformers"}}
    run = Pipeline({"name": "tokens", "runtime": runtime, "stages": stages}).run(store=tmp_path / "store")
    first = load_policy(run.artifacts["model"].path / "model").get_input_embeddings().weight
    tokenizer = load_tokenizer(run.artifacts["model"].path / "model")
    assert tokenizer.eos_token == "<|end|>" and first.shape[0] == 264
    ids = tokenizer.convert_tokens_to_ids(TOKENS)
    for name in ("sft", "dpo", "ppo"):
        weight = load_policy(run.artifacts[name].path / "model").get_input_embeddings().weight
        assert weight[: ids[0] + 1].equal(first[: ids[0] + 1]), name  # <|system|> is not among train_tokens
        assert not weight[ids[1:]].equal(first[ids[1:]]), name
    assert run.artifacts["reward"].path.is_dir()


def test_template_with_missing_tokens_is_refused_by_the_plan(refused: Refused) -> None:
    refused(Pipeline, {"name": "x", "stages": {"model": {"source": "tiny", "chat_template": "gemma"}}})
    tokens = ["<start_of_turn>", "<end_of_turn>"]
    key = Pipeline(
        {"name": "x", "stages": {"model": {"source": "tiny", "chat_template": "gemma", "add_tokens": tokens}}}
    ).nodes["model"]
    assert set(key.identities) == {"source", "chat_template", "add_tokens"}
    for wrong in ([""], [" a"], ["a", "a"]):
        refused(Pipeline, {"name": "x", "stages": {"model": {"source": "tiny", "add_tokens": wrong}}})
