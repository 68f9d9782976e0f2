"""Runs that differ by seed alone: groups, means and tests over seeds by hand, the section on the page."""

import csv
import json

import pytest

from align.errors import UserError
from align.report.compare.comparison import write_comparison
from align.report.compare.over_seeds import compare_over_seeds, group_by_seed
from align.report.compare.seed_section import seed_section
from align.report.page.assets import AssetWriter
from tests.support.report.example_run import HOSTILE
from tests.support.report.example_sweep import make_sweep

GOLD = {"a1": 0.70, "a2": 0.72, "a3": 0.74, "b1": 0.60, "b2": 0.65, "b3": 0.61}


def make_runs(root, gold=GOLD):
    """Return runs named by setting and seed: setting b has another KL penalty than a."""
    runs = make_sweep(root, {name: (value, 2.0) for name, value in gold.items()})
    for name, artifacts in runs.items():
        # SFT and the imported model ran once, under the first seed, and all runs share them.
        for stage in ("ppo", "evaluate"):
            artifacts[stage].record["seed"] = int(name[1])
        artifacts["ppo"].record["config"]["kl_coef"] = 0.0 if name[0] == "a" else 0.5
    return runs


def difference(seeds, policy, against, metric="gold"):
    rows = seeds.card["differences"]
    return next(row for row in rows if (row["policy"], row["against"], row["metric"]) == (policy, against, metric))


def test_runs_of_one_setting_belong_together(tmp_path):
    groups = group_by_seed(make_runs(tmp_path))
    assert [(group.name, group.settings, group.runs) for group in groups] == [
        ("kl_coef=0.0", {"ppo.kl_coef": 0.0}, {"1": "a1", "2": "a2", "3": "a3"}),
        ("kl_coef=0.5", {"ppo.kl_coef": 0.5}, {"1": "b1", "2": "b2", "3": "b3"}),
    ]


def test_runs_that_differ_in_more_than_the_seed_are_refused(tmp_path):
    runs = make_runs(tmp_path, {"a1": 0.7, "b2": 0.6})
    with pytest.raises(UserError, match=r"no two .* only by their seed; they also differ in ppo.kl_coef"):
        group_by_seed(runs)


def test_the_same_seed_twice_is_refused(tmp_path):
    runs = make_runs(tmp_path)
    for stage in ("ppo", "evaluate"):
        runs["a3"][stage].record["seed"] = 2
    with pytest.raises(UserError, match=r"a3 and a2 have the same settings and the same seed \(2\)"):
        group_by_seed(runs)


def test_a_run_without_its_evaluation_is_named(tmp_path):
    runs = make_runs(tmp_path, {"a1": 0.7, "a2": 0.6, "a3": 0.8})
    (runs["a2"]["evaluate"].path / "scorecard.json").write_text("{")
    with pytest.raises(UserError, match="a2: the scorecard of evaluate cannot be read"):
        compare_over_seeds(runs)


def test_settings_with_the_same_seeds_are_paired_by_hand(tmp_path):
    seeds = compare_over_seeds(make_runs(tmp_path))
    assert seeds.candidates == ["kl_coef=0.0: ppo", "kl_coef=0.5: ppo"]
    mean = seeds.estimate("kl_coef=0.0: ppo", "gold")
    # Standard error 0.02 / √3, times 4.302653: ± 0.049683.
    assert mean["high"] - mean["value"] == pytest.approx(0.049683, abs=1e-6)
    row = difference(seeds, "kl_coef=0.5: ppo", "kl_coef=0.0: ppo")
    # By seed −0.10, −0.07, −0.13: mean −0.1, error 0.03 / √3, t = −5.773503, p = 1 − 5.773503 / √(2 + 33.3333).
    assert (row["test"], row["n"], row["value"]) == ("paired t", 3, pytest.approx(-0.1))
    assert row["p"] == pytest.approx(0.028714, abs=1e-5)
    # The family has three: 0.0027 · 3, 0.0158 · 2 and 0.0287 · 1, which may not be below the one before it.
    assert row["p_holm"] == pytest.approx(2 * 0.015818, abs=1e-4)
    assert row["verdict"] == "worse"
    decision = seeds.decision
    assert decision.lead == "Take kl_coef=0.0: ppo"
    assert (
        "kl_coef=0.5: ppo is clearly below it; closest is kl_coef=0.5: ppo, a difference of +0.100" in decision.reason
    )


def test_other_seeds_are_compared_by_welch(tmp_path):
    runs = make_runs(tmp_path, {"a1": 0.70, "a2": 0.72, "a3": 0.74, "b4": 0.69, "b5": 0.77})
    seeds = compare_over_seeds(runs)
    row = difference(seeds, "kl_coef=0.5: ppo", "kl_coef=0.0: ppo")
    assert (row["test"], row["n"], row["verdict"]) == ("Welch's t", 2, "unclear")
    assert seeds.decision.kind == "unclear"
    assert "over 2 to 3 seeds, and none is clearly below the highest" in seeds.decision.reason


def test_checkpoints_of_one_setting_are_compared(tmp_path):
    seeds = compare_over_seeds(make_runs(tmp_path, {"a1": 0.70, "a2": 0.72, "a3": 0.74}))
    assert seeds.candidates == ["model", "sft", "ppo"]
    assert seeds.estimate("sft", "gold")["low"] is None
    assert difference(seeds, "ppo", "sft")["test"] == "paired t"
    assert seeds.decision.lead == "Take ppo"
    rows = {row["system"]: row for row in seed_section(seeds, AssetWriter())["rows"]}
    assert rows["sft"]["seeds"] == "the same weights in all runs"
    assert rows["ppo"]["seeds"] == "3 seeds"


def test_scores_of_a_reward_model_may_be_the_primary_metric(tmp_path):
    runs = make_runs(tmp_path)
    for run in runs.values():
        path = run["evaluate"].path / "scorecard.json"
        card = json.loads(path.read_text()) | {"primary": "reward"}
        for entry in (card["metrics"], *card["estimates"].values()):
            entry["reward"] = entry["gold"]
        path.write_text(json.dumps(card))
    assert compare_over_seeds(runs).decision.lead == "Take kl_coef=0.0: ppo"


def test_the_page_its_tables_and_hostile_settings(tmp_path):
    runs = make_runs(tmp_path / "runs")
    for name, artifacts in runs.items():
        if name[0] == "b":
            artifacts["ppo"].record["config"]["kl_coef"] = HOSTILE
    page = write_comparison(runs, tmp_path / "out" / "compare.html", seeds=compare_over_seeds(runs))
    text = page.read_text(encoding="utf-8")
    assert 'href="#seeds"' in text and "<b>Take kl_coef=0.0: ppo</b>" in text
    assert "<script>document.title" not in text and "\x1b" not in text
    with (page.parent / "tables" / "seeds.csv").open() as file:
        points = [row for row in csv.DictReader(file) if (row["system"], row["metric"]) == ("ppo", "gold")]
    assert [(row["run"], row["seed"]) for row in points] == [(name, name[1]) for name in GOLD]
    assert (page.parent / "figures" / "over-seeds.svg").is_file()
