"""Weights and scorecards that are not what their records say: nothing exports, describes or talks with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from align.cli.lineage import find_scorecard
from align.cli.main import main
from align.store.record import read_artifact
from tests.support.cli.example_store import ExampleStore, add_scorecard
from tests.support.damage import flip_last_bit
from tests.support.records import change_record
from tests.support.refusals import Refused
from tests.support.report.example_card import full_card


def test_export_notices_a_flipped_bit(
    example: ExampleStore, export: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    weights = example.sft.model / "model.safetensors"
    flip_last_bit(weights)
    assert export(example.sft.record["key"][:12]) == 2
    assert f"{weights} has another sha256 than its record" in capsys.readouterr().err
    assert export(str(example.sft.model)) == 2, "its folder says it as well"
    assert not (tmp_path / "out").exists()


def test_export_of_an_adapter_notices_one_in_it_and_in_its_base(
    example: ExampleStore, export: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = example.sft.path / "adapter"
    flip_last_bit(example.model.model / "tokenizer.json")
    assert export(str(adapter)) == 2
    assert "tokenizer.json has another sha256" in capsys.readouterr().err
    flip_last_bit(adapter / "adapter_model.safetensors")
    assert export(str(adapter)) == 2
    assert "adapter_model.safetensors has another sha256" in capsys.readouterr().err


def test_chat_notices_weights_that_were_written_over(example: ExampleStore, capsys: pytest.CaptureFixture[str]) -> None:
    weights = example.sft.model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert main(["chat", example.sft.record["key"][:12], "--store", str(example.store.root)]) == 2
    assert f"{weights} has another sha256 than its record" in capsys.readouterr().err


def test_a_card_cites_no_damaged_scorecard(
    refused: Refused, example: ExampleStore, capsys: pytest.CaptureFixture[str]
) -> None:
    card = full_card() | {"settings": {"checkpoints": {"sft": example.sft.key}}}
    older, newer = add_scorecard(example, card, "4"), add_scorecard(example, card, "5")
    flip_last_bit(newer.path / "scorecard.json")
    measured = find_scorecard(example.sft, None, None)
    assert measured is not None and measured[1].key == older.key
    assert "scorecard.json has another sha256" in capsys.readouterr().err
    refused(lambda: find_scorecard(example.sft, newer.record["key"][:12], str(example.store.root)))


def test_a_card_cites_no_evaluation_of_other_weights(example: ExampleStore) -> None:
    """The checkpoint was made again since, and came out otherwise."""
    card = full_card() | {"settings": {"checkpoints": {"sft": example.sft.key}}}
    evaluation = add_scorecard(example, card)
    links = evaluation.record["input_stages"]
    change_record(evaluation.path, input_stages=[{**link, "weights": example.sft.weights} for link in links])
    assert find_scorecard(example.sft, None, None) is not None
    outputs = example.sft.record["outputs"]
    changed_outputs = {name: {**entry, "sha256": "0" * 64} for name, entry in outputs.items()}
    change_record(example.sft.path, outputs=changed_outputs)
    assert find_scorecard(read_artifact(example.sft.path), None, None) is None


def test_one_damaged_record_harms_its_own_artifact_only(
    example: ExampleStore, capsys: pytest.CaptureFixture[str]
) -> None:
    record = example.model.path / "record.json"
    record.write_text("[]")
    store = str(example.store.root)
    assert main(["list", "--store", store]) == 0
    output = capsys.readouterr()
    assert f"{record}: damaged: it holds a list" in output.err
    assert "sft/222222222222" in output.out and "model/0" not in output.out
    assert main(["show", "0000", "--store", store]) == 2
    assert str(record) in capsys.readouterr().err
    assert main(["show", "2222", "--verify", "--store", store]) == 0
    assert main(["status", "quick", "--store", store]) == 0
    output = capsys.readouterr()
    assert "model   damaged" in output.out and "sft     done" in output.out
    assert main(["gc", "--store", store]) == 0
    assert main(["report", "quick", "--store", store]) == 0
    output = capsys.readouterr()
    assert f"stage 'model' is left out: {record}" in output.err


@pytest.mark.parametrize(
    "change",
    [{"metrics": {"steps": 26}}, {"input_stages": None}],
    ids=str,
)
def test_a_changed_record_is_damaged(example: ExampleStore, change: dict, capsys: pytest.CaptureFixture[str]) -> None:
    record = example.sft.path / "record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    assert main(["show", "2222", "--verify", "--store", str(example.store.root)]) == 2
    assert f"{record}: damaged: it is not what was written there" in capsys.readouterr().err


def test_a_record_without_a_seal_is_damaged(example: ExampleStore, capsys: pytest.CaptureFixture[str]) -> None:
    record = example.sft.path / "record.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "seal"}))
    assert main(["show", "2222", "--store", str(example.store.root)]) == 2
    assert "it has no seal" in capsys.readouterr().err
