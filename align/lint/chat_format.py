"""The treatment of turns by a chat template, measured by rendering probes, and the checks of the template itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from align.data.final_answers import EMPTY
from align.data.rows import assistant, user
from align.lint.findings import Findings
from align.models.chat.render import MAX_TRAILING
from align.models.chat.template_settings import thinking_state

U1 = "Qanat"
A1 = "Zephyrus"
U2 = "Xylem"
A2 = "Vortex"
PROBE = [user(U1), assistant(A1), user(U2), assistant(A2)]

THOUGHT_SIGN = re.compile(r"think|thought|reasoning|<\|channel\|>", re.IGNORECASE)
"""Sign of thoughts in a template, or in an added token."""
MARK = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?[a-z]{1,3}>|<(?:start|end)_of_[a-z]+>|\[/?[A-Z_]{2,20}\]|<</?[A-Z]+>>")
"""Marks of the known templates: ``<|im_end|>``, ``</s>``, ``<end_of_turn>``, ``[/INST]``."""


def squeezed(text: str) -> str:
    """Return ``text`` without white space, which templates and tokenizers add and strip."""
    return "".join(text.split())


@dataclass
class ChatFormat:
    """A tokenizer with its template. Texts are None if the template refused the probe or lost its words."""

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
            text = chat_format.render(PROBE)
        except Exception as error:  # a template is code: it may raise anything
            chat_format.refusal = f"{type(error).__name__}: {error}"
            return chat_format
        # The probe's four words cut the rendering into the five texts of the template.
        parts = re.split("|".join((U1, A1, U2, A2)), text)
        if len(parts) == 5:
            chat_format.opening, chat_format.answer_start, chat_format.user_start, _, chat_format.closing = parts
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
        start = self.render(prompt, add_generation_prompt=True)
        conversation = self.render([*prompt, PROBE[1]])
        if start == self.render(prompt, add_generation_prompt=False) or not conversation.startswith(start):
            return ""
        lead = conversation.removeprefix(start).partition(A1)[0]
        # Only text of the format itself counts as a lead: a header that ends in a control token, or an empty thought.
        names = self.special_pattern.findall(lead) if self.special_pattern else []
        is_header = bool(names) and lead.rstrip().endswith(names[-1])
        return squeezed(lead) if is_header or EMPTY.fullmatch(squeezed(lead)) else ""

    @cached_property
    def is_thinking(self) -> bool:
        """True if the model may write thoughts: template or tokenizer mention them, and they are not switched off."""
        state = thinking_state(self.tokenizer)
        added = [token.content for token in getattr(self.tokenizer, "added_tokens_decoder", {}).values()]
        mentions = any(map(THOUGHT_SIGN.search, [str(self.tokenizer.chat_template), *added]))
        return state == "on" or (state is None and mentions)

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """Return the text of a conversation."""
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
        return frozenset(self.special_pattern.findall(self.template_text)) if self.special_pattern else frozenset()

    @property
    def template_text(self) -> str:
        """All text that the template writes around turns."""
        return "".join(filter(None, (self.opening, self.answer_start, self.user_start, self.closing)))

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

    The unknown token is skipped, unless it has another use: it stands for text that no token covers.
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


TURN_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"),
    *("<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]", "<|START_OF_TURN_TOKEN|>"),
    *("<|END_OF_TURN_TOKEN|>", "<|start|>", "<|message|>", "<|header_start|>", "<|eot|>", "<|turn_end|>"),
)
"""Tokens that chat models' tokenizers have only for turns."""
MAX_ROLE_CHARACTERS = 16
"""Text of the template before the first turn that may be a role's name."""


def check_template(chat_format: ChatFormat, findings: Findings) -> None:
    """Check everything that follows only from template and tokenizer."""
    tokenizer = chat_format.tokenizer
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        findings.add("pad-is-eos", None, f"both are {tokenizer.pad_token!r}")
    if chat_format.refusal:
        findings.add("template-refuses-row", None, f"already a plain conversation of four turns: {chat_format.refusal}")
        return
    if chat_format.closing is None:
        findings.add("turn-rewritten", None, "a plain conversation of four turns loses some of its text")
        return
    _check_family(chat_format, findings)
    _check_closing_mark(chat_format, findings)
    _check_generation_prompt(chat_format, findings)
    _check_earlier_turns(chat_format, findings)


def _check_family(chat_format: ChatFormat, findings: Findings) -> None:
    """Compare the turn tokens that the template writes with those that the tokenizer has."""
    marks = dict.fromkeys(MARK.findall(chat_format.template_text))
    special = chat_format.special
    missing = [mark for mark in marks if mark in TURN_TOKENS and mark not in special and mark[0] == "<"]
    # A template may write the tokenizer's eos, whatever it is, as end of turn: that shows no kinship.
    shared = (chat_format.tokenizer.eos_token, chat_format.tokenizer.bos_token)
    special_tokens = [token for token in TURN_TOKENS if token in special]
    available = [token for token in special_tokens if token not in shared]
    used = [token for token in available if token in chat_format.template_tokens]
    ends = [mark for mark in MARK.findall(chat_format.closing or "")[:1] if mark not in special]
    # Zephyr writes <|user|> in pieces and closes turns with eos: by design, not by mistake.
    is_unused = bool(available) and not used
    if missing and (ends or is_unused):
        listed = ", ".join(available) or "none"
        excerpt = f"the template writes {', '.join(missing)}; the tokenizer's turn tokens: {listed}"
        findings.add("template-of-another-family", None, excerpt)
    elif is_unused:
        excerpt = f"the template writes none of the tokenizer's {', '.join(available)}"
        findings.add("template-of-another-family", None, excerpt)


def _check_closing_mark(chat_format: ChatFormat, findings: Findings) -> None:
    """Check that the mark that closes an answer is one token, since the model has to learn to write it."""
    for mark in MARK.findall(chat_format.closing or "")[:1]:
        ids = chat_format.encode(mark)
        if len(ids) > 1:
            pieces = " ".join(repr(chat_format.decode([token])) for token in ids[:12])
            excerpt = f"{mark!r}, which closes an answer, is {len(ids)} tokens: {pieces}"
            findings.add("special-token-split", None, excerpt)


def _check_generation_prompt(chat_format: ChatFormat, findings: Findings) -> None:
    """Compare the generation prompt with the beginning of the same conversation once an answer follows."""
    # A short and a longer conversation: some templates treat the first turn differently.
    for messages in (PROBE[:2], PROBE):
        prompt = messages[:-1]
        conversation = chat_format.render(messages)
        start = chat_format.render(prompt, add_generation_prompt=True)
        lead = conversation.removeprefix(start).partition(messages[-1]["content"])[0]
        if not conversation.startswith(start):
            shared = next(
                (index for index, pair in enumerate(zip(start, conversation, strict=False)) if pair[0] != pair[1]), 0
            )
            excerpt = f"sampling sees {start[shared:]!r} where training sees {conversation[shared : shared + 60]!r}"
            findings.add("generation-prompt-differs", None, excerpt)
        elif squeezed(lead) and not chat_format.answer_lead:
            excerpt = f"sampling stops before {lead!r}, which training puts before the answer"
            findings.add("generation-prompt-differs", None, excerpt)
        elif squeezed(lead):
            findings.add("text-before-answer", None, f"{lead!r}")


def _check_earlier_turns(chat_format: ChatFormat, findings: Findings) -> None:
    """Check that every answer is closed, in the middle of a conversation and at its end."""
    # Control tokens behind the last answer, behind an earlier one, and before the first turn.
    last, after, before = (
        [token for token in chat_format.encode((text or "").lstrip()) if token in chat_format.special_ids]
        for text in (chat_format.closing, chat_format.user_start, chat_format.opening)
    )
    prompt = chat_format.render(PROBE[:1], add_generation_prompt=False)
    header = chat_format.render(PROBE[:1], add_generation_prompt=True).removeprefix(prompt)
    generation = [token for token in chat_format.encode(header) if token in chat_format.special_ids]
    starts_turns = {*before[-1:], *generation[:1]} - chat_format.ends
    if last and (not after or after[0] in starts_turns):
        excerpt = (
            f"the last answer is followed by {chat_format.closing!r}, an earlier one by {chat_format.user_start!r}"
        )
        findings.add("earlier-turns-unclosed", None, excerpt)
    # A mark of the closing that is no control token is reported as split. Some models, such as GLM-4, write nothing
    # after an answer and end at the next turn's header, which their generation config then lists as an end token. A
    # tokenizer without a generation config does not show whether its model does.
    may_end_at_header = not chat_format.closing and not chat_format.extra_ends
    ends_at_header = bool(after) and (after[0] in chat_format.ends or may_end_at_header)
    if not last and not MARK.findall(chat_format.closing or "") and not ends_at_header:
        excerpt = f"no answer is closed: an earlier one is followed by {chat_format.user_start!r}, the last by nothing"
        findings.add("earlier-turns-unclosed", None, excerpt)


def injected_system(chat_format: ChatFormat) -> str:
    """Return the system prompt that the template adds to a conversation without a system turn; "" if none.

    Marks and role names are no prompt: the rest must be longer than a role name can be.
    """
    if chat_format.opening is None or chat_format.user_start is None:
        return ""
    header = chat_format.user_header
    opening = squeezed(chat_format.opening)
    # Remove the user's header, control tokens and marks: words that are left were never in the conversation.
    before = opening.removesuffix(header) if header else opening
    words = MARK.sub("", chat_format.without_control(before))
    if len(words) < MAX_ROLE_CHARACTERS:
        return ""
    readable = MARK.sub(" ", chat_format.without_control(chat_format.opening))
    return " ".join(readable.split())
