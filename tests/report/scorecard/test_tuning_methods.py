"""Comparison of tuning methods: names, costs, the best, and those not clearly below it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.evaluation.comparisons import Resampling
from align.evaluation.scorecard import SystemInfo
from align.evaluation.scorecard.scorecard_builder import Measurements, build
from align.report.page.assets import AssetWriter
from align.report.run.run_report import write_report
from align.report.scorecard.tuning_methods import describe_tuning, methods_section
from align.store.artifacts import Artifact, Kind
from tests.support.report.example_card import SETTINGS
from tests.support.report.example_run import HOSTILE, write_artifact

N = 60
NOISE = np.random.default_rng(3).uniform(0, 0.2, N)
GOLD = {
    "model": NOISE,
    "full": NOISE + 0.40,
    "lora": NOISE + 0.41 + np.where(np.arange(N) % 2, 0.05, -0.05),  # a hair better, by a coin's flip
    "prefix": NOISE + 0.1,
}
TUNING = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 16, "dora": True, "rslora": False, "init": "pissa"},
    "prefix": {"method": "prefix", "tokens": 20},
}


def write_run(root: Path, items: bool = True) -> tuple[list[Artifact], dict[str, Any]]:
    artifacts = [write_artifact(root, "model", Kind.MODEL)]
    for name, tuning in TUNING.items():
        metrics = {"trainable_parameters": 100 if name == "full" else 1, "parameters": 100}
        artifacts.append(
            write_artifact(root, name, Kind.POLICY, ("model",), metrics=metrics,
                           config={"learning_rate": 0.001, "tuning": tuning})
        )  # fmt: skip
        artifacts[-1].record["kind"] = "sft"
    measurements = Measurements(
        [SystemInfo(name, name, "base" if name == "model" else "checkpoint", name) for name in GOLD], "full", "model"
    )
    measurements.sources = ["all"] * N
    measurements.values = {name: {"gold": [[float(value)] for value in column]} for name, column in GOLD.items()}
    measurements.programs = {"gold": ("higher", "share of the constraints that hold")}
    card = build(measurements, Resampling(300, 0), {**SETTINGS, "prompts": N})
    artifacts.append(write_artifact(root, "evaluate", Kind.SCORECARD, tuple(GOLD)))
    if items:
        with (artifacts[-1].path / "items.jsonl").open("w") as file:
            for index in range(N):
                values = {name: {"gold": [float(column[index])]} for name, column in GOLD.items()}
                file.write(json.dumps({"task": "prompts", "id": str(index), "values": values}) + "\n")
    return artifacts, card


def test_the_best_is_named_and_what_cannot_be_told_from_it(tmp_path):
    artifacts, card = write_run(tmp_path)
    section = methods_section(artifacts, card, AssetWriter())
    assert {row["name"]: row["verdict"] for row in section["rows"]} == {
        "full": "not told apart from the best",
        "lora": "best",
        "prefix": "below the best",
    }
    assert section["sentence"].startswith("gold is best for lora: 0.5")
    assert section["sentence"].endswith("1 of 2 others are clearly below it; not told apart from it: full.")


def test_a_row_says_how_it_was_fitted_and_what_that_cost(tmp_path):
    artifacts, card = write_run(tmp_path)
    assets = AssetWriter()
    rows = {row["name"]: row for row in methods_section(artifacts, card, assets)["rows"]}
    assert (rows["lora"]["share"], rows["full"]["share"]) == ("1.00 %", "100.0 %")
    assert (rows["lora"]["time"], rows["lora"]["memory"], rows["lora"]["rate"]) == ("1 min 23 s", "3.0 GiB", "0.001")
    assets.write(tmp_path / "out")
    with (tmp_path / "out" / "tables" / "methods.csv").open() as file:
        lines = {line["stage"]: line for line in csv.DictReader(file)}
    assert float(lines["lora"]["gold"]) == pytest.approx(GOLD["lora"].mean())
    assert float(lines["prefix"]["to_best"]) == pytest.approx((GOLD["prefix"] - GOLD["lora"]).mean())
    assert lines["lora"]["to_best"] == ""


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"kind": "sft", "config": {"tuning": TUNING["lora"]}}, "sft, lora r16 DoRA pissa"),
        ({"kind": "sft", "config": {"tuning": TUNING["prefix"]}}, "sft, prefix 20"),
        ({"kind": "dpo", "config": {"loss": "ipo", "tuning": {"method": "full"}}}, "dpo, ipo, full"),
        ({"kind": "dpo", "config": {"loss": "sigmoid", "losses": {"ipo": 1.0, "sft": 0.2}}}, "dpo, ipo + sft, full"),
        ({"kind": "sft", "config": {"tuning": {"method": "peft", "type": "vera"}}}, "sft, vera"),
        ({"kind": "sft"}, "sft, full"),
        ({"kind": "sft", "config": {"tuning": {"method": "of the future", "rank": 3}}}, "sft, of the future"),
    ],
)
def test_names_are_short(record, words):
    assert describe_tuning(record) == words


def test_without_items_nothing_is_said_about_the_others(tmp_path):
    artifacts, card = write_run(tmp_path, items=False)
    section = methods_section(artifacts, card, AssetWriter())
    assert {row["verdict"] for row in section["rows"]} == {"best", ""}
    assert "not known which are really below it" in section["sentence"]


def test_one_checkpoint_is_nothing_to_compare(tmp_path):
    artifacts, card = write_run(tmp_path)
    card["systems"] = card["systems"][:2]
    assert methods_section(artifacts, card, AssetWriter()) is None


def test_it_stands_on_the_page_and_its_texts_stay_text(tmp_path):
    artifacts, card = write_run(tmp_path)
    artifacts[2].record["config"]["loss"] = HOSTILE
    text = write_report(artifacts, card, tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert "gold is best for lora" in text and 'href="#methods"' in text
    assert "<script>document.title" not in text and "\x1b" not in text
