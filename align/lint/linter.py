"""The linter: looks at rows and at a trainer's batches of them, and collects every finding.

The order of work: the template once, then each row's turns, its tokens and labels, then the checks across rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.config.stages.lint import MAX_ROWS
from align.data.rows import Row
from align.errors import UserError
from align.lint.across_rows import (
    DuplicateRows,
    PairChecks,
    check_leaked_answers,
    check_leaked_prompts,
    check_quoted_answers,
    check_repeated_answers,
    check_roles,
)
from align.lint.chat_format import ChatFormat, check_template, injected_system, squeezed
from align.lint.encodings import BatchReader, Collator, TokenSequence, encoding_of, padded_label_counts
from align.lint.findings import Finding, Findings, Place
from align.lint.tokens import (
    Limits,
    Supervise,
    check_cut_off,
    check_document_start,
    check_labels,
    check_tokens,
    label_runs,
)
from align.lint.turns import CallChecks, check_thoughts, check_turns
from align.models.chat.render import PromptRewritten, render_prompt
from align.training.rows import NO_ROOM, SAME_ANSWERS, TOO_LONG

Prepared = Callable[[int], "dict[str, Any] | None"]
"""Index of a row in its split → its row of the trainer's dataset; None for a skipped row."""

START_CHECKS = 200
"""Rows whose beginning is compared with the sampling prompt: templates do not differ from row to row."""
PADDED_ROWS = 8
"""Rows that are also looked at in one padded batch."""
SKEWED_SHARE = 0.95
MIN_LABELS = 50
"""From ``MIN_LABELS`` labels on, one label in more than this share of them is reported."""

LEFT_OUT_RULES = {
    NO_ROOM: "no-room-for-answer",
    TOO_LONG: "over-max-length",
    SAME_ANSWERS: "chosen-equals-rejected",
}
"""Reason why an encoder leaves a row out → the rule of the finding."""
NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Options:
    """Options of a linter."""

    stage: str = "sft"
    """Kind of stage whose reading of the rows is linted, or a recipe's kind of rows (``encoding_of``)."""
    limits: Limits = field(default_factory=Limits)
    supervise: Supervise = "last"
    ends: frozenset[int] = frozenset()
    """Further ids that end a turn, from the model's generation config."""
    rows: int | None = MAX_ROWS
    """Most rows per split, drawn by ``seed``; None looks at all of them."""
    seed: int = 0


@dataclass
class Linter:
    """Looks at splits with ``look``, and returns the findings with ``result``."""

    tokenizer: Any
    options: Options
    findings: Findings = field(default_factory=Findings)
    totals: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Split → number of rows looked at, and of all rows."""

    def __post_init__(self) -> None:
        self.encoding = encoding_of(self.options.stage)
        # The template is probed once; every check of a row compares with what the probe showed.
        self.chat_format = ChatFormat.of(self.tokenizer, self.options.ends)
        check_template(self.chat_format, self.findings)
        self.injected_system = injected_system(self.chat_format)
        self.rows: dict[str, list[tuple[Place, Row]]] = {}
        """Split → the rows looked at, with their places."""
        self._pairs = PairChecks()
        self._calls = CallChecks(self.chat_format)
        self._labels = {True: 0, False: 0}
        self._checked_starts = 0

    def look(
        self, split: str, rows: Sequence[Row], collator: Collator | None, prepared: Prepared | None = None
    ) -> None:
        """Look at a split's rows: as the trainer ``prepared`` them, else as its encoder would."""
        numbers = self.sample(len(rows))
        self.look_at_rows(split, ((number, rows[number]) for number in numbers), len(rows), collator, prepared)

    def look_at_rows(
        self,
        split: str,
        rows: Iterable[tuple[int, Row]],
        total: int,
        collator: Collator | None,
        prepared: Prepared | None = None,
    ) -> None:
        """Look at some rows of ``total``, given with their indices."""
        # Per split: a row that repeats in the other split is a leak, which `result` reports.
        duplicates = DuplicateRows()
        placed_rows = self.rows.setdefault(split, [])
        batch: list[tuple[dict[str, Any], int]] = []  # rows of a padded batch, with their number of labels
        for number, full_row in rows:
            row = self.encoding.relevant_fields(full_row)
            place = Place(split, number + 1, str(row.get("id", "")), str(row.get("_where", "")))
            placed_rows.append((place, row))
            # 1. The turns as text.
            check_turns(row, place, self.chat_format, self.findings)
            check_thoughts(row, place, self.findings, is_thinking=self.chat_format.is_thinking)
            self._calls.check(row, place, self.findings)
            if isinstance(row.get("label"), bool):
                self._labels[row["label"]] += 1
            # 2. The tokens and labels that the stage makes of the row.
            sequences, encoded = self._sequences(number, row, place, collator, prepared)
            self._check_sequences(sequences)
            if not sequences:
                continue
            first = sequences[0]
            duplicates.check([sequence.ids for sequence in sequences], place, first.text, self.findings)
            if encoded is not None and len(batch) < PADDED_ROWS and first.labels is not None:
                batch.append((encoded, sum(end - start for start, end in label_runs(first))))
        self.totals[split] = (len(placed_rows), total)
        self.findings.looked_at += len(placed_rows)
        # 3. The first rows again in one padded batch: padding must not change their labels.
        if collator is not None and len(batch) > 1:
            self._check_padding(split, batch, collator)

    def look_at_documents(self, split: str, dataset: Any, collator: Collator) -> None:
        """Look at a trainer's dataset whose rows are not the original ones, such as packed documents."""
        numbers = self.sample(len(dataset))
        reader = BatchReader(collator, self.chat_format, ())
        self.totals[split] = (len(numbers), len(dataset))
        self.findings.looked_at += len(numbers)
        for number in numbers:
            row = dict(dataset[number])
            place = Place(split, number + 1)
            sequences = reader.sequences(row, None, place)
            # Positions restart at every document; if they count other documents than the pack has, attention leaks.
            lengths = row.get("seq_lengths")
            if lengths is not None and [len(sequence.ids) for sequence in sequences] != list(lengths):
                excerpt = f"documents of {list(lengths)} tokens, positions that restart for {len(sequences)}"
                self.findings.add("pack-leak", place, excerpt)
            for sequence in sequences:
                check_tokens(sequence, self.options.limits, self.findings)
                check_labels(sequence, self.options.limits, self.options.supervise, self.findings)
                if lengths is not None:
                    check_document_start(sequence, self.findings)

    def result(self, waive: Sequence[str] = ()) -> list[Finding]:
        """Run the checks across rows, and return all findings, the most severe first."""
        self._pairs.finish(self.findings)
        for rows in self.rows.values():
            check_repeated_answers(rows, self.findings)
            check_quoted_answers(rows, self.findings)
            check_roles(rows, self.findings)
        if "train" in self.rows and "test" in self.rows:
            check_leaked_prompts(self.rows["train"], self.rows["test"], self.findings)
            check_leaked_answers(self.rows["train"], self.rows["test"], self.findings)
        count = sum(self._labels.values())
        if count >= MIN_LABELS and max(self._labels.values()) > SKEWED_SHARE * count:
            self.findings.add("label-skew", None, f"{self._labels[True]} of {count} labels are true")
        return self.findings.result(waive)

    def sample(self, count: int) -> list[int]:
        """Draw the indices to look at, of ``count`` rows, in order."""
        limit = self.options.rows
        if limit is None or count <= limit:
            return list(range(count))
        return sorted(random.Random(f"lint:{self.options.seed}").sample(range(count), limit))  # noqa: S311

    def _sequences(
        self, number: int, row: Row, place: Place, collator: Collator | None, prepared: Prepared | None
    ) -> tuple[list[TokenSequence], dict[str, Any] | None]:
        """Return the row's sequences and the trainer's row they came from; none for a skipped row."""
        # The trainer's own row if there is one, so the linter sees exactly what is trained on.
        encoded = prepared(number) if prepared is not None else None
        if encoded is None:
            encoded = self._encode(row, place, is_left_out=prepared is not None)
        if encoded is None:
            return [], None
        if self.encoding.encode is None:
            ids = list(encoded["ids"])
            return [TokenSequence(place, "prompt", ids, None, row["prompt"], True, self.chat_format)], None
        assert collator is not None
        reader = BatchReader(collator, self.chat_format, self.encoding.sides)
        return reader.sequences(encoded, row, place), encoded

    def _encode(self, row: Row, place: Place, is_left_out: bool) -> dict[str, Any] | None:
        """Encode a row as the stage would, and report the reason if it cannot.

        Return None for such a row, and for a row that the trainer left out (``is_left_out``).
        """
        max_length = self.options.limits.max_length or NO_LIMIT
        try:
            if self.encoding.encode is None:
                ids = render_prompt(self.tokenizer, row["prompt"], row.get("tools"))
                if len(ids) > max_length:
                    self.findings.add("over-max-length", place, f"{len(ids)} tokens, at most {max_length} are taken")
                    return None
                return {"ids": ids}
            encoded = self.encoding.encode(self.tokenizer, [row], max_length)
        except PromptRewritten as error:
            self.findings.add("generation-prompt-differs", place, str(error))
            return None
        except UserError as error:
            self.findings.add("template-refuses-row", place, str(error))
            return None
        except (UnicodeError, TypeError) as error:
            if "not-utf8" in self.findings.names():  # a lone surrogate, which no tokenizer accepts
                return None
            raise error
        for reason in encoded.counts:
            if reason in LEFT_OUT_RULES:
                self.findings.add(LEFT_OUT_RULES[reason], place, row["prompt"][-1]["content"])
        return dict(encoded.rows[0]) if encoded.rows and not is_left_out else None

    def _check_sequences(self, sequences: list[TokenSequence]) -> None:
        options = self.options
        for sequence in sequences:
            check_tokens(sequence, options.limits, self.findings)
            check_labels(sequence, options.limits, options.supervise, self.findings)
            check_cut_off(sequence, self.findings)
            self._check_start(sequence)
            if self.injected_system and sequence.messages and sequence.messages[0]["role"] != "system":
                self.findings.add("unexpected-system-prompt", sequence.place, self.injected_system, is_uniform=True)
        if [sequence.side for sequence in sequences] == ["chosen", "rejected"]:
            self._pairs.check(sequences[0], sequences[1], self.findings)

    def _check_start(self, sequence: TokenSequence) -> None:
        """Check that training's ids begin with the prompt of sampling."""
        limit = self.options.limits.max_length
        is_full = limit is not None and len(sequence.ids) >= limit
        if sequence.labels is None or len(sequence.messages) < 2 or is_full or self._checked_starts >= START_CHECKS:
            return
        self._checked_starts += 1
        # A doubled BOS has its own finding, so it is skipped here.
        start = render_prompt(self.tokenizer, sequence.messages[:-1], sequence.tools)
        bos = self.tokenizer.bos_token_id
        if sequence.ids[: len(start)] == start or (bos is not None and sequence.ids[:2] == [bos, bos]):
            return
        # The first id that differs; both sides are shown from there on, unless only white space differs.
        pairs = enumerate(zip(start, sequence.ids, strict=False))
        split = next((index for index, (a, b) in pairs if a != b), len(start))
        sampled = self.chat_format.decode(start[split:])
        trained = self.chat_format.decode(sequence.ids[split : split + 20])
        if squeezed(sampled) or squeezed(trained):
            excerpt = f"sampling sees {sampled!r}, training {trained!r}"
            self.findings.add("generation-prompt-differs", sequence.place, excerpt)

    def _check_padding(self, split: str, batch: list[tuple[dict[str, Any], int]], collator: Collator) -> None:
        """Check that rows have as many labels in a padded batch as without padding."""
        padded = padded_label_counts([row for row, _ in batch], collator)
        alone = [count for _, count in batch]
        if padded and padded[: len(alone)] != alone:
            self.findings.add("padding-supervised", None, f"{split}: labels per row {padded}, alone {alone}")
