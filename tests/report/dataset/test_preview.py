"""The preview of a build, and rows as a model sees them."""

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
from align.errors import UserError
from align.models.built_in import make_tiny_tokenizer
from align.report.dataset.build_summary import (
    EDGES,
    MAX_MEMBERS,
    SAMPLES_PER_SOURCE,
    Lengths,
    length_plots,
    merge_small_sources,
    quantile,
    summarize,
)
from align.report.dataset.preview import Piece, load_preview_tokenizer, split_pieces, token_views, write_preview
from align.training.rows import MASKED, encode_pairs, encode_supervised
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


def test_largest_clusters_are_shown_with_their_row(tmp_path: Path) -> None:
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


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return make_tiny_tokenizer()


def text(pieces: list[Piece], trained: bool) -> str:
    return "".join(piece.text for piece in pieces if piece.trained is trained)


def test_an_instruction_is_trained_on_its_answer_and_end_of_turn(tokenizer) -> None:
    (view,) = token_views(tokenizer, row("Say hé.", "hé 你好"))
    pieces = view.pieces(tokenizer)
    assert text(pieces, False) == "<|im_start|>user\nSay hé.<|im_end|>\n<|im_start|>assistant\n"
    assert text(pieces, True) == "hé 你好<|im_end|>"
    assert [piece.text for piece in pieces if piece.special] == [
        "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"
    ]  # fmt: skip
    encoded = encode_supervised(tokenizer, [row("Say hé.", "hé 你好")], 10**6).rows[0]
    assert list(view.ids) == encoded["input_ids"]
    assert list(view.trained) == [label != MASKED for label in encoded["labels"]]


def test_template_in_text_is_shown_as_its_tokens(tokenizer) -> None:
    (view,) = token_views(tokenizer, row("a<|im_end|>b", "c"))
    assert [piece.text for piece in view.pieces(tokenizer) if piece.special].count("<|im_end|>") == 3
    assert view.ids.count(tokenizer.eos_token_id) == 3


def test_a_pair_is_trained_on_both_answers(tokenizer) -> None:
    chosen, rejected = token_views(tokenizer, pair("q", "good", "bad"))
    assert (chosen.title, rejected.title) == ("chosen", "rejected")
    assert text(chosen.pieces(tokenizer), True) == "good<|im_end|>"
    assert text(rejected.pieces(tokenizer), True) == "bad<|im_end|>"
    encoded = encode_pairs(tokenizer, [pair("q", "good", "bad")], 10**6).rows[0]
    assert list(chosen.ids) == encoded["prompt_ids"] + encoded["chosen_ids"]


def test_an_unfinished_answer_has_no_end_of_turn(tokenizer) -> None:
    chosen, _ = token_views(tokenizer, {**pair("q", "good", "bad"), "chosen_finished": False})
    assert text(chosen.pieces(tokenizer), True) == "good"


def test_a_pair_of_equal_answers_says_why_nothing_is_learned(tokenizer) -> None:
    chosen, rejected = token_views(tokenizer, pair("q", "same", "same"))
    assert chosen.notes == ("skipped: both answers are the same",)
    assert not any(chosen.trained) and not any(rejected.trained) and chosen.ids


def test_a_prompt_is_shown_up_to_where_the_answer_begins(tokenizer) -> None:
    prompt_row = {name: value for name, value in row("q", "a").items() if name != "completion"}
    (view,) = token_views(tokenizer, prompt_row)
    assert not any(view.trained)
    assert text(view.pieces(tokenizer), False).endswith("<|im_start|>assistant\n")


def test_a_cut_answer_is_shown_as_it_is_cut(tokenizer) -> None:
    length = len(token_views(tokenizer, row("q", "abcdef"))[0].ids)
    (view,) = token_views(tokenizer, row("q", "abcdef"), max_length=length - 3)
    assert text(view.pieces(tokenizer), True) == "abcd"
    assert view.notes == ("cut at max_length, so the answer has no end of turn",)
    (view,) = token_views(tokenizer, row("q", "abcdef"), max_length=8)
    assert view.notes == ("skipped: the prompt alone fills max_length",) and not any(view.trained)


def test_labels_and_responses_are_named(tokenizer) -> None:
    assert [v.title for v in token_views(tokenizer, row("q", "a", label=False))] == ["an undesirable answer"]
    prompt_row = {name: value for name, value in row("q", "a").items() if name != "completion"}
    several = [{"content": "x", "score": 0.5, "rank": None}, {"content": "y", "score": None, "rank": 1}]
    views = token_views(tokenizer, {**prompt_row, "responses": several})
    assert [view.title for view in views] == ["response 1 · score 0.5", "response 2 · rank 1"]
    assert text(views[1].pieces(tokenizer), True) == "y<|im_end|>"


def test_template_that_rewrites_prompts_is_reported() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("\\n<|im_start|>assistant\\n", "\\n<|im_start|>bot\\n")
    (view,) = token_views(tokenizer, row("q", "a"))
    assert "renders a prompt differently" in view.notes[0]
    assert view.ids and not any(view.trained)


def test_a_template_that_refuses_a_row_is_reported() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    (view,) = token_views(tokenizer, row("q", "a"))
    assert view.ids == () and "no such role" in view.notes[0]


def test_pieces_are_the_whole_text_even_where_a_letter_is_cut() -> None:
    tokenizer = make_tiny_tokenizer()
    ids = tokenizer("aé b")["input_ids"]
    cut = [False, False, *[True] * (len(ids) - 2)]  # between the two bytes of é
    assert [piece.text for piece in split_pieces(tokenizer, ids, cut)] == ["a\ufffd", "\ufffd b"]


def test_spaces_between_runs_survive_tokenizers_that_strip_them() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "[unk]": 2}, "[unk]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[unk]")
    assert tokenizer.decode([1]) == "two"  # the space is lost when decoded alone
    assert [piece.text for piece in split_pieces(tokenizer, [0, 1, 0], [False, True, True])] == ["one", " two one"]


def test_a_preview_tokenizer_ends_with_its_end_of_turn(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "model")
    loaded, notes = load_preview_tokenizer(tmp_path / "model")
    assert loaded.eos_token == "<|im_end|>"
    assert notes == [
        "eos is '<|endoftext|>', but turns end with '<|im_end|>', which a model stage makes the eos",
    ]


def test_a_folder_without_tokenizer_or_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no tokenizer.json"):
        load_preview_tokenizer(tmp_path / "empty")
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="no chat template"):
        load_preview_tokenizer(tmp_path / "base")


def test_tools_reach_the_template_in_every_view() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{{ tools | map(attribute='name') | join }}" + tokenizer.chat_template
    tools = '[{"name": "clock"}]'
    prompt = {name: value for name, value in row("q", "a").items() if name != "completion"}
    for full_row in (row("q", "a"), prompt, pair("q", "good", "bad"), pair("q", "same", "same")):
        for view in token_views(tokenizer, {**full_row, "tools": tools}):
            assert text(view.pieces(tokenizer), False).startswith("clock<|im_start|>user"), full_row
