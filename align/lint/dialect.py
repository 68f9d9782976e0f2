"""How a tokenizer and its chat template write a conversation, learned by rendering one made of words that stand out.

Leaves out judging it: ``template.py`` does that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from align.data.rows import assistant, user
from align.models.render import MAX_TRAILING

U1, A1, U2, A2 = "Qanat", "Zephyrus", "Xylem", "Vortex"
PROBE = [user(U1), assistant(A1), user(U2), assistant(A2)]

THOUGHT = re.compile(r"(?:<(?P<tag>think|thinking|thought|reasoning)>)?</(?:think|thinking|thought|reasoning)>")
"""An empty thought without white space, or its end where the generation prompt has opened it."""

MARK = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?[a-z]{1,3}>|<(?:start|end)_of_[a-z]+>|\[/?[A-Z_]{2,20}\]|<</?[A-Z]+>>")
"""What the marks of the known templates look like: ``<|im_end|>``, ``</s>``, ``<end_of_turn>``, ``[/INST]``."""


def squeezed(text: str) -> str:
    """``text`` without white space, which templates and tokenizers add and strip."""
    return "".join(text.split())


@dataclass
class Dialect:
    """A tokenizer with its template. Texts are None where the template refused the probe or lost its words."""

    tokenizer: Any
    extra_ends: frozenset[int] = frozenset()
    """Further ids that end a turn, from the model's generation config."""
    opening: str | None = None
    """Written before the first user turn's text."""
    answer_start: str | None = None
    """Written between a user turn's text and the answer's."""
    user_start: str | None = None
    """Written between an answer's text and the next user turn's."""
    closing: str | None = None
    """Written after the last answer's text."""
    refusal: str = ""
    special: dict[str, int] = field(default_factory=dict)
    """Control tokens: text to id."""

    @classmethod
    def of(cls, tokenizer: Any, extra_ends: frozenset[int] = frozenset()) -> Dialect:
        """Probe ``tokenizer``, which must have a chat template."""
        made = cls(tokenizer, extra_ends, special=control_tokens(tokenizer))
        try:
            text = str(tokenizer.apply_chat_template(PROBE, tokenize=False))
        except Exception as error:  # a template is code: it may raise anything
            made.refusal = f"{type(error).__name__}: {error}"
            return made
        parts = re.split("|".join((U1, A1, U2, A2)), text)
        if len(parts) == 5:
            made.opening, made.answer_start, made.user_start, _, made.closing = parts
        return made

    @cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end a turn: the tokenizer's eos, the generation config's, and the token the template closes with."""
        found = set(self.extra_ends)
        if self.tokenizer.eos_token_id is not None:
            found.add(int(self.tokenizer.eos_token_id))
        ids = self.encode(self.closing or "")[: 1 + MAX_TRAILING]
        found.update(token for token in ids if token in self.special_ids)
        return frozenset(found)

    @cached_property
    def answer_lead(self) -> str:
        """Return the template's text between generation prompt and answer, without white space; "" if it has none.

        Models that think write an empty thought there when they answer at once (Qwen3, GLM-4.5). Models with channels
        write the channel's name (gpt-oss). It is sampled and trained as a part of the answer. A template without a
        generation prompt, or whose prompt stops within the turn's header, has no such text: it is at fault.
        """
        prompt = PROBE[:1]
        start = self._render(prompt, add_generation_prompt=True)
        whole = self._render([*prompt, PROBE[1]])
        if start == self._render(prompt, add_generation_prompt=False) or not whole.startswith(start):
            return ""
        lead = whole.removeprefix(start).partition(A1)[0]
        names = self.special_pattern.findall(lead) if self.special_pattern else []
        is_header = bool(names) and lead.rstrip().endswith(names[-1])
        return squeezed(lead) if is_header or THOUGHT.fullmatch(squeezed(lead)) else ""

    def _render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return frozenset(self.special.values())

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Finds the text of a control token, the longest first."""
        names = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    @cached_property
    def written(self) -> frozenset[str]:
        """Control tokens that the template writes."""
        text = "".join(filter(None, (self.opening, self.answer_start, self.user_start, self.closing)))
        return frozenset(self.special_pattern.findall(text)) if self.special_pattern else frozenset()

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """Marks of a turn that the template writes as ordinary text: no control token keeps them apart from content."""
        text = "\n".join(filter(None, (self.answer_start, self.user_start)))
        found = dict.fromkeys(mark for mark in MARK.findall(text) if mark not in self.special)
        if not found and not self.written - {self.tokenizer.eos_token, self.tokenizer.bos_token}:
            words = re.findall(r"[A-Z#][\w# ]*:", self.without_control(text))
            found = dict.fromkeys(word.strip() for word in words)
        return tuple(found)

    @cached_property
    def user_header(self) -> str:
        """What announces a user's turn, squeezed: ``<|im_start|>user``, ``[INST]``, ``USER:``; "" when unknown."""
        text = squeezed(self.user_start or "")
        for mark in self.special_pattern.findall(text) if self.special_pattern else []:
            if self.special[mark] in self.ends:
                text = text.partition(mark)[2] or text
        return text

    @cached_property
    def starts_with(self) -> int | None:
        """The control token that every conversation begins with, or None."""
        ids = self.encode(self.opening or "")
        return ids[0] if ids and ids[0] in self.special_ids else None

    def without_control(self, text: str) -> str:
        """``text`` without control tokens."""
        return self.special_pattern.sub(" ", text) if self.special_pattern else text

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone, nothing added."""
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]] if text else []

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, control tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def same_text(self, found: str, wanted: str) -> bool:
        """Whether squeezed ``found`` is what is left of ``wanted`` after a trip through the tokenizer."""
        return found == squeezed(wanted) or found == squeezed(self.through(wanted))

    def has_text(self, whole: str, wanted: str) -> bool:
        """The same, for squeezed ``whole`` that may have more in it."""
        return squeezed(wanted) in whole or squeezed(self.through(wanted)) in whole

    def has_exact_text(self, whole: str, wanted: str) -> bool:
        """Return whether ``wanted`` is in ``whole`` with its white space, as written or after the tokenizer's trip."""
        return wanted in whole or self.through(wanted) in whole

    def through(self, text: str) -> str:
        """``text`` encoded and decoded: tokenizers may normalize it, or not know all its characters."""
        try:
            return self.decode(self.encode(text))
        except (UnicodeError, TypeError, ValueError):  # lone surrogates cannot be encoded; reported as not-utf8
            return text


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Text and id of every control token: special ones, and added ones that look like a mark of a turn.

    Without the unknown token, unless it has another use: it stands for text that no token covers.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    found = {
        token.content: int(index) for index, token in added.items() if token.special or MARK.fullmatch(token.content)
    }
    for token, index in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=False):
        found.setdefault(str(token), int(index))
    if tokenizer.unk_token is not None and tokenizer.unk_token_id not in (
        tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id,
    ):  # fmt: skip
        found.pop(str(tokenizer.unk_token), None)
    return {text: index for text, index in found.items() if len(text) > 1}
