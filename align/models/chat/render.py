"""Render messages to token ids, and split texts and rows by tokens. The chat template is applied only here.

Stages that train and stages that measure read rows by these functions, so all count the same tokens. Torch-free.
Excluded: truncation, batches and lengths, which are the caller's.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from align.data.final_answers import EMPTY, PAIRS, thought_end
from align.data.rows import Row, answer_side, is_finished
from align.errors import UserError
from align.models.chat.template_settings import tokenizer_marks

Message = dict[str, str]


def require_chat_template(tokenizer: Any, where: str) -> None:
    """Raise ``UserError`` for a tokenizer without a chat template: a base model, which does not know turns."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where} has no chat template, so conversations cannot be rendered for it; it is probably a base model. "
            "Name a template in the model stage's chat_template field: one of align's, such as chatml, or a Jinja file."
        )


def render_prompt(tokenizer: Any, messages: list[Message], tools: str | None = "") -> list[int]:
    """Return the token ids of a conversation that ends with a user turn, up to the start of the assistant's answer.

    ``tools`` is the row's JSON text, like a message's ``tool_calls``. Raises ``UserError`` for a template that does not
    mention tools or calls and would silently omit them.
    """
    ids: list[int] = _apply(tokenizer, messages, tools, add_generation_prompt=True)
    return ids


def render_conversation(
    tokenizer: Any, messages: list[Message], finished: bool = True, tools: str | None = ""
) -> list[int]:
    """Return the token ids of a conversation that ends with an assistant turn, as a reward model reads it.

    They end with the end-of-turn token. What a template writes after it (ChatML's line break) is removed: a policy
    stops at the end of turn, and no score may belong to a token that it never samples. ``finished=False`` is for an
    answer that was cut off at its length limit; it has no end-of-turn token, since the policy did not write one.
    ``tools`` as for :func:`render_prompt`.
    """
    return _cut_after_turn(tokenizer, _apply(tokenizer, messages, tools), finished)


def _cut_after_turn(tokenizer: Any, tokens: list[int], has_end: bool) -> list[int]:
    """Return the ids up to the end-of-turn token, which is included if the answer is finished."""
    end = last_turn_end(tokens, tokenizer.eos_token_id)
    if end is None:  # the template does not close the turn, so the policy's eos token does
        return [*tokens, tokenizer.eos_token_id] if has_end else tokens
    return tokens[: end + 1] if has_end else tokens[:end]


def render_answer(
    tokenizer: Any, prompt: list[Message], answer: list[Message], finished: bool = True, tools: str | None = ""
) -> list[int] | None:
    """Return the token ids of the text after a prompt, tokenized separately, up to the end of the turn.

    For an answer whose first characters would merge into one token with the prompt's last ones, as a line break and
    indentation do: a policy continues the prompt's ids, so it never samples that token. None if the conversation's
    text does not start with the prompt's.
    """
    prompt_text = _apply(tokenizer, prompt, tools, tokenize=False, add_generation_prompt=True)
    text = _apply(tokenizer, [*prompt, *answer], tools, tokenize=False)
    if not text.startswith(prompt_text):
        return None
    ids = [int(token) for token in tokenizer(text[len(prompt_text) :], add_special_tokens=False)["input_ids"]]
    return _cut_after_turn(tokenizer, ids, finished)


def render_answered(tokenizer: Any, row: Mapping[str, Any], side: str | None = None) -> list[int]:
    """Return the token ids of a row's prompt and an answer; a finished answer has its end of turn.

    ``side`` is the answer's field, by default the answer that is trained on.
    """
    side = side or answer_side(row)
    return render_conversation(tokenizer, [*row["prompt"], *row[side]], is_finished(row, side), row.get("tools"))


def _apply(tokenizer: Any, messages: list[Message], tools: str | None, tokenize: bool = True, **options: Any) -> Any:
    """Apply the chat template and return ids, or text.

    Raises ``UserError`` if the template raises, as for roles that it does not support, or exceeds its bounds.
    """
    from jinja2 import TemplateError

    if tools:
        _require(tokenizer, "tools", "a row offers tools")
        options["tools"] = json.loads(tools)
    # Templates expect calls as objects, while rows store them as JSON text.
    called = [_with_calls(tokenizer, message) for message in messages]
    try:
        rendered = tokenizer.apply_chat_template(called, tokenize=tokenize, return_dict=False, **options)
    except TemplateError as error:
        raise explain_refusal(tokenizer, messages, error) from None
    return [int(token) for token in rendered] if tokenize else str(rendered)


def explain_refusal(tokenizer: Any, messages: Sequence[Mapping[str, Any]], error: Exception) -> UserError:
    """Return the user's error for a template that raised ``error`` for a conversation."""
    from align.models.chat.chat_template import TemplateOutOfBounds

    place = getattr(tokenizer, "name_or_path", "")
    template = f"the chat template of {place}" if place else "the chat template"
    if isinstance(error, TemplateOutOfBounds):
        return UserError(
            f"{template} {error}. It is broken or hostile: name another in the model stage's chat_template field."
        )
    roles = ", ".join(str(message["role"]) for message in messages)
    return UserError(
        f"{template} refuses a conversation of the roles {roles}: {str(error).rstrip('.')}. Change its rows, or name "
        "another template in the model stage's chat_template field."
    )


def _require(tokenizer: Any, name: str, reason: str) -> None:
    if name not in str(tokenizer.chat_template):  # text, or a mapping of several by name
        raise UserError(
            f"{reason}, and the chat template has no place for {name}: it would silently omit them. Name a template "
            "that supports them in the model stage's chat_template field, or leave such rows out."
        )


def _with_calls(tokenizer: Any, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as templates expect it: calls as objects, no empty fields, no training mark."""
    hidden = ("tool_calls", "train")
    fields = {name: value for name, value in message.items() if value is not None and name not in hidden}
    thought_field = _thought_field(str(tokenizer.chat_template)) if message["role"] == "assistant" else None
    if thought_field is not None:
        fields |= thought_fields(message["content"] or "", thought_field)
    if not message.get("tool_calls"):
        return fields
    _require(tokenizer, "tool_calls", "a message calls a tool")
    return fields | {"tool_calls": json.loads(message["tool_calls"])}


THOUGHT_FIELD = re.compile(r"""(?:\.|["'])(reasoning_content|thinking|reasoning)\b""")
"""Field of a message in which a template reads its thought."""


@lru_cache(maxsize=64)
def _thought_field(template: str) -> str | None:
    """Return the field in which a template reads thoughts; None for a template that finds them in the text, or never.

    Most templates cut the text at ``</think>``. gpt-oss's template only reads the field.
    """
    field = THOUGHT_FIELD.search(template)
    return field[1] if field is not None and "</think>" not in template else None


def thought_fields(content: str, field: str) -> dict[str, str]:
    """Return an answer's text without its thought as ``content``, and the thought as ``field``, if there is one."""
    end = thought_end(content)
    if not end:
        return {}
    return {"content": content[end:].lstrip(), field: TAG.sub("", content[:end]).strip()}


_PAIRED = "|".join(map(re.escape, [*PAIRS, *PAIRS.values()]))
TAG = re.compile(rf"</?(?:think|thinking|thought|reasoning)>|{_PAIRED}")
READ_THOUGHTS = "_read_thoughts"
"""Key of a row whose thoughts are shown but not learned."""


def count_unlearned(tokenizer: Any, row: Mapping[str, Any], turn: Sequence[int]) -> int:
    """Return the number of tokens at the start of a turn that are not learned: its thought, if thoughts are only read.

    ``turn`` has the ids of the turn after its generation prompt.
    """
    if not row.get(READ_THOUGHTS):
        return 0

    def length(count: int) -> int:
        ids = list(turn[:count])
        return len(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text = tokenizer.decode(list(turn), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    marks = tokenizer_marks(tokenizer)
    end = thought_end(text, marks, marks is not None and marks.is_prompted)
    thought = text[:end] if marks is None else marks.remove(text[:end])
    if not thought.strip() or EMPTY.fullmatch("".join(thought.split())):
        return 0  # the template writes it before an answer without a thought, and sampling leaves it to the model
    # The text grows with every token, so a search finds the token that completes the thought.
    return bisect_left(range(len(turn) + 1), end, key=length)


MAX_TRAILING = 4
"""Most tokens that a template may write after the end of the last turn."""


def last_turn_end(tokens: list[int], eos: int) -> int | None:
    """Return the index of the end-of-turn token that closes the conversation; None if the template writes none."""
    # Search backwards: templates may write a line break or similar after the end of turn.
    for index in range(len(tokens) - 1, max(-1, len(tokens) - 2 - MAX_TRAILING), -1):
        if tokens[index] == eos:
            return index
    return None


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return each token's text; joined, they are the decoded response.

    A character of several tokens belongs to the last of them.
    """
    texts: list[str] = []
    previous = ""
    for end in range(1, len(ids) + 1):
        decoded = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if decoded.endswith("\ufffd") and end < len(ids):  # half a character
            texts.append("")
            continue
        texts.append(decoded[len(previous) :] if decoded.startswith(previous) else "")
        previous = decoded
    return texts


class PromptRewritten(UserError):
    """The chat template renders a prompt differently once an answer follows it."""


def split_turn(
    tokenizer: Any, prompt: list[Row], answer: list[Row], finished: bool = True, tools: str | None = ""
) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt as it is rendered for sampling, and of the answer including its end-of-turn token.

    Where the tokenizer would merge the prompt's last characters with the answer's first, they are tokenized separately,
    as in sampling. ``finished=False`` omits the end of turn, for an answer that was cut off. ``tools`` is the row's.

    Raises ``PromptRewritten`` when the chat template renders the prompt differently once an answer follows it: training
    and sampling would then see different contexts.
    """
    prompt_ids = render_prompt(tokenizer, prompt, tools)
    conversation = render_conversation(tokenizer, [*prompt, *answer], finished, tools)
    # The usual case: the conversation's ids continue the prompt's ids, so the rest is the answer. Where they do not,
    # the boundary may be inside a token; then the answer is tokenized separately.
    if conversation[: len(prompt_ids)] != prompt_ids:
        answer_ids = render_answer(tokenizer, prompt, answer, finished, tools)
        if answer_ids is not None:
            return prompt_ids, answer_ids
        pairs = enumerate(zip(prompt_ids, conversation, strict=False))
        shared = next((index for index, (before, after) in pairs if before != after), 0)
        sampled = tokenizer.decode(prompt_ids[shared:])
        trained = tokenizer.decode(conversation[shared:])[:60]
        raise PromptRewritten(
            "the chat template renders a prompt differently once an answer follows it: sampling would see "
            f"{sampled!r} where training sees {trained!r}. "
            "Give the model a chat template whose generation prompt is the beginning of an assistant turn."
        )
    return prompt_ids, conversation[len(prompt_ids) :]


def split_answer(tokenizer: Any, row: Mapping[str, Any], side: str | None = None) -> tuple[list[int], list[int]]:
    """Return ``split_turn`` of a row's prompt and an answer; every stage tokenizes its rows by it.

    ``side`` is the answer's field, by default the answer that is trained on. An answer that was cut off has no end of
    turn.
    """
    side = side or answer_side(row)
    return split_turn(tokenizer, row["prompt"], row[side], is_finished(row, side), row.get("tools"))


def answer_turns(messages: Sequence[Row], first: int = 0) -> list[int]:
    """Return the places of the assistant's turns from ``first`` on, without those that are excluded from training."""
    places = [place for place in range(first, len(messages)) if messages[place]["role"] == "assistant"]
    return [place for place in places if messages[place].get("train") is not False]


def split_turns(
    tokenizer: Any, row: Mapping[str, Any], side: str, places: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Return ``split_turn`` of the turns at ``places`` in a row's prompt and answer, each after all before it."""
    messages = [*row["prompt"], *row[side]]
    has_end = is_finished(row, side)
    # Only the last turn can be cut off.
    return [
        split_turn(
            tokenizer,
            messages[:place],
            [messages[place]],
            has_end or place < len(messages) - 1,
            row.get("tools"),
        )
        for place in places
    ]


def are_parts(conversation: Sequence[int], parts: Sequence[tuple[list[int], list[int]]]) -> bool:
    """Return True if each turn with all before it is a beginning of the conversation."""
    return all(list(conversation[: len(before) + len(turn)]) == before + turn for before, turn in parts)


def assistant_mask(
    tokenizer: Any, row: Mapping[str, Any], side: str, prompt_ids: list[int], answer_ids: list[int]
) -> list[int] | None:
    """Return 1 for each token of an answer that the assistant writes, 0 for tokens between its turns.

    ``prompt_ids`` and ``answer_ids`` come from ``split_answer``. Turns with ``train: False`` have 0, and so have
    thoughts that are only read. None if the template rewrites earlier turns, so no rendering contains each turn as it
    is sampled.
    """
    if len(row[side]) == 1:
        return _turn_mask(tokenizer, row, answer_ids, row[side][0].get("train") is not False)
    start = len(prompt_ids)
    places = answer_turns([*row["prompt"], *row[side]], len(row["prompt"]))
    parts = split_turns(tokenizer, row, side, places)
    if not are_parts([*prompt_ids, *answer_ids], parts):
        return None
    mask = [0] * len(answer_ids)
    for before, turn in parts:
        mask[len(before) - start : len(before) + len(turn) - start] = _turn_mask(tokenizer, row, turn)
    return mask


def _turn_mask(tokenizer: Any, row: Mapping[str, Any], turn: Sequence[int], is_learned: bool = True) -> list[int]:
    """Return 1 for each token of a turn that is learned."""
    unlearned = count_unlearned(tokenizer, row, turn) if is_learned else len(turn)
    return [0] * unlearned + [1] * (len(turn) - unlearned)
