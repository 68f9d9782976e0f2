"""The prompts of a run, and supervised texts mixed into its updates.

Prompts are rendered once, then drawn epoch after epoch in an order that depends only on the seed. The prompts of an
update depend only on the seed and the update, so a resumed run needs no loader state.

Supervised texts reduce forgetting (InstructGPT's PPO-ptx, arXiv 2203.02155). They are part of the policy's own forward
pass, behind the responses. The term is ``ptx_coef`` times their mean loss per answer token: SFT's loss, at temperature
1 for any sampling temperature. The paper's gamma multiplies a sum of gradients per episode instead, so its 27.8 does
not carry over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from align.data.rows import answer_side
from align.errors import UserError
from align.inference.thoughts import ThoughtReader
from align.models.chat.render import answer_turns, render_prompt, split_answer, split_turns
from align.training.row_history import Continuation

if TYPE_CHECKING:
    from align.config.stages.rl import RolloutFields

Row = dict[str, Any]
Text = tuple[list[int], list[int]]
"""Token ids of a supervised text's prompt and of its answer, with an end of turn unless it was cut off."""


def derive_seed(*parts: int | str) -> int:
    """Return a seed below 2**31 from any parts; equal parts give equal seeds, similar parts unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def shuffled_epochs(size: int, start: int, count: int, *seed: int | str) -> list[int]:
    """Return items ``start`` to ``start + count`` of an endless sequence of shuffled epochs over ``size`` rows."""
    indices: list[int] = []
    while len(indices) < count:
        # Shuffle each epoch by its own seed, so any position is available without the epochs before it.
        epoch, offset = divmod(start + len(indices), size)
        generator = torch.Generator().manual_seed(derive_seed(*seed, epoch))
        order = torch.randperm(size, generator=generator).tolist()
        indices += order[offset : offset + count - len(indices)]
    return indices


class Prompts:
    """Rows with a ``prompt`` (a text, or messages ending with a user turn) and their token ids.

    Raises ``UserError`` when no row is usable. ``dropped`` counts the prompts longer than ``max_length``.
    """

    continuation: Continuation | None = None
    """Order of a run that continues another with other prompts."""

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        max_length: int | None,
    ) -> None:
        """Render the rows.

        Args:
            rows: Rows with a ``prompt``.
            tokenizer: The policy's tokenizer.
            max_length: Longer prompts are skipped and counted; None for no limit.
        """
        self.rows: list[Row] = []
        self.token_ids: list[list[int]] = []
        self.reader = ThoughtReader(tokenizer)
        """Finds the thoughts in responses to these prompts."""
        self.dropped = 0
        for row in rows:
            ids = _token_ids(row, tokenizer)
            if max_length is not None and len(ids) > max_length:
                self.dropped += 1
                continue
            self.rows.append(dict(row))
            self.token_ids.append(ids)
        if not self.rows:
            raise UserError(
                f"no prompt is left to train on ({self.dropped} were longer than max_prompt_tokens {max_length}); "
                "check the prompts' split or raise max_prompt_tokens."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def next(self, numbers: range, seed: int) -> list[int]:
        """Return the indices of the prompts ``numbers`` of the run: of the endless sequence, or its continuation."""
        continuation = self.continuation
        if continuation is None or numbers.start < continuation.start:
            return self.draw(numbers.start, len(numbers), seed)
        # A run that continues another with other prompts: those that are new to it, then epochs over all.
        start = numbers.start - continuation.start
        indices = continuation.first[start : start + len(numbers)]
        # The epochs over all prompts begin behind the new prompts.
        after = max(0, start - len(continuation.first))
        return indices + self.draw(after, len(numbers) - len(indices), seed)

    def draw(self, start: int, count: int, seed: int) -> list[int]:
        """Return the indices of prompts ``start`` to ``start + count`` of the endless sequence of shuffled epochs."""
        return shuffled_epochs(len(self), start, count, seed, "prompts")


def _token_ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    elif isinstance(prompt, list) and prompt:
        ids = render_prompt(tokenizer, prompt, row.get("tools"))
    else:
        raise UserError(f"a row's 'prompt' should be a text or a list of messages; found {prompt!r}.")
    if not ids:
        raise UserError("a prompt has no tokens; remove empty prompts.")
    return ids


class PtxRows:
    """Tokenized rows with ``prompt`` and ``completion`` (or ``chosen``), drawn by step from the seed only."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int) -> None:
        """``dropped`` counts texts longer than ``max_length`` tokens. Raises ``UserError`` when no row is left."""
        self.texts: list[Text] = []
        self.dropped = 0
        for row in rows:
            if not row.get(answer_side(row)):
                raise UserError(f"a ptx row needs a 'prompt' and a 'completion'; found {sorted(row)}.")
            for prompt, completion in _split_row(tokenizer, row):
                if len(prompt) + len(completion) > max_length:
                    self.dropped += 1
                else:
                    self.texts.append((prompt, completion))
        if not self.texts:
            raise UserError(
                f"no ptx row is left: {self.dropped} are longer than max_prompt_tokens + max_tokens, {max_length}."
            )

    def draw(self, step: int, count: int, seed: int) -> list[Text]:
        """Return ``count`` rows of the endless sequence of shuffled epochs, for optimizer step ``step``."""
        return [self.texts[i] for i in shuffled_epochs(len(self.texts), step * count, count, seed, "ptx")]


def _split_row(tokenizer: Any, row: Mapping[str, Any]) -> list[Text]:
    """Return the texts of a row: one text, or a text for each turn of the assistant if the answer calls tools."""
    side = answer_side(row)
    if len(row[side]) == 1:
        return [split_answer(tokenizer, row)]
    # A text is learned as a whole, so the output of tools may only be before it.
    places = answer_turns([*row["prompt"], *row[side]], len(row["prompt"]))
    return split_turns(tokenizer, row, side, places)


def make_ptx(config: RolloutFields, rows: Iterable[Mapping[str, Any]] | None, tokenizer: Any) -> PtxRows | None:
    """Return the texts that ``ptx_coef`` asks for, None if it is 0. Raises ``ValueError`` without rows."""
    if not config.ptx_coef:
        return None
    if rows is None:
        raise ValueError("ptx_coef is set, but no ptx_dataset is given.")
    return PtxRows(rows, tokenizer, config.max_prompt_tokens + config.max_tokens)


def split_outputs(
    outputs: dict[str, torch.Tensor], batch: Mapping[str, torch.Tensor], width: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, float]:
    """Split a forward pass into the responses' outputs and the supervised texts' loss.

    Returns the outputs, (B, ``width``) and ``values`` (B, ``width`` + 1); the texts' summed loss, a scalar, None if
    there are none; and their number of tokens.
    """
    count = int(batch.get("ptx", 0))
    if count == 0:
        return outputs, None, 0.0
    responses = {"values": outputs["values"][:, : width + 1]} if "values" in outputs else {}
    if "logprobs" not in outputs:  # only the critic learns yet
        return responses, None, 0.0
    mask = batch["response_mask"][-count:]
    loss = -(outputs["logprobs"][-count:] * mask).sum()
    # Texts may be longer than the responses, so the outputs are cut to the responses' width.
    responses |= {name: outputs[name][:-count, :width] for name in ("logprobs", "entropy")}
    return responses, loss, float(mask.sum())
