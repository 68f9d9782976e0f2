"""``align compare`` as a user types it: runs by name and by file, unfinished ones, and what is wrong with the words."""

from __future__ import annotations

import csv
import json
import webbrowser
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from align.cli.main import main
from tests.support import toy
from tests.support.report.example_sweep import make_sweep

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory, stages_in_process: None) -> SimpleNamespace:
    """A store with three runs of the toy pipeline, the last of which failed; read-only but for its reports."""
    folder = tmp_path_factory.mktemp("runs")
    files = {}
    changed = {"low": {"number": 2}, "high": {"number": 5, "steps": 4}, "bad": {"crash": "bug"}}
    for name, two in changed.items():
        files[name] = str(folder / f"{name}.yaml")
        Path(files[name]).write_text(yaml.safe_dump({**toy.pipeline(two=two), "name": name}, sort_keys=False))
        assert main(["run", files[name], "--store", str(folder / "store")]) == (1 if name == "bad" else 0)
    # a file with a mistake: sorted by name, a stage comes before what it reads
    Path(folder / "new.yaml").write_text(yaml.safe_dump({**toy.pipeline(one={"number": 9}), "name": "new"}))
    return SimpleNamespace(folder=folder, store=str(folder / "store"), files=files)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "tables" / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_runs_by_name_and_by_file_under_names_of_their_own(
    example: SimpleNamespace, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "out"
    words = ["compare", "low", f"five={example.files['high']}", "--store", example.store, "--output", str(out)]
    assert main([*words, "--title", "Low <and> high"]) == 0
    assert capsys.readouterr().out == f"Report: {(out / 'compare.html').resolve()}\n"
    assert [(row["run"], row["set two.number"], row["set two.steps"]) for row in rows(out)] == [
        ("low", "2", "3"), ("five", "5", "4"),
    ]  # fmt: skip
    text = (out / "compare.html").read_text()
    assert "<title>Low &lt;and&gt; high</title>" in text
    # the curves of what differs, and not of what is the same
    assert (out / "figures" / "curve-two-loss.svg").is_file() and not list(out.rglob("curve-one-*"))


def test_without_a_folder_it_goes_into_the_store(example: SimpleNamespace, capsys: Capture) -> None:
    assert main(["compare", "low", "high", "--store", example.store, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    page = Path(document["path"])
    assert page == (Path(example.store) / "reports" / "_compare" / "low-high" / "compare.html").resolve()
    assert page.is_file() and document["runs"] == ["low", "high"] and Path(document["tables"]).is_dir()
    assert main(["gc", "--store", example.store]) == 0
    assert "compare" not in capsys.readouterr().out


def test_unfinished_run_is_compared_with_a_note(example: SimpleNamespace, tmp_path: Path) -> None:
    assert main(["compare", "low", "bad", "--store", example.store, "--output", str(tmp_path)]) == 0
    table = rows(tmp_path)
    assert table[1]["note"].startswith("two failed: ValueError: a bug")
    assert table[0]["set stages"] == "one, two, total" and table[1]["set stages"] == "one"
    assert "⚠ two failed: ValueError: a bug" in (tmp_path / "compare.html").read_text()


def test_it_opens_on_request(example: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: calls.append(url) or True)
    assert main(["compare", "low", "high", "--store", example.store, "--output", str(tmp_path), "--open"]) == 0
    assert calls == [(tmp_path / "compare.html").resolve().as_uri()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lwo", "high"], "lwo: neither a pipeline file nor a run of the store {store}. Did you mean 'low'?"),
        (["low"], "low: a comparison needs two runs; name another, or use `align report`."),
        (["low", "low"], "two runs are called 'low'; give each its own name: NAME=RUN."),
        (["a=low", "a=high"], "two runs are called 'a'"),
        (["low", "{folder}/new.yaml"], "new.yaml: stages.total.others: stage 'two' comes later"),
        (["low", "{folder}/nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["low", "high", "--output", "{folder}/low.yaml"], "is a file; name a folder."),
        ([], "the following arguments are required: RUN."),
    ],
)
def test_mistakes(words: list[str], message: str, example: SimpleNamespace, capsys: Capture) -> None:
    filled = [word.format(folder=example.folder) for word in words]
    assert main(["compare", *filled, "--store", example.store]) == 2
    captured = capsys.readouterr()
    assert (
        message.format(store=example.store) in captured.err and captured.out == "" and "Traceback" not in captured.err
    )


def test_a_run_of_which_nothing_is_finished_is_refused(
    example: SimpleNamespace, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "new.yaml"
    file.write_text(
        yaml.safe_dump({"name": "new", "stages": {"one": {"stage": "tests.support.toy:NUMBER", "number": 77}}})
    )
    assert main(["compare", "low", str(file), "--store", example.store]) == 2
    assert "new: no stage is finished yet" in capsys.readouterr().err


def test_over_seeds_prints_the_decision_and_every_seed(
    example: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    runs = make_sweep(tmp_path / "runs", {"low": (0.70, 2.0), "high": (0.72, 2.0)})
    for seed, artifacts in enumerate(runs.values(), start=1):
        artifacts["ppo"].record.update(seed=seed, config={"policy": "sft"})
        artifacts["evaluate"].record["seed"] = seed
    monkeypatch.setattr("align.runs.run_page.finished_artifacts", lambda outline, store: runs[outline.name])
    words = ["compare", "low", "high", "--over", "seed", "--store", example.store, "--output", str(tmp_path / "out")]
    assert main(words) == 0
    out = capsys.readouterr().out
    # By seed 0.5 and 0.52 above the base: t = 51 on one degree, p = 0.0125, times three. To SFT t = 21 is not enough.
    assert out.startswith("Take ppo or sft: ppo has the best gold score, 0.717, sft (0.507) cannot be told apart")
    assert "  ppo: gold score 0.717 (95 % interval 0.590 to 0.844); by seed 1: 0.707, 2: 0.727\n" in out
    assert "  sft: gold score 0.507 (no interval); by seed 1: 0.507, 2: 0.507\n" in out
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    ppo = document["over_seed"][-1]
    assert (ppo["system"], ppo["runs"], ppo["n"]) == ("ppo", {"1": "low", "2": "high"}, 2)


def test_over_seeds_needs_runs_that_differ_by_seed_alone(example: SimpleNamespace, capsys: Capture) -> None:
    assert main(["compare", "low", "high", "--over", "seed", "--store", example.store]) == 2
    error = capsys.readouterr().err
    assert "no two of these runs differ only by their seed; they also differ in two.number, two.steps" in error
