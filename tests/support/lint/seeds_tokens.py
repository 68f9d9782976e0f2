"""Faults of token ids and labels, put into what the trainer prepared."""

from __future__ import annotations

import copy
from typing import Any

from align.data.rows import assistant, user
from align.lint.encodings import MASKED, encoding_of
from align.lint.findings import Finding
from align.lint.linter import Options
from align.lint.tokens import Limits
from tests.support.lint.harness import SPOILT, all_answers, encoded, instructions, look, pairs, spans
from tests.support.lint.seeding import Case, seeds, spoilt


@seeds("double-bos")
def bos_twice(case: Case) -> dict[str, Finding]:
    tokenizer = case.tokenizer
    if tokenizer.bos_token_id is None:  # a dialect without one: somebody gave its tokenizer one
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.bos_token = "<|endoftext|>"
    rows = instructions()
    prepared = encoded(tokenizer, rows)
    bos, row = tokenizer.bos_token_id, prepared[SPOILT]
    extra = 2 - (row["input_ids"][0] == bos)
    row["input_ids"], row["labels"] = [bos] * extra + row["input_ids"], [MASKED] * extra + row["labels"]
    return look(tokenizer, rows, prepared)


@seeds("missing-eos")
def answer_without_end(case: Case) -> dict[str, Finding]:
    def change(row: dict[str, list[int]]) -> None:
        del row["input_ids"][-1], row["labels"][-1]

    return spoilt(case, change)


@seeds("cut-off-answer-ended")
def answer_that_was_cut_off_is_ended(case: Case) -> dict[str, Finding]:
    rows = instructions()
    prepared = encoded(case.tokenizer, rows)
    rows[SPOILT]["completion_finished"] = False
    return look(case.tokenizer, rows, prepared)


@seeds("cut-off-answer-ended")
def chosen_side_that_was_cut_off_is_ended(case: Case) -> dict[str, Finding]:
    return _ended_side(case, "dpo", "chosen_finished")


@seeds("cut-off-answer-ended")
def rejected_side_that_was_cut_off_is_ended(case: Case) -> dict[str, Finding]:
    return _ended_side(case, "reward", "rejected_finished")


def _ended_side(case: Case, stage: Any, mark: str) -> dict[str, Finding]:
    rows = pairs()
    prepared = encoded(case.tokenizer, rows, stage)
    rows[SPOILT][mark] = False
    return look(case.tokenizer, rows, prepared, options=Options(stage))


@seeds("eos-masked")
def collator_masks_padding_by_id(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    case.also = {"pad-is-eos"}
    tokenizer = copy.deepcopy(case.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    positional = encoding_of("sft").default_collator(tokenizer)
    assert positional is not None

    def by_id(rows: Any) -> Any:
        batch = positional(rows)
        batch["labels"][batch["input_ids"] == tokenizer.pad_token_id] = MASKED
        return batch

    return look(tokenizer, instructions(), encoded(tokenizer, instructions()), by_id)


@seeds("eos-masked")
def collator_hides_padding_by_id(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    case.also = {"pad-is-eos", "generation-prompt-differs"}
    tokenizer = copy.deepcopy(case.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    positional = encoding_of("sft").default_collator(tokenizer)
    assert positional is not None

    def by_id(rows: Any) -> Any:
        batch = positional(rows)
        real = batch["input_ids"] != tokenizer.pad_token_id
        batch["attention_mask"] *= real
        batch["labels"][~real] = MASKED
        return batch

    return look(tokenizer, instructions(), encoded(tokenizer, instructions()), by_id)


@seeds("eos-masked")
def mask_ends_before_the_turn_does(case: Case) -> dict[str, Finding]:
    def change(row: dict[str, list[int]]) -> None:
        row["labels"][-1] = MASKED

    return spoilt(case, change)


@seeds("labels-all-masked")
def nothing_supervised(case: Case) -> dict[str, Finding]:
    return spoilt(case, lambda row: row.update(labels=[MASKED] * len(row["labels"])))


@seeds("labels-all-masked")
def template_without_generation_markers(case: Case) -> dict[str, Finding]:
    """transformers' own mask of the assistant's turns, which is all zeros for such a template."""
    case.everywhere = True
    rows, encoding = instructions(), encoded(case.tokenizer, instructions())
    for row, prepared in zip(rows, encoding, strict=True):
        masked = case.tokenizer.apply_chat_template(
            [*row["prompt"], *row["completion"]], return_assistant_tokens_mask=True, return_dict=True
        )
        prepared["input_ids"] = masked["input_ids"]
        prepared["labels"] = [
            token if assistant_mask else MASKED
            for token, assistant_mask in zip(masked["input_ids"], masked["assistant_masks"], strict=True)
        ]
    return look(case.tokenizer, rows, encoding, options=Options(supervise="all"))


@seeds("labels-all-masked")
def truncation_empties_the_labels(case: Case) -> dict[str, Finding]:
    def change(row: dict[str, list[int]]) -> None:
        answer = next(index for index, label in enumerate(row["labels"]) if label != MASKED)
        row["input_ids"], row["labels"] = row["input_ids"][:answer], row["labels"][:answer]

    rows = instructions()
    prepared = encoded(case.tokenizer, rows)
    change(prepared[SPOILT])
    limits = Limits(max_length=len(prepared[SPOILT]["input_ids"]))
    remaining = [
        index
        for index in range(len(prepared))
        if index == SPOILT or len(prepared[index]["input_ids"]) < (limits.max_length or 0)
    ]
    return look(
        case.tokenizer,
        [rows[index] for index in remaining],
        [prepared[index] for index in remaining],
        options=Options(limits=limits),
    )


@seeds("labels-none-masked")
def everything_supervised(case: Case) -> dict[str, Finding]:
    return spoilt(case, lambda row: row.update(labels=list(row["input_ids"])))


@seeds("user-tokens-supervised")
def all_but_the_beginning_supervised(case: Case) -> dict[str, Finding]:
    return spoilt(case, lambda row: row.update(labels=[MASKED] * 3 + row["input_ids"][3:]))


@seeds("user-tokens-supervised")
def last_question_supervised(case: Case) -> dict[str, Finding]:
    def change(row: dict[str, list[int]]) -> None:
        (_, end), (start, _) = spans(case.tokenizer, instructions()[SPOILT])
        row["labels"][end:start] = row["input_ids"][end:start]

    return spoilt(case, change)


@seeds("middle-turns-unsupervised")
def only_the_last_answer_supervised(case: Case) -> dict[str, Finding]:
    rows = instructions()
    prepared = all_answers(case.tokenizer, rows)
    start, end = spans(case.tokenizer, rows[SPOILT])[0]
    prepared[SPOILT]["labels"][start:end] = [MASKED] * (end - start)
    return look(case.tokenizer, rows, prepared, options=Options(supervise="all"))


@seeds("mask-shifted")
def mask_two_tokens_early(case: Case) -> dict[str, Finding]:

    def change(row: dict[str, list[int]]) -> None:
        remaining = [label != MASKED for label in row["labels"]]
        remaining = [*remaining[2:], False, False]
        row["labels"] = [token if here else MASKED for token, here in zip(row["input_ids"], remaining, strict=True)]

    return spoilt(case, change)


@seeds("mask-shifted")
def mask_two_tokens_late(case: Case) -> dict[str, Finding]:
    def change(row: dict[str, list[int]]) -> None:
        start = next(index for index, label in enumerate(row["labels"]) if label != MASKED)
        row["labels"][start : start + 3] = [MASKED] * 3

    return spoilt(case, change)


@seeds("mask-shifted")
def the_earlier_answer_supervised(case: Case) -> dict[str, Finding]:
    def change(row: dict[str, list[int]]) -> None:
        start, end = spans(case.tokenizer, instructions()[SPOILT])[0]
        row["labels"] = [token if start <= index < end else MASKED for index, token in enumerate(row["input_ids"])]

    return spoilt(case, change)


@seeds("mask-shifted")
def labels_moved_by_one(case: Case) -> dict[str, Finding]:
    return spoilt(case, lambda row: row.update(labels=[*row["labels"][1:], MASKED]))


@seeds("padding-supervised")
def padding_with_labels(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    positional = encoding_of("sft").default_collator(case.tokenizer)
    assert positional is not None

    def careless(rows: Any) -> Any:
        batch = positional(rows)
        batch["labels"][batch["attention_mask"] == 0] = case.tokenizer.pad_token_id
        return batch

    return look(case.tokenizer, instructions(), encoded(case.tokenizer, instructions()), careless)


@seeds("answer-truncated")
def answer_cut(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("word " * 200)]
    return look(case.tokenizer, rows, options=Options(limits=Limits(max_length=200)))


@seeds("no-room-for-answer")
def prompt_fills_everything(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["prompt"] = [user("word " * 300)]
    return look(case.tokenizer, rows, options=Options(limits=Limits(max_length=250)))


@seeds("prompt-truncated")
def beginning_cut(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["prompt"] = [user("first things first, " * 40 + "then the rest of it")]
    prepared = encoded(case.tokenizer, rows)
    row = prepared[SPOILT]
    row["input_ids"], row["labels"] = row["input_ids"][-250:], row["labels"][-250:]
    return look(case.tokenizer, rows, prepared, options=Options(limits=Limits(max_length=250)))


@seeds("id-beyond-embeddings")
def embeddings_too_few(case: Case) -> dict[str, Finding]:
    """The tokenizer has one token more than the model."""
    tokenizer = copy.deepcopy(case.tokenizer)
    rows, size = instructions(), len(tokenizer)
    tokenizer.add_tokens(["glockenspiel"])
    rows[SPOILT]["prompt"][-1] = user("What is a glockenspiel?")
    return look(tokenizer, rows, options=Options(limits=Limits(embeddings=size)))


@seeds("over-context")
def longer_than_the_context(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("word " * 300)]
    return look(case.tokenizer, rows, options=Options(limits=Limits(context=280)))


@seeds("generation-prompt-differs")
def answer_without_its_header(case: Case) -> dict[str, Finding]:
    """Training on prompts that were rendered without what sampling puts before the answer."""
    case.also = {"turn-rewritten"}

    def change(row: dict[str, list[int]]) -> None:
        start = next(index for index, label in enumerate(row["labels"]) if label != MASKED)
        del row["input_ids"][start - 3 : start], row["labels"][start - 3 : start]

    return spoilt(case, change)


@seeds("special-token-split")
def tokenized_as_plain_text(case: Case) -> dict[str, Finding]:
    """The rendered text went through a tokenizer that splits special tokens."""
    case.everywhere = True
    case.also = {"missing-eos", "mask-shifted", "generation-prompt-differs"}
    rows, encoding = instructions(), encoded(case.tokenizer, instructions())
    for prepared in encoding:
        start = next(index for index, label in enumerate(prepared["labels"]) if label != MASKED)
        parts = [
            case.tokenizer(
                case.tokenizer.decode(ids), add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
            for ids in (prepared["input_ids"][:start], prepared["input_ids"][start:])
        ]  # fmt: skip
        prepared["input_ids"] = parts[0] + parts[1]
        prepared["labels"] = [MASKED] * len(parts[0]) + parts[1]
    return look(case.tokenizer, rows, encoding)
