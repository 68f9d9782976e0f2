r"""Verifiers that need no package: ``number``, ``choice``, ``exact``, ``contains``, ``regex`` and ``json_schema``.

Each reads the text outside thoughts and returns a ``Verdict``. None of them guesses: a rule that finds two different
answers finds none.
"""

from __future__ import annotations

import json
import re
import unicodedata
from decimal import DecimalException
from typing import Any, NoReturn

from align.data.final_answers import answer_text, final_number
from align.verifiers.verdict import NO_ANSWER, UNPARSABLE, BadReference, Verdict, equal_or

_FENCED = re.compile(r"```[^\S\n]*(?:json)?[^\S\n]*\n(.*?)\n[^\S\n]*```", re.DOTALL | re.IGNORECASE)
_VALUE = re.compile(r"^\s*[\[{]", re.MULTILINE)
"""Beginning of an object or a list of JSON."""
_BOXED_LETTER = re.compile(r"\\boxed\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_ANSWER_LINE = re.compile(r"\banswer\b(?:\s+is\b)?[ \t]*:?[ \t]*([^\n]*)", re.IGNORECASE)
_LATEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
_LETTER = re.compile(
    r"(?:(?:option|choice)\s+)?\(?([A-Za-z])\)?(?:(?:[.):]|\s+[-–—]\s|,?\s+(?:because|since)\b)[^\S\n]*(?P<rest>.*)|\.?)",
    re.DOTALL | re.IGNORECASE,
)
"""A letter in any of the usual forms: ``B``, ``(B)``, ``B.``, ``B) Paris``, ``option B``, ``B, because``."""
_OTHER_CHOICE = re.compile(
    r"(?:\b(?:or|and)\b|[,/&])\s*\(?([A-Z])\)?(?![\w'])|(?<![\w'])(?:([A-Z])[):]|([A-Z])\.(?=\s+\w))"
)
_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
"""A comment of HTML, which readers do not see."""


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
    r"""Compare the letter that an answer chooses: in ``\boxed{}``, after "answer is" or "answer:", or by itself."""
    right = _letter(str(reference))
    if right is None:
        raise BadReference("is no letter")
    answer = unicodedata.normalize("NFKC", _TAG.sub(" ", answer_text(text) or "")).strip()
    if not answer:
        return Verdict(0.0, NO_ANSWER)
    places = [match[1] for match in _BOXED_LETTER.finditer(answer)] or [
        match[1] for match in _ANSWER_LINE.finditer(answer)
    ]
    letters = {_letter(place) for place in places or [answer]}
    # Two letters, and a place without a letter, are no answer.
    chosen = letters.pop() if len(letters) == 1 else None
    return Verdict(0.0, NO_ANSWER) if chosen is None else equal_or(chosen == right)


def _letter(text: str) -> str | None:
    """Return the capital letter that a text consists of, with the text of the choice or without it."""
    stripped = _LATEX.sub(r"\1", text).replace("*", "").replace("$", "").strip()
    match = _LETTER.fullmatch(stripped)
    if match is None:
        return None
    letter = match[1].upper()
    others = {"".join(filter(None, other)) for other in _OTHER_CHOICE.findall(match["rest"] or "")}
    return letter if others <= {letter} else None


def exact(reference: Any, text: str) -> Verdict:
    """Compare the whole answer with a text; only space around it does not count."""
    answer = answer_text(text)
    return equal_or(answer == str(reference).strip()) if answer else Verdict(0.0, NO_ANSWER)


def contains(reference: Any, text: str) -> Verdict:
    """Look for a text, or for all texts of a list, as whole words in any case."""
    items = [str(item).strip() for item in (reference if isinstance(reference, list) else [reference])]
    if not all(items):
        raise BadReference("has an empty text")
    answer = _COMMENT.sub(" ", answer_text(text) or "")
    if not answer:
        return Verdict(0.0, NO_ANSWER)
    return equal_or(all(_occurs(item.casefold(), answer.casefold()) for item in items))


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
    blocks = _FENCED.findall(answer)
    # Two blocks, or a value next to the block, are two answers.
    if len(blocks) > 1 or (blocks and _VALUE.search(_FENCED.sub("", answer))):
        return Verdict(0.0, NO_ANSWER)
    try:
        value = json.loads(
            blocks[0] if blocks else answer, parse_constant=_refuse_constant, object_pairs_hook=_read_object
        )
    except (ValueError, RecursionError):
        return Verdict(0.0, UNPARSABLE)
    # An empty registry: a reference to another schema must not open a connection.
    return equal_or(kind(schema, registry=Registry()).is_valid(value))


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
