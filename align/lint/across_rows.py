"""Checks across rows: prompts and answers on both sides of the split, repeated rows, contradicting and swapped pairs.

Swapped sides: if a feature separates the two answers of every pair clearly (a length, the words shared with the
prompt), its differences form two groups, separated by their sign. Labels that follow the feature in most pairs and
contradict it in a good share of them are then no matter of taste: sides were swapped. In pairs that people labeled,
differences gather around zero instead, and no finding is reported.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev

from align.data.rows import Message, Row, is_finished, normalized, prompt_key, turns_key
from align.evaluation.statistics import wilson
from align.lint.chat_format import squeezed
from align.lint.encodings import TokenSequence
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
    # Reverse the order, so the report names the first of several training rows with a prompt.
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
            # Labeled answers were skipped above: answers of one prompt differ by design.
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
    """Return the answer that the stage learns if the row's prompt has it; "" otherwise, and if it is a choice there."""
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
    prompted_rows = [row for _, row in rows if row.get("prompt")]
    pairs = [(row["prompt"], answer) for row in prompted_rows if (answer := row.get("completion") or row.get("chosen"))]
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


LENGTH_FACTOR, TOKENS, LOPSIDED_SHARE = 8, 64, 0.05
"""A pair is lopsided when one answer has ``LENGTH_FACTOR`` times the tokens of the other and ``TOKENS`` more. More than
``LOPSIDED_SHARE`` of such pairs is a warning."""
BIAS, MIN_PAIRS = 0.75, 50
"""A length bias: from ``MIN_PAIRS`` pairs on, the longer (or shorter) side wins more than this share, and the lower end
of the share's 95 % interval (Wilson) is above it too."""
SEPARATION = 2.0
"""Mean over standard deviation of the absolute differences, above which they are two groups. A normal distribution
around zero has 1.3, an exponential one 1.0."""
SWAPPED_SHARE = 0.1
"""Share of contradicting pairs, its lower 95 % bound, from which sides count as swapped. Near one half the feature
is no evidence."""
CONFIDENT_MARGIN = 2.0
"""Margin of a reward model, in logits, from which it is confident of a pair: 0.88 for one side."""
CONFIDENT_SHARE = 0.15
"""Share of the confident pairs in which the model prefers the rejected side, its lower 95 % bound, that is reported."""
WORD = re.compile(r"\w{3,}")
MARKS = re.compile(r"[.,!?…]+(?=\s|\Z)")
"""Marks at the end of a word or a sentence; those inside of numbers and words are left."""
CODE = re.compile(r"```|[{}=<>;]")
"""Signs of code, in which every mark matters."""


Score = Callable[[list[list[Message]], list[str], list[bool], list[str | None]], list[float]]
"""A reward model's ``score``: prompts, answers, flags of finished answers, and the rows' tools."""


@dataclass
class PairChecks:
    """Checks pairs one by one, and collects what ``finish`` judges over all of them."""

    lopsided: list[tuple[Place, str]] = field(default_factory=list)
    longer: int = 0
    shorter: int = 0
    count: int = 0
    differences: dict[str, list[float]] = field(default_factory=lambda: {"length": [], "words of the prompt": []})
    """Feature → chosen minus rejected, pair by pair."""

    def check(self, chosen: TokenSequence, rejected: TokenSequence, findings: Findings) -> None:
        """Check one pair for equal sides and differing prompts, and record its lengths."""
        place = chosen.place
        if chosen.ids == rejected.ids:
            same = chosen.messages == rejected.messages
            findings.add("chosen-equals-rejected", place, ("" if same else "after truncation: ") + chosen.text)
            return
        if _letters(chosen) == _letters(rejected):
            findings.add("sides-differ-in-case-alone", place, f"{_answer(chosen)!r} and {_answer(rejected)!r}")
        elif _have_same_turns(chosen, rejected) and differ_in_punctuation(_answer(chosen), _answer(rejected)):
            findings.add("sides-differ-in-punctuation", place, f"{_answer(chosen)!r} and {_answer(rejected)!r}")
        self._add_differences(chosen, rejected)
        # Tokens behind the common beginning are the answers' own.
        shared = _shared_length(chosen.ids, rejected.ids)
        _check_prompts(chosen, shared, findings)
        chosen_length, rejected_length = len(chosen.ids) - shared, len(rejected.ids) - shared
        self.count += 1
        self.longer += chosen_length > rejected_length
        self.shorter += chosen_length < rejected_length
        low, high = sorted((chosen_length, rejected_length))
        if high > LENGTH_FACTOR * max(1, low) and high - low > TOKENS:
            self.lopsided.append((place, f"chosen has {chosen_length} tokens of its own, rejected {rejected_length}"))

    def finish(self, findings: Findings) -> None:
        """Judge the lengths and features of all pairs."""
        if len(self.lopsided) > LOPSIDED_SHARE * self.count:
            for place, excerpt in self.lopsided:
                findings.add("length-imbalance", place, excerpt)
        decided = self.longer + self.shorter
        if self.count < MIN_PAIRS:
            return
        side, wins = ("longer", self.longer) if self.longer >= self.shorter else ("shorter", self.shorter)
        if decided and wilson(wins, decided).low > BIAS:
            findings.add("length-bias", None, f"the chosen answer is the {side} one in {wins} of {decided} pairs")
        self._check_swapped(findings)

    def _add_differences(self, chosen: TokenSequence, rejected: TokenSequence) -> None:
        """Record a pair's features; pairs whose turns are not known are skipped."""
        if not chosen.messages or not rejected.messages:
            return
        prompt = " ".join(message["content"] or "" for message in chosen.messages[: chosen.prompt_turns])
        answers = [str(side.messages[-1]["content"] or "") for side in (chosen, rejected)]
        lengths = [math.log(1 + len(answer)) for answer in answers]
        shares = [_share_of_prompt(answer, prompt) for answer in answers]
        self.differences["length"].append(lengths[0] - lengths[1])
        self.differences["words of the prompt"].append(shares[0] - shares[1])

    def _check_swapped(self, findings: Findings) -> None:
        for name, differences in self.differences.items():
            sizes = [abs(difference) for difference in differences]
            # The feature must separate the sides in nearly all pairs, else its sign is meaningless.
            if len(sizes) < MIN_PAIRS or fmean(sizes) <= SEPARATION * pstdev(sizes):
                continue
            # Each sign is one group of labels, and the smaller group contradicts the larger one.
            positive = sum(difference > 0 for difference in differences)
            minority = wilson(min(positive, len(sizes) - positive), len(sizes))
            if minority.low > SWAPPED_SHARE and minority.high < 0.5:
                excerpt = f"{minority.value:.0%} of {len(sizes)} pairs contradict the rest, by {name}"
                findings.add("sides-swapped", None, excerpt)


def check_with_reward_model(rows: Sequence[tuple[Place, Row]], score: Score, findings: Findings) -> None:
    """Compare the labels of pairs with a reward model, if it is confident."""
    pairs = [(place, row) for place, row in rows if row.get("chosen") and row.get("rejected")]
    chosen, rejected = (_side_scores([row for _, row in pairs], side, score) for side in ("chosen", "rejected"))
    margins = [chosen_score - rejected_score for chosen_score, rejected_score in zip(chosen, rejected, strict=True)]
    confident = sum(abs(margin) >= CONFIDENT_MARGIN for margin in margins)
    against = [place for (place, _), margin in zip(pairs, margins, strict=True) if margin <= -CONFIDENT_MARGIN]
    # By the interval's lower end, so a few hard pairs do not accuse the labels.
    if confident < MIN_PAIRS or wilson(len(against), confident).low <= CONFIDENT_SHARE:
        return
    for place in against:
        excerpt = f"the reward model prefers rejected, as in {len(against)} of {confident} pairs"
        findings.add("sides-swapped", place, excerpt)


def _side_scores(rows: Sequence[Row], side: str, score: Score) -> list[float]:
    return score(
        [[*row["prompt"], *row[side][:-1]] for row in rows],
        [str(row[side][-1]["content"] or "") for row in rows],
        [is_finished(row, side) for row in rows],
        [row.get("tools") for row in rows],
    )


def _check_prompts(chosen: TokenSequence, shared: int, findings: Findings) -> None:
    """Check that both sides share the prompt, up to its last turn's text; ``shared`` ids are equal."""
    prompt = chosen.messages[: chosen.prompt_turns]
    if not prompt:
        return
    last = prompt[-1]["content"] or ""
    # The sides must part in the answers: the shared ids have to cover the prompt's last turn.
    start = squeezed(chosen.chat_format.decode(chosen.ids[:shared]))
    if not chosen.chat_format.has_text(start, last):
        findings.add("pair-prompts-differ", chosen.place, f"the tokens part within {last!r}")


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def _share_of_prompt(answer: str, prompt: str) -> float:
    """Return the share of an answer's words that are also in the prompt."""
    words = set(WORD.findall(answer.casefold()))
    return len(words & set(WORD.findall(prompt.casefold()))) / len(words) if words else 0.0


def _answer(side: TokenSequence) -> str:
    return str(side.messages[-1]["content"] or "") if side.messages else side.text


def differ_in_punctuation(chosen: str, rejected: str) -> bool:
    """Return True for different texts that are equal without marks at the ends of words, white space and case.

    In code every mark matters, so code never counts.
    """
    if chosen == rejected or CODE.search(chosen):
        return False
    first, second = (squeezed(MARKS.sub("", text)).casefold() for text in (chosen, rejected))
    return first == second and squeezed(chosen).casefold() != squeezed(rejected).casefold()


def _have_same_turns(chosen: TokenSequence, rejected: TokenSequence) -> bool:
    """Return True for answers whose turns before the last, and whose calls, are the same."""
    first, second = (_letters(side) for side in (chosen, rejected))
    return bool(first and second) and first[:-1] == second[:-1] and first[-1][2] == second[-1][2]


def _letters(side: TokenSequence) -> list[tuple[str, str, str]]:
    """Return the role, the text without white space and case, and the calls of each of the answer's turns."""
    if not side.messages:
        return [("", squeezed(side.text).casefold(), "")]
    # The case of a call's arguments counts: they name files, places and keys.
    return [
        (message["role"], squeezed(message["content"] or "").casefold(), message.get("tool_calls") or "")
        for message in side.messages[side.prompt_turns :]
    ]
