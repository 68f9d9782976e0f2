"""From ragged token lists to the tensors of one micro-batch, and which responses go into which.

``ragged``: rows stand end to end in one line of tokens, without padding (``align.models.fast.ragged_rows``).
``shared``: so they do, and what is the same stands there once: the prompt of several responses to it, and the tokens
that all prompts begin with, such as a template's system message. A response attends to its prompt and to itself; with n
samples per prompt that saves n - 1 passes over the prompt.
``padded``: for models that cannot do that, one right-padded row per response;
causal, so padding is never attended to. The form changes no number beyond rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from align.models.fast.prefix_batch import Line, in_common
from align.rl.masking import response_mask

Form = Literal["shared", "ragged", "padded"]
Batch = dict[str, Any]
"""``input_ids`` (R, L), of ragged rows (1, N) with ``position_ids`` (1, N) and a ``layout``; ``positions`` (B, T+1):
index into the flattened tokens of the state before each response token, and of the last token; ``targets`` (B, T);
``response_mask`` (B, T)."""

TokenLists = Sequence[Sequence[int]]


def pack(prompts: TokenLists, responses: TokenLists, groups: Sequence[int], pad_id: int, form: Form) -> Batch:
    """Tensors of a micro-batch of B responses; ``groups[i]`` is equal for responses whose prompt is the same."""
    ends = torch.zeros(len(responses), dtype=torch.long)  # where the state before a response is: its prompt's end
    starts = torch.zeros(len(responses), dtype=torch.long)
    if form == "padded":
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        longest = max(map(len, rows))
        made: Batch = {"input_ids": torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])}
        starts += torch.tensor([i * longest + len(prompt) for i, prompt in enumerate(prompts)])
        ends += starts - 1
    else:
        line = Line()
        _fill(line, prompts, responses, _rows(groups, form == "shared"), form == "shared", starts, ends)
        made = line.batch()
    width = max(map(len, responses))
    positions = torch.zeros(len(responses), width + 1, dtype=torch.long)
    targets = torch.zeros(len(responses), width, dtype=torch.long)
    for i, response in enumerate(responses):
        positions[i, 0] = ends[i]
        positions[i, 1 : len(response) + 1] = starts[i] + torch.arange(len(response))
        targets[i, : len(response)] = torch.tensor(response)
    mask = response_mask([len(response) for response in responses])
    return {"positions": positions, "targets": targets, "response_mask": mask, **made}


def _fill(
    line: Line, prompts: TokenLists, responses: TokenLists, rows: list[list[int]], share: bool,
    starts: torch.Tensor, ends: torch.Tensor,
) -> None:  # fmt: skip
    """Put the rows into the line, and where each response starts and its prompt ends into ``starts`` and ``ends``."""
    shared = in_common([prompts[row[0]] for row in rows]) if share else 0
    beginning = line.add(prompts[rows[0][0]][:shared]) if shared else None
    for row in rows:
        own = prompts[row[0]][shared:]
        alone = [*own, *responses[row[0]]] if len(row) == 1 else own
        prompt = line.add(alone, beginning)
        for i in row:
            ends[i] = line.starts[prompt] + len(own) - 1
            starts[i] = ends[i] + 1 if len(row) == 1 else line.starts[line.add(responses[i], prompt)]


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
