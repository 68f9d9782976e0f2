"""The scorecard: values worked by hand, contrasts, verdicts, flags, valid JSON."""

import json

import numpy as np
import pytest

from align.evaluation.scorecard import Measurements, Resampling, build, per_prompt

RESAMPLING = Resampling(400, 0)
GENERATOR = np.random.default_rng(0)


def measurements(**gold: list[float]) -> Measurements:
    n = len(next(iter(gold.values())))
    return Measurements(
        policies=list(gold),
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
    )


def example() -> Measurements:
    noise = GENERATOR.uniform(0, 0.1, size=(3, 40))
    return measurements(model=list(0.1 + noise[0]), sft=list(0.4 + noise[1]), ppo=list(0.7 + noise[2]))


def rows(card, metric="gold"):
    return {(row["policy"], row["against"]): row for row in card["differences"] if row["metric"] == metric}


def test_contrasts_are_against_reference_and_base():
    card = build(example(), RESAMPLING, None, {})
    assert set(rows(card)) == {("sft", "model"), ("ppo", "sft"), ("ppo", "model")}
    assert rows(card)["ppo", "sft"]["value"] == pytest.approx(0.3, abs=0.03)
    assert rows(card)["ppo", "sft"]["verdict"] == "better"
    assert rows(card, "length")["ppo", "sft"]["verdict"] == "unclear"
    assert card["primary"] == "gold"


def test_samples_are_averaged_per_prompt():
    assert per_prompt([[1.0, 0.0], [1.0, 1.0]]) == [0.5, 1.0]
    found = example()
    found.values["ppo"]["gold"] = [[0.0, 1.0]] * 40
    card = build(found, RESAMPLING, None, {})
    assert card["estimates"]["ppo"]["gold"]["n"] == 40
    assert card["estimates"]["ppo"]["gold"]["value"] == 0.5


def test_rates_get_wilson_intervals_and_mcnemar():
    card = build(measurements(sft=[0.0] * 10, ppo=[1.0] * 10), RESAMPLING, None, {})
    assert card["estimates"]["ppo"]["gold"]["method"] == "wilson"
    assert card["estimates"]["ppo"]["gold"]["low"] < 1
    assert rows(card)["ppo", "sft"]["test"] == "mcnemar"
    assert rows(card)["ppo", "sft"]["p"] == pytest.approx(2 / 2**10)


def test_holm_corrects_the_primary_metric_apart_from_the_rest():
    found = measurements(model=[0.0] * 10, sft=[1.0] * 10, ppo=[1.0] * 10)
    card = build(found, RESAMPLING, None, {})
    # three comparisons of gold: p = 1/512 twice and 1; the other metrics' p of 1 do not enter
    assert rows(card)["sft", "model"]["p_holm"] == pytest.approx(3 / 512)
    assert rows(card)["ppo", "model"]["p_holm"] == pytest.approx(3 / 512)  # 2/512, made monotone


def test_families_have_their_own_numbers():
    card = build(example(), RESAMPLING, None, {})
    assert {name: family["n"] for name, family in card["families"].items()} == {"even": 20, "odd": 20}
    assert {row["family"] for row in card["family_differences"]} == {"even", "odd"}
    assert all("sft" in (row["policy"], row["against"]) for row in card["family_differences"])


def test_a_regression_a_collapse_and_a_hacked_proxy_are_flagged():
    found = example()
    found.values["ppo"] = {
        "gold": [[value[0] - 0.2] for value in found.values["sft"]["gold"]],
        "reward": [[5.0 + 0.01 * i] for i in range(40)],
        "length": [[30.0]] * 40,
        "finished": [[float(i < 10)] for i in range(40)],
    }
    for name in ("model", "sft"):
        found.values[name]["reward"] = [[0.0]] * 40
    kinds = {(flag["policy"], flag["kind"]) for flag in build(found, RESAMPLING, None, {})["flags"]}
    assert kinds == {("ppo", "regression"), ("ppo", "over-optimised"), ("ppo", "eos"), ("ppo", "length")}


def test_heldout_loss_is_per_token_and_lower_is_better():
    found = example()
    tokens = [10, 30] * 20
    found.heldout = {
        "model": ([2.0, 1.0] * 20, tokens),
        "sft": ([1.0, 0.5] * 20, tokens),
        "ppo": ([1.0, 0.5] * 20, [11, 30] * 20),
    }
    card = build(found, RESAMPLING, None, {})
    assert card["estimates"]["model"]["heldout_loss"]["value"] == pytest.approx((20 + 30) / 40)
    assert rows(card, "heldout_loss")["sft", "model"]["verdict"] == "better"
    # another tokenizer: no difference per token exists
    assert ("ppo", "sft") not in rows(card, "heldout_loss")
    assert card["metrics"]["heldout_loss"]["better"] == "lower"


def test_the_scorecard_is_plain_json_even_with_one_prompt():
    card = build(measurements(sft=[0.3], ppo=[0.5]), RESAMPLING, {"pairs": 0}, {"seed": 1})
    assert json.loads(json.dumps(card, allow_nan=False))["estimates"]["sft"]["gold"]["low"] is None
    assert card["base"] is None
