"""Look at rows and at what a trainer's batches make of them, and collect every finding.

The order of work: the template once, then each row's turns, then its tokens and labels, then what only many rows show.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from align.config.stages.lint import MOST_ROWS
from align.data.rows import Row
from align.errors import UserError
from align.lint.batches import Collator, Tokens, padded_labels, tokens_of
from align.lint.dialect import Dialect, squeezed
from align.lint.findings import Finding, Findings, Place
from align.lint.labels import Supervise, check_cut_off, check_document_start, check_labels
from align.lint.pairs import Pairs
from align.lint.repeated_answers import check_leaked_answers, check_repeated_answers
from align.lint.splits import Repeats, check_leaks
from align.lint.template import check_template, injected_system
from align.lint.text import check_turns
from align.lint.tokens import Limits, check_tokens, labeled
from align.models.render import render_prompt
from align.training import rows as encoding
from align.training.unpaired import encode_unpaired

StageKind = Literal["sft", "dpo", "reward", "kto", "prompts"]
Prepared = Callable[[int], "dict[str, Any] | None"]
"""A row of the trainer's dataset by the row's index in its split; None for a row that was left out."""

START_CHECKS = 200
"""Rows whose beginning is compared with what sampling would see: templates do not differ from row to row."""
PADDED = 8
"""Rows that are also looked at in one padded batch."""
SKEW, FEWEST = 0.95, 50

LEFT_OUT = {
    encoding.NO_ROOM: "no-room-for-answer",
    encoding.TOO_LONG: "over-max-length",
    encoding.SAME_ANSWERS: "chosen-equals-rejected",
}
ENCODERS: dict[str, Callable[[Any, Sequence[Row], int], encoding.Encoded]] = {
    "sft": encoding.encode_supervised,
    "dpo": encoding.encode_pairs,
    "reward": encoding.encode_conversations,
    "kto": encode_unpaired,
}
NO_LIMIT = 1 << 30


def relevant(row: Row, stage: StageKind) -> Row:
    """The row without the answers that a stage does not read."""
    unread = {
        "sft": ("rejected", "chosen") if row.get("completion") else ("rejected",),
        "kto": ("chosen", "rejected"),
        "prompts": ("completion", "chosen", "rejected"),
    }.get(stage, ("completion",))
    return {name: value for name, value in row.items() if name not in unread}


@dataclass(frozen=True)
class Options:
    """How to look. ``rows`` is the most rows per split (None: all), drawn by ``seed``."""

    stage: StageKind = "sft"
    limits: Limits = field(default_factory=Limits)
    supervise: Supervise = "last"
    ends: frozenset[int] = frozenset()
    rows: int | None = MOST_ROWS
    seed: int = 0


@dataclass
class Linter:
    """Collects what ``look`` meets; ``result`` gives the findings."""

    tokenizer: Any
    options: Options
    found: Findings = field(default_factory=Findings)
    totals: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Rows looked at and rows there are, per split."""

    def __post_init__(self) -> None:
        self.dialect = Dialect.of(self.tokenizer, self.options.ends)
        check_template(self.dialect, self.found)
        self.injected = injected_system(self.dialect)
        self._pairs, self._labels = Pairs(), {True: 0, False: 0}
        self.rows: dict[str, list[tuple[Place, Row]]] = {}
        """Rows looked at, with their places, per split."""
        self._starts = 0

    def look(
        self, split: str, rows: Sequence[Row], collator: Collator | None, prepared: Prepared | None = None
    ) -> None:
        """Look at a split: ``rows`` as they are in it, ``prepared`` as the trainer has them, else encoded here."""
        numbers = self.sample(len(rows))
        self.look_at_these(split, ((number, rows[number]) for number in numbers), len(rows), collator, prepared)

    def look_at_these(
        self,
        split: str,
        rows: Iterable[tuple[int, Row]],
        total: int,
        collator: Collator | None,
        prepared: Prepared | None = None,
    ) -> None:
        """The same for some rows of ``total``, with their indices."""
        repeats, kept = Repeats(), self.rows.setdefault(split, [])
        shown: list[tuple[dict[str, Any], int]] = []
        for number, whole in rows:
            row = relevant(whole, self.options.stage)
            place = Place(split, number + 1, str(row.get("id", "")), str(row.get("_where", "")))
            kept.append((place, row))
            check_turns(row, place, self.dialect, self.found)
            if isinstance(row.get("label"), bool):
                self._labels[row["label"]] += 1
            sequences, made = self._sequences(number, row, place, collator, prepared)
            self._look_at(sequences)
            if sequences:
                repeats.check([seen.ids for seen in sequences], place, sequences[0].text, self.found)
            if made is not None and len(shown) < PADDED and sequences and sequences[0].labels is not None:
                shown.append((made, sum(end - start for start, end in labeled(sequences[0]))))
        self.totals[split] = (len(kept), total)
        self.found.looked_at += len(kept)
        if collator is not None and len(shown) > 1:
            self._check_padding(split, shown, collator)

    def look_at_documents(self, split: str, dataset: Any, collator: Collator) -> None:
        """Look at a trainer's dataset whose rows are not those that were given: packed ones."""
        numbers = self.sample(len(dataset))
        self.totals[split] = (len(numbers), len(dataset))
        self.found.looked_at += len(numbers)
        for number in numbers:
            row, place = dict(dataset[number]), Place(split, number + 1)
            parts = tokens_of(row, None, place, "sft", collator, self.dialect)
            lengths = row.get("seq_lengths")
            if lengths is not None and [len(seen.ids) for seen in parts] != list(lengths):
                starts = f"documents of {list(lengths)} tokens, positions that begin anew for {len(parts)}"
                self.found.add("pack-leak", place, starts)
            for seen in parts:
                check_tokens(seen, self.options.limits, self.found)
                check_labels(seen, self.options.limits, self.options.supervise, self.found)
                if lengths is not None:
                    check_document_start(seen, self.found)

    def result(self, waive: Sequence[str] = ()) -> list[Finding]:
        """All findings, the worst first."""
        self._pairs.finish(self.found)
        for rows in self.rows.values():
            check_repeated_answers(rows, self.found)
        if "train" in self.rows and "test" in self.rows:
            check_leaks(self.rows["train"], self.rows["test"], self.found)
            check_leaked_answers(self.rows["train"], self.rows["test"], self.found)
        count = sum(self._labels.values())
        if count >= FEWEST and max(self._labels.values()) > SKEW * count:
            self.found.add("label-skew", None, f"{self._labels[True]} of {count} labels are true")
        return self.found.result(waive)

    def sample(self, count: int) -> list[int]:
        """Which of ``count`` rows are looked at, in order."""
        most = self.options.rows
        if most is None or count <= most:
            return list(range(count))
        return sorted(random.Random(f"lint:{self.options.seed}").sample(range(count), most))  # noqa: S311

    def _sequences(
        self, number: int, row: Row, place: Place, collator: Collator | None, prepared: Prepared | None
    ) -> tuple[list[Tokens], dict[str, Any] | None]:
        """The row's token sequences, none for a row that is left out, and the trainer's row they came from."""
        stage = self.options.stage
        made = prepared(number) if prepared is not None else None
        if made is None:
            made = self._encode(row, place, leave=prepared is not None)
        if made is None:
            return [], None
        if stage == "prompts":
            return [Tokens(place, "prompt", list(made["ids"]), None, row["prompt"], True, self.dialect)], None
        assert collator is not None
        return tokens_of(made, row, place, stage, collator, self.dialect), made

    def _encode(self, row: Row, place: Place, leave: bool) -> dict[str, Any] | None:
        """The row as the stage would encode it, or None with the reason noted. ``leave``: the trainer left it out."""
        most = self.options.limits.max_length or NO_LIMIT
        try:
            if self.options.stage == "prompts":
                ids = render_prompt(self.tokenizer, row["prompt"], row.get("tools"))
                if len(ids) > most:
                    self.found.add("over-max-length", place, f"{len(ids)} tokens, at most {most} are taken")
                    return None
                return {"ids": ids}
            encoded = ENCODERS[self.options.stage](self.tokenizer, [row], most)
        except encoding.PromptRewritten as error:
            self.found.add("generation-prompt-differs", place, str(error))
            return None
        except UserError as error:
            self.found.add("template-refuses-row", place, str(error))
            return None
        except (UnicodeError, TypeError) as error:
            if "not-utf8" in self.found.names():  # a lone surrogate, which no tokenizer takes
                return None
            raise error
        for what in encoded.counts:
            if what in LEFT_OUT:
                self.found.add(LEFT_OUT[what], place, row["prompt"][-1]["content"])
        return dict(encoded.rows[0]) if encoded.rows and not leave else None

    def _look_at(self, sequences: list[Tokens]) -> None:
        options = self.options
        for seen in sequences:
            check_tokens(seen, options.limits, self.found)
            check_labels(seen, options.limits, options.supervise, self.found)
            check_cut_off(seen, self.found)
            self._check_start(seen)
            if self.injected and seen.messages and seen.messages[0]["role"] != "system":
                self.found.add("unexpected-system-prompt", seen.place, self.injected, alike=True)
        if [seen.side for seen in sequences] == ["chosen", "rejected"]:
            self._pairs.check(sequences[0], sequences[1], self.found)

    def _check_start(self, seen: Tokens) -> None:
        """Training's ids begin with those that sampling would be given."""
        limit = self.options.limits.max_length
        cut = limit is not None and len(seen.ids) >= limit
        if seen.labels is None or len(seen.messages) < 2 or cut or self._starts >= START_CHECKS:
            return
        self._starts += 1
        start = render_prompt(self.tokenizer, seen.messages[:-1], seen.tools)
        bos = self.tokenizer.bos_token_id
        if seen.ids[: len(start)] == start or (bos is not None and seen.ids[:2] == [bos, bos]):
            return
        at = next((at for at, pair in enumerate(zip(start, seen.ids, strict=False)) if pair[0] != pair[1]), len(start))
        sees, trains = self.dialect.decode(start[at:]), self.dialect.decode(seen.ids[at : at + 20])
        if squeezed(sees) or squeezed(trains):
            self.found.add("generation-prompt-differs", seen.place, f"sampling sees {sees!r}, training {trains!r}")

    def _check_padding(self, split: str, shown: list[tuple[dict[str, Any], int]], collator: Collator) -> None:
        together = padded_labels([row for row, _ in shown], collator)
        alone = [count for _, count in shown]
        if together and together[: len(alone)] != alone:
            self.found.add("padding-supervised", None, f"{split}: labels per row {together}, alone {alone}")
