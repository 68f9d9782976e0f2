"""Faults of the rows: their turns, the two sides of a pair, the two sides of a split."""

from __future__ import annotations

import copy

from align.data.rows import assistant, user
from align.lint.encodings import encoding_of
from align.lint.findings import Finding
from align.lint.linter import Options
from align.lint.tokens import Limits
from tests.support.lint.harness import SPOILT, encoded, instructions, look, pairs
from tests.support.lint.seeding import ROW, Case, seeds


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
    collator = encoding_of("dpo").default_collator(case.tokenizer)
    collator.max_length = 250  # type: ignore[union-attr]
    prepared = encoded(case.tokenizer, rows, "dpo")
    return look(case.tokenizer, rows, prepared, collator, Options("dpo", Limits(max_length=250)))


@seeds("pair-prompts-differ")
def another_question_before_rejected(case: Case) -> dict[str, Finding]:
    rows = pairs()
    prepared = encoded(case.tokenizer, rows, "reward")
    copied = copy.deepcopy(rows[SPOILT])
    copied["prompt"][-1] = user("Name no facts, thank you.")
    prepared[SPOILT]["rejected_ids"] = encoded(case.tokenizer, [copied], "reward")[0]["rejected_ids"]
    case.also = {"turn-rewritten"}
    return look(case.tokenizer, rows, prepared, options=Options("reward"))


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


@seeds("nearly-leaked-prompt")
def a_long_prompt_with_one_word_changed(case: Case) -> dict[str, Finding]:
    long = "In the year that the harbor froze over, the keeper of the lighthouse wrote one letter home a week, "
    long += "and each of them began with the weather; what did he write about when the ice was gone at last"
    rows = instructions(12)
    rows[2]["prompt"] = [user(f"{long}, do you think?")]
    rows[SPOILT]["prompt"] = [user(f"{long}, do you believe?")]
    return look(case.tokenizer, [*rows[:3], *rows[4:8]], test=[*rows[8:], rows[SPOILT]])


@seeds("duplicate-row")
def a_row_twice(case: Case) -> dict[str, Finding]:
    rows = instructions()
    return look(case.tokenizer, [rows[1], *rows[:1], *rows[2:], {**rows[1], "id": ROW}])


@seeds("over-max-length")
def a_pair_too_long(case: Case) -> dict[str, Finding]:
    rows = pairs()
    rows[SPOILT]["rejected"] = [assistant("word " * 300)]
    return look(case.tokenizer, rows, options=Options("dpo", Limits(max_length=300)))


@seeds("foreign-token-in-content")
def a_rendering_for_another_model(case: Case) -> dict[str, Finding]:
    mark = next(token for token in ("<|eot_id|>", "<end_of_turn>") if token not in case.spec.special)
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant(f"There are nine kinds.{mark}")]
    return look(case.tokenizer, rows)


@seeds("speaker-label-in-content")
def a_transcript_inside_an_answer(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("There are nine kinds.\n\nHuman: Name them.")]
    return look(case.tokenizer, rows)


@seeds("invisible-character")
def a_zero_width_space(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("There are nine\u200b kinds.")]
    return look(case.tokenizer, rows)


@seeds("direction-override")
def an_answer_that_reads_backwards(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("There are \u202eenin kinds.")]
    return look(case.tokenizer, rows)


@seeds("assistant-speaks-first")
def a_greeting_before_the_question(case: Case) -> dict[str, Finding]:
    case.also = {"template-refuses-row"} if case.spec.strict else set()
    rows = instructions()
    rows[SPOILT]["prompt"] = [assistant("What can I do for you?"), user("Name nine facts.")]
    return look(case.tokenizer, rows)


@seeds("system-turn-inside")
def a_system_turn_after_the_question(case: Case) -> dict[str, Finding]:
    case.also = {"template-refuses-row", "turn-rewritten", "repeated-role"}
    rows = instructions()
    rows[SPOILT]["prompt"] = [user("Are you there?"), {"role": "system", "content": "Answer in one sentence."}]
    return look(case.tokenizer, rows)


@seeds("one-answer-for-all")
def a_column_mapped_wrongly(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    rows = [{**row, "completion": [assistant("It is so.")]} for row in instructions(60)]
    return look(case.tokenizer, rows)


@seeds("prompt-with-several-answers")
def a_question_that_is_answered_twice(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["prompt"] = rows[SPOILT - 1]["prompt"]
    return look(case.tokenizer, rows)


@seeds("sides-differ-in-case-alone")
def the_rejected_side_is_the_chosen_one_in_capitals(case: Case) -> dict[str, Finding]:
    rows = pairs()
    rows[SPOILT]["rejected"] = [assistant(rows[SPOILT]["chosen"][0]["content"].upper() + " ")]
    return look(case.tokenizer, rows, options=Options("dpo"))


@seeds("sides-differ-in-punctuation")
def the_rejected_side_is_the_chosen_one_without_its_marks(case: Case) -> dict[str, Finding]:
    rows = pairs()
    rows[SPOILT]["chosen"] = [assistant("Yes, there are nine kinds.")]
    rows[SPOILT]["rejected"] = [assistant("Yes there are nine kinds!")]
    return look(case.tokenizer, rows, options=Options("dpo"))


@seeds("unclosed-thought")
def a_thought_without_end(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("<think>\nThere are nine kinds.")]
    return look(case.tokenizer, rows)


@seeds("thought-without-answer")
def a_thought_and_nothing_else(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("<thinking>There are nine kinds.</thinking>")]
    return look(case.tokenizer, rows)


@seeds("thought-in-other-turn")
def a_question_that_begins_with_a_thought(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["prompt"][-1] = user("<think>I want to know.</think>How many kinds are there?")
    return look(case.tokenizer, rows)


@seeds("unexpected-thought")
def a_thought_for_a_model_that_does_not_think(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["completion"] = [assistant("<think>I count them.</think>There are nine kinds.")]
    return look(case.tokenizer, rows)


@seeds("answer-in-prompt")
def a_question_with_its_answer(case: Case) -> dict[str, Finding]:
    rows = instructions()
    rows[SPOILT]["prompt"][-1] = user("How many kinds are there? There are nine kinds of them.")
    rows[SPOILT]["completion"] = [assistant("There are nine kinds of them.")]
    return look(case.tokenizer, rows)


@seeds("roles-swapped")
def answers_that_ask(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    rows = [
        {**row, "prompt": [user(f"There are {n} kinds.")], "completion": [assistant(f"Are there {n} kinds?")]}
        for n, row in enumerate(instructions(60))
    ]
    return look(case.tokenizer, rows)


@seeds("labels-contradict")
def one_answer_with_both_labels(case: Case) -> dict[str, Finding]:
    rows = [{**row, "label": True} for row in instructions()]
    rows[SPOILT] = {**rows[SPOILT - 1], "id": ROW, "label": False}
    return look(case.tokenizer, rows, options=Options("kto"))


@seeds("pairs-contradict")
def a_pair_the_other_way_round(case: Case) -> dict[str, Finding]:
    rows = pairs()
    before = rows[SPOILT - 1]
    rows[SPOILT] |= {"prompt": before["prompt"], "chosen": before["rejected"], "rejected": before["chosen"]}
    return look(case.tokenizer, rows, options=Options("dpo"))


@seeds("sides-swapped")
def a_third_of_the_pairs_swapped(case: Case) -> dict[str, Finding]:
    case.everywhere = True
    rows = pairs(60)
    for number, row in enumerate(rows):
        answer = assistant(f"I can tell you {number + 7} things about that, and each of them is well worth knowing.")
        refusal = assistant(f"No. {number}")
        row |= (
            {"chosen": [refusal], "rejected": [answer]}
            if number % 3 == 0
            else {"chosen": [answer], "rejected": [refusal]}
        )
    return look(case.tokenizer, rows, options=Options("dpo"))


@seeds("leaked-answer")
def a_test_answer_that_was_trained_on(case: Case) -> dict[str, Finding]:
    rows = instructions(12)
    long = assistant("The keeper wrote one letter home a week, and each of them began with the weather.")
    rows[2]["completion"] = rows[SPOILT]["completion"] = [long]
    return look(case.tokenizer, [*rows[:3], *rows[4:8]], test=[*rows[8:], rows[SPOILT]])
