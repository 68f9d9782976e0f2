"""A tiny model as an answer of ``FakeChat``: log-probabilities of given tokens, in vLLM's form or a provider's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align.models.loading import load_policy, load_tokenizer


def scorer(model_dir: Path, max_logprobs: int = 20) -> Callable[[dict[str, Any]], Any]:
    """Return a function that answers ``/completions`` as a server of ``model_dir`` would."""
    model, tokenizer = load_policy(model_dir).eval(), load_tokenizer(model_dir)
    lock = threading.Lock()

    def score(ids: list[int], top_k: int) -> list[dict[int, float] | None]:
        with lock, torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        positions: list[dict[int, float] | None] = [None]
        for token, row in zip(ids[1:], logprobs, strict=False):
            best = row.topk(top_k)
            position = dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
            positions.append({token: float(row[token]), **position})
        return positions

    def reply(body: dict[str, Any]) -> Any:
        top_k = body.get("prompt_logprobs", body.get("logprobs"))
        if "temperature" in body:
            return 400, {"error": {"message": "no temperature with log-probabilities of the prompt"}}
        if top_k > max_logprobs:
            return 400, {"error": {"message": f"Requested {top_k} logprobs, greater than max allowed: {max_logprobs}"}}
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
        if "prompt_logprobs" in body:
            entries = [
                position
                and {
                    str(token): {"logprob": value, "decoded_token": tokenizer.decode([token])}
                    for token, value in position.items()
                }
                for position in score(body["prompt"], top_k)
            ]
            return {"choices": [{"text": "x", "prompt_logprobs": entries}], "usage": usage}
        ids = tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
        top = [
            position and {tokenizer.decode([token]): value for token, value in position.items()}
            for position in score(ids, top_k)
        ]
        # One sampled token follows the prompt.
        logprobs = {"tokens": [*(tokenizer.decode([token]) for token in ids), "x"], "top_logprobs": [*top, {"x": -0.1}]}
        return {"choices": [{"text": "x", "logprobs": logprobs}], "usage": usage}

    return reply
