"""Hidden characters are spelled out; JSON cannot end its script element."""

import json

import pytest
from markupsafe import Markup

from align.report.escape import finalize, script_json, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("\x1b[31mred\x00", "\\x1b[31mred\\x00"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("a\u2028b\ud800", "a\\u2028b\\ud800"),
        ("\U000e0041tag", "\\U000e0041tag"),
        ("naïve 漢字 🙂", "naïve 漢字 🙂"),
        ("می‌خواهم", "می‌خواهم"),  # Persian needs its joiner
    ],
)
def test_visible(text, shown):
    assert visible(text) == shown
    visible(text).encode("utf-8")


def test_script_json_holds_no_markup_and_reads_back():
    value = {"</script><b>": ["<!--", "&amp;", "\u2028", 1.5, None]}
    text = script_json(value)
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"</script><b>": ["<!--", "&amp;", "\\u2028", 1.5, None]}


def test_finalize_leaves_markup_alone():
    assert finalize(Markup("<b>\x01</b>")) == "<b>\x01</b>"
    assert finalize("\x01") == "\\x01"
    assert finalize(3) == 3
