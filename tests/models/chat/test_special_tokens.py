"""Special tokens: which one ends a turn."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken

from align.models.built_in import END_OF_TEXT, make_tiny_tokenizer
from align.models.chat.special_tokens import turn_end_token, unify_special_tokens
from align.models.loading import load_policy

ROLES = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""A turn ends where the next one's role begins, as in GLM-4."""
THOUGHT = ROLES.replace("\n{{ m.content }}", "\n<|think|>{{ m.content }}")
"""A special token stands between the role and the answer."""


@pytest.mark.parametrize("template", [ROLES, THOUGHT], ids=["roles", "thought"])
def test_a_token_before_the_answer_ends_no_turn(template: str, tiny_model: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    added = [AddedToken(f"<|{name}|>", special=True, normalized=False) for name in ("user", "assistant", "think")]
    tokenizer.add_tokens(added, special_tokens=True)
    tokenizer.eos_token = END_OF_TEXT
    tokenizer.chat_template = template
    assert turn_end_token(tokenizer) is None
    warnings: list[str] = []
    unify_special_tokens(tokenizer, load_policy(tiny_model), warnings.append)
    assert tokenizer.eos_token == END_OF_TEXT
    assert "writes no special token at the end of a turn" in warnings[0]


@pytest.mark.parametrize("trailing", ["", "\n", " \n"])
def test_a_token_behind_the_answer_ends_its_turn(trailing: str) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = ROLES.replace("m.content }}", "m.content }}<|im_end|>" + trailing)
    assert turn_end_token(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
