"""Thoughts in sampled responses: their place among the tokens, and a limit after which they are closed by force.

A thought that is still open after ``thinking_budget`` tokens is closed with the tokens that the chat template writes
between a thought and an answer; then the model continues with its answer. That needs a second request, in which only
the new tokens are computed if the engine caches prefixes. vLLM's own ``thinking_token_budget`` needs a parser when a
server starts, and does not tell which tokens it forced. Torch-free at import.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from align.config.chat_template import response_limit
from align.data.final_answers import PAIRS, TAGS, AnswerText, split_thought
from align.errors import UserError
from align.inference.protocol import Progress, Response, RolloutEngine, Sampling, Session, TurnRequest
from align.models.chat.render import TAG, render_prompt
from align.models.chat.template_settings import QUESTION, store, tokenizer_marks
from align.pipeline.context import StageContext

_NAMES = "|".join(TAGS)
_PAIRS = "|".join(map(re.escape, PAIRS))
_CHANNEL_END = "<|end|>"
CLOSINGS = (*(f"</{name}>" for name in TAGS), *PAIRS.values(), _CHANNEL_END)
MARK_TOKENS = 24
"""Tokens at the end of a prompt, and at the start of a response, in which an opening mark is looked for."""
MOST_MARKS = 16
"""Closing marks of a response whose places are looked for."""


class ThoughtReader:
    """Finds thoughts in responses, by the marks of a model's tokenizer and chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.marks = tokenizer_marks(tokenizer)
        # Decoding also skips added tokens that are special but have no name in the tokenizer, as Gemma 4's marks.
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._added = {token.content: int(number) for number, token in added.items()}
        self._special = {token.content for token in added.values() if token.special}
        self._special.update(getattr(tokenizer, "all_special_tokens", ()))
        own = "" if self.marks is None else rf"(?P<own>{re.escape(self.marks.opening)})|"
        opening = rf"{own}<(?P<tag>{_NAMES})>|(?P<pair>{_PAIRS})"
        self._opening = re.compile(rf"{opening}|<\|channel\|>analysis")
        self._opened = re.compile(rf"(?:{opening})\s*\Z")

    def read(self, prompt: Sequence[int], response: Response) -> Response:
        """Return a response with the place of its thought; ``prompt`` are the token ids before it."""
        ids = response.token_ids
        answer = self._split(prompt, ids)
        if not answer.thought:
            return response
        end = len(answer.thought)
        tokens = len(ids)
        # The text of a response has no special tokens, and some marks are special.
        characters = len(response.text)
        if not answer.is_open:
            # The first token after which the text is as long as the thought: a mark may have several tokens.
            tokens = bisect.bisect_left(range(len(ids)), end, key=lambda count: len(self._decode(ids[:count])))
            surplus = len(self._decode(ids[:tokens])) - end
            characters = len(self._decode(ids[:tokens], skips_special=True)) - surplus
            # A token of white space and the answer's first characters belongs to the answer.
            if surplus and len(self._decode(ids[: tokens - 1])) >= len(answer.thought.rstrip()):
                tokens -= 1
        bare = None
        if str(split_thought(response.text)) != response.text[characters:]:
            thought = self._decode(ids)[:end]
            bare = TAG.sub("", thought if self.marks is None else self.marks.remove(thought)).strip()
        return replace(
            response, thought_tokens=tokens, thought_end=characters, is_open=answer.is_open, bare_thought=bare
        )

    def mark_text(self, text: str, is_opened: bool) -> str:
        """Return a text that was decoded with special tokens without them, and with its thought in ``<think>``."""
        answer = split_thought(text, is_opened, self.marks)
        thought = answer.thought if self.marks is None else self.marks.remove(answer.thought)
        names = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        thought, shown = names.sub("", TAG.sub("", thought)).strip(), names.sub("", answer)
        return Response([], [], True, shown, is_open=answer.is_open, bare_thought=thought).marked_text

    @property
    def hides_marks(self) -> bool:
        """True if the marks of the model's thoughts are special tokens, which the text of a response lacks."""
        openings = PAIRS if self.marks is None else [self.marks.opening]
        return any(name in opening for opening in openings for name in self._special)

    def is_opened_by(self, prompt: Sequence[int]) -> bool:
        """Return True if a prompt ends inside a thought."""
        return self._opened.search(self._decode(prompt[-MARK_TOKENS:])) is not None

    def opening_text(self, prompt: Sequence[int]) -> str:
        """Return the mark with which a prompt opens a thought; empty if it opens none, or if its marks are special."""
        opened = self._opened.search(self._decode(prompt[-MARK_TOKENS:]))
        return "" if opened is None or any(name in opened.group() for name in self._special) else opened.group()

    def closing_ids(self, prompt: Sequence[int], response: Response) -> list[int]:
        """Return the tokens that close the thought in which a response ends; none if it ends elsewhere."""
        if not self._split(prompt, response.token_ids).is_open:
            return []
        text = self._decode(response.token_ids)
        opening = self._opened.search(self._decode(prompt[-MARK_TOKENS:])) or self._opening.search(text)
        assert opening is not None, "a thought begins with a mark"
        return self._encode(self._closing_text(opening, text))

    def longest_closing(self) -> int:
        """Return the number of tokens that close a thought which has begun with the template's mark."""
        opening = f"<{TAGS[0]}>" if self.marks is None else self.marks.opening
        return len(self.closing_ids([], Response(self._encode(opening), [], False, "")))

    def _split(self, prompt: Sequence[int], ids: Sequence[int]) -> AnswerText:
        """Return the answer of a response. Its texts have the characters of the decoded tokens, but no other marks."""
        return split_thought(self._without_spelled(ids), self.is_opened_by(prompt), self.marks)

    def _without_spelled(self, ids: Sequence[int]) -> str:
        """Return the text, in which closing marks are masked that are spelled in other tokens than their own.

        A policy spells a mark if it writes about it, as in code. A thought that begins with a spelled mark may end
        with one. Characters keep their places.
        """
        text = self._decode(ids)
        opening = self._opening.match(text.lstrip())
        if opening is not None and not any(
            number in ids[:MARK_TOKENS] for name, number in self._added.items() if name in opening.group()
        ):
            return text
        for mark in {*CLOSINGS, *(() if self.marks is None else [self.marks.closing])} & self._added.keys():
            number = self._added[mark]
            places = [place for place, token in enumerate(ids) if token == number]
            if text.count(mark) == len(places):
                continue
            starts = {text.find(mark, max(0, len(self._decode(ids[:place])) - 1)) for place in places[:MOST_MARKS]}
            text = _mask(text, mark, starts)
        return text

    def _closing_text(self, opening: re.Match[str], text: str) -> str:
        """Return the text that the template writes between a thought and an answer, or else the mark on a line."""
        groups = opening.groupdict()
        if groups.get("own") and self.marks is not None:
            mark = self.marks.closing
        elif groups["tag"]:
            mark = f"</{groups['tag']}>"
        else:
            mark = PAIRS.get(groups["pair"] or "", _CHANNEL_END)
        between = f"\n{mark}\n\n"
        if self.marks is not None and mark == self.marks.closing:
            between = self.marks.between
        elif mark == _CHANNEL_END:
            between = f"{mark}<|start|>assistant<|channel|>final<|message|>"
        # A mark of several tokens may have begun.
        begun = next((length for length in range(len(mark) - 1, 0, -1) if text.endswith(mark[:length])), 0)
        return between[between.index(mark) + begun :] if begun else between

    def _decode(self, ids: Sequence[int], skips_special: bool = False) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skips_special))

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]


def _mask(text: str, mark: str, kept: Collection[int]) -> str:
    """Return a text in which a mark is replaced by as many other characters, except at the places ``kept``."""
    return re.sub(re.escape(mark), lambda match: mark if match.start() in kept else "·" * len(mark), text)


class ThinkingSession(Session):
    """A session whose responses know their thoughts, which are closed after ``budget`` tokens; None for no limit.

    Texts are decoded with the reader's tokenizer, because an engine may have been opened with another checkpoint's.
    """

    def __init__(self, session: Session, reader: ThoughtReader, budget: int | None) -> None:
        self._session = session
        self._reader = reader
        self._budget = budget
        self._requests: dict[int, TurnRequest] = {}
        """Turns that have not come back, as they were submitted."""
        self._beginnings: dict[int, Response] = {}
        """Thoughts, with the tokens that close them, whose answers are being sampled."""
        self.is_lockstep = session.is_lockstep

    @property
    def pending(self) -> int:
        """Turns in flight."""
        return self._session.pending

    def submit(self, request: TurnRequest) -> None:
        """Ask for a turn, at first for at most ``budget`` tokens."""
        limit = request.max_tokens if self._budget is None else min(self._budget, request.max_tokens)
        self._session.submit(replace(request, max_tokens=limit))
        self._requests[request.key] = request

    def poll(self, timeout: float | None = None) -> list[tuple[int, Response]]:
        """Return turns that came back with their answers."""
        complete: list[tuple[int, Response]] = []
        while self._session.pending:
            for key, response in self._session.poll(timeout):
                turn = self._complete(key, response)
                if turn is not None:
                    complete.append((key, turn))
            # A session in lockstep returns all turns at once, so the next batch does not depend on their thoughts.
            if timeout is not None and not self.is_lockstep:
                break
            if complete and not self.is_lockstep:
                break
        return complete

    def _complete(self, key: int, response: Response) -> Response | None:
        """Return the complete turn, or ask for its continuation and return None."""
        request = self._requests[key]
        beginning = self._beginnings.pop(key, None)
        # 1. The answer behind a thought that was closed by force: join the two parts.
        if beginning is not None:
            response = replace(
                response,
                token_ids=beginning.token_ids + response.token_ids,
                logprobs=beginning.logprobs + response.logprobs,
                # The weights may change in between: the older ones count.
                weights_update=beginning.weights_update,
                forced=beginning.forced,
            )
        # 2. The budget cut the response. Close its thought, if it ends inside a thought, and sample the rest.
        elif self._budget is not None and not response.finished and len(response.token_ids) < request.max_tokens:
            closing = self._reader.closing_ids(request.prompt, response)
            length = len(response.token_ids) + len(closing)
            # Without room for a token of the answer, the thought stays open.
            if length < request.max_tokens:
                ids = response.token_ids + closing
                logprobs = response.logprobs + [0.0] * len(closing)
                forced = list(range(len(response.token_ids), length))
                self._beginnings[key] = replace(response, token_ids=ids, logprobs=logprobs, forced=forced)
                continuation = TurnRequest(
                    key, [*request.prompt, *ids], request.max_tokens - length, _continued_seed(request.seed)
                )
                self._session.submit(continuation)
                return None
        del self._requests[key]
        text = str(self._reader.tokenizer.decode(response.token_ids, skip_special_tokens=True))
        return self._reader.read(request.prompt, replace(response, text=text))

    def cache_statistics(self) -> dict[str, float] | None:
        """See the protocol."""
        return self._session.cache_statistics()

    def close(self) -> None:
        """See the protocol."""
        self._session.close()


def _continued_seed(seed: int) -> int:
    """Return the seed of the part after a thought, a non-negative int64."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/answer".encode(), digest_size=8).digest(), "big") >> 1


def generate(
    engine: RolloutEngine,
    reader: ThoughtReader,
    prompts: list[list[int]],
    sampling: Sampling,
    on_progress: Progress | None = None,
) -> list[list[Response]]:
    """Return ``sampling.n`` responses to each prompt, with their thoughts, closed after ``sampling.thinking_budget``.

    With the same seeds, a response that ends or closes its thought within the budget begins as without a budget.
    """
    if sampling.thinking_budget is None:
        sampled = engine.generate(prompts, sampling, on_progress=on_progress)
        return [[reader.read(ids, response) for response in row] for ids, row in zip(prompts, sampled, strict=True)]
    from align.inference.sessions import open_session  # imports torch

    total = len(prompts) * sampling.n
    responses: dict[int, Response] = {}
    session = ThinkingSession(
        open_session(engine, sampling.temperature, sampling.top_p), reader, sampling.thinking_budget
    )
    try:
        for key in range(total):
            prompt, sample = divmod(key, sampling.n)
            seed = sampling.request_seed(prompt, sample)
            session.submit(TurnRequest(key, prompts[prompt], sampling.max_tokens, seed))
        while session.pending:
            responses.update(session.poll())
            if on_progress is not None:
                on_progress(len(responses), total)
    finally:
        session.close()
    return [[responses[start + sample] for sample in range(sampling.n)] for start in range(0, total, sampling.n)]


def hidden_marks(folder: Path, variables: Mapping[str, Any] | None) -> Callable[[str], str] | None:
    """Return ``ThoughtReader.mark_text`` of a model whose thoughts are marked by special tokens; None for others.

    ``variables`` are the chat template's, as requests have them. Raises ``UserError`` for a folder that is refused.
    """
    from align.models.pretrained import open_tokenizer  # imports torch

    tokenizer = open_tokenizer(folder)
    if isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = store(tokenizer.chat_template, variables or {})
    reader = ThoughtReader(tokenizer)
    if not reader.hides_marks:
        return None
    return partial(reader.mark_text, is_opened=reader.is_opened_by(render_prompt(tokenizer, QUESTION)))


def thought_rates(responses: Sequence[Response]) -> dict[str, float]:
    """Return mean tokens of thoughts and answers, and the share of open thoughts; empty if there are no thoughts."""
    if not any(response.thought_tokens for response in responses):
        return {}
    count = len(responses)
    return {
        "mean_thought_tokens": sum(response.thought_tokens for response in responses) / count,
        "mean_answer_tokens": sum(response.answer_tokens for response in responses) / count,
        "open_thoughts": sum(response.is_open for response in responses) / count,
    }


def thought_facts(response: Response) -> dict[str, Any]:
    """Return the place of a response's thought for files of samples; empty without a thought."""
    if not response.thought_tokens:
        return {}
    return {
        "thought_tokens": response.thought_tokens,
        "thought_end": response.thought_end,
        "open_thought": response.is_open,
    }


def check_stage_room(context: StageContext, tokenizer: Any) -> None:
    """Raise ``UserError`` if the tokens that close a thought leave no room for an answer in a stage's responses."""
    _, limit = response_limit(context.config)
    require_answer_room(context.config.thinking_budget, tokenizer, limit, context.name)


def require_answer_room(budget: int | None, tokenizer: Any, max_tokens: int, place: str) -> None:
    """Raise ``UserError`` if the tokens that close a thought leave no room for an answer."""
    if budget is None:
        return
    closing = ThoughtReader(tokenizer).longest_closing()
    if budget + closing >= max_tokens:
        raise UserError(
            f"{place}: thinking_budget is {budget}, and the {closing} tokens that close a thought leave no room for an "
            f"answer in max_tokens {max_tokens}. Lower thinking_budget, or raise max_tokens."
        )
