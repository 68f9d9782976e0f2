"""Prompts are drawn in an order that follows from the seed alone."""

import pytest

from align.errors import UserError
from align.models.loading import load_tokenizer
from align.rl.prompts import Prompts, derive_seed


def rows(count):
    return [{"prompt": [{"role": "user", "content": "x" * (i + 1)}]} for i in range(count)]


def test_every_epoch_sees_every_prompt_once(tiny_model):
    prompts = Prompts(rows(5), load_tokenizer(tiny_model), None)
    draws = prompts.draw(0, 10, seed=1)
    assert sorted(draws[:5]) == sorted(draws[5:]) == list(range(5))
    assert draws[:5] != draws[5:]


def test_a_draw_depends_on_its_place_only(tiny_model):
    prompts = Prompts(rows(5), load_tokenizer(tiny_model), None)
    assert prompts.draw(0, 12, seed=1)[3:9] == prompts.draw(3, 6, seed=1)
    assert prompts.draw(0, 5, seed=1) != prompts.draw(0, 5, seed=2)


def test_long_prompts_are_left_out_and_counted(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    shortest = len(Prompts(rows(1), tokenizer, None).token_ids[0])
    prompts = Prompts(rows(5), tokenizer, shortest + 1)
    assert (len(prompts), prompts.dropped) == (2, 3)
    with pytest.raises(UserError, match="no prompt is left"):
        Prompts(rows(5), tokenizer, 1)


def test_texts_and_messages_are_taken_and_other_things_refused(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    assert Prompts([{"prompt": "abc"}], tokenizer, None).token_ids == [tokenizer("abc")["input_ids"]]
    with pytest.raises(UserError, match="list of messages"):
        Prompts([{"prompt": 3}], tokenizer, None)


def test_seeds_differ_and_repeat():
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", 2)
    assert derive_seed(1, "a", 2) != derive_seed(1, "a", 3)
    assert 0 <= derive_seed("x") < 2**31
