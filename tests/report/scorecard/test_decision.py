"""The sentence at the top of a page: which checkpoint to take, or that none can be told apart."""

import json

import numpy as np
import pytest

from align.evaluation.comparisons import Resampling
from align.evaluation.scorecard import SystemInfo
from align.evaluation.scorecard.scorecard_builder import Measurements, build
from align.report.compare import merged_scorecard
from align.report.run.run_report import write_report
from align.report.scorecard.conclusions import group_findings
from align.report.scorecard.decision import checkpoints, decide_by_items, find_best, item_columns
from align.store.artifacts import Artifact, Kind
from tests.support.report.example_card import SETTINGS
from tests.support.report.example_run import HOSTILE, write_artifact, write_evaluation

N = 40
NOISE = np.random.default_rng(5).uniform(0, 0.2, N)
FLIPS = np.where(np.arange(N) % 2, 0.05, -0.05)


def make_card(columns, best_of=()):
    """Return a card and columns by item of systems with these gold scores."""
    systems = [
        SystemInfo(name, name, "best_of", name, "", 0, 8)
        if name in best_of
        else SystemInfo(name, name, "base" if name == "model" else "checkpoint", name)
        for name in columns
    ]
    measurements = Measurements(systems, "sft", "model")
    measurements.programs = {"gold": ("higher", "share of the constraints that hold")}
    measurements.sources = ["all"] * N
    measurements.values = {name: {"gold": [[float(value)] for value in column]} for name, column in columns.items()}
    card = build(measurements, Resampling(300, 0), {**SETTINGS, "prompts": N})
    by_item = {
        (name, "gold"): {("prompts", str(index)): [float(value)] for index, value in enumerate(column)}
        for name, column in columns.items()
    }
    return card, by_item


def sentence(columns, **options):
    card, by_item = make_card(columns, **options)
    decision = decide_by_items(card, by_item, checkpoints(card))
    return decision.kind, f"{decision.lead}: {decision.reason}"


def test_columns_have_the_primary_metric_only(tmp_path):
    card, by_item = make_card({"sft": NOISE, "ppo": NOISE + 0.1})
    lines = []
    for index in range(N):
        values = {name: {"gold": by_item[name, "gold"]["prompts", str(index)], "kl": [0.5]} for name in ("sft", "ppo")}
        lines.append(json.dumps({"task": "prompts", "id": str(index), "source": "all", "values": values}) + "\n")
    (tmp_path / "items.jsonl").write_text("".join(lines))
    columns = item_columns([Artifact("evaluate", Kind.SCORECARD, tmp_path, {})], card)
    assert list(columns) == [("sft", "gold"), ("ppo", "gold")]
    assert [list(samples) for samples in columns["ppo", "gold"].values()] == list(by_item["ppo", "gold"].values())


@pytest.mark.parametrize(("draws", "fewest", "resamples"), [(10**9, 100, 300), (N * 200, 100, 200), (1, 150, 150)])
def test_resamples_of_many_items_are_bounded(draws, fewest, resamples, monkeypatch):
    card, by_item = make_card({"sft": NOISE, "ppo": NOISE + 0.1})
    monkeypatch.setattr(merged_scorecard, "MAX_DRAWS", draws)
    monkeypatch.setattr(merged_scorecard, "MIN_RESAMPLES", fewest)
    used = []
    monkeypatch.setattr(merged_scorecard, "difference", lambda first, second, resampling: used.append(resampling))
    assert merged_scorecard.paired_difference(by_item, ("ppo", "sft", "gold"), card) is None
    assert [resampling.resamples for resampling in used] == [resamples]


def test_four_ties_at_zero_have_no_winner():
    kind, text = sentence(dict.fromkeys(("model", "sft", "dpo", "ppo"), np.zeros(N)))
    assert kind == "unclear"
    assert text == (
        "No checkpoint can be told apart from the others: in gold score, model, sft, dpo and ppo all have 0.000 on "
        "40 held-out prompts."
    )


def test_numbers_that_differ_by_noise_have_no_winner():
    kind, text = sentence({"model": NOISE, "sft": NOISE + 0.001 + FLIPS, "ppo": NOISE - 0.001 - FLIPS})
    assert kind == "unclear"
    assert text.startswith("No checkpoint can be told apart from the others: in gold score, model, sft and ppo lie")
    assert text.endswith("and none is clearly below the highest, sft.")


def test_a_clear_winner_is_taken_with_the_closest_rival():
    kind, text = sentence({"model": NOISE, "sft": NOISE + 0.3, "ppo": NOISE + 0.5 + FLIPS})
    assert kind == "better"
    assert text.startswith("Take ppo: its gold score of 0.597 (95 % interval 0.")
    assert "model and sft are clearly below it; closest is sft, a difference of +0.200, 95 % interval +0.1" in text


def test_two_at_the_top_are_both_named():
    _, text = sentence({"model": NOISE, "sft": NOISE + 0.4, "ppo": NOISE + 0.401 + FLIPS})
    assert text.startswith("Take ppo or sft: ppo has the best gold score, 0.498")
    assert "cannot be told apart from it, and model is clearly below" in text


def test_a_checkpoint_that_is_sampled_again_is_no_choice():
    card, by_item = make_card({"sft": NOISE, "ppo": NOISE + 0.3, "ppo_again": NOISE + 0.31})
    card["systems"][2] |= {"role": "again", "of": "ppo"}
    assert checkpoints(card) == ["sft", "ppo"]
    decision = decide_by_items(card, by_item, checkpoints(card))
    assert decision.lead == "Take ppo"
    assert "ppo_again" not in decision.reason


def test_decision_names_failed_gate_and_untrained_rival():
    columns = {"model": NOISE, "sft": NOISE + 0.3, "best8": NOISE + 0.5 - FLIPS, "ppo": NOISE + 0.5 + FLIPS}
    card, by_item = make_card(columns, best_of=("best8",))
    card["gates"] = [
        {"name": "kl", "system": "ppo", "level": "error", "passed": False},
        {"name": "length", "system": "ppo", "level": "warning", "passed": False},
        {"name": "gold", "system": "sft", "level": "error", "passed": False},
    ]
    decision = decide_by_items(card, by_item, checkpoints(card))
    assert (decision.kind, decision.lead) == ("worse", "Take ppo")
    assert decision.reason.endswith("; but it fails the gate kl; but best8, without training, is not clearly worse.")


def test_lower_may_be_better():
    card, by_item = make_card({"model": NOISE + 0.5, "sft": NOISE})
    card["metrics"]["gold"]["better"] = "lower"
    decision = decide_by_items(card, by_item, checkpoints(card))
    assert decision.lead == "Take sft"
    assert "model is clearly above it; closest is model, a difference of −0.500" in decision.reason


@pytest.mark.parametrize(
    ("columns", "with_items", "words"),
    [
        ({"sft": NOISE}, True, "There is nothing to choose from: only sft was measured."),
        ({"model": NOISE, "sft": NOISE + 1}, False, "No checkpoint can be recommended: sft has the best gold score"),
    ],
)
def test_without_rivals_or_items_nothing_is_recommended(columns, with_items, words):
    card, by_item = make_card(columns)
    if not with_items:
        card["differences"] = []
    decision = decide_by_items(card, by_item if with_items else {}, checkpoints(card))
    assert f"{decision.lead}: {decision.reason}".startswith(words)


def test_decision_and_findings_share_one_family():
    """A difference that the scorecard calls unclear is not clear in the sentence at the top of the same page."""
    columns = {"model": NOISE - 0.5, "sft": NOISE, "dpo": NOISE + 0.1, "ppo": NOISE - 0.02 + 1.2 * FLIPS}
    card, by_item = make_card(columns)
    for row in card["differences"]:
        if {row["policy"], row["against"]} == {"ppo", "sft"}:
            row["p_holm"], row["verdict"] = 0.11, "unclear"
    best = find_best(card, by_item, ["sft", "ppo"])
    assert (best.name, best.differences["ppo"]["p_holm"]) == ("sft", 0.11)
    assert best.ties == ["ppo"]
    decision = decide_by_items(card, by_item, ["sft", "ppo"])
    assert decision.lead == "No checkpoint can be told apart from the others"


def test_new_comparisons_are_corrected_with_the_cards_own():
    columns = {"model": NOISE - 0.5, "sft": NOISE, "dpo": NOISE + 0.1, "ppo": NOISE + 0.1 - 0.012 + FLIPS}
    card, by_item = make_card(columns)
    alone = {**card, "differences": []}
    together = find_best(card, by_item, ["dpo", "ppo"]).differences["ppo"]
    assert together["p_holm"] >= find_best(alone, by_item, ["dpo", "ppo"]).differences["ppo"]["p_holm"]
    assert together["p"] <= together["p_holm"]


@pytest.mark.parametrize(("low", "decides"), [(0.357, False), (0.52, True)])
def test_reward_model_that_may_guess_decides_nothing(low, decides):
    card, by_item = make_card({"model": NOISE, "sft": NOISE + 0.3})
    for entry in (card["metrics"], *card["estimates"].values()):
        entry["reward"] = entry["gold"]
    card["primary"] = "reward"
    card["differences"] = [{**row, "metric": "reward"} for row in card["differences"]]
    accuracy = {"value": 0.6, "low": low, "high": 0.802, "n": 15, "method": "wilson"}
    card["reward_models"] = [{"stage": "rm", "as_labeled": accuracy}]
    decision = decide_by_items(card, by_item, checkpoints(card))
    if decides:
        assert decision.lead == "Take sft"
    else:
        assert decision.lead == "No checkpoint can be recommended"
        assert "the reward model 'rm' ranks 0.600 of 15 held-out pairs as labeled" in decision.reason


def make_reward_card(*reports):
    """Return a card whose primary metric is a reward model's score, with the accuracies of reward models."""
    card, by_item = make_card({"model": NOISE, "sft": NOISE + 0.3})
    for entry in (card["metrics"], *card["estimates"].values()):
        entry["reward"] = entry["gold"]
    card["primary"] = "reward"
    card["differences"] = [{**row, "metric": "reward"} for row in card["differences"]]
    card["reward_models"] = [
        {"stage": stage, "as_labeled": {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 400}}
        for stage, value in reports
    ]
    return card, by_item


def test_inverted_reward_model_recommends_nothing():
    """Case E of the decisions: 0.30 of the pairs, below chance with its whole interval."""
    card, by_item = make_reward_card(("rm", 0.30))
    decision = decide_by_items(card, by_item, checkpoints(card))
    assert decision.lead == "No checkpoint can be recommended"
    assert "ranks 0.300 of 400 held-out pairs" in decision.reason
    assert "it prefers what the labels reject" in decision.reason


@pytest.mark.parametrize(("first", "lead"), [(0.75, "Take sft"), (0.5, "No checkpoint can be recommended")])
def test_second_reward_model_decides_nothing(first, lead):
    """Cases F and G: only the reward model whose scores are the primary metric can forbid a decision."""
    card, by_item = make_reward_card(("rm", first), ("other", 0.5))
    assert decide_by_items(card, by_item, checkpoints(card)).lead == lead


def test_clear_difference_between_others_is_named():
    """Case C: sft is narrowly and clearly above the model, and ppo is above both with a wide spread."""
    wide = np.where(np.arange(N) % 2, 0.5, -0.5)
    columns = {"model": NOISE, "sft": NOISE + 0.05 + FLIPS / 5, "ppo": NOISE + 0.07 + wide}
    kind, text = sentence(columns)
    assert kind == "better"
    assert text.startswith("Take ppo or sft: ppo has the best gold score")
    assert "cannot be told apart from it, and model is clearly below sft" in text


def test_clear_difference_is_above_if_lower_is_better():
    wide = np.where(np.arange(N) % 2, 0.5, -0.5)
    columns = {"model": -NOISE, "sft": -NOISE - 0.05 + FLIPS / 5, "ppo": -NOISE - 0.07 + wide}
    card, by_item = make_card(columns)
    card["metrics"]["gold"]["better"] = "lower"
    for row in card["differences"]:
        row["verdict"] = {"better": "worse", "worse": "better"}.get(row["verdict"], row["verdict"])
    decision = decide_by_items(card, by_item, checkpoints(card))
    assert decision.lead == "Take ppo or sft"
    assert "model is clearly above sft" in decision.reason


@pytest.mark.parametrize("remove", [True, False])
def test_checkpoint_without_a_measurement_is_named(remove):
    """Case H: the primary value of ppo is missing, so the choice is among the others."""
    card, by_item = make_card({"model": NOISE, "sft": NOISE + 0.3, "ppo": NOISE + 0.5})
    if remove:
        del card["estimates"]["ppo"]["gold"]
    else:
        card["estimates"]["ppo"]["gold"]["value"] = None
    decision = decide_by_items(card, by_item, checkpoints(card))
    assert decision.lead == "Take sft"
    assert decision.reason.startswith("ppo was not measured; among the others, its gold score of")


def test_findings_are_grouped_with_problems_first():
    findings = [{"kind": kind, "text": kind} for kind in ("note", "unclear", "better", "worse", "unclear", "higher")]
    groups = group_findings(findings + [{"kind": "unclear", "text": str(index)} for index in range(4)])
    assert [(group["title"], len(group["rows"]), group["folded"]) for group in groups] == [
        ("Problems", 1, False), ("Clear changes", 2, False), ("No clear change", 6, True), ("Notes", 1, False),
    ]  # fmt: skip


def test_the_page_begins_with_the_sentence_and_names_stay_text(tmp_path):
    card, _ = make_card({"model": np.zeros(N), "sft": np.zeros(N), HOSTILE: np.zeros(N)})
    artifact = write_artifact(tmp_path, "evaluate", Kind.SCORECARD)
    write_evaluation(artifact, card, iter([]))
    text = write_report([artifact], card, tmp_path / "r.html").read_text(encoding="utf-8")
    assert text.index('class="decision') < text.index('class="heads"')
    assert "<script>document.title" not in text and "\x1b" not in text
