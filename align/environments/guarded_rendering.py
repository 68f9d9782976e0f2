"""Render conversations to token ids, and keep control tokens out of the messages' text. Torch-free.

Tools, rows and users may write any text, including ``<|im_end|>``. After a template has mixed it with its own text, a
tokenizer cannot distinguish the two. So each place in the messages at which a control token could begin gets a mark
before the template is applied. In the rendering only the template's own control tokens are intact, and these get
private names, which a copy of the tokenizer has in its vocabulary. Then the marks are removed, and the messages are
encoded as ordinary tokens. A text without control tokens has the same ids as with the original tokenizer.

Tokenizers without a ``tokenizer.json`` are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from align.errors import UserError
from align.models.chat.render import explain_refusal

Message = Mapping[str, Any]

MARK = "\ufdd0"
NAME_START = "\ufdd1"
NAME_END = "\ufdd2"
"""Noncharacters of Unicode, which are not allowed in exchanged text; in messages they are replaced."""
UNUSABLE = re.compile("[\ud800-\udfff\ufdd0-\ufdef]")
REPLACEMENT = "\ufffd"
TAG = re.compile(r"</?[^<>\s]+>|\[/?[A-Z_]+\]|<\uff5c[^<>\uff5c]+\uff5c>")
"""Added tokens that are control tokens although the tokenizer does not call them special, as ``<tool_call>``."""
TURN_TAG = re.compile(r"<\|[^<>]+\|>")
"""Control tokens that are not allowed in the text of an answer."""
DATE = datetime(2025, 7, 26)
"""The date that templates read, so a prompt does not change from day to day."""
PLAIN_FIELDS = ("role",)
HIDDEN_FIELDS = ("train",)


class GuardedRenderer:
    """Renders messages to ids with a tokenizer's template, or with another template."""

    def __init__(self, tokenizer: Any, where: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"{where} has a tokenizer without a tokenizer.json, whose control tokens cannot be told from text. "
                "Convert it with transformers' AutoTokenizer and save it again."
            )
        self.tokenizer = tokenizer
        tokens = _control_tokens(tokenizer)
        self._ids = {text: index for text, (index, _) in tokens.items()}
        self._tokens = _any_of(self._ids)
        self._of_turns = _any_of({text for text, (_, is_special) in tokens.items() if is_special})
        self._starts = re.compile("[" + re.escape("".join(sorted({text[0] for text in self._ids}))) + "]")
        self._copy, self._real_ids = _private_copy(backend, self._ids)

    def text(
        self,
        template: str,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the rendering with private names for the template's control tokens, for :meth:`encode`.

        Raises ``UserError`` if the template raises.
        """
        from jinja2 import TemplateError

        guarded = [self._guard_message(message) for message in messages]
        try:
            rendered = self.tokenizer.apply_chat_template(
                guarded,
                tools=self._guard(list(tools)) if tools else None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                strftime_now=DATE.strftime,
            )
        except TemplateError as error:
            raise explain_refusal(self.tokenizer, messages, error) from None
        # Marks split every control token in the messages. Those that are still whole are the template's own.
        with_names = self._tokens.sub(lambda token: private_name(self._ids[token.group()]), str(rendered))
        # A template that writes JSON may have escaped a mark.
        return with_names.replace(MARK, "").replace("\\ufdd0", "")

    def encode(self, text: str) -> list[int]:
        """Return the ids of a rendering, or of a part that begins and ends between tokens."""
        ids = self._copy.encode(text, add_special_tokens=False).ids
        return [self._real_ids.get(index, index) for index in ids]

    def readable(self, text: str) -> str:
        """Return a rendering as the template wrote it."""
        return re.sub(
            f"{NAME_START}([0-9]+){NAME_END}",
            lambda name: str(self.tokenizer.convert_ids_to_tokens(int(name.group(1)))),
            text,
        )

    def _guard_message(self, message: Message) -> dict[str, Any]:
        """Return a message for templates, with marks in its texts and without empty fields."""
        guarded: dict[str, Any] = {}
        for name, value in message.items():
            if value is None or name in HIDDEN_FIELDS or (name == "tool_calls" and not value):
                continue
            # Rows have calls as JSON text, and templates read a list.
            if name == "tool_calls" and isinstance(value, str):
                value = json.loads(value)
            if name in PLAIN_FIELDS:
                guarded[name] = value
            elif name == "content" and message.get("role") == "assistant" and isinstance(value, str):
                guarded[name] = self._guard_answer(value)
            else:
                guarded[name] = self._guard(value)
        return guarded

    def _guard(self, value: Any) -> Any:
        """Add a mark at each place in a value's texts at which a control token could begin."""
        # Marks inside complete tokens are not enough: a template that removes text could join two parts of a token.
        if isinstance(value, str):
            return self._starts.sub(lambda start: start.group() + MARK, UNUSABLE.sub(REPLACEMENT, value))
        if isinstance(value, Mapping):
            return {self._guard(key): self._guard(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._guard(item) for item in value]
        return value

    def _guard_answer(self, text: str) -> str:
        """Add marks only to special tokens, because a model writes thoughts and calls with control tokens."""
        return self._of_turns.sub(
            lambda token: token.group()[0] + MARK + token.group()[1:], UNUSABLE.sub(REPLACEMENT, text)
        )


def private_name(token: int) -> str:
    """Return the name of a control token in the copy of the tokenizer."""
    return f"{NAME_START}{token}{NAME_END}"


def _any_of(texts: Mapping[str, int] | set[str]) -> re.Pattern[str]:
    """Return a pattern that matches some texts, the longest first; it matches no text if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _control_tokens(tokenizer: Any) -> dict[str, tuple[int, bool]]:
    """Return text → id of every control token, and whether answers must not contain it."""
    tokens: dict[str, tuple[int, bool]] = {}
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special or TAG.fullmatch(token.content):
            tokens[token.content] = (int(index), bool(token.special or TURN_TAG.fullmatch(token.content)))
    for text, index in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=False):
        tokens[str(text)] = (int(index), True)
    return tokens


def _private_copy(backend: Any, control: Mapping[str, int]) -> tuple[Any, dict[int, int]]:
    """Return a copy of a tokenizer that has only private names for control tokens, and its ids → real ids."""
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    # The rendering is complete, so the copy adds no BOS and does not pad or truncate.
    state |= {"post_processor": None, "padding": None, "truncation": None}
    for token in state["added_tokens"]:
        if token["content"] in control:
            token["content"] = private_name(control[token["content"]])
    _rename_in_model(state["model"], {text: private_name(index) for text, index in control.items()})
    copy = Tokenizer.from_str(json.dumps(state))
    real = {copy.token_to_id(private_name(index)): index for index in control.values()}
    # The copy may number tokens differently, so these ids are also mapped back.
    for text, index in backend.get_vocab().items():
        if text not in control and (renamed := copy.token_to_id(text)) != index:
            real[renamed] = index
    moved: dict[int, int] = {}
    for renamed, index in real.items():
        if renamed is not None and renamed != index:
            moved[renamed] = index
    return copy, moved


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Rename control tokens in a model's vocabulary, so text is never looked up as a control token."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): index for text, index in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        # A merge is a pair, or in older files a text with a space.
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not ({*pair, "".join(pair)} & names.keys())]
