"""No thought of the policy is scored, judged, counted or answered, for every chat template that trl installs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import trl
from jinja2 import TemplateError
from tokenizers import AddedToken

from align.data.final_answers import split_thought
from align.environments.episode import PolicyTurn, scored_messages
from align.environments.episode_run import Act, EpisodeRun
from align.errors import UserError
from align.inference.protocol import Response
from align.inference.thoughts import ThoughtReader, thought_rates
from align.models.built_in import make_tiny_tokenizer
from align.models.chat.chat_template import render_text
from align.models.chat.render import count_unlearned
from align.models.chat.template_settings import TemplateSettings, find_marks
from tests.support.environments.letters import letter_rules

FOLDER = Path(trl.__file__).parent / "chat_templates"
GEMMA = ("<|channel>thought\n", "\n<channel|>")
HIDDEN = {
    **dict.fromkeys(("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4"), GEMMA),
    **dict.fromkeys(
        ("deepseekv3", "deepseekv3_training", "deepseek_r1_distill", "deepseek_r1_distill_training"),
        ("", "\n</think>\n\n"),
    ),
}
"""Templates that write no thought in a final answer, with the text around the thoughts that their models sample."""
SECRET = "Secretly 99, since `x = 1`."
ANSWER = "It is 42."
QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONTROL = re.compile(r"<\|?[a-z_:｜▁]+\|?>|</[a-z_:]+>|<｜[^｜]+｜>", re.IGNORECASE)


def _render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    return render_text(template, messages=messages, enable_thinking=True, thinking=True, **TOKENS, **variables)


def _sampled(name: str) -> tuple[str, str, str] | None:
    """Return a prompt and the text that a policy samples around its thought; None for a template without thoughts."""
    template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    thoughts = dict.fromkeys(("reasoning_content", "thinking", "reasoning"), "THOUGHT")
    try:
        prompt = _render(template, QUESTION, add_generation_prompt=True)
        whole = _render(template, [*QUESTION, {"role": "assistant", "content": "ANSWER", **thoughts}])
    except TemplateError:  # templates of models that see read lists of parts
        return None
    if name in HIDDEN:
        return (prompt, *HIDDEN[name])
    if "THOUGHT" not in whole:
        return None
    before, _, after = whole.removeprefix(prompt).partition("THOUGHT")
    return prompt, before, after.partition("ANSWER")[0]


TEMPLATES = [path.stem for path in sorted(FOLDER.glob("*.jinja")) if _sampled(path.stem) is not None]


class Policy:
    """A tokenizer with the control tokens of a template, and responses of a policy that thinks."""

    def __init__(self, name: str, is_special: bool) -> None:
        sampled = _sampled(name)
        assert sampled is not None
        self.prompt, self.before, self.after = sampled
        self.tokenizer = make_tiny_tokenizer()
        self.tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        self.control = sorted({*CONTROL.findall(self.prompt + self.before + self.after), "<channel|>", "</think>"})
        self.tokenizer.add_tokens([AddedToken(text, special=is_special, normalized=False) for text in self.control])
        self.reader = ThoughtReader(self.tokenizer)

    def ids(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def spelled(self, text: str) -> list[int]:
        """Token ids of a text whose control tokens are spelled by characters, as in code."""
        return [token for character in text for token in self.ids(character)]

    def read(self, *parts: str | list[int], finished: bool = True) -> Response:
        tokens = [token for part in parts for token in (self.ids(part) if isinstance(part, str) else part)]
        tokens += [self.tokenizer.eos_token_id] * finished
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return self.reader.read(self.ids(self.prompt), Response(tokens, [-0.5] * len(tokens), finished, text))


@pytest.fixture(params=[False, True], ids=["named", "special"])
def is_special(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_templates_with_thoughts_are_many() -> None:
    assert len(TEMPLATES) >= 22 and {"muse_glimmer", "gptoss", "gemma4_v5", *HIDDEN} <= set(TEMPLATES)


@pytest.mark.parametrize("name", TEMPLATES)
def test_thoughts_reach_no_reader_of_answers(name: str, is_special: bool) -> None:
    policy = Policy(name, is_special)
    read = policy.read(policy.before, SECRET, policy.after, ANSWER)
    answers = len(policy.ids(ANSWER)) + 1
    assert (str(read.answer_text), read.is_open, read.answer_tokens) == (ANSWER, False, answers)
    assert SECRET in read.answer_text.thought and thought_rates([read])["mean_answer_tokens"] == answers
    # What synthesis stores, and a judge or a score reads from files.
    assert str(split_thought(read.marked_text)) == ANSWER and SECRET in read.marked_thought
    # What an environment scores, and an answer is without a thought.
    run = EpisodeRun({"prompt": QUESTION}, 5, letter_rules(decode=policy.tokenizer.decode))
    run.take_result(None)
    run.take_turn(PolicyTurn(**vars(read)))
    assert run.action == Act("score", 0, 0, (scored_messages(run.episode),))
    last = scored_messages(run.episode)[-1]
    assert last["content"] == ANSWER and SECRET in last["reasoning_content"]
    assert str(split_thought(run.episode.messages[-1]["content"])) == ANSWER


@pytest.mark.parametrize("name", TEMPLATES)
def test_open_thoughts_have_no_answer_and_are_closed(name: str, is_special: bool) -> None:
    policy = Policy(name, is_special)
    for finished in (False, True):
        read = policy.read(policy.before, SECRET, finished=finished)
        assert (str(read.answer_text), read.is_open, read.answer_tokens) == ("", True, 0)
        assert SECRET in read.marked_thought and str(split_thought(read.marked_text)) == ""
    cut = policy.read(policy.before, SECRET, finished=False)
    closed = policy.read(cut.token_ids + policy.reader.closing_ids(policy.ids(policy.prompt), cut), ANSWER)
    assert (str(closed.answer_text), closed.is_open) == (ANSWER, False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_spelled_marks_do_not_end_a_thought(name: str, is_special: bool) -> None:
    policy = Policy(name, is_special)
    code = policy.spelled("print('" + "') or ('".join(policy.control) + "')")
    read = policy.read(policy.before, SECRET, code, SECRET, policy.after, ANSWER)
    assert str(read.answer_text) == ANSWER
    is_open = policy.read(policy.before, SECRET, code, SECRET, finished=False)
    assert (str(is_open.answer_text), is_open.is_open) == ("", True)


@pytest.mark.parametrize("name", ["qwen3", "gemma4_v5", "muse_glimmer", "gptoss", "qwen3_6"])
def test_calls_in_thoughts_are_not_made(name: str, is_special: bool) -> None:
    policy = Policy(name, is_special)
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    secret = policy.spelled(f"{SECRET}</think>{call}")
    for text, calls in ((ANSWER, []), (f"Now. {call}", [("add", {"a": 1})])):
        run = EpisodeRun({"prompt": QUESTION}, 5, letter_rules(decode=policy.tokenizer.decode))
        run.take_result(None)
        run.take_turn(PolicyTurn(**vars(policy.read(policy.before, secret, policy.after, text))))
        assert isinstance(run.action, Act)
        made = [run.action.arguments] if run.action.method == "call" else []
        assert made == calls
        content = scored_messages(run.episode)[-1]["content"]
        assert content == ("Now." if calls else ANSWER)


@pytest.mark.parametrize(
    ("name", "header"), [("gptoss", "<|channel|>final<|message|>"), ("muse_glimmer", " to=user<|message|>")]
)
def test_header_of_an_answer_is_not_its_text(name: str, header: str, is_special: bool) -> None:
    policy = Policy(name, is_special)
    read = policy.read(header, "ANSWER")
    assert (str(read.answer_text), read.marked_text, read.answer_tokens) == ("ANSWER", "ANSWER", 7)
    twice = policy.read(
        policy.before, SECRET, policy.after.removesuffix(header), policy.before, SECRET, policy.after, ANSWER
    )
    assert str(twice.answer_text) == ANSWER


@pytest.mark.parametrize("name", TEMPLATES)
def test_thoughts_that_are_only_read_have_no_labels(name: str) -> None:
    policy = Policy(name, False)
    if name in HIDDEN:
        return
    turn = policy.ids(f"{policy.before}{SECRET}{policy.after}{ANSWER}")
    unlearned = count_unlearned(policy.tokenizer, {"_read_thoughts": True}, turn)
    assert str(policy.tokenizer.decode(turn[unlearned:])).lstrip() == ANSWER
    header = "" if (marks := find_marks(policy.tokenizer.chat_template)) is None else marks.header
    assert count_unlearned(policy.tokenizer, {"_read_thoughts": True}, policy.ids(f"{header}{ANSWER}")) == 0


BLIND = "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking %}Think first.{% endif %}"


@pytest.mark.parametrize("settings", [TemplateSettings("on"), TemplateSettings(None, {"enable_thinking": True})])
def test_thinking_without_marks_is_refused(settings: TemplateSettings) -> None:
    with pytest.raises(UserError, match="thinking is on, and the chat template does not show where a thought ends"):
        settings.write(BLIND)
    TemplateSettings("off").write(BLIND)
    # Marks of a template's own are as good as known ones.
    own = BLIND.replace("{{ m.content }}", "{% if m.thinking %}[[hm]]{{ m.thinking }}[[so]]{% endif %}{{ m.content }}")
    settings.write(own)


def test_unknown_marks_of_a_template_split_thoughts() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}\n<|ponder|>{{ m.reasoning }}<|done|>\n"
        "{% endif %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<|ponder|>{% endif %}"
    )
    reader = ThoughtReader(tokenizer)

    def read(prompt: str, text: str) -> Response:
        before, tokens = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
        return reader.read(before, Response(tokens, [0.0] * len(tokens), False, text))

    assert str(read("<|user|>a<|assistant|>\n<|ponder|>", "a `</think>` b<|done|>\nYes").answer_text) == "Yes"
    assert str(read("<|user|>a<|assistant|>\n", "<|ponder|>a b<|done|>\nYes").answer_text) == "Yes"
    assert read("<|user|>a<|assistant|>\n<|ponder|>", "a b").is_open
