"""The scorecard: values worked by hand, contrasts, verdicts, flags, valid JSON."""

import json

import numpy as np
import pytest

from align.evaluation.answers import Item, Measured
from align.evaluation.comparisons import Column, Resampling, difference, estimate, per_item
from align.evaluation.scorecard import Metric, SystemInfo
from align.evaluation.scorecard.scorecard_builder import Measurements, TaskResult, build
from align.evaluation.tasks.base import Task

RESAMPLING = Resampling(400, 0)
GENERATOR = np.random.default_rng(0)


def info(name: str, role: str = "checkpoint", of: str = "", **more) -> SystemInfo:
    return SystemInfo(name, of or name, role, f"key of {name}", **more)


def measurements(**gold: list[float]) -> Measurements:
    n = len(next(iter(gold.values())))
    return Measurements(
        systems=[info(name, "base" if name == "model" else "checkpoint") for name in gold],
        reference="sft",
        base="model" if "model" in gold else None,
        sources=["odd" if i % 2 else "even" for i in range(n)],
        values={
            name: {
                "gold": [[value] for value in values],
                "length": [[10.0]] * n,
                "finished": [[1.0]] * n,
            }
            for name, values in gold.items()
        },
        programs={"gold": ("higher", "share of the constraints that hold")},
    )


def example() -> Measurements:
    noise = GENERATOR.uniform(0, 0.1, size=(3, 40))
    return measurements(model=list(0.1 + noise[0]), sft=list(0.4 + noise[1]), ppo=list(0.7 + noise[2]))


def rows(card, metric="gold"):
    return {(row["policy"], row["against"]): row for row in card["differences"] if row["metric"] == metric}


def test_contrasts_are_against_reference_and_base():
    card = build(example(), RESAMPLING, {})
    assert set(rows(card)) == {("sft", "model"), ("ppo", "sft"), ("ppo", "model")}
    assert rows(card)["ppo", "sft"]["value"] == pytest.approx(0.3, abs=0.03)
    assert rows(card)["ppo", "sft"]["verdict"] == "better"
    assert rows(card, "length")["ppo", "sft"]["verdict"] == "unclear"
    assert card["primary"] == "gold"


def test_a_base_that_is_the_reference_is_compared_with_once():
    card_inputs = measurements(model=[0.1, 0.2], sft=[0.3, 0.5])
    card_inputs.reference = "model"
    rows = [(row["policy"], row["against"], row["metric"]) for row in build(card_inputs, RESAMPLING, {})["differences"]]
    assert ("sft", "model", "gold") in rows and len(set(rows)) == len(rows)


def test_samples_are_averaged_per_item():
    assert per_item([[1.0, 0.0], [1.0, 1.0]]) == [0.5, 1.0]
    actual = example()
    actual.values["ppo"]["gold"] = [[0.0, 1.0]] * 40
    card = build(actual, RESAMPLING, {})
    assert card["estimates"]["ppo"]["gold"]["n"] == 40
    assert card["estimates"]["ppo"]["gold"]["value"] == 0.5


def test_rates_get_wilson_intervals_and_mcnemar():
    card = build(measurements(sft=[0.0] * 10, ppo=[1.0] * 10), RESAMPLING, {})
    assert card["estimates"]["ppo"]["gold"]["method"] == "wilson"
    assert card["estimates"]["ppo"]["gold"]["low"] < 1
    assert rows(card)["ppo", "sft"]["test"] == "mcnemar"
    assert rows(card)["ppo", "sft"]["p"] == pytest.approx(2 / 2**10)


def test_holm_corrects_the_primary_metric_apart_from_the_rest():
    card_inputs = measurements(model=[0.0] * 10, sft=[1.0] * 10, ppo=[1.0] * 10)
    card = build(card_inputs, RESAMPLING, {})
    # three comparisons of gold: p = 1/512 twice and 1; the other metrics' p of 1 do not enter
    assert rows(card)["sft", "model"]["p_holm"] == pytest.approx(3 / 512)
    assert rows(card)["ppo", "model"]["p_holm"] == pytest.approx(3 / 512)  # 2/512, made monotone


def test_comparing_with_baselines_costs_the_stages_no_power():
    card_inputs = measurements(model=[0.0] * 10, sft=[1.0] * 10, ppo=[1.0] * 10, asked=[0.0] * 10)
    card_inputs.systems[3] = info("asked", "prompted", "model", system="be good")
    card = build(card_inputs, RESAMPLING, {})
    assert rows(card)["sft", "model"]["p_holm"] == pytest.approx(3 / 512)
    # three comparisons with the prompted system: p = 1/512 twice and 1
    assert rows(card)["ppo", "asked"]["p_holm"] == pytest.approx(3 / 512)


def test_families_have_their_own_numbers():
    card = build(example(), RESAMPLING, {})
    assert {name: family["n"] for name, family in card["families"].items()} == {"even": 20, "odd": 20}
    assert {row["family"] for row in card["family_differences"]} == {"even", "odd"}
    assert all("sft" in (row["policy"], row["against"]) for row in card["family_differences"])


def test_a_regression_a_collapse_and_a_hacked_proxy_are_flagged():
    card = example()
    card.values["ppo"] = {
        "gold": [[value[0] - 0.2] for value in card.values["sft"]["gold"]],
        "reward": [[5.0 + 0.01 * i] for i in range(40)],
        "length": [[30.0]] * 40,
        "finished": [[float(i < 10)] for i in range(40)],
    }
    for name in ("model", "sft"):
        card.values[name]["reward"] = [[0.0]] * 40
    kinds = {(flag["policy"], flag["kind"]) for flag in build(card, RESAMPLING, {})["flags"]}
    assert kinds == {("ppo", "regression"), ("ppo", "over-optimized"), ("ppo", "eos"), ("ppo", "length")}


def test_heldout_loss_is_per_token_and_lower_is_better():
    actual = example()
    tokens = [10, 30] * 20
    actual.heldout = {
        "model": ([2.0, 1.0] * 20, tokens),
        "sft": ([1.0, 0.5] * 20, tokens),
        "ppo": ([1.0, 0.5] * 20, [11, 30] * 20),
    }
    card = build(actual, RESAMPLING, {})
    assert card["estimates"]["model"]["heldout_loss"]["value"] == pytest.approx((20 + 30) / 40)
    assert rows(card, "heldout_loss")["sft", "model"]["verdict"] == "better"
    # another tokenizer: no difference per token exists
    assert ("ppo", "sft") not in rows(card, "heldout_loss")
    assert card["metrics"]["heldout_loss"]["better"] == "lower"


def test_the_scorecard_is_plain_json_even_with_one_prompt():
    card = build(measurements(sft=[0.3], ppo=[0.5]), RESAMPLING, {"seed": 1})
    assert json.loads(json.dumps(card, allow_nan=False))["estimates"]["sft"]["gold"]["low"] is None
    assert card["base"] is None


def test_changing_a_card_changes_no_later_one():
    card_inputs = measurements(sft=[0.3, 0.4], ppo=[0.5, 0.2])
    build(card_inputs, RESAMPLING, {})["metrics"]["gold"]["title"] = "something else"
    assert build(card_inputs, RESAMPLING, {})["metrics"]["gold"]["title"] == "gold"


class Quiz(Task):
    """A task with a rate, a ratio of sums, and a metric that only some items take part in."""

    name = kind = title = "quiz"
    primary = "right"
    metrics = {
        "right": Metric("Right", "higher", "share", "is right"),
        "loss": Metric("Loss", "lower", "nats", "per word"),
        "safe": Metric("Safe", "lower", "share", "of odd items"),
    }
    items = [Item(str(i), "odd" if i % 2 else "even", []) for i in range(6)]

    def extras(self):
        return {"win_rates": [{"task": "quiz", "judge": "j", "one": "sft", "other": "ppo", "n": 4, "disagreements": 3}]}


def quiz(**right: list[float]) -> TaskResult:
    def measured(values: list[float]) -> Measured:
        return Measured(
            values={
                "right": [[value] for value in values],
                "loss": [[value + 1] for value in values],
                "safe": [[value] for value in values],
            },
            weights={"loss": [1.0, 1.0, 1.0, 1.0, 1.0, 5.0], "safe": [0.0, 1.0] * 3},
            notes={"cut off": 2},
        )

    return TaskResult(Quiz(), {name: measured(values) for name, values in right.items()})


def test_a_tasks_metrics_have_their_own_n_weights_and_sources():
    card_inputs = measurements(model=[0.1] * 4, sft=[0.2] * 4)
    card_inputs.tasks = [quiz(model=[0, 0, 0, 0, 0, 0], sft=[1, 0, 1, 1, 1, 1])]
    card = build(card_inputs, RESAMPLING, {})
    estimates = card["estimates"]["sft"]
    assert (estimates["quiz.right"]["value"], estimates["quiz.right"]["n"]) == (pytest.approx(5 / 6), 6)
    assert estimates["quiz.right"]["method"] == "wilson"
    # (2 + 1 + 2 + 2 + 2 + 5 * 2) / 10, while the plain mean is 11/6
    assert estimates["quiz.loss"]["value"] == pytest.approx(1.9)
    # items 1, 3, 5 alone take part: 0, 1, 1
    assert (estimates["quiz.safe"]["value"], estimates["quiz.safe"]["n"]) == (pytest.approx(2 / 3), 3)
    assert card["task_families"]["quiz"]["odd"]["estimates"]["sft"]["quiz.right"]["value"] == pytest.approx(2 / 3)
    assert card["task_families"]["quiz"]["even"]["estimates"]["sft"]["quiz.safe"]["n"] == 0
    assert rows(card, "quiz.safe")["sft", "model"]["n"] == 3
    assert card["tasks"]["quiz"]["notes"]["sft"] == {"cut off": 2}
    assert card["metrics"]["quiz.loss"]["task"] == "quiz"
    assert card["flags"][-1]["kind"] == "judge"
    json.dumps(card, allow_nan=False)


def test_without_prompts_the_first_tasks_own_metric_decides():
    actual = Measurements(
        [info("model", "base"), info("sft")], "sft", "model", tasks=[quiz(model=[0] * 6, sft=[1] * 6)]
    )
    card = build(actual, RESAMPLING, {})
    assert card["primary"] == "quiz.right"
    assert card["families"] == {}
    assert rows(card, "quiz.right")["sft", "model"]["p_holm"] == pytest.approx(2 / 2**6)


def test_checkpoints_are_compared_with_prompting_and_best_of_n():
    card_inputs = measurements(model=[0.1] * 4, sft=[0.2] * 4, ppo=[0.3] * 4, asked=[0.2] * 4, best=[0.4] * 4)
    card_inputs.systems[3] = info("asked", "prompted", "model", system="be good")
    card_inputs.systems[4] = info("best", "best_of", "sft", best_of=8)
    card_inputs.values["sft"]["kl"] = [[0.0]] * 4
    card = build(card_inputs, RESAMPLING, {})
    assert set(rows(card)) == {
        ("sft", "model"), ("ppo", "sft"), ("ppo", "model"), ("ppo", "asked"), ("ppo", "best"),
        ("asked", "sft"), ("asked", "model"), ("best", "sft"), ("best", "model"),
    }  # fmt: skip
    # log 8 - 7/8
    assert card["estimates"]["best"]["kl"]["value"] == pytest.approx(1.204442)
    assert "kl" not in card["estimates"]["asked"]
    assert card["systems"][4] == {"name": "best", "of": "sft", "role": "best_of", "key": "key of best", "system": "",
                                  "shots": 0, "best_of": 8}  # fmt: skip


def test_a_gate_that_breaks_is_in_the_card():
    from align.config.stages.evaluation.gates import parse_gates

    card_inputs = measurements(model=[0.1] * 4, sft=[0.5] * 4, ppo=[0.2] * 4)
    card_inputs.gates = parse_gates({"gold": ">= sft - 0.02"}, ["model", "sft", "ppo"], "sft")
    (gate,) = build(card_inputs, RESAMPLING, {})["gates"]
    assert (gate["system"], gate["passed"], gate["level"]) == ("ppo", False, "error")
    assert "0.2" in gate["text"]


def test_only_items_that_both_answer_are_paired():
    first = Column([[1.0], [], [3.0], [4.0]])
    second = Column([[0.0], [9.0], [1.0], [0.0]], [1.0, 1.0, 1.0, 0.0])
    row = difference(first, second, RESAMPLING)
    assert (row["value"], row["n"]) == (1.5, 2)
    assert difference(Column([[1.0]], [2.0]), Column([[1.0]], [3.0]), RESAMPLING) is None
    assert estimate(Column([[1.0], [5.0]], [3.0, 1.0]), False, RESAMPLING)["value"] == 2.0


def test_without_the_base_model_the_card_says_so():
    kinds = [flag["kind"] for flag in build(measurements(sft=[0.3] * 3), RESAMPLING, {})["flags"]]
    assert kinds == ["no-base"]
    assert not build(measurements(model=[0.3] * 3, sft=[0.3] * 3), RESAMPLING, {})["flags"]
