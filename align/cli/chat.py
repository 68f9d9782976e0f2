"""``align chat``: talk with a checkpoint in the terminal. Replies appear as they are made; turns are remembered.

``/reset`` forgets the conversation, ``/exit`` (or end of input) leaves, Ctrl-C stops a reply and, at the prompt,
leaves. Left out: editing, saving, and any engine but transformers, which starts soonest for one reply at a time.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from align.errors import UserError, printable

HELP = "/reset forgets the conversation, /exit leaves, Ctrl-C stops a reply."
MARGIN = 64
"""Tokens kept free for a reply when an old conversation is cut."""


def chat(
    checkpoint: Path,
    system: str | None = None,
    temperature: float = 0.7,
    max_tokens: int = 256,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
) -> int:
    """Run the loop on ``checkpoint``, a model folder or an artifact's folder, until the user leaves; exit code 0.

    Raises ``UserError`` for a folder that holds no policy or a tokenizer without a chat template.
    """
    reading, writing = stdin or sys.stdin, stdout or sys.stdout
    folder = checkpoint if (checkpoint / "config.json").is_file() else checkpoint / "model"
    speaker = Speaker(folder, temperature, max_tokens)
    print(f"{folder}\n{HELP}", file=writing)
    turns = start = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            text = _ask(reading, writing)
        except KeyboardInterrupt:
            text = None
        if text is None or text == "/exit":
            print(file=writing)
            return 0
        if text == "/reset":
            turns = start
            print("(forgotten)", file=writing)
        elif text.startswith("/") and " " not in text:
            print(HELP, file=writing)
        elif text:
            turns = [*turns, {"role": "user", "content": text}]
            reply = _show(speaker.reply(turns), writing)
            turns = [*turns, {"role": "assistant", "content": reply}]


def _ask(reading: TextIO, writing: TextIO) -> str | None:
    """The next line typed, stripped; None at the end of input."""
    writing.write("\n> ")
    writing.flush()
    line = reading.readline()
    return line.strip() if line else None


def _show(pieces: Iterator[str], writing: TextIO) -> str:
    """Print a reply as it comes and return it; Ctrl-C ends it early and keeps what was said."""
    said = ""
    try:
        for piece in pieces:
            said += piece
            writing.write(printable(piece))
            writing.flush()
    except KeyboardInterrupt:
        writing.write(" …")
    print(file=writing)
    return said


class Speaker:
    """A policy that answers one conversation at a time, token by token."""

    def __init__(self, folder: Path, temperature: float, max_tokens: int) -> None:
        from align.models.conversion import require_sane
        from align.models.loading import load_policy, load_tokenizer

        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} holds no model; name a model folder or the artifact of a model or policy stage.")
        import torch
        from transformers.utils import logging

        logging.set_verbosity_error()  # a conversation is no place for a library's advice
        logging.disable_progress_bar()

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(folder)
        model = load_policy(folder)
        require_sane(model, folder)
        self.model = model.to(device).requires_grad_(False)
        self.temperature, self.max_tokens = temperature, max_tokens
        self.generator = torch.Generator().manual_seed(random.SystemRandom().getrandbits(62))

    def reply(self, turns: list[dict[str, str]]) -> Iterator[str]:
        """Pieces of the answer to ``turns``; a piece never ends inside a character."""
        import torch

        from align.inference.sampling import pick_tokens, processed_logprobs

        ids, cache = self._prompt(turns), None
        tokens: list[int] = []
        shown = ""
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
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character so far
                continue
            yield text[len(shown) :]
            shown = text
        yield self.tokenizer.decode(tokens, skip_special_tokens=True)[len(shown) :]

    def _prompt(self, turns: list[dict[str, str]]) -> Any:
        """Token ids, (1, P); the oldest turns are dropped when the model's context is full."""
        import torch

        from align.models.render import render_prompt

        longest = getattr(self.model.config, "max_position_embeddings", 2048) - min(self.max_tokens, MARGIN)
        kept = list(turns)
        first = 1 if kept[0]["role"] == "system" else 0
        ids = render_prompt(self.tokenizer, kept)
        while len(ids) > longest and len(kept) > first + 1:
            del kept[first : first + 2]
            ids = render_prompt(self.tokenizer, kept)
        return torch.tensor([ids], device=self.model.device)
