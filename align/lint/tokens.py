"""Checks on the ids of one sequence and on its labels."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from align.lint.chat_format import squeezed
from align.lint.encodings import MASKED, TokenSequence
from align.lint.findings import Findings
from align.models.chat.render import render_conversation, render_prompt


@dataclass(frozen=True)
class Limits:
    """Sizes in tokens; None if they are not known."""

    max_length: int | None = None
    context: int | None = None
    embeddings: int | None = None


def check_tokens(sequence: TokenSequence, limits: Limits, findings: Findings) -> None:
    """Check the beginning, the ids, the length, and that all turns are present."""
    ids = sequence.ids
    chat_format = sequence.chat_format
    place = sequence.place
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
    chat_format = sequence.chat_format
    text = squeezed(sequence.text)
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
    """Return True if the sequence has the maximum length, and so may have lost its end."""
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


Supervise = Literal["last", "all"]
"""Answers of a conversation that are to be learned."""
Run = tuple[int, int]
"""Start and end of consecutive labeled tokens."""


def check_labels(sequence: TokenSequence, limits: Limits, supervise: Supervise, findings: Findings) -> None:
    """Check everything about the labels of one sequence."""
    labels = sequence.labels
    ids = sequence.ids
    place = sequence.place
    if labels is None:
        return
    runs = label_runs(sequence)
    if not runs:
        findings.add("labels-all-masked", place, f"{len(ids)} tokens: {sequence.text}")
        return
    # The label of a token is the token itself; the model shifts them by one.
    wrong = next((index for start, end in runs for index in range(start, end) if labels[index] != ids[index]), None)
    if wrong is not None:
        token, label = (sequence.chat_format.decode([id]) for id in (ids[wrong], labels[wrong]))
        findings.add("mask-shifted", place, f"token {wrong} is {token!r}, its label {label!r}")
        return
    # One run over everything means that the prompt is learned as well.
    if runs == [(0, len(ids))] and _has_prompt(sequence):
        findings.add("labels-none-masked", place, sequence.text)
        return
    # The mask is sound as such; now compare it with the conversation's turns.
    _check_ends(sequence, runs, limits, findings)
    _check_texts(sequence, runs, limits, supervise, findings)
    _check_lead(sequence, runs[-1], findings)


def check_cut_off(sequence: TokenSequence, findings: Findings) -> None:
    """Check that an answer that was cut off has no end of turn: among the labels or, without labels, the ids."""
    if sequence.finished or not sequence.messages:
        return
    last = _last_token(sequence, (0, len(sequence.ids)))
    is_learned = sequence.labels is None or sequence.labels[last] != MASKED
    if sequence.ids[last] in sequence.chat_format.ends and is_learned:
        findings.add("cut-off-answer-ended", sequence.place, f"…{_tail(sequence, (0, len(sequence.ids)))}")


def check_document_start(sequence: TokenSequence, findings: Findings) -> None:
    """Check that a packed document's first token, which follows another document, has no label."""
    if sequence.labels and sequence.labels[0] != MASKED:
        findings.add("pack-leak", sequence.place, f"the first token of a document has a label: {sequence.text}")


def _has_prompt(sequence: TokenSequence) -> bool:
    if sequence.messages:
        return len(sequence.messages) > 1
    header = sequence.chat_format.user_header
    return bool(header) and header in squeezed(sequence.text)


def _last_token(sequence: TokenSequence, run: Run) -> int:
    """Return the index of the run's last token that is not white space."""
    for index in range(run[1] - 1, run[0], -1):
        if sequence.chat_format.decode([sequence.ids[index]]).strip():
            return index
    return run[0]


def _check_ends(sequence: TokenSequence, runs: list[Run], limits: Limits, findings: Findings) -> None:
    """Check that each answer's end of turn has a label. Middle turns may be closed with another token, or none."""
    ids = sequence.ids
    ends = sequence.chat_format.ends
    for run in runs:
        is_last = run == runs[-1]
        if ids[_last_token(sequence, run)] in ends:
            continue
        # The token behind the run: in the sequence, or in the batch without attention.
        behind = ids[run[1]] if run[1] < len(ids) else sequence.hidden_end
        if behind is not None and behind in ends and (sequence.finished or not is_last):
            excerpt = f"behind {_tail(sequence, run)!r}: {sequence.chat_format.decode([behind])!r}"
            findings.add("eos-masked", sequence.place, excerpt)
        elif is_last and is_cut(sequence, limits):
            findings.add("answer-truncated", sequence.place, f"…{_tail(sequence, run)}")
        elif is_last and sequence.finished and not _stops_early(sequence, run):
            findings.add("missing-eos", sequence.place, f"the last label is of {_tail(sequence, run)!r}")


def _tail(sequence: TokenSequence, run: Run) -> str:
    return sequence.chat_format.decode(sequence.ids[max(run[0], run[1] - 12) : run[1]])


def _content(sequence: TokenSequence, run: Run) -> str:
    """Return a run's squeezed text, without its end of turn and the template's text before answers."""
    return _without_end(sequence, sequence.ids[run[0] : run[1]]).removeprefix(sequence.chat_format.answer_lead)


def _without_end(sequence: TokenSequence, ids: list[int]) -> str:
    chat_format = sequence.chat_format
    # Templates may write a line break behind the end of turn, so both are removed, in any order.
    while ids and (ids[-1] in chat_format.ends or not chat_format.decode([ids[-1]]).strip()):
        ids = ids[:-1]
    return squeezed(chat_format.decode(ids))


def _check_lead(sequence: TokenSequence, run: Run, findings: Findings) -> None:
    """Check that the template's text before an answer has labels: sampling leaves it to the model to write."""
    lead = sequence.chat_format.answer_lead
    if not lead or not sequence.messages:
        return
    has_labels = squeezed(sequence.chat_format.decode(sequence.ids[run[0] : run[1]])).startswith(lead)
    if not has_labels and squeezed(sequence.chat_format.decode(sequence.ids[: run[0]])).endswith(lead):
        excerpt = f"{lead!r} stands before the answer and has no labels"
        findings.add("generation-prompt-differs", sequence.place, excerpt)


def _stops_early(sequence: TokenSequence, run: Run) -> bool:
    """Return True if the run stops before its answer's end, which is the effect of a shifted mask."""
    if not sequence.messages:
        return False
    content = _content(sequence, run)
    answer = squeezed(sequence.messages[-1]["content"] or "")
    return content != answer and run[1] < len(sequence.ids)


def _check_texts(
    sequence: TokenSequence, runs: list[Run], limits: Limits, supervise: Supervise, findings: Findings
) -> None:
    """Check that the labeled text is the answers' text, each of them complete."""
    if not sequence.messages:
        _check_headers(sequence, runs, findings)
        return
    chat_format = sequence.chat_format
    answers = [message["content"] or "" for message in sequence.messages if message["role"] == "assistant"]
    text = squeezed(sequence.text)
    learned: list[str] = []
    # Every labeled run should be an answer; whatever else it covers is reported on the way.
    for run in runs:
        may_be_cut = run == runs[-1] and is_cut(sequence, limits)
        learned += _learned_answers(sequence, run, answers, may_be_cut, findings)
    if supervise == "all":
        untrained = [message["content"] or "" for message in sequence.messages if message.get("train") is False]
        expected = [answer for answer in answers if answer not in [*learned, *untrained]]
        unlabeled = [answer for answer in expected if chat_format.has_text(text, answer)]
        if unlabeled:
            findings.add("middle-turns-unsupervised", sequence.place, f"no labels on {unlabeled[0]!r}")
    elif len(learned) == len(runs) and learned[-1] != answers[-1] and chat_format.has_text(text, answers[-1]):
        excerpt = f"labels are of {learned[-1]!r}, the answer is {answers[-1]!r}"
        findings.add("mask-shifted", sequence.place, excerpt)


def _learned_answers(
    sequence: TokenSequence, run: Run, answers: list[str], may_be_cut: bool, findings: Findings
) -> list[str]:
    """Return the answers that a labeled run covers, and report a run that is no answer."""
    content = _content(sequence, run)
    answer = _answer_of(sequence, content, answers)
    if answer is not None:
        return [answer]
    # The run may hold several answers, or a part of one.
    covered = [text for text in answers if squeezed(text) in content or content in squeezed(text)]
    labeled_text = sequence.chat_format.decode(sequence.ids[run[0] : run[1]])
    if _speaks_for_others(sequence, content, answers):
        findings.add("user-tokens-supervised", sequence.place, labeled_text)
    elif may_be_cut and _is_start(content, answers[-1:]):
        return [*answers[-1:], *covered]  # a cut answer, which is reported as that
    elif any(sequence.chat_format.has_text(squeezed(sequence.text), text) for text in answers[-1:]):
        excerpt = f"labels are of {labeled_text!r}, the answer is {answers[-1]!r}"
        findings.add("mask-shifted", sequence.place, excerpt)
    return covered


def _answer_of(sequence: TokenSequence, content: str, answers: list[str]) -> str | None:
    """Return the answer with this labeled text, as written or as the template renders an answer with a tool call."""
    for text in answers:
        if sequence.chat_format.same_text(content, text):
            return text
    for index, message in enumerate(sequence.messages):
        if message.get("tool_calls") and _rendered_answer(sequence, index) == content:
            return message["content"] or ""
    return None


def _rendered_answer(sequence: TokenSequence, index: int) -> str:
    """Return the squeezed text of an answer that calls a tool: each template writes calls in its own way."""
    tokenizer = sequence.chat_format.tokenizer
    start = render_prompt(tokenizer, sequence.messages[:index], sequence.tools)
    # Render with and without the answer: the difference is how this template writes the call.
    ids = render_conversation(tokenizer, sequence.messages[: index + 1], tools=sequence.tools)
    return _without_end(sequence, ids[len(start) :])


def _is_start(content: str, answers: list[str]) -> bool:
    # A cut within a character leaves bytes that decode to U+FFFD.
    return any(squeezed(answer).startswith(content.rstrip("\ufffd")) for answer in answers)


def _speaks_for_others(sequence: TokenSequence, content: str, answers: list[str]) -> bool:
    """Return True where labeled text has a user's header, or a complete turn of another role."""
    # An answer may quote the user, which is no fault of the mask.
    answer_text = "".join(map(squeezed, answers))
    header = sequence.chat_format.user_header
    if header and header in content and header not in answer_text:
        return True
    others = [squeezed(message["content"] or "") for message in sequence.messages if message["role"] != "assistant"]
    return any(len(text) > 1 and text in content and text not in answer_text for text in others)


def _check_headers(sequence: TokenSequence, runs: list[Run], findings: Findings) -> None:
    header = sequence.chat_format.user_header
    for start, end in runs:
        text = sequence.chat_format.decode(sequence.ids[start:end])
        if header and header in squeezed(text):
            findings.add("user-tokens-supervised", sequence.place, text)
            return
