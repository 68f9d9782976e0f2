"""Checks across rows: prompts and answers on both sides of the split, repeated rows, contradicting pairs."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from align.data.rows import Row, normalized, prompt_key, turns_key
from align.lint.findings import Findings, Place

PlacedRow = tuple[Place, Row]
GRAM_WORDS = 8
"""Words of a word sequence that prompts are compared by."""
COVERED_SHARE = 0.8
"""A test prompt is nearly leaked when one training prompt has this share of its word sequences."""
MIN_PROMPT_WORDS = 16
"""Shorter prompts are not compared by word sequences: they consist mostly of the words of their kind of question."""
MIN_ANSWERS, MAX_ANSWER_SHARE = 50, 0.5
"""From ``MIN_ANSWERS`` rows on, an answer in more than this share of them is reported."""
QUOTED_WORDS, QUOTED_SHARE, QUOTED_ROWS = 5, 0.05, 5
"""An answer of ``QUOTED_WORDS`` words or more in its own prompt is no coincidence, but may be a quotation. It is
reported if more than ``QUOTED_SHARE`` of at least ``QUOTED_ROWS`` rows have such an answer."""
CHOICE = re.compile(r"\s*\(?(?:[A-Za-z]|\d{1,2})[.):]\s+")
"""Mark of an item in a list of choices."""
MIN_ROWS, QUESTIONS_SHARE, PROMPT_QUESTIONS_SHARE = 50, 0.9, 0.02
"""From ``MIN_ROWS`` rows on, roles look swapped if more than ``QUESTIONS_SHARE`` of the answers are questions, and at
most ``PROMPT_QUESTIONS_SHARE`` of the prompts have a question mark or ask for a question."""
ASKS_FOR_QUESTION = re.compile(r"\?|\b(?:ask|question|quiz|interview|riddle|query|inquir)", re.IGNORECASE)
LONG_ANSWER_WORDS = 12
"""Words from which an answer in two rows with different prompts is no coincidence."""


def check_leaked_prompts(train: Sequence[PlacedRow], test: Sequence[PlacedRow], findings: Findings) -> None:
    """Report prompts of ``test`` that ``train`` has too: word for word as splits compare them, or nearly so."""
    # Reversed, so the first of several training rows with a prompt is the one that is named.
    train_places = {prompt_key(row): place for place, row in reversed(train)}
    rest: list[PlacedRow] = []
    for place, row in test:
        source = train_places.get(prompt_key(row))
        if source is None:
            rest.append((place, row))
        else:
            findings.add("leaked-prompt", place, f"also {source}: {row['prompt'][-1]['content']}")
    _check_nearly_leaked(train, rest, findings)


def _check_nearly_leaked(train: Sequence[PlacedRow], test: Sequence[PlacedRow], findings: Findings) -> None:
    """Compare prompts by shared word sequences, with an index of the test prompts' sequences (the smaller side)."""
    index: dict[int, list[int]] = defaultdict(list)
    sizes: list[int] = []
    for number, (_, row) in enumerate(test):
        grams = _word_grams(row)
        # Size 0 takes a short prompt out of the comparison and keeps the numbering.
        sizes.append(len(grams) if len(grams) > MIN_PROMPT_WORDS - GRAM_WORDS else 0)
        if sizes[-1]:
            for gram in grams:
                index[gram].append(number)
    reported: set[int] = set()
    for place, row in train:
        # Each shared sequence votes for the test prompts that have it.
        shared = Counter(number for gram in _word_grams(row) & index.keys() for number in index[gram])
        for number, count in shared.items():
            if count >= COVERED_SHARE * sizes[number] and number not in reported:
                reported.add(number)
                text = test[number][1]["prompt"][-1]["content"]
                findings.add("nearly-leaked-prompt", test[number][0], f"{count} of {sizes[number]} in {place}: {text}")


def _word_grams(row: Row) -> set[int]:
    words = " ".join(normalized(turn["content"] or "") for turn in row["prompt"] if turn["role"] == "user").split()
    return {hash(tuple(words[start : start + GRAM_WORDS])) for start in range(len(words) - GRAM_WORDS + 1)}


class DuplicateRows:
    """Digests of the token sequences of earlier rows."""

    def __init__(self) -> None:
        self._places: dict[bytes, Place] = {}

    def check(self, sequences: Sequence[list[int]], place: Place, text: str, findings: Findings) -> None:
        """Report a row whose ``sequences`` of ids equal an earlier row's."""
        key = hashlib.blake2b(repr(sequences).encode(), digest_size=16).digest()
        earlier = self._places.setdefault(key, place)
        if earlier is not place:
            findings.add("duplicate-row", place, f"same as {earlier}: {text}")


def check_repeated_answers(rows: Sequence[PlacedRow], findings: Findings) -> None:
    """Check the answers of one split against each other."""
    answers: Counter[str] = Counter()
    by_prompt: dict[str, dict[str, Place]] = defaultdict(dict)
    preferences: dict[str, set[tuple[str, str]]] = defaultdict(set)
    labels: dict[tuple[str, str, str], bool] = {}
    for place, row in rows:
        prompt = prompt_key(row)
        if isinstance(row.get("label"), bool) and row.get("completion"):
            answer = row["completion"][-1]["content"] or ""
            # Exactly: another mark or capital may be the reason for another label.
            key = (prompt, turns_key(row["completion"]), answer.strip())
            if labels.setdefault(key, row["label"]) != row["label"]:
                findings.add("labels-contradict", place, f"{answer!r} is good and bad")
        if row.get("chosen") and row.get("rejected"):
            _check_contradiction(place, row, preferences[prompt], findings)
            continue
        answer = _last_text(row, "completion") or _last_text(row, "chosen")
        if not answer or row.get("label") is not None:
            continue
        answers[answer] += 1
        earlier = by_prompt[prompt]
        if answer not in earlier and earlier:
            # Labeled answers were skipped above: those of one prompt differ by design.
            findings.add(
                "prompt-with-several-answers", place, f"answered differently in {next(iter(earlier.values()))}"
            )
        earlier.setdefault(answer, place)
    total = answers.total()
    if total >= MIN_ANSWERS:
        answer, count = answers.most_common(1)[0]
        if count > MAX_ANSWER_SHARE * total:
            findings.add("one-answer-for-all", None, f"{count} of {total} answers are {answer!r}")


def check_quoted_answers(rows: Sequence[PlacedRow], findings: Findings) -> None:
    """Report answers that a user's turn of their own prompt has, word for word, if many rows have them."""
    quoted = [(place, answer) for place, row in rows if (answer := _quoted_answer(row))]
    if len(rows) >= QUOTED_ROWS and len(quoted) > QUOTED_SHARE * len(rows):
        for place, answer in quoted:
            findings.add("answer-in-prompt", place, answer)


def _quoted_answer(row: Row) -> str:
    """Return the answer that the stage learns if the row's prompt has it; "" otherwise, and for one of its choices."""
    turns = row.get("chosen") or (row.get("completion") if row.get("label") is not False else None)
    answer = " ".join(str(turns[-1]["content"] or "").split()) if turns else ""
    if len(answer.split()) < QUOTED_WORDS:
        return ""
    for message in row.get("prompt") or []:
        text = message["content"] or ""
        if message["role"] == "user" and answer in " ".join(text.split()) and not _is_choice(answer, text):
            return answer
    return ""


def _is_choice(answer: str, prompt: str) -> bool:
    """Return True for an answer that is an item of a list in the prompt, with or without its mark."""
    item = CHOICE.sub("", answer, count=1)
    lines = [" ".join(line.split()) for line in prompt.splitlines()]
    return any(line != item and CHOICE.sub("", line, count=1) == item for line in lines)


def check_roles(rows: Sequence[PlacedRow], findings: Findings) -> None:
    """Report a split whose answers are questions while its prompts are not: the mirror image of a conversation."""
    pairs = [
        (row["prompt"], answer)
        for _, row in rows
        if (answer := row.get("completion") or row.get("chosen")) and row.get("prompt")
    ]
    if len(pairs) < MIN_ROWS:
        return
    questions = sum(str(answer[-1]["content"] or "").rstrip().endswith("?") for _, answer in pairs)
    asking = sum(
        any(turn["role"] != "assistant" and ASKS_FOR_QUESTION.search(turn["content"] or "") for turn in prompt)
        for prompt, _ in pairs
    )
    if questions > QUESTIONS_SHARE * len(pairs) and asking <= PROMPT_QUESTIONS_SHARE * len(pairs):
        findings.add("roles-swapped", None, f"{questions} of {len(pairs)} answers end in '?', and {asking} prompts ask")


def _check_contradiction(place: Place, row: Row, preferences: set[tuple[str, str]], findings: Findings) -> None:
    """Check that no other pair of the prompt has the same sides the other way round."""
    # All turns count: two episodes may end in the same words after other calls.
    chosen, rejected = turns_key(row["chosen"]), turns_key(row["rejected"])
    if chosen != rejected and (rejected, chosen) in preferences:
        texts = [_last_text(row, name) for name in ("rejected", "chosen")]
        findings.add("pairs-contradict", place, f"another pair prefers {texts[0]!r} to {texts[1]!r}")
    preferences.add((chosen, rejected))


def check_leaked_answers(train: Sequence[PlacedRow], test: Sequence[PlacedRow], findings: Findings) -> None:
    """Report long answers of ``test`` that a row of ``train`` with another prompt also has."""
    sources: dict[str, tuple[Place, str]] = {}
    for place, row in train:
        for answer in _long_answers(row):
            sources.setdefault(answer, (place, prompt_key(row)))
    for place, row in test:
        for answer in _long_answers(row):
            source = sources.get(answer)
            # With the same prompt it is the prompt that leaked, and that is reported already.
            if source is not None and source[1] != prompt_key(row):
                findings.add("leaked-answer", place, f"also {source[0]}: {answer}")


def _long_answers(row: Row) -> Iterator[str]:
    """Yield the answers that a stage learns to give, of ``LONG_ANSWER_WORDS`` words or more."""
    for name in ("completion", "chosen"):
        text = _last_text(row, name)
        if len(text.split()) >= LONG_ANSWER_WORDS:
            yield text


def _last_text(row: Row, name: str) -> str:
    messages = row.get(name) or []
    return normalized(messages[-1]["content"] or "") if messages else ""
