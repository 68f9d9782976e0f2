"""The numbers of each response and each checkpoint: gold and reward-model scores, KL, held-out loss.

Each measurement is kept on disk under what it was made of, so that an interrupted evaluation goes on where it was.
Leaves out generation and statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.evaluation.generation import Generated
from align.evaluation.logprobs import response_logprobs, sequence_kl
from align.evaluation.prompts import Policy
from align.evaluation.tasks.base import Values
from align.models.render import render_answered, render_prompt
from align.store.sealed import read_or_compute

Row = dict[str, Any]
LogprobsOf = Callable[[list[list[int]], list[list[int]]], list[list[float]]]
"""(prompts, responses) → log-probability of each response token, under one model."""


@dataclass(frozen=True)
class Results:
    """Measurements on disk, which runs share: each under a name and the digest of all that it depends on."""

    folder: Path
    warn: Callable[[str], object]

    def read_or_compute(self, name: str, key: str, compute: Callable[[], Any]) -> Any:
        """``compute()``'s JSON-able result, or the one of an earlier attempt or run under the same key.

        A result that is not what was written there is computed again, with a warning.
        """
        return read_or_compute(self.folder / f"{name}-{key[:16]}.jsonl", key, compute, self.warn)


def shape_values(generated: Generated) -> dict[str, Values]:
    """Length in tokens and whether the response ended by itself."""
    return {
        "length": [[float(len(one.token_ids)) for one in samples] for samples in generated.responses],
        "finished": [[float(one.finished) for one in samples] for samples in generated.responses],
    }


def function_values(scorer: Any, rows: Sequence[Row], generated: Generated) -> Values:
    """Scores of a verifiable function (an :class:`align.data.scoring.Scorer`), per prompt and sample."""
    flat = [one for samples in generated.responses for one in samples]
    repeated = [row for row, samples in zip(rows, generated.responses, strict=True) for _ in samples]
    scores = scorer.score(repeated, [one.text for one in flat], [not one.finished for one in flat])
    return _unflatten(scores, generated)


def reward_values(score: Callable[..., list[float]], rows: Sequence[Row], generated: Generated) -> Values:
    """Reward-model scores, per prompt and sample; ``score(prompts, responses, finished, tools)``."""
    flat = [one for samples in generated.responses for one in samples]
    repeated = [row for row, samples in zip(rows, generated.responses, strict=True) for _ in samples]
    prompts, tools = [row["prompt"] for row in repeated], [row.get("tools") for row in repeated]
    scores = score(prompts, [one.text for one in flat], [one.finished for one in flat], tools)
    return _unflatten(scores, generated)


TOKEN_PROMPTS = 200
"""Prompts whose first response's KL is kept token by token, for the reader of samples."""


def kl_values(
    own: LogprobsOf,
    reference: LogprobsOf,
    prompts: Sequence[list[int]],
    generated: Generated,
    ref_prompts: Sequence[list[int]] | None = None,
) -> dict[str, Any]:
    """``kl`` and ``kl_k3``: estimates of each response's KL to the reference in nats, see :func:`sequence_kl`.

    ``prompts`` are what the system read, ``ref_prompts`` what the reference reads (the same, unless the system has a
    prompt of its own). ``token_kl`` has the k1 estimate of each token of the first response to the first
    ``TOKEN_PROMPTS`` prompts. ``sampler_gap`` is the mean |sampler - policy| log-probability per token: large when the
    engine did not sample from the weights that this is about.
    """
    flat = [one for samples in generated.responses for one in samples]
    tokens = [one.token_ids for one in flat]

    def repeated(rendered: Sequence[list[int]]) -> list[list[int]]:
        return [ids for ids, samples in zip(rendered, generated.responses, strict=True) for _ in samples]

    logprobs = own(repeated(prompts), tokens)
    ref_logprobs = reference(repeated(prompts if ref_prompts is None else ref_prompts), tokens)
    estimates = [sequence_kl(values, ref_values) for values, ref_values in zip(logprobs, ref_logprobs, strict=True)]
    gaps = [
        abs(sampled - value)
        for one, values in zip(flat, logprobs, strict=True)
        for sampled, value in zip(one.logprobs, values, strict=True)
    ]
    return {
        "kl": _unflatten([k1 for k1, _ in estimates], generated),
        "kl_k3": _unflatten([k3 for _, k3 in estimates], generated),
        "token_kl": _first_tokens(logprobs, ref_logprobs, generated),
        "sampler_gap": sum(gaps) / max(1, len(gaps)),
    }


def _first_tokens(
    logprobs: Sequence[Sequence[float]], ref_logprobs: Sequence[Sequence[float]], generated: Generated
) -> list[list[float]]:
    found, at = [], 0
    for samples in generated.responses[:TOKEN_PROMPTS]:
        found.append([round(own - ref, 4) for own, ref in zip(logprobs[at], ref_logprobs[at], strict=True)])
        at += len(samples)
    return found


def heldout_losses(
    logprobs_of: LogprobsOf, tokenizer: Any, rows: Sequence[Row], longest: int
) -> tuple[list[int], list[float], list[int]]:
    """Loss per token of each row's reference answer, as SFT takes it: with its end of turn unless it was cut off.

    Returns the indices of the rows that fit ``longest`` tokens, their loss per token in nats, and their token counts.
    Raises ``UserError`` when none fits.
    """
    prompts, answers, indices = [], [], []
    for index, row in enumerate(rows):
        tools = row.get("tools")
        prompt = render_prompt(tokenizer, row["prompt"], tools)
        whole = render_answered(tokenizer, row, "completion")
        if whole[: len(prompt)] == prompt and len(prompt) < len(whole) <= longest:
            prompts.append(prompt)
            answers.append(whole[len(prompt) :])
            indices.append(index)
    if not indices:
        raise UserError(f"heldout: none of {len(rows)} rows fits max_heldout_length={longest} tokens; raise it.")
    losses = [-sum(values) / len(values) for values in logprobs_of(prompts, answers)]
    return indices, losses, [len(answer) for answer in answers]


class LoadedModels:
    """Checkpoints for forward passes: the reference stays loaded, one other at a time beside it."""

    def __init__(self, policies: Sequence[Policy], reference: str, device: Any, precision: Any) -> None:
        self.policies = {policy.name: policy for policy in policies}
        self.reference, self.device, self.precision = reference, device, precision
        self.models: dict[str, Any] = {}

    def logprobs_of(self, name: str, temperature: float) -> LogprobsOf:
        """A function that gives the checkpoint's log-probabilities; it is loaded at the first call."""

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
        """Free what is loaded."""
        self.models.clear()

    def _model(self, name: str) -> Any:
        from align.models.loading import load_policy

        if name not in self.models:
            for other in [other for other in self.models if other != self.reference]:
                del self.models[other]
            self.models[name] = load_policy(self.policies[name].model_dir).to(self.device).requires_grad_(False)
        return self.models[name]


def _unflatten(flat: Sequence[float], generated: Generated) -> Values:
    values, at = [], 0
    for samples in generated.responses:
        values.append([float(value) for value in flat[at : at + len(samples)]])
        at += len(samples)
    return values
