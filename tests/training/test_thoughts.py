"""Thoughts of rows: learned, only read, or removed, in SFT and in preferences; refused if they cannot be learned."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from align.config.stages.preference import DpoConfig
from align.config.stages.sft import SftConfig
from align.data.rows import assistant, user, write_rows
from align.errors import UserError
from align.models.chat.render import render_conversation, render_prompt
from align.models.chat.template_settings import TemplateSettings
from align.models.loading import load_tokenizer
from align.stages.sft import run
from align.store.artifacts import Artifact, Kind
from align.training.rows import MASKED, REWRITTEN, encode_answers, encode_pairs, encode_supervised, set_thoughts
from align.training.thoughts import PROBE, check_thoughts, own_template, thought_facts, use_training_template
from align.training.unpaired import encode_unpaired, unpair
from tests.support.chat_templates import THINKING
from tests.support.environments.families import make, released_template
from tests.support.training.harness import context, rows

THOUGHT = "<think>\nIt is é.\n</think>\n\n"


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = THINKING
    return tokenizer


def thinking_rows(count: int = 3) -> list[dict[str, Any]]:
    thinking = rows(count)
    for row in thinking:
        for side in ("completion", "chosen", "rejected"):
            row[side] = [assistant(THOUGHT + row[side][0]["content"])]
    return thinking


def with_setting(thoughts: str, stored: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return set_thoughts(SimpleNamespace(thoughts=thoughts, has_vocabulary=True), stored)


def learned(tokenizer: Any, row: dict[str, list[int]]) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != MASKED]))


@pytest.mark.parametrize(
    ("thoughts", "text", "is_shown"),
    [
        ("train", THOUGHT + "red<|im_end|>", True),
        ("read", "\n\nred<|im_end|>", True),
        ("drop", "<think>\n\n</think>\n\nred<|im_end|>", False),
    ],
)
def test_thoughts_are_learned_read_or_dropped(thoughts: str, text: str, is_shown: bool, tokenizer: Any) -> None:
    row = encode_supervised(tokenizer, with_setting(thoughts, thinking_rows(1)), 200).rows[0]
    assert learned(tokenizer, row) == text
    assert (THOUGHT in tokenizer.decode(row["input_ids"])) == is_shown


@pytest.mark.parametrize("thoughts", ["train", "read"])
def test_pairs_mask_thoughts_that_are_read(thoughts: str, tokenizer: Any) -> None:
    stored = with_setting(thoughts, thinking_rows(2))
    pairs = encode_pairs(tokenizer, stored, 200).rows
    answers = encode_unpaired(tokenizer, unpair(stored), 200).rows
    if thoughts == "train":
        assert "chosen_mask" not in pairs[0] and "completion_mask" not in answers[0]
        return
    masked = [(row[f"{side}_ids"], row[f"{side}_mask"]) for row in pairs for side in ("chosen", "rejected")]
    masked += [(row["completion_ids"], row["completion_mask"]) for row in answers]
    for ids, mask in masked:
        text = tokenizer.decode([token for token, is_learned in zip(ids, mask, strict=True) if is_learned])
        assert text.startswith("\n\n") and text.endswith("<|im_end|>") and "think" not in text


def test_answer_without_thought_is_learned_whole(tokenizer: Any) -> None:
    (row,) = encode_supervised(tokenizer, with_setting("read", rows(1)), 200).rows
    assert learned(tokenizer, row) == "<think>\n\n</think>\n\nred<|im_end|>"


def test_conversation_with_dropped_thoughts_is_split(tokenizer: Any) -> None:
    row = thinking_rows(1)[0]
    row["prompt"] = [user("a"), assistant(THOUGHT + "b"), user("c")]
    encoded = encode_answers(tokenizer, [row], 200)
    expected = [f"{THOUGHT}{text}<|im_end|>" for text in ("b", "red")]
    assert [learned(tokenizer, turn) for turn in encoded.rows] == expected
    # The second turn sees the first answer as the template shows it later.
    assert THOUGHT + "b" not in tokenizer.decode(encoded.rows[1]["input_ids"])
    assert thought_facts(tokenizer, encoded) == {"thought_rows": 2, "split_conversations": 1}
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    assert thought_facts(tokenizer, encode_supervised(tokenizer, rows(1), 200)) == {}


def test_pairs_of_episodes_use_training_template() -> None:
    tokenizer = make("qwen3")
    own = tokenizer.chat_template = released_template("qwen3")
    row = thinking_rows(1)[0]
    row["chosen"] = [assistant(THOUGHT + "b"), user("c"), assistant(THOUGHT + "d")]
    assert encode_pairs(tokenizer, [row], 200).counts == {REWRITTEN: 1}
    use_training_template(tokenizer, thinking_rows(2))
    assert own_template(tokenizer) == tokenizer.chat_template == own
    use_training_template(tokenizer, [row])
    encoded = encode_pairs(tokenizer, [row], 200)
    text = tokenizer.decode(encoded.rows[0]["chosen_ids"])
    assert text.count("It is") == 2
    assert thought_facts(tokenizer, encoded) == {"thought_rows": 1, "training_template": "qwen3"}
    assert own_template(tokenizer) == own != tokenizer.chat_template


def test_r1_learns_thoughts_with_training_template() -> None:
    tokenizer = make("deepseek-r1")
    own = tokenizer.chat_template = released_template("deepseek_r1_distill")
    prompt = tokenizer.decode(render_prompt(tokenizer, PROBE[:1]))
    check_thoughts("sft", tokenizer, [*rows(1), *thinking_rows(1)])
    assert own_template(tokenizer) == own != tokenizer.chat_template
    assert tokenizer.decode(render_prompt(tokenizer, PROBE[:1])) == prompt
    encoded = encode_supervised(tokenizer, [*rows(1), *thinking_rows(1)], 200)
    # The prompt ends with the beginning of the thought.
    end = "<｜end▁of▁sentence｜>"
    expected = [f"\n</think>\n\nred{end}", f"It is é.\n</think>\n\nred{end}"]
    assert [learned(tokenizer, row) for row in encoded.rows] == expected
    assert thought_facts(tokenizer, encoded) == {"thought_rows": 1, "training_template": "deepseek-r1"}


def test_template_without_tags_gets_thought_as_field(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.thinking %}{{ '(' + m.thinking + ')' }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}"
    )
    ids = render_conversation(tokenizer, [user("a"), assistant(THOUGHT + "b")])
    assert tokenizer.decode(ids) == "a<|im_end|>(It is é.)b<|im_end|>"


def test_thoughts_that_cannot_be_learned_are_refused(tokenizer: Any) -> None:
    mixed = [*rows(2), *thinking_rows(1)]
    check_thoughts("sft", tokenizer, mixed)
    TemplateSettings("off").apply(tokenizer)
    check_thoughts("sft", tokenizer, rows(2))
    with pytest.raises(UserError, match="sft: 1 of 3 train rows have thoughts, and .* thinking is off.*thoughts: drop"):
        check_thoughts("sft", tokenizer, mixed)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'].split('</think>')[-1] + eos_token }}{% endfor %}"
    with pytest.raises(UserError, match="drops the thoughts of answers.*chat_template"):
        check_thoughts("sft", tokenizer, mixed)


def test_default_of_thoughts_keeps_keys() -> None:
    for config_class in (SftConfig, DpoConfig):
        assert "thoughts" in config_class.keyed_when_set
        assert config_class.model_fields["thoughts"].default == "train"


def test_stage_reads_thoughts_and_counts_them(tiny_model: Path, tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "thinker"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("align.json"))
    tokenizer.save_pretrained(folder)
    (tmp_path / "data").mkdir()
    for split, count in (("train", 16), ("test", 4)):
        write_rows(tmp_path / "data" / f"{split}.parquet", thinking_rows(count))
    data = Artifact("data", Kind.INSTRUCTIONS, tmp_path / "data", {})
    config = SftConfig(model="model", data="data", learning_rate=1e-3, max_steps=1, max_length=200, thoughts="read")
    metrics = run(context(tmp_path, config, folder, data))
    assert metrics["thought_rows"] == 16
