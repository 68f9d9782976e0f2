"""Checks on the ids of one sequence, apart from its labels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from align.lint.batches import MASKED, TokenSequence
from align.lint.chat_format import squeezed
from align.lint.findings import Findings


@dataclass(frozen=True)
class Limits:
    """Sizes in tokens; None where they are not known."""

    max_length: int | None = None
    context: int | None = None
    embeddings: int | None = None


def check_tokens(sequence: TokenSequence, limits: Limits, findings: Findings) -> None:
    """Check the beginning, the ids, the length, and that all turns are present."""
    ids, chat_format, place = sequence.ids, sequence.chat_format, sequence.place
    if not ids:
        return
    bos = chat_format.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        findings.add("double-bos", place, f"{sequence.side} begins with {chat_format.decode(ids[:4])!r}")
    if limits.embeddings is not None and max(ids) >= limits.embeddings:
        findings.add("id-beyond-embeddings", place, f"id {max(ids)}, but the model embeds {limits.embeddings}")
    if limits.context is not None and len(ids) > limits.context:
        findings.add("over-context", place, f"{sequence.side} has {len(ids)} tokens, the context {limits.context}")
    _check_split_tokens(sequence, findings)
    _check_turns(sequence, limits, findings)


def _check_split_tokens(sequence: TokenSequence, findings: Findings) -> None:
    """Check that no control token of the template occurs as the letters of its name."""
    chat_format = sequence.chat_format
    if not chat_format.template_tokens or not chat_format.special_pattern:
        return
    counts = Counter(chat_format.special_pattern.findall(sequence.text))
    for name in chat_format.template_tokens & counts.keys():
        # A turn that quotes the token has its own fault, which is reported as that.
        is_quoted = any(name in (message["content"] or "") for message in sequence.messages)
        if counts[name] > sequence.ids.count(chat_format.special[name]) and not is_quoted:
            findings.add("special-token-split", sequence.place, f"{name!r} is there as ordinary text: {sequence.text}")


def _check_turns(sequence: TokenSequence, limits: Limits, findings: Findings) -> None:
    """Check that the text of every turn is among the tokens."""
    if not sequence.messages:
        return
    chat_format, text = sequence.chat_format, squeezed(sequence.text)
    is_full = is_cut(sequence, limits)
    first = chat_format.first_token
    # A full sequence without the template's first token was cut at its beginning.
    if first is not None and first not in sequence.ids[:2] and is_full:
        findings.add("prompt-truncated", sequence.place, f"begins with {sequence.text}")
        return
    for number, message in enumerate(sequence.messages):
        content = message["content"] or ""
        if message["role"] == "tool":
            continue  # templates wrap a tool's result as they like
        if chat_format.has_text(text, content):
            # In a full sequence, a cut answer may be a quotation of its prompt, with the prompt's white space.
            if not is_full:
                _check_white_space(sequence, message["role"], content, findings)
            continue
        if number == len(sequence.messages) - 1 and is_full:
            continue  # a cut answer is judged by its labels
        if number == 0 and is_full:
            findings.add("prompt-truncated", sequence.place, f"{content[:60]!r} became {sequence.text}")
        else:
            findings.add("turn-rewritten", sequence.place, f"{message['role']}: {content}")
        return


def _check_white_space(sequence: TokenSequence, role: str, text: str, findings: Findings) -> None:
    """Compare a turn's white space. Templates that trim a user's turn do no harm."""
    if sequence.chat_format.has_exact_text(sequence.text, text):
        return
    trimmed = text.rstrip() if role == "assistant" else text.strip()
    if sequence.chat_format.has_exact_text(sequence.text, trimmed):
        if role == "assistant":
            findings.add("trailing-space-stripped", sequence.place, f"{text[-40:]!r}")
        return
    findings.add("white-space-changed", sequence.place, f"{role}: {text[:60]!r}")


def is_cut(sequence: TokenSequence, limits: Limits) -> bool:
    """Return True where the sequence has the maximum length, and so may have lost its end."""
    return limits.max_length is not None and len(sequence.ids) >= limits.max_length


def label_runs(sequence: TokenSequence) -> list[tuple[int, int]]:
    """Return the runs of tokens with a label, as (start, end)."""
    runs: list[tuple[int, int]] = []
    for index, label in enumerate(sequence.labels or []):
        if label == MASKED:
            continue
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs
