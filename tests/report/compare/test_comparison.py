"""Comparison of runs: systems that they share, differences paired across them, the Pareto front, and the page."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from align.evaluation.scorecard import FORMAT
from align.evaluation.tasks.judged import FILE, Contest
from align.report.compare.comparison import write_comparison
from align.report.compare.merged_scorecard import (
    differing_item_counts,
    differing_prompts,
    merge,
    merge_samples,
    read_cards,
)
from align.report.compare.run_table import changed_fields
from align.report.compare.trade_offs import Point, pareto_front
from align.report.page.curve_panels import draw_run_curves
from align.report.page.metric_series import Events
from align.store.artifacts import Kind
from tests.support.report.browser import chromium, console, needs_browser, requests, resize
from tests.support.report.example_run import HOSTILE, write_artifact
from tests.support.report.example_sweep import OUTCOMES, make_sweep, write_evaluation


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three runs, which tests only read."""
    return make_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def page(sweep: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their comparison."""
    return write_comparison(sweep, tmp_path_factory.mktemp("page") / "compare.html", notes={"kl-0_5": "ppo stopped"})


def text_of(page: Path, section: str) -> str:
    text = page.read_text(encoding="utf-8")
    start = text.index(f'id="{section}"')
    return text[start : text.index("</section>", start)]


# --- one scorecard of several -----------------------------------------------------------------------------------------


def test_what_all_runs_share_stands_in_the_merged_card_once(sweep: dict[str, Any]) -> None:
    evaluated, problems = read_cards(sweep)
    assert problems == {}
    card = merge(evaluated)
    assert card["format"] == FORMAT
    assert card["policies"] == ["model", "sft", "kl-0: ppo", "kl-0_05: ppo", "kl-0_5: ppo"]
    assert (card["base"], card["reference"]) == ("model", "sft")
    assert [system["key"] for system in card["systems"]] == ["k0", "k1", "k-kl-0", "k-kl-0_05", "k-kl-0_5"]
    assert card["estimates"]["kl-0_05: ppo"] == evaluated[1].card["estimates"]["ppo"]


def test_system_with_another_key_or_numbers_is_another_system(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path / "runs", {"a": (0.5, 1.0), "b": (0.6, 2.0)})
    for change in ("key", "numbers"):
        path = runs["b"]["evaluate"].path / "scorecard.json"
        before = path.read_text()
        card = json.loads(before)
        if change == "key":
            card["systems"][1]["key"] = "another"
        else:
            card["estimates"]["sft"]["gold"]["value"] += 0.01
        path.write_text(json.dumps(card))
        merged = merge(read_cards(runs)[0])
        assert {"a: sft", "b: sft"} <= set(merged["policies"]) and "sft" not in merged["policies"]
        assert merged["reference"] == "a: sft"
        path.write_text(before)


def test_differences_across_runs_are_paired_by_item(sweep: dict[str, Any]) -> None:
    card = merge(read_cards(sweep)[0])
    rows = {(row["policy"], row["against"], row["metric"]): row for row in card["differences"]}
    across = rows["kl-0_05: ppo", "kl-0: ppo", "gold"]
    # every prompt moved by the same amount, so that pairing leaves no spread; unpaired, the interval would be ±0.025
    assert across["value"] == pytest.approx(-0.05)
    assert across["high"] - across["low"] < 1e-9
    assert (across["n"], across["verdict"]) == (40, "worse")
    assert rows["kl-0_5: ppo", "kl-0: ppo", "ifeval.prompt_strict"]["n"] == 30
    assert ("kl-0_05: ppo", "kl-0: ppo", "kl") not in rows, "KL is not compared by item"
    assert rows["kl-0: ppo", "sft", "gold"]["value"] == pytest.approx(0.25)


def test_items_are_found_by_their_id_whatever_the_order(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path / "runs", {"a": (0.5, 1.0), "b": (0.6, 2.0)})

    def across() -> list[dict[str, Any]]:
        comparison = ("b: ppo", "a: ppo", "gold")
        rows = merge(read_cards(runs)[0])["differences"]
        return [row for row in rows if (row["policy"], row["against"], row["metric"]) == comparison]

    before = across()
    path = runs["b"]["evaluate"].path / "items.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert [row["value"] for row in across()] == [pytest.approx(0.1)] == [row["value"] for row in before]
    assert across()[0]["high"] == pytest.approx(before[0]["high"])


def test_the_correction_is_over_all_runs(sweep: dict[str, Any]) -> None:
    evaluated, _ = read_cards(sweep)
    policy, against, metric = "kl-0_5: ppo", "model", "ifeval.prompt_strict"

    def row(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
        return next(r for r in rows if (r["policy"], r["against"], r["metric"]) == (name, against, metric))

    alone = row(evaluated[2].card["differences"], "ppo")
    merged = row(merge(evaluated)["differences"], policy)
    assert (
        alone["p"] == merged["p"] == pytest.approx(2 / 2**10)
    )  # exact McNemar: ten items of thirty moved, all one way
    assert alone["p_holm"] < merged["p_holm"], "more comparisons, a stricter test"


def test_items_that_do_not_make_up_the_number_are_not_compared(tmp_path: Path) -> None:
    """A ratio of sums (loss per token) is no mean over items: without the weights it cannot be paired."""
    runs = make_sweep(tmp_path / "runs", {"a": (0.5, 1.0), "b": (0.6, 2.0)})
    for run in runs.values():
        path = run["evaluate"].path / "scorecard.json"
        card = json.loads(path.read_text())
        card["estimates"]["ppo"]["length"]["value"] *= 1.01
        path.write_text(json.dumps(card))
    rows = merge(read_cards(runs)[0])["differences"]
    across = {row["metric"] for row in rows if (row["policy"], row["against"]) == ("b: ppo", "a: ppo")}
    assert "gold" in across and "length" not in across


def test_runs_measured_on_other_items_say_so(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path / "runs", {"a": (0.5, 1.0), "b": (0.6, 2.0)})
    assert differing_item_counts(read_cards(runs)[0]) == []
    write_evaluation(runs["b"]["evaluate"].path, "b", 0.6, 2.0, "kb", items=20)
    evaluated, _ = read_cards(runs)
    (text,) = differing_item_counts(evaluated)
    assert text.startswith("IFEval has other items in some runs (a: 30, b: 20)")
    rows = {(row["policy"], row["against"], row["metric"]): row for row in merge(evaluated)["differences"]}
    assert rows["b: ppo", "a: ppo", "ifeval.prompt_strict"]["n"] == 20


def test_items_with_another_prompt_are_not_paired(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path / "runs", {"a": (0.5, 1.0), "b": (0.6, 2.0), "c": (0.7, 3.0)})
    path = runs["b"]["evaluate"].path / "samples.jsonl"
    lines = path.read_text().splitlines()
    # Run b has 30 prompts of its own, numbered as the prompts of the others.
    changed = [line.replace('"question ', '"another question ') for line in lines[:30]]
    path.write_text("".join(line + "\n" for line in [*changed, *lines[30:]]))
    evaluated, _ = read_cards(runs)
    rows = {(row["policy"], row["against"], row["metric"]): row for row in merge(evaluated)["differences"]}
    assert rows["b: ppo", "a: ppo", "gold"]["n"] == 10
    assert rows["c: ppo", "a: ppo", "gold"]["n"] == 40
    assert rows["b: ppo", "a: ppo", "ifeval.prompt_strict"]["n"] == 30  # without samples, by id alone
    sentence = "The prompt set has other prompts under the same id in 30 items"
    assert [text.partition(";")[0] for text in differing_prompts(evaluated)] == [sentence]
    assert sentence in write_comparison(runs, tmp_path / "out" / "compare.html").read_text()


def test_episodes_are_paired_however_they_began(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path / "runs", {"a": (0.5, 1.0), "b": (0.6, 2.0)})
    for name, run in runs.items():
        path = run["evaluate"].path / "samples.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["prompt"] = [{"role": "user", "content": f"a greeting in {name}"}]
            line["responses"] = {system: [{"messages": [], "calls": [], "text": ""}] for system in line["responses"]}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {(row["policy"], row["against"], row["metric"]): row for row in merge(read_cards(runs)[0])["differences"]}
    assert rows["b: ppo", "a: ppo", "gold"]["n"] == 40


def test_answers_to_the_same_question_stand_side_by_side(sweep: dict[str, Any]) -> None:
    lines = list(merge_samples(read_cards(sweep)[0]))
    assert len(lines) == 40
    assert list(lines[3]["responses"]) == ["model", "sft", "kl-0: ppo", "kl-0_05: ppo", "kl-0_5: ppo"]
    assert lines[3]["responses"]["kl-0_05: ppo"][0]["text"] == "answer 3 of ppo in kl-0_05"


def test_runs_without_a_scorecard_that_can_be_read_are_named(sweep: dict[str, Any], tmp_path: Path) -> None:
    old = write_artifact(tmp_path, "evaluate", Kind.SCORECARD)
    (old.path / "scorecard.json").write_text(json.dumps({"format": 1}))
    damaged = write_artifact(tmp_path, "second", Kind.SCORECARD)
    (damaged.path / "scorecard.json").write_text("{")
    runs = {"a": sweep["kl-0"], "none": {"sft": sweep["kl-0"]["sft"]}, "old": {"evaluate": old},
            "damaged": {"second": damaged}}  # fmt: skip
    evaluated, problems = read_cards(runs)
    assert [run.name for run in evaluated] == ["a"]
    assert problems["none"] == "not evaluated"
    assert "another format" in problems["old"] and "cannot be read" in problems["damaged"]
    text = text_of(write_comparison(runs, tmp_path / "out" / "compare.html"), "runs")
    for problem in problems.values():
        assert problem in text


def win_rates_of(root: Path, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the page's card where each of two runs has ``rows``."""
    runs = make_sweep(root / "runs", {"a": (0.5, 1.0), "b": (0.6, 2.0)})
    for run in runs.values():
        path = run["evaluate"].path / "scorecard.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"win_rates": rows}))
    page = write_comparison(runs, root / "out" / "compare.html")
    return list(json.loads((page.parent / "scorecard.json").read_text())["win_rates"])


def win_rate(first: str, second: str) -> dict[str, Any]:
    contest = Contest(first, second, ["one", "one", "other", "tie"], gaps=[0] * 4)
    return contest.row("ifeval", "judge")


def test_the_answers_of_a_file_are_an_opponent_of_every_run(tmp_path: Path) -> None:
    rows = win_rates_of(tmp_path, win_rate("ppo", FILE))
    assert [(row["one"], row["other"]) for row in rows] == [("a: ppo", FILE), ("b: ppo", FILE)]


def test_two_systems_that_all_runs_share_have_one_win_rate(tmp_path: Path) -> None:
    rows = win_rates_of(tmp_path, win_rate("sft", "model"))
    assert [(row["one"], row["other"]) for row in rows] == [("sft", "model")]


# --- settings against results -----------------------------------------------------------------------------------------


def test_only_settings_that_differ_are_listed(sweep: dict[str, Any]) -> None:
    # `policy` differs too, but names a stage that ppo reads
    assert changed_fields(sweep) == {"ppo.kl_coef": {"kl-0": 0.0, "kl-0_05": 0.05, "kl-0_5": 0.5}}


def test_every_kind_of_change_is_seen(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path / "runs", {"a": (0.5, 1.0), "b": (0.6, 2.0)})
    changed_record = runs["b"]["ppo"].record
    changed_record["config"] = {"policy": "sft", "kl_coef": 0.3, "advantage": {"gamma": 0.9}, "new": [1, 2]}
    runs["a"]["ppo"].record["config"] = {"policy": "sft", "kl_coef": 0.3, "advantage": {"gamma": 1.0}}
    changed_record |= {"version": 2, "identities": {"score": "f" * 64, "tasks": '{"max_items": 3}'}}
    del runs["b"]["model"]
    assert changed_fields(runs) == {
        "stages": {"a": "model, sft, ppo, evaluate", "b": "sft, ppo, evaluate"},
        "ppo.advantage.gamma": {"a": 1.0, "b": 0.9},
        "ppo.stage version": {"a": 1, "b": 2},
        "ppo.new": {"a": None, "b": [1, 2]},
        "ppo.content of score": {"a": None, "b": "f" * 12},
    }


def test_types_that_auto_stood_for_are_compared(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path / "runs", {"a": (0.5, 1.0), "b": (0.5, 1.0)})
    for name, precision in (("a", "bfloat16"), ("b", "float32")):
        record = runs[name]["ppo"].record
        record["config"] = {"policy": "sft", "precision": "auto"}
        record["precision"] = precision
    assert changed_fields(runs) == {"ppo.precision": {"a": "auto (bfloat16)", "b": "auto (float32)"}}


def test_common_seed_of_all_stages_is_one_field(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path / "runs", {"a": (0.5, 1.0), "b": (0.6, 2.0)})
    ppo = runs["b"]["ppo"].record
    ppo["config"] = runs["a"]["ppo"].record["config"]
    ppo["seed"] = 18
    assert changed_fields(runs) == {"ppo.seed": {"a": 17, "b": 18}}
    only = {name: {"ppo": run["ppo"]} for name, run in runs.items()}
    assert changed_fields(only) == {"seed": {"a": 17, "b": 18}}


def test_the_table_of_runs_is_beside_the_page_unrounded(page: Path) -> None:
    with (page.parent / "tables" / "runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], float(row["set ppo.kl_coef"])) for row in rows] == [
        ("kl-0", 0.0), ("kl-0_05", 0.05), ("kl-0_5", 0.5),
    ]  # fmt: skip
    card = json.loads((page.parent / "scorecard.json").read_text())
    assert float(rows[1]["gold"]) == card["estimates"]["kl-0_05: ppo"]["gold"]["value"]
    assert rows[2]["note"] == "ppo stopped"
    with (page.parent / "tables" / "costs.csv").open(newline="") as file:
        costs = {(row["run"], row["stage"]): row for row in csv.DictReader(file)}
    assert costs["kl-0_5", "sft"]["shared"] == "true" and costs["kl-0_5", "ppo"]["shared"] == "false"
    assert float(costs["kl-0_5", "ppo"]["seconds"]) == 62.0


# --- the front --------------------------------------------------------------------------------------------------------


def point(label: str, kl: float, score: float) -> Point:
    return Point(label, label, {"value": kl}, {"value": score})


def test_the_front_has_what_no_other_beats() -> None:
    a, b, c, d = point("a", 0, 0.5), point("b", 3, 0.4), point("c", 4, 0.7), point("d", 4, 0.6)
    assert pareto_front([d, c, b, a], "higher") == [a, c]
    assert pareto_front([a, b, c, d], "lower") == [a, b]
    assert pareto_front([point("far", 9, 0.7), c], None) == [c], "the same score for more KL is no better"


def test_the_best_trade_offs_are_named_and_listed(page: Path) -> None:
    assert "Best trade-offs of gold score and KL: sft, kl-0_05: ppo, kl-0: ppo." in text_of(page, "summary")
    rows = json.loads((page.parent / "tables" / "trade-offs.json").read_text())["rows"]
    assert {row["system"]: row["best"] for row in rows} == {
        "model": False, "sft": True, "kl-0: ppo": True, "kl-0_05: ppo": True, "kl-0_5: ppo": False,
    }  # fmt: skip
    assert "the best trade-offs are sft, kl-0_05: ppo, kl-0: ppo" in (
        page.parent / "figures" / "trade-off-gold.svg"
    ).read_text()  # fmt: skip


def test_kl_to_different_references_is_said_to_be_no_comparison(tmp_path: Path) -> None:
    runs = make_sweep(tmp_path / "runs", {"a": (0.5, 1.0), "b": (0.6, 2.0)})
    path = runs["b"]["evaluate"].path / "scorecard.json"
    path.write_text(path.read_text().replace('"k1"', '"another"'))
    text = write_comparison(runs, tmp_path / "out" / "compare.html").read_text()
    assert "Runs measure KL to different references" in text


# --- curves and the page ----------------------------------------------------------------------------------------------


def test_curves_of_a_stage_that_differs_lie_over_each_other(page: Path) -> None:
    curves = json.loads(text_of(page, "curves").split('id="curves-data">')[1].split("</script>")[0])
    assert [(curve["stage"], [line["name"] for line in curve["lines"]]) for curve in curves] == [
        ("ppo", list(OUTCOMES)), ("ppo", list(OUTCOMES)),
    ]  # fmt: skip
    # without curves, since they are the same in all runs
    assert "sft" in text_of(page, "costs").split("without curves here:")[1]
    assert (page.parent / "figures" / "curve-ppo-kl.svg").is_file()


def test_runs_beyond_the_room_of_a_panel_are_named(tmp_path: Path) -> None:
    runs = {}
    for number in range(23):
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        # Only the last run logs KL: a panel of it would have no line.
        curves = {"loss": [2.0, 1.0]} | ({"kl": [0.0, 1.0]} if number == 22 else {})
        ppo = write_artifact(folder, "ppo", Kind.POLICY, (), curves, key=f"{number:02}" * 32)
        runs[f"run-{number}"] = {"ppo": ppo}
    text = text_of(write_comparison(runs, tmp_path / "out" / "compare.html"), "curves")
    curves = json.loads(text.split('id="curves-data">')[1].split("</script>")[0])
    assert [(curve["title"], len(curve["lines"])) for curve in curves] == [("loss", 21)]
    assert "Runs without curves here: run-21, run-22. There is room for the first 21." in text


def test_no_two_runs_of_a_panel_look_alike() -> None:
    line = Events(series={"loss": ([1.0, 2.0], [3.0, 2.0])})
    svg = str(draw_run_curves("loss", {f"run {number}": line for number in range(14)}).svg)
    styles = re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="(fill: none;[^"]*)"', svg)
    curve_styles = [style for style in styles if "stroke-width: 1.4" in style]
    assert len(curve_styles) == 14 and len(set(curve_styles)) == 14


def test_the_page_has_everything_and_nothing_hostile_is_markup(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<b>Take kl-0: ppo</b>: its gold score of 0.757" in text_of(page, "summary")
    assert "▼ −0.300" in text_of(page, "summary")
    runs = text_of(page, "runs")
    assert "ppo.kl_coef" in runs and "0.05" in runs and "⚠ ppo stopped" in runs and "learning_rate" not in runs
    assert "kl-0_05: ppo" in text_of(page, "scorecard")
    assert HOSTILE.split("<img")[0] not in text and "&lt;script&gt;document.title" in text
    assert "src=x onerror" not in text.replace("&lt;img src=x onerror", "").replace("\\u003cimg src=x onerror", "")
    assert "http://" not in text.replace("http://www.w3.org", "").replace("http://x.invalid", "")


def test_writing_again_replaces_what_is_beside_it(sweep: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    write_comparison(sweep, out)
    assert (tmp_path / "figures" / "trade-off-gold.svg").is_file()
    two = {name: {stage: run[stage] for stage in ("model", "sft")} for name, run in list(sweep.items())[:2]}
    write_comparison(two, out)
    assert not (tmp_path / "figures" / "trade-off-gold.svg").exists()
    assert not (tmp_path / "scorecard.json").exists() and not (tmp_path / "samples.jsonl").exists()
    assert "None of these runs has an evaluation" in out.read_text()


@needs_browser
def test_in_a_browser_nothing_is_asked_for_and_the_scripts_work(page: Path) -> None:
    with chromium() as driver:
        for width in (1280, 390):
            resize(driver, width, 900)
            console(driver), requests(driver, page)
            driver.get(page.as_uri())
            assert console(driver) == [] and requests(driver, page) == []
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.title == "Comparison of runs"
        assert driver.find_element("css selector", "#shown").text == "10 of 40 prompts"
        figure = driver.find_element("css selector", "figure.curve")
        figure.send_keys("\ue014")  # the right arrow
        assert "kl-0_05" in figure.find_element("css selector", ".reading").text
