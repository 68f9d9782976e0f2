"""Held-out preference accuracy of a policy: how often the chosen answer is likelier than the rejected one.

Both answers are read after the same prompt, under the chat template, each with the end of its turn if it has one.
The score is the policy's own likelihood, without a reference: not DPO's implicit reward. A tie is wrong, as in trl. For
the accuracy of reward models see ``reward_pairs.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from align.config.recipe.format_options import PAIRED
from align.config.recipe.source_settings import FilesSource, HubSource
from align.config.stages.evaluation.tasks import PreferenceConfig
from align.data.rows import Dropped, Row, is_finished
from align.errors import UserError
from align.evaluation.scorecard import Metric
from align.evaluation.tasks.base import Item, Measured, Reader, Task, TaskInputs
from align.evaluation.tasks.encoding import answer_ids, sum_logprobs
from align.evaluation.tasks.records import describe_records, draw, numbered_ids, record_source
from align.store.fingerprint import digest

BLOCK = 200
"""Pairs per cached result: an interrupted run loses at most one block."""
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


def build(name: str, config: PreferenceConfig, inputs: TaskInputs) -> PreferenceTask:
    """Build the task from its pairs. Raises ``UserError`` if no pair is usable, and for records that are not pairs."""
    if config.reads_stage_pairs:
        rows = inputs.pairs
        description: dict[str, Any] = {} if config.max_items is None else {"max_items": config.max_items}
        description["data"] = "the stage's pairs"
    else:
        settings = {"format": config.format, "options": config.options}
        rows = read_pairs(record_source(config).model_copy(update=settings), inputs, name)
        description = describe_records(config, inputs.base)
    usable = [row for row in rows if _is_plain(row)]
    if len(usable) < len(rows):
        inputs.warn(
            f"{name}: {len(rows) - len(usable)} of {len(rows)} pairs are left out: tools, several turns, or no words"
        )
    if not usable:
        raise UserError(
            f"{name}: none of {len(rows)} pairs can be read: all have tools or several turns, or an answer is empty."
        )
    return PreferenceTask(name, draw(usable, config.max_items, inputs.seed), description)


class PreferenceTask(Task):
    """Pairs of answers that a policy reads."""

    reads = True
    renders = True
    kind = "preference"
    title = "Held-out preferences"

    def __init__(self, name: str, rows: Sequence[Row], description: dict[str, Any] | None = None) -> None:
        self.name = name
        self.rows = list(rows)
        self.metrics = METRICS
        self.primary = "acc"
        self.description = description or {}
        ids = numbered_ids([str(row["id"]) for row in self.rows])
        self.items = [
            Item(id, str(row["source"]), list(row["prompt"]), {side: row[side][-1]["content"] for side in SIDES})
            for id, row in zip(ids, self.rows, strict=True)
        ]

    def settings(self) -> dict[str, Any]:
        """Return the data, and the accuracy of always preferring the shorter answer (equal lengths count half)."""
        sizes = [[len(item.data[side]) for side in SIDES] for item in self.items]
        shorter = sum(0.5 if chosen == rejected else float(chosen < rejected) for chosen, rejected in sizes)
        return {**self.description, "chosen_is_shorter": shorter / len(sizes)}

    def read(self, reader: Reader) -> Measured:
        """Return one policy's accuracy."""
        sums: list[list[float]] = []
        counts: list[list[int]] = []
        cut = apart = 0
        for start in range(0, len(self.rows), BLOCK):
            block = self.rows[start : start + BLOCK]
            texts = [[row["prompt"], *([row[side], is_finished(row, side)] for side in SIDES)] for row in block]
            identity = digest(["preference 1", reader.max_length, texts])
            result = reader.cached(f"{self.name}-{start}", identity, partial(self._read_block, reader, block))
            sums += result["sums"]
            counts += result["tokens"]
            cut += result["cut"]
            apart += result["apart"]
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
        """Return the log-likelihood in nats and the number of tokens of both answers of each pair."""
        pairs = []
        apart = 0
        for row in block:
            # Both answers of a pair share the rendered prompt, which the forward pass then reads once.
            context = reader.render(list(row["prompt"]))
            for side in SIDES:
                text = row[side][-1]["content"]
                ids, is_from_conversation = answer_ids(
                    reader.tokenizer, list(row["prompt"]), text, is_finished(row, side)
                )
                apart += not is_from_conversation
                # Templates that rewrite the conversation have their answers encoded separately; the notes count them.
                pairs.append((context, ids))
        sums, sizes, cut = sum_logprobs(reader, pairs, self.name)
        return {
            "sums": [sums[start : start + 2] for start in range(0, len(sums), 2)],
            "tokens": [sizes[start : start + 2] for start in range(0, len(sizes), 2)],
            "cut": cut,
            "apart": apart,
        }


def choose_pair_format(source: FilesSource | HubSource, records: Iterator[Any], inputs: TaskInputs, name: str) -> Any:
    """Return the format of records of pairs, with the records. Raises ``UserError`` for another format."""
    from align.data.sources import choose_format

    choice = choose_format(source, records, "preferences")
    form = choice.format.form
    if form not in PAIRED:
        raise UserError(
            f"{name}: {source.label}: format {form} has no chosen and rejected answer; formats that have are "
            f"{', '.join(PAIRED)}. Make pairs with a recipe's `pairs` step, and name its stage as the stage's `pairs`."
        )
    if choice.reason:
        inputs.note(f"{name}: format {form}: {choice.reason}")
    return choice


def format_counts(reasons: Counter[str]) -> str:
    """Format reasons with their counts, the most frequent first."""
    return ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())


def read_pairs(source: FilesSource | HubSource, inputs: TaskInputs, name: str) -> list[Row]:
    """Return rows of the source's pairs, each with a ``source``.

    Records that make no pair (equal answers, no answer) are skipped and counted in a warning. Raises ``UserError`` for
    a record that cannot be read, and for records of another format than pairs.
    """
    from align.data.formats import convert
    from align.data.rows import BadRecord
    from align.data.sources import read

    choice = choose_pair_format(source, read(source, inputs.base), inputs, name)
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for item in choice.records:
        if isinstance(item, BadRecord):
            raise item
        where, record = item
        for row in convert(record, choice.format, where, "preferences"):
            if isinstance(row, Dropped):
                dropped[row.reason] += 1
            else:
                rows.append({"source": source.label, **row})
    if dropped:
        inputs.warn(f"{name}: {dropped.total()} records are left out: {format_counts(dropped)}")
    if not rows:
        raise UserError(f"{name}: {source.label}: there are no pairs in it; nothing could be compared.")
    return rows


def _is_plain(row: Row) -> bool:
    """Return True for a pair of one turn on each side, without tools: tools and tool calls are not rendered here."""
    if any(len(row[side]) != 1 for side in SIDES):
        return False
    if row.get("tools") or any(message.get("tool_calls") for side in SIDES for message in row[side]):
        return False
    return all(row[side][-1]["content"].strip() for side in SIDES)
