"""Scoring responses with a trained reward model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.config.batch_sizes import SCORED_AT_ONCE
from align.models.fast.prefix_batch import Line, in_common
from align.models.fast.ragged_rows import can_run_ragged, hidden_states, run_ragged, to_device
from align.models.loading import load_reward, load_tokenizer
from align.models.precision import Precision, autocast, round_frozen
from align.models.render import Message, render_conversation
from align.models.steps import Steps, combined, step_ends

Answer = tuple[list[Message], str, bool, str | None]
"""Prompt, text, whether it came to its end, and the tools of its row."""


class RewardModel:
    """One score per response, read at the last token of the conversation, as the reward model was trained."""

    def __init__(
        self,
        model_dir: Path,
        device: Any = "cpu",
        precision: Precision = "bfloat16",
        batch_size: int = SCORED_AT_ONCE,
        share_beginnings: bool = False,
    ) -> None:
        """Load the model. Raises ``UserError`` for a checkpoint without a score head.

        With ``share_beginnings`` what all conversations of a batch begin with is read once. Rounding then depends on
        which others are in the batch, so that the same answer may get another score in the next call.
        """
        self.tokenizer = load_tokenizer(model_dir)
        self.model = load_reward(model_dir).to(device).requires_grad_(False)
        self.device = torch.device(device)
        self.precision = precision
        self.batch_size = batch_size
        self.share_beginnings = share_beginnings
        self._steps = Steps.read(model_dir)
        self._ragged = can_run_ragged(self.model)
        if self._ragged:
            run_ragged(self.model)

    def round_weights(self) -> None:
        """Keep the trunk in bfloat16, where that is what it computes in: half the memory; scores move by rounding."""
        if self.precision == "bfloat16":
            round_frozen(getattr(self.model, self.model.base_model_prefix))
            # The head is part of the mapped file still, which would stay in memory whole for its sake.
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()

    @property
    def steps(self) -> Steps | None:
        """How answers are cut into steps, for a process reward model; None for one that scores whole answers."""
        return self._steps

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
        A process reward model's score is what the chances of the answer's steps to be right come to, from 0 to 1.
        """
        ended = finished if finished is not None else [True] * len(responses)
        offered = tools if tools is not None else [None] * len(responses)
        answers = list(zip(prompts, responses, ended, offered, strict=True))
        if self._steps is not None:
            return [combined(logits, self._steps.aggregate) for logits in self._score_steps(answers, self._steps)]
        rows = [
            render_conversation(self.tokenizer, [*prompt, {"role": "assistant", "content": response}], one_ended, own)
            for prompt, response, one_ended, own in answers
        ]
        return self.score_tokens(rows)

    def _score_steps(self, answers: Sequence[Answer], steps: Steps) -> list[list[float]]:
        """The log-odds of each step of each answer."""
        found = [
            step_ends(self.tokenizer, prompt, [{"role": "assistant", "content": text}], steps.separator, ended, tools)
            for prompt, text, ended, tools in answers
        ]
        return self.score_places([ids for ids, _ in found], [places for _, places in found])

    def score_tokens(self, rows: list[list[int]]) -> list[float]:
        """Scores of rendered conversations at their ends, in the order given."""
        return [scores[0] for scores in self.score_places(rows, [[len(row) - 1] for row in rows])]

    @torch.inference_mode()
    def score_places(self, rows: list[list[int]], places: list[list[int]]) -> list[list[float]]:
        """Scores at some tokens of each row, in the order given; rows of like length are read together.

        Of equal rows one is read, so that they tie.
        """
        asked = [(tuple(row), tuple(own)) for row, own in zip(rows, places, strict=True)]
        scores: dict[tuple[tuple[int, ...], tuple[int, ...]], list[float]] = {}
        order = sorted(dict.fromkeys(asked), key=lambda one: -len(one[0]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            values = iter(self._forward([list(row) for row, _ in batch], [list(own) for _, own in batch]))
            for one in batch:
                scores[one] = [next(values) for _ in one[1]]
        return [list(scores[one]) for one in asked]

    def _forward(self, rows: list[list[int]], places: list[list[int]]) -> list[float]:
        with autocast(self.device, self.precision):
            states = (self._ragged_states if self._ragged else self._padded_states)(rows, places)  # (P, H)
        # The head is one dot product: in float32, so that scores of like answers do not tie by rounding.
        values: list[float] = self.model.score(states.float())[:, 0].tolist()
        return values

    def _ragged_states(self, rows: list[list[int]], wanted: list[list[int]]) -> torch.Tensor:
        line, shared = Line(), in_common(rows) if self.share_beginnings else 0
        beginning = line.add(rows[0][:shared]) if shared else None
        at = []
        for row, own in zip(rows, wanted, strict=True):
            start = line.starts[line.add(row[shared:], beginning)] - shared
            at += [place if place < shared else start + place for place in own]
        batch = line.batch()
        ids, places = batch["input_ids"].to(self.device), batch["position_ids"].to(self.device)
        trunk = getattr(self.model, self.model.base_model_prefix)
        states = hidden_states(trunk, ids, places, to_device(batch["layout"], self.device))
        return states[torch.tensor(at, device=self.device)]

    def _padded_states(self, rows: list[list[int]], wanted: list[list[int]]) -> torch.Tensor:
        """Right-padded, so that positions need no shift and padding is never attended to."""
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        width = int(lengths.max())
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)  # (B, T)
        mask = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        trunk = getattr(self.model, self.model.base_model_prefix)
        hidden = trunk(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, H)
        at = torch.tensor([[row, place] for row, own in enumerate(wanted) for place in own], device=self.device)
        states: torch.Tensor = hidden[at[:, 0], at[:, 1]]
        return states
