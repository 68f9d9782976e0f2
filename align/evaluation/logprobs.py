"""Log-probabilities of given tokens under a checkpoint, and the sequence KL of two checkpoints.

They come from the trainer's forward pass, never from the engine: the two round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from typing import TYPE_CHECKING, Any

from align.config.base import Precision
from align.config.runtime.rollouts import READ_TOKENS
from align.errors import UserError
from align.evaluation.systems import Policy
from align.models.chat.render import (
    PromptRewritten,
    answer_turns,
    assistant_mask,
    render_answered,
    render_prompt,
    split_turns,
)

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

HEAD_ROWS = 256
"""Positions whose logits are converted to float32 at a time."""
OnProgress = Callable[[int, int], None]
"""(done, total) → None."""
Row = dict[str, Any]
LogprobsOf = Callable[[list[list[int]], list[list[int]]], list[list[float]]]
"""(prompts, responses) → log-probability of each response token, under one model."""


def response_logprobs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    temperature: float,
    precision: Any,
    pad: int,
    on_progress: OnProgress | None = None,
) -> list[list[float]]:
    """Log-probability of each response token under ``softmax(logits / temperature)``, in nats; one list per response.

    Equal pairs of prompt and response are read once. If the model supports it (``align.models.fast.ragged_rows``),
    so is what several of them begin with: a template's system message, examples, the prompt of several responses. The
    model is in eval mode. ``on_progress(done, total)`` counts responses.
    """
    import torch

    from align.models.compute.precision import autocast
    from align.models.fast.ragged_rows import NotRaggedError

    device = next(model.parameters()).device
    reading = _Reading(model, prompts, responses, temperature, pad, [[] for _ in prompts], on_progress)
    with torch.inference_mode(), autocast(device, precision):
        try:
            if _can_share(model):
                _read_all_shared(reading)
                return reading.logprobs
        except NotRaggedError:
            pass  # a model that turns out not to support them: everything is read row by row
        lengths = {index: len(prompts[index]) + len(responses[index]) for index in range(len(prompts))}
        for indices in _batches(lengths):
            _read_rows(reading, indices)
    return reading.logprobs


@dataclass
class _Reading:
    """The inputs of :func:`response_logprobs`, and its result so far."""

    model: Any
    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    temperature: float
    pad: int
    logprobs: list[list[float]]
    """Per response; empty until it was read."""
    on_progress: OnProgress | None = None
    done: int = 0
    """Responses read."""

    def report(self, count: int) -> None:
        """Count so many more responses as read."""
        self.done += count
        if self.on_progress is not None:
            self.on_progress(self.done, len(self.prompts))


def _can_share(model: PreTrainedModel) -> bool:
    """Prepare the model to read several rows in one line of tokens; return False if it cannot."""
    from align.models.fast.ragged_rows import can_run_ragged, enable_ragged

    parameters = signature(model.forward).parameters.values()
    takes_keywords = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if not takes_keywords or not can_run_ragged(model):
        return False
    enable_ragged(model)
    return True


def _read_rows(reading: _Reading, batch: Sequence[int]) -> None:
    """Fill ``logprobs`` for the rows of ``batch``, each with its prompt, padded to one length."""
    import torch

    model = reading.model
    prompts = reading.prompts
    responses = reading.responses
    device = next(model.parameters()).device
    lengths = {index: len(prompts[index]) + len(responses[index]) for index in batch}
    width = max(lengths.values())
    ids = torch.full((len(batch), width), reading.pad, device=device)  # (B, T), right-padded
    mask = torch.zeros((len(batch), width), dtype=torch.long, device=device)
    is_response = torch.zeros((len(batch), width), dtype=torch.bool, device=device)  # positions of response tokens
    for row, index in enumerate(batch):
        ids[row, : lengths[index]] = torch.tensor([*prompts[index], *responses[index]], device=device)
        mask[row, : lengths[index]] = 1
        is_response[row, len(prompts[index]) : lengths[index]] = True
    # The token at t is predicted from position t - 1. The model's own head runs, with any scaling or capping it has,
    # but only from the first position that is needed.
    start = min(len(prompts[index]) for index in batch) - 1
    keep = torch.arange(start, width - 1, device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
    targets = is_response[:, start + 1 :]
    flat = iter(_chosen_logprobs(logits[targets], ids[:, start + 1 :][targets], reading.temperature))
    for index in batch:
        reading.logprobs[index] = list(islice(flat, len(responses[index])))
    reading.report(len(batch))


def _read_all_shared(reading: _Reading) -> None:
    """Fill ``logprobs``: batch by batch in one line of tokens, without padding, each common beginning once."""
    from align.models.fast.shared_parts import batches_of_shared

    # A response's last token is only predicted, never read, so it needs no room. An empty response needs no pass.
    indices = [index for index, response in enumerate(reading.responses) if response]
    rows = [[*reading.prompts[index], *reading.responses[index][:-1]] for index in indices]
    for batch in batches_of_shared(rows, READ_TOKENS):
        _read_shared(reading, [indices[number] for number in batch], [rows[number] for number in batch])
        reading.report(len(batch))
    reading.report(len(reading.responses) - len(indices))


def _read_shared(reading: _Reading, members: Sequence[int], rows: Sequence[Sequence[int]]) -> None:
    """Fill ``logprobs`` for the responses ``members``, predicted from ``rows``, as if each were read by itself."""
    import torch

    from align.models.fast.ragged_rows import to_device
    from align.models.fast.shared_parts import share_prefixes

    device = next(reading.model.parameters()).device
    line, places = share_prefixes(rows)
    # (place, token) of each prediction, and its number. Rows in the same place with the same next token share it.
    numbers: dict[tuple[int, int], int] = {}
    predictions = []
    for index, row_places in zip(members, places, strict=True):
        response = reading.responses[index]
        # The last places of a row predict its response: each one the token after it.
        pairs = zip(row_places[-len(response) :], response, strict=True)
        predictions.append([numbers.setdefault(pair, len(numbers)) for pair in pairs])
    keep, targets = (torch.tensor(list(values), device=device) for values in zip(*numbers, strict=True))
    batch = line.batch()
    inputs = batch["input_ids"].to(device), batch["position_ids"].to(device), to_device(batch["layout"], device)
    values = _predict(reading, inputs, keep, targets)
    for index, indices in zip(members, predictions, strict=True):
        reading.logprobs[index] = [values[number] for number in indices]


def _predict(reading: _Reading, inputs: tuple[Any, Any, Any], keep: Any, targets: Any) -> list[float]:
    """Return the log-probabilities of ``targets`` (N,), predicted from places ``keep`` (N,) of a line of tokens.

    ``inputs`` are the line's token ids and positions, (1, L) each, and its layout.
    """
    import torch

    from align.models.fast.ragged_rows import hidden_states
    from align.models.fast.token_logprobs import token_logprobs

    model = reading.model
    ids, position_ids, layout = inputs
    if _has_plain_head(model):
        states = hidden_states(getattr(model, model.base_model_prefix), ids, position_ids, layout)[keep]
        values, _ = token_logprobs(states, model.get_output_embeddings(), targets, reading.temperature)
        logprobs: list[float] = values.tolist()
        return logprobs
    # The model's own head, with any scaling or capping it has. Several tokens may follow one place.
    places, rows = keep.unique(return_inverse=True)
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),  # as ragged_rows.hidden_states
        position_ids=position_ids,
        use_cache=False,
        layout=layout,
        logits_to_keep=places,
    ).logits[0]  # (M, V)
    return _chosen_logprobs(logits, targets, reading.temperature, rows)


def _has_plain_head(model: nn.Module) -> bool:
    """Return True for a model type whose logits are known to be its head's product with the trunk's states."""
    from align.models.fast.shared_parts import SPLITTABLE

    return getattr(model.config, "model_type", "") in SPLITTABLE


def _chosen_logprobs(logits: Any, targets: Any, temperature: float, rows: Any = None) -> list[float]:
    """Log-probability of each of the (N,) ``targets``; the softmax is computed in float32.

    Target i is predicted by row i of the (N, V) logits, or by row ``rows[i]`` of (M, V) ones.
    """
    import torch

    values: list[float] = []
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    # In blocks: float32 logits of all positions at once would not fit in memory.
    for row_block, target_block in zip(rows.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        scaled = logits[row_block].float() / temperature
        values += (scaled.gather(1, target_block[:, None])[:, 0] - scaled.logsumexp(dim=-1)).tolist()
    return values


def _batches(lengths: Mapping[int, int]) -> Iterator[list[int]]:
    """Yield indices grouped by length, at most ``READ_TOKENS`` tokens with padding per batch (or one long row)."""
    batch: list[int] = []
    for index in sorted(lengths, key=lambda i: -lengths[i]):
        # The first row is the longest, so it sets the width that all rows are padded to.
        if batch and (len(batch) + 1) * lengths[batch[0]] > READ_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def heldout_losses(
    logprobs_of: LogprobsOf, tokenizer: Any, rows: Sequence[Row], max_length: int
) -> tuple[list[int], list[float], list[int]]:
    """Loss per token of each row's reference answer, as in SFT: with its end of turn unless it was cut off.

    Only turns of the assistant count: not what tools and users write, and no turn with ``train: False``.

    Returns:
        The indices of the rows that fit ``max_length`` tokens, their loss per token in nats, and their tokens.
    """
    reads = {index: _heldout_reads(tokenizer, row, max_length) for index, row in enumerate(rows)}
    indices = [index for index in reads if reads[index]]
    # All answers are read in one call, and their log-probabilities come back in this order.
    flat = [read for index in indices for read in reads[index]]
    logprobs = iter(logprobs_of([prompt for prompt, _, _ in flat], [answer for _, answer, _ in flat]))
    losses = []
    tokens = []
    for index in indices:
        counted: list[float] = []
        for _, _, mask in reads[index]:
            counted += [value for value, counts in zip(next(logprobs), mask, strict=True) if counts]
        losses.append(-sum(counted) / len(counted))
        tokens.append(len(counted))
    return indices, losses, tokens


def check_heldout(tokenizer: Any, rows: Sequence[Row], max_length: int) -> None:
    """Raise ``UserError`` if :func:`heldout_losses` would leave out every row."""
    if not any(_heldout_reads(tokenizer, row, max_length) for row in rows):
        raise UserError(
            f"heldout: none of {len(rows)} rows has a turn to train on and fits max_heldout_length={max_length} "
            "tokens; raise it."
        )


def _heldout_reads(tokenizer: Any, row: Row, max_length: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Return prompts, answers, and 1 for each token of an answer that counts; an empty list for a skipped row.

    There is one answer, or an answer for each turn if the template rewrites earlier turns.
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
    """Checkpoints for forward passes, one at a time. Checkpoints with equal weights are loaded once.

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
        from align.models.compute.precision import cast_frozen_to_bf16, low_residual
        from align.models.loading import load_policy

        policy = self.policies[name]
        if policy.key not in self.models:
            self.models.clear()  # before the next one is loaded: the memory holds one
            model = load_policy(policy.model_dir).requires_grad_(False)
            if self.precision == "bfloat16":
                low_residual(model)
                cast_frozen_to_bf16(model)
            self.models[policy.key] = model.to(self.device)
        return self.models[policy.key]
