"""Teachers of distillation that give their likeliest tokens for each token of an answer: checkpoints.

A teacher may read another prompt than the student, or the same text in other tokens. Its distributions always come as
``TopTokens`` in the student's vocabulary. A token of the student without a distribution has only absent entries there:
all of both models' mass is then in the tail, so the divergence is exactly 0. Leaves out training with full
distributions (``distill_trainer``) and servers (``served_teacher``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from align.config.stages.teacher import TeacherConfig
from align.data.rows import Message, answer_side, assistant
from align.errors import UserError
from align.judges.prompts import fill_rubric
from align.models.chat.render import render_prompt, require_chat_template
from align.models.loading import load_tokenizer
from align.store.fingerprint import digest
from align.training.arguments import shares_prefixes
from align.training.distill_trainer import AnswerCollator, Teacher, TeacherCache, prompt_of
from align.training.divergence import ABSENT, Measure, TopTokens
from align.training.input_checks import check_same_vocabulary
from align.training.rows import MASKED, Row, encode_supervised
from align.training.token_spans import Span, TokenTexts, align_spans

if TYPE_CHECKING:
    from align.pipeline.context import StageContext
    from align.store.artifacts import Artifact

Candidates = list[tuple[int, float]]
"""Tokens of the student and their log-probabilities by the teacher."""
FOLDER = "teachers"


@dataclass(frozen=True)
class Lesson:
    """A row of the student, and the same row as the teacher reads it: ``input_ids`` and ``labels``.

    ``read`` is None if the teacher's template has no such answer.
    """

    student: Row
    read: Row | None


@dataclass
class Setting:
    """The settings that all teachers of a stage share."""

    context: StageContext
    tokenizer: Any
    measure: Measure
    vocabulary: int
    """Rows of the student's head."""
    load: Callable[[Artifact], Teacher]
    texts: TokenTexts = field(init=False)

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.tokenizer)

    @property
    def top_k(self) -> int:
        """Tokens to compare at each position."""
        assert self.measure.top_k is not None
        return self.measure.top_k


class StageTeacher:
    """A checkpoint with the student's tokens, with or without a privileged prompt."""

    def __init__(self, setting: Setting, block: TeacherConfig, artifact: Artifact, place: str) -> None:
        self.setting = setting
        self.block = block
        self.artifact = artifact
        self.place = place
        context = setting.context
        self._teacher: Teacher | None = None
        # Without a shared cache, at least a resumed attempt finds them.
        folder = (context.cache or context.checkpoints) / FOLDER
        self.cache = TeacherCache(folder, self._identity(), context.warn)
        if not block.self:
            self._check_tokenizer()

    def _identity(self) -> dict[str, Any]:
        context = self.setting.context
        return {
            "teacher": self.artifact.weights,
            "precision": context.precision,
            "temperature": self.setting.measure.temperature,
            "top_k": self.setting.measure.top_k,
            "vocabulary": self.setting.vocabulary,
            "shared_prefixes": shares_prefixes(context),
        }

    def _check_tokenizer(self) -> None:
        name = self.setting.context.name
        tokenizer = load_tokenizer(self.artifact.model)
        try:
            check_same_vocabulary(name, self.setting.tokenizer, tokenizer, ("the student", "the teacher"))
        except UserError as error:
            raise UserError(f"{error} Or write `tokens: aligned`, to learn from the text that aligns.") from None
        if self.setting.tokenizer.chat_template != tokenizer.chat_template:
            raise UserError(
                f"{name}: student and teacher have different chat templates, so the teacher would read what it was "
                "never trained on. Give both `model` stages one chat_template."
            )

    def lessons(self, rows: Sequence[Row], sources: Sequence[Row], sampled: bool) -> list[Lesson]:
        """Return encoded rows with their sources as this teacher reads them; ``sampled`` answers replace the data's."""
        pairs = zip(rows, sources, strict=True)
        return [Lesson(row, read_privileged(self.setting.tokenizer, row, self, source)) for row, source in pairs]

    def find(self, lessons: Sequence[Lesson], sampled: bool) -> list[TopTokens]:
        """Return the likeliest tokens at each labeled token of each lesson, from the cache or computed."""
        if sampled:  # no other run has these rows
            return self.compute(lessons)
        return self.cache.load([lesson.read for lesson in lessons if lesson.read], lambda: self.compute(lessons))

    def compute(self, lessons: Sequence[Lesson]) -> list[TopTokens]:
        """Compute the likeliest tokens with the teacher in memory."""
        return self._top_tokens([lesson.read for lesson in lessons if lesson.read], self.setting.vocabulary)

    def _top_tokens(self, rows: list[Row], vocabulary: int) -> list[TopTokens]:
        teacher = self.teacher()
        context = self.setting.context
        longest = max((len(row["input_ids"]) for row in rows), default=0)
        limit = getattr(teacher.model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise UserError(
                f"{context.name}: {self.place} reads up to {longest} tokens, and its context has {limit}. Shorten its "
                "system message, or lower max_length."
            )

        def report(completed: int, total: int) -> None:
            context.progress(completed, total, unit="teacher rows")

        # The attention mask hides padding, so any token of the teacher's vocabulary pads.
        collator = AnswerCollator(pad=0)
        return teacher.find_top_tokens(rows, collator, self.setting.measure, vocabulary, report)

    def teacher(self) -> Teacher:
        """Return the model, which is loaded at the first call."""
        if self._teacher is None:
            self._teacher = self.setting.load(self.artifact)
        return self._teacher

    def release(self) -> None:
        """Free the model."""
        self._teacher = None

    @property
    def rows_cached(self) -> int:
        """Rows that came from the cache."""
        return self.cache.hits

    @property
    def rows_computed(self) -> int:
        """Rows of the data that the teacher read."""
        return self.cache.computed


def read_privileged(tokenizer: Any, row: Row, teacher: Any, source: Row) -> Row:
    """Return an encoded row behind the teacher's own system message; without one the row itself."""
    if teacher.block.system is None:
        return row
    tools = source.get("tools")
    prompt_ids = render_prompt(tokenizer, source["prompt"], tools)
    ids = row["input_ids"]
    labels = row["labels"]
    if ids[: len(prompt_ids)] != prompt_ids:
        raise UserError(
            f"{teacher.place}.system: the chat template rewrites the prompt of row {source['id']} once an answer "
            "follows, so no other prompt can replace it. Use another chat_template."
        )
    # Only the prompt's tokens change: the teacher reads the student's answer behind another prompt.
    richer = render_prompt(tokenizer, privileged_prompt(teacher, source), tools)
    return {
        "input_ids": richer + ids[len(prompt_ids) :],
        "labels": [MASKED] * len(richer) + labels[len(prompt_ids) :],
    }


def privileged_prompt(teacher: Any, source: Row) -> list[Message]:
    """Return a row's prompt with the teacher's system message, before the row's own if there is one."""
    place = f"{teacher.place}.system: row {source['id']}"
    content = fill_rubric(teacher.block.system, source, place, "the system message")
    first, *others = source["prompt"]
    if first["role"] != "system":
        return [{"role": "system", "content": content}, *source["prompt"]]
    return [{**first, "content": f"{content}\n\n{first['content']}"}, *others]


class AlignedTeacher(StageTeacher):
    """A checkpoint with another tokenizer, which reads each conversation in its own template and tokens."""

    def _identity(self) -> dict[str, Any]:
        # The same rows have other targets in another vocabulary.
        return super()._identity() | {"student": digest(self.setting.tokenizer.get_vocab())}

    def _check_tokenizer(self) -> None:
        self.tokenizer = load_tokenizer(self.artifact.model)
        require_chat_template(self.tokenizer, f"{self.setting.context.name}: the teacher")
        self.texts = TokenTexts(self.tokenizer)

    def lessons(self, rows: Sequence[Row], sources: Sequence[Row], sampled: bool) -> list[Lesson]:
        """Return the rows with the teacher's rendering of the same conversations."""
        lessons = []
        remaining: list[Row] = []
        previous: Row | None = None
        for row, source in zip(rows, sources, strict=True):
            # A template that rewrites turns gives several rows of one source, one after another.
            if sampled or source is not previous:
                remaining = self._encode(row, source, sampled)
            previous = source
            lessons.append(Lesson(row, remaining.pop(0) if remaining else None))
        return lessons

    def _encode(self, row: Row, source: Row, sampled: bool) -> list[Row]:
        conversation = dict(source)
        if self.block.system is not None:
            conversation["prompt"] = privileged_prompt(self, source)
        if sampled:
            tokenizer = self.setting.tokenizer
            side = answer_side(source)
            answer = row["input_ids"][len(prompt_of(row["input_ids"], row["labels"])) :]
            conversation[side] = [assistant(tokenizer.decode(answer, skip_special_tokens=True))]
            conversation[f"{side}_finished"] = answer[-1:] == [tokenizer.eos_token_id]
        return list(encode_supervised(self.tokenizer, [conversation], 1 << 30).rows)

    def find(self, lessons: Sequence[Lesson], sampled: bool) -> list[TopTokens]:
        """Return the likeliest tokens, in the student's vocabulary, at the tokens that align."""
        if sampled:
            return self.compute(lessons)
        reads = [lesson.read for lesson in lessons if lesson.read is not None]
        return self.cache.load([lesson.student for lesson in lessons], lambda: self.compute(lessons), reads)

    def compute(self, lessons: Sequence[Lesson]) -> list[TopTokens]:
        """Compute the teacher's distributions, and translate them."""
        reads = [lesson.read for lesson in lessons if lesson.read is not None]
        answers = iter(self._top_tokens(reads, len(self.tokenizer)))
        results = []
        for lesson in lessons:
            if lesson.read is None:
                # The teacher has no opinion on these tokens, and the student needs an entry for each.
                size = sum(label != MASKED for label in lesson.student["labels"][1:])
                results.append(pack([None] * size, self.setting.top_k))
                continue
            results.append(self._translate(lesson.student, lesson.read, next(answers)))
        return results

    def _translate(self, student: Row, read: Row, top_tokens: TopTokens) -> TopTokens:
        turns = answer_segments(student)
        read_turns = answer_segments(read)
        translated: list[Candidates | None] = []
        first = 0
        for index, turn in enumerate(turns):
            # Without equal numbers of turns it is unknown which turns belong together.
            if len(turns) != len(read_turns):
                translated += [None] * len(turn)
                continue
            places, lead = self._align(turn, read_turns[index])
            for place in places:
                if place is None:
                    translated.append(None)
                    continue
                ids = top_tokens.ids[first + place].tolist()
                logprobs = top_tokens.logprobs[first + place].tolist()
                # A tokenizer that starts texts with a space has it in the text of the first token.
                student_ids = [self._find(token, lead if place == 0 else 0) for token in ids]
                translated.append(known_tokens(student_ids, logprobs))
            first += len(read_turns[index])
        return pack(translated, self.setting.top_k)

    def _align(self, turn: list[int], read_turn: list[int]) -> tuple[list[int | None], int]:
        """Return for each token of the student's turn the place of the teacher's token, and the teacher's lead."""
        # 1. Leave the end tokens aside, whose texts differ between tokenizers.
        own_end = self.setting.tokenizer.eos_token_id
        both_end = turn[-1:] == [own_end] and read_turn[-1:] == [self.tokenizer.eos_token_id]
        text, spans = self.setting.texts.spans(turn[: len(turn) - both_end])
        read_text, read_spans = self.texts.spans(read_turn[: len(read_turn) - both_end])
        # 2. The teacher's text may begin with more spaces. Its spans are shifted by them.
        lead = max(0, count_spaces(read_text) - count_spaces(text))
        # 3. Behind the first difference of the texts no tokens align.
        common = common_length(text, read_text[lead:])
        shifted = [shift(span, lead) for span in read_spans]
        places = align_spans([span if span and span[1] <= common else None for span in spans], shifted)
        # 4. The end tokens align with each other.
        return places + [len(read_turn) - 1] * both_end, lead

    def _find(self, token: int, lead: int) -> int | None:
        if token == self.tokenizer.eos_token_id:
            return int(self.setting.tokenizer.eos_token_id)
        return self.setting.texts.find(self.texts.text(token)[lead:])


def shift(span: Span | None, by: int) -> Span | None:
    """Return a span ``by`` characters earlier, cut at 0."""
    return None if span is None else (max(0, span[0] - by), span[1] - by)


def common_length(first: str, second: str) -> int:
    """Return the number of characters that two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def count_spaces(text: str) -> int:
    """Return the number of spaces that a text starts with."""
    return len(text) - len(text.lstrip(" "))


def answer_segments(row: Row) -> list[list[int]]:
    """Return the labeled tokens of a row by turn. The first token of a row has no prediction."""
    segments: list[list[int]] = []
    previous = MASKED
    for label in row["labels"][1:]:
        if label != MASKED:
            if previous == MASKED:
                segments.append([])
            segments[-1].append(label)
        previous = label
    return segments


def known_tokens(tokens: Sequence[int | None], logprobs: Sequence[float]) -> Candidates:
    """Return the tokens that the student has, each once; the mass of all others is in the tail."""
    logprob_of: dict[int, float] = {}
    for token, logprob in zip(tokens, logprobs, strict=True):
        if token is not None and logprob > ABSENT:
            logprob_of.setdefault(token, logprob)
    return list(logprob_of.items())


def pack(positions: Sequence[Candidates | None], top_k: int) -> TopTokens:
    """Return (N, ``top_k``) tokens of N positions; absent entries have ``ABSENT`` as their log-probability."""
    ids = torch.zeros(len(positions), top_k, dtype=torch.int32)
    logprobs = torch.full((len(positions), top_k), ABSENT)
    for row, candidates in enumerate(positions):
        for column, (token, logprob) in enumerate(candidates or ()):
            ids[row, column] = token
            logprobs[row, column] = logprob
    return TopTokens(ids, logprobs)
