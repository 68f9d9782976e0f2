"""Filter by personal data that has a checkable form: e-mail addresses, phone, card and account numbers, IP addresses.

Candidates are found by pattern and then checked: phone numbers by phonenumbers (Google's numbering plans), accounts by
python-stdnum (country, length, check digits), cards by issuer and Luhn's digit, addresses by ipaddress. What is
reserved for examples (example.com, 555 numbers, private networks) is nobody's. Leaves out names and places, which take
a model and are wrong too often to drop rows for; docs/decisions/0012 says what was weighed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from align.config.base import Config
from align.data.rows import Dropped, Row
from align.data.steps.base import RowStep, StepContext
from align.data.steps.texts import change_texts, prompt_texts, reply_texts

Kind = Literal["email", "phone", "ip", "card", "iban"]

NAMES: dict[str, str] = {
    "email": "email address", "phone": "phone number", "ip": "IP address", "card": "card number", "iban": "IBAN"
}  # fmt: skip


class PersonalData(Config):
    """Find personal data in every text of a row: prompt, replies, rejected ones too, since all of it is published."""

    action: Literal["drop", "mask"] = "drop"
    """``mask`` writes [email address] and the like in its place."""
    kinds: list[Kind] = Field(["email", "phone", "ip", "card", "iban"], min_length=1)
    """What is looked for."""
    regions: list[str] = Field(["US"], min_length=1)
    """Countries (ISO 3166, two letters) in whose way phone numbers without + may be written."""

    @field_validator("regions")
    @classmethod
    def _known(cls, regions: list[str]) -> list[str]:
        for region in regions:
            if not re.fullmatch("[A-Z]{2}", region):
                raise ValueError(f"'{region}' is no country code; write two capital letters, like US or DE")
        return regions

    def identities(self, base: Path) -> dict[str, str]:
        """Versions of the packages whose tables decide."""
        return {name: metadata.version(name) for name in ("phonenumbers", "python-stdnum")}

    def start(self, context: StepContext) -> RowStep:
        """The filter itself."""
        return _PersonalData(self)


Span = tuple[int, int]
Finder = Callable[[str], Iterator[Span]]

_EMAIL = re.compile(
    r"(?<![\w.%+/:-])[A-Za-z0-9][\w.%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w@-])", re.ASCII
)
_EXAMPLE = re.compile(
    r"@(?:[\w-]+\.)*(?:example(?:-\w+)?\.\w+|example|test|invalid|localhost|domain\.com|email\.com)$", re.IGNORECASE
)


def find_emails(text: str) -> Iterator[Span]:
    """E-mail addresses whose domain is not one for examples (RFC 2606)."""
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
    """Finds phone numbers that the numbering plan of their country or of one of ``regions`` knows."""
    import phonenumbers

    def is_number(candidate: str) -> bool:
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
        for match in _PHONE.finditer(text):
            if 9 <= sum(map(str.isdigit, match[0])) <= 15 and is_number(match[0]):
                yield match.span()

    return find


def _is_fictional(number: object) -> bool:
    """North America keeps 555-0100 to 555-0199 of every area for stories, and no 555 number is a person's."""
    digits = str(number.national_number)  # type: ignore[attr-defined]
    return number.country_code == 1 and digits[3:6] == "555"  # type: ignore[attr-defined]


_IPV4 = re.compile(r"(?<![\w.+-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-])(?!\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){0,6}(?![\w:])")
_VERSION = re.compile(r"(?:\bv|version|release|build|section|chapter|firmware)\W{0,3}$", re.IGNORECASE)
_RESOLVERS = {"8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9"}


def find_ips(text: str) -> Iterator[Span]:
    """Addresses of the public Internet, but for the resolvers that everyone names; not what follows "version"."""
    for pattern, mark in ((_IPV4, "."), (_IPV6, ":")):
        for match in pattern.finditer(text) if mark in text else ():
            try:
                address = ipaddress.ip_address(match[0])
            except ValueError:
                continue
            named = _VERSION.search(text, max(0, match.start() - 12), match.start())
            if address.is_global and not address.is_multicast and match[0] not in _RESOLVERS and not named:
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
    """Numbers of payment cards: an issuer's range, its length, and Luhn's check digit."""
    from stdnum import luhn

    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if _ISSUER.fullmatch(digits) and luhn.is_valid(digits):
            yield match.span()


_IBAN = re.compile(r"(?<![\w-])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![\w-])")


def find_ibans(text: str) -> Iterator[Span]:
    """Account numbers: a country of the register, its length and structure, and the check digits; any bank's."""
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


class _PersonalData:
    def __init__(self, config: PersonalData) -> None:
        every: dict[str, Finder] = {
            "email": find_emails,
            "iban": find_ibans,
            "card": find_cards,
            "ip": find_ips,
            "phone": phone_finder(config.regions),
        }
        self._finders = [(kind, finder) for kind, finder in every.items() if kind in config.kinds]
        self._mask = config.action == "mask"

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        return [change_texts(row, self._masked) if self._mask else self._judge(row) or row for row in rows]

    def _finds(self, text: str) -> Iterator[tuple[str, Span]]:
        digits = bool(_DIGITS.search(text))
        for kind, finder in self._finders:
            if digits or kind in ("email", "ip"):
                for span in finder(text):
                    yield kind, span

    def _judge(self, row: Row) -> Dropped | None:
        for field, text in (*prompt_texts(row), *reply_texts(row, "both")):
            for kind, (start, end) in self._finds(text):
                # The find itself is not written into the ledger, which is published: a hint has to do.
                hint = text[start : start + 3] + "…" + text[end - 2 : end]
                return Dropped(f"filter: personal data ({kind})", {"in": field, "excerpt": hint})
        return None

    def _masked(self, text: str) -> str:
        found = sorted((start, end, kind) for kind, (start, end) in self._finds(text))
        parts: list[str] = []
        at = 0
        for start, end, kind in found:
            if start >= at:
                parts += [text[at:start], f"[{NAMES[kind]}]"]
                at = end
        return "".join([*parts, text[at:]]) if parts else text
