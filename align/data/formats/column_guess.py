"""A file's columns and a first mapping of them, for ``align data columns`` and for errors. No build uses it.

A guess is a source as the recipe writes it. It counts only if records convert with it, so what is printed works.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.config.recipe.record_mapping import ROW_FIELDS
from align.config.recipe.source_settings import FilesSource, Source
from align.config.validation import validate_plain
from align.data.formats import FieldUsage, convert
from align.data.formats.columns import TIE_WORDS
from align.data.formats.mapping import group_records
from align.data.rows import BadRecord, Dropped
from align.data.sources import choose_format, read
from align.errors import UserError

SAMPLE = 1_000
"""Records that are looked at."""
MOST_BAD = 0.05
"""Share of records that a mapping need not fit; a build drops them."""
LONG_TEXT = 25
"""Mean characters from which a text may be an answer, not a label."""
MOST_DISTINCT = 0.7
"""Share of different prompts up to which records count as several answers to each."""
KINDS = ("preferences", "unpaired", "instructions", "prompts", "texts")
"""Kinds of dataset, those first that use most of a record."""

PROMPT_NAMES = (
    *("prompt", "question", "query", "instruction", "problem", "input", "goal"),
    *("context", "user", "human", "ask", "task", "q"),
)
ANSWER_NAMES = (
    *("completion", "response", "answer", "output", "solution", "target", "reply"),
    *("assistant", "gpt", "gold", "best answer", "best_answer", "a"),
)
BETTER_NAMES = ("chosen", "better", "preferred", "accepted", "good", "positive", "answer_matching_behavior")
WORSE_NAMES = ("rejected", "worse", "dispreferred", "refused", "bad", "negative", "answer_not_matching_behavior")
LABEL_NAMES = (
    *("winner", "label", "labels", "preference", "overall_preference"),
    *("better_response_id", "better", "choice", "vote", "votes", "verdict", "preferred", "annotator1"),
)
SCORE_NAMES = ("score", "rating", "helpfulness", "reward", "quality", "overall", "upvotes")
KEY_NAMES = ("answer", "answerkey", "answer_key", "key", "label", "target", "gold", "correct")


@dataclass
class ColumnFacts:
    """A column of a file, over the records that were looked at."""

    name: str
    types: Counter[str] = field(default_factory=Counter)
    filled: int = 0
    characters: int = 0
    distinct: set[str] = field(default_factory=set)
    example: Any = None

    @property
    def is_text(self) -> bool:
        """True where every value is text."""
        return set(self.types) == {"text"}

    @property
    def is_long(self) -> bool:
        """True for texts that are long enough for an answer."""
        return self.is_text and self.characters / max(1, self.filled) >= LONG_TEXT

    @property
    def holds_answers(self) -> bool:
        """True for texts, and for lists of messages."""
        return bool(self.name) and (self.is_text or any(kind.startswith("list") for kind in self.types))

    @property
    def is_number(self) -> bool:
        """True where every value is a number, or the text of one."""
        numbers = {"whole number", "number", "truth value"}
        return bool(self.types) and (
            set(self.types) <= numbers
            or (self.is_text and all(re.fullmatch(r"-?\d+(\.\d+)?", value) for value in self.distinct))
        )


@dataclass(frozen=True)
class Guess:
    """A mapping that converts the sample: the kind of dataset, the source as a recipe writes it, and its result."""

    kind: str
    source: dict[str, Any]
    rows: int
    dropped: Counter[str]
    several: bool
    """True for several answers to a prompt, of which the step ``pairs`` makes pairs."""
    bad: list[BadRecord] = field(default_factory=list)
    """Records that cannot be read, or that the mapping does not fit."""

    def recipe(self) -> dict[str, Any]:
        """Return the recipe to paste."""
        steps = {"steps": [{"type": "pairs"}]} if self.several and self.kind in ("preferences", "unpaired") else {}
        errors = {"on_error": "drop"} if self.bad else {}
        return {"kind": self.kind, **errors, "sources": [self.source], **steps}


@dataclass(frozen=True)
class FileReport:
    """The columns of a file, the number of records that were looked at, and a mapping, if one was found."""

    columns: list[ColumnFacts]
    records: int
    guess: Guess | None


def report_columns(settings: Mapping[str, Any], base: Path, kind: str | None = None) -> FileReport:
    """Return the contents of the files of a source (``paths``, and perhaps ``header`` and ``records``), and a mapping.

    ``kind`` is the kind of dataset that is wanted, if one is. Raises ``UserError`` for a file that has no records or
    cannot be read.
    """
    source = validate_plain(FilesSource, {"type": "files", **settings})
    items = list(itertools.islice(read(source, base), SAMPLE))
    records = [item for item in items if not isinstance(item, BadRecord)]
    if not records:
        raise next((item for item in items if isinstance(item, BadRecord)), UserError(f"{source.label}: no records."))
    columns = describe_columns(record for _, record in records)
    guess = _guess(dict(settings), columns, records, kind)
    if guess is not None:
        guess.bad[:0] = [item for item in items if isinstance(item, BadRecord)]
    return FileReport(columns, len(records), guess)


def describe_columns(records: Iterable[Mapping[str, Any]]) -> list[ColumnFacts]:
    """Return the facts of every column, in the order in which they come."""
    columns: dict[str, ColumnFacts] = {}
    for record in records:
        for name, value in record.items():
            facts = columns.setdefault(name, ColumnFacts(name))
            if value is None or value in ("", [], {}):
                continue
            facts.filled += 1
            facts.types[_type_name(value)] += 1
            facts.characters += len(value) if isinstance(value, str) else 0
            facts.distinct.add(value if isinstance(value, str) else json.dumps(value, default=str, sort_keys=True))
            facts.example = value if facts.example is None else facts.example
    return list(columns.values())


def _type_name(value: Any) -> str:
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, list):
        inner = sorted({_type_name(item) for item in value})
        return f"list of {inner[0]}s" if len(inner) == 1 else "list"
    names = {str: "text", int: "whole number", float: "number", dict: "mapping"}
    return names.get(type(value), type(value).__name__)


def suggest_source(source: Source, base: Path, kind: str | None) -> str:
    """Return a sentence with the mapping to write for a file whose columns do not say it, or an empty text.

    ``kind`` is the kind of dataset that is wanted, if one is.
    """
    if not isinstance(source, FilesSource) or source.columns or source.better:
        return ""
    settings = {name: getattr(source, name) for name in source.model_fields_set if name in ("header", "records")}
    try:
        guess = report_columns({"paths": [str(path) for path in source.paths], **settings}, base).guess
    except UserError:
        return ""
    if guess is None or kind not in (None, guess.kind):
        return ""
    block = {name: value for name, value in guess.source.items() if name not in ("type", "paths", *settings)}
    lines = [f"`{flow_line({name: value})}`" for name, value in block.items()]
    return f" As {guess.kind} write next to the file's name: {' and '.join(lines)}."


def flow_line(entry: Mapping[str, Any]) -> str:
    """Return a mapping of one key as YAML on a line, without the outer braces."""
    text = yaml.safe_dump(entry, sort_keys=False, allow_unicode=True, default_flow_style=True, width=math.inf)
    return text.strip()[1:-1]


# Guesses


def _guess(
    settings: dict[str, Any],
    columns: Sequence[ColumnFacts],
    records: Sequence[tuple[str, dict[str, Any]]],
    wanted: str | None,
) -> Guess | None:
    """Return the first candidate that converts at least half of the records into rows.

    A candidate that fits every record comes before candidates that do not fit a few records.
    """
    # Of fewer than twenty records a mapping has to fit each, so there is one round.
    for most_bad in sorted({0, int(MOST_BAD * len(records))}):
        for kind, extra in _candidates(columns, len(records)):
            if wanted not in (None, kind):
                continue
            guess = _try(kind, {"type": "files", **settings, **extra}, records, most_bad)
            if guess is not None:
                return _with_kept_columns(guess, columns, records)
    return None


def _candidates(columns: Sequence[ColumnFacts], count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield kinds and settings to try, the most telling first."""
    names = {facts.name.lower(): facts for facts in columns if facts.filled}
    prompt = _named(names, PROMPT_NAMES)
    renamed = {"columns": {"prompt": prompt.name}} if prompt and prompt.name not in ("prompt", "question") else {}
    # A question with its choices and the right one.
    choices = _choice_columns(columns)
    key = _named(names, KEY_NAMES)
    for compared in _comparisons(names, prompt):
        if isinstance(choices, list) and compared["a"] in choices and key and compared["label"] == key.name:
            continue
        # Without a prompt column, each side is a conversation that begins with the prompt.
        yield "preferences", {"better": compared}
        if renamed:
            yield "preferences", {**renamed, "better": compared}
    # Two answers in columns whose names say which is better.
    better = _named(names, BETTER_NAMES)
    worse = _named(names, WORSE_NAMES)
    if better and worse and (better.name, worse.name) != ("chosen", "rejected"):
        mapped = {"prompt": prompt.name} if prompt else {}
        yield "preferences", {"columns": {**mapped, "chosen": better.name, "rejected": worse.name}}
    if prompt and choices and key:
        yield "prompts", {}
    # One answer with a score in each record, and several records to a prompt.
    answer = _named(names, ANSWER_NAMES)
    score = _named(names, SCORE_NAMES)
    if prompt and answer and score and score.is_number and len(prompt.distinct) <= MOST_DISTINCT * count:
        yield "preferences", {**renamed, "grouped": {"by": prompt.name, "answer": answer.name, "score": score.name}}
    # Formats that need no mapping.
    for kind in KINDS:
        if kind != "texts" and (kind != "prompts" or not _named(names, ANSWER_NAMES)):
            yield kind, {}
    if prompt and choices and key:
        questions = {"question": prompt.name, "choices": choices, "answer": key.name}
        # Numbers from 1 leave out 0, which some question of many has as its answer.
        first_choice = int("0" not in key.distinct)
        for option in ({}, {"options": {"first_choice": first_choice}}):
            yield "prompts", {"format": "multiple_choice", "columns": questions, **option}
    # Last, single columns under their usual names.
    if prompt and answer:
        yield "instructions", {"columns": {"prompt": prompt.name, "completion": answer.name}}
    if prompt:
        yield "prompts", {"columns": {"prompt": prompt.name}}
    if "turns" in names:  # MT-Bench
        yield "prompts", {"columns": {"prompt": f"{{{names['turns'].name}[0]}}"}}
    yield "texts", {}


def _named(columns: Mapping[str, ColumnFacts], names: Sequence[str]) -> ColumnFacts | None:
    return next((columns[name] for name in names if name in columns), None)


def _comparisons(names: Mapping[str, ColumnFacts], prompt: ColumnFacts | None) -> Iterator[dict[str, str]]:
    """Yield the blocks ``better`` that the columns may mean: a label, and the two answers that it chooses from."""
    # The values of a label may be the names of the two columns.
    for label in names.values():
        words = {value.strip().lower() for value in label.distinct} - TIE_WORDS if label.is_text else set()
        pair = [facts.name for name, facts in names.items() if name in words and facts is not label]
        if len(pair) == 2 and len(words) == 2:
            yield {"label": label.name, "a": pair[0], "b": pair[1]}
    label_column = _named(names, LABEL_NAMES)
    if label_column is None:
        return
    answers = [facts for facts in names.values() if facts not in (prompt, label_column)]
    texts = [facts.name for facts in answers if facts.is_text and not facts.is_number]
    if len(texts) == 2:
        yield {"label": label_column.name, "a": texts[0], "b": texts[1]}
    # Names that differ in the last sign: a and b, 0 and 1, 1 and 2.
    for first, second in itertools.combinations([facts.name for facts in answers if facts.holds_answers], 2):
        if first[:-1] == second[:-1] and (first[-1] + second[-1]).lower() in ("ab", "01", "12"):
            yield {"label": label_column.name, "a": first, "b": second}


def _choice_columns(columns: Sequence[ColumnFacts]) -> list[str] | str | None:
    """Return the column of choices, or several columns that end in successive letters or numbers."""
    for facts in columns:
        if facts.name.lower() in ("choices", "options", "endings"):
            return facts.name
    filled_columns = [facts.name for facts in columns if facts.filled]
    # The index that pandas writes into a CSV file has no name.
    names = [name for name in filled_columns if name]
    for start in names:
        # sol1, sol2 or ans0, ans1, ans2: the next name has the next last sign.
        run = [start]
        while (following := f"{run[-1][:-1]}{chr(ord(run[-1][-1]) + 1)}") in names:
            run.append(following)
        if len(run) > 1 and start[-1:] in "Aa01":
            return run
    return None


def free_name(name: str) -> str:
    return f"record_{name.lstrip('_')}" if name in ROW_FIELDS or name.startswith("_") else name


def _try(
    kind: str, settings: dict[str, Any], records: Sequence[tuple[str, dict[str, Any]]], most_bad: int
) -> Guess | None:
    """Return the guess with what it makes of the records; None if it drops more than half of them.

    So is it if it does not fit more than ``most_bad`` of them.
    """
    try:
        source = validate_plain(FilesSource, settings)
        stream = iter(records)
        if source.grouped is not None:
            choice = choose_format(source, group_records(source.grouped, stream), kind)
        else:
            choice = choose_format(source, stream, kind)
        rows = 0
        dropped = Counter[str]()
        bad = list[BadRecord]()
        for item in choice.records:
            try:
                if isinstance(item, BadRecord):
                    raise item
                converted = convert(item[1], choice.format, item[0], kind)
            except BadRecord as error:
                bad.append(error)
                if len(bad) > most_bad:
                    return None
                continue
            for row in converted:
                if isinstance(row, Dropped):
                    dropped[row.reason] += 1
                else:
                    rows += 1
    except (UserError, ValueError):
        return None
    several = choice.format.form in ("scored", "ranked", "oasst", "multiple_choice")
    return Guess(kind, settings, rows, dropped, several, bad) if rows > dropped.total() else None


def _with_kept_columns(
    guess: Guess, columns: Sequence[ColumnFacts], records: Sequence[tuple[str, dict[str, Any]]]
) -> Guess:
    """Return the guess with ``keep`` for short columns that it does not use, where that converts as well."""
    source = validate_plain(FilesSource, guess.source)
    # Of grouped records only shared columns stay, which a first look cannot tell.
    if source.grouped is not None or source.keep:
        return guess
    usage = FieldUsage()
    choice = choose_format(source, iter(records), guess.kind)
    for where, record in records:
        with contextlib.suppress(BadRecord):
            convert(record, choice.format, where, guess.kind, usage=usage)
    short_columns = [facts.name for facts in columns if not facts.is_long]
    unused = [name for name in short_columns if name in usage.unused]
    kept_names = {free_name(name): name for name in unused if "{" not in name}
    # A list of names is enough if no column has a reserved name.
    keep: Any = kept_names if any(name != column for name, column in kept_names.items()) else list(kept_names)
    if not keep:
        return guess
    return _try(guess.kind, {**guess.source, "keep": keep}, records, len(guess.bad)) or guess
