"""Settings of the step ``filter``: one block or field for each filter, all of them optional.

Filters run in the order of ``FilterStep``'s fields. A row that several filters would drop counts under the first.
Filters that change texts (``urls: strip``, ``personal_data: {action: mask}``) come before filters that measure them.
docs/data_filters.md has the defaults, their sources, and how often each is wrong on real data.
"""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from align.config.base import Config
from align.config.user_paths import NameOrPath

Sides = Literal["chosen", "both"]
"""Replies that a filter looks at: those that a model is to imitate, or all."""
Urls = Literal["keep", "drop", "strip"]
PersonalDataKind = Literal["email", "phone", "ip", "card", "iban"]
BoilerplateKind = Literal["refusal", "self_reference", "developer"]

# ISO 639 codes that lid.176 knows.
LANGUAGES = frozenset(
    """
    af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da
    de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id
    ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn
    mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue
    sa sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo
    wa war wuu xal xmf yi yo yue zh
    """.split()  # noqa: SIM905  (a list of 176 strings is no easier to read)
)


class Turns(Config):
    """Bounds on the messages of a prompt, the system message included; 1 is a single question."""

    min: int | None = Field(None, ge=1)
    """Fewest messages of a prompt that is kept."""
    max: int | None = Field(None, ge=1)
    """Most messages of a prompt that is kept."""

    @model_validator(mode="after")
    def _check_has_bounds(self) -> Self:
        _check_bounds(self, ("",))
        return self


class Lengths(Config):
    """Bounds on lengths, all inclusive. A prompt counts with all its turns.

    Every reply counts, including rejected replies, because all of them are trained on. The longest reply is compared
    with a maximum, the shortest with a minimum.
    """

    min: int | None = Field(None, ge=1)
    """Least of prompt plus longest reply."""
    max: int | None = Field(None, ge=1)
    """Most of prompt plus longest reply."""
    min_prompt: int | None = Field(None, ge=1)
    """Shortest prompt, all turns together."""
    max_prompt: int | None = Field(None, ge=1)
    """Longest prompt, all turns together."""
    min_reply: int | None = Field(None, ge=1)
    """Shortest reply."""
    max_reply: int | None = Field(None, ge=1)
    """Longest reply."""

    @model_validator(mode="after")
    def _check_has_bounds(self) -> Self:
        _check_bounds(self, ("", "_prompt", "_reply"))
        return self


def _check_bounds(config: Config, suffixes: tuple[str, ...]) -> None:
    """Raise ``ValueError`` if no bound is set, or a minimum is above its maximum."""
    pairs = [(f"min{suffix}", f"max{suffix}") for suffix in suffixes]
    bounds = {name: getattr(config, name) for pair in pairs for name in pair}
    if all(bound is None for bound in bounds.values()):
        raise ValueError(f"no bound is given; set one of {', '.join(bounds)}")
    for low, high in pairs:
        if bounds[low] is not None and bounds[high] is not None and bounds[low] > bounds[high]:
            raise ValueError(f"{low} ({bounds[low]}) is more than {high} ({bounds[high]}), so nothing passes")


class Chars(Lengths):
    """Lengths in characters; about four to a token in English."""


class Words(Lengths):
    """Lengths in words separated by white space: of no use for Chinese, Japanese or Thai."""


class Tokens(Lengths):
    """Lengths in tokens of only the texts; a chat template adds four to ten tokens a turn."""

    identified = frozenset({"tokenizer"})

    tokenizer: NameOrPath
    """Folder with a tokenizer, relative to the recipe's, or its name on the Hub (then with ``revision``)."""
    revision: str | None = Field(None, pattern=r"^[0-9a-f]{40}$")
    """Commit of the tokenizer on the Hub, 40 hexadecimal digits."""


class PersonalData(Config):
    """Find personal data in the prompt and all replies of a row, also rejected replies, because all are published."""

    action: Literal["drop", "mask"] = "drop"
    """Drop the row, or ``mask`` the data: [email address] and similar labels replace it."""
    kinds: list[PersonalDataKind] = Field(["email", "phone", "ip", "card", "iban"], min_length=1)
    """Kinds of data to look for."""
    regions: list[str] = Field(["US"], min_length=1)
    """Countries (ISO 3166, two letters) whose national format phone numbers without + may have."""

    @field_validator("regions")
    @classmethod
    def _check_regions(cls, regions: list[str]) -> list[str]:
        for region in regions:
            if not re.fullmatch("[A-Z]{2}", region):
                raise ValueError(f"'{region}' is not a country code; write two capital letters, like US or DE")
        return regions


class Boilerplate(Config):
    """Drop rows whose reply holds stock phrases of chat models."""

    kinds: list[BoilerplateKind] = Field(["refusal", "self_reference", "developer"])
    """``refusal``: the reply starts by declining. ``self_reference``: as an AI language model, my knowledge cutoff …
    ``developer``: I am ChatGPT, trained by OpenAI."""
    patterns: list[str] = Field([])
    """Regular expressions of your own, searched for anywhere in a reply; case does not matter."""

    @field_validator("patterns")
    @classmethod
    def _check_patterns(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
        return patterns


class Repetition(Config):
    """Drop rows whose reply repeats itself."""

    scale: float = Field(2.0, gt=0, le=3)
    """Factor on Gopher's limits. At 1 they suit web pages and drop one worked sum in ten (gsm8k), because replies are
    short and stay on their subject; at 2 they drop a fourteenth of that and detect nine in ten looping phrases."""
    min_words: int = Field(50, ge=1)
    """Shares are measured in texts with at least this many words, as Gopher's documents have. In a shorter text a
    refrain, or the word that was asked about, is a large share."""
    consecutive_sentences: int | None = Field(4, ge=2)
    """Limit on repeats of a sentence in direct succession, in a text of any length; doubled for a sentence with figures
    or signs of mathematics."""
    same_sentence: int | None = Field(10, ge=2)
    """Limit on repeats of a sentence anywhere in the text, doubled likewise."""


class Language(Config):
    """Keep rows in some languages."""

    keep: list[str] = Field(min_length=1)
    """ISO 639 codes of the languages to keep: en, de, zh …"""
    min_confidence: float = Field(0.6, gt=0, le=1)
    """A row is dropped only when another language is detected with at least this confidence."""
    min_letters: int = Field(40, ge=1)
    """Texts with fewer letters (without code, numbers and addresses) are too short to judge and stay."""
    over: Literal["whole", "prompt", "reply"] = "whole"
    """Text that is judged: the user's turns and the replies together, or only the turns or the replies. ``whole`` keeps
    most translation tasks."""

    @model_validator(mode="after")
    def _check_languages(self) -> Self:
        for code in self.keep:
            if code not in LANGUAGES:
                raise ValueError(
                    f"'{code}' is not a language code that the model knows; write ISO 639 codes, like en or de"
                )
        return self


class FilterStep(Config):
    """Drop rows. At least one filter must be set; the step may appear in a recipe several times."""

    identified = frozenset({"where"})

    type: Literal["filter"]
    sides: Sides = "chosen"
    """Replies that the filters on quality (language, repetition, boilerplate, urls) look at. ``chosen``: those that a
    model is to imitate, since a refusal or a loop makes a good rejected reply. ``both``: every reply. Lengths, personal
    data and placeholders always count in both, since both are trained on and published."""
    turns: Turns | None = None
    """Messages in a prompt: {max: 1} keeps single questions."""
    urls: Urls = "keep"
    """``drop`` rows with an address in a user's turn or reply, or ``strip`` addresses from every text."""
    personal_data: PersonalData | None = None
    """E-mail and IP addresses, phone, card and account numbers: drop the row or mask them."""
    chars: Chars | None = None
    """Lengths in characters."""
    words: Words | None = None
    """Lengths in words."""
    placeholders: bool = False
    """Drop rows with an unfilled {{placeholder}} outside code."""
    keywords: list[str] | Literal["self_instruct"] | None = Field(None, min_length=1)
    """Drop rows with any of these words in a user's turn; ``self_instruct`` is that paper's list (image, graph …)."""
    boilerplate: Boilerplate | None = None
    """Refusals, "as an AI language model", and models that name their makers. English."""
    repetition: Repetition | None = None
    """Replies that repeat themselves."""
    language: Language | None = None
    """Keep some languages."""
    tokens: Tokens | None = None
    """Lengths in tokens of a given tokenizer."""
    where: str | None = Field(None, pattern=r"^[\w.]+:[\w.]+$")
    """A function of your own as package.module:function. It gets each row and returns True or None to keep it, False or
    a reason to drop it."""

    @model_validator(mode="after")
    def _check_sets_a_filter(self) -> Self:
        if isinstance(self.keywords, list) and not all(word.strip() for word in self.keywords):
            raise ValueError("keywords holds an empty word, which every row has")
        # ``sides`` only sets the texts that filters read, so by itself it does not filter.
        names = [name for name in type(self).model_fields if name not in ("type", "sides")]
        if all(getattr(self, name) in (None, False, "keep") for name in names):
            raise ValueError(f"no filter is set; set one of {', '.join(names)}")
        return self
