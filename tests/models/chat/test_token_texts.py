"""Token by token, a response's text is neither lost nor said twice."""

from hypothesis import given
from hypothesis import strategies as st

from align.models.chat.render import token_texts
from align.models.tiny import make_tiny_tokenizer

TOKENIZER = make_tiny_tokenizer()


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_the_pieces_are_the_text(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(TOKENIZER, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_stands_at_its_last_one():
    ids = TOKENIZER("aé", add_special_tokens=False)["input_ids"]  # a byte each: a, two for é
    assert token_texts(TOKENIZER, ids) == ["a", "", "é"]
    # cut in the middle: what is there is shown
    assert token_texts(TOKENIZER, ids[:2]) == ["a", "\ufffd"]


def test_the_end_token_is_a_piece_of_its_own():
    assert token_texts(TOKENIZER, [*TOKENIZER("a", add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]) == [
        "a", TOKENIZER.eos_token,
    ]  # fmt: skip
