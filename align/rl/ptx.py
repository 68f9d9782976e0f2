"""Mixing in supervised text, so that the policy does not forget what it knew (InstructGPT's PPO-ptx, arXiv 2203.02155).

The rows ride along in PPO's own forward pass, behind the responses. The term is ``ptx_coef`` times their mean loss per
answer token, SFT's own: at temperature 1, whatever responses are sampled at. The paper's gamma multiplies a sum of
gradients per episode instead, so its 27.8 does not carry over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from align.data.rows import answer_side
from align.errors import UserError
from align.rl.prompts import derive_seed
from align.training.rows import split_answer

if TYPE_CHECKING:
    from align.rl.arguments import RolloutArguments

Text = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer, with an end of turn unless it was cut off."""


class PtxRows:
    """Rows with ``prompt`` and ``completion`` (or ``chosen``), tokenized, drawn by step from the seed alone."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int) -> None:
        """``dropped`` counts rows longer than ``max_length`` tokens; ``UserError`` when none is left."""
        self.texts: list[Text] = []
        self.dropped = 0
        for row in rows:
            if not row.get(answer_side(row)):
                raise UserError(f"a ptx row needs a 'prompt' and a 'completion'; found {sorted(row)}.")
            prompt, completion = split_answer(tokenizer, row)
            if len(prompt) + len(completion) > max_length:
                self.dropped += 1
            else:
                self.texts.append((prompt, completion))
        if not self.texts:
            raise UserError(
                f"no ptx row is left: {self.dropped} are longer than max_prompt_tokens + max_tokens, {max_length}."
            )

    def draw(self, step: int, count: int, seed: int) -> list[Text]:
        """``count`` rows of the endless sequence of shuffled epochs, for optimizer step ``step``."""
        drawn: list[Text] = []
        start = step * count
        while len(drawn) < count:
            epoch, offset = divmod(start + len(drawn), len(self.texts))
            generator = torch.Generator().manual_seed(derive_seed(seed, "ptx", epoch))
            order = torch.randperm(len(self.texts), generator=generator).tolist()
            drawn += [self.texts[i] for i in order[offset : offset + count - len(drawn)]]
        return drawn


def make_ptx(args: RolloutArguments, rows: Iterable[Mapping[str, Any]] | None, tokenizer: Any) -> PtxRows | None:
    """The texts that ``ptx_coef`` asks for; ``ValueError`` when none are given."""
    if not args.ptx_coef:
        return None
    if rows is None:
        raise ValueError("ptx_coef is set, but no ptx_dataset is given.")
    return PtxRows(rows, tokenizer, (args.max_prompt_tokens or 1024) + args.max_tokens)


def take_out(
    out: dict[str, torch.Tensor], batch: Mapping[str, torch.Tensor], width: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, float]:
    """Part a forward pass's outputs into PPO's, (B, ``width``), and the texts' summed loss with its token count."""
    count = int(batch.get("ptx", 0))
    if count == 0:
        return out, None, 0.0
    own = {"values": out["values"][:, : width + 1]} if "values" in out else {}
    if "logprobs" not in out:  # only the critic learns yet
        return own, None, 0.0
    mask = batch["response_mask"][-count:]
    loss = -(out["logprobs"][-count:] * mask).sum()
    own |= {name: out[name][:-count, :width] for name in ("logprobs", "entropy")}
    return own, loss, float(mask.sum())
