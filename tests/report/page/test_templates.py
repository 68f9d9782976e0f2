"""Hidden characters are spelled out on pages; JSON cannot end its script element; the index of all runs."""

import json
from pathlib import Path

from markupsafe import Markup

from align.report.page.templates import IndexedRun, finalize, script_json, write_index


def test_script_json_holds_no_markup_and_reads_back():
    value = {"</script><b>": ["<!--", "&amp;", "\u2028", 1.5, None]}
    text = script_json(value)
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"</script><b>": ["<!--", "&amp;", "\\u2028", 1.5, None]}


def test_finalize_leaves_markup_alone():
    assert finalize(Markup("<b>\x01</b>")) == "<b>\x01</b>"
    assert finalize("\x01") == "\\x01"
    assert finalize(3) == 3


def test_index_escapes_what_stages_say(tmp_path: Path) -> None:
    failure = "ppo failed: <script>alert(1)</script>\x1b"
    runs = [IndexedRun("old", 0.0, "2 done", []), IndexedRun("new", 90.0, "1 failed", [failure])]
    (tmp_path / "reports" / "old").mkdir(parents=True)
    (tmp_path / "reports" / "old" / "report.html").touch()
    index = write_index(runs, tmp_path, tmp_path / "reports", "report.html")
    html = index.read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b" in html
    assert html.index("new") < html.index('<a href="old/report.html">old</a>')
    assert "1970-01-01 00:01" in html


def test_index_quotes_names_in_links(tmp_path: Path) -> None:
    (tmp_path / "a b#c").mkdir()
    (tmp_path / "a b#c" / "report.html").touch()
    index = write_index([IndexedRun("a b#c", 0.0, "1 done")], tmp_path, tmp_path, "report.html")
    assert 'href="a%20b%23c/report.html"' in index.read_text(encoding="utf-8")
