"""Replies of a policy in transformers to conversations, streamed token by token, with their probabilities.

``align chat`` and the studio use it. A reply has no state that another reply of the same model changes, so several
threads may sample from one model.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from align.data.final_answers import split_thought
from align.data.tool_calls import ParsedTurn, detect_format
from align.errors import UserError
from align.inference.protocol import Response
from align.inference.thoughts import ThoughtReader
from align.inference.transformers import pick_tokens, processed_logprobs, require_cache
from align.models.chat.render import render_prompt
from align.models.chat.template_settings import State, TemplateSettings
from align.models.checkpoints.conversion import require_finite
from align.models.loading import load_policy, load_tokenizer

REPLY_MARGIN = 64
"""Tokens kept free for a reply when a long conversation is cut."""
GENERATION_CONFIG = "generation_config.json"
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Text of a part of a character."""
Turns = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ReplyOptions:
    """Settings of a reply. None is the checkpoint's own setting, and for ``seed`` a random number."""

    temperature: float | None = None
    """0 is greedy."""
    top_p: float | None = None
    top_k: int | None = None
    """0 keeps all tokens."""
    max_tokens: int = 256
    seed: int | None = None
    thinking: State | None = None
    tools: str = ""
    """Functions that the model may call, as a JSON list; empty for none."""
    alternatives: int = 0
    """Likeliest tokens that each token of the reply comes with."""


@dataclass(frozen=True)
class ReplyToken:
    """One token of a reply. Log-probabilities are the model's own, before temperature, top-p and top-k."""

    id: int
    text: str
    """Text that the token completes; empty for a special token, and for a token that ends inside a character."""
    name: str
    """Text of the token, also if it is special."""
    logprob: float
    alternatives: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens at this place and their log-probabilities, in falling order."""


class Replier:
    """A policy that replies to conversations, token by token."""

    def __init__(self, folder: Path, temperature: float = 1.0, max_tokens: int = 256) -> None:
        """Load the model in ``folder``. ``temperature`` and ``max_tokens`` are for ``reply``; ``start`` has options."""
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no model; name a model folder or the artifact of a model or policy stage.")
        logging.set_verbosity_error()  # a library's advice would interrupt the conversation
        logging.disable_progress_bar()

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(folder)
        model = load_policy(folder)
        require_finite(model, folder)
        require_cache(model, str(folder), "Sample with vLLM instead: `align serve`.")
        self.model = model.to(device).requires_grad_(False)
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.defaults = read_generation_config(folder)
        """Fields of the checkpoint's ``generation_config.json``."""
        self.stops = {int(self.tokenizer.eos_token_id), *_end_tokens(self.defaults)}
        self.longest: int = getattr(self.model.config.get_text_config(), "max_position_embeddings", 2048)

    def reply(self, turns: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
        """Yield the reply to ``turns`` in pieces, each with its part of the thought and its part of the answer.

        A piece never ends inside a character. See ``Reply.marked`` for the marks of the thought.
        """
        reply = self.start(turns, ReplyOptions(self.temperature, 1.0, 0, self.max_tokens))
        text, end, is_open = reply.opening, len(reply.opening), True
        yield text, ""
        for token in reply.sample():
            start = len(text)
            text += token.text
            if is_open or not end:
                text, end, is_open = reply.marked()
            yield text[start:end], text[max(start, end) :]

    def start(self, turns: Turns, options: ReplyOptions) -> Reply:
        """Return a reply that is sampled while ``Reply.sample`` is read.

        Raises ``UserError`` for a conversation that the chat template refuses or that is longer than the context.
        """
        return Reply(self, turns, self.complete(options))

    def complete(self, options: ReplyOptions) -> ReplyOptions:
        """Return the options with the checkpoint's own settings, and a seed, in place of None."""
        number = options.temperature
        nucleus = options.top_p
        likeliest = options.top_k
        return replace(
            options,
            temperature=_number(self.defaults.get("temperature"), 1.0) if number is None else number,
            top_p=_number(self.defaults.get("top_p"), 1.0) if nucleus is None else nucleus,
            top_k=int(_number(self.defaults.get("top_k"), 0)) if likeliest is None else likeliest,
            seed=random.SystemRandom().getrandbits(31) if options.seed is None else options.seed,
        )

    def tokenizer_with(self, thinking: State | None) -> Any:
        """Return the tokenizer, whose chat template turns thoughts on or off. Raises ``UserError`` without a switch."""
        if thinking is None:
            return self.tokenizer
        tokenizer = copy.copy(self.tokenizer)
        TemplateSettings(thinking).apply(tokenizer)
        return tokenizer

    def fit(self, turns: Turns, options: ReplyOptions) -> tuple[list[int], int]:
        """Return the ids of the prompt, and the number of the oldest turns that are dropped if the context is full.

        Raises ``UserError`` if the last turn is longer than the context.
        """
        tokenizer = self.tokenizer_with(options.thinking)
        longest = self.longest - min(options.max_tokens, REPLY_MARGIN)
        rest = [dict(turn) for turn in turns]
        if ThoughtReader(tokenizer).hides_marks:
            # The marks of these thoughts are not the template's, which would write them as answers.
            for turn in rest:
                if turn["role"] == "assistant":
                    turn["content"] = str(split_thought(turn["content"]))
        # A system message stays: it is the first turn.
        first = 1 if rest[0]["role"] == "system" else 0
        ids = render_prompt(tokenizer, rest, options.tools)
        while len(ids) > longest and len(rest) > first + 1:
            del rest[first : first + 2]  # a question and its answer
            ids = render_prompt(tokenizer, rest, options.tools)
        if len(ids) > longest:
            raise UserError(
                f"The conversation has {len(ids)} tokens, and this checkpoint has room for {longest} before a reply. "
                "Shorten the last message or the system prompt."
            )
        return ids, len(turns) - len(rest)


class Reply:
    """One reply: its settings, and its tokens and text so far."""

    def __init__(self, replier: Replier, turns: Turns, options: ReplyOptions) -> None:
        self.options = options
        """The settings in use: none is None."""
        self.prompt, self.dropped_turns = replier.fit(turns, options)
        self.tokens: list[int] = []
        self.is_finished = False
        """True once the model has ended its turn."""
        self._model = replier.model
        self._stops = replier.stops
        self._tokenizer = replier.tokenizer_with(options.thinking)
        self._reader = ThoughtReader(self._tokenizer)
        self._room = min(options.max_tokens, replier.longest - len(self.prompt))
        self._decoded = ""
        self.opening = self._reader.opening_text(self.prompt)
        """Mark with which the prompt opens a thought; the text begins with it."""

    @property
    def text(self) -> str:
        """The reply so far, with the opening of its thought."""
        return self.opening + self._decoded

    def sample(self) -> Iterator[ReplyToken]:
        """Yield the tokens of the reply, the last one included, which ends the turn."""
        options = self.options
        assert options.seed is not None
        generator = torch.Generator().manual_seed(options.seed)
        ids = torch.tensor([self.prompt], device=self._model.device)
        # The first step reads the prompt. Each later step reads only the new token, because the cache has all before
        # it.
        cache = None
        while len(self.tokens) < self._room and not self.is_finished:
            with torch.inference_mode():
                out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                logits = out.logits[:, -1].float()  # (1, V)
                ids = self._pick(logits, generator)[:, None]
            token = int(ids)
            self.tokens.append(token)
            self.is_finished = token in self._stops
            yield self._describe(token, logits[0])

    def thought_end(self) -> tuple[int, bool]:
        """Return the number of characters of ``text`` before the answer, and True if the thought is not closed."""
        response = self._read()
        end = response.thought_end
        return (len(self.opening) + end if end else 0), response.is_open

    def marked(self) -> tuple[str, int, bool]:
        """Return ``text`` with marks of its thought, and what ``thought_end`` returns for it.

        A thought whose marks are special tokens gets the marks ``<think>``, so that readers of the text find it.
        """
        response = self._read()
        if response.bare_thought is None or self.opening:
            return self.text, *self.thought_end()
        return response.marked_text, len(response.marked_thought), response.is_open

    def _read(self) -> Response:
        return self._reader.read(self.prompt, Response(self.tokens, [], self.is_finished, self._decoded))

    def parse_calls(self) -> ParsedTurn:
        """Return the calls of tools in the reply, in the format that the chat template shows."""
        turn_format = detect_format(str(self._tokenizer.chat_template))
        if turn_format is None:
            return ParsedTurn(self.text)
        ids = self.tokens[:-1] if self.is_finished else self.tokens
        return turn_format.parse(self.opening + str(self._tokenizer.decode(ids, skip_special_tokens=False)))

    def _pick(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the sampled token (1,) of logits (1, V)."""
        options = self.options
        assert options.temperature is not None
        assert options.top_p is not None
        if options.top_k and options.top_k < logits.shape[1]:
            logits = logits.masked_fill(logits < logits.topk(options.top_k).values[:, -1:], -math.inf)
        logprobs = processed_logprobs(logits, options.temperature, options.top_p)
        uniform = torch.rand(1, generator=generator, dtype=torch.float64).to(logits.device)
        return pick_tokens(logprobs, uniform, greedy=options.temperature == 0)

    def _describe(self, token: int, logits: torch.Tensor) -> ReplyToken:
        """Return a token with its text and the alternatives to it, from logits (V,)."""
        # Decode all tokens each time: a character, or a space at the start of a word, may need several.
        text = str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
        is_last = self.is_finished or len(self.tokens) == self._room
        piece = ""
        if is_last or not text.endswith(INCOMPLETE):
            piece = text[len(self._decoded) :]
            self._decoded = text
        logprobs = logits.log_softmax(dim=-1)
        best = logprobs.topk(min(self.options.alternatives, len(logprobs)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        alternatives = tuple((self._name(other), value) for other, value in pairs if math.isfinite(value))
        return ReplyToken(token, piece, self._name(token), float(logprobs[token]), alternatives)

    def _name(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False))


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a checkpoint's ``generation_config.json``; none without that file."""
    path = folder / GENERATION_CONFIG
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is no JSON; write the checkpoint again.") from None
    return content if isinstance(content, dict) else {}


def _end_tokens(defaults: Mapping[str, Any]) -> list[int]:
    ends = defaults.get("eos_token_id")
    return [token for token in (ends if isinstance(ends, list) else [ends]) if isinstance(token, int)]


def _number(value: Any, default: float) -> float:
    """Return a setting of a checkpoint if it is a number that is not negative, else ``default``."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value >= 0 else default
