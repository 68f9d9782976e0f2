"""``tools/check_style.py`` counts places and fails above a cap."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import check_style


def test_idiom_is_counted_in_any_case() -> None:
    texts = [("a.py:1", "Nothing is read.  It reads\nnothing."), ("b.py:2", "noting")]
    assert len(list(check_style.idiom_places("nobody, nothing", texts))) == 2
    assert list(check_style.idiom_places("another count", texts)) == []


def test_count_above_cap_fails() -> None:
    name = "functions over 60 lines"
    places = {count: [] for count in check_style.CAPS} | {name: ["place"] * check_style.CAPS[name]}
    assert not check_style.report(places, [], [])[1]
    places[name].append("one more")
    assert check_style.report(places, [], [])[1]


def test_rate_above_cap_fails() -> None:
    places = {count: [] for count in check_style.CAPS}
    text = "words " * 5_000
    assert not check_style.report(places, [("a.py:1", text)], [])[1]
    assert check_style.report(places, [("a.py:1", text + "beside beside")], [])[1]


def test_long_function_and_question_are_noticed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_style, "ROOT", tmp_path)
    file = tmp_path / "module.py"
    file.write_text('"""What it does."""\ndef long():\n' + "    x = 1\n" * 60 + "# a comment\n")
    places: check_style.Places = check_style.defaultdict(list)
    assert [text for _, text in check_style.read_source(file, places)] == ["What it does.", "a comment"]
    assert places["functions over 60 lines"] == ["module.py:2: long"]
    assert len(places["docstrings that begin with a question word"]) == 1


def test_code_lines_have_no_docstrings_and_comments() -> None:
    source = '"""A module.\n\nOf two paragraphs.\n"""\n\n# a comment\nX = """a\nb"""\n"""Its meaning."""\n'
    assert check_style.code_lines(source) == 2


def test_size_above_its_cap_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small tree; ``make check`` measures this one."""
    monkeypatch.setattr(check_style, "ROOT", tmp_path)
    for name, text in {"align/a.py": "x = 1\n", "tests/test_a.py": "x = 1\ny = 2\n", "docs/data.md": "a b c\n"}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    sizes = check_style.measure_sizes()
    assert set(sizes) == set(check_style.SIZES)
    assert [sizes[f"lines of {name}"] for name in ("core code", "extensions' code", "tests' code")] == [1, 0, 2]
    assert sizes["words of documents"] == 3
    assert check_style.main([]) == 0
    monkeypatch.setattr(check_style, "measure_sizes", lambda: sizes | {"words of documents": 10**7})
    assert check_style.main([]) == 1
    assert "words of documents" in capsys.readouterr().out


def test_circle_of_late_and_type_only_imports_is_found(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_style, "ROOT", tmp_path)
    contents = {
        "pkg/__init__.py": "",
        "pkg/first.py": "if TYPE_CHECKING:\n    from pkg.second import name\n",
        "pkg/second.py": "def read():\n    import pkg.third\n",
        "pkg/third.py": "import json\nfrom pkg import first\n",
        "pkg/user.py": "from pkg import first, second\n",
    }
    (tmp_path / "pkg").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    imports = check_style.read_imports([tmp_path / name for name in contents])
    assert imports["pkg.user"] == {"pkg.first", "pkg.second"}
    assert imports["pkg.third"] == {"pkg.first"}
    assert check_style.find_circles(imports) == ["pkg.first <-> pkg.second <-> pkg.third"]
    imports["pkg.third"].clear()
    assert check_style.find_circles(imports) == []


def test_circle_above_cap_fails() -> None:
    places = {count: [] for count in check_style.CAPS}
    places["circles of imports"] = check_style.find_circles({"a": {"b"}, "b": {"a"}})
    assert check_style.report(places, [], [])[1]
