"""``align data ...`` as a user types it, on a recipe of a few JSON lines that is built for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import yaml

from align.cli.data import COMMANDS
from align.cli.main import main
from align.data.builds.build_files import shards
from align.data.card import write_card
from align.store.store import Store
from tests.support.data.sample_build import HOSTILE, row, write_build

LINES = [
    *(
        {"instruction": f"Name a thing that is number {n} in order.", "input": "", "output": f"thing {n}"}
        for n in range(12)
    ),
    {"instruction": "Name a thing that is number 3 in order.", "input": "", "output": "thing 3"},
    {"instruction": HOSTILE.replace("\x00", ""), "input": "", "output": "no"},
]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A recipe and its build, in a store of their own."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "things.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    recipe = {
        "description": "Things in order.",
        "kind": "instructions",
        "sources": [
            {
                "type": "files",
                "name": "things",
                "license": "MIT",
                "format": "alpaca",
                "paths": [str(folder / "things.jsonl")],
            }
        ],
        "steps": [{"type": "exact_duplicates"}],
        "near_duplicate_prompts": None,
        "test_size": 0.2,
        "seed": 5,
    }
    (folder / "things.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "fewer.yaml").write_text(yaml.safe_dump({**recipe, "max_rows": 6}))
    store = str(folder / "store")
    assert main(["data", "build", str(folder / "things.yaml"), "--store", store, "--workers", "1"]) == 0
    (artifact,) = Store.open(Path(store)).all()
    return SimpleNamespace(
        folder=folder, recipe=str(folder / "things.yaml"), fewer=str(folder / "fewer.yaml"), store=store,
        build=artifact.path, key=artifact.record["key"],
    )  # fmt: skip


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    folder = write_build(
        tmp_path / "hand",
        [row("Say é.", "é"), row(HOSTILE, HOSTILE, "second")],
        [row("t", "u")],
        licenses={"first": "MIT"},
    )
    write_card(
        folder, {"kind": "instructions", "sources": []}, json.loads((folder / "ledger.json").read_text()), "hand"
    )
    return folder


@pytest.mark.parametrize(
    ("words", "output"),
    [
        (["data", "biuld", "x"], "align data: unknown command 'biuld'. Did you mean 'build'?"),
        (["data", "zzz"], "align data: unknown command 'zzz'. Commands: columns, build, show, lint, diff, push."),
        (
            ["data"],
            "align data: the following arguments are required: COMMAND. Commands: columns, build, show, lint,",
        ),
        (["dta", "build"], "align: unknown command 'dta'. Did you mean 'data'?"),
        (
            ["data", "show", "{hand}", "--splti", "test"],
            "unrecognized arguments: --splti test. Did you mean '--split'?",
        ),
        (["data", "show", "{hand}", "--split", "tset"], "--split tset: train or test. Did you mean 'test'?"),
        (["data", "show", "{hand}", "--id", "zz"], "no row of id zz… in its 2 train rows."),
        (["data", "show", "{hand}", "--source", "third"], "no row of source 'third' in its 2 train rows."),
        (["data", "show", "{hand}", "--start", "9"], "its train split has 2 rows, so none from row 9 on."),
        (["data", "show", "{hand}", "--rows", "0"], "--rows and --start are at least 1"),
        (["data", "show", "{hand}", "--model", "tinny"], "Did you mean 'tiny'?"),
        (["data", "show", "{empty}"], "has no train or test Parquet files"),
        (["data", "show", "abc"], "no artifact's key starts with 'abc'"),
        (["data", "build", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["data", "build", "{hand}/ledger.json"], "ledger.json: no recipe (.yaml); `align data columns"),
        (["data", "build", "pipelines/smoke.yaml"], "smoke.yaml: is a pipeline and no recipe; `align run"),
        (
            ["data", "columns", "x.csv", "--workers", "2"],
            "It is an option of other commands of align; see --help.",
        ),
        (["data", "diff", "{hand}", "{hand}/ledger.json"], "neither a build's folder nor a recipe (.yaml)"),
        (["data", "push", "{hand}", "me"], "'me' is no name of a Hub dataset"),
        (["data", "push", "{hand}", "me/set"], "not pushed: a source's license is not known."),
        (["data", "lint", "{hand}"], "align data lint: the following arguments are required: --model."),
        (["data", "lint", "{hand}", "--model", "smollm3"], "no artifact's key starts with 'smollm3'"),
    ],
)
def test_mistakes_end_with_2_and_one_message(
    words: list[str], output: str, by_hand: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "empty").mkdir()
    filled = [word.format(hand=by_hand, empty=tmp_path / "empty") for word in words]
    if len(words) > 2 and words[1] in COMMANDS:
        filled += ["--store", str(tmp_path / "store")]
    assert main(filled) == 2
    captured = capsys.readouterr()
    assert output in captured.err and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_every_command_has_help(capsys: Capture) -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit) as caught:
            main(["data", name, "--help"])
        assert caught.value.code == 0
        assert f"usage: align data {name}" in capsys.readouterr().out


def test_a_build_is_cached_counted_and_documented(example: SimpleNamespace, capsys: Capture) -> None:
    assert main(["data", "build", example.recipe, "--store", example.store, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ran"] is False and document["path"] == str(example.build) and document["key"] == example.key
    assert document["ledger"]["rows_in"] == 14 and document["ledger"]["rows_out"] == 13
    assert {"README.md", "ledger.json", "preview.html"} <= {path.name for path in example.build.iterdir()}
    assert main(["data", "build", example.recipe, "--store", example.store]) == 0
    output = capsys.readouterr()
    assert (
        "things: 14 rows read, 13 kept" in output.out and f"Page:  {example.build.resolve()}/preview.html" in output.out
    )
    assert "cached" in output.err
    # the run has a name of its own: a pipeline called like the recipe would otherwise lose what it reaches
    assert list(Store.open(Path(example.store)).runs()) == ["data-things"]


def test_datasets_reads_a_real_build(example: SimpleNamespace, tmp_path: Path) -> None:
    from datasets import load_dataset

    dataset = load_dataset(str(example.build), cache_dir=str(tmp_path))
    assert dataset["train"].num_rows + dataset["test"].num_rows == 13
    assert dataset["train"].column_names[:3] == ["id", "source", "prompt"]


def test_output_is_a_copy_that_replaces_only_builds(
    example: SimpleNamespace, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["data", "build", example.recipe, "--store", example.store, "--output"]
    assert main([*words, str(tmp_path / "a" / "out")]) == 0
    names = {path.name for path in (tmp_path / "a" / "out").iterdir()}
    assert names == {path.name for path in example.build.iterdir()} - {"log.txt", "events.jsonl"}
    (tmp_path / "a" / "out" / "left over").write_text("x")
    assert main([*words, str(tmp_path / "a" / "out")]) == 0
    assert {path.name for path in (tmp_path / "a" / "out").iterdir()} == names
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    capsys.readouterr()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert main([*words, str(tmp_path / "mine")]) == 2
    assert "not empty, and not a build that can be replaced" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.tex").exists()
    # A folder that has this one inside would be moved away.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main([*words, "."]) == 2
    assert "--output .: is the current folder" in capsys.readouterr().err


def test_show_takes_a_recipe_a_folder_and_a_key(example: SimpleNamespace, capsys: Capture) -> None:
    shown = []
    for word in (example.recipe, str(example.build), example.key[:8]):
        assert main(["data", "show", word, "--store", example.store, "--model", "tiny", "--rows", "2"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]
    assert shown[0].count("<|im_start|>assistant\n⟦thing ") == 2
    assert shown[0].count("<|im_end|>⟧") == 2 and "Trained on: ⟦this⟧." in shown[0]


def test_show_warns_of_damaged_rows(example: SimpleNamespace, tmp_path: Path, capsys: Capture) -> None:
    copy = Path(shutil.copytree(example.build, tmp_path / "copy"))
    assert main(["data", "show", str(copy)]) == 0
    assert "damaged" not in capsys.readouterr().err
    (file,) = shards(copy, "train")
    table = pq.read_table(file)
    pq.write_table(table.slice(1), file)
    assert main(["data", "show", str(copy)]) == 0
    assert f"! {file} has " in capsys.readouterr().err
    data = file.read_bytes()
    file.write_bytes(data[:-20])
    assert main(["data", "show", str(copy)]) == 2
    assert f"{file}: not a readable Parquet file" in capsys.readouterr().err


def test_show_never_prints_what_could_steer_a_terminal(by_hand: Path, capsys: Capture) -> None:
    for more in ([], ["--model", "tiny"], ["--model", "tiny", "--json"]):
        assert main(["data", "show", str(by_hand), "--source", "second", *more]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out and "\u202e" not in out and "\x00" not in out
        assert "<script>" in out


def test_show_colors_what_is_trained(by_hand: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    words = ["data", "show", str(by_hand), "--model", "tiny", "--rows", "1"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "\x1b[1;32mé\x1b[0m\x1b[1;30;42m<|im_end|>\x1b[0m" in out  # trained, and a trained special token
    assert "\x1b[36m<|im_start|>\x1b[0muser\nSay é.\x1b[36m<|im_end|>" in out
    assert "⟦" not in out
    assert main(["data", "show", str(by_hand), "--model", "tiny", "--source", "second"]) == 0
    out = capsys.readouterr().out
    assert out.count("\\x1b[31mred \\u202egnp.exe \\x00") == 2 and "\x1b[31m" not in out and "\u202e" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "⟦é<|im_end|>⟧" in out and "\x1b[" not in out


def test_show_as_messages_and_as_json(by_hand: Path, capsys: Capture) -> None:
    assert main(["data", "show", str(by_hand), "--rows", "1"]) == 0
    assert "user: Say é.\nassistant: é\n" in capsys.readouterr().out
    assert main(["data", "show", str(by_hand), "--rows", "1", "--model", "tiny", "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    (view,) = document["views"]
    assert document["number"] == 1 and len(view["ids"]) == len(view["trained"])
    assert [piece["text"] for piece in view["pieces"] if piece["trained"]] == ["é", "<|im_end|>"]


def test_show_cuts_as_training_does(by_hand: Path, capsys: Capture) -> None:
    assert main(["data", "show", str(by_hand), "--rows", "1", "--model", "tiny", "--max-length", "5"]) == 0
    assert "! skipped: the prompt alone fills max_length" in capsys.readouterr().out


def test_show_with_model_folder_notes_corrections(
    by_hand: Path, tiny_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["data", "show", str(by_hand), "--rows", "1", "--model", str(tmp_path / "model")]) == 0
    output = capsys.readouterr()
    assert "note: pad is eos, '<|im_end|>'; a model stage chooses another" in output.err
    assert "⟦é<|im_end|>⟧" in output.out


def test_show_writes_the_page_with_masks(example: SimpleNamespace, tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "page.html"
    words = ["data", "show", example.recipe, "--store", example.store, "--model", "tiny", "--page", str(page)]
    assert main(words) == 0
    text = page.read_text(encoding="utf-8")
    assert 'class="s t"' in text and "Things in order." in text  # the recipe is read back from the card
    assert 'class="s t"' not in (example.build / "preview.html").read_text(encoding="utf-8")


def test_diff_of_two_recipes(example: SimpleNamespace, capsys: Capture) -> None:
    words = ["data", "diff", example.recipe, example.fewer, "--store", example.store, "--workers", "1"]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert sum(line["removed"] for line in document["groups"]) == 7
    assert sum(line["unchanged"] for line in document["groups"]) == 6
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "removed:" in out and "\x1b" not in out
    assert "over max_rows" in out or "max_rows" in out
    assert main(["data", "diff", example.recipe, example.key[:8], "--store", example.store]) == 0
    assert "The same rows in the same order: the digests agree." in capsys.readouterr().out


def test_diff_prints_hostile_rows_safely(by_hand: Path, tmp_path: Path, capsys: Capture) -> None:
    second_build = write_build(tmp_path / "other", [row("Say é.", "e")], [row("t", "u"), row(HOSTILE, "x")])
    assert main(["data", "diff", str(by_hand), str(second_build)]) == 0
    out = capsys.readouterr().out
    assert "1 prompt of A's train split is in B's test split" in out
    assert "completion: é → e" in out
    assert "\x1b" not in out and "\u202e" not in out


def test_push_says_what_would_go_and_goes_nowhere(example: SimpleNamespace, by_hand: Path, capsys: Capture) -> None:
    words = ["data", "push", str(example.build), "me/things", "--private", "--dry-run"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "To the Hub: datasets/me/things, main, private" in out
    assert "README.md" in out and "train-00000-of-00001.parquet" in out and "License: mit." in out
    assert "dropped-00000" not in out and "preview.html" not in out
    assert main([*words, "--all", "--json"]) == 0
    names = [part["name"] for part in json.loads(capsys.readouterr().out)["files"]]
    assert {"dropped-00000-of-00001.parquet", "preview.html"} <= set(names)
    assert main(["data", "push", str(by_hand), "me/hand", "--dry-run"]) == 0
    assert "! a source's license is not known" in capsys.readouterr().out


def test_push_goes_on_with_yes_and_says_where(by_hand: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(
        "align.data.push.push", lambda upload: {"url": f"hub/{upload.repo}", "commit": "c", "deleted": ["x"]}
    )
    assert main(["data", "push", str(by_hand), "me/hand", "--yes"]) == 0
    out = capsys.readouterr().out
    assert "deleted on the Hub: x" in out and "Pushed: hub/me/hand" in out


def test_lint_ends_with_1_where_there_are_errors(by_hand: Path, tmp_path: Path, capsys: Capture) -> None:
    clean = write_build(
        tmp_path / "clean", [row(f"Is {n} odd?", "yes, it is" if n % 2 else "no") for n in range(4)], [row("t?", "u")]
    )
    assert main(["data", "lint", str(clean), "--model", "tiny"]) == 0
    assert "0 errors" in capsys.readouterr().out
    faulty = write_build(tmp_path / "faulty", [row("Is one odd?", ""), row("b?", "c")], [row("t?", "u")])
    assert main(["data", "lint", str(faulty), "--model", "tiny"]) == 1
    assert "error" in capsys.readouterr().out
    assert main(["data", "lint", str(faulty), "--model", "tiny", "--json"]) == 1
    assert any(finding["severity"] == "error" for finding in json.loads(capsys.readouterr().out))


def test_what_needs_no_model_answers_without_torch(example: SimpleNamespace, by_hand: Path) -> None:
    commands = [
        ["build", example.recipe, "--store", example.store],
        ["show", str(by_hand)],
        ["diff", str(by_hand), str(example.build)],
        ["push", str(by_hand), "me/x", "--dry-run"],
    ]
    code = (
        "import sys\nfrom align.cli.main import main\n"
        f"for words in {commands!r}:\n    main(['data', *words])\n"
        "    heavy = {'torch', 'transformers', 'trl', 'vllm', 'datasets'} & set(sys.modules)\n"
        "    assert not heavy, (words, heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stderr


def test_the_recipe_of_the_guide_is_one() -> None:
    from align.config.recipe.recipe import Recipe
    from align.config.validation import validate

    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    recipe = yaml.safe_load(guide.split("```yaml\n")[1].split("```")[0])
    assert validate(Recipe, recipe, "docs/data.md").language == ["en"]
