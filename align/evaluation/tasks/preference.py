"""Held-out preference accuracy of a policy: how often it finds the chosen answer likelier than the rejected one.

Both answers are read behind the same prompt, under the chat template, each with the end of its turn where it has one.
It is the policy's own likelihood, without a reference: not DPO's implicit reward. A tie is wrong, as in trl. Left out:
the accuracy of reward models (``reward_pairs.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self

from pydantic import model_validator

from align.data.formats import PAIRED, Format, FormatOptions
from align.data.rows import Dropped, Row, is_finished
from align.data.source_configs import FilesSource, HubSource
from align.errors import UserError
from align.evaluation.tasks.base import Given, Item, Measured, Metric, Reader, Task, TaskConfig
from align.evaluation.tasks.encoding import answer_ids, fit
from align.evaluation.tasks.reading import TaskData, draw
from align.store.fingerprint import digest

BLOCK = 200
"""Pairs read between two results on disk: what an interrupted reading loses."""
SIDES = ("chosen", "rejected")

METRICS = {
    "acc": Metric(
        "preference accuracy",
        "higher",
        "share",
        "pairs whose chosen answer has the higher log-likelihood; short answers have it easier",
    ),
    "acc_norm": Metric(
        "preference accuracy, per token",
        "higher",
        "share",
        "pairs whose chosen answer has the higher log-likelihood per token",
    ),
}


class PreferenceConfig(TaskData, TaskConfig):
    """Pairs of a better and a worse answer: files, a dataset of the Hub, or by default the stage's own ``pairs``."""

    task: Literal["preference"] = "preference"
    format: Format = "auto"
    """How a record of the files is spelled, as in a recipe's source; ``auto`` says what it chose."""
    options: FormatOptions = FormatOptions()
    """What is taken of a record where its format leaves a choice, as in a recipe's source."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self._from_stage():
            return self
        if self.files is None and (self.dataset is None or self.revision is None):
            raise ValueError(
                "give its files, or its dataset and revision (a commit, 40 hexadecimal digits) on the Hub; without any "
                "of them it takes the stage's `pairs`"
            )
        hub = [name for name in ("dataset", "revision", "config", "split") if getattr(self, name) is not None]
        if self.files is not None and hub:
            raise ValueError(f"it has files, so '{hub[0]}' means nothing; drop one of them")
        return self

    def _from_stage(self) -> bool:
        return all(getattr(self, name) is None for name in ("files", "dataset", "revision", "config", "split"))

    def build(self, name: str, given: Given) -> PreferenceTask:
        """Read the pairs. Raises ``UserError`` where there are none, and for records that are no pairs."""
        described: dict[str, Any] = {} if self.max_items is None else {"max_items": self.max_items}
        if self._from_stage():
            rows = given.pairs
            if not rows:
                raise UserError(f"{name}: there are no pairs; name the evaluate stage's `pairs`, or files of its own.")
            described["data"] = "the stage's pairs"
        else:
            settings = {"format": self.format, "options": self.options}
            rows = read_pairs(self.source().model_copy(update=settings), given, name)
            described = self.described(given.base)
        usable = [row for row in rows if _is_plain(row)]
        if len(usable) < len(rows):
            given.warn(f"{name}: {len(rows) - len(usable)} of {len(rows)} pairs are left out: tools, or no words")
        if not usable:
            raise UserError(f"{name}: none of {len(rows)} pairs can be read: all have tools, or an answer is empty.")
        return PreferenceTask(name, draw(usable, self.max_items, given.seed), described)


class PreferenceTask(Task):
    """See the module."""

    reads = True
    renders = True
    kind = "preference"
    title = "Held-out preferences"

    def __init__(self, name: str, rows: Sequence[Row], described: dict[str, Any] | None = None) -> None:
        self.name, self.rows = name, list(rows)
        self.metrics = METRICS
        self.primary = "acc"
        self.described = described or {}
        seen: Counter[str] = Counter()
        self.items = []
        for row in self.rows:
            answers = {side: row[side][-1]["content"] for side in SIDES}
            item = Item(str(row["id"]), str(row["source"]), list(row["prompt"]), answers)
            seen[item.id] += 1
            self.items.append(item if seen[item.id] == 1 else replace(item, id=f"{item.id}-{seen[item.id]}"))

    def settings(self) -> dict[str, Any]:
        """Data, and what always preferring the shorter answer would get (equal ones half)."""
        sizes = [[len(item.data[side]) for side in SIDES] for item in self.items]
        shorter = sum(0.5 if chosen == rejected else float(chosen < rejected) for chosen, rejected in sizes)
        return {**self.described, "chosen_is_shorter": shorter / len(sizes)}

    def read(self, reader: Reader) -> Measured:
        """One policy's accuracy."""
        sums: list[list[float]] = []
        counts: list[list[int]] = []
        cut = apart = 0
        for start in range(0, len(self.rows), BLOCK):
            block = self.rows[start : start + BLOCK]
            texts = [[row["prompt"], *([row[side], is_finished(row, side)] for side in SIDES)] for row in block]
            identity = digest(["preference 1", reader.max_length, texts])
            kept = reader.kept(f"{self.name}-{start}", identity, partial(self._read_block, reader, block))
            sums += kept["sums"]
            counts += kept["tokens"]
            cut += kept["cut"]
            apart += kept["apart"]
        means = [[total / count for total, count in zip(*pair, strict=True)] for pair in zip(sums, counts, strict=True)]
        return Measured(
            values={
                "acc": [[float(chosen > rejected)] for chosen, rejected in sums],
                "acc_norm": [[float(chosen > rejected)] for chosen, rejected in means],
            },
            notes={
                "ties": sum(chosen == rejected for chosen, rejected in sums),
                "inputs_cut": cut,
                "answers_encoded_apart": apart,
            },
        )

    def _read_block(self, reader: Reader, block: Sequence[Row]) -> dict[str, Any]:
        """Log-likelihood in nats and number of tokens of both answers of each pair."""
        pairs = []
        cut = apart = 0
        for row in block:
            context = reader.render(list(row["prompt"]))
            for side in SIDES:
                text = row[side][-1]["content"]
                ids, whole = answer_ids(reader.tokenizer, list(row["prompt"]), text, is_finished(row, side))
                before, ids, shortened = fit(context, ids, reader.max_length)
                cut, apart = cut + shortened, apart + (not whole)
                pairs.append((before, ids))
        found = reader.logprobs([context for context, _ in pairs], [ids for _, ids in pairs])
        sums = [math.fsum(values) for values in found]
        if any(map(math.isnan, sums)):
            raise RuntimeError(f"{self.name}: '{reader.info.name}' gives probabilities that are not numbers (NaN)")
        sizes = [len(ids) for _, ids in pairs]
        return {
            "sums": [sums[at : at + 2] for at in range(0, len(sums), 2)],
            "tokens": [sizes[at : at + 2] for at in range(0, len(sizes), 2)],
            "cut": cut,
            "apart": apart,
        }


def read_pairs(source: FilesSource | HubSource, given: Given, name: str) -> list[Row]:
    """Rows of the source's pairs, with a ``source`` each.

    Records that make no pair (equal answers, no answer) are left out and counted in a warning. Raises ``UserError`` for
    a record that cannot be read, and for records of another format than pairs.
    """
    from align.data.formats import convert
    from align.data.sources import BadRecord, choose_format, read

    form, why, records = choose_format(source, read(source, given.base), "preferences")
    if form not in PAIRED:
        raise UserError(
            f"{name}: {source.label}: format {form} has no chosen and rejected answer; formats that have are "
            f"{', '.join(PAIRED)}. Make pairs with a recipe's `pairs` step, and name its stage as the stage's `pairs`."
        )
    if why:
        print(f"{name}: format {form}: {why}")
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for item in records:
        if isinstance(item, BadRecord):
            raise item
        where, record = item
        for made in convert(record, form, where, "preferences", source.options):
            if isinstance(made, Dropped):
                dropped[made.reason] += 1
            else:
                rows.append({"source": source.label, **made})
    if dropped:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.most_common())
        given.warn(f"{name}: {dropped.total()} records are left out: {reasons}")
    if not rows:
        raise UserError(f"{name}: {source.label}: there are no pairs in it; nothing could be compared.")
    return rows


def _is_plain(row: Row) -> bool:
    """Whether a pair is words alone: the prompt's tools and an answer's calls are not rendered here."""
    if row.get("tools") or any(message.get("tool_calls") for side in SIDES for message in row[side]):
        return False
    return all(row[side][-1]["content"].strip() for side in SIDES)
