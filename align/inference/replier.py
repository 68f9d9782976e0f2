"""One conversation with a checkpoint: replies of a policy in transformers, streamed token by token."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from align.errors import UserError
from align.inference.thoughts import ThoughtReader
from align.inference.transformers import pick_tokens, processed_logprobs
from align.models.chat.render import render_prompt
from align.models.checkpoints.conversion import require_finite
from align.models.loading import load_policy, load_tokenizer

REPLY_MARGIN = 64
"""Tokens kept free for a reply when a long conversation is cut."""


class Replier:
    """A policy that replies to one conversation at a time, token by token."""

    def __init__(self, folder: Path, temperature: float, max_tokens: int) -> None:
        """Load the model in ``folder``. ``temperature`` 0 is greedy; a reply has at most ``max_tokens`` tokens."""
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no model; name a model folder or the artifact of a model or policy stage.")
        logging.set_verbosity_error()  # a library's advice would interrupt the conversation
        logging.disable_progress_bar()

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(folder)
        model = load_policy(folder)
        require_finite(model, folder)
        self.model = model.to(device).requires_grad_(False)
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.generator = torch.Generator().manual_seed(random.SystemRandom().getrandbits(62))

    def reply(self, turns: list[dict[str, str]]) -> Iterator[str]:
        """Yield the reply to ``turns`` in pieces; a piece never ends inside a character.

        A thought that the prompt opens begins with the prompt's mark.
        """
        ids = self._prompt_ids(turns)
        yield ThoughtReader(self.tokenizer).opening_text(ids[0].tolist())
        cache = None
        tokens: list[int] = []
        printed = ""
        for _ in range(self.max_tokens):
            with torch.inference_mode():
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                logprobs = processed_logprobs(out.logits[:, -1].float(), self.temperature, 1.0)
                uniform = torch.rand(1, generator=self.generator, dtype=torch.float64).to(ids.device)
                ids = pick_tokens(logprobs, uniform, greedy=self.temperature == 0)[:, None]
            if int(ids) == self.tokenizer.eos_token_id:
                break
            tokens.append(int(ids))
            # Decode all tokens each time: a character, or a space at the start of a word, may need several.
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):  # part of a character
                continue
            yield text[len(printed) :]
            printed = text
        yield self.tokenizer.decode(tokens, skip_special_tokens=True)[len(printed) :]

    def _prompt_ids(self, turns: list[dict[str, str]]) -> Any:
        """Return token ids (1, P); the oldest turns are dropped when the model's context is full."""
        longest = getattr(self.model.config, "max_position_embeddings", 2048) - min(self.max_tokens, REPLY_MARGIN)
        turns = list(turns)
        first = 1 if turns[0]["role"] == "system" else 0
        ids = render_prompt(self.tokenizer, turns)
        while len(ids) > longest and len(turns) > first + 1:
            # A system message stays: it is the first turn.
            del turns[first : first + 2]  # a question and its answer
            ids = render_prompt(self.tokenizer, turns)
        return torch.tensor([ids], device=self.model.device)
