"""Turns of an episode: the ids are the template's of the whole conversation, and no text of a message ends a turn."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.user_paths import cache_folder
from align.data.tool_calls import ToolCall, tool_call_format
from align.environments.turn_template import TurnTemplate
from align.errors import UserError
from align.models.chat.chat_template import limit_templates
from align.models.chat.named_templates import TRAINING_TEMPLATES, read_template
from align.models.chat.render import render_conversation, render_prompt
from align.models.chat.template_settings import TemplateSettings
from tests.support.environments.families import FAMILIES, TOOLS, make, released_template, tokenizer_of

MODEL = "the model 'm'"
ASKED = [{"role": "user", "content": "Hi"}]
HOSTILE = [
    "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<|endoftext|>", "</s>", "[INST]", "[/TOOL_RESULTS]",
    "</tool_response>", "<tool_call>", "</think>", "<|im_/thinkend|>", "<|im_/no_thinkend|>", "\ufdd1", "\ufdd14\ufdd2",
    "\ufdd0", "\x1b[31m", "<script>",
]  # fmt: skip
WORDS = ["two", " and ", "3", "\n", "  ", "é", "漢", "<", "[1, 2]", '{"a": 1}', "a < b", "|>", "/think"]
plain = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join)
hostile = st.lists(st.sampled_from([*WORDS, *HOSTILE]), min_size=1, max_size=6).map("".join)
thought = st.sampled_from(["", "<think>\nhm\n</think>\n\n", "<think>\n\n</think>\n\n"])
TEXTS = ["", "x", 'a\n"b"', "</tool_call>", "é\\", "<|im_end|>"]
values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("pq"), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
arguments = st.dictionaries(st.sampled_from(["a", "b", "query"]), values, max_size=2)


@st.composite
def conversations(draw: st.DrawFn, tools: bool) -> tuple[list[dict[str, Any]], list[tuple[str, list[dict[str, Any]]]]]:
    """The messages of a prompt, and turns of the policy, each with the messages after it."""
    system = [{"role": "system", "content": draw(hostile)}] if draw(st.booleans()) else []
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        after = [{"role": "user", "content": draw(hostile)}]
        if tools and draw(st.booleans()):
            after = [{"role": "tool", "content": draw(hostile)} for _ in range(draw(st.integers(1, 2)))]
        turns.append((draw(thought) + draw(plain), after))
    return [*system, {"role": "user", "content": draw(hostile)}], turns


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def require_same_ids(template: TurnTemplate, prompt: list[dict[str, Any]], turns: Any, merges: bool = False) -> None:
    """Play a conversation turn by turn, and compare with the rendering of all of it."""
    ids, messages = template.prompt(prompt), list(prompt)
    for text, after in turns:
        whole = template.conversation([*messages, answer(text)])
        if merges and whole[: len(ids)] != ids:
            return  # the turn's first characters form a token with the prompt's last: a policy samples others
        assert whole[: len(ids)] == ids
        turn = whole[len(ids) :]
        assert turn[-1] == template.eos and template.eos not in turn[:-1]
        ids = [*ids, *turn, *template.between(after, prompt=prompt)]
        messages += [answer(text), *after]
        assert ids == template.prompt(messages)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_turn_by_turn_is_the_rendering_of_the_whole(name: str, data: st.DataObject) -> None:
    family = FAMILIES[name]
    template = TurnTemplate(tokenizer_of(name), TOOLS if family.tools else None, MODEL)
    assert template.training == ""  # a training template is prefix-preserving itself
    require_same_ids(template, *data.draw(conversations(family.tools)))


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_an_end_of_turn_that_takes_white_space(name: str, data: st.DataObject) -> None:
    tokenizer = make(name, strips=True)
    template = TurnTemplate(tokenizer, None, MODEL)
    require_same_ids(template, *data.draw(conversations(tools=False)))
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert template.between(ASKED)[0] == start  # the line break is part of the token before it


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_embedded_models_tokenizer(data: st.DataObject) -> None:
    for template, has_tools in zip(embedded_templates(), (False, True), strict=True):
        require_same_ids(template, *data.draw(conversations(has_tools)), merges=True)


@cache
def embedded_templates() -> list[TurnTemplate]:
    """Return the embedded model's own template and the one with tools; skips where the model was never converted."""
    from align.models.loading import load_tokenizer

    folders = sorted(cache_folder().glob("smollm2-135m-instruct-*/tokenizer.json"))
    if not folders:
        pytest.skip("the embedded model is not in the cache")
    tokenizer = load_tokenizer(folders[-1].parent)
    own = TurnTemplate(tokenizer, None, MODEL)
    tokenizer.chat_template = read_template("chatml-tools", Path())
    return [own, TurnTemplate(tokenizer, TOOLS, MODEL)]


@pytest.mark.parametrize("name", FAMILIES)
def test_text_without_control_tokens_has_the_ids_of_training(name: str) -> None:
    """Supervised rows are rendered by ``render.py``: episodes must begin as they do."""
    tokenizer, tools = tokenizer_of(name), '[{"type": "function", "function": {"name": "f"}}]'
    template = TurnTemplate(
        tokenizer, [{"type": "function", "function": {"name": "f"}}] if FAMILIES[name].tools else None, MODEL
    )
    tools = tools if FAMILIES[name].tools else ""
    messages = [{"role": "system", "content": "Be [brief]."}, {"role": "user", "content": "a < b | c?\n\n  Yes"}]
    assert template.prompt(messages) == render_prompt(tokenizer, messages, tools)
    answered = [*messages, answer("<think>\nhm\n</think>\n\nIt is [so].")]
    assert template.conversation(answered) == render_conversation(tokenizer, answered, tools=tools)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(text=hostile)
def test_no_text_becomes_a_control_token(name: str, text: str) -> None:
    family, tokenizer = FAMILIES[name], tokenizer_of(name)
    template = TurnTemplate(tokenizer, TOOLS if family.tools else None, MODEL)
    control = {token for token in tokenizer.added_tokens_decoder if token != tokenizer.unk_token_id}

    def controls(content: str, role: str) -> list[int]:
        messages = [{"role": role, "content": content}]
        ids = template.between(messages)
        seen = "".join(tokenizer.decode(ids).split())
        # Templates may strip white space and escape for JSON; the text is there all the same.
        for part in content.replace("/think", " ").replace("/no_think", " ").split() if role == "user" else []:
            kept = "".join(character for character in part if not 0xFDD0 <= ord(character) <= 0xFDEF)
            assert kept in seen.replace("\ufffd", "") or any(ord(character) > 127 for character in kept)
        return [token for token in ids if token in control]

    for role in ("user", "tool") if family.tools else ("user",):
        assert controls(text, role) == controls("plain", role)
    assert template.eos not in template.prompt([{"role": "user", "content": text}])[-3:]
    special = {tokenizer.convert_tokens_to_ids(token) for token in family.special} - {tokenizer.unk_token_id}
    system = template.prompt([{"role": "system", "content": f"x{text}"}, *ASKED])
    benign = template.prompt([{"role": "system", "content": "plain"}, *ASKED])
    assert [token for token in system if token in special] == [token for token in benign if token in special]


def test_answer_keeps_tags_but_not_turn_marks() -> None:
    tokenizer = tokenizer_of("qwen3")
    template = TurnTemplate(tokenizer, TOOLS, MODEL)
    ids = template.conversation([*ASKED, answer("<think>a</think><|im_end|><tool_call>")])
    turn = ids[len(template.prompt(ASKED)) :]
    tags = [tokenizer.convert_tokens_to_ids(tag) for tag in ("<think>", "</think>", "<tool_call>", "<|im_end|>")]
    assert [token for token in turn if token in tokenizer.added_tokens_decoder] == tags


def test_names_and_arguments_of_calls_are_data() -> None:
    template = TurnTemplate(tokenizer_of("qwen3"), TOOLS, MODEL)
    call = ToolCall("<|im_end|>", {"<|im_end|>": ["<|im_start|>"]}, "")
    plain_call = ToolCall("x", {"y": ["z"]}, "")
    written = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": each.name, "arguments": each.arguments}}],
        }
        for each in (call, plain_call)
    ]
    counts = [template.conversation([*ASKED, message]).count(template.eos) for message in written]
    assert counts[0] == counts[1]
    results = [{"role": "tool", "content": "4"}]
    assert template.between(results, [call]) == template.between(results, [plain_call])


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tools])
@settings(max_examples=40, deadline=None)
@given(drawn=st.lists(arguments, min_size=1, max_size=3), content=st.sampled_from(["", "Let me see."]))
def test_calls_that_a_template_writes_are_read_back(name: str, drawn: list[dict[str, Any]], content: str) -> None:
    tokenizer = tokenizer_of(name)
    template = TurnTemplate(tokenizer, TOOLS, MODEL)
    content = "" if name == "llama3.1" else content
    message = answer(content) | {
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": each}} for each in drawn]
    }
    ids = template.conversation([*ASKED, message])[len(template.prompt(ASKED)) :]
    turn = tool_call_format("auto", template.template).parse(tokenizer.decode(ids[:-1]))
    assert not turn.errors
    assert [(call.name, call.arguments) for call in turn.calls] == [("add", each) for each in drawn]
    assert turn.content == content


def test_results_name_their_calls() -> None:
    tokenizer = tokenizer_of("mistral")
    template = TurnTemplate(tokenizer, TOOLS, MODEL)
    calls = [ToolCall("add", {}, "", "abc123def"), ToolCall("add", {}, "")]
    results = [{"role": "tool", "content": '4"'}, {"role": "tool", "content": "5"}]
    text = tokenizer.decode(template.between(results, calls)).replace(" ", "")
    assert text == (
        '[TOOL_RESULTS]{"content":"4\\"","call_id":"abc123def"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS]{"content":"5","call_id":"call00001"}[/TOOL_RESULTS]'
    )


@pytest.mark.parametrize(
    ("released", "family", "tools", "training"),
    [
        ("qwen2_5", "qwen2.5", True, ""),
        ("qwen3", "qwen3", False, "qwen3"),
        ("qwen3", "qwen3", True, "qwen3"),
        ("qwen3_instruct_2507", "qwen3", True, ""),
        ("llama3", "llama3", False, ""),
        ("llama3_1", "llama3.1", True, ""),
        ("llama3_2", "llama3.1", True, ""),
    ],
)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_templates_as_released(released: str, family: str, tools: bool, training: str, data: st.DataObject) -> None:
    tokenizer = make(family)
    tokenizer.chat_template = released_template(released)
    template = TurnTemplate(tokenizer, TOOLS if tools else None, MODEL)
    assert template.training == training
    prompt, turns = data.draw(conversations(tools))
    if not training:  # these strip the white space of turns
        turns = [(text.strip() or "x", after) for text, after in turns]
    require_same_ids(template, prompt, turns)
    # The training template begins as the model's own does.
    offered = json.dumps(TOOLS) if tools else ""
    if "strftime" not in tokenizer.chat_template:
        assert template.prompt(ASKED) == render_prompt(tokenizer, ASKED, offered)


DROPS_LAST_END = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if not (loop.last and m['role'] == 'assistant') %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MOVES_TOOLS = (
    "{{ bos_token }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% if tools and m == users[-1] %}"
    "{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'tool' %}{{ '[TOOL_RESULTS] ' + m['content'] + '[/TOOL_RESULTS]' }}"
    "{% elif m['role'] == 'assistant' %}{% if m['tool_calls'] %}"
    "{{ '[TOOL_CALLS] [' + m['tool_calls'] | tojson + ']' + eos_token }}{% else %}{{ ' ' + m['content'] + eos_token }}"
    "{% endif %}{% else %}{{ raise_exception('roles') }}{% endif %}{% endfor %}"
)
OTHER_END = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful function-calling AI assistant. "
    "You do not currently have access to any functions. <functions></functions><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ eos_token if loop.last and m['role'] == 'assistant' else '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("family", "own", "tools", "training"),
    [
        ("chatml", DROPS_LAST_END, None, "chatml"),
        ("mistral", MOVES_TOOLS, TOOLS, "mistral"),
        ("olmo3", OTHER_END, None, "olmo3"),
    ],
)
def test_a_template_of_a_known_family_is_replaced(family: str, own: str, tools: Any, training: str) -> None:
    tokenizer = make(family)
    tokenizer.chat_template = own
    template = TurnTemplate(tokenizer, tools, MODEL)
    assert template.training == training
    offered = json.dumps(tools) if tools else ""
    assert template.prompt(ASKED) == render_prompt(tokenizer, ASKED, offered)
    require_same_ids(template, ASKED, [("Yes.", ASKED), ("No.", ASKED)])


def test_known_template_with_other_prompts_is_refused() -> None:
    """Training under another prompt than the model's would not train the model that is used."""
    tokenizer = make("mistral")
    tokenizer.chat_template = MOVES_TOOLS.replace("'[INST] '", "'[INST]'")
    with pytest.raises(UserError, match="turns that change once the conversation goes on: token"):
        TurnTemplate(tokenizer, TOOLS, MODEL)


def test_every_training_template_is_tested() -> None:
    assert TRAINING_TEMPLATES.keys() <= FAMILIES.keys()


REFUSALS = [
    (None, None, "has no chat template"),
    (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'].split('</think>')[-1] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        None,
        "answers that lose a part of their text, such as '<think>",
    ),
    (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        None,
        "has no '<|im_end|>' at the end of an answer",
    ),
    (
        "{% for m in messages %}{{ loop.length ~ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        None,
        "once the prompt is answered: token 1 of a conversation is '1' and becomes '2'",
    ),
    ("{{ raise_exception('never') }}", None, "no way to write the roles user"),
    (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        TOOLS,
        "no place for tools, and the environment has add, look_up. Name another in the model stage's chat_template "
        "field: one of align's that fits its tokens (chatml-tools, qwen2.5), or a Jinja file.",
    ),
    (
        "{{ tools | tojson }}{% for m in messages if m['role'] != 'tool' %}"
        "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        TOOLS,
        "no place for the results of tools",
    ),
]


@pytest.mark.parametrize(("template", "tools", "message"), REFUSALS)
def test_a_template_that_cannot_be_used_is_refused(template: str | None, tools: Any, message: str) -> None:
    tokenizer = make("chatml")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=MODEL) as error:
        TurnTemplate(tokenizer, tools, MODEL)
    assert message in str(error.value)
    assert "chat_template" in str(error.value)


def test_a_conversation_that_the_template_refuses() -> None:
    template = TurnTemplate(tokenizer_of("mistral"), None, MODEL)
    with pytest.raises(UserError, match="refuses a conversation of the roles user, assistant, critic: mistral has no"):
        template.between([{"role": "critic", "content": "Bad."}])
    with pytest.raises(UserError, match="refuses a conversation of the roles critic"):
        template.prompt([{"role": "critic", "content": "Bad."}])


def test_the_date_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on the next day has the prompts that it had."""
    limit_templates()
    tokenizer = make("llama3.1")
    tokenizer.chat_template = released_template("llama3_2")
    text = tokenizer.decode(TurnTemplate(tokenizer, TOOLS, MODEL).prompt(ASKED))
    assert "Today Date: 26 Jul 2025" in text


def test_empty_and_broken_texts() -> None:
    template = TurnTemplate(tokenizer_of("chatml"), None, MODEL)
    broken = template.between([{"role": "user", "content": "a\ud800b\ufdd0"}])
    assert broken == template.between([{"role": "user", "content": "a\ufffdb\ufffd"}])
    assert template.between([{"role": "user", "content": ""}])[-1:] == template.prompt(ASKED)[-1:]
    assert tokenizer_of("chatml").decode(template.between([])) == "\n<|im_start|>assistant\n"


@pytest.mark.parametrize("state", ["on", "off"])
def test_training_template_keeps_thinking_switch(state: Any) -> None:
    tokenizer = make("qwen3")
    tokenizer.chat_template = released_template("qwen3")
    TemplateSettings(state).apply(tokenizer)
    template = TurnTemplate(tokenizer, None, "m")
    assert template.training == "qwen3"
    prompt = template.prompt(ASKED)
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert prompt == ids
    assert tokenizer.decode(prompt).endswith("</think>\n\n") == (state == "off")
    answered = template.conversation([*ASKED, answer("It is so.")])
    assert answered[: len(prompt)] == prompt
    continued = [*ASKED, answer("It is so."), *ASKED]
    assert template.prompt(continued)[: len(answered)] == answered
