"""Numbers of each response and each checkpoint: gold and reward-model scores, KL, held-out loss.

Each measurement is cached on disk under a key of its inputs, so that an interrupted evaluation resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.data.scoring import Scorer
from align.data.weighted_scores import WeightedSum
from align.errors import UserError
from align.evaluation.generation import ResponseSet
from align.evaluation.logprobs import response_logprobs, sequence_kl
from align.evaluation.reward_metrics import REWARD, SUM
from align.evaluation.systems import Policy
from align.evaluation.tasks.base import Values
from align.inference.protocol import Response
from align.models.render import render_answered, render_prompt
from align.store.sealed import read_or_compute

Row = dict[str, Any]
LogprobsOf = Callable[[list[list[int]], list[list[int]]], list[list[float]]]
"""(prompts, responses) → log-probability of each response token, under one model."""


@dataclass(frozen=True)
class ResultCache:
    """Measurements on disk, which runs share: each under a name and the digest of its inputs."""

    folder: Path
    warn: Callable[[str], object]

    def read_or_compute(self, name: str, key: str, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``'s JSON-able result, or that of an earlier attempt or run under the same key.

        A damaged result is computed again, with a warning.
        """
        return read_or_compute(self.folder / f"{name}-{key[:16]}.jsonl", key, compute, self.warn)


def shape_values(response_set: ResponseSet) -> dict[str, Values]:
    """Return ``length`` in tokens, and ``finished``: 1 for a response that ended by itself, else 0."""
    return {
        "length": [[float(len(response.token_ids)) for response in samples] for samples in response_set.responses],
        "finished": [[float(response.finished) for response in samples] for samples in response_set.responses],
    }


def function_values(scorer: Scorer, rows: Sequence[Row], response_set: ResponseSet) -> Values:
    """Return the scores of a verifiable function, per prompt and sample."""
    responses, repeated = _flatten(rows, response_set)
    texts = [response.text for response in responses]
    scores = scorer.score(repeated, texts, [not response.finished for response in responses])
    return _unflatten(scores, response_set)


def reward_list_values(scorer: WeightedSum, rows: Sequence[Row], response_set: ResponseSet) -> dict[str, Values]:
    """Return ``score``, a list of rewards' weighted sum for every sample, and each reward as ``score_<name>``.

    Metrics of the rewards follow, ``score_<name>_<metric>``, without those that some response lacks.
    """
    responses, repeated = _flatten(rows, response_set)
    texts = [response.text for response in responses]
    parts = scorer.score_parts(repeated, texts, [not response.finished for response in responses])
    # Scores always count, and a model's NaN shows; only of a further metric it means that the response lacks it.
    return {
        f"{REWARD}{name}" if name else SUM: _unflatten(scores, response_set)
        for name, scores in parts.items()
        if name in ("", *scorer.names) or all(map(math.isfinite, scores))
    }


def reward_values(score: Callable[..., list[float]], rows: Sequence[Row], response_set: ResponseSet) -> Values:
    """Return reward-model scores, per prompt and sample; ``score(prompts, responses, finished, tools)``."""
    responses, repeated = _flatten(rows, response_set)
    prompts = [row["prompt"] for row in repeated]
    tools = [row.get("tools") for row in repeated]
    texts = [response.text for response in responses]
    scores = score(prompts, texts, [response.finished for response in responses], tools)
    return _unflatten(scores, response_set)


def _flatten(rows: Sequence[Any], response_set: ResponseSet) -> tuple[list[Response], list[Any]]:
    """Return all responses in one list, and for each its prompt's entry of ``rows``."""
    responses = [response for samples in response_set.responses for response in samples]
    repeated = [row for row, samples in zip(rows, response_set.responses, strict=True) for _ in samples]
    return responses, repeated


TOKEN_PROMPTS = 200
"""Prompts whose first response has its KL token by token in the samples."""


def kl_values(
    policy: LogprobsOf,
    reference: LogprobsOf,
    prompts: Sequence[list[int]],
    response_set: ResponseSet,
    ref_prompts: Sequence[list[int]] | None = None,
) -> dict[str, Any]:
    """Return ``kl`` and ``kl_k3``: estimates of each response's KL to the reference in nats, see :func:`sequence_kl`.

    ``prompts`` are the system's token ids, ``ref_prompts`` the reference's (the same, unless the system has a prompt of
    its own). ``token_kl`` has the k1 estimate of each token of the first response to the first ``TOKEN_PROMPTS``
    prompts. ``sampler_gap`` is the mean |sampler - policy| log-probability per token: large where the engine sampled
    from other weights than the policy's.
    """
    responses, repeated = _flatten(prompts, response_set)
    _, ref_repeated = _flatten(prompts if ref_prompts is None else ref_prompts, response_set)
    tokens = [response.token_ids for response in responses]
    logprobs = policy(repeated, tokens)
    ref_logprobs = reference(ref_repeated, tokens)
    estimates = [sequence_kl(values, ref_values) for values, ref_values in zip(logprobs, ref_logprobs, strict=True)]
    gaps = [
        # The engine's log-probabilities against the trainer's: a large gap means that other weights were sampled.
        abs(sampled - value)
        for response, values in zip(responses, logprobs, strict=True)
        for sampled, value in zip(response.logprobs, values, strict=True)
    ]
    return {
        "kl": _unflatten([k1 for k1, _ in estimates], response_set),
        "kl_k3": _unflatten([k3 for _, k3 in estimates], response_set),
        "token_kl": _token_kl(logprobs, ref_logprobs, response_set),
        "sampler_gap": sum(gaps) / max(1, len(gaps)),
    }


def _token_kl(
    logprobs: Sequence[Sequence[float]], ref_logprobs: Sequence[Sequence[float]], response_set: ResponseSet
) -> list[list[float]]:
    token_kl = []
    start = 0
    for samples in response_set.responses[:TOKEN_PROMPTS]:
        pairs = zip(logprobs[start], ref_logprobs[start], strict=True)
        token_kl.append([round(logprob - ref_logprob, 4) for logprob, ref_logprob in pairs])
        start += len(samples)
    return token_kl


def heldout_losses(
    logprobs_of: LogprobsOf, tokenizer: Any, rows: Sequence[Row], max_length: int
) -> tuple[list[int], list[float], list[int]]:
    """Loss per token of each row's reference answer, as in SFT: with its end of turn unless it was cut off.

    Returns the indices of the rows that fit ``max_length`` tokens, their loss per token in nats, and their tokens.
    Raises ``UserError`` when none fits.
    """
    prompts, answers, indices = [], [], []
    for index, row in enumerate(rows):
        tools = row.get("tools")
        prompt = render_prompt(tokenizer, row["prompt"], tools)
        ids = render_answered(tokenizer, row, "completion")
        # Templates that rewrite the prompt once an answer follows have no answer tokens to cut out.
        if ids[: len(prompt)] == prompt and len(prompt) < len(ids) <= max_length:
            prompts.append(prompt)
            answers.append(ids[len(prompt) :])
            indices.append(index)
    if not indices:
        raise UserError(f"heldout: none of {len(rows)} rows fits max_heldout_length={max_length} tokens; raise it.")
    losses = [-sum(values) / len(values) for values in logprobs_of(prompts, answers)]
    return indices, losses, [len(answer) for answer in answers]


class LoadedModels:
    """Checkpoints for forward passes: the reference stays loaded, with one other checkpoint at a time."""

    def __init__(self, policies: Sequence[Policy], reference: str, device: Any, precision: Any) -> None:
        self.policies = {policy.name: policy for policy in policies}
        self.reference = reference
        self.device = device
        self.precision = precision
        self.models: dict[str, Any] = {}

    def logprobs_of(self, name: str, temperature: float) -> LogprobsOf:
        """Return a function for the checkpoint's log-probabilities; the checkpoint is loaded at the first call."""

        def compute(prompts: list[list[int]], responses: list[list[int]]) -> list[list[float]]:
            return response_logprobs(
                self._model(name),
                prompts,
                responses,
                temperature=temperature,
                precision=self.precision,
                pad=int(self.policies[name].tokenizer.pad_token_id),
            )

        return compute

    def close(self) -> None:
        """Free the loaded checkpoints."""
        self.models.clear()

    def _model(self, name: str) -> Any:
        from align.models.loading import load_policy

        if name not in self.models:
            # At most two models in memory: the reference, which every comparison needs, and the one that is measured.
            for loaded in list(self.models):
                if loaded != self.reference:
                    del self.models[loaded]
            self.models[name] = load_policy(self.policies[name].model_dir).to(self.device).requires_grad_(False)
        return self.models[name]


def _unflatten(flat: Sequence[float], response_set: ResponseSet) -> Values:
    values = []
    start = 0
    for samples in response_set.responses:
        values.append([float(value) for value in flat[start : start + len(samples)]])
        start += len(samples)
    return values
