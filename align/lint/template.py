"""Checks on the chat template and its tokenizer, made once before any row: whether the two belong together.

``tokens.py`` and ``labels.py`` check the same row by row.
"""

from __future__ import annotations

from typing import Any

from align.lint.chat_format import MARK, PROBE, ChatFormat, squeezed
from align.lint.findings import Findings

TURN_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "[INST]",
    "[/INST]",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|start|>",
    "<|message|>",
    "<|header_start|>",
    "<|eot|>",
    "<|turn_end|>",
)
"""Tokens that chat models' tokenizers have only for turns."""
MAX_ROLE_CHARACTERS = 16
"""Text of the template before the first turn that may be a role's name."""


def check_template(chat_format: ChatFormat, findings: Findings) -> None:
    """Check everything that follows from template and tokenizer alone."""
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
    parts = (chat_format.opening, chat_format.answer_start, chat_format.user_start, chat_format.closing)
    marks = dict.fromkeys(MARK.findall("".join(filter(None, parts))))
    special = chat_format.special
    missing = [mark for mark in marks if mark in TURN_TOKENS and mark not in special and mark[0] == "<"]
    # A template may write the tokenizer's eos, whatever it is, as end of turn: that shows no kinship.
    shared = (chat_format.tokenizer.eos_token, chat_format.tokenizer.bos_token)
    available = [token for token in TURN_TOKENS if token in special and token not in shared]
    used = [token for token in available if token in chat_format.template_tokens]
    ends = [mark for mark in MARK.findall(chat_format.closing or "")[:1] if mark not in special]
    # Zephyr writes <|user|> in pieces and closes turns with eos: by design, not by mistake.
    if missing and (ends or (available and not used)):
        listed = ", ".join(available) or "none"
        excerpt = f"the template writes {', '.join(missing)}; the tokenizer's turn tokens: {listed}"
        findings.add("template-of-another-family", None, excerpt)
    elif available and not used:
        excerpt = f"the template writes none of the tokenizer's {', '.join(available)}"
        findings.add("template-of-another-family", None, excerpt)


def _check_closing_mark(chat_format: ChatFormat, findings: Findings) -> None:
    """Check that the mark that closes an answer is one token, since the model has to learn to write it."""
    for mark in MARK.findall(chat_format.closing or "")[:1]:
        ids = chat_format.encode(mark)
        if len(ids) > 1:
            excerpt = f"{mark!r}, which closes an answer, is {_pieces(chat_format, ids)}"
            findings.add("special-token-split", None, excerpt)


def _pieces(chat_format: ChatFormat, ids: list[int]) -> str:
    return f"{len(ids)} tokens: " + " ".join(repr(chat_format.decode([token])) for token in ids[:12])


def _check_generation_prompt(chat_format: ChatFormat, findings: Findings) -> None:
    """Compare the generation prompt with the beginning of the same conversation once an answer follows."""
    # A short and a longer conversation: some templates treat the first turn differently.
    for messages in (PROBE[:2], PROBE):
        prompt = messages[:-1]
        conversation = _render(chat_format, messages)
        start = _render(chat_format, prompt, add_generation_prompt=True)
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
    starts_turns = {*before[-1:], *_generation_tokens(chat_format)[:1]} - chat_format.ends
    if last and (not after or after[0] in starts_turns):
        excerpt = (
            f"the last answer is followed by {chat_format.closing!r}, an earlier one by {chat_format.user_start!r}"
        )
        findings.add("earlier-turns-unclosed", None, excerpt)
    # A mark of the closing that is no control token is reported as split. Some models end at the next turn's header.
    if not last and not MARK.findall(chat_format.closing or "") and (not after or after[0] not in chat_format.ends):
        excerpt = f"no answer is closed: an earlier one is followed by {chat_format.user_start!r}, the last by nothing"
        findings.add("earlier-turns-unclosed", None, excerpt)


def _generation_tokens(chat_format: ChatFormat) -> list[int]:
    """Return the control tokens of the generation prompt."""
    prompt = PROBE[:1]
    start = _render(chat_format, prompt, add_generation_prompt=True)
    header = start.removeprefix(_render(chat_format, prompt, add_generation_prompt=False))
    return [token for token in chat_format.encode(header) if token in chat_format.special_ids]


def _render(chat_format: ChatFormat, messages: list[dict[str, str]], **options: Any) -> str:
    return str(chat_format.tokenizer.apply_chat_template(messages, tokenize=False, **options))


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
