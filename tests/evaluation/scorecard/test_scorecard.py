"""A stored scorecard read as typed objects: every field, look-ups, and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align import Scorecard
from tests.support.refusals import Refused
from tests.support.report.example_card import full_card


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    flag = {"policy": "ppo", "kind": "eos", "text": "cut"}
    return json.loads(json.dumps({**full_card(), "flags": [flag]}))


@pytest.fixture(scope="module")
def card(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Scorecard:
    return Scorecard.read(write(tmp_path_factory.mktemp("card"), content))


def write(folder: Path, content: Any) -> Path:
    (folder / "scorecard.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_nothing_of_the_file_is_changed(card: Scorecard, content: dict[str, Any]) -> None:
    dumped = card.model_dump(mode="json", by_alias=True)
    assert list(dumped["estimates"]) == content["policies"]
    for name in ("reference", "base", "primary", "policies", "systems", "estimates", "differences", "flags"):
        assert dumped[name] == content[name]
    # A metric of the prompt set has no ``halves`` in the file.
    assert dumped["metrics"] == {name: {"halves": False} | metric for name, metric in content["metrics"].items()}
    for name in ("win_rates", "gates"):
        rows = dumped[name].values() if isinstance(dumped[name], dict) else dumped[name]
        stored = content[name].values() if isinstance(content[name], dict) else content[name]
        assert len(rows) == len(stored) > 0
        for row, original in zip(rows, stored, strict=True):
            assert row == {key: original[key] for key in row}


def test_numbers_are_found_by_name(card: Scorecard, content: dict[str, Any]) -> None:
    assert card.primary == "gold"
    assert card.estimate("ppo") == card.estimates["ppo"]["gold"]
    assert card.estimate("ppo", "kl").value == content["estimates"]["ppo"]["kl"]["value"]
    row = card.difference("ppo")
    assert (row.policy, row.against, row.metric) == ("ppo", "sft", "gold")
    assert card.difference("ppo", "model", "reward").metric == "reward"
    assert len(card.rows()) == sum(len(estimates) for estimates in content["estimates"].values())
    assert set(card.rows()[0]) == {"system", "metric", "value", "low", "high", "n"}


@pytest.mark.parametrize(
    "call",
    [
        lambda card: card.estimate("ppa"),
        lambda card: card.estimate("ppo", "golden"),
        lambda card: card.estimate("best8", "general.bits_per_byte"),
        lambda card: card.difference("ppo", "stf"),
        lambda card: card.difference("sft", "ppo"),
        lambda card: card.difference("prompted", "best8"),
    ],
)
def test_a_name_that_is_not_there_is_refused_with_what_is(refused: Refused, card: Scorecard, call: Any) -> None:
    refused(call, card)


def test_failed_gates_are_those_that_fail_a_run(content: dict[str, Any], tmp_path: Path) -> None:
    gate = content["gates"][0]
    gates = [
        {**gate, "level": level, "passed": passed, "text": f"{level} {passed}"}
        for level in ("error", "warning")
        for passed in (True, False, None)
    ]
    card = Scorecard.read(write(tmp_path, {**content, "gates": gates}))
    assert [row.text for row in card.failed_gates] == ["error False", "error None"]


def test_a_scorecard_cannot_be_changed(card: Scorecard) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        card.primary = "reward"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        card.estimate("ppo").value = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"format": 3', '"format": 2', 1),
        lambda text: text.replace('"primary"', '"secondary"', 1),
    ],
)
def test_damaged_or_older_file_error_names_stage_to_rebuild(
    refused: Refused, content: dict[str, Any], tmp_path: Path, damage: Any
) -> None:
    write(tmp_path, damage(json.dumps(content)))
    refused(Scorecard.read, tmp_path, "evaluate")
    refused(Scorecard.read, tmp_path / "scorecard.json")


def test_a_missing_file_is_refused(refused: Refused, tmp_path: Path) -> None:
    refused(Scorecard.read, tmp_path)
