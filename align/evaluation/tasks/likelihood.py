"""Log-likelihoods: token ids of contexts and answers, reading in blocks, and the task ``preference``. Torch-free.

Text is split as in lm-eval's ``hf`` backend, so numbers compare. ``models/chat/render.py`` has chat templates.

``preference`` is the held-out preference accuracy of a policy: how often the chosen answer is likelier than the
rejected one. Both answers are read after the same prompt, under the chat template, each with the end of its turn if it
has one. The score is the policy's own likelihood, without a reference: not DPO's implicit reward. A tie is wrong, as in
trl. For the accuracy of reward models see ``reward_pairs.py``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from align.config.recipe.format_options import PAIRED
from align.config.recipe.source_settings import FilesSource, HubSource
from align.config.stages.evaluation.tasks import PreferenceConfig
from align.data.rows import Dropped, Message, Row, is_finished
from align.errors import UserError
from align.evaluation.answers import Item, Measured
from align.evaluation.scorecard import read_metrics
from align.evaluation.tasks.base import Task, TaskInputs
from align.evaluation.tasks.records import describe_records, draw, numbered_ids, record_source
from align.models.chat.render import render_conversation, render_prompt
from align.store.fingerprint import digest

if TYPE_CHECKING:
    from align.evaluation.participants import Reader

BLOCK = 200
"""Pairs per cached result: an interrupted run loses at most one block."""
SIDES = ("chosen", "rejected")
Ids = list[int]
Block = tuple[int, Any, Callable[[], dict[str, Any]]]
"""Number of a block in its cached name, everything that its result depends on, and the function that reads it."""


# ---- token ids ----


def encode(tokenizer: Any, text: str) -> Ids:
    """Return a text's ids with the tokenizer's special tokens; a text that begins with BOS gets no second one."""
    has_prefix = text.startswith(tokenizer.decode([prefix_token(tokenizer)]))
    ids = tokenizer.encode(text, add_special_tokens=False) if has_prefix else tokenizer.encode(text)
    return [int(token) for token in ids]


def encode_choices(tokenizer: Any, context: str, choices: Sequence[str]) -> list[tuple[Ids, Ids]]:
    """Return for each choice the ids of the context and of the choice; ``choices`` begin with their own space.

    Context and choice are encoded as one text and cut at the end of the context. Space at the context's end goes to
    the choice, where tokenizers with spaces in front of words expect it. Raises ``UserError`` for a choice without
    a separate token.
    """
    stripped = context.rstrip()
    # Most tokenizers join a space with the word after it, so it is encoded with the choice.
    space = context[len(stripped) :]
    context_ids = encode(tokenizer, stripped)
    pairs = []
    for choice in choices:
        answer = encode(tokenizer, stripped + space + choice)[len(context_ids) :]
        if not answer:
            raise UserError(
                f"the tokenizer gives the answer {choice!r} no token of its own after {stripped[-40:]!r}, so it has no "
                "likelihood. Leave the question out, or name another checkpoint."
            )
        pairs.append((context_ids, answer))
    return pairs


def answer_ids(tokenizer: Any, prompt: list[Message], answer: str, is_finished: bool) -> tuple[Ids, bool]:
    """Return the ids of an assistant's answer, and True if they were cut from the rendered conversation.

    ``is_finished`` adds the end of the turn. Some templates render the prompt of an answered conversation differently
    from an open conversation (for the sake of thoughts), which leaves no place to cut. Then the answer is
    encoded by itself, with the end-of-turn token after it, which is what a policy samples.
    """
    prompt_ids = render_prompt(tokenizer, prompt)
    ids = render_conversation(tokenizer, [*prompt, {"role": "assistant", "content": answer}], is_finished)
    if len(ids) > len(prompt_ids) and ids[: len(prompt_ids)] == prompt_ids:
        return ids[len(prompt_ids) :], True
    alone = [int(token) for token in tokenizer.encode(answer, add_special_tokens=False)]
    return [*alone, int(tokenizer.eos_token_id)] if is_finished else alone, False


def fit_context(context: Ids, answer: Ids, max_length: int) -> tuple[Ids, Ids, bool]:
    """Shorten the pair to a model's ``max_length`` input tokens; the flag is True if something was cut.

    The answer's last token is never an input, so there is room for one more. The context loses its beginning, as in
    lm-eval; an answer that does not fit by itself loses its end and keeps one token of context.
    """
    # The answer's last token is never an input, hence one more. The context is cut from its beginning.
    room = max_length + 1 - len(answer)
    if room >= len(context):
        return context, answer, False
    if room >= 1:
        return context[-room:], answer, True
    return context[-1:], answer[:max_length], True


def prefix_token(tokenizer: Any) -> int:
    """Return the token before a document's first: BOS, or end of text for a tokenizer without one.

    Raises ``UserError`` for a tokenizer that has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("the tokenizer has neither a BOS nor an EOS token, so a text's first token has no context.")


def rolling_windows(tokens: Ids, prefix: int, length: int) -> list[tuple[Ids, Ids]]:
    """Divide a document into windows: pairs of context and targets, every token a target exactly once.

    Each window has ``length`` targets after one token of context (``prefix`` for the first window). The last window,
    which has fewer targets, fills its input with more context. Raises ``ValueError`` for ``length`` below 1.
    """
    if length < 1:
        raise ValueError(f"length is {length}; a window has at least one target")
    windows = []
    for start in range(0, len(tokens), length):
        targets = tokens[start : start + length]
        # Inputs are context plus targets without the last one: `length` tokens in all, also in the last window.
        context = tokens[start + len(targets) - length - 1 : start] if start else [prefix]
        windows.append((context, targets))
    return windows


def read_blocks(reader: Reader, task: str, blocks: Iterable[Block]) -> dict[str, Any]:
    """Return the results of all blocks as one: their lists joined, their counts added.

    Each is cached as soon as it is read, so an interrupted run loses at most one block.
    """
    merged: dict[str, Any] = {}
    for number, identity, read_block in blocks:
        result = reader.cached(f"{task}-{number}", digest(identity), read_block)
        for field, value in result.items():
            merged[field] = merged[field] + value if field in merged else value
    return merged


def sum_logprobs(reader: Reader, pairs: Sequence[tuple[Ids, Ids]], task: str) -> tuple[list[float], list[int], int]:
    """Return each answer's log-likelihood after its context, its number of tokens, and the number of cut pairs.

    Both are cut to the model's length. Raises ``RuntimeError`` if a log-likelihood is NaN.
    """
    fitted = [fit_context(context, answer, reader.max_length) for context, answer in pairs]
    logprobs = reader.logprobs([context for context, _, _ in fitted], [answer for _, answer, _ in fitted])
    sums = [math.fsum(values) for values in logprobs]
    require_numbers(sums, task, reader.info.name)
    return sums, [len(answer) for _, answer, _ in fitted], sum(is_cut for _, _, is_cut in fitted)


def require_numbers(values: Sequence[float], task: str, system: str) -> None:
    """Raise ``RuntimeError`` if a log-likelihood is NaN."""
    if any(map(math.isnan, values)):
        raise RuntimeError(f"{task}: '{system}' gives probabilities that are not numbers (NaN)")


# ---- preference ----


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
        self.metrics = read_metrics(self.kind)
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
        result = read_blocks(reader, self.name, self._blocks(reader))
        sums = result["sums"]
        means = [
            [total / count for total, count in zip(*pair, strict=True)]
            for pair in zip(sums, result["tokens"], strict=True)
        ]
        return Measured(
            values={
                "acc": [[float(chosen > rejected)] for chosen, rejected in sums],
                "acc_norm": [[float(chosen > rejected)] for chosen, rejected in means],
            },
            notes={
                "ties": sum(chosen == rejected for chosen, rejected in sums),
                "inputs_cut": result["cut"],
                "answers_encoded_apart": result["apart"],
            },
        )

    def _blocks(self, reader: Reader) -> Iterator[Block]:
        for start in range(0, len(self.rows), BLOCK):
            block = self.rows[start : start + BLOCK]
            texts = [[row["prompt"], *([row[side], is_finished(row, side)] for side in SIDES)] for row in block]
            yield start, ["preference 1", reader.max_length, texts], partial(self._read_block, reader, block)

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
