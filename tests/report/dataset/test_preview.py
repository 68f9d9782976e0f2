"""The preview page of builds laid out by hand, read as HTML and in a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from align.data.rows import assistant, user
from align.models.built_in import make_tiny_tokenizer
from align.report.dataset.build_summary import (
    EDGES,
    MAX_MEMBERS,
    SAMPLES_PER_SOURCE,
    Lengths,
    quantile,
    summarize,
)
from align.report.dataset.length_plots import length_plots, merge_small_sources
from align.report.dataset.preview import write_preview
from tests.support.data.sample_build import HOSTILE, pair, row, write_build

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RECIPE = {"kind": "instructions", "description": HOSTILE, "sources": [{"type": "files", "paths": [HOSTILE]}]}


class Tags(HTMLParser):
    """Tags and attributes that a browser would see, and the text between."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """Every place where a dataset can write has hostile text in it."""
    kept_row = row(HOSTILE, HOSTILE, f"source {HOSTILE}")
    gone = [
        (
            row(f"{HOSTILE} {n}", "x", f"source {HOSTILE}"),
            f"like {HOSTILE}",
            {"instead": {"id": kept_row["id"], "where": HOSTILE}},
        )
        for n in range(6)
    ]
    return write_build(tmp_path / "build", [kept_row, row("a", "b")], [row("c", "d")], gone, {"first": HOSTILE})


def test_nothing_that_a_dataset_wrote_is_markup(hostile: Path) -> None:
    for tokenizer in (None, make_tiny_tokenizer()):
        page = write_preview(hostile, RECIPE, f"name {HOSTILE}", tokenizer=tokenizer).read_text(encoding="utf-8")
        tags = Tags(page)
        assert not {"script", "img", "iframe", "textarea"} & set(tags.tags)
        assert not [pair for pair in tags.attributes if pair[0].startswith("on")]
        links = [value for name, value in tags.attributes if name in ("href", "src", "xlink:href", "action")]
        assert all(link.startswith(("#", "data:,")) for link in links), links
        assert page.count("&lt;script&gt;") > 8
        assert not set("\x1b\x00\u202e") & set(page)
        assert "\\x1b[31mred \\u202egnp.exe \\x00" in tags.text
        assert "49" not in re.findall(r"\{\{ (\S+) \}\}", page)  # a template in the data is not rendered
        assert "default-src 'none'" in page and "script-src" not in page
        assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page).replace("http-equiv", "")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium installed")
def test_the_page_in_chromium(hostile: Path, tmp_path: Path) -> None:
    page = write_preview(hostile, RECIPE, "demo", tokenizer=make_tiny_tokenizer())
    switches = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    logging = ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom"]
    command = [str(BROWSER), *switches.split(), profile, *logging, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "<title>demo: preview</title>" in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]


def test_sources_steps_and_reasons_are_counted(hostile: Path) -> None:
    text = Tags(write_preview(hostile, RECIPE, "demo").read_text(encoding="utf-8")).text
    assert "3 instructions (2 train, 1 test) out of 9 records of 2 sources" in text
    assert re.search(r"6 like <script>", text)
    assert "6 dropped for" in text and "and 2 more" in text  # four of six members shown
    assert "not known" in text


def test_masks_are_those_of_training(tmp_path: Path) -> None:
    folder = write_build(tmp_path / "build", [row("Ask & wait", "<b>yes</b>")], [row("t", "u")])
    page = write_preview(folder, RECIPE, "demo", tokenizer=make_tiny_tokenizer()).read_text(encoding="utf-8")
    assert (
        '<span class="s">&lt;|im_start|&gt;</span><span class="">assistant\n</span>'
        '<span class=" t">&lt;b&gt;yes&lt;/b&gt;</span><span class="s t">&lt;|im_end|&gt;</span>'
    ) in page
    cut = write_preview(folder, RECIPE, "demo", tokenizer=make_tiny_tokenizer(), max_length=8)
    assert "the prompt alone fills max_length" in cut.read_text(encoding="utf-8")


def test_pairs_show_both_sides_and_their_lengths(tmp_path: Path) -> None:
    folder = write_build(tmp_path / "pairs", [pair("q", "good", "bad" * 90)], [pair("t", "x", "y")])
    page = write_preview(folder, {"kind": "preferences"}, "pairs").read_text(encoding="utf-8")
    assert "Both sides of all pairs" in page
    assert ">chosen <" in page.replace("</div>", " </div>") and "rejected" in page


def test_texts_have_lengths_and_neither_prompts_nor_turns(tmp_path: Path) -> None:
    texts = [{"id": f"t{number}", "source": "first", "text": "x" * 100} for number in range(3)]
    folder = write_build(tmp_path / "texts", texts[:2], texts[2:])
    summary = summarize(folder)
    assert [caption for _, caption in length_plots(summary.lengths)] == ["Texts."]
    first = summary.lengths["first"]
    assert {int(EDGES[bin]): int(n) for bin, n in enumerate(first.answers["text"]) if n} == {91: 3}
    page = write_preview(folder, {"kind": "texts"}, "texts").read_text(encoding="utf-8")
    assert '<td class="num">–</td><td class="num">91</td></tr>' in page  # no prompt, then the text
    assert "characters of the text" in page and "Messages in the prompt" not in page


def test_the_same_build_gives_the_same_page(hostile: Path, tmp_path: Path) -> None:
    first_page = write_preview(hostile, RECIPE, "demo", tmp_path / "one.html").read_bytes()
    assert write_preview(hostile, RECIPE, "demo", tmp_path / "two.html").read_bytes() == first_page


def test_lengths_and_turns_are_counted_by_hand(tmp_path: Path) -> None:
    long = {**row("ab", "c" * 100), "prompt": [user("ab"), assistant("cd"), user("e")], "id": "long"}
    folder = write_build(tmp_path / "build", [row("four", "é"), long], [row("t", "", "second")])
    summary = summarize(folder)
    first = summary.lengths["first"]
    assert dict(first.rows) == {"train": 2}
    assert first.turns[1] == 1 and first.turns[3] == 1 and first.turns.sum() == 2
    assert {int(EDGES[bin]): int(n) for bin, n in enumerate(first.prompt) if n} == {4: 1, 5: 1}
    answers = {int(EDGES[bin]): int(n) for bin, n in enumerate(first.answers["completion"]) if n}
    assert answers == {1: 1, 91: 1}  # é is one character; 100 lies between the edges 91 and 108
    assert summary.lengths["second"].answers["completion"][0] == 1  # an empty answer counts with the shortest


def test_samples_do_not_depend_on_order_or_files(tmp_path: Path) -> None:
    rows = [row(f"question {n}", f"answer {n}", f"s{n % 3}") for n in range(60)]
    first = summarize(write_build(tmp_path / "one", rows, [row("t", "u")]))
    second = summarize(write_build(tmp_path / "two", rows[::-1], [row("t", "u")], files=3))
    chosen = {name: [kept_row["id"] for _, kept_row in some] for name, some in first.samples.items()}
    assert chosen == {name: [kept_row["id"] for _, kept_row in some] for name, some in second.samples.items()}
    assert all(len(some) == SAMPLES_PER_SOURCE for name, some in chosen.items() if name != "first")
    assert len({name for some in chosen.values() for name in some}) == 10


def test_clusters_are_the_largest_with_the_row_that_stands_for_them(tmp_path: Path) -> None:
    kept_rows = [row(f"kept {n}", "a") for n in range(12)]
    gone = [
        (
            row(f"copy {n} {copy}", "a"),
            "near-duplicate",
            {"instead": {"id": kept_rows[n]["id"], "where": f"x:{n}"}, "at": 0.9},
        )
        for n in range(12)
        for copy in range(n + 1)
    ]
    lost = [(row(f"z{n}", "a"), "duplicate", {"instead": {"id": "no such row", "where": "y:1"}}) for n in range(20)]
    plain = [(row("short", ""), "too short", {})] * 30
    summary = summarize(write_build(tmp_path / "build", kept_rows, [row("t", "u")], gone + lost + plain))
    assert summary.duplicates == 78 + 20
    assert [cluster.size for cluster in summary.clusters] == [20, 12, 11, 10, 9, 8, 7, 6]
    assert summary.clusters[0].kept is None
    assert summary.clusters[1].kept is not None and summary.clusters[1].kept["id"] == kept_rows[11]["id"]
    members = summary.clusters[1].members
    assert len(members) == MAX_MEMBERS and members[0]["row"]["prompt"][0]["content"] == "copy 11 0"
    assert members[0]["detail"]["at"] == 0.9


def test_many_sources_are_drawn_as_the_largest_and_the_rest() -> None:
    lengths = {f"s{n}": Lengths(rows=Counter(train=n + 1)) for n in range(10)}
    groups = merge_small_sources(lengths)
    assert list(groups) == ["s9", "s8", "s7", "s6", "s5", "s4", "4 others"]
    assert groups["4 others"].total == 1 + 2 + 3 + 4


def test_quantiles_by_hand() -> None:
    counts = np.zeros(len(EDGES), np.int64)
    counts[[0, 3, 5]] = [1, 2, 1]
    assert quantile(counts, 0.5) == EDGES[3]
    assert quantile(counts, 1.0) == EDGES[5]
    assert quantile(np.zeros(3), 0.5) == 0
