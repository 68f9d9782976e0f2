"""Tensors of a micro-batch from token lists of different lengths, and the assignment of responses to micro-batches.

``ragged``: rows follow each other in one line of tokens, without padding (``align.models.fast.ragged_rows``).
``shared``: likewise, and the common prefixes of rows are there once: the prompt of several responses to it, and the
tokens that all prompts begin with, such as a template's system message. A response attends to its prompt and to itself.
With n samples per prompt this saves n - 1 passes over the prompt.
``padded``: one right-padded row per response, for models that support neither. They are causal, so no real token
attends to padding. The form changes results by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from align.models.fast.shared_parts import PrefixBatch, common_prefix
from align.rl.masking import pad_rows, response_mask

Form = Literal["shared", "ragged", "padded"]
Batch = dict[str, Any]
"""``input_ids`` (R, L), of ragged rows (1, N) with ``position_ids`` (1, N) and a ``layout``; ``positions`` (B, T+1):
index into the flattened tokens of the state before each response token, and of the last token; ``targets`` (B, T);
``response_mask`` (B, T)."""

TokenLists = Sequence[Sequence[int]]


def pack(
    prompts: TokenLists,
    responses: TokenLists,
    groups: Sequence[int],
    pad_id: int,
    form: Form,
    *,
    masks: Sequence[Sequence[bool]] | None = None,
) -> Batch:
    """Return the tensors of a micro-batch of B responses; ``groups[i]`` is equal for responses to the same prompt.

    ``masks`` are False on the tokens of episodes that the policy did not sample, which are only inputs of the model.
    """
    if form == "padded":
        inputs, prompt_ends, starts = _pad(prompts, responses, pad_id)
    else:
        inputs, prompt_ends, starts = _lay_out(prompts, responses, groups, share=form == "shared")
    width = max(map(len, responses))
    positions = torch.zeros(len(responses), width + 1, dtype=torch.long)
    targets = torch.zeros(len(responses), width, dtype=torch.long)
    for i, response in enumerate(responses):
        # The state at a position predicts the next token: the prompt's end predicts the response's first token.
        positions[i, 0] = prompt_ends[i]
        positions[i, 1 : len(response) + 1] = starts[i] + torch.arange(len(response))
        targets[i, : len(response)] = torch.tensor(response)
    if masks is None:
        mask = response_mask([len(response) for response in responses])
    else:
        mask = pad_rows(masks, width, torch.bool)
    return {"positions": positions, "targets": targets, "response_mask": mask, **inputs}


def _pad(prompts: TokenLists, responses: TokenLists, pad_id: int) -> tuple[Batch, list[int], list[int]]:
    """Return right-padded inputs, and the ends of prompts and starts of responses in the flattened tokens."""
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    input_ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    starts = [i * width + len(prompt) for i, prompt in enumerate(prompts)]
    return {"input_ids": input_ids}, [start - 1 for start in starts], starts


def _lay_out(
    prompts: TokenLists, responses: TokenLists, groups: Sequence[int], share: bool
) -> tuple[Batch, list[int], list[int]]:
    """Return inputs without padding, and the ends of prompts and starts of responses in them.

    With ``share`` the tokens that all prompts begin with come first, then each prompt's rest, which attends to them,
    and behind it the responses to it. A prompt with a single response is one row together with it.
    """
    line = PrefixBatch()
    # One row per prompt: its rest, then the responses, each of which attends to prefix, rest and itself.
    rows = group_members(groups) if share else [[i] for i in range(len(groups))]
    prefix_length = common_prefix([prompts[row[0]] for row in rows]) if share else 0
    prefix = line.add(prompts[rows[0][0]][:prefix_length]) if prefix_length else None
    prompt_ends = [0] * len(responses)
    starts = [0] * len(responses)
    for row in rows:
        rest = prompts[row[0]][prefix_length:]
        is_alone = len(row) == 1  # one sequence is cheaper than two that attend to each other
        prompt = line.add([*rest, *responses[row[0]]] if is_alone else rest, prefix)
        for i in row:
            prompt_ends[i] = line.starts[prompt] + len(rest) - 1
            if is_alone:
                starts[i] = prompt_ends[i] + 1
            else:
                starts[i] = line.starts[line.add(responses[i], prompt)]
    return line.batch(), prompt_ends, starts


def group_members(groups: Sequence[int]) -> list[list[int]]:
    """Return the indices of the responses of each group, in the order in which the groups first appear."""
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    return list(members.values())


def plan(
    groups: Sequence[int],
    lengths: Sequence[int],
    *,
    num_mini_batches: int,
    generator: torch.Generator,
) -> list[list[int]]:
    """Return the response indices of each mini-batch of one epoch.

    Prompts are shuffled over the entire rollout, and the responses to a prompt stay together. Inside a mini-batch,
    responses of similar length follow each other, which keeps the padding of micro-batches small. ``lengths[i]`` counts
    the tokens of prompt and response i.
    """
    members = group_members(groups)
    # Groups are shuffled, not responses: a micro-batch then computes a prompt once for several of its responses.
    order = [i for group in torch.randperm(len(members), generator=generator).tolist() for i in members[group]]
    size = len(order) // num_mini_batches
    mini_batches = []
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        # Whole groups are sorted by their tokens, so the responses to one prompt stay neighbors.
        rows = [[indices[i] for i in row] for row in group_members([groups[i] for i in indices])]
        rows.sort(key=lambda row: sum(lengths[i] for i in row))
        mini_batches.append([i for row in rows for i in row])
    return mini_batches
