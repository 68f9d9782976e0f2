"""Supervised texts mixed into the updates, against forgetting (InstructGPT's PPO-ptx, arXiv 2203.02155).

The rows are part of the policy's own forward pass, behind the responses. The term is ``ptx_coef`` times their mean loss
per answer token: SFT's loss, at temperature 1 for any sampling temperature. The paper's gamma multiplies a sum of
gradients per episode instead, so its 27.8 does not carry over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from align.data.rows import answer_side
from align.errors import UserError
from align.models.chat.answer_tokens import answer_turns, split_answer, split_turns
from align.rl.prompts import derive_seed
from align.rl.rollout import Text

if TYPE_CHECKING:
    from align.config.stages.rl import RolloutFields


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
        texts: list[Text] = []
        start = step * count
        while len(texts) < count:
            epoch, offset = divmod(start + len(texts), len(self.texts))
            generator = torch.Generator().manual_seed(derive_seed(seed, "ptx", epoch))
            order = torch.randperm(len(self.texts), generator=generator).tolist()
            texts += [self.texts[i] for i in order[offset : offset + count - len(texts)]]
        return texts


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
