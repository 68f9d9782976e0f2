"""A teacher behind a server, which returns its likeliest tokens for given tokens (vLLM) or given text (providers)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from align.config.runtime.launch import world_size
from align.config.stages.teacher import TeacherConfig
from align.errors import UserError
from align.inference.cached_client import CachedClient, open_caches, prices_of
from align.inference.endpoint_client import EndpointLost
from align.inference.token_scores import Position, ScoringEndpoint
from align.models.compute.processes import broadcast
from align.training.divergence import TopTokens
from align.training.rows import MASKED, Row
from align.training.teachers import FOLDER, Candidates, Lesson, Setting, known_tokens, pack, read_privileged
from align.training.token_spans import HALF, Span


class EndpointTeacher:
    """A server that scores given tokens or texts. Its answers are kept as they come, also if it dies."""

    def __init__(self, setting: Setting, block: TeacherConfig, endpoint: ScoringEndpoint) -> None:
        self.setting = setting
        self.block = block
        self.endpoint = endpoint
        self.place = endpoint.place
        context = setting.context
        caches = open_caches(
            context.checkpoints / FOLDER, context.shared_answers(FOLDER), "log-probabilities", context.warn
        )
        prices = prices_of(endpoint.config)
        self.client = CachedClient(
            *caches,
            prices={} if prices is None else {"model": prices},
            on_progress=lambda done, total, tokens: context.progress(done, total, unit="teacher rows"),
            processes=world_size(),
        )
        self._asked: set[str] = set()
        self._has_warned = False

    def lessons(self, rows: Sequence[Row], sources: Sequence[Row], sampled: bool) -> list[Lesson]:
        """Return encoded rows with their sources as this teacher reads them."""
        pairs = zip(rows, sources, strict=True)
        return [Lesson(row, read_privileged(self.setting.tokenizer, row, self, source)) for row, source in pairs]

    def find(self, lessons: Sequence[Lesson], sampled: bool) -> list[TopTokens]:
        """Ask for all lessons at once. Raises ``EndpointLost``, with what to do, for a server that is gone."""
        rows = [lesson.read for lesson in lessons if lesson.read is not None]
        read = self._read_ids if self.block.api == "vllm" else self._read_texts
        questions = [self._question(row) for row in rows]
        requests = [self.endpoint.request(prompt, start) for prompt, start, _ in questions]

        self._asked |= {request.key for request in requests}

        def ask() -> list[str]:
            return [answer.text for answer in self.client.ask(self.endpoint, requests)]

        try:
            # Processes have the same rows of the data, and different sampled rows.
            texts = ask() if sampled else broadcast(ask)
        except EndpointLost as error:
            raise EndpointLost(
                f"{self.setting.context.name}: the teacher is lost: {error.problem}",
                f"Start it again and repeat the command: {len(self.client.cache)} answers are kept, and training "
                "continues from its last checkpoint.",
            ) from None
        results = []
        for row, text, (_, start, spans) in zip(rows, texts, questions, strict=True):
            positions = json.loads(text)
            self._warn_if_few(positions)
            results.append(pack(read(row, positions, start, spans), self.setting.top_k))
        return results

    def _question(self, row: Row) -> tuple[list[int] | str, int, list[Span | None]]:
        """Return the prompt, the place of its first labeled token, and the tokens' spans in a text."""
        first = next(index for index, label in enumerate(row["labels"]) if index and label != MASKED)
        # vLLM reads token ids. Other servers read a text, so places are characters there and not tokens.
        if self.block.api == "vllm":
            return row["input_ids"], first, []
        text, spans = self.setting.texts.spans(row["input_ids"])
        before = [span[1] for span in spans[:first] if span is not None]
        return text, before[-1] if before else 0, spans

    def _read_ids(self, row: Row, positions: list[Position], start: int, _: list[Span | None]) -> list[Any]:
        """Return the candidates of each labeled token, from positions of all tokens after ``start``."""
        candidates = []
        for index, (decoded, _end, ids, logprobs) in enumerate(positions, start):
            if row["labels"][index] == MASKED:
                continue
            token = row["input_ids"][index]
            expected = self.setting.texts.text(token)
            # A token may be half a character, which has no text to compare. Decoders also differ in spaces at the
            # border of a token.
            is_readable = decoded and HALF not in decoded and HALF not in expected
            if is_readable and decoded.strip() != expected.strip():
                raise self._vocabulary_error(f"token {token} is {expected!r} for the student and {decoded!r} for it")
            if max(ids) >= self.setting.vocabulary:
                raise self._vocabulary_error(f"it has token {max(ids)}, the student {self.setting.vocabulary} in all")
            candidates.append(list(zip(ids, logprobs, strict=True)))
        return candidates

    def _read_texts(self, row: Row, positions: list[Position], _: int, spans: list[Span | None]) -> list[Any]:
        """Return the candidates of each labeled token whose text is one token of the teacher."""
        # A token of the student aligns if the teacher cuts the text at the same two places.
        by_span = {(begin, end): (texts, logprobs) for begin, end, texts, logprobs in positions}
        results: list[Candidates | None] = []
        for index, label in enumerate(row["labels"]):
            if not index or label == MASKED:
                continue
            span = spans[index]
            candidates = None if span is None else by_span.get(span)
            if candidates is None:
                if span is not None and self.block.tokens == "same":
                    text = self.setting.texts.text(label)
                    raise self._vocabulary_error(f"{text!r} is one token for the student, and not for the teacher")
                results.append(None)
                continue
            texts, logprobs = candidates
            results.append(known_tokens([self.setting.texts.find(text) for text in texts], logprobs))
        return results

    def _vocabulary_error(self, difference: str) -> UserError:
        remedy = (
            "Write `tokens: aligned`, to learn from the text that aligns"
            if self.block.api == "completions"
            else "Serve a model with the student's tokenizer, or write `api: completions` and `tokens: aligned`"
        )
        return UserError(f"{self.place}: the teacher has another vocabulary: {difference}. {remedy}.")

    def _warn_if_few(self, positions: list[Position]) -> None:
        most = max((len(position[2]) for position in positions), default=self.setting.top_k)
        if most < self.setting.top_k and not self._has_warned:
            self._has_warned = True
            self.setting.context.warn(
                f"{self.place}: the server returns {most} of the {self.setting.top_k} log-probabilities that top_k "
                f"asks for (providers cap them at 20 or less); the others count as one. Write top_k: {most}."
            )

    def release(self) -> None:
        """Do nothing, since no model is in memory."""

    @property
    def rows_cached(self) -> int:
        """Different rows that came from a cache."""
        return len(self._asked) - self.client.new

    @property
    def rows_computed(self) -> int:
        """Rows that the server scored."""
        return self.client.new
