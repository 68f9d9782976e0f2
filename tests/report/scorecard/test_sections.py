"""Sections of an evaluation: gates, headlines, tables by task, win rates, reward models, score_plots."""

import json

import pytest

from align.report.page.assets import AssetWriter
from align.report.page.metric_series import Events
from align.report.run.run_report import write_report
from align.report.scorecard import reward_models, score_plots, win_rates
from align.report.scorecard import scorecard_tables as tables
from align.report.scorecard.conclusions import (
    find_difference,
    gate_rows,
    gate_sentence,
    headlines,
    last_change,
    measured_on,
    role,
    sentences,
    setup,
)
from align.report.scorecard.sections import evaluation_sections
from align.store.artifacts import Artifact, Kind
from tests.support.report.example_card import POLICIES, full_card, small_card
from tests.support.report.example_run import write_artifact, write_evaluation


@pytest.fixture(scope="module")
def card():
    return full_card()


def test_gates_that_fail_the_run_come_first_and_in_words(card):
    rows = gate_rows(card)
    assert [(row["name"], row["state"]) for row in rows] == [
        ("kl_to_sft", "failed"),
        ("best8/general.bits_per_byte", "undecided"),
        ("refusals.refused_safe", "warning"),
        ("ifeval.prompt_strict", "passed"),
        ("gold", "passed"),
    ]
    assert gate_sentence(rows) == "2 failed, 1 not met as a warning, 2 of 5 passed"
    assert rows[0]["outcome"] == "failed, the interval too"
    assert "fails the run" in rows[1]["outcome"]


def test_a_gate_missed_by_less_than_its_interval_says_so(card):
    gate = {**card["gates"][0], "passed": False, "clear": False, "level": "error"}
    assert gate_rows({"gates": [gate]})[0]["outcome"] == "failed, but the interval reaches over the bound"


def test_roles_and_setups(card):
    assert [role(card, name) for name in card["policies"]] == ["base", "reference", "", "prompted", "best of 8"]
    assert setup(card, "prompted") == "of model, 3 examples, a system prompt"
    assert setup(card, "best8") == "of sft"
    assert setup(card, "ppo") == ""


def test_training_is_held_against_what_needs_none(card):
    texts = [sentence["text"] for sentence in sentences(card)]
    assert any(text.startswith("ppo is not clearly different from best8 (best of 8, not trained)") for text in texts)


def test_result_of_a_card_is_its_last_trained_checkpoint(card):
    assert last_change(card).startswith("ppo raised the") or "ppo: no clear change" in last_change(card)
    assert last_change(card) in [sentence["text"] for sentence in sentences(card)]


def test_card_without_prompts_has_headlines_of_first_task():
    card = full_card(prompts=False)
    assert measured_on(card) == "40 items of IFEval"
    assert [head["estimate"]["n"] for head in headlines(card)] == [40] * 5
    assert "sft: no clear change in IFEval: Prompt, strict" in sentences(card)[0]["text"] or sentences(card)[0][
        "text"
    ].startswith("sft raised the IFEval: Prompt, strict over model")


def test_a_metric_that_a_system_lacks_is_a_dash_and_no_error(card):
    card = {**card, "primary": "general.bits_per_byte"}  # best8 has no distribution
    assert headlines(card)[-1]["estimate"] is None
    group = next(group for group in tables.task_groups(card) if group["task"] == "general")
    assert group["rows"][0]["cells"][-1]["value"] == "–"


def test_the_scorecard_by_task(card):
    groups = tables.task_groups(card)
    assert [(group["task"], group["n"]) for group in groups] == [
        ("prompts", 24), ("ifeval", 40), ("refusals", 40), ("general", 40), ("mt", 40),
    ]  # fmt: skip
    strict = groups[1]["rows"][0]
    assert (strict["main"], strict["about"]) == (True, ["share", "higher is better", "n 40"])
    changes = {change["against"]: change for change in strict["cells"][2]["changes"]}
    assert set(changes) == {"sft", "model"}
    row = find_difference(card, "ppo", "model", "ifeval.prompt_strict")
    assert row is not None
    assert changes["model"]["verdict"] == row["verdict"] == "better"
    refused = groups[2]["rows"][0]
    assert refused["about"][-1] == "n 20"  # items of weight 0 take no part
    kl = next(row for row in groups[0]["rows"] if row["metric"] == "kl")
    assert kl["cells"][-1]["value"].startswith("≤ ")


def test_sources_of_tasks(card):
    by_task = {table["task"]: table for table in tables.source_tables(card)}
    assert set(by_task) == {"ifeval", "refusals"}  # those with several
    assert [row["family"] for row in by_task["ifeval"]["rows"]] == ["format", "length"]
    safe = {row["family"]: row["cells"]["model"]["value"] for row in by_task["refusals"]["rows"]}
    assert safe["unsafe"] == "–"  # a rate over safe prompts says nothing there


def test_win_rates_are_seen_from_both_sides(card):
    (matrix,) = win_rates.matrices(card, AssetWriter())
    assert matrix["names"] == POLICIES
    cells = {row["name"]: dict(zip(matrix["names"], row["cells"], strict=True)) for row in matrix["rows"]}
    won, lost = cells["ppo"]["sft"], cells["sft"]["ppo"]
    assert (won["value"], won["mark"], won["counts"]) == (
        "0.660", "▲", "25 won · 5 tied · 10 lost · 7 contradicted",
    )  # fmt: skip
    assert (lost["value"], lost["mark"], lost["counts"]) == (
        "0.340", "▼", "10 won · 5 tied · 25 lost · 7 contradicted",
    )  # fmt: skip
    low, high = (float(end) for end in won["interval"].split(" to "))
    assert lost["interval"] == f"{1 - high:.3f} to {1 - low:.3f}"
    assert cells["sft"]["model"] is None
    assert cells["ppo"]["model"]["controlled"].startswith("0.812")
    assert matrix["counts"][0]["disagreements"] == "7 (15%)"
    assert matrix["counts"][0]["unreadable"] == "1"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.51, 0.7, "better"), (0.3, 0.49, "worse"), (0.5, 0.7, "unclear"), (None, None, "unclear")],
)
def test_a_win_rate_is_clear_only_beyond_one_half(low, high, verdict):
    assert win_rates.verdict({"value": 0.5, "low": low, "high": high}) == verdict


def test_reward_models(card):
    first, second = reward_models.sections(card, AssetWriter())
    named = {row["name"]: row["value"] for row in first["rows"]}
    assert named["as labeled"] == "0.800"
    assert named["where shorter is chosen"] == "0.600"
    assert named["calibration error (ECE)"] == "0.133"
    assert (named["the same, noise included"], named["temperature that fits best"]) == ("0.150", "1.70")
    assert "is it right where it is sure" in first["figures"][2].caption
    assert "two gold scores" in second["figures"][2].caption
    assert named["agreement with reward-b: Cohen's kappa"] == "0.550"
    assert [row["name"] for row in first["by_margin"]] == ["0.000 to 0.500", "0.500 to 1.00", "from 1.00"]
    assert [figure.name.split("-reward")[0] for figure in first["figures"]] == [
        "accuracy", "reliability", "margins", "accuracy-by-source",
    ]  # fmt: skip
    assert (first["sections"], [row["name"] for row in second["sections"]]) == ([], ["Chat", "Chat Hard"])


def test_sections_may_be_nested():
    nested = {"sections": {"Chat": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}, "Hard": {"a": 0.25}}}
    assert [(name, estimate["value"]) for name, estimate in reward_models._section_estimates(nested)] == [
        ("Chat", 0.5), ("Hard: a", 0.25),
    ]  # fmt: skip


def test_the_path_of_a_stage_over_its_updates():
    steps = [float(step) for step in range(1, 401)]
    events = Events({"kl": (steps, steps), "score": (steps, steps), "gold": (steps[:1], [0.5])})
    points = score_plots._path_points(events, "score")
    assert len(points) == score_plots.MAX_PATH_POINTS
    assert points[0] == (5.5, 5.5, 5.5)  # the mean of ten updates
    assert score_plots.training_path({"ppo": events}, "score") is not None
    assert score_plots.training_path({"ppo": events}, "gold") is None  # one point is no path
    assert score_plots.training_path({"ppo": Events({"kl": (steps, steps)})}, "score") is None
    assert score_plots.training_path({"ppo": Events({"score": (steps, steps)})}, "score") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [(json.dumps({**small_card(), "format": 1}), "has format 1, this align shows 3"), ("{", "cannot be read"),
     (None, "cannot be read")],
)  # fmt: skip
def test_a_scorecard_that_cannot_be_shown_is_said_and_no_error(tmp_path, text, words):
    artifact = write_artifact(tmp_path, "evaluate", Kind.SCORECARD)
    if text is not None:
        (artifact.path / "scorecard.json").write_text(text, encoding="utf-8")
    page = write_report([artifact], None, tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"The scorecard of evaluate {words}" in page
    assert "--rebuild evaluate" in page


def test_a_card_with_nothing_but_a_task(tmp_path):
    card = full_card(prompts=False)
    card |= {"win_rates": [], "reward_models": [], "gates": [], "flags": []}
    artifact = write_artifact(tmp_path, "evaluate", Kind.SCORECARD)
    write_evaluation(artifact, card, iter([]))
    page = write_report([artifact], None, tmp_path / "r.html").read_text(encoding="utf-8")
    assert "on 40 items of IFEval" in page
    assert 'id="samples"' not in page
    assert 'id="gates"' not in page


@pytest.mark.parametrize(("environment", "shown"), [({"class": "shop:Shop"}, 1), (None, 0)])
def test_episodes_are_looked_for_in_stages_with_an_environment(tmp_path, environment, shown):
    episode = {"text": "2", "messages": [{"role": "assistant", "content": "2"}], "calls": [], "turns": [{}]}
    line = {"prompt": [{"role": "user", "content": "1+1?"}], "scores": [1.0], "episodes": [episode]}
    (tmp_path / "samples.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    artifact = Artifact("sample", Kind.PREFERENCES, tmp_path, {"config": {"environment": environment}})
    sections = evaluation_sections([artifact], None, {}, AssetWriter(tmp_path / "assets"))
    assert [item["columns"] for item in sections["samples"]["items"]] == [["sample"]] * shown
