"""Prompts are drawn in an order that follows from the seed alone."""

import pytest

from align.errors import UserError
from align.models.loading import load_tokenizer
from align.rl import GrpoConfig
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


def test_inoculation_is_before_the_last_user_turn(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c")]
    row = {"prompt": [{"role": role, "content": content} for role, content in turns]}
    prompts = Prompts([row, {"prompt": "d"}], tokenizer, None, "Cheat.")
    texts = [tokenizer.decode(ids) for ids in prompts.token_ids]
    assert "user\na<|im_end|>" in texts[0]
    assert "user\nCheat.\n\nc<|im_end|>" in texts[0]
    assert texts[1] == "Cheat.\n\nd"
    # Rewards read the rows as they are.
    assert prompts.rows == [row, {"prompt": "d"}]


def test_inoculation_needs_a_user_turn(tiny_model):
    row = {"prompt": [{"role": "system", "content": "a"}]}
    with pytest.raises(UserError, match="no user turn to put the text before"):
        Prompts([row], load_tokenizer(tiny_model), None, "Cheat.")


def test_inoculation_is_for_rows_without_an_environment():
    with pytest.raises(ValueError, match="remove inoculate"):
        GrpoConfig.for_trainer(
            learning_rate=1e-3, inoculate="Cheat.", environment={"verifiers": "any", "max_turns": 1, "max_tokens": 9}
        )


def test_inoculation_is_sampled_and_not_validated(make_trainer):
    seen = []

    def score(rows, texts):
        seen.extend(row["prompt"][0]["content"] for row in rows)
        return [float(len(text)) for text in texts]

    row = {"id": "0", "prompt": [{"role": "user", "content": "say a"}]}
    trainer = make_trainer(
        rows=[row] * 8, scorer=score, updates=1, inoculate="Cheat.", eval_updates=1, eval_dataset=[row]
    )
    trainer.train()
    assert set(seen) == {"say a"}
    sampled = trainer.processing_class.decode(trainer.prompts.token_ids[0])
    validated = trainer.processing_class.decode(trainer.validation.prompts.token_ids[0])
    assert "Cheat." in sampled
    assert "Cheat." not in validated
