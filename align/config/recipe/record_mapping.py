"""Settings that map the records of a file to the fields that align reads, without any Python.

``align.data.formats.mapping`` applies them. Sources of a recipe have all of the settings; tasks of an evaluation have
the settings of ``RecordColumns``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.config.base import Config
from align.config.recipe.templates import parse_column, parse_template
from align.config.validation import nearest

_FIELDS = json.loads(Path(__file__).with_name("names.json").read_text(encoding="utf-8"))
ROW_FIELDS: tuple[str, ...] = tuple(_FIELDS["row fields"])
"""Fields of align's own rows, which no kept column may be called."""

FORMAT_FIELDS: tuple[str, ...] = tuple(_FIELDS["format fields"])
"""Fields of the formats that a column may be mapped to."""
MEDIA = ("images", "image", "videos", "video", "audios", "audio")

Plain = str | bool | int | float


class Constant(Config):
    """The same value in every record: ``{constant: ["no", "yes"]}``."""

    constant: Plain | list[Plain]
    """The value, or a list of values."""


class LabelWords(Config):
    """A label in words: ``{good: [yes, thumbs_up], bad: [no]}``. Another word is an error."""

    column: str = Field("label", min_length=1)
    """Column, or template, that holds the word."""
    good: Plain | list[Plain]
    """Words that mean true, in any case."""
    bad: Plain | list[Plain]
    """Words that mean false, in any case."""


class ValueWords(Config):
    """A value in words: ``{column: answer, words: {true: "yes", false: "no"}}``. Another value is an error."""

    column: str = Field(min_length=1)
    """Column, or template of one field, that holds the value: a truth value, a number, or a text in any case."""
    words: dict[str | bool | int, str] = Field(min_length=1)
    """Value → its words."""


class Mean(Config):
    """The mean of a list of numbers: ``{mean: ratings}``; of a list of lists, the mean of each."""

    mean: str = Field(min_length=1)
    """Column, or template of one field, that holds the list; in a CSV cell as JSON."""


ColumnValue = str | list[str] | Constant | LabelWords | ValueWords | Mean
"""A column or a template, a list of these, a constant, a label or a value in words, or the mean of a list."""


class ComparedColumns(Config):
    """Two columns with answers, and a column that says which is the better."""

    label: str = Field(min_length=1)
    """Column, or template, that says which answer is better. ``a``, ``model_a``, the name of a column, 1 and 2, and
    signed numbers (below 0: ``a``) are understood; others are named by ``a_is`` and ``b_is``."""
    a: str = Field(min_length=1)
    """Column or template of the first answer: a text, or a conversation."""
    b: str = Field(min_length=1)
    """Column or template of the second answer."""
    a_is: Plain | list[Plain] | None = None
    """Labels that mean that ``a`` is better."""
    b_is: Plain | list[Plain] | None = None
    """Labels that mean that ``b`` is better."""
    tie: Literal["drop", "stop"] = "drop"
    """Ties do not show which answer is better: they are dropped and counted, or end the build."""

    @field_validator("label", "a", "b")
    @classmethod
    def _check_column_texts(cls, text: str) -> str:
        parse_column(text)
        return text

    @model_validator(mode="after")
    def _check_both_labels(self) -> Self:
        if (self.a_is is None) != (self.b_is is None):
            raise ValueError("a_is and b_is go together; name the labels of both")
        return self


class GroupedRows(Config):
    """Records with one answer each, which are joined by their prompt. All of them are held in memory."""

    by: str = Field(min_length=1)
    """Column, or template, that the records of one prompt share."""
    answer: str = Field(min_length=1)
    """Column or template of the answer."""
    score: str | dict[str, float] | Mean | None = None
    """Column of the answer's score, several with their weights (``{helpfulness: 0.65, correctness: 0.8}``), or the mean
    of a list (``{mean: ratings}``)."""
    rank: str | None = Field(None, min_length=1)
    """Column of the answer's rank, the smallest the best."""

    @field_validator("by", "answer", "rank")
    @classmethod
    def _check_column_texts(cls, text: str | None) -> str | None:
        if text is not None:
            parse_column(text)
        return text

    @model_validator(mode="after")
    def _check_single_order(self) -> Self:
        if (self.score is None) == (self.rank is None):
            raise ValueError("grouped answers need a score or a rank, one of them")
        if isinstance(self.score, dict) and not self.score:
            raise ValueError("score names no column; write {column: weight}")
        return self


class RecordColumns(Config):
    """The place of the records in a file, and the names of their columns."""

    header: list[str] | None = Field(None, min_length=1)
    """Names of the columns of a .csv or .tsv file whose first line is a record already (MMLU's):
    ``[question, A, B, C, D, answer]``."""
    records: str | None = Field(None, min_length=1)
    """Key of a .json file that holds the list of records, ``examples`` or ``data.examples``."""
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """Sign between the cells of a .csv or .tsv file, by default a comma or a tab: ``";"``, ``"|"``."""
    encoding: str | None = Field(None, min_length=1)
    """Encoding of text files other than UTF-8, by Python's name for it: ``latin-1``, ``cp1252``, ``utf-16``."""
    columns: dict[str, ColumnValue] = Field({})
    """Field that align reads → the column that holds it, or a template: ``{prompt: question, completion:
    "{rationale} #### {answer}", choices: [A, B, C, D]}``. ``{choices[0].text}`` leads into lists and mappings,
    ``{hint?}`` may be absent, ``{constant: ...}`` is the same in every record, ``{mean: ratings}`` is the mean of a
    list, ``label: {good: [yes], bad: [no]}`` reads a label in words, and ``{column: answer, words: {true: "yes", false:
    "no"}}`` writes a value in words."""

    keyed_when_set: ClassVar[frozenset[str]] = frozenset({"header", "records", "delimiter", "encoding", "columns"})
    column_names: ClassVar[Sequence[str]] = FORMAT_FIELDS
    """Fields that ``columns`` may name."""

    @field_validator("delimiter")
    @classmethod
    def _check_delimiter(cls, delimiter: str | None) -> str | None:
        if delimiter in ('"', "\n", "\r"):
            raise ValueError("delimiter: quotes and line ends have a meaning of their own in CSV; name another sign")
        return delimiter

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, encoding: str | None) -> str | None:
        try:
            "".encode(encoding or "utf-8")
        except LookupError:
            message = f"encoding: Python has no text encoding '{encoding}'; write latin-1, cp1252 or utf-16"
            raise ValueError(message) from None
        return encoding

    @field_validator("columns", mode="before")
    @classmethod
    def _refuse_settings_among_columns(cls, columns: object) -> object:
        """Refuse ``columns: {better: {…}}`` with one message, before every type of a value reports a mistake."""
        for name in columns if isinstance(columns, Mapping) else ():
            if name in cls.model_fields and name not in cls.column_names:
                raise ValueError(f"'{name}' is a separate setting: write `{name}:` next to `columns:`")
        return columns

    @field_validator("columns")
    @classmethod
    def _check_columns(cls, columns: dict[str, ColumnValue]) -> dict[str, ColumnValue]:
        for name, value in columns.items():
            if name in MEDIA:
                raise ValueError(f"columns.{name}: align trains only on text, so it does not accept {name}; remove it")
            if name not in cls.column_names:
                close = nearest(name, cls.column_names)
                hint = f"Did you mean '{close}'?" if close else f"There are {', '.join(cls.column_names)}."
                raise ValueError(f"columns.{name}: no format reads a field '{name}'. {hint}")
            for text in column_texts(value):
                try:
                    parse_column(text)
                except ValueError as error:
                    raise ValueError(f"columns.{name}: {error}") from None
        return columns


class RecordMapping(RecordColumns):
    """All settings of a recipe's source about its records, except their format."""

    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = Field({})
    """messages, sharegpt: more role names, as the data writes them: ``{bot: assistant}``."""
    system: str | None = Field(None, min_length=1)
    """System prompt of every row: a text, which may quote columns (``{persona}``). A record's own system turn stays."""
    better: ComparedColumns | None = None
    """Pairs from two columns and a label: ``{label: winner, a: response_a, b: response_b}``."""
    grouped: GroupedRows | None = None
    """Scored or ranked answers from records with one answer each: ``{by: prompt, answer: response, score: rating}``."""
    keep: Literal["all"] | list[str] | dict[str, str] = Field([])
    """Columns that stay with the row, for scorers, filters, judges and metrics, as ``row["answer"]``: their names,
    ``all`` that the format does not read itself, or new names with their columns or templates."""

    keyed_when_set: ClassVar[frozenset[str]] = RecordColumns.keyed_when_set | {
        "roles",
        "system",
        "better",
        "grouped",
        "keep",
    }

    @field_validator("system")
    @classmethod
    def _check_template(cls, system: str | None) -> str | None:
        if system is not None:
            parse_template(system)
        return system

    @field_validator("keep")
    @classmethod
    def _check_kept_names(cls, keep: Any) -> Any:
        if keep == "all":
            return keep
        columns = keep if isinstance(keep, dict) else {name: name for name in keep}
        for name, column in columns.items():
            parse_column(column)
            if "{" in name:
                raise ValueError(f"keep: '{name}' is a template and needs a name: keep: {{name: '{name}'}}")
            if name in ROW_FIELDS or name.startswith("_"):
                raise ValueError(f"keep: {describe_taken_name(name)}")
        return keep

    @model_validator(mode="after")
    def _check_single_pair(self) -> Self:
        mapped = [name for name in ("chosen", "rejected") if name in self.columns]
        if self.better is not None and mapped:
            raise ValueError(f"columns.{mapped[0]} and better both make the pair; drop one of them")
        if self.system is not None and "system" in self.columns:
            raise ValueError("columns.system and system both name the system prompt; drop one of them")
        return self

    def kept_columns(self) -> dict[str, str]:
        """Return the kept columns by their names in the row, without the columns that ``all`` keeps."""
        if isinstance(self.keep, dict):
            return dict(self.keep)
        return {} if self.keep == "all" else {name: name for name in self.keep}


def describe_taken_name(name: str) -> str:
    """Return the error for a kept column whose name is a field of align."""
    if name.startswith("_"):
        return (
            f"'{name}' begins with _, as align's internal fields do. Give it another name: keep: {{{name[1:]}: {name}}}"
        )
    return f"'{name}' is a field of align's own rows. Give it another name: keep: {{record_{name}: {name}}}"


def column_texts(value: ColumnValue) -> list[str]:
    """Return the columns and templates of a value."""
    if isinstance(value, Constant):
        return []
    if isinstance(value, (LabelWords, ValueWords)):
        return [value.column]
    if isinstance(value, Mean):
        return [value.mean]
    return [value] if isinstance(value, str) else list(value)
