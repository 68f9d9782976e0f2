r"""The answer in a model's text: the text after its thoughts, and the final number of a worked solution. Torch-free.

``split_thought`` is the rule for every reader of responses: scorers, judges, reward models and metrics.
``final_number`` is the rule for rewards and evaluation: the number after ``####`` (GSM8K's mark, arXiv 2110.14168)
and in ``\boxed{}`` (MATH's), else the last number of the text. It skips thoughts and reads fractions. Two
different answers count as no answer. ``marked_number`` and ``last_number`` read as other harnesses do: the first and
the last number, without fractions.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

from align.data.number_forms import NUMBER, plain_numbers, unformatted, without_latex

TAGS = ("think", "thinking", "thought", "reasoning")
"""Names of the tags that models write around a thought."""
_NAMES = "|".join(TAGS)
PAIRS = {
    "[THINK]": "[/THINK]",  # Magistral
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<seed:think>": "</seed:think>",  # Seed-OSS
    "◁think▷": "◁/think▷",  # Kimi
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
}
"""Other marks around a thought: opening mark → closing mark."""
_PAIRED = "|".join(rf"{re.escape(begin)}.*?(?:{re.escape(end)}|\Z)" for begin, end in PAIRS.items())
_NAMED_PAIRS = "|".join(
    rf"(?P<pair{number}_open>{re.escape(begin)})|(?P<pair{number}_close>{re.escape(end)})"
    for number, (begin, end) in enumerate(PAIRS.items())
)
_OPENINGS = "|".join([rf"<(?:{_NAMES})>", *map(re.escape, PAIRS)])
_CLOSINGS = "|".join([rf"</(?:{_NAMES})>", *map(re.escape, PAIRS.values())])
LEADING = re.compile(
    rf"\s*(?:<(?P<tag>{_NAMES})>.*?(?:</(?P=tag)>(?:\s*<response>)?|\Z)"  # Granite 3.3 also marks the answer
    rf"|{_PAIRED}"
    # gpt-oss: the header of the answer's channel belongs to the end of the thought
    r"|(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)<\|message\|>.*?"
    r"(?:<\|end\|>(?:<\|start\|>assistant<\|channel\|>final<\|message\|>)?|\Z)"
    r"|analysis(?=[A-Z]).*?assistantfinal)",  # the same without its special tokens
    re.DOTALL,
)
"""A thought that a turn begins with. A thought that is never closed is the whole turn."""
OPENED = re.compile(
    rf"(?:(?!{_OPENINGS}).)*?(?:{_CLOSINGS})(?=\s|<|\[|\Z)",
    re.DOTALL,
)
"""A thought that the generation prompt has opened. A closing tag within a call's text is followed by more of it."""
CLOSED = re.compile(rf"(?:{_CLOSINGS}|<response>|<\|end\|>|<\|channel\|>final<\|message\|>|assistantfinal)\Z")
"""The end of a thought that is closed."""
_CLOSING = re.compile(_CLOSINGS)
KNOWN = re.compile(rf"{_OPENINGS}|{_CLOSINGS}|<\|channel\|>(?:analysis|commentary)|<\|channel\|>final|<\|message\|>")
"""Marks of thoughts in the text of a chat template."""
EMPTY = re.compile(rf"(?:{_OPENINGS})?(?:{_CLOSINGS})")
"""An empty thought without white space, or its end if the generation prompt has opened it."""

_MARK = re.compile(
    rf"(?P<tag_open><(?:{_NAMES})>)|(?P<tag_close></(?:{_NAMES})>)"
    rf"|{_NAMED_PAIRS}"
    r"|(?P<channel_open><\|channel\|>(?:analysis|commentary)\b|\Aanalysis(?=[A-Z]))"
    r"|(?P<channel_close><\|channel\|>final\b|assistantfinal)"
)
"""Text at which a thought begins or ends. gpt-oss writes channels. Only their names remain if special tokens are
skipped in decoding: ``analysisFive and … so 16.assistantfinal#### 16``."""


@dataclass(frozen=True)
class Marks:
    """Marks of thoughts that were read from a chat template; they are found in addition to those above."""

    opening: str
    closing: str
    between: str
    """Text between a thought and an answer, which has the closing mark."""
    header: str = ""
    """Text that begins an answer without a thought, such as the name of its channel."""
    is_prompted: bool = False
    """True if the generation prompt opens the thought."""

    @cached_property
    def _rest(self) -> str:
        return self.between.partition(self.closing)[2].strip()

    @cached_property
    def ending(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.closing) + (rf"(?:\s*{re.escape(self._rest)})?" if self._rest else ""))

    @cached_property
    def _beginning(self) -> str:
        turn = self._rest.removesuffix(self.header).strip()
        return rf"\s*(?:{re.escape(turn)}\s*)?"

    @cached_property
    def leading(self) -> re.Pattern[str]:
        own = rf"{re.escape(self.opening)}.*?(?:{self.ending.pattern}|\Z)"
        header = rf"|{re.escape(self.header)}" if self.header else ""
        return re.compile(rf"{self._beginning}(?:{own}{header})|{LEADING.pattern}", re.DOTALL)

    def is_closed(self, thought: str) -> bool:
        return thought.endswith(tuple(filter(None, (self.closing, self._rest, self.header))))

    def remove(self, thought: str) -> str:
        """Return a thought without these marks."""
        marks = f"{self._beginning}{re.escape(self.opening)}|{self.ending.pattern}"
        header = rf"|\A\s*{re.escape(self.header)}" if self.header else ""
        return re.sub(marks + header, "", thought)


class AnswerText(str):
    """The answer of a response, as scorers read it. ``full_text`` is the response with its thought.

    A response that ends inside its thought has an empty answer, and ``is_open`` is True.
    """

    full_text: str
    thought: str
    """The thought with its marks; empty if the response has no thought."""
    is_open: bool

    @classmethod
    def cut(cls, text: str, end: int, is_open: bool = False) -> AnswerText:
        """Return the answer of a response whose thought has ``end`` characters."""
        answer = cls(text[end:])
        answer.full_text, answer.thought, answer.is_open = text, text[:end], is_open
        return answer


def split_thought(text: str, is_opened: bool = False, marks: Marks | None = None) -> AnswerText:
    """Return the answer of a response, which knows the thought before it.

    Args:
        text: The response. Special tokens that mark thoughts must be part of it.
        is_opened: True if the generation prompt has opened the thought.
        marks: Marks of the model's chat template.
    """
    end = thought_end(text, marks, is_opened)
    thought = text[:end]
    is_open = end > 0 and CLOSED.search(thought) is None and (marks is None or not marks.is_closed(thought))
    if end == 0 and is_opened:
        closing = _CLOSING.search(text) if marks is None else None
        end, is_open = (len(text), True) if closing is None else (closing.end(), False)
    if end:
        # The space between a thought and the answer belongs to neither.
        end = len(text) - len(text[end:].lstrip())
    return AnswerText.cut(text, end, is_open)


def hide_thoughts(text: str) -> str:
    """Replace the characters of the thoughts that a turn begins with by spaces."""
    end = thought_end(text)
    return " " * end + text[end:]


def thought_end(text: str, marks: Marks | None = None, is_opened: bool = False) -> int:
    """Return the number of characters of the thoughts that a turn begins with; 0 for none.

    ``marks`` are those of the chat template, and ``is_opened`` is True if its prompt has opened a thought.
    """
    leading = LEADING if marks is None else marks.leading
    end = 0
    while (thought := leading.match(text, end)) is not None:
        end = thought.end()
    if end:
        return end
    opened = OPENED.match(text) if marks is None or not is_opened else marks.ending.search(text)
    return 0 if opened is None else opened.end()


def answer_text(text: str) -> str | None:
    """Return the text outside thoughts; None if a thought is never closed, because then there is no answer.

    A closing tag without an opening tag ends a thought that the generation prompt has opened.
    """
    pieces: list[str] = []
    start = 0
    opened = ""
    for mark in _MARK.finditer(text):
        kind, _, action = str(mark.lastgroup).partition("_")
        if action == "open" and not opened:
            pieces.append(text[start : mark.start()])
            opened = kind
        elif action == "close" and opened == kind:
            start, opened = mark.end(), ""
        elif action == "close" and not opened and kind != "channel":
            pieces, start = [], mark.end()
    if opened:
        return None
    return " ".join([*pieces, text[start:]]).strip()


_RATIO = re.compile(
    NUMBER.pattern + r"(?:(?:[^\S\n]+(?P<above>\d+))?[^\S\n]*/[^\S\n]*"
    r"(?P<below>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?)(?!\d|[^\S\n]*/))?"
)
"""A number, a fraction (7/2) or a mixed number (3 1/2); 3/4/2024 is none of these as a whole."""
_MARKED = re.compile(r"####[^\S\n]*" + NUMBER.pattern)
_MARKED_PLACE = re.compile(r"####([^\n#]*)")
_BOX = re.compile(r"\\boxed\s*\{")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_NEXT_QUESTION = re.compile(r"\n\s*(?:question|problem|q|user|human)\s*\d*\s*:", re.IGNORECASE)
"""Heading of a question that a base model asks itself after its answer."""

_WORD = re.compile(r"[^\W\d_]+")
_ELSE = frozenset({"otherwise", "alternatively"})
_OR = frozenset({"or", "maybe", "perhaps", "possibly", "candidate", "option", "else", "guess", *_ELSE})
_AND = frozenset({"and", "to"})
_NOISE = re.compile(r"\*\*|[$€£\\{})\]#\"'`~]")
"""Signs between two numbers that may be ignored. An opening parenthesis is not: ``18 (9 + 9)`` explains the 18."""
_SEPARATORS = re.compile(r"[^\S\n]*(?:[,;/|&–—?][^\S\n]*)*")
_ITEM = re.compile(r"\s*(?:[-*•]\s*)?")
"""Text before a number that is a line of its own, and between two such lines."""
_OPERAND_BEFORE = re.compile(
    r"(?:[√∛]|\\sqrt\s*\{?|\w\s*(?:\^|\*\*)|\d\s*(?:[*×·÷]|\\(?:times|cdot|div)\b))\s*[({]?\s*\Z"
)
_OPERAND_AFTER = re.compile(r"\s*(?:[⁰¹²³⁴⁵⁶⁷⁸⁹]|(?:[*×·÷^]|\*\*|\\(?:times|cdot|div)\b)\s*[\d({])")
"""Signs that make a number a part of a product, a power or a root that is left to compute."""
_CLOCK = re.compile(r"(?<![\d:.,])\d{1,2}(?::\d{1,2})+(?![\d:])")
"""A time of day or a ratio, whose numbers are no answers: ``10:30``, ``3:2``."""
_DENIAL = re.compile(
    r"(?:\b(?:not|never)\b(?:(?!\bbut\b)[^.,:;=\n\d]){0,16}|\b(?:than|least|most)\b\W*(?:about|around)?\W*)\Z",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\bI (?:do not|don't|cannot|can't|could not|am not able to) (?:know|solve|answer|say|tell)\b", re.I
)
REFUSAL_REACH = 120
"""Characters before a number in which a refusal makes it no answer."""
_DOUBT = Decimal("NaN")
"""A second value for a number that is no answer: a set with two values has none."""


LONGEST = 100_000
"""Characters of an answer that are read, the last ones, so that no answer holds up its reader."""


@dataclass(frozen=True)
class _Number:
    """A number with its place in the text."""

    value: Decimal
    start: int
    end: int


def final_number(text: str) -> Decimal | None:
    r"""Return the number after ``####`` and in ``\boxed{}``, else the last number; None for two answers."""
    answer = answer_text(text)
    if answer is None:
        return None
    answer = without_latex(plain_numbers(unformatted(answer[-LONGEST:])))
    if _has_open_box(answer):
        return None
    marked = _marked_values(answer) | _boxed_values(answer)
    values = marked or _last_values(answer)
    return values.pop() if len(values) == 1 and _DOUBT not in values else None


def marked_number(text: str) -> Decimal | None:
    """Return the number after the first ``####`` that has one on its line."""
    match = _MARKED.search(text)
    return None if match is None else _value(match)


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text, if there is one."""
    last = deque(NUMBER.finditer(text), maxlen=1)
    return _value(last[0]) if last else None


def _marked_values(text: str) -> set[Decimal]:
    """Return the first number after each ``####``, with its alternatives."""
    values: set[Decimal] = set()
    start = text.find("####")
    if start < 0:
        return values
    question = _NEXT_QUESTION.search(text, start)
    for place in _MARKED_PLACE.finditer(text, start, question.start() if question else len(text)):
        # The right side of ``16 + 2 = 18`` is the answer.
        result = place[1].rpartition("=")[2]
        values |= _joined_values(result, list(_numbers(result)))
    return values


def _boxed_values(text: str) -> set[Decimal]:
    r"""Return the last number in each ``\boxed{}`` that has any, with its alternatives."""
    values: set[Decimal] = set()
    for box in _BOXED.finditer(text):
        values |= _joined_values(box[1], list(_numbers(box[1]))[::-1])
    return values


def _has_open_box(text: str) -> bool:
    r"""Return True for a last ``\boxed{`` that is never closed: the response was cut inside its answer."""
    last = deque(_BOX.finditer(text), maxlen=1)
    depth = 1
    for sign in re.finditer(r"[{}]", text[last[0].end() :]) if last else ():
        depth += 1 if sign[0] == "{" else -1
        if not depth:
            return False
    return bool(last)


def _last_values(text: str) -> set[Decimal]:
    """Return the last number of the text, with its alternatives; none after a refusal."""
    numbers = list(_numbers(text))[::-1]
    if numbers and _REFUSAL.search(text, max(0, numbers[0].start - REFUSAL_REACH), numbers[0].start):
        return set()
    return _joined_values(text, numbers)


def _joined_values(text: str, numbers: list[_Number]) -> set[Decimal]:
    """Return the values of the first of ``numbers`` and of those that the text joins to it, one after the other.

    A number that the text denies, or leaves to compute, adds a doubt.
    """
    values: set[Decimal] = set()
    before: _Number | None = None
    if numbers and not _is_stated(text, numbers[0]):
        values.add(_DOUBT)
    for number in numbers:
        if before is not None:
            earlier, later = sorted((before, number), key=lambda number: number.start)
            gap = text[earlier.end : later.start]
            # Lists, ranges and "4 or 5" give several answers. Any other text ends the series.
            is_list = _is_line(text, earlier) and _ITEM.fullmatch(gap)
            is_range = gap == "-" and earlier.value < later.value
            if not (is_list or is_range or _is_joined(gap, text[later.end : later.end + 80])):
                break
        values.add(number.value)
        if len(values) > 1:  # no answer, however many more follow
            break
        if text[max(0, number.start - 6) : number.start].rstrip(" $").endswith(("±", "\\pm")):
            values.add(-number.value)
        before = number
    return values


def _is_stated(text: str, number: _Number) -> bool:
    """Return True for a number that is no operand, no bound, and not denied."""
    before = text[max(0, number.start - 40) : number.start]
    if _OPERAND_BEFORE.search(before) or _DENIAL.search(before):
        return False
    if _OPERAND_AFTER.match(text, number.end) is not None:
        return False
    clocks = _CLOCK.finditer(text, max(0, number.start - 6), number.end + 6)
    return not any(clock.start() <= number.start < clock.end() for clock in clocks)


def _is_line(text: str, number: _Number) -> bool:
    """Return True for a number that is a line of the text, or an item of a list."""
    if text[number.end : number.end + 1] != "\n":
        return False
    start = text.rfind("\n", 0, number.start) + 1
    return _ITEM.fullmatch(text, start, number.start) is not None


def _is_joined(gap: str, rest: str) -> bool:
    """Return True for the text between two answers: ``4 or 5``, ``4, 5``, ``4 eggs, 5 eggs``.

    ``rest`` follows the second. Operators, and words other than a unit that both have, keep numbers apart.
    """
    words = [word.lower() for word in _WORD.findall(gap)]
    if (len(words) <= 4 and _OR.intersection(words)) or (len(words) <= 8 and _ELSE.intersection(words)):
        return True
    unit = [word for word in words if word not in _AND]
    if unit and unit != [word.lower() for word in _WORD.findall(rest)][: len(unit)]:
        return False
    return _SEPARATORS.fullmatch(_WORD.sub("", _NOISE.sub("", gap))) is not None


def _numbers(text: str) -> Iterator[_Number]:
    """Yield the numbers of a text, with fractions as one number; a fraction with the denominator 0 is none."""
    for match in _RATIO.finditer(text):
        value = _value(match)
        if match["below"] is None:
            yield _Number(value, match.start(), match.end())
            continue
        below = Decimal(match["below"].replace(",", ""))
        if not below:
            continue
        if match["above"] is None:
            yield _Number(value / below, match.start(), match.end())
            continue
        fraction = Decimal(match["above"]) / below
        if fraction < 1:
            yield _Number(value - fraction if value.is_signed() else value + fraction, match.start(), match.end())
        else:  # two numbers: 18 19/2
            yield _Number(value, match.start(), match.start("above") - 1)
            yield _Number(fraction, match.start("above"), match.end())


def _value(match: re.Match[str]) -> Decimal:
    digits = match["only"] or match["whole"].replace(",", "") + (match["part"] or "")
    value = Decimal(digits)
    return -value if (match["outer"] or match["inner"]) else value
