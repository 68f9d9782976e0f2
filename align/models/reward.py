"""Scoring responses with a trained reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from align.models.loading import load_reward, load_tokenizer
from align.models.precision import Precision, autocast, round_frozen
from align.models.ragged import can_run_ragged, hidden_states, lay_out, run_ragged, to_device
from align.models.render import Message, render_conversation


class RewardModel:
    """One score per response, read at the last token of the conversation, as the reward model was trained."""

    def __init__(
        self, model_dir: Path, device: Any = "cpu", precision: Precision = "bfloat16", batch_size: int = 32
    ) -> None:
        """Load the model. Raises ``UserError`` for a checkpoint without a score head."""
        self.tokenizer = load_tokenizer(model_dir)
        self.model = load_reward(model_dir).to(device).requires_grad_(False)
        self.device = torch.device(device)
        self.precision = precision
        self.batch_size = batch_size
        self._ragged = can_run_ragged(self.model)
        if self._ragged:
            run_ragged(self.model)

    def round_weights(self) -> None:
        """Keep the trunk in bfloat16, where that is what it computes in: half the memory; scores move by rounding."""
        if self.precision == "bfloat16":
            round_frozen(getattr(self.model, self.model.base_model_prefix))

    def score(
        self,
        prompts: list[list[Message]],
        responses: list[str],
        finished: list[bool] | None = None,
        tools: list[str | None] | None = None,
    ) -> list[float]:
        """Scores of ``responses[i]`` as the assistant's answer to ``prompts[i]``, with this model's own template.

        Answers that are not ``finished`` (cut off at their length limit) are read without the end-of-turn token, which
        the policy did not write; all are taken as finished when it is None. ``tools`` are those of each prompt's row.
        """
        ended = finished if finished is not None else [True] * len(responses)
        offered = tools if tools is not None else [None] * len(responses)
        rows = [
            render_conversation(self.tokenizer, [*prompt, {"role": "assistant", "content": response}], one_ended, own)
            for prompt, response, one_ended, own in zip(prompts, responses, ended, offered, strict=True)
        ]
        return self.score_tokens(rows)

    @torch.inference_mode()
    def score_tokens(self, rows: list[list[int]]) -> list[float]:
        """Scores of rendered conversations, in the order given; rows of like length are read together."""
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for index, value in zip(batch, self._forward([rows[index] for index in batch]), strict=True):
                scores[index] = value
        return scores

    def _forward(self, rows: list[list[int]]) -> list[float]:
        with autocast(self.device, self.precision):
            last = self._ragged_states(rows) if self._ragged else self._padded_states(rows)  # (B, H)
        # The head is one dot product: in float32, so that scores of like answers do not tie by rounding.
        values: list[float] = self.model.score(last.float())[:, 0].tolist()
        return values

    def _ragged_states(self, rows: list[list[int]]) -> torch.Tensor:
        ids = torch.tensor([[token for row in rows for token in row]], device=self.device)
        places = torch.tensor([[place for row in rows for place in range(len(row))]], device=self.device)
        lengths = [len(row) for row in rows]
        layout = to_device(lay_out(lengths), self.device)
        trunk = getattr(self.model, self.model.base_model_prefix)
        return hidden_states(trunk, ids, places, layout)[torch.tensor(lengths, device=self.device).cumsum(0) - 1]

    def _padded_states(self, rows: list[list[int]]) -> torch.Tensor:
        """Right-padded, so that positions need no shift and padding is never attended to."""
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        width = int(lengths.max())
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)  # (B, T)
        mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        trunk = getattr(self.model, self.model.base_model_prefix)
        hidden = trunk(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, H)
        states: torch.Tensor = hidden[torch.arange(len(rows), device=self.device), lengths - 1]
        return states
