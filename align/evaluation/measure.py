"""Numbers of each response and each checkpoint: gold and reward-model scores, KL, held-out loss.

Each measurement is cached on disk under a key of its inputs, so that an interrupted evaluation resumes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.base import Precision
from align.data.scoring import Scorer
from align.data.weighted_scores import WeightedSum
from align.errors import UserError
from align.evaluation.generation import ResponseSet
from align.evaluation.logprobs import OnProgress, response_logprobs, sequence_kl
from align.evaluation.reward_metrics import REWARD, SUM
from align.evaluation.systems import Policy
from align.evaluation.tasks.base import Values
from align.inference.protocol import Response
from align.models.answer_tokens import PromptRewritten, answer_turns, assistant_mask, split_turns
from align.models.render import render_answered, render_prompt
from align.store.sealed import read_entry, read_or_compute, write_entry

Row = dict[str, Any]
LogprobsOf = Callable[[list[list[int]], list[list[int]]], list[list[float]]]
"""(prompts, responses) → log-probability of each response token, under one model."""
Prompts = Sequence[list[int]]
"""Token ids of prompts."""


@dataclass(frozen=True)
class ResultCache:
    """Measurements on disk, which runs share: each under a name and the digest of its inputs."""

    folder: Path
    warn: Callable[[str], object]

    def read_or_compute(self, name: str, key: str, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``'s JSON-able result, or that of an earlier attempt or run under the same key.

        A damaged result is computed again, with a warning.
        """
        return read_or_compute(self._path(name, key), key, compute, self.warn)

    def read(self, name: str, key: str) -> Any:
        """Return the result of an earlier attempt or run; None where there is none."""
        values = read_entry(self._path(name, key), key, self.warn)
        return values[0] if values is not None and len(values) == 1 else None

    def write(self, name: str, key: str, result: Any) -> Any:
        """Store a JSON-able result, and return it as JSON reads it back."""
        plain = json.loads(json.dumps(result))
        write_entry(self._path(name, key), key, [plain])
        return plain

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key[:16]}.jsonl"


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


def reward_values(
    score: Callable[..., list[float]], rows: Sequence[Row], response_sets: Sequence[ResponseSet]
) -> list[Values]:
    """Return reward-model scores of each set of responses to ``rows``, per prompt and sample.

    ``score(prompts, responses, finished, tools)`` is called once, so that a model reads each prompt once for all sets.
    """
    responses: list[Response] = []
    repeated: list[Row] = []
    for response_set in response_sets:
        set_responses, set_rows = _flatten(rows, response_set)
        responses += set_responses
        repeated += set_rows
    scores = score(
        [row["prompt"] for row in repeated],
        [response.text for response in responses],
        [response.finished for response in responses],
        [row.get("tools") for row in repeated],
    )
    remaining = iter(scores)
    return [
        [[float(next(remaining)) for _ in samples] for samples in response_set.responses]
        for response_set in response_sets
    ]


def read_responses(logprobs_of: LogprobsOf, reads: Sequence[tuple[Prompts, ResponseSet]]) -> list[list[list[float]]]:
    """Return the log-probabilities of each set's response tokens after its prompts, by one call for all sets.

    The sets' responses are in one list each, prompt by prompt, as ``kl_values`` takes them.
    """
    prompts: list[list[int]] = []
    tokens: list[list[int]] = []
    sizes = []
    for set_prompts, response_set in reads:
        responses, repeated = _flatten(set_prompts, response_set)
        prompts += repeated
        tokens += [response.token_ids for response in responses]
        sizes.append(len(responses))
    remaining = iter(logprobs_of(prompts, tokens))
    return [[next(remaining) for _ in range(size)] for size in sizes]


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
        # ``start`` is the first response of the prompt in the flat lists.
        pairs = zip(logprobs[start], ref_logprobs[start], strict=True)
        token_kl.append([round(logprob - ref_logprob, 4) for logprob, ref_logprob in pairs])
        start += len(samples)
    return token_kl


def heldout_losses(
    logprobs_of: LogprobsOf, tokenizer: Any, rows: Sequence[Row], max_length: int
) -> tuple[list[int], list[float], list[int]]:
    """Loss per token of each row's reference answer, as in SFT: with its end of turn unless it was cut off.

    Only turns of the assistant count: not what tools and users write, and no turn with ``train: False``. Returns the
    indices of the rows that fit ``max_length`` tokens, their loss per token in nats, and their tokens.
    """
    reads = {index: _heldout_reads(tokenizer, row, max_length) for index, row in enumerate(rows)}
    indices = [index for index in reads if reads[index]]
    # All answers are read in one call, and their log-probabilities come back in this order.
    flat = [read for index in indices for read in reads[index]]
    logprobs = iter(logprobs_of([prompt for prompt, _, _ in flat], [answer for _, answer, _ in flat]))
    losses, tokens = [], []
    for index in indices:
        counted: list[float] = []
        for _, _, mask in reads[index]:
            counted += [value for value, counts in zip(next(logprobs), mask, strict=True) if counts]
        losses.append(-sum(counted) / len(counted))
        tokens.append(len(counted))
    return indices, losses, tokens


def check_heldout(tokenizer: Any, rows: Sequence[Row], max_length: int) -> None:
    """Raise ``UserError`` where :func:`heldout_losses` would leave out every row."""
    if not any(_heldout_reads(tokenizer, row, max_length) for row in rows):
        raise UserError(
            f"heldout: none of {len(rows)} rows has a turn to train on and fits max_heldout_length={max_length} "
            "tokens; raise it."
        )


def _heldout_reads(tokenizer: Any, row: Row, max_length: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Return prompts, answers, and 1 for each token of an answer that counts; nothing for a row that is left out.

    There is one answer, or one for each turn where the template rewrites earlier ones.
    """
    side = "completion"
    places = answer_turns([*row["prompt"], *row[side]], len(row["prompt"]))
    if not places:
        return []
    prompt = render_prompt(tokenizer, row["prompt"], row.get("tools"))
    ids = render_answered(tokenizer, row, side)
    # Templates that rewrite the prompt once an answer follows have no answer tokens to cut out.
    if ids[: len(prompt)] != prompt or not len(prompt) < len(ids) <= max_length:
        return []
    answer = ids[len(prompt) :]
    try:
        mask = assistant_mask(tokenizer, row, side, prompt, answer)
        if mask is not None:
            return [(prompt, answer, mask)]
        # The template rewrites earlier turns, so no single rendering has all turns as they are sampled.
        parts = split_turns(tokenizer, row, side, places)
    except PromptRewritten:
        return []
    if any(len(before) + len(turn) > max_length for before, turn in parts):
        return []
    return [(before, turn, [1] * len(turn)) for before, turn in parts]


class LoadedModels:
    """Checkpoints for forward passes, one at a time; those of equal weights are one.

    Under bfloat16 the weights are rounded once, when they are loaded, and so is what flows between layers.
    """

    def __init__(self, policies: Sequence[Policy], device: Any, precision: Precision) -> None:
        self.policies = {policy.name: policy for policy in policies}
        self.device = device
        self.precision = precision
        self.models: dict[str, Any] = {}
        """The loaded checkpoint, by the key of its weights."""

    def logprobs_of(self, name: str, temperature: float, on_progress: OnProgress | None = None) -> LogprobsOf:
        """Return a function for the checkpoint's log-probabilities; the checkpoint is loaded at the first call."""

        def compute(prompts: list[list[int]], responses: list[list[int]]) -> list[list[float]]:
            return response_logprobs(
                self._model(name),
                prompts,
                responses,
                temperature=temperature,
                precision=self.precision,
                pad=int(self.policies[name].tokenizer.pad_token_id),
                on_progress=on_progress,
            )

        return compute

    def close(self) -> None:
        """Free the loaded checkpoint, for other processes as well."""
        import torch

        self.models.clear()
        torch.cuda.empty_cache()  # torch keeps freed memory of a GPU for itself

    def _model(self, name: str) -> Any:
        from align.models.loading import load_policy
        from align.models.precision import cast_frozen_to_bf16, low_residual

        policy = self.policies[name]
        if policy.key not in self.models:
            self.models.clear()  # before the next one is loaded: the memory holds one
            model = load_policy(policy.model_dir).requires_grad_(False)
            if self.precision == "bfloat16":
                low_residual(model)
                cast_frozen_to_bf16(model)
            self.models[policy.key] = model.to(self.device)
        return self.models[policy.key]


def _unflatten(flat: Sequence[float], response_set: ResponseSet) -> Values:
    values = []
    start = 0
    for samples in response_set.responses:
        values.append([float(value) for value in flat[start : start + len(samples)]])
        start += len(samples)
    return values
