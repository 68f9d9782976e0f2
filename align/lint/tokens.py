"""Checks on one sequence of token ids, whatever its labels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from align.lint.batches import MASKED, Tokens
from align.lint.dialect import squeezed
from align.lint.findings import Findings


@dataclass(frozen=True)
class Limits:
    """Sizes in tokens; None where they are not known."""

    max_length: int | None = None
    context: int | None = None
    embeddings: int | None = None


def check_tokens(seen: Tokens, limits: Limits, found: Findings) -> None:
    """Beginning, ids, length, and whether all turns are there."""
    ids, dialect, place = seen.ids, seen.dialect, seen.place
    if not ids:
        return
    bos = dialect.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        found.add("double-bos", place, f"{seen.side} begins with {dialect.decode(ids[:4])!r}")
    if limits.embeddings is not None and max(ids) >= limits.embeddings:
        found.add("id-beyond-embeddings", place, f"id {max(ids)}, but the model embeds {limits.embeddings}")
    if limits.context is not None and len(ids) > limits.context:
        found.add("over-context", place, f"{seen.side} has {len(ids)} tokens, the context {limits.context}")
    _check_split(seen, found)
    _check_turns_are_there(seen, limits, found)


def _check_split(seen: Tokens, found: Findings) -> None:
    """A control token that the template writes must not be there as the letters of its name."""
    dialect = seen.dialect
    if not dialect.written or not dialect.special_pattern:
        return
    spelled = Counter(dialect.special_pattern.findall(seen.text))
    for name in dialect.written & spelled.keys():
        quoted = sum(name in (m["content"] or "") for m in seen.messages)  # its own fault, and reported as that
        if spelled[name] > seen.ids.count(dialect.special[name]) and not quoted:
            found.add("special-token-split", seen.place, f"{name!r} is there as ordinary text: {seen.text}")


def _check_turns_are_there(seen: Tokens, limits: Limits, found: Findings) -> None:
    if not seen.messages:
        return
    dialect, whole = seen.dialect, squeezed(seen.text)
    full = limits.max_length is not None and len(seen.ids) >= limits.max_length
    start = dialect.starts_with
    if start is not None and start not in seen.ids[:2] and full:
        found.add("prompt-truncated", seen.place, f"begins with {seen.text}")
        return
    for number, message in enumerate(seen.messages):
        text = message["content"] or ""
        if message["role"] == "tool":
            continue  # templates wrap a tool's result as they like
        if dialect.has_text(whole, text):
            if not full:  # a cut answer that quotes its prompt is found there, with the prompt's white space
                _check_white_space(seen, message["role"], text, found)
            continue
        if number == len(seen.messages) - 1 and full:
            continue  # cut: judged by its labels
        if number == 0 and full:
            found.add("prompt-truncated", seen.place, f"{text[:60]!r} became {seen.text}")
        else:
            found.add("turn-rewritten", seen.place, f"{message['role']}: {text}")
        return


def _check_white_space(seen: Tokens, role: str, text: str, found: Findings) -> None:
    """Compare a turn that is there with its white space. Templates that trim a user's turn do no harm."""
    if seen.dialect.has_exact_text(seen.text, text):
        return
    if seen.dialect.has_exact_text(seen.text, text.strip() if role != "assistant" else text.rstrip()):
        if role == "assistant":
            found.add("trailing-space-stripped", seen.place, f"{text[-40:]!r}")
        return
    found.add("white-space-changed", seen.place, f"{role}: {text[:60]!r}")


def is_cut(seen: Tokens, limits: Limits) -> bool:
    """Whether the sequence is as long as it may be, and so may have lost its end."""
    return limits.max_length is not None and len(seen.ids) >= limits.max_length


def labeled(seen: Tokens) -> list[tuple[int, int]]:
    """Runs of tokens with a label, as (start, end)."""
    runs: list[tuple[int, int]] = []
    for at, label in enumerate(seen.labels or []):
        if label == MASKED:
            continue
        if runs and runs[-1][1] == at:
            runs[-1] = (runs[-1][0], at + 1)
        else:
            runs.append((at, at + 1))
    return runs
