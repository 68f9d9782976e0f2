"""Token ids: what is supervised, what is cut, what is left out and counted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.data.rows import assistant, user, write_rows
from align.errors import UserError
from align.models.chat.render import render_prompt
from align.models.loading import load_policy, load_tokenizer
from align.training.input_checks import check_encoded, check_ends, check_model, check_same_vocabulary
from align.training.preference_trainers import PairCollator, UnpairedCollator
from align.training.rows import (
    MASKED,
    NOT_TRAINED,
    REWRITTEN,
    encode_conversations,
    encode_pairs,
    encode_supervised,
    read_split,
)
from align.training.unpaired import add_mismatched, encode_unpaired, unpair
from tests.support.models.joining_tokenizer import make_joining_tokenizer
from tests.support.training.harness import rows


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def supervised_text(tokenizer: Any, row: dict[str, list[int]]) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != MASKED]))


def test_the_answer_and_its_end_are_supervised_and_nothing_else(tokenizer: Any) -> None:
    encoded = encode_supervised(tokenizer, rows(3), 100)
    assert [supervised_text(tokenizer, row) for row in encoded.rows] == [
        f"{word}<|im_end|>" for word in ("red", "green", "blue")
    ]
    prompt = render_prompt(tokenizer, rows(1)[0]["prompt"])
    assert encoded.rows[0]["input_ids"][: len(prompt)] == prompt  # what the sampler will see
    assert encoded.rows[0]["labels"][: len(prompt)] == [MASKED] * len(prompt)
    assert encoded.lengths == [len(row["input_ids"]) for row in encoded.rows]
    assert not encoded.counts


def test_a_line_break_behind_the_end_of_turn_is_not_supervised(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (row,) = encode_supervised(tokenizer, rows(1), 100).rows
    assert supervised_text(tokenizer, row) == "red<|im_end|>"


def test_preferences_train_on_the_chosen_answer(tokenizer: Any) -> None:
    pairs = [{name: value for name, value in row.items() if name != "completion"} for row in rows(2)]
    assert encode_supervised(tokenizer, pairs, 100).rows == encode_supervised(tokenizer, rows(2), 100).rows


def stage_context(max_length: int, warnings: list[str], long_rows: str = "refuse") -> Any:
    """What the check of a stage's rows reads of its context; warnings are added to ``warnings``."""
    config = SimpleNamespace(max_length=max_length, long_rows=long_rows)
    return SimpleNamespace(name="sft", config=config, warn=warnings.append)


def test_long_rows_are_cut_or_left_out_and_counted(tokenizer: Any) -> None:
    prompt = len(render_prompt(tokenizer, rows(1)[0]["prompt"]))
    long = {**rows(1)[0], "prompt": [user("x" * 200)]}
    encoded = encode_supervised(tokenizer, [*rows(1), long], prompt + 2)
    assert supervised_text(tokenizer, encoded.rows[0]) == "re"
    assert sum(encoded.counts.values()) == 2
    warnings: list[str] = []
    check_encoded(stage_context(prompt + 2, warnings, "skip"), encoded, 2, "train")
    assert len(warnings) == 2
    assert "sft: 1 of 2 train rows skipped" in "".join(warnings)
    with pytest.raises(UserError, match="never learn to stop"):
        check_ends("sft", encoded, tokenizer)


def test_no_usable_row_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    encoded = encode_supervised(tokenizer, rows(2), 8)
    with pytest.raises(UserError, match=r"none of the 2 train rows can be used.*Raise max_length \(now 8\)"):
        check_encoded(stage_context(8, [], "skip"), encoded, 2, "train")
    write_rows(tmp_path / "train.parquet", [])
    with pytest.raises(UserError, match="has no rows"):
        read_split(tmp_path / "train.parquet", None, "sft")


ENCODERS = [
    encode_supervised,
    encode_pairs,
    encode_conversations,
    lambda tokenizer, stored, most: encode_unpaired(tokenizer, unpair(stored), most),
]


@pytest.mark.parametrize("encode", ENCODERS)
def test_rows_that_are_mostly_too_long_are_refused(encode: Any, tokenizer: Any) -> None:
    """With the length that keeps 95 %: of 20 rows the longest may be cut."""
    answers = [assistant("y" * (10 + number)) for number in range(20)]
    others = [assistant("z" * (10 + number)) for number in range(20)]
    sides = [{"completion": [a], "chosen": [a], "rejected": [b]} for a, b in zip(answers, others, strict=True)]
    stored = [rows(1)[0] | side for side in sides]
    lengths = sorted(encode(tokenizer, stored, 1000).all_lengths)
    limit = lengths[len(lengths) * 2 // 5]
    enough = lengths[len(lengths) * 19 // 20 - 1]
    encoded = encode(tokenizer, stored, limit)
    assert sorted(encoded.all_lengths) == lengths
    with pytest.raises(UserError, match=rf"^sft: \d+ of {len(lengths)} train rows .* `max_length: {enough}` keeps 95%"):
        check_encoded(stage_context(limit, []), encoded, len(lengths), "train")
    # A held-out split only warns, and so do rows to train on of which half fit.
    check_encoded(stage_context(limit, []), encoded, len(lengths), "test")
    half = lengths[len(lengths) // 2]
    check_encoded(stage_context(half, []), encode(tokenizer, stored, half), len(lengths), "train")


def test_pairs_that_are_too_long_or_equal_are_left_out(tokenizer: Any) -> None:
    equal = {**rows(1)[0], "rejected": [assistant("red")]}
    long = {**rows(1)[0], "rejected": [assistant("y" * 100)]}
    for encode in (encode_pairs, encode_conversations):
        encoded = encode(tokenizer, [*rows(2), equal, long], 60)
        assert len(encoded.rows) == 2
        assert encoded.counts == {"skipped: both answers are the same": 1, "skipped: longer than max_length": 1}


def test_an_answer_that_was_cut_off_gets_no_end_of_turn(tokenizer: Any) -> None:
    full, cut = rows(1)[0], {**rows(1)[0], "rejected_finished": False}
    for encode in (encode_pairs, encode_conversations):
        (ended,), (open_end,) = (encode(tokenizer, [row], 100).rows for row in (full, cut))
        assert ended["rejected_ids"][-1] == tokenizer.eos_token_id
        assert open_end["rejected_ids"] == ended["rejected_ids"][:-1]
        assert open_end["chosen_ids"] == ended["chosen_ids"]


@pytest.fixture
def joining_tokenizer() -> Any:
    return make_joining_tokenizer()


def test_an_answers_indentation_is_learned_as_it_is_sampled(joining_tokenizer: Any) -> None:
    tokenizer = joining_tokenizer
    code = "    y = x + 0\n    return y\n"
    row = {"prompt": [user("def f(x):")], "completion": [assistant(code)]}
    prompt = render_prompt(tokenizer, row["prompt"])
    joint = tokenizer.apply_chat_template([*row["prompt"], *row["completion"]], return_dict=False)
    assert joint[: len(prompt)] != prompt  # the line break and the indentation are one token
    (encoded,) = encode_supervised(tokenizer, [row], 100).rows
    assert encoded["input_ids"][: len(prompt)] == prompt
    assert supervised_text(tokenizer, encoded) == f"{code}<|im_end|>"
    pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": [assistant("no")]}
    sides = encode_pairs(tokenizer, [pair | {"chosen_finished": False}], 100).rows[0]
    assert sides["prompt_ids"] == prompt and tokenizer.decode(sides["chosen_ids"]) == code


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:<think></think>' }}{% endif %}"
    )
    with pytest.raises(UserError, match="renders a prompt differently once an answer follows"):
        encode_supervised(tokenizer, rows(1), 100)


def test_tokenizer_and_model_are_checked(tiny_model: Path, tokenizer: Any) -> None:
    model = load_policy(tiny_model)
    check_model("sft", model, tokenizer)
    other_tokenizer = load_tokenizer(tiny_model)
    other_tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="has 261 tokens and the model embeds 260"):
        check_model("sft", model, other_tokenizer)
    with pytest.raises(UserError, match="different vocabularies"):
        check_same_vocabulary("ppo", tokenizer, other_tokenizer, ("policy", "reward"))
    check_same_vocabulary("ppo", tokenizer, load_tokenizer(tiny_model), ("policy", "reward"))
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UserError, match="the two must differ"):
        check_model("sft", model, tokenizer)


TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ '!' + call['function']['name'] }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {**assistant(""), "tool_calls": '[{"type": "function", "function": {"name": "look", "arguments": {}}}]'}
RESULT = {"role": "tool", "content": "a wall"}


def episode_pair(**changes: Any) -> dict[str, Any]:
    """A pair of an episode that looks before it answers, and one that does not."""
    chosen, rejected = [CALL, RESULT, assistant("blue")], [assistant("red")]
    return {
        "id": "0",
        "source": "t",
        "prompt": [user("?")],
        "checks": "",
        "chosen": chosen,
        "rejected": rejected,
    } | changes


def test_results_of_tools_within_an_answer_are_not_supervised(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOLS
    (row,) = encode_supervised(tokenizer, [episode_pair()], 200).rows
    assert supervised_text(tokenizer, row) == "!look<|im_end|>blue<|im_end|>"
    assert "a wall" in tokenizer.decode(row["input_ids"])
    excluded = episode_pair(chosen=[{**CALL, "train": False}, RESULT, assistant("blue")])
    (row,) = encode_supervised(tokenizer, [excluded], 200).rows
    assert supervised_text(tokenizer, row) == "blue<|im_end|>"


def test_masks_of_pairs_leave_the_results_of_tools_out(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOLS
    (row,) = encode_pairs(tokenizer, [episode_pair()], 200).rows
    learned = [token for token, mask in zip(row["chosen_ids"], row["chosen_mask"], strict=True) if mask]
    assert tokenizer.decode(learned) == "!look<|im_end|>blue<|im_end|>"
    assert row["rejected_mask"] == [1] * len(row["rejected_ids"])
    batch = PairCollator(pad_token_id=0)([row])
    labeled = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, 0)
    assert [id for id in labeled[0].tolist() if id] == learned
    assert [id for id in labeled[1].tolist() if id] == row["rejected_ids"]
    # Rows of single turns are as they were.
    (single,) = encode_pairs(tokenizer, [episode_pair(chosen=[assistant("blue")])], 200).rows
    assert set(single) == {"prompt_ids", "chosen_ids", "rejected_ids"}


def test_pair_with_rewritten_turns_is_skipped(tokenizer: Any) -> None:
    # As templates that drop the thoughts of all turns but the last.
    tokenizer.chat_template = TOOLS.replace(
        "m['content'] }}", "(m['content'] if loop.last or m['role'] != 'assistant' else '') }}"
    )
    talk = [assistant("hm"), user("well?"), assistant("blue")]
    encoded = encode_pairs(tokenizer, [episode_pair(chosen=talk)], 200)
    assert not encoded.rows and encoded.counts == {REWRITTEN: 1}
    split = encode_supervised(tokenizer, [episode_pair(chosen=talk)], 200)
    assert [supervised_text(tokenizer, row) for row in split.rows] == ["hm<|im_end|>", "blue<|im_end|>"]


def test_a_pair_with_nothing_to_learn_on_a_side_is_left_out(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOLS
    excluded = episode_pair(chosen=[{**CALL, "train": False}, RESULT, {**assistant("blue"), "train": False}])
    assert encode_pairs(tokenizer, [excluded], 200).counts == {NOT_TRAINED: 1}


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_answer_marked_as_not_trained_is_skipped(side: str, tokenizer: Any) -> None:
    pair = {**episode_pair(chosen=[assistant("blue")]), side: [assistant("!look") | {"train": False}]}
    encoded = encode_pairs(tokenizer, [pair], 200)
    assert (encoded.rows, encoded.counts) == ([], {NOT_TRAINED: 1})
    unpaired = encode_unpaired(tokenizer, unpair([pair]), 200)
    assert (len(unpaired.rows), unpaired.counts) == (1, {NOT_TRAINED: 1})


def test_unpaired_answers_and_their_mismatched_ones_have_masks(tokenizer: Any) -> None:
    tokenizer.chat_template = TOOLS
    encoded = encode_unpaired(tokenizer, unpair([episode_pair(), episode_pair(id="1", prompt=[user("!")])]), 200)
    assert [0 in row["completion_mask"] for row in encoded.rows] == [True, False, True, False]
    add_mismatched(encoded.rows, [[0, 1], [2, 3]], 200)
    assert [0 in row["KL_completion_mask"] for row in encoded.rows] == [False, True, False, True]
    batch = UnpairedCollator(pad_token_id=0)(encoded.rows)
    for index, row in enumerate(encoded.rows):
        assert int(batch["completion_mask"][index].sum()) == sum(row["completion_mask"])
        assert int(batch["KL_completion_mask"][index].sum()) == sum(row["KL_completion_mask"])
