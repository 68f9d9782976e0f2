"""Sets of annotations in a store: pairs of answers, and a journal of what annotators answered. Knows no torch.

A set is the folder ``annotations/<set>/``:

- ``settings.json``: how questions are selected
- ``pairs/<digest>.jsonl``: pairs, one a line; every import adds a file
- ``answers/<annotator>/<session>.jsonl``: entries of one session of an annotator, one a line
- ``sessions/<annotator>``: the lock of an open session, which only lets another session of the annotator know

Each process writes a file of its own, so any number of processes on any number of machines annotate at once without a
lock. An entry is on disk before the next question appears. The last line of a killed process may be torn; it was never
acknowledged, so readers skip it.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from align.errors import UserError
from align.store.fingerprint import digest
from align.store.json_files import (
    DamagedFile,
    numbered_lines,
    parse_object,
    read_file,
    sync_folder,
    validate,
    write_sealed,
    write_text_atomically,
)

ANNOTATIONS = "annotations"
"""Folder of a store with its sets of annotations."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
Side = Literal["a", "b"]
Verdict = Literal["better", "much_better", "tie", "both_bad"]
Scores = Annotated[tuple[float, float], Field(strict=False)]
DECISIVE = ("better", "much_better")
"""Verdicts that prefer an answer."""


class _Line(BaseModel):
    """A line of a file of the set."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Pair(_Line):
    """Two answers to a prompt. ``a`` and ``b`` name them; annotators see neither names nor systems."""

    id: str
    prompt: list[dict[str, Any]]
    """Messages, as rows have them."""
    a: str
    b: str
    systems: tuple[str, str] | None = Field(None, strict=False)
    """Names of what wrote ``a`` and ``b``."""
    scores: dict[str, Scores] = {}
    """Scores of ``a`` and ``b`` by the name of a reward model."""
    gold: Literal["a", "b", "tie", "both_bad"] | None = None
    """The right verdict of a question that checks annotators."""
    tools: str | None = None
    """JSON list of the functions that the model may call."""


class Answer(_Line):
    """An annotator's verdict on a pair."""

    kind: Literal["answer"] = "answer"
    id: str
    pair: str
    annotator: str
    """Pseudonym."""
    time: str
    """UTC, ISO 8601."""
    left: Side
    """The answer that was shown on the left."""
    verdict: Verdict
    preferred: Side | None = None
    """The better answer; None for a tie and for two bad answers."""
    tags: list[str] = []
    rewrite: str = ""
    """A better answer that the annotator wrote."""
    comment: str = ""
    seconds: float = Field(0.0, ge=0)
    repeat: bool = False
    """True for a hidden second showing of a pair, which measures self-consistency only."""
    active: bool = False
    """True if the pair was selected by its scores. The stopping rule ignores such answers."""

    @property
    def value(self) -> int:
        """The verdict as a number: 2 or 1 if ``a`` is better, 0 for a tie or two bad answers, -1 or -2."""
        strength = {"much_better": 2, "better": 1}.get(self.verdict, 0)
        return strength if self.preferred == "a" else -strength

    @property
    def label(self) -> str:
        """The verdict as gold questions write it: ``a``, ``b``, ``tie`` or ``both_bad``."""
        return self.preferred or self.verdict


class Undo(_Line):
    """Withdraws an earlier answer of the same annotator."""

    kind: Literal["undo"] = "undo"
    id: str
    answer: str
    annotator: str
    time: str


class Settings(_Line):
    """Settings that select the questions of a set."""

    overlap: float = Field(0.2, ge=0, le=1)
    """Share of the pairs that every annotator answers."""
    duplicates: float = Field(0.1, ge=0, le=1)
    """Share of an annotator's pairs that appear a second time."""
    gold_every: int = Field(10, ge=2)
    """Every this many questions are a gold question, while there are any."""
    order: Literal["random", "closeness", "disagreement"] = "random"
    """Order of the pairs: by a hash, closest scores first, or reward models that disagree most first."""


Line = TypeVar("Line", bound=_Line)


def check_name(name: str, place: str) -> str:
    """Return the name of a set or an annotator. Raises ``UserError`` for text that is not a name of a folder."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"{place} '{name}' is not a name; use up to 64 letters, digits, - and _, and begin with a letter or digit."
        )
    return name


def now() -> str:
    """Return the current time, UTC, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def new_id() -> str:
    """Return an identifier for an entry."""
    return uuid.uuid4().hex


def pair_id(prompt: list[dict[str, Any]], a: str, b: str) -> str:
    """Return the identifier of a pair: a digest of its texts, equal in every order of the answers."""
    return digest([prompt, sorted((a, b))])[:16]


class AnnotationSet:
    """The pairs and the journal of one set. Its folder is created by the first call that writes."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = check_name(name, "The set")
        self.folder = root / ANNOTATIONS / name

    @property
    def sessions(self) -> Path:
        """Folder with the locks of open sessions, by annotator."""
        return self.folder / "sessions"

    @property
    def exists(self) -> bool:
        """True if the set has pairs."""
        return any((self.folder / "pairs").glob("*.jsonl"))

    # ---- settings and pairs ----

    def settings(self) -> Settings:
        """Return how questions are selected. Raises ``UserError`` for a damaged file."""
        path = self.folder / "settings.json"
        try:
            payload = parse_object(read_file(path))
        except FileNotFoundError:
            return Settings()
        except DamagedFile as error:
            raise UserError(f"{path} {error}; delete it to use the defaults.") from None
        payload.pop("seal", None)
        return _read_line(Settings, payload, str(path))

    def change_settings(self, **changes: Any) -> Settings:
        """Write the settings with some fields changed, and return them."""
        current = self.settings().model_dump()
        settings = _read_line(Settings, {**current, **changes}, f"The settings of the set '{self.name}'")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_sealed(self.folder / "settings.json", settings.model_dump())
        return settings

    def add_pairs(self, pairs: Iterable[Pair]) -> int:
        """Add the pairs that the set does not have, and return their number."""
        present = self.pairs()
        new = {pair.id: pair for pair in pairs if pair.id not in present}
        if not new:
            return 0
        text = "".join(json.dumps(pair.model_dump(exclude_defaults=True)) + "\n" for pair in new.values())
        folder = self.folder / "pairs"
        folder.mkdir(parents=True, exist_ok=True)
        # The name is a digest of the content, so two imports of the same pairs write the same file.
        write_text_atomically(folder / f"{digest(text)[:16]}.jsonl", text)
        sync_folder(folder)
        return len(new)

    def pairs(self) -> dict[str, Pair]:
        """Return the pairs by id, in an order that does not depend on when they were added."""
        pairs: dict[str, Pair] = {}
        for path in sorted((self.folder / "pairs").glob("*.jsonl")):
            for number, line in numbered_lines(path):
                pair = _read_line(Pair, _parse(line, f"{path}:{number}"), f"{path}:{number}")
                # Two imports at the same time may write the same pair.
                pairs.setdefault(pair.id, pair)
        return dict(sorted(pairs.items()))

    # ---- the journal ----

    def annotators(self) -> list[str]:
        """Return the pseudonyms of those who have answered."""
        folder = self.folder / "answers"
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def entries(self) -> list[Answer | Undo]:
        """Return each entry once, in the order of their times.

        Raises ``UserError`` for a damaged line, and for two lines with the same id and other content.
        """
        entries: dict[str, tuple[str, Answer | Undo]] = {}
        for path in sorted((self.folder / "answers").glob("*/*.jsonl")):
            for place, fields in _journal_lines(path):
                entry_class: type[Answer] | type[Undo] = Undo if fields.get("kind") == "undo" else Answer
                entry = _read_line(entry_class, fields, place)
                # A copied file or a repeated line brings an entry again.
                first_place, first = entries.setdefault(entry.id, (place, entry))
                if entry != first:
                    raise UserError(
                        f"{place}: the entry '{entry.id}' differs from the entry with the same id in {first_place}; "
                        "each entry is written once. Delete the line that the annotator did not write."
                    )
        return sorted((entry for _, entry in entries.values()), key=lambda entry: (entry.time, entry.id))

    def answers(self) -> list[Answer]:
        """Return the answers that were not undone, in the order of their times."""
        entries = self.entries()
        # Clocks of machines differ, so an undo may be sorted before its answer. All of them are collected first.
        undone = {entry.answer for entry in entries if isinstance(entry, Undo)}
        return [entry for entry in entries if isinstance(entry, Answer) and entry.id not in undone]

    def content_digest(self) -> str:
        """Return a digest of the pairs and of all entries, which is part of a data stage's key."""
        pairs = [pair.model_dump(mode="json") for pair in self.pairs().values()]
        entries = [entry.model_dump(mode="json") for entry in self.entries()]
        return digest({"pairs": pairs, "entries": entries})

    def ledger(self) -> dict[str, dict[str, Any]]:
        """Return who answered and when: pseudonym → number of answers, first and last time."""
        ledger: dict[str, dict[str, Any]] = {}
        for answer in self.answers():
            line = ledger.setdefault(answer.annotator, {"answers": 0, "first": answer.time, "last": answer.time})
            line["answers"] += 1
            line["last"] = answer.time
        return ledger

    def delete_annotator(self, annotator: str) -> int:
        """Delete all entries of an annotator, and return the number of their answers.

        A session of the annotator that is still open cannot write any more. Raises ``UserError`` for a name without
        answers.
        """
        folder = self.folder / "answers" / check_name(annotator, "The annotator")
        if not folder.is_dir():
            names = ", ".join(self.annotators()) or "nobody"
            raise UserError(f"annotations {self.name}: there are no answers of '{annotator}'; answers are by {names}.")
        count = sum(answer.annotator == annotator for answer in self.answers())
        shutil.rmtree(folder)
        shutil.rmtree(self.sessions / annotator, ignore_errors=True)
        sync_folder(folder.parent)
        return count


class AnswerWriter:
    """Appends an annotator's entries to a file of this process. Each is on disk when the call returns."""

    def __init__(self, annotations: AnnotationSet, annotator: str) -> None:
        self.annotations = annotations
        self.annotator = check_name(annotator, "The annotator")
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        folder = annotations.folder / "answers" / annotator
        self.path = folder / f"{stamp}-{uuid.uuid4().hex[:8]}.jsonl"
        self._is_open = False

    def write(self, entry: Answer | Undo) -> None:
        """Append an entry and sync it to disk.

        Raises ``UserError`` if the annotator's answers were deleted since this writer began.
        """
        line = json.dumps(entry.model_dump(), ensure_ascii=True) + "\n"
        flags = os.O_WRONLY | os.O_APPEND
        if not self._is_open:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags |= os.O_CREAT | os.O_EXCL
        try:
            descriptor = os.open(self.path, flags, 0o644)
        except FileNotFoundError:
            raise UserError(
                f"annotations {self.annotations.name}: the answers of '{self.annotator}' were deleted while this "
                "session was open, so nothing more is written. Start again to answer anew."
            ) from None
        try:
            _write_all(descriptor, line.encode("ascii"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if not self._is_open:
            # The new names must survive a power cut as well.
            for folder in (self.path.parent, self.path.parent.parent, self.annotations.folder):
                sync_folder(folder)
            self._is_open = True

    def undo(self, answer: Answer) -> None:
        """Withdraw an earlier answer."""
        self.write(Undo(id=new_id(), answer=answer.id, annotator=self.annotator, time=now()))


def find_set(root: Path, name: str) -> AnnotationSet:
    """Return a set that has pairs. Raises ``UserError`` with the names of the store's sets if there is none."""
    annotations = AnnotationSet(root, name)
    if not annotations.exists:
        sets = ", ".join(list_sets(root)) or "none"
        raise UserError(
            f"{root}: there is no set of annotations '{name}'; sets there: {sets}. `align annotate {name} --pairs "
            "SOURCE` makes one; --store or $ALIGN_STORE names another store."
        )
    return annotations


def list_sets(root: Path) -> list[str]:
    """Return the names of a store's sets."""
    folder = root / ANNOTATIONS
    return sorted(path.name for path in folder.iterdir() if (path / "pairs").is_dir()) if folder.is_dir() else []


def _journal_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the place and the fields of each complete line; a torn last line is skipped."""
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(line: str | bytes, place: str) -> dict[str, Any]:
    try:
        return parse_object(line.encode() if isinstance(line, str) else line)
    except DamagedFile as error:
        raise UserError(f"{place} {error}; restore the file, or delete the line.") from None


def _read_line(schema: type[Line], fields: Mapping[str, Any], place: str) -> Line:
    try:
        return validate(schema, fields)
    except DamagedFile as error:
        raise UserError(f"{place} {error}.") from None


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
