"""The license of a mixture of datasets, from the licenses of its parts. Torch-free.

A license is represented by the obligations that it puts on whoever passes the data on. A mixture has the obligations of
all its parts. If one part's license has every obligation of the others, it is the mixture's license; otherwise no
known license fits, and a person must read all of them. This is bookkeeping, not legal advice. Excluded: the terms of
use of a language model for its outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

UNKNOWN = "unknown"
OTHER = "other"

_NONE: frozenset[str] = frozenset()
_CREDIT = frozenset({"credit"})
_NC, _ND = frozenset({"credit", "non-commercial"}), frozenset({"credit", "no derivatives"})
_CC_SA = frozenset({"credit", "alike: CC BY-SA"})
# NonCommercial's ShareAlike is a separate family: neither license may be exchanged for the other.
_NC_SA = frozenset({"credit", "non-commercial", "alike: CC BY-NC-SA"})
_NC_ND = _NC | _ND
_CC = ("1.0", "2.0", "2.5", "3.0", "4.0")

OBLIGATIONS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("cc0-1.0", "pddl", "unlicense", "wtfpl", "0bsd"), _NONE),
    **dict.fromkeys(
        (
            "apache-2.0",
            "mit",
            "bsd",
            "bsd-2-clause",
            "bsd-3-clause",
            "isc",
            "zlib",
            "afl-3.0",
            "artistic-2.0",
            "bsl-1.0",
            "odc-by",
            "cdla-permissive-1.0",
            "cdla-permissive-2.0",
            "etalab-2.0",
            "ms-pl",
            "ncsa",
        ),
        _CREDIT,
    ),
    "cc": _CREDIT,
    **{f"cc-by-{version}": _CREDIT for version in _CC},
    **{f"cc-by-sa-{version}": _CC_SA for version in _CC},
    **{f"cc-by-nc-{version}": _NC for version in _CC},
    **{f"cc-by-nd-{version}": _ND for version in _CC},
    **{f"cc-by-nc-sa-{version}": _NC_SA for version in _CC},
    **{f"cc-by-nc-nd-{version}": _NC_ND for version in _CC},
    **{name: _CREDIT | {"alike: GPL"} for name in ("gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl", "lgpl-3.0")},
    **{name: _CREDIT | {f"alike: {name}"} for name in ("odbl", "gfdl", "mpl-2.0", "cdla-sharing-1.0", "eupl-1.2")},
}
"""Obligations of each license. The names are the Hub's, which are mostly lower-case SPDX names."""

ALIASES = {
    "apache": "apache-2.0",
    "apache2": "apache-2.0",
    "mit license": "mit",
    "cc0": "cc0-1.0",
    "public domain": "cc0-1.0",
    "odc-by-1.0": "odc-by",
    "odbl-1.0": "odbl",
    "pddl-1.0": "pddl",
    "none": UNKNOWN,
    "": UNKNOWN,
}


@dataclass(frozen=True)
class License:
    """The license on a card: the Hub's ``license`` (several if they have the same obligations), and the reason."""

    names: tuple[str, ...]
    """Hub names; ``("unknown",)`` and ``("other",)`` if no single license can be named."""
    reason: str
    """One sentence."""
    concerns: tuple[str, ...] = ()
    """Points to consider before passing the data on; empty where credit is the only obligation."""


def normalize(name: str | None) -> str:
    """Return a license's Hub name: ``CC BY-SA 3.0`` is ``cc-by-sa-3.0``, None is ``unknown``; others stay unchanged."""
    text = " ".join((name or "").strip().lower().split())
    text = ALIASES.get(text, text)
    if text in OBLIGATIONS or text in (UNKNOWN, OTHER):
        return text
    # Licenses are often written with blanks or underscores.
    dashed = text.replace(" ", "-").replace("_", "-")
    dashed = ALIASES.get(dashed, dashed)
    return dashed if dashed in OBLIGATIONS else text


def mixture_license(licenses: Iterable[str | None]) -> License:
    """Return the license of a dataset whose parts have ``licenses`` (None or empty where unknown)."""
    names = sorted({normalize(name) for name in licenses})
    named = [name for name in names if name in OBLIGATIONS]
    concerns = tuple(concern for name in names if (concern := _concern(name)))
    # One unknown license makes the mixture's unknown, however free the others are.
    if not names or UNKNOWN in names:
        return License(
            (UNKNOWN,), "The license of at least one source is not known, so neither is this dataset's.", concerns
        )
    if len(named) < len(names):
        unusual = ", ".join(name for name in names if name not in OBLIGATIONS)
        return License((OTHER,), f"{unusual}: not a license with known terms, so all sources' terms apply.", concerns)
    # A license that has all obligations of all parts can cover the mixture.
    obligations = frozenset[str]().union(*(OBLIGATIONS[name] for name in named))
    strictest = tuple(name for name in named if OBLIGATIONS[name] == obligations)
    if not strictest:
        text = ", ".join(named)
        return License(
            (OTHER,),
            f"No one of {text} has every obligation of the others, so all sources' terms apply.",
            (*concerns, "the sources' licenses do not fit under one of them"),
        )
    reason = "Every source has this license." if len(names) == 1 else "The strictest among the sources' licenses."
    return License(strictest, reason, concerns)


def _concern(name: str) -> str:
    """Return in a few words what may forbid passing on data of this license; empty when nothing does."""
    if name == UNKNOWN:
        return "a source's license is not known"
    if name not in OBLIGATIONS:
        return f"'{name}' is not a license with known terms"
    obligations = OBLIGATIONS[name]
    if "no derivatives" in obligations:
        return f"{name} forbids passing on changed versions, and a build is one"
    return f"{name} forbids commercial use" if "non-commercial" in obligations else ""
