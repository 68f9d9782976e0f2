"""Patches of NLTK."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from align.patches.signatures import private_name


@contextmanager
def without_downloads() -> Iterator[None]:
    """Inside, ``nltk.download`` does nothing.

    Replaces ``nltk.download``, which IFBench's module of checkers calls when it is imported. The patch was written for
    NLTK 3.9.
    """
    download = private_name("nltk", "nltk:download")
    import nltk

    nltk.download = lambda *names, **options: False
    try:
        yield
    finally:
        nltk.download = download
