"""Other people's text in Markdown stays text, and the license of a mixture has the obligations of its parts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from align.data.card import (
    OBLIGATIONS,
    fenced,
    mixture_license,
    normalize_license,
    plain,
    read_name,
    read_recipe,
    size_category,
    table,
    write_card,
)
from tests.support.data.sample_build import HOSTILE, pair, row, write_build

RECIPE = {
    "description": "Two sources.",
    "kind": "instructions",
    "sources": [
        {"type": "hub", "dataset": "org/set", "revision": "a" * 40},
        {"type": "files", "paths": ["b.jsonl"]},
    ],
    "steps": [{"type": "dedup"}],
    "seed": 17,
}


@pytest.fixture
def build(tmp_path: Path) -> Path:
    train = [row(f"question {n}", f"answer {n}", "first" if n % 2 else "second") for n in range(6)]
    dropped = [(row("question 1!", "answer 1"), "duplicate", {"instead": {"id": train[1]["id"], "where": "x:1"}})]
    licenses = {"first": "MIT", "second": "CC-BY-SA-3.0"}
    return write_build(tmp_path / "build", train, [row("held out", "yes")], dropped, licenses, files=2)


def card(folder: Path, recipe: dict = RECIPE, name: str = "demo") -> str:
    ledger = json.loads((folder / "ledger.json").read_text())
    return write_card(folder, recipe, ledger, name).read_text(encoding="utf-8")


def test_the_metadata_is_the_hubs(build: Path) -> None:
    from huggingface_hub import DatasetCard

    data = DatasetCard(card(build)).data.to_dict()
    assert data["license"] == "cc-by-sa-3.0"
    assert data["pretty_name"] == "demo"
    assert data["size_categories"] == ["n<1K"]
    assert data["task_categories"] == ["text-generation"]
    assert data["source_datasets"] == ["org/set"]
    assert data["tags"] == ["align", "sft"]
    assert "language" not in data  # nobody said
    assert data["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "train-*-of-*.parquet"},
                {"split": "test", "path": "test-*-of-*.parquet"},
            ],
        }
    ]
    info = data["dataset_info"]
    assert [(split["name"], split["num_examples"]) for split in info["splits"]] == [("train", 6), ("test", 1)]
    assert all(split["num_bytes"] > 0 for split in info["splits"])
    assert info["dataset_size"] == sum(split["num_bytes"] for split in info["splits"])
    assert info["download_size"] == sum(p.stat().st_size for p in build.glob("t*-of-*.parquet"))
    assert [feature["name"] for feature in info["features"]] == ["id", "source", "prompt", "checks", "completion"]


def test_datasets_reads_the_folder_through_the_card(build: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    card(build)
    dataset = load_dataset(str(build), cache_dir=str(tmp_path / "cache"))
    assert set(dataset) == {"train", "test"}
    assert dataset["train"].num_rows == 6  # both shards, and no dropped row
    assert dataset["train"][1]["completion"][0]["content"] == "answer 1"
    assert dataset["test"]["prompt"][0][0] == {"role": "user", "content": "held out"}


def test_the_body_accounts_for_sources_steps_and_recipe(build: Path) -> None:
    text = card(build)
    assert "7 rows of kind `instructions` (6 train, 1 test), built from 8 records" in text
    assert "| first | files | mit | both, by prompt | 5 | 4 | 57.1% | first.jsonl abababababababab… |" in text
    assert "| 1 dedup | 8 | 0 | 0 | 7 | 1 duplicate |" in text
    assert "| train | 6 | 2 | `1111111111111111` |" in text
    recipe = re.search(r"```yaml\n(.*?)\n```", text, re.DOTALL)
    assert recipe is not None and yaml.safe_load(recipe[1]) == RECIPE
    assert read_recipe(build) == RECIPE and read_name(build) == "demo"


def test_folder_without_card_has_its_name_and_no_recipe(tmp_path: Path) -> None:
    for text in (None, "hello", "---\n- a\n---\n", "---\n{\n---\n## Recipe\n\n```yaml\n{\n```\n"):
        if text is not None:
            (tmp_path / "README.md").write_text(text)
        assert read_name(tmp_path) == tmp_path.name and read_recipe(tmp_path) == {}


def test_an_unknown_license_is_said_plainly(build: Path) -> None:
    ledger = json.loads((build / "ledger.json").read_text())
    ledger["sources"][0]["license"] = None
    (build / "ledger.json").write_text(json.dumps(ledger))
    text = card(build)
    assert "\nlicense: unknown\n" in text
    assert "| first | files | **not known** |" in text
    assert "The license of at least one source is not known" in text


def test_incompatible_licenses_are_other_with_a_link(build: Path) -> None:
    ledger = json.loads((build / "ledger.json").read_text())
    ledger["sources"][0]["license"] = "CC-BY-NC-4.0"
    (build / "ledger.json").write_text(json.dumps(ledger))
    data = yaml.safe_load(card(build).split("---")[1])
    assert data["license"] == "other"
    assert data["license_name"] == "terms-of-all-sources"
    assert data["license_link"] == "README.md#licenses"


def test_a_language_is_stated_where_the_recipe_states_it(build: Path) -> None:
    kept_rows = {**RECIPE, "steps": [{"type": "filter", "language": {"keep": ["en", "de"]}}]}
    assert yaml.safe_load(card(build, kept_rows).split("---")[1])["language"] == ["de", "en"]


def test_preferences_have_their_own_tags_and_columns(tmp_path: Path) -> None:
    folder = write_build(tmp_path / "pairs", [pair("a", "good", "bad")], [pair("b", "good", "bad")])
    text = card(folder, {**RECIPE, "kind": "preferences"})
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["align", "dpo", "reward-model"]
    assert "- `chosen`: the better answer" in text


def test_hostile_text_stays_text(build: Path) -> None:
    from huggingface_hub import DatasetCard

    ledger = json.loads((build / "ledger.json").read_text())
    ledger["sources"][0]["source"] = HOSTILE
    ledger["steps"][1]["dropped"] = {HOSTILE: 1}
    (build / "ledger.json").write_text(json.dumps(ledger))
    recipe = {**RECIPE, "description": "ok", "note": f"````\n---\n{HOSTILE}"}
    text = card(build, recipe, name=f"---\n{HOSTILE}")
    body = text.split("\n---\n", 1)[1]
    before, code = body.split("## Recipe")
    assert not re.search(r"(?<!\\)<(script|img)", before)
    assert not re.search(r"(?<!\\)\]\(javascript", before)
    assert "\x1b" not in text and "\u202e" not in text and "\x00" not in text
    fence = re.search(r"\n(`{3,})yaml\n", code)
    assert read_recipe(build)["note"].startswith("````\n---\n<script>")
    assert fence is not None and len(fence[1]) > 4 and code.rstrip().endswith(fence[1])
    rows = [line for line in before.splitlines() if line.startswith("| ")]
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in rows]
    assert set(cells) == {9, 5, 7}  # no cell broke out of its table
    assert DatasetCard(text).data.to_dict()["tags"] == ["align", "sft"]


def test_the_card_is_the_same_each_time(build: Path) -> None:
    assert card(build) == card(build)


@pytest.mark.parametrize(
    ("rows", "name"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**6, "1M<n<10M"), (10**9, "n>1B")]
)
def test_size_categories(rows: int, name: str) -> None:
    assert size_category(rows) == name


def test_markup_is_escaped_and_lines_are_joined() -> None:
    assert plain("a|b\n# <b>c</b> [x](http://y) `z`") == r"a\|b \# \<b\>c\</b\> \[x\]\(http://y\) \`z\`"


def test_a_cell_is_left_alone_only_where_it_is_exactly_ours() -> None:
    rows = table(
        ("license", "digest"), [("**not known**", "`0a1b`"), ("**not known**<img src=x>", "`<b>`")], numbers=(1,)
    )
    assert rows[1] == "| --- | ---: |"
    assert rows[2] == "| **not known** | `0a1b` |"
    assert rows[3] == r"| \*\*not known\*\*\<img src=x\> | \`\<b\>\` |"


def test_a_code_block_is_not_left() -> None:
    assert fenced("a\n````\nb\n", "yaml") == ["`````yaml", "a\n````\nb", "`````"]


def test_what_steers_a_terminal_or_reorders_text_is_escaped() -> None:
    assert plain("a\x1b[31m\u202eb") == r"a\\x1b\[31m\\u202eb"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("Apache-2.0", "apache-2.0"),
        ("CC-BY-SA-3.0", "cc-by-sa-3.0"),
        ("cc by-nc 4.0", "cc-by-nc-4.0"),
        (" MIT ", "mit"),
        ("ODC-By-1.0", "odc-by"),
        ("", "unknown"),
        (None, "unknown"),
        ("our own terms", "our own terms"),
    ],
)
def test_names_are_the_hubs(words: str | None, name: str) -> None:
    assert normalize_license(words) == name


@pytest.mark.parametrize(
    ("parts", "full"),
    [
        (["MIT"], ("mit",)),
        (["MIT", "Apache-2.0"], ("apache-2.0", "mit")),  # both ask for credit: both must be met
        (["CC0-1.0", "MIT"], ("mit",)),
        (["MIT", "CC-BY-SA-3.0"], ("cc-by-sa-3.0",)),
        (["CC-BY-4.0", "CC-BY-NC-4.0"], ("cc-by-nc-4.0",)),
        (["CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "MIT"], ("cc-by-nc-sa-4.0",)),
        (["CC-BY-NC-4.0", "CC-BY-SA-4.0"], ("other",)),  # share alike forbids adding "non-commercial"
        (["CC-BY-SA-4.0", "ODbL-1.0"], ("other",)),
        (["MIT", None], ("unknown",)),
        (["CC-BY-NC-4.0", None], ("unknown",)),
        (["MIT", "our own terms"], ("other",)),
        ([], ("unknown",)),
    ],
)
def test_a_mixture_has_the_strictest(parts: list[str | None], full: tuple[str, ...]) -> None:
    assert mixture_license(parts).names == full
    assert mixture_license(reversed(parts)).names == full


def test_concerns_name_what_may_forbid_passing_it_on() -> None:
    assert mixture_license(["MIT", "CC0-1.0", "CC-BY-SA-4.0"]).concerns == ()
    concerns = mixture_license(["CC-BY-NC-4.0", None, "CC-BY-ND-4.0", "house rules"]).concerns
    assert concerns == (
        "cc-by-nc-4.0 forbids commercial use",
        "cc-by-nd-4.0 forbids passing on changed versions, and a build is one",
        "'house rules' is not a license with known terms",
        "a source's license is not known",
    )
    assert "do not fit" in mixture_license(["CC-BY-NC-4.0", "CC-BY-SA-4.0"]).concerns[-1]


def test_every_non_commercial_name_says_so() -> None:
    for name, obligation in OBLIGATIONS.items():
        assert ("-nc" in name) == ("non-commercial" in obligation)
        assert ("-nd" in name) == ("no derivatives" in obligation)
