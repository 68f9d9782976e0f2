"""Checks on the chat template and its tokenizer, made once, before any row: do the two belong together?

Row by row, the same is seen in the tokens (``tokens.py``, ``labels.py``).
"""

from __future__ import annotations

from typing import Any

from align.lint.dialect import MARK, PROBE, Dialect, squeezed
from align.lint.findings import Findings

TURN_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>",
    "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "[INST]", "[/INST]", "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>", "<|start|>", "<|message|>", "<|header_start|>", "<|eot|>", "<|turn_end|>",
)  # fmt: skip
"""Tokens that tokenizers of chat models have for nothing but turns."""


def check_template(dialect: Dialect, found: Findings) -> None:
    """Everything that follows from template and tokenizer alone."""
    tokenizer = dialect.tokenizer
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        found.add("pad-is-eos", None, f"both are {tokenizer.pad_token!r}")
    if dialect.refusal:
        found.add("template-refuses-row", None, f"already a plain conversation of four turns: {dialect.refusal}")
        return
    if dialect.closing is None:
        found.add("turn-rewritten", None, "a plain conversation of four turns does not come out with its texts whole")
        return
    _check_family(dialect, found)
    _check_marks(dialect, found)
    _check_generation_prompt(dialect, found)
    _check_earlier_turns(dialect, found)


def _check_family(dialect: Dialect, found: Findings) -> None:
    text = "".join(filter(None, (dialect.opening, dialect.answer_start, dialect.user_start, dialect.closing)))
    marks = dict.fromkeys(MARK.findall(text))
    missing = [mark for mark in marks if mark in TURN_TOKENS and mark not in dialect.special and mark[0] == "<"]
    # A template may write the end of turn as whatever the tokenizer's eos is: that shows no kinship.
    common = (dialect.tokenizer.eos_token, dialect.tokenizer.bos_token)
    owned = [token for token in TURN_TOKENS if token in dialect.special and token not in common]
    used = [token for token in owned if token in dialect.written]
    ends = [mark for mark in MARK.findall(dialect.closing or "")[:1] if mark not in dialect.special]
    # Zephyr writes <|user|> in pieces and closes turns with eos: by design, not by mistake.
    if missing and (ends or (owned and not used)):
        found.add(
            "template-of-another-family", None,
            f"the template writes {', '.join(missing)}; the tokenizer's turn tokens: {', '.join(owned) or 'none'}",
        )  # fmt: skip
    elif owned and not used:
        found.add("template-of-another-family", None, f"the template writes none of the tokenizer's {', '.join(owned)}")


def _check_marks(dialect: Dialect, found: Findings) -> None:
    """The mark that closes an answer must be one token: it is what the model has to learn to say."""
    for mark in MARK.findall(dialect.closing or "")[:1]:
        ids = dialect.encode(mark)
        if len(ids) > 1:
            found.add("special-token-split", None, f"{mark!r}, which closes an answer, is {_pieces(dialect, ids)}")


def _pieces(dialect: Dialect, ids: list[int]) -> str:
    return f"{len(ids)} tokens: " + " ".join(repr(dialect.decode([token])) for token in ids[:12])


def _check_generation_prompt(dialect: Dialect, found: Findings) -> None:
    """Compare what sampling sees with how the same conversation begins once an answer follows."""
    for messages in (PROBE[:2], PROBE):
        prompt, whole = messages[:-1], _render(dialect, messages)
        start = _render(dialect, prompt, add_generation_prompt=True)
        lead = whole.removeprefix(start).partition(messages[-1]["content"])[0]
        if not whole.startswith(start):
            shared = next(
                (index for index, pair in enumerate(zip(start, whole, strict=False)) if pair[0] != pair[1]), 0
            )
            excerpt = f"sampling sees {start[shared:]!r} where training sees {whole[shared : shared + 60]!r}"
            found.add("generation-prompt-differs", None, excerpt)
        elif squeezed(lead) and not dialect.answer_lead:
            excerpt = f"sampling stops before {lead!r}, which training puts before the answer"
            found.add("generation-prompt-differs", None, excerpt)
        elif squeezed(lead):
            found.add("text-before-answer", None, f"{lead!r}")


def _check_earlier_turns(dialect: Dialect, found: Findings) -> None:
    """Check that an answer is closed in the middle of a conversation where it is closed at the end."""
    last, after, before = (
        [token for token in dialect.encode((text or "").lstrip()) if token in dialect.special_ids]
        for text in (dialect.closing, dialect.user_start, dialect.opening)
    )
    starts_turns = {*before[-1:], *_generation_tokens(dialect)[:1]} - dialect.ends
    if last and (not after or after[0] in starts_turns):
        excerpt = f"the last answer is followed by {dialect.closing!r}, an earlier one by {dialect.user_start!r}"
        found.add("earlier-turns-unclosed", None, excerpt)


def _generation_tokens(dialect: Dialect) -> list[int]:
    """Control tokens of the generation prompt."""
    prompt = PROBE[:1]
    start = _render(dialect, prompt, add_generation_prompt=True)
    header = start.removeprefix(_render(dialect, prompt, add_generation_prompt=False))
    return [token for token in dialect.encode(header) if token in dialect.special_ids]


def _render(dialect: Dialect, messages: list[dict[str, str]], **options: Any) -> str:
    return str(dialect.tokenizer.apply_chat_template(messages, tokenize=False, **options))


def injected_system(dialect: Dialect) -> str:
    """The text that the template puts before the first user turn of a conversation without a system turn; "" if none.

    Marks and role names are no text: what is left must be longer than a role name can be.
    """
    if dialect.opening is None or dialect.user_start is None:
        return ""
    header = dialect.user_header
    opening = squeezed(dialect.opening)
    before = opening.removesuffix(header) if header else opening
    kept = MARK.sub("", dialect.without_control(before))
    if len(kept) < 16:
        return ""
    readable = MARK.sub(" ", dialect.without_control(dialect.opening))
    return " ".join(readable.split())
