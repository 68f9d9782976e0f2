"""What of foreign text a message may show: no password, no character that a terminal obeys, no word without end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.errors import StageFailed, UserError, plain_number, printable, redact, shorten


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:geheim@host/v1", "https://***@host/v1"),
        ("https://geheim@host", "https://***@host"),
        ("http://me:ge@h/eim@host:8000/x", "http://***@host:8000/x"),
        ("s3://key:geheim@bucket/prefix is wrong", "s3://***@bucket/prefix is wrong"),
        ("/srv/https:/me:geheim@host/v1: no such file", "/srv/https:/***@host/v1: no such file"),
        ("/srv/https:/geheim@host", "/srv/https:/***@host"),
        ("/srv/me:geheim@host:8000: there is no such file", "/srv/***@host:8000: there is no such file"),
        ("ghcr.io/org/vllm:v0.30@sha256:abc is missing", "ghcr.io/org/vllm:v0.30@sha256:abc is missing"),
        ("PATH=/usr/bin:/opt:/home/me@work/bin", "PATH=/usr/bin:/opt:/home/me@work/bin"),
        ("'/store/sft:lora@3/x'", "'/store/sft:lora@3/x'"),
        ("'me:geheim@host:8000' is no address", "'***@host:8000' is no address"),
        ("https://host/x?api_key=geheim&b=1", "https://host/x?api_key=***&b=1"),
        ("https://host/x?a=1&X-Amz-Signature=geheim", "https://host/x?a=1&X-Amz-Signature=***"),
        ("proxy http://me:geheim@p:1 and http://me:geheim@q:2", "proxy http://***@p:1 and http://***@q:2"),
        ("https://host:8000/v1 refuses", "https://host:8000/v1 refuses"),
        ("write to someone@example.com: it is fine", "write to someone@example.com: it is fine"),
        ("p.yaml: stages.sft.model: found 'a@b'", "p.yaml: stages.sft.model: found 'a@b'"),
    ],
)
def test_addresses_are_shown_without_what_lets_somebody_in(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert str(UserError(text)) == shown
    assert str(StageFailed(text)) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("\u2066isolated\u2069", "\\u2066isolated\\u2069"),
        ("half \ud800", "half \\ud800"),
        ("tag \U000e0041", "tag \\U000e0041"),
        ("one\u2028two\u2029three", "one\\u2028two\\u2029three"),
        ("a\rb\x9b31m\x07\x7f\x00", "a\\x0db\\x9b31m\\x07\\x7f\\x00"),
        ("می\u200cخواهم, 👩\u200d🔬", "می\u200cخواهم, 👩\u200d🔬"),  # Persian and emoji need their joiners
        ("tab\tand\nline, ümlaut, 汉字, 🙂", "tab\tand\nline, ümlaut, 汉字, 🙂"),
    ],
)
def test_characters_that_a_terminal_obeys_or_hides_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(alphabet=st.characters()))
def test_whatever_the_text_it_can_be_printed(text: str) -> None:
    shown = printable(text)
    assert printable(shown) == shown
    shown.encode("utf-8")


def test_words_without_end_are_cut() -> None:
    assert str(UserError("x" * 5000 + " is no folder")) == "x" * 200 + "... (5,000 characters) is no folder"
    assert shorten("short") == "short"


@pytest.mark.parametrize(
    ("number", "text"),
    [(1234567, "1234567"), (2e6, "2000000"), (3, "3"), (-4.0, "-4"), (0.1234567, "0.123457"), (1.5, "1.5"),
     (float("inf"), "inf"), (float("nan"), "nan")],
)  # fmt: skip
def test_whole_numbers_keep_their_digits(number: float, text: str) -> None:
    assert plain_number(number) == text
