"""From ragged token lists to the tensors of one micro-batch, and which responses go into which.

``ragged``: rows stand end to end in one line of tokens, without padding (``align.models.ragged``). ``shared``: so they
do, and responses to the same prompt share it: ``prompt, response 1, response 2, ...`` is one row, in which a response
attends to the prompt and to itself; with n samples per prompt that saves n - 1 passes over the prompt. ``padded``: for
models that cannot do that, one right-padded row per response; causal, so padding is never attended to. The form changes
no number beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from align.models.ragged import lay_out
from align.ppo.masking import response_mask

Form = Literal["shared", "ragged", "padded"]
Batch = dict[str, Any]
"""``input_ids`` (R, L), of ragged rows (1, N) with ``position_ids`` (1, N) and a ``layout``; ``positions`` (B, T+1):
index into the flattened tokens of the state before each response token, and of the last token; ``targets`` (B, T);
``response_mask`` (B, T)."""

TokenLists = Sequence[Sequence[int]]


def pack(prompts: TokenLists, responses: TokenLists, groups: Sequence[int], pad_id: int, form: Form) -> Batch:
    """Tensors of a micro-batch of B responses; ``groups[i]`` is equal for responses whose prompt is the same."""
    members = _rows(groups, form == "shared")
    rows = [[*prompts[row[0]], *(token for i in row for token in responses[i])] for row in members]
    longest, width = max(map(len, rows)), max(map(len, responses))
    positions = torch.zeros(len(responses), width + 1, dtype=torch.long)
    targets = torch.zeros(len(responses), width, dtype=torch.long)
    places: list[list[int]] = []  # of each row's tokens, within its sequence
    parts: list[list[int]] = []  # 0 for the prompt, k for the row's k-th response
    offset = 0
    for r, row in enumerate(members):
        start = prompt = len(prompts[row[0]])
        places.append(list(range(prompt)))
        parts.append([0] * prompt)
        for k, i in enumerate(row, start=1):
            size = len(responses[i])
            places[r] += range(prompt, prompt + size)
            parts[r] += [k] * size
            positions[i, 0] = offset + prompt - 1  # the state before the first token is the end of the prompt
            positions[i, 1 : size + 1] = offset + torch.arange(start, start + size)
            targets[i, :size] = torch.tensor(responses[i])
            start += size
        offset += longest if form == "padded" else len(rows[r])
    batch: Batch = {
        "positions": positions,
        "targets": targets,
        "response_mask": response_mask([len(response) for response in responses]),
    }
    if form == "padded":
        return batch | {"input_ids": torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])}
    return batch | {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([[place for row in places for place in row]]),
        "layout": lay_out([len(row) for row in rows], parts if len(members) < len(responses) else None),
    }


def _rows(groups: Sequence[int], share: bool) -> list[list[int]]:
    if not share:
        return [[i] for i in range(len(groups))]
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    return list(members.values())


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
