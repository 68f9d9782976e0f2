"""NLTK's sentence model without a download."""

from __future__ import annotations

import sys

import nltk
import pytest

from align.verifiers.instructions import ensure_punkt
from tests.support.refusals import Refused


def test_nltk_reads_the_tables_that_the_package_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    punkt = pytest.importorskip("punkt")
    from nltk.tokenize.punkt import PunktTokenizer

    monkeypatch.setattr(nltk.data, "path", [])
    ensure_punkt()
    ensure_punkt()
    assert len(nltk.data.path) == 1, "the second call finds what the first one wrote"
    punkt_tokenizer = PunktTokenizer("english")
    model = punkt.load_model("english")
    for table in ("abbrev_types", "sent_starters", "collocations", "ortho_context"):
        assert getattr(punkt_tokenizer._params, table) == getattr(model, table)
    assert punkt_tokenizer.tokenize("Dr. Smith lives in the U.S. today. He is 3.5 ft. tall! Is he?") == [
        "Dr. Smith lives in the U.S. today.",
        "He is 3.5 ft. tall!",
        "Is he?",
    ]


def test_without_the_model_the_remedy_is_named(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setitem(sys.modules, "punkt", None)
    refused(ensure_punkt)
    assert nltk.data.path == []
