"""Every fault, seeded into every dialect, is found; and nothing else is said of the row or of its neighbours."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from align.data.rows import assistant, user
from align.lint.batches import MASKED
from align.lint.command import collator_of
from align.lint.findings import Finding
from align.lint.linter import Options
from align.lint.tokens import Limits
from tests.lint import dialects
from tests.lint.dialects import FOREIGN, SPECS, Spec
from tests.lint.harness import (
    SPOILT,
    alarms,
    all_answers,
    clean,
    encoded,
    instructions,
    look,
    pairs,
    spans,
)

ROW = f"row-{SPOILT}"


@dataclass
class Case:
    """A dialect to spoil something in."""

    name: str
    also: set[str] = field(default_factory=set)
    """What follows from the fault and may be reported beside it."""
    everywhere: bool = False
    """Whether the fault is in every row, or in none in particular."""

    @property
    def spec(self) -> Spec:
        return SPECS[self.name]

    @property
    def tokenizer(self) -> Any:
        return dialects.tokenizer_of(self.name)


Seed = Callable[[Case], dict[str, Finding]]
SEEDS: list[tuple[str, Seed]] = []


def seeds(fault: str) -> Callable[[Seed], Seed]:
    """Registers a function that seeds ``fault``, looks, and returns the findings."""

    def register(function: Seed) -> Seed:
        SEEDS.append((fault, function))
        return function

    return register


def spoilt(case: Case, change: Callable[[dict[str, list[int]]], object], **options: Any) -> dict[str, Finding]:
    """A look at clean rows after ``change`` was made to the tokens of one of them."""
    rows = instructions()
    made = encoded(case.tokenizer, rows)
    change(made[SPOILT])
    return look(case.tokenizer, rows, made, options=Options(**options))


# Tokens and labels.


@seeds("double-bos")
def bos_twice(case: Case) -> dict[str, Finding]:
    tokenizer = case.tokenizer
    if tokenizer.bos_token_id is None:  # a dialect without one: somebody gave its tokenizer one
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.bos_token = "<|endoftext|>"
    rows = instructions()
    made = encoded(tokenizer, rows)
    bos, row = tokenizer.bos_token_id, made[SPOILT]
    extra = 2 - (row["input_ids"][0] == bos)
    row["input_ids"], row["labels"] = [bos] * extra + row["input_ids"], [MASKED] * extra + row["labels"]
    return look(tokenizer, rows, made)


@seeds("missing-eos")
def answer_without_end(case: Case) -> dict[str, Finding]:
    def change(row: dict[str, list[int]]) -> None:
        del row["input_ids"][-1], row["labels"][-1]

    return spoilt(case, change)


@seeds("eos-masked")
def collator_masks_padding_by_id(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    case.also = {"pad-is-eos"}
    tokenizer = copy.deepcopy(case.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    positional = collator_of("sft", tokenizer)
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
    positional = collator_of("sft", tokenizer)
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
    rows, made = instructions(), encoded(case.tokenizer, instructions())
    for row, prepared in zip(rows, made, strict=True):
        masked = case.tokenizer.apply_chat_template(
            [*row["prompt"], *row["completion"]], return_assistant_tokens_mask=True, return_dict=True
        )
        prepared["input_ids"] = masked["input_ids"]
        prepared["labels"] = [
            token if kept else MASKED
            for token, kept in zip(masked["input_ids"], masked["assistant_masks"], strict=True)
        ]
    return look(case.tokenizer, rows, made, options=Options(supervise="all"))


@seeds("labels-all-masked")
def truncation_empties_the_labels(case: Case) -> dict[str, Finding]:
    def change(row: dict[str, list[int]]) -> None:
        answer = next(at for at, label in enumerate(row["labels"]) if label != MASKED)
        row["input_ids"], row["labels"] = row["input_ids"][:answer], row["labels"][:answer]

    rows = instructions()
    made = encoded(case.tokenizer, rows)
    change(made[SPOILT])
    limits = Limits(max_length=len(made[SPOILT]["input_ids"]))
    kept = [at for at in range(len(made)) if at == SPOILT or len(made[at]["input_ids"]) < (limits.max_length or 0)]
    return look(case.tokenizer, [rows[at] for at in kept], [made[at] for at in kept], options=Options(limits=limits))


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
    made = all_answers(case.tokenizer, rows)
    start, end = spans(case.tokenizer, rows[SPOILT])[0]
    made[SPOILT]["labels"][start:end] = [MASKED] * (end - start)
    return look(case.tokenizer, rows, made, options=Options(supervise="all"))


@seeds("mask-shifted")
def mask_two_tokens_early(case: Case) -> dict[str, Finding]:

    def change(row: dict[str, list[int]]) -> None:
        kept = [label != MASKED for label in row["labels"]]
        kept = [*kept[2:], False, False]
        row["labels"] = [token if here else MASKED for token, here in zip(row["input_ids"], kept, strict=True)]

    return spoilt(case, change)


@seeds("mask-shifted")
def mask_two_tokens_late(case: Case) -> dict[str, Finding]:
    def change(row: dict[str, list[int]]) -> None:
        start = next(at for at, label in enumerate(row["labels"]) if label != MASKED)
        row["labels"][start : start + 3] = [MASKED] * 3

    return spoilt(case, change)


@seeds("mask-shifted")
def labels_moved_by_one(case: Case) -> dict[str, Finding]:
    return spoilt(case, lambda row: row.update(labels=[*row["labels"][1:], MASKED]))


@seeds("padding-supervised")
def padding_with_labels(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    positional = collator_of("sft", case.tokenizer)
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
    made = encoded(case.tokenizer, rows)
    row = made[SPOILT]
    row["input_ids"], row["labels"] = row["input_ids"][-250:], row["labels"][-250:]
    return look(case.tokenizer, rows, made, options=Options(limits=Limits(max_length=250)))


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
        start = next(at for at, label in enumerate(row["labels"]) if label != MASKED)
        del row["input_ids"][start - 3 : start], row["labels"][start - 3 : start]

    return spoilt(case, change)


@seeds("special-token-split")
def tokenized_as_plain_text(case: Case) -> dict[str, Finding]:
    """The rendered text went through a tokenizer that splits special tokens."""
    case.everywhere = True
    case.also = {"missing-eos", "mask-shifted", "generation-prompt-differs"}
    rows, made = instructions(), encoded(case.tokenizer, instructions())
    for prepared in made:
        start = next(at for at, label in enumerate(prepared["labels"]) if label != MASKED)
        parts = [
            case.tokenizer(
                case.tokenizer.decode(ids), add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
            for ids in (prepared["input_ids"][:start], prepared["input_ids"][start:])
        ]  # fmt: skip
        prepared["input_ids"] = parts[0] + parts[1]
        prepared["labels"] = [MASKED] * len(parts[0]) + parts[1]
    return look(case.tokenizer, rows, made)


# Template and tokenizer.


@seeds("special-token-split")
def end_of_turn_unknown_to_the_tokenizer(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    case.also = {"template-of-another-family", "mask-shifted"}
    end = case.spec.eos
    special = (*(token for token in case.spec.special if token != end), "<|stop|>")
    template = case.spec.template.replace("eos_token", f"'{end}'")
    return look(dialects.make(case.spec, special, template), instructions())


@seeds("template-of-another-family")
def tokenizer_of_another_model(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    case.also = {"special-token-split", "mask-shifted"}
    foreign = copy.deepcopy(dialects.tokenizer_of(FOREIGN[case.name]))
    foreign.chat_template = case.spec.template
    if foreign.bos_token is None:
        foreign.bos_token = "<|endoftext|>"
    return look(foreign, instructions())


@seeds("generation-prompt-differs")
def sampling_opens_a_thought(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    template = case.spec.template + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    return look(dialects.make(case.spec, template=template), instructions())


@seeds("generation-prompt-differs")
def template_forgets_its_generation_prompt(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    case.also = {"mask-shifted"}
    template = case.spec.template.replace("add_generation_prompt", "false")
    if template == case.spec.template:  # the prompt closes with the answer's beginning: let it be written later
        template = template.replace("' [/INST]'", "''").replace("'[/INST]'", "''")
        template = template.replace("{% else %}{{ ' '", "{% else %}{{ '[/INST] '")
    return look(dialects.make(case.spec, template=template), instructions())


@seeds("unexpected-system-prompt")
def a_system_prompt_of_the_templates_own(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    words = "You always answer in rhyme and never in prose."
    template = case.spec.template
    if not case.spec.injects:
        template = template.replace("{{ bos_token }}", f"{{{{ bos_token + '{words}' }}}}", 1)
        if template == case.spec.template:
            template = f"{{{{ '{words} ' }}}}" + template
    return look(dialects.make(case.spec, template=template), instructions())


@seeds("pad-is-eos")
def padding_with_the_end(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    tokenizer = copy.deepcopy(case.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    return look(tokenizer, instructions())


# Turns.


@seeds("special-token-in-content")
def user_writes_a_control_token(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["prompt"][-1] = user(f"What does {case.tokenizer.eos_token} mean?")
    return look(case.tokenizer, rows)


@seeds("special-token-in-content")
def answer_writes_a_control_token(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant(f"It ends turns: {case.tokenizer.eos_token} does.")]
    return look(case.tokenizer, rows)


@seeds("empty-answer")
def answer_of_spaces(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("  ")]
    return look(case.tokenizer, rows)


@seeds("empty-turn")
def question_of_nothing(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["prompt"][0] = user("")
    return look(case.tokenizer, rows)


@seeds("repeated-role")
def two_questions_in_a_row(case: Case) -> dict[str, Finding]:
    case.also = {"template-refuses-row"} if case.spec.strict else set()
    rows = instructions()
    rows[SPOILT]["prompt"] = [user("Are you there?"), user("Hello?")]
    return look(case.tokenizer, rows)


@seeds("unknown-role")
def a_human_instead_of_a_user(case: Case) -> dict[str, Finding]:
    case.also = {"template-refuses-row"} if case.spec.strict else set()
    rows = instructions()
    rows[SPOILT]["prompt"][-1] = {"role": "human", "content": "Is that so, or not?"}
    return look(case.tokenizer, rows)


@seeds("not-utf8")
def replacement_character(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["prompt"][-1] = user("Caf\ufffd or tea?")
    return look(case.tokenizer, rows)


@seeds("not-utf8")
def lone_surrogate(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("half an emoji \ud83d is none")]
    return look(case.tokenizer, rows)


@seeds("placeholder")
def name_never_filled_in(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("I am {{name}}, made by {{ author }}.")]
    return look(case.tokenizer, rows)


# Pairs and splits.


@seeds("chosen-equals-rejected")
def the_same_answer_twice(case: Case) -> dict[str, Finding]:
    rows = pairs()
    rows[SPOILT]["rejected"] = rows[SPOILT]["chosen"]
    return look(case.tokenizer, rows, options=Options("dpo"))


@seeds("chosen-equals-rejected")
def the_same_answer_after_truncation(case: Case) -> dict[str, Finding]:
    """trl's collator for DPO cuts both sides at ``max_length``."""
    case.also = {"answer-truncated"}
    rows = pairs()
    rows[SPOILT]["chosen"] = [assistant("word " * 100 + "yes")]
    rows[SPOILT]["rejected"] = [assistant("word " * 100 + "no")]
    collator = collator_of("dpo", case.tokenizer)
    collator.max_length = 250  # type: ignore[union-attr]
    made = encoded(case.tokenizer, rows, "dpo")
    return look(case.tokenizer, rows, made, collator, Options("dpo", Limits(max_length=250)))


@seeds("pair-prompts-differ")
def another_question_before_rejected(case: Case) -> dict[str, Finding]:
    rows = pairs()
    made = encoded(case.tokenizer, rows, "reward")
    other = copy.deepcopy(rows[SPOILT])
    other["prompt"][-1] = user("Name no facts, thank you.")
    made[SPOILT]["rejected_ids"] = encoded(case.tokenizer, [other], "reward")[0]["rejected_ids"]
    case.also = {"turn-rewritten"}
    return look(case.tokenizer, rows, made, options=Options("reward"))


@seeds("pair-prompts-differ")
def the_pair_parts_before_its_last_turn(case: Case) -> dict[str, Finding]:
    rows = pairs()
    rows[SPOILT]["chosen"] = [assistant("Well."), user("Go on."), *rows[SPOILT]["chosen"]]
    rows[SPOILT]["rejected"] = [assistant("Hm."), user("Go on."), *rows[SPOILT]["rejected"]]
    return look(case.tokenizer, rows, options=Options("reward"))


@seeds("length-imbalance")
def one_side_ten_times_as_long(case: Case) -> dict[str, Finding]:
    rows = pairs()
    rows[SPOILT]["chosen"] = [assistant("a long tale of many words " * 40)]
    return look(case.tokenizer, rows, options=Options("dpo"))


@seeds("length-bias")
def the_longer_side_always_wins(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    return look(case.tokenizer, [{**row, "chosen": [assistant(f"{row['rejected'][0]['content']} I do, a bit.")]}
                                 for row in pairs(60)], options=Options("dpo"))  # fmt: skip


@seeds("leaked-prompt")
def a_prompt_in_both_splits(case: Case) -> dict[str, Finding]:
    rows = instructions(12)
    again = {
        **rows[SPOILT],
        "prompt": [{**turn, "content": turn["content"].upper()} for turn in rows[SPOILT]["prompt"]],
    }
    return look(case.tokenizer, rows[:8], test=[*rows[8:11], again])


@seeds("label-skew")
def only_good_answers(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    return look(case.tokenizer, [{**row, "label": True} for row in instructions(60)])


CASES = [pytest.param(fault, seed, name, id=f"{name}-{seed.__name__}") for name in SPECS for fault, seed in SEEDS]


@pytest.mark.parametrize(("fault", "seed", "name"), CASES)
def test_the_seeded_fault_is_found_and_no_other(fault: str, seed: Seed, name: str) -> None:
    case = Case(name)
    found = seed(case)
    assert fault in found, sorted(found)
    assert alarms(found) <= {fault} | case.also
    if not case.everywhere:
        assert [found[fault].count, found[fault].examples[0].place.id] == [1, ROW]  # type: ignore[union-attr]
    json.dumps(found[fault].to_json())


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "prompts"])
@pytest.mark.parametrize("name", SPECS)
def test_clean_rows_raise_no_alarm(name: str, stage: Any) -> None:
    rows = clean(60)
    if SPECS[name].system:
        for row in rows[::5]:
            row["prompt"] = [{"role": "system", "content": "Answer in one sentence."}, *row["prompt"]]
    found = look(dialects.tokenizer_of(name), rows[:50], options=Options(stage), test=rows[50:])
    assert set(found) == ({"unexpected-system-prompt"} if SPECS[name].injects else set())


@pytest.mark.parametrize("name", SPECS)
def test_clean_masks_of_every_answer_raise_no_alarm(name: str) -> None:
    tokenizer = dialects.tokenizer_of(name)
    rows = instructions()
    found = look(tokenizer, rows, all_answers(tokenizer, rows), options=replace(Options(), supervise="all"))
    assert not alarms(found)
