"""Rendering: a conversation ends at the end of turn, and token by token a response loses no text."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from align.models.built_in import make_tiny_tokenizer
from align.models.chat.render import render_conversation, render_prompt, require_chat_template, token_texts
from align.models.loading import load_tokenizer
from tests.support.refusals import Refused

QUESTION = [{"role": "user", "content": "Hi"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "Yo"}]


def test_conversation_is_prompt_answer_and_end(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    prompt = render_prompt(tokenizer, QUESTION)
    answer = tokenizer("Yo", add_special_tokens=False)["input_ids"]
    assert render_conversation(tokenizer, ANSWERED) == [*prompt, *answer, tokenizer.eos_token_id]
    assert render_conversation(tokenizer, ANSWERED, finished=False) == [*prompt, *answer]


def test_trailing_line_break_of_chatml_is_cut(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    ours = render_conversation(tokenizer, ANSWERED)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    assert render_conversation(tokenizer, ANSWERED) == ours


def test_template_without_an_end_gets_one(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '.' }}{% endfor %}"
    assert render_conversation(tokenizer, ANSWERED)[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in render_conversation(tokenizer, ANSWERED, finished=False)


def test_missing_template_names_the_field(refused: Refused) -> None:
    class Bare:
        chat_template = None

    refused(lambda: require_chat_template(Bare(), "the model 'x'"))


TOOLS = '[{"type": "function", "function": {"name": "weather"}}]'
CALLED = [
    *QUESTION,
    {
        "role": "assistant",
        "content": "",
        "tool_calls": '[{"function": {"name": "weather", "arguments": {"city": "Rom"}}}]',
    },
    {"role": "tool", "content": "sun"},
]
WITH_TOOLS = (
    "{% if tools %}{% for t in tools %}<{{ t['function']['name'] }}>{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}"
    "{% if 'tool_calls' in m %}{% for c in m['tool_calls'] %}({{ c['function']['arguments']['city'] }}){% endfor %}"
    "{% endif %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_tools_and_their_calls_reach_the_template_as_objects(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = WITH_TOOLS
    message = tokenizer.decode(render_prompt(tokenizer, CALLED, TOOLS))
    assert message == "<weather>user:Hi;assistant:(Rom);tool:sun;assistant:"
    full = tokenizer.decode(render_conversation(tokenizer, ANSWERED, finished=False, tools=TOOLS))
    assert full == "<weather>user:Hi;assistant:Yo;"
    # A field that other rows of a file have is none of this message's.
    tokenizer.chat_template = "{% if 'name' in m %}!{% endif %}".join(
        ["{% for m in messages %}", "{{ m.content }}{% endfor %}"]
    )
    bare = [{**QUESTION[0], "tool_calls": None, "name": None}]
    assert tokenizer.decode(render_prompt(tokenizer, bare)) == "Hi"


def test_templates_without_a_place_for_tools_are_refused(refused: Refused, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    refused(render_prompt, tokenizer, QUESTION, TOOLS)
    refused(render_prompt, tokenizer, CALLED)


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
