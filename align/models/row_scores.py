"""Numbers that models give to rows of data: a reward, a perplexity, an instruction-following difficulty.

Called by the data step ``score``. Left out: which rows are kept for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from align.data.rows import Row, answer_side, is_finished
from align.models.loading import load_policy, load_tokenizer
from align.models.precision import autocast
from align.models.render import render_conversation, render_prompt
from align.models.reward import RewardModel

Scorer = Callable[[list[Row]], list[float]]


def make_scorer(config: Any, folder: Path, device: str) -> Scorer:
    """The scorer that a ``ScoreConfig`` asks for, its model loaded from ``folder``."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if config.by == "reward":
        return _Reward(folder, chosen, config)
    return _Likelihood(folder, chosen, config, alone=config.by == "ifd")


def reply(row: Row) -> str | None:
    """The text that is scored: the completion, or the chosen reply; None for a row that has neither."""
    answer = row.get(answer_side(row))
    return str(answer[-1]["content"]) if answer else None


class _Reward:
    def __init__(self, folder: Path, device: str, config: Any) -> None:
        self.model = RewardModel(folder, device=device, precision=config.precision, batch_size=config.batch_size)

    def __call__(self, rows: list[Row]) -> list[float]:
        with_reply = [row for row in rows if reply(row) is not None]
        finished = [is_finished(row, answer_side(row)) for row in with_reply]
        prompts, texts = [row["prompt"] for row in with_reply], [reply(row) or "" for row in with_reply]
        scores = iter(self.model.score(prompts, texts, finished, [row.get("tools") for row in with_reply]))
        return [next(scores) if reply(row) is not None else math.nan for row in rows]


class _Likelihood:
    """Perplexity of the reply given the prompt; over that of the reply alone, with ``alone``."""

    def __init__(self, folder: Path, device: str, config: Any, alone: bool) -> None:
        self.tokenizer = load_tokenizer(folder)
        model = load_policy(folder).to(device).eval()
        self._trunk, self._head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
        self.device, self.precision, self.batch_size = device, config.precision, config.batch_size
        self.max_length, self.alone = config.max_length, alone

    def __call__(self, rows: list[Row]) -> list[float]:
        texts: list[tuple[list[int], int]] = []  # ids, and how many of them are read but not scored
        places: list[list[int]] = []
        for row in rows:
            made = self._texts(row)
            places.append(list(range(len(texts), len(texts) + len(made))))
            texts += made
        losses = self._losses(texts)
        found = []
        for mine in places:
            values = [losses[place] for place in mine]
            if not values:
                found.append(math.nan)
            else:  # a difference of logarithms rather than a ratio of exponentials, which overflow
                found.append(math.exp(min(values[0] - (values[1] if self.alone else 0.0), 700.0)))
        return found

    def _texts(self, row: Row) -> list[tuple[list[int], int]]:
        text = reply(row)
        if not text:
            return []
        messages = [*row["prompt"], {"role": "assistant", "content": text}]
        tools = row.get("tools")
        prompt = render_prompt(self.tokenizer, row["prompt"], tools)
        whole = render_conversation(self.tokenizer, messages, is_finished(row, answer_side(row)), tools)
        answer = whole[len(prompt) :]
        if len(prompt) + 1 >= self.max_length or not answer:
            return []
        conditioned = (whole[: self.max_length], len(prompt))
        if not self.alone:
            return [conditioned]
        # The reply alone begins after whatever opens a text for this model, so that its first token is scored too.
        start = self.tokenizer.bos_token_id
        begin = prompt[:1] if start is None else [start]
        return [conditioned, ([*begin, *answer[: len(conditioned[0]) - len(prompt)]], 1)]

    def _losses(self, texts: list[tuple[list[int], int]]) -> list[float]:
        """Mean negative log-likelihood of each text's scored tokens, in nats."""
        order = sorted(range(len(texts)), key=lambda place: len(texts[place][0]))
        found = [math.nan] * len(texts)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for place, loss in zip(batch, self._batch([texts[place] for place in batch]), strict=True):
                found[place] = loss
        return found

    @torch.no_grad()
    def _batch(self, texts: list[tuple[list[int], int]]) -> list[float]:
        width = max(len(ids) for ids, _ in texts)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row, _ in texts], device=self.device)  # (B, T)
        scored = torch.tensor([[skip <= at < len(row) for at in range(1, width)] for row, skip in texts])  # (B, T-1)
        with autocast(self.device, self.precision):
            hidden = self._trunk(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # (B, T-1, H)
        scored = scored.to(self.device)
        with autocast(self.device, self.precision):
            logits = self._head(hidden[scored])  # only of tokens that count: (N, V)
        losses = F.cross_entropy(logits.float(), ids[:, 1:][scored], reduction="none")
        sums = losses.new_zeros(len(texts)).index_add_(0, scored.nonzero()[:, 0], losses)
        means: list[float] = (sums / scored.sum(dim=1)).tolist()
        return means
