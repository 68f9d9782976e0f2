"""Weights and scorecards that are not what their records say: nothing exports, describes or talks with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from align.cli.lineage import find_scorecard
from align.cli.main import main
from align.errors import UserError
from align.store.record import read_artifact
from tests.cli.test_export import export, given, trained
from tests.support.cli.given_store import Given, add_scorecard
from tests.support.damage import flip_last_bit
from tests.support.records import change_record
from tests.support.report.example_card import full_card

__all__ = ["export", "given", "trained"]  # fixtures


def test_export_notices_a_flipped_bit(
    given: Given, export: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    weights = given.sft.model / "model.safetensors"
    flip_last_bit(weights)
    assert export(given.sft.record["key"][:12]) == 2
    assert f"{weights} has another sha256 than its record" in capsys.readouterr().err
    assert export(str(given.sft.model)) == 2, "its folder says it as well"
    assert not (tmp_path / "out").exists()


def test_export_of_an_adapter_notices_one_in_it_and_in_its_base(
    given: Given, export: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = given.sft.path / "adapter"
    flip_last_bit(given.model.model / "tokenizer.json")
    assert export(str(adapter)) == 2
    assert "tokenizer.json has another sha256" in capsys.readouterr().err
    flip_last_bit(adapter / "adapter_model.safetensors")
    assert export(str(adapter)) == 2
    assert "adapter_model.safetensors has another sha256" in capsys.readouterr().err


def test_chat_notices_weights_that_were_written_over(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    weights = given.sft.model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["chat", given.sft.record["key"][:12], "--store", str(given.store.root)]) == 2
    assert f"{weights} has another sha256 than its record" in capsys.readouterr().err


def test_a_card_cites_no_damaged_scorecard(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    card = full_card() | {"settings": {"checkpoints": {"sft": given.sft.key}}}
    older, newer = add_scorecard(given, card, "4"), add_scorecard(given, card, "5")
    flip_last_bit(newer.path / "scorecard.json")
    measured = find_scorecard(given.sft, None, None)
    assert measured is not None and measured[1].key == older.key
    assert "scorecard.json has another sha256" in capsys.readouterr().err
    with pytest.raises(UserError, match="scorecard.json has another sha256"):
        find_scorecard(given.sft, newer.record["key"][:12], str(given.store.root))


def test_a_card_cites_no_evaluation_of_other_weights(given: Given) -> None:
    """The checkpoint was made again since, and came out otherwise."""
    card = full_card() | {"settings": {"checkpoints": {"sft": given.sft.key}}}
    evaluation = add_scorecard(given, card)
    links = evaluation.record["input_stages"]
    change_record(evaluation.path, input_stages=[{**link, "weights": given.sft.weights} for link in links])
    assert find_scorecard(given.sft, None, None) is not None
    outputs = given.sft.record["outputs"]
    other = {name: {**entry, "sha256": "0" * 64} for name, entry in outputs.items()}
    change_record(given.sft.path, outputs=other)
    assert find_scorecard(read_artifact(given.sft.path), None, None) is None


def test_one_damaged_record_harms_its_own_artifact_only(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    record = given.model.path / "record.json"
    record.write_text("[]")
    store = str(given.store.root)
    assert main(["list", "--store", store]) == 0
    said = capsys.readouterr()
    assert f"{record}: damaged: it holds a list" in said.err
    assert "sft/222222222222" in said.out and "model/0" not in said.out
    assert main(["show", "0000", "--store", store]) == 2
    assert str(record) in capsys.readouterr().err
    assert main(["show", "2222", "--verify", "--store", store]) == 0
    assert main(["status", "quick", "--store", store]) == 0
    said = capsys.readouterr()
    assert "model   damaged" in said.out and "sft     done" in said.out
    assert main(["gc", "--store", store]) == 0
    assert main(["report", "quick", "--store", store]) == 0
    said = capsys.readouterr()
    assert f"stage 'model' is left out: {record}" in said.err


@pytest.mark.parametrize(
    "change",
    [{"metrics": {"steps": 26}}, {"outputs": {}}, {"key": "9" * 64}, {"input_stages": None}, {"seal": None}],
    ids=str,
)
def test_a_changed_record_is_damaged(given: Given, change: dict, capsys: pytest.CaptureFixture[str]) -> None:
    record = given.sft.path / "record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    assert main(["show", "2222", "--verify", "--store", str(given.store.root)]) == 2
    assert f"{record}: damaged: it is not what was written there" in capsys.readouterr().err


def test_a_record_without_a_seal_is_damaged(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    record = given.sft.path / "record.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "seal"}))
    assert main(["show", "2222", "--store", str(given.store.root)]) == 2
    assert "it has no seal" in capsys.readouterr().err
