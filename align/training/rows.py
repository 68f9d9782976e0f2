"""Tokenize rows of messages and plain texts for training, and count every cut row and every skipped row.

trl's own preparation is not used: it caches on disk, silently drops over-long pairs, and supervises whatever the chat
template writes after the end of the turn. A document of plain text is its tokens between a begin and an end token. A
document longer than ``max_length`` is cut into consecutive windows that overlap by one token, so each token is
predicted once, from the tokens before it in its window. Packing is in ``packing.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.final_answers import thought_end
from align.data.rows import answer_side, is_finished, read_rows
from align.data.steps.split import hold_back
from align.errors import UserError
from align.models.chat.render import (
    READ_THOUGHTS,
    answer_turns,
    are_parts,
    assistant_mask,
    count_unlearned,
    render_answered,
    split_answer,
    split_turns,
)

if TYPE_CHECKING:
    import torch

    from align.pipeline.context import StageContext

Row = dict[str, Any]
MESSAGES = ("prompt", "completion", "chosen", "rejected")
"""Fields of a row that have messages."""
MASKED = -100
"""Label of a token without a loss; torch's and trl's convention."""
ROW = "row_number"
"""Column with a row's number among the sources, for an own loss, which gets the rows."""
KEPT_SHARE = 0.95
"""Share of the rows that the length in an error keeps."""
NO_ROOM = "skipped: the prompt alone fills max_length"
TOO_LONG = "skipped: longer than max_length"
CUT = "cut at max_length, so the answer has no end of turn"
SPLIT_UP = "split into a row for each answer, because the template rewrites earlier answers"
NOT_TRAINED = "skipped: every answer is marked as not to be trained on"
SAME_ANSWERS = "skipped: both answers are the same"
REWRITTEN = "skipped: the template rewrites earlier turns of an answer"


@dataclass
class Encoded:
    """Token ids of one split.

    ``rows`` are the inputs of the stage's trl trainer, ``lengths`` their tokens (of a pair's longer side), ``sources``
    the rows they come from. ``counts`` maps the reason for a cut or a left-out row, as in a warning, to its number.
    ``long`` are the tokens of the rows that were cut or skipped for their length.
    """

    rows: list[dict[str, list[int]]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    sources: list[Row] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    long: list[int] = field(default_factory=list)

    def add(self, row: dict[str, list[int]], length: int, source: Row) -> None:
        """Add an encoded row of ``length`` tokens, made from ``source``."""
        self.rows.append(row)
        self.lengths.append(length)
        self.sources.append(source)

    def count(self, reason: str, length: int | None = None) -> None:
        """Count a row that was cut or skipped for ``reason``; its ``length`` in tokens if that is the reason."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if length is not None:
            self.long.append(length)

    @property
    def all_lengths(self) -> list[int]:
        """Tokens of each row as it was, without rows that were skipped for another reason than their length."""
        # Cut rows are among ``lengths`` as well, where none is longer.
        kept = sorted(self.lengths)
        return [*kept[: len(kept) - self.counts.get(CUT, 0)], *self.long]


def number_rows(splits: Mapping[str, Encoded], *, as_list: bool = False) -> list[Row]:
    """Number the encoded rows of all splits in the column ``ROW``; return the rows they were made from, by number."""
    sources: list[Row] = []
    for encoded in splits.values():
        for row, source in zip(encoded.rows, encoded.sources, strict=True):
            row[ROW] = [len(sources)] if as_list else len(sources)  # type: ignore[assignment]
            sources.append(source)
    return sources


def collate_numbers(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the numbers of the rows (B,) as an input of the loss; nothing if the rows have none."""
    import torch

    if not rows or ROW not in rows[0]:
        return {}
    numbers = [row[ROW] for row in rows]
    return {ROW: torch.tensor([number for item in numbers for number in (item if isinstance(item, list) else [item])])}


def refuse_long_rows(stage: str, setting: str, limit: int, lengths: Sequence[int], noun: str) -> None:
    """Raise ``UserError`` if more than half of the rows, called ``noun``, have more than ``limit`` tokens.

    ``setting`` is the field of the limit.
    """
    long = sum(length > limit for length in lengths)
    if long <= len(lengths) / 2:
        return
    enough = sorted(lengths)[math.ceil(KEPT_SHARE * len(lengths)) - 1]
    raise UserError(
        f"{stage}: {long} of {len(lengths)} {noun} are longer than {setting} {limit} and would be skipped or cut. "
        f"`{setting}: {enough}` keeps {KEPT_SHARE:.0%} of them as they are. Raise it, or write `long_rows: skip` if it "
        "is meant so."
    )


def read_split(path: Path, most: int | None, stage: str) -> list[Row]:
    """Read the first ``most`` rows of a split. Raises ``UserError`` if the split is empty."""
    rows = read_rows(path)
    if not rows:
        raise UserError(
            f"{stage}: {path} has no rows; loosen the filters of its data stage, or write a test_size between 0 and 1 "
            "in its recipe."
        )
    return rows[:most]


def read_splits(context: StageContext) -> dict[str, list[Row]]:
    """Read the splits of the stage's ``data``: ``train``, ``test``, and ``validation`` if it holds rows back.

    ``test`` is missing if it has no rows (``test_size: 0``). Training then has no held-out scores.
    """
    config = context.config
    data = context.artifact("data")
    train = set_thoughts(config, read_split(data.split("train"), None, context.name))
    splits = {}
    if config.holds_back:
        train, splits["validation"] = hold_back_validation(context, train, config.eval_rows)
    test = set_thoughts(config, read_rows(data.split("test"))[: config.eval_rows])
    if test:
        splits["test"] = test
    else:
        context.note(f"{context.name}: the test split of '{data.stage}' is empty, so no held-out loss is measured")
    return {"train": train[: config.max_rows], **splits}


def set_thoughts(config: Any, rows: list[Row]) -> list[Row]:
    """Return rows as the stage's setting ``thoughts`` has them: unchanged, marked to be read, or without thoughts."""
    thoughts = getattr(config, "thoughts", "train")
    if thoughts == "drop":
        return [_without_thoughts(row) for row in rows]
    if thoughts == "read" and config.has_vocabulary:
        return [{**row, READ_THOUGHTS: True} for row in rows]
    return rows


def _without_thoughts(row: Row) -> Row:
    return {**row, **{name: list(map(answer_only, row[name])) for name in MESSAGES if row.get(name)}}


def answer_only(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without the thought that an assistant's turn begins with."""
    content = message["content"] or ""
    end = thought_end(content) if message["role"] == "assistant" else 0
    return {**message, "content": content[end:].lstrip()} if end else dict(message)


def counts(splits: Mapping[str, Encoded], noun: str) -> dict[str, int]:
    """Return the number of rows of each held-out split as metrics, ``test_<noun>``."""
    return {f"{name}_{noun}": len(split.rows) for name, split in splits.items() if name != "train"}


def hold_back_validation(context: StageContext, train: list[Row], most: int) -> tuple[list[Row], list[Row]]:
    """Call ``hold_back`` on a ``train`` split and log its size. Raises ``UserError`` for a single question."""
    # All rows of one question go to the same side, so validation questions are new to the model.
    learned, validation = hold_back(train, most)
    if not learned:
        raise UserError(
            f"{context.name}: the train split has one question only, and a checkpoint is chosen by rows that are not "
            "trained on. Add rows, or set `keep: last` without early_stopping."
        )
    context.note(
        f"{context.name}: {len(validation)} of {len(train)} train rows choose the checkpoint and are not trained on; "
        "the test split is not used for it"
    )
    return learned, validation


def encode_answers(tokenizer: Any, rows: Sequence[Row], max_length: int) -> Encoded:
    """Encode as ``encode_supervised``, with labels on every answer of a conversation."""
    return _encode_turns(tokenizer, rows, max_length, with_prompt=True)


def encode_supervised(tokenizer: Any, rows: Sequence[Row], max_length: int) -> Encoded:
    """Encode ``input_ids`` and ``labels`` for SFT on ``completion``, else ``chosen``.

    Labels are on the assistant's turns of the answer. The prompt and the text between the turns, such as the results of
    tools, are ``MASKED``. A turn with ``train: False`` has no labels; a row with only such turns is skipped and
    counted. An answer that does not fit is cut at ``max_length`` tokens and loses its end of turn. An answer that was
    cut off in sampling has no end of turn. Prompts that leave no room for an answer are skipped.
    """
    return _encode_turns(tokenizer, rows, max_length, with_prompt=False)


def _encode_turns(tokenizer: Any, rows: Sequence[Row], max_length: int, with_prompt: bool) -> Encoded:
    """Encode rows with labels on turns of their answers and, ``with_prompt``, also on turns of the prompt.

    Turns are located by rendering the conversation up to each of them, which works with any template. Some templates
    rewrite earlier turns once others follow, for example to drop thoughts. Then no single rendering contains each turn
    as it is sampled: the conversation becomes one row per turn, and is counted.
    """
    out = Encoded()
    for row in rows:
        side = answer_side(row)
        first = 0 if with_prompt else len(row["prompt"])
        places = answer_turns([*row["prompt"], *row[side]], first)
        if not places:
            out.count(NOT_TRAINED)
            continue
        parts = split_turns(tokenizer, row, side, places)
        conversation = [*parts[-1][0], *parts[-1][1]]
        # If all parts are prefixes of the last part, a single row can hold all answers.
        if are_parts(conversation, parts):
            labels = [MASKED] * len(conversation)
            for before, answer in parts:
                labels[len(before) : len(before) + len(answer)] = _turn_labels(tokenizer, row, answer)
            _add_cut(out, conversation, labels, max_length, row)
        else:
            out.count(SPLIT_UP)
            for before, answer in parts:
                labels = [MASKED] * len(before) + _turn_labels(tokenizer, row, answer)
                _add_cut(out, before + answer, labels, max_length, row)
    return out


def _turn_labels(tokenizer: Any, row: Row, turn: list[int]) -> list[int]:
    """Return the labels of a turn: its ids, ``MASKED`` on a thought that is only read."""
    unlearned = count_unlearned(tokenizer, row, turn)
    return [MASKED] * unlearned + turn[unlearned:]


def _add_cut(out: Encoded, ids: list[int], labels: list[int], max_length: int, row: Row) -> None:
    """Add a row, cut to ``max_length`` tokens; skip it if no label is left."""
    if all(label == MASKED for label in labels[:max_length]):
        out.count(NO_ROOM, len(ids))
        return
    if len(ids) > max_length:
        out.count(CUT, len(ids))
    out.add({"input_ids": ids[:max_length], "labels": labels[:max_length]}, min(len(ids), max_length), row)


def add_masks(out: Encoded, masks: Mapping[str, Sequence[list[int]]]) -> None:
    """Add the masks of every row, by column, if any mask has a 0; rows without a gap need no masks."""
    if all(all(mask) for column in masks.values() for mask in column):
        return
    for name, column in masks.items():
        for row, mask in zip(out.rows, column, strict=True):
            row[name] = mask


def encode_pairs(tokenizer: Any, rows: Sequence[Row], max_length: int) -> Encoded:
    """Encode ``prompt_ids``, ``chosen_ids`` and ``rejected_ids`` (answers only) for DPO.

    If an answer has several turns, all rows also have ``chosen_mask`` and ``rejected_mask``: 1 on the assistant's
    tokens, 0 on the turns of tools and users in between. A pair with a side longer than ``max_length`` is skipped,
    because a cut answer would be judged by its missing end.
    """
    out = Encoded()
    masks: dict[str, list[list[int]]] = {"chosen_mask": [], "rejected_mask": []}
    for row in rows:
        (prompt_ids, chosen_ids), (_, rejected_ids) = (
            split_answer(tokenizer, row, side) for side in ("chosen", "rejected")
        )
        if chosen_ids == rejected_ids:
            out.count(SAME_ANSWERS)
            continue
        # Both sides share the prompt, and trl pads them to the longer one.
        length = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
        if length > max_length:
            out.count(TOO_LONG, length)
            continue
        chosen_mask = assistant_mask(tokenizer, row, "chosen", prompt_ids, chosen_ids)
        rejected_mask = assistant_mask(tokenizer, row, "rejected", prompt_ids, rejected_ids)
        if chosen_mask is None or rejected_mask is None:
            out.count(REWRITTEN)
            continue
        if not (any(chosen_mask) and any(rejected_mask)):
            out.count(NOT_TRAINED)
            continue
        out.add({"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}, length, row)
        masks["chosen_mask"].append(chosen_mask)
        masks["rejected_mask"].append(rejected_mask)
    add_masks(out, masks)
    return out


def encode_conversations(tokenizer: Any, rows: Sequence[Row], max_length: int) -> Encoded:
    """Encode ``chosen_ids`` and ``rejected_ids``, prompt and answer as a reward model reads them.

    Pairs with a side longer than ``max_length`` are skipped.
    """
    out = Encoded()
    for row in rows:
        chosen_ids, rejected_ids = (render_answered(tokenizer, row, side) for side in ("chosen", "rejected"))
        if chosen_ids == rejected_ids:
            out.count(SAME_ANSWERS)
            continue
        length = max(len(chosen_ids), len(rejected_ids))
        if length > max_length:
            out.count(TOO_LONG, length)
            continue
        out.add({"chosen_ids": chosen_ids, "rejected_ids": rejected_ids}, length, row)
    return out


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of token ids, right-padded, and the mask of their tokens, (B, T) each."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def collate_labeled(rows: Sequence[Mapping[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Return ``input_ids``, ``attention_mask`` and ``labels`` of encoded rows, (B, T) each."""
    ids, mask = pad_right([row["input_ids"] for row in rows], pad)
    labels, _ = pad_right([row["labels"] for row in rows], MASKED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


NO_TOKENS = "skipped: no token"


@dataclass(frozen=True)
class Ends:
    """Tokens before and after a document."""

    begin: int
    end: int


def document_ends(tokenizer: Any, end: str | None, place: str) -> Ends:
    """Return the tokens before and after every document.

    After it ``end``, by default the tokenizer's EOS. Before it the tokenizer's BOS if it starts texts with one, else
    ``end``, which precedes a document in an endless text.

    Raises ``UserError`` for an ``end`` that is not a single token.
    """
    token = tokenizer.eos_token if end is None else end
    ids = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise UserError(
            f"{place}: {token!r} is {len(ids)} tokens, and a document must end with one. Name one that the tokenizer "
            f"has, such as {tokenizer.eos_token!r}."
        )
    # Some tokenizers add BOS to an empty text, others only to a text with content.
    begins = tokenizer.encode("") == [tokenizer.bos_token_id] or tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return Ends(int(tokenizer.bos_token_id) if begins else int(ids[0]), int(ids[0]))


def encode_texts(tokenizer: Any, rows: Sequence[Row], max_length: int, ends: Ends, learn_end: bool = True) -> Encoded:
    """Encode ``input_ids`` and ``labels`` of every window; the first token of each has no label.

    Without ``learn_end`` there is no end token, and labels are the text's own tokens, as for a loss per byte. A text
    that was cut off never has an end token.
    """
    out = Encoded()
    for row in rows:
        tokens = [int(token) for token in tokenizer.encode(row["text"], add_special_tokens=False)]
        if not tokens:
            out.count(NO_TOKENS)
            continue
        document = [ends.begin, *tokens, *([ends.end] if learn_end and is_finished(row, "text") else [])]
        # A step of max_length - 1 repeats one token: the last of a window is the first of the next, without a label.
        for start in range(0, len(document) - 1, max_length - 1):
            ids = document[start : start + max_length]
            out.add({"input_ids": ids, "labels": [MASKED, *ids[1:]]}, len(ids), row)
    return out
