"""Files next to the page: no cell is a formula, numbers stay numbers, names are safe, old files go."""

import csv
import io
import json
import xml.etree.ElementTree as ET

import pytest

from align.report.page.assets import AssetWriter, Table, as_csv, as_json, file_name
from align.report.page.panels import dots
from align.report.run.run_report import write_report
from tests.support.report.example_run import FORMULA, HOSTILE


def table(*values):
    return Table("t", "T", {"x": "X"}, [{"x": value} for value in values])


def cells(text):
    return [row[0] for row in csv.reader(io.StringIO(text, newline=""))][1:]


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠"])
def test_a_text_that_a_spreadsheet_would_run_gets_a_quote(begin):
    assert cells(as_csv(table(f'{begin}HYPERLINK("x","y")'))) == [f'\'{begin}HYPERLINK("x","y")']
    rows = json.loads(as_json(table(f"{begin}1+1")))["rows"]
    assert rows == [{"x": f"{begin}1+1"}]  # JSON is not run: as it is


def test_numbers_stay_numbers():
    assert cells(as_csv(table(-1.5, -2, 0, True, None, float("nan"), "a-b", 1e-7))) == [
        "-1.5", "-2", "0", "true", "", "", "a-b", "1e-07",
    ]  # fmt: skip
    assert json.loads(as_json(table(-1.5, None, float("inf"), False)))["rows"] == [
        {"x": -1.5}, {"x": None}, {"x": None}, {"x": False},
    ]  # fmt: skip


def test_commas_quotes_lines_and_hidden_characters():
    assert cells(as_csv(table('a,"b"\nc', "\x1b[31m\ud800", "\r=1"))) == ['a,"b"\nc', "\\x1b[31m\\ud800", "\\x0d=1"]


@pytest.mark.parametrize(
    ("text", "name"),
    [("rewards/margins", "rewards-margins"), ("../../etc/passwd", "etc-passwd"), ("", "unnamed"), ("…", "unnamed"),
     (".hidden", "hidden"), ("A b", "a-b"), ("x" * 200, "x" * 80)],
)  # fmt: skip
def test_file_names(text, name):
    assert file_name(text) == name


def test_equal_names_get_numbers_and_an_earlier_page_s_files_go(tmp_path):
    svg = dots([("a", {"value": 0.5, "low": 0.4, "high": 0.6})], "x", "label")
    first = AssetWriter()
    names = [
        first.add_figure("a/b", svg).name,
        first.add_figure("a b", svg).name,
    ]
    assert names == ["a-b", "a-b-2"]
    first.add_table("licenses", [])
    first.write(tmp_path)
    (tmp_path / "figures" / "mine.svg").write_text("kept")
    second = AssetWriter()
    second.add_figure("other", svg)
    second.write(tmp_path)
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["index.json", "mine.svg", "other.svg"]
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["index.json"]


@pytest.fixture(scope="module")
def written(full_run, tmp_path_factory):
    """The folder of a full run's page."""
    artifacts, card = full_run
    return write_report(artifacts, card, tmp_path_factory.mktemp("written") / "report.html").parent


def test_figures_and_tables_of_a_full_page_open(written):
    page = (written / "report.html").read_text(encoding="utf-8")
    figure_files = sorted((written / "figures").glob("*.svg"))
    assert len(figure_files) == page.count('class="plot"')
    for path in figure_files:
        root = ET.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("width", "").endswith("pt")
    names = {path.stem for path in (written / "tables").glob("*.csv")}
    assert names == {
        "scorecard", "differences", "sources", "gates", "win-rates", "reward-models", "stages", "ledger", "dropped",
        "licenses",
    }  # fmt: skip
    for name in names:
        with (written / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        parsed = json.loads((written / "tables" / f"{name}.json").read_text(encoding="utf-8"))
        assert len(rows) == len(parsed["rows"]) > 0, name
        assert list(rows[0]) == list(parsed["columns"]), name


def test_tables_have_the_scorecard_s_own_numbers(full_run, written):
    card = full_run[1]

    def rows(name):
        return json.loads((written / "tables" / f"{name}.json").read_text(encoding="utf-8"))["rows"]

    gold = next(row for row in rows("scorecard") if (row["metric"], row["system"]) == ("gold", "sft"))
    assert gold["value"] == card["estimates"]["sft"]["gold"]["value"]
    assert len(rows("differences")) == len(card["differences"])
    assert [row["cost"] for row in rows("stages") if row["stage"] == "answers"] == [0.25]
    with (written / "tables" / "dropped.csv").open(encoding="utf-8", newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    assert f"'{FORMULA}" in reasons
    assert FORMULA not in reasons
    texts = [path.read_text(encoding="utf-8") for path in (written / "tables").iterdir()]
    assert not any("a private text" in text for text in texts)
    assert HOSTILE[-6:] not in "".join(texts)
