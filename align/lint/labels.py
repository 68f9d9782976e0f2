"""Checks on what is supervised: the answers, their ends, and nothing else."""

from __future__ import annotations

from typing import Literal

from align.lint.batches import MASKED, Tokens
from align.lint.dialect import squeezed
from align.lint.findings import Findings
from align.lint.tokens import Limits, is_cut, labeled
from align.models.render import render_conversation, render_prompt

Supervise = Literal["last", "all"]
"""Which of a conversation's answers are to be learned."""


def check_labels(seen: Tokens, limits: Limits, supervise: Supervise, found: Findings) -> None:
    """Everything about the labels of one sequence."""
    labels, ids, place = seen.labels, seen.ids, seen.place
    if labels is None:
        return
    runs = labeled(seen)
    if not runs:
        found.add("labels-all-masked", place, f"{len(ids)} tokens: {seen.text}")
        return
    wrong = next((at for start, end in runs for at in range(start, end) if labels[at] != ids[at]), None)
    if wrong is not None:
        pair = [seen.dialect.decode([token]) for token in (ids[wrong], labels[wrong])]
        found.add("mask-shifted", place, f"token {wrong} is {pair[0]!r}, its label {pair[1]!r}")
        return
    if runs == [(0, len(ids))] and _has_prompt(seen):
        found.add("labels-none-masked", place, seen.text)
        return
    _check_ends(seen, runs, limits, found)
    _check_texts(seen, runs, limits, supervise, found)
    _check_lead(seen, runs[-1], found)


def check_cut_off(seen: Tokens, found: Findings) -> None:
    """An answer that was cut off ends without an end of turn: among the labels, or where there are none, the ids."""
    if seen.finished or not seen.messages:
        return
    end = _last_token(seen, (0, len(seen.ids)))
    learned = seen.labels is None or seen.labels[end] != MASKED
    if seen.ids[end] in seen.dialect.ends and learned:
        found.add("cut-off-answer-ended", seen.place, f"…{_tail(seen, (0, len(seen.ids)))}")


def _has_prompt(seen: Tokens) -> bool:
    if seen.messages:
        return len(seen.messages) > 1
    return bool(seen.dialect.user_header) and seen.dialect.user_header in squeezed(seen.text)


def _last_token(seen: Tokens, run: tuple[int, int]) -> int:
    """Index of the run's last token that is no white space."""
    for at in range(run[1] - 1, run[0], -1):
        if seen.dialect.decode([seen.ids[at]]).strip():
            return at
    return run[0]


def _check_ends(seen: Tokens, runs: list[tuple[int, int]], limits: Limits, found: Findings) -> None:
    """Each answer's end of turn has a label. Middle turns may be closed with another token, or none."""
    ids, ends = seen.ids, seen.dialect.ends
    for run in runs:
        final = run == runs[-1]
        if ids[_last_token(seen, run)] in ends:
            continue
        behind = ids[run[1]] if run[1] < len(ids) else seen.hidden_end
        if behind in ends and (seen.finished if final else _closes(seen, behind)):
            found.add("eos-masked", seen.place, f"behind {_tail(seen, run)!r}: {seen.dialect.decode([behind])!r}")
        elif final and is_cut(seen, limits):
            found.add("answer-truncated", seen.place, f"…{_tail(seen, run)}")
        elif final and seen.finished and not _starts_an_answer(seen, run):
            found.add("missing-eos", seen.place, f"the last label is of {_tail(seen, run)!r}")


def _closes(seen: Tokens, token: int | None) -> bool:
    return token is not None and token in seen.dialect.ends


def _tail(seen: Tokens, run: tuple[int, int]) -> str:
    return seen.dialect.decode(seen.ids[max(run[0], run[1] - 12) : run[1]])


def _content(seen: Tokens, run: tuple[int, int]) -> str:
    """Squeezed text of a run, without the tokens that end the turn and what the template writes before answers."""
    return _without_end(seen, seen.ids[run[0] : run[1]]).removeprefix(seen.dialect.answer_lead)


def _check_lead(seen: Tokens, run: tuple[int, int], found: Findings) -> None:
    """Check that the template's text before an answer has labels: sampling leaves it to the model to write."""
    lead = seen.dialect.answer_lead
    if not lead or not seen.messages:
        return
    labels_lead = squeezed(seen.dialect.decode(seen.ids[run[0] : run[1]])).startswith(lead)
    if not labels_lead and squeezed(seen.dialect.decode(seen.ids[: run[0]])).endswith(lead):
        found.add("generation-prompt-differs", seen.place, f"{lead!r} stands before the answer and has no labels")


def _without_end(seen: Tokens, ids: list[int]) -> str:
    while ids and (ids[-1] in seen.dialect.ends or not seen.dialect.decode([ids[-1]]).strip()):
        ids = ids[:-1]
    return squeezed(seen.dialect.decode(ids))


def _starts_an_answer(seen: Tokens, run: tuple[int, int]) -> bool:
    """Whether the run stops short of its answer's end, which is a shifted mask's doing."""
    if not seen.messages:
        return False
    content, answer = _content(seen, run), squeezed(seen.messages[-1]["content"] or "")
    return content != answer and run[1] < len(seen.ids)


def _check_texts(
    seen: Tokens, runs: list[tuple[int, int]], limits: Limits, supervise: Supervise, found: Findings
) -> None:
    """The labeled text is the answers' text, each whole."""
    if not seen.messages:
        _check_headers(seen, runs, found)
        return
    answers = [m["content"] or "" for m in seen.messages if m["role"] == "assistant"]
    others = [squeezed(m["content"] or "") for m in seen.messages if m["role"] != "assistant"]
    called = [(m["content"] or "", _rendered(seen, at)) for at, m in enumerate(seen.messages) if m.get("tool_calls")]
    whole = squeezed(seen.text)
    met: list[str] = []
    for run in runs:
        content = _content(seen, run)
        answer = next((text for text in answers if seen.dialect.same_text(content, text)), None)
        if answer is None:
            answer = next((text for text, rendered in called if rendered == content), None)
        if answer is not None:
            met.append(answer)
            continue
        if _speaks_for_others(seen, content, others, answers):
            found.add("user-tokens-supervised", seen.place, seen.dialect.decode(seen.ids[run[0] : run[1]]))
        elif is_cut(seen, limits) and run == runs[-1] and _is_start(content, answers[-1:]):
            met += answers[-1:]  # cut, and reported as that
        elif any(seen.dialect.has_text(whole, text) for text in answers[-1:]):
            shown = seen.dialect.decode(seen.ids[run[0] : run[1]])
            found.add("mask-shifted", seen.place, f"labels are of {shown!r}, the answer is {answers[-1]!r}")
        met += [text for text in answers if squeezed(text) in content or content in squeezed(text)]
    if supervise == "all":
        marked = [m["content"] or "" for m in seen.messages if m.get("train") is False]
        left = [text for text in answers if text not in [*met, *marked] and seen.dialect.has_text(whole, text)]
        if left:
            found.add("middle-turns-unsupervised", seen.place, f"no labels on {left[0]!r}")
    elif len(met) == len(runs) and met[-1] != answers[-1] and seen.dialect.has_text(whole, answers[-1]):
        found.add("mask-shifted", seen.place, f"labels are of {met[-1]!r}, the answer is {answers[-1]!r}")


def _rendered(seen: Tokens, at: int) -> str:
    """Squeezed text of the answer at ``at``, which calls a tool: how a call is written is the template's own."""
    tokenizer = seen.dialect.tokenizer
    start = render_prompt(tokenizer, seen.messages[:at], seen.tools)
    whole = render_conversation(tokenizer, seen.messages[: at + 1], tools=seen.tools)
    return _without_end(seen, whole[len(start) :])


def _is_start(content: str, answers: list[str]) -> bool:
    return any(squeezed(answer).startswith(content.rstrip("\ufffd")) for answer in answers)


def _speaks_for_others(seen: Tokens, content: str, others: list[str], answers: list[str]) -> bool:
    """Whether labeled text announces a user's turn, or has a whole turn of somebody else in it."""
    said = "".join(map(squeezed, answers))
    header = seen.dialect.user_header
    if header and header in content and header not in said:
        return True
    return any(len(text) > 1 and text in content and text not in said for text in others)


def _check_headers(seen: Tokens, runs: list[tuple[int, int]], found: Findings) -> None:
    header = seen.dialect.user_header
    for start, end in runs:
        text = seen.dialect.decode(seen.ids[start:end])
        if header and header in squeezed(text):
            found.add("user-tokens-supervised", seen.place, text)
            return


def check_document_start(seen: Tokens, found: Findings) -> None:
    """In a pack, a document's first token follows another document: it must have no label."""
    if seen.labels and seen.labels[0] != MASKED:
        found.add("pack-leak", seen.place, f"the first token of a document has a label: {seen.text}")
