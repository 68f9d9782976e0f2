r"""Verifiers that need no package: ``number``, ``choice``, ``exact``, ``contains``, ``regex`` and ``json_schema``.

Each reads the text outside thoughts and returns a ``Verdict``. None of them guesses: a rule that finds two different
answers finds none.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from datetime import datetime
from decimal import DecimalException
from typing import TYPE_CHECKING, Any, NoReturn

from align.data.final_answers import LONGEST, answer_text, final_number
from align.data.number_forms import unformatted, without_marks
from align.verifiers.verdict import NO_ANSWER, UNPARSABLE, BadReference, Verdict, equal_or

if TYPE_CHECKING:
    import jsonschema

_FENCE = re.compile(
    r"(?P<fence>`{3,}|~{3,})[^\S\n]*(?:json[c5]?)?[^\S\n]*\n(?P<body>.*?)\n[^\S\n]*(?P=fence)",
    re.DOTALL | re.IGNORECASE,
)
_VALUE = re.compile(r"^\s*[\[{]", re.MULTILINE)
"""Beginning of an object or a list of JSON."""
_CODE_SPAN = re.compile(r"(`{1,2})(?!`)([^`]+)\1")
_BOXED_LETTER = re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_MARKED_LETTER = re.compile(r"####[ \t]*([^\n#]+)")
_TAGGED_LETTER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_LATEX = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf|cal)|emph|underline|boldsymbol|bm|mbox)\s*\{([^{}]*)\}"
)
_MATH_SIGNS = re.compile(r"\s*\\[)\],;!]|\\[(\[ ]|\$\$\n?|\$|\\(?:quad|bf|rm)\b")
_HEADING = re.compile(
    r"^[ \t]*(?:#+[ \t]*)?(?:(?:so|thus|therefore|hence),?[ \t]+)?"
    r"((?:(?:the|my|final|correct|right|best)[ \t]+)*(?:answer|choice|option)(?:[ \t]+is)?)[ \t]*(?::[ \t]*)?\n",
    re.IGNORECASE | re.MULTILINE,
)
"""A line that says only that the answer follows."""
_STATED = re.compile(
    r"(?:\b(?:answer|choice|option|letter|solution|response)(?P<gap>(?:\s(?!is\b)(?!\w\b)[\w']{1,20}){0,8}?)"
    r"(?:\s?[:=]|\s[-–—]|\s(?:is|was|(?:would|should|must|will)\sbe)\b:?)|答案是?:?)"
    r"(?:\s(?:therefore|thus|hence|clearly|simply|indeed|definitely|likely|probably)\b)?\s?:?(?P<place>.*)",
    re.IGNORECASE,
)
"""A line in which the answer is stated: "The best choice for this question is (B) Paris"."""
_DENIED = re.compile(
    r"\b(?:not|never|wrong|incorrect|false|bad|worst|unlikely|cannot|eliminated?)\b|n't\b", re.IGNORECASE
)
_SENTENCE = re.compile(r"(?<=[.!?])\s")
_CHOOSING = re.compile(
    r"(?:(?:so|thus|therefore|hence|overall|finally|clearly)\b,?\s)?"
    r"(?:(?:(?:I|we)(?:\s(?:will|would|must|should)|'ll|'d)?\s(?:choose|chose|pick|select|say|go\swith|answer)"
    r"|it\sis|it's|it\smust\sbe|correct|selected|picked|chosen|select|choose)\b:?\s?)?"
    r"(?:(?:(?:the|my|final|correct|right|best)\s){0,4}(?:option|choice|answer|letter)\s)?"
    r"(?P<letter>\(?[A-Za-z]\)?)"
    r"(?:\s(?:is|must\sbe|would\sbe|seems)\s(?:clearly\s|indeed\s)?(?:the\s)?(?:only\s)?"
    r"(?:correct|right|best|true)(?:\s(?:one|answer|choice|option))?)?\s?[.!]?",
    re.IGNORECASE,
)
"""A sentence that only chooses a letter: "Option B is correct.", "I choose (B).", "Therefore, B"."""
_LETTER = re.compile(
    r"(?:(?:option|choice|letter|answer)\s)?[(\[{\"']?([A-Za-z])[)\]}\"']?"
    r"(?:(?:[.):;]|,(?=\s)|\s[-–—=]{1,3}\s|\s(?:because|since|as|for)\b"
    r"|\sis\s(?:the\s)?(?:correct|right|best)\b|(?=\s?\())"
    r"\s?(?P<rest>.*)|[.!,;]?)",
    re.IGNORECASE,
)
"""A letter in any of the usual forms: ``B``, ``(B)``, ``B.``, ``B) Paris``, ``option B``, ``B, because``."""
_OTHER_CHOICE = re.compile(
    r"(?:\b(?:or|and|but|either|unless|perhaps|maybe|possibly|be|is|if\snot,?)\b|[,;/&|])\s?"
    r"[(\[]?(?!a\s\w|I\s)([A-Za-z])[)\]]?(?![\w'])"
    r"|(?<![\w'])(?!I\s)([A-Z])(?=\s(?:is|are|was|could|might|may|can|would|seems)\b|[):]|\.\s\w)"
)
"""Another letter behind the chosen letter, which may be an answer as well."""
_DOUBT = re.compile(r"\b(?:wrong|incorrect|not\s(?:the\s)?(?:right|correct|answer)|all\sof\sthe|both)\b", re.IGNORECASE)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
"""A comment of HTML, which readers do not see."""
_AROUND = re.compile(
    r"(?P<mark>\*{1,3}|_{1,3}|`{1,2}|\$\$?)(?P<shown>.+)(?P=mark)|<(?P<tag>b|i|u|em|strong|code)>(?P<tagged>.+)</(?P=tag)>"
    r"|\\(?:text(?:bf|it)?|math(?:rm|bf)|boxed|underline|emph)\{(?P<inner>[^{}]+)\}|\\[(\[](?P<formula>.+)\\[)\]]",
    re.DOTALL,
)
"""Marks around a whole answer."""
LONGEST_WRAPPED = 200
"""Characters of a choice from which brackets and quotation marks are removed."""
_MARKUP = frozenset("*_`~<>$\\#")
"""Signs of a reference that says how to format a text: it is compared with the text as it is written."""
_DATE_TIME = re.compile(r"(\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d)(?:\.\d+)?(?:[Zz]|([+-]\d\d:\d\d))", re.ASCII)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[^\s<>\"{}|\\^`]+")
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "\u00a0": " ", "\u2011": "-"})


def number(reference: Any, text: str) -> Verdict:
    """Compare the final number of an answer (:mod:`align.data.final_answers`) with a number."""
    right = final_number(str(reference))
    if right is None:
        raise BadReference("is no number")
    try:
        answer = final_number(text)
    except DecimalException:  # a number of a million digits
        return Verdict(0.0, UNPARSABLE)
    return Verdict(0.0, NO_ANSWER) if answer is None else equal_or(answer == right)


def choice(reference: Any, text: str) -> Verdict:
    """Compare the letter that an answer chooses. Two letters, and a place of the answer without a letter, are none."""
    right = _letter(str(reference))
    if right is None:
        raise BadReference("is no letter")
    letters = set(_find_letters(answer_text(text) or ""))
    chosen = letters.pop() if len(letters) == 1 else None
    return Verdict(0.0, NO_ANSWER) if chosen is None else equal_or(chosen == right)


def _find_letters(answer: str) -> list[str | None]:
    """Return the letter of each place that may be the answer, from the surest kind of place that occurs."""
    answer = unicodedata.normalize("NFKC", answer[-LONGEST:])
    # 1. Places that are marked as the answer.
    boxed = [match[1] for match in _BOXED_LETTER.finditer(answer)]
    if boxed:
        return [_letter(place) for place in boxed]
    tagged = [match[1] for match in _TAGGED_LETTER.finditer(answer)]
    lines = _lines(_TAG.sub("\n" if tagged else " ", answer))
    marked = [*tagged, *(match[1] for line in lines for match in _MARKED_LETTER.finditer(line))]
    if marked:
        return [_letter(" ".join(_lines(place))) for place in marked]
    # 2. Sentences that state an answer, and lines that are a letter.
    stated = [_stated_letter(line, match) for line in lines if (match := _STATED.search(line)) is not None]
    sentences = [sentence for line in lines for sentence in _SENTENCE.split(line)]
    chosen = [match["letter"].strip("()").upper() for match in map(_CHOOSING.fullmatch, sentences) if match is not None]
    if stated or chosen:
        return [*stated, *chosen]
    # 3. The first or the last line, if no other line looks like a choice.
    choices = {index: letter for index, line in enumerate(lines) if (letter := _letter(line)) is not None}
    return [letter for index, letter in choices.items() if len(choices) == 1 and index in (0, len(lines) - 1)]


def _lines(text: str) -> list[str]:
    """Return the lines of a text as a reader sees them, with single spaces. A heading is part of the line below it."""
    shown = unformatted(_MATH_SIGNS.sub("", _LATEX.sub(r"\1", _LATEX.sub(r"\1", text))))
    lines = "\n".join(line for line in map(" ".join, map(str.split, shown.splitlines())) if line)
    return _HEADING.sub(lambda match: f"{match[1].removesuffix(' is')}: ", lines + "\n").splitlines()


def _stated_letter(line: str, statement: re.Match[str]) -> str | None:
    """Return the letter of a line about the answer; None if its sentence denies it."""
    sentence = _SENTENCE.split(line[: statement.start()])[-1] + (statement["gap"] or "")
    return None if _DENIED.search(sentence) else _letter(statement["place"])


def _letter(text: str) -> str | None:
    """Return the capital letter that a line consists of, with the text of the choice or without it."""
    stripped = _LATEX.sub(r"\1", _LATEX.sub(r"\1", text)).replace("*", "").replace("$", "").strip()
    if len(stripped) <= LONGEST_WRAPPED:
        while len(stripped) > 2 and stripped[0] + stripped[-1] in ("{}", "[]", "``", '""', "''"):
            stripped = stripped[1:-1].strip()
    match = _LETTER.fullmatch(stripped.rstrip("。"))
    if match is None:
        return None
    letter = match[1].upper()
    # The sign before the rest counts: ``B, C`` lists two letters.
    rest = stripped[match.end(1) :] if match["rest"] is not None else ""
    others = {"".join(other).upper() for other in _OTHER_CHOICE.findall(rest)}
    return letter if others <= {letter} and not _DOUBT.search(rest) else None


def exact(reference: Any, text: str) -> Verdict:
    """Compare the whole answer with a text; space and marks of emphasis around it do not count."""
    answer = _composed(answer_text(text) or "")
    if not answer:
        return Verdict(0.0, NO_ANSWER)
    right = _composed(str(reference))
    return equal_or(right in (answer, _without_marks_around(answer)))


def _without_marks_around(answer: str) -> str:
    while (match := _AROUND.fullmatch(answer)) is not None:
        shown = (match["shown"] or match["tagged"] or match["inner"] or match["formula"]).strip()
        # Two marked pieces, ``*a* b *c*``, are not one text with marks around it.
        if not shown or (match["mark"] and match["mark"][0] in shown.strip(match["mark"][0])):
            break
        answer = shown
    return answer


def _composed(text: str) -> str:
    """Return a text whose letters and accents are single characters, however they were typed."""
    return unicodedata.normalize("NFC", text).strip()


def contains(reference: Any, text: str) -> Verdict:
    """Look for a text, or for all texts of a list, as whole words in any case."""
    items = [_as_line(str(item)) for item in (reference if isinstance(reference, list) else [reference])]
    if not all(items):
        raise BadReference("has an empty text")
    answer = _COMMENT.sub(" ", answer_text(text) or "")
    if not answer:
        return Verdict(0.0, NO_ANSWER)
    written = _as_line(answer)
    shown = _as_line(_LATEX.sub(r"\1", without_marks(answer)))
    return equal_or(all(_occurs(item, written if _MARKUP & set(item) else shown) for item in items))


def _as_line(text: str) -> str:
    """Return a text for comparisons: one line, no capitals, one kind of quotation marks, composed accents."""
    return " ".join(_composed(text.translate(_QUOTES)).casefold().split())


def _occurs(item: str, answer: str) -> bool:
    before = r"(?<!\w)" if item[0].isalnum() else ""
    if item[0].isdigit():  # neither 0.14 nor -14 contains 14
        before += r"(?<!\d[.,])(?<!(?<!\w)[-−])"
    # 14.5 does not contain 14, but a sentence may end after it.
    after = r"(?!\w|[.,]\d)" if item[-1].isalnum() else ""
    return re.search(before + re.escape(item) + after, answer) is not None


def regex(reference: Any, text: str) -> Verdict:
    """Search for a regular expression."""
    answer = answer_text(text)
    return equal_or(re.search(str(reference), answer) is not None) if answer else Verdict(0.0, NO_ANSWER)


def json_schema(reference: Any, text: str) -> Verdict:
    """Validate an answer that is JSON, by itself or in its only fenced block, against a JSON schema."""
    import jsonschema
    from referencing import Registry

    schema = reference if isinstance(reference, dict) else _read_schema(str(reference))
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise BadReference(f"is no JSON schema: {error.message}") from None
    answer = answer_text(text)
    if not answer:
        return Verdict(0.0, NO_ANSWER)
    answer = answer.removeprefix("\ufeff").strip()
    blocks = [match["body"] for match in _FENCE.finditer(answer)]
    # Two blocks, or a value next to the block, are two answers.
    if len(blocks) > 1 or (blocks and _VALUE.search(_FENCE.sub("", answer))):
        return Verdict(0.0, NO_ANSWER)
    span = _CODE_SPAN.fullmatch(answer)
    written = blocks[0] if blocks else answer if span is None else span[2]
    try:
        value = json.loads(written, parse_constant=_refuse_constant, object_pairs_hook=_read_object)
    except (ValueError, RecursionError):
        return Verdict(0.0, UNPARSABLE)
    # An empty registry: a reference to another schema must not open a connection.
    return equal_or(kind(schema, registry=Registry(), format_checker=_format_checker()).is_valid(value))


@functools.cache
def _format_checker() -> jsonschema.FormatChecker:
    """Return jsonschema's checker of ``format``, with the formats for which it would need another package."""
    import jsonschema

    checker = jsonschema.FormatChecker()
    checker.checks("date-time", raises=ValueError)(_is_date_time)
    checker.checks("uri")(lambda value: not isinstance(value, str) or _URI.fullmatch(value) is not None)
    return checker


def _is_date_time(value: object) -> bool:
    """Check a time of RFC 3339. Raises ``ValueError`` for a day or an hour that does not exist."""
    if not isinstance(value, str):
        return True
    match = _DATE_TIME.fullmatch(value)
    # Python has no leap seconds, and the fraction of a second may have any number of digits.
    return match is not None and bool(datetime.fromisoformat(match[1].replace(":60", ":59") + (match[2] or "+00:00")))


def _read_schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise BadReference("is no JSON") from None
    if not isinstance(schema, dict):
        raise BadReference("is no JSON schema")
    return schema


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Raises ``ValueError`` for a key that occurs twice: readers disagree about its value."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key occurs twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
