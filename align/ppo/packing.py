"""From ragged token lists to the tensors of one micro-batch, and which responses go into which.

Rows are right-padded and causal, so padding is never attended to and needs no mask. Responses to the same prompt share
it: ``prompt, response 1, response 2, ...`` is one row in which a response attends to the prompt and to itself. With n
samples per prompt that saves n - 1 passes over the prompt and changes no number beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from align.ppo.masking import response_mask

Batch = dict[str, torch.Tensor]
"""``input_ids`` (R, L); for shared rows ``position_ids`` (R, L) and ``attention_mask`` (R, 1, L, L) bool, True where a
query may look; ``positions`` (B, T+1): index into the flattened R x L of the state before each response token, and
of the last token; ``targets`` (B, T); ``response_mask`` (B, T). R rows hold B >= R responses."""

TokenLists = Sequence[Sequence[int]]


def pack(prompts: TokenLists, responses: TokenLists, groups: Sequence[int], pad_id: int, *, share: bool) -> Batch:
    """Tensors of a micro-batch of B responses; ``groups[i]`` is equal for responses whose prompt is the same.

    Nothing is shared when ``share`` is False or no group has two members; the mask of all then stays implicit.
    """
    members = _rows(groups, share)
    rows = [[*prompts[row[0]], *(token for i in row for token in responses[i])] for row in members]
    length, width = max(map(len, rows)), max(map(len, responses))
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    segments = torch.full((len(rows), length), -1, dtype=torch.long)  # 0 prompt, k the row's k-th response, -1 padding
    position_ids = torch.zeros(len(rows), length, dtype=torch.long)
    positions = torch.zeros(len(responses), width + 1, dtype=torch.long)
    targets = torch.zeros(len(responses), width, dtype=torch.long)
    for r, row in enumerate(members):
        prompt = len(prompts[row[0]])
        input_ids[r, : len(rows[r])] = torch.tensor(rows[r])
        segments[r, :prompt] = 0
        position_ids[r, :prompt] = torch.arange(prompt)
        start = prompt
        for k, i in enumerate(row, start=1):
            end = start + len(responses[i])
            segments[r, start:end] = k
            position_ids[r, start:end] = torch.arange(prompt, prompt + end - start)
            positions[i, 0] = r * length + prompt - 1  # the state before the first token is the end of the prompt
            positions[i, 1 : end - start + 1] = r * length + torch.arange(start, end)
            targets[i, : end - start] = torch.tensor(responses[i])
            start = end
    batch = {
        "input_ids": input_ids,
        "positions": positions,
        "targets": targets,
        "response_mask": response_mask([len(response) for response in responses]),
    }
    if len(members) < len(responses):
        batch |= {"position_ids": position_ids, "attention_mask": _shared_mask(segments)}
    return batch


def _rows(groups: Sequence[int], share: bool) -> list[list[int]]:
    if not share:
        return [[i] for i in range(len(groups))]
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return list(members.values())


def _shared_mask(segments: torch.Tensor) -> torch.Tensor:
    """Causal, and only within one's own segment or into the prompt; (R, 1, L, L) bool."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])  # (R, query, key)
    return (visible & causal)[:, None]


def plan(
    groups: Sequence[int],
    lengths: Sequence[int],
    *,
    num_mini_batches: int,
    micro_batch_size: int,
    generator: torch.Generator,
) -> list[list[list[int]]]:
    """Response indices of each micro-batch of each mini-batch of one epoch.

    Prompts are shuffled over the whole rollout, a prompt's responses staying together; inside a mini-batch,
    micro-batches are of similar length, so that little is padded. ``lengths[i]`` counts the tokens of
    prompt and response i.
    """
    members = _rows(groups, share=True)
    order = [i for g in torch.randperm(len(members), generator=generator).tolist() for i in members[g]]
    size = len(order) // num_mini_batches
    planned = []
    for start in range(0, len(order), size):
        mini = order[start : start + size]
        rows = [[mini[j] for j in row] for row in _rows([groups[i] for i in mini], share=True)]
        rows.sort(key=lambda row: sum(lengths[i] for i in row))
        flat = [i for row in rows for i in row]
        planned.append([flat[at : at + micro_batch_size] for at in range(0, len(flat), micro_batch_size)])
    return planned
