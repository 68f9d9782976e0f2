"""The format in which a tokenizer and its chat template write a conversation, learned from a probe conversation.

The probe's texts are rare words, so that everything else in the rendering is the template's. ``template.py`` checks the
format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from align.data.rows import assistant, user
from align.data.thoughts import EMPTY
from align.models.chat.render import MAX_TRAILING

U1, A1, U2, A2 = "Qanat", "Zephyrus", "Xylem", "Vortex"
PROBE = [user(U1), assistant(A1), user(U2), assistant(A2)]

MARK = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?[a-z]{1,3}>|<(?:start|end)_of_[a-z]+>|\[/?[A-Z_]{2,20}\]|<</?[A-Z]+>>")
"""Marks of the known templates: ``<|im_end|>``, ``</s>``, ``<end_of_turn>``, ``[/INST]``."""


def squeezed(text: str) -> str:
    """Return ``text`` without white space, which templates and tokenizers add and strip."""
    return "".join(text.split())


@dataclass
class ChatFormat:
    """A tokenizer with its template. Texts are None where the template refused the probe or lost its words."""

    tokenizer: Any
    extra_ends: frozenset[int] = frozenset()
    """Further ids that end a turn, from the model's generation config."""
    opening: str | None = None
    """Text before the first user turn's."""
    answer_start: str | None = None
    """Text between a user turn's and the answer's."""
    user_start: str | None = None
    """Text between an answer's and the next user turn's."""
    closing: str | None = None
    """Text after the last answer's."""
    refusal: str = ""
    """The template's error on the probe."""
    special: dict[str, int] = field(default_factory=dict)
    """Control tokens: text → id."""

    @classmethod
    def of(cls, tokenizer: Any, extra_ends: frozenset[int] = frozenset()) -> ChatFormat:
        """Probe ``tokenizer``, which must have a chat template."""
        chat_format = cls(tokenizer, extra_ends, special=control_tokens(tokenizer))
        try:
            text = str(tokenizer.apply_chat_template(PROBE, tokenize=False))
        except Exception as error:  # a template is code: it may raise anything
            chat_format.refusal = f"{type(error).__name__}: {error}"
            return chat_format
        # The probe's four words cut the rendering into the five texts of the template.
        parts = re.split("|".join((U1, A1, U2, A2)), text)
        if len(parts) == 5:
            opening, answer_start, user_start, _, closing = parts
            chat_format.opening, chat_format.answer_start = opening, answer_start
            chat_format.user_start, chat_format.closing = user_start, closing
        return chat_format

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end a turn: the tokenizer's eos, the generation config's, and the token the template closes with."""
        # Templates may close a turn with another token than eos, and write a line break behind it.
        ends = set(self.extra_ends)
        if self.tokenizer.eos_token_id is not None:
            ends.add(int(self.tokenizer.eos_token_id))
        closing_ids = self.encode(self.closing or "")[: 1 + MAX_TRAILING]
        ends.update(token for token in closing_ids if token in self.special_ids)
        return frozenset(ends)

    @cached_property
    def answer_lead(self) -> str:
        """The template's text between generation prompt and answer, without white space; "" if it has none.

        Models that think write an empty thought there when they answer at once (Qwen3, GLM-4.5). Models with channels
        write the channel's name (gpt-oss). It is sampled and trained as a part of the answer. A template without a
        generation prompt, or whose prompt stops within the turn's header, has no such text: it is at fault.
        """
        prompt = PROBE[:1]
        start = self._render(prompt, add_generation_prompt=True)
        conversation = self._render([*prompt, PROBE[1]])
        if start == self._render(prompt, add_generation_prompt=False) or not conversation.startswith(start):
            return ""
        lead = conversation.removeprefix(start).partition(A1)[0]
        # Only text of the format itself counts as a lead: a header that ends in a control token, or an empty thought.
        names = self.special_pattern.findall(lead) if self.special_pattern else []
        is_header = bool(names) and lead.rstrip().endswith(names[-1])
        return squeezed(lead) if is_header or EMPTY.fullmatch(squeezed(lead)) else ""

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return frozenset(self.special.values())

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Pattern of the control tokens' texts, the longest first; None without control tokens."""
        names = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    @cached_property
    def template_tokens(self) -> frozenset[str]:
        """Control tokens that the template writes."""
        text = "".join(filter(None, (self.opening, self.answer_start, self.user_start, self.closing)))
        return frozenset(self.special_pattern.findall(text)) if self.special_pattern else frozenset()

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """Marks of a turn that the template writes as ordinary text: no control token keeps them apart from content."""
        text = "\n".join(filter(None, (self.answer_start, self.user_start)))
        # Marks such as ``[/INST]`` first; templates without any write roles as words, ``USER:``.
        marks = dict.fromkeys(mark for mark in MARK.findall(text) if mark not in self.special)
        if not marks and not self.template_tokens - {self.tokenizer.eos_token, self.tokenizer.bos_token}:
            words = re.findall(r"[A-Z#][\w# ]*:", self.without_control(text))
            marks = dict.fromkeys(word.strip() for word in words)
        return tuple(marks)

    @cached_property
    def user_header(self) -> str:
        """Header of a user's turn, squeezed: ``<|im_start|>user``, ``[INST]``, ``USER:``; "" when unknown."""
        text = squeezed(self.user_start or "")
        # The text begins with the end of the answer's turn. The header follows behind it.
        for mark in self.special_pattern.findall(text) if self.special_pattern else []:
            if self.special[mark] in self.ends:
                text = text.partition(mark)[2] or text
        return text

    @cached_property
    def first_token(self) -> int | None:
        """The control token that every conversation begins with, or None."""
        ids = self.encode(self.opening or "")
        return ids[0] if ids and ids[0] in self.special_ids else None

    def without_control(self, text: str) -> str:
        """Replace control tokens by spaces."""
        return self.special_pattern.sub(" ", text) if self.special_pattern else text

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` without added special tokens."""
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``, control tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def same_text(self, text: str, expected: str) -> bool:
        """Return True where squeezed ``text`` is ``expected``, as written or after the tokenizer's round trip."""
        return text == squeezed(expected) or text == squeezed(self.round_trip(expected))

    def has_text(self, text: str, expected: str) -> bool:
        """Return True where squeezed ``text`` contains ``expected``, as written or after the round trip."""
        return squeezed(expected) in text or squeezed(self.round_trip(expected)) in text

    def has_exact_text(self, text: str, expected: str) -> bool:
        """Return True where ``text`` contains ``expected`` with its white space, as written or after the round trip."""
        return expected in text or self.round_trip(expected) in text

    def round_trip(self, text: str) -> str:
        """Encode and decode ``text``: tokenizers may normalize it, or not know all its characters."""
        try:
            return self.decode(self.encode(text))
        except (UnicodeError, TypeError, ValueError):  # lone surrogates cannot be encoded; reported as not-utf8
            return text


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Return text → id of every control token: special ones, and added ones that look like a mark of a turn.

    The unknown token is left out, unless it has another use: it stands for text that no token covers.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    tokens = {
        token.content: int(index) for index, token in added.items() if token.special or MARK.fullmatch(token.content)
    }
    for token, index in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=False):
        tokens.setdefault(str(token), int(index))
    used_ids = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id)
    if tokenizer.unk_token is not None and tokenizer.unk_token_id not in used_ids:
        tokens.pop(str(tokenizer.unk_token), None)
    return {text: index for text, index in tokens.items() if len(text) > 1}
