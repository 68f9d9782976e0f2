"""The index of all runs of a store."""

from __future__ import annotations

from pathlib import Path

from align.report.run.run_index import IndexedRun, write_index

HOSTILE = "<script>alert(1)</script>\x1b"


def test_index_escapes_what_stages_say(tmp_path: Path) -> None:
    runs = [IndexedRun("old", 0.0, "2 done", []), IndexedRun("new", 90.0, "1 failed", [f"ppo failed: {HOSTILE}"])]
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
