"""``align export`` from the command line: what it takes, refuses, checks, writes and pushes."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from align.cli.lineage import find_scorecard, lineage, pipeline_of
from align.cli.main import main
from align.errors import StageFailed
from align.export import verify
from align.models.loading import load_reward
from tests.support.cli.example_store import LICENSES, ExampleStore, add_scorecard, make_store
from tests.support.data.hub import TOKEN, Hub, hub, online, operations
from tests.support.fork_server import Forking
from tests.support.report.example_card import full_card

__all__ = ["hub", "online"]  # fixtures

FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip


def same_weights(first_folder: Path, second_folder: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (first_folder, second_folder))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


# ---- the whole way, with processes of their own and vLLM ------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, trained: Path, tiny_reward: Path
) -> tuple[Path, ExampleStore]:
    pytest.importorskip("vllm")
    root = tmp_path_factory.mktemp("checked")
    example = make_store(root, tiny_model, trained, tiny_reward, LICENSES)
    add_scorecard(example, full_card() | {"settings": {"checkpoints": {"sft": example.sft.key}}})
    word = str(example.sft.path / "adapter")
    options = ["--output", str(root / "out"), "--dtype", "bfloat16", "--store", str(example.store.root)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "subprocess", Forking(vllm=True))
        assert main(["export", word, *options]) == 0
    return root / "out", example


def test_adapter_is_merged_checked_and_described(
    checked: tuple[Path, ExampleStore],
) -> None:
    folder, example = checked
    assert {path.name for path in folder.iterdir()} == FILES and not leftovers(folder.parent)
    merged = load_file(example.sft.model / "model.safetensors")
    local = load_file(folder / "model.safetensors")
    assert all(torch.equal(local[name], merged[name].bfloat16()) for name in merged)
    text = (folder / "README.md").read_text()
    summary = re.search(
        r"written: ([\d,]+) greedy tokens of 8 prompts are the checkpoint's, in float32, in (.*)\.\n", text
    )
    assert summary is not None and int(summary[1].replace(",", "")) >= 8 * 32
    assert re.fullmatch(r"transformers [\d.]+ and vllm [\d.]+", summary[2])
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "org/base" and card.data.datasets == ["org/set"]
    assert card.data.eval_results and card.data.model_name == "out"


# ---- what it takes --------------------------------------------------------------------------------------------------


def test_a_key_a_folder_and_an_adapter_are_the_same_checkpoint(
    example: ExampleStore, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, word in enumerate(
        ("22222222", str(example.sft.path), str(example.sft.model), str(example.sft.path / "adapter"))
    ):
        output = tmp_path / f"out-{number}"
        assert export(word, output=output) == 0
        assert same_weights(output, example.sft.model)
        assert "key `222222222222`" in (output / "README.md").read_text()
    printed = capsys.readouterr().out
    assert "Not checked (--no-check)" in printed and "no evaluation found" in printed and "note:" not in printed


@pytest.mark.usefixtures("stages_in_process")
def test_a_stage_of_a_pipeline(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.yaml").write_text(f"name: p\nstages:\n  model: {{source: {tiny_model}}}\n")
    store = ("--store", str(tmp_path / "store"))
    word = f"{tmp_path}/p.yaml:model"
    assert main(["export", word, "--output", str(tmp_path / "out"), "--no-check", *store]) == 2
    assert "not finished yet" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "p.yaml"), *store]) == 0
    assert main(["export", word, "--output", str(tmp_path / "out"), "--no-check", *store]) == 0
    assert same_weights(tmp_path / "out", tiny_model)


def test_a_reward_model_is_a_classifier(example: ExampleStore, export: Callable[..., int], tmp_path: Path) -> None:
    assert export("33333333") == 0
    assert same_weights(tmp_path / "out", example.reward.model)
    load_reward(tmp_path / "out")
    # or vLLM, which serves such a checkpoint as a classifier, would answer with the sigmoid of the score
    assert json.loads((tmp_path / "out" / "config.json").read_text())["problem_type"] == "regression"
    assert ModelCard.load(tmp_path / "out" / "README.md").data.pipeline_tag == "text-classification"


def test_json_says_what_was_done(
    example: ExampleStore, export: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    card = add_scorecard(example, full_card() | {"settings": {"checkpoints": {"sft": example.sft.key}}})
    assert export("22222222", "--json", "--dtype", "bfloat16") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["key"] == example.sft.key and summary["dtype"] == "bfloat16" and summary["checked"] is None
    assert summary["scorecard"] == card.key and summary["files"]["model.safetensors"] > 0


def test_an_empty_folder_may_be_named(export: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert export("22222222") == 0 and (tmp_path / "out" / "README.md").is_file()


# ---- where results come from ----------------------------------------------------------------------------------------


def test_newest_scorecard_of_checkpoint_is_used(example: ExampleStore) -> None:
    settings = {"checkpoints": {"sft": example.sft.key}}
    add_scorecard(example, full_card() | {"settings": settings}, "4")
    newer = add_scorecard(example, full_card() | {"settings": settings | {"reward_model": example.reward.key}}, "5")
    add_scorecard(example, full_card() | {"settings": {"checkpoints": {"sft": "9" * 64}}}, "6")
    for artifact in (example.sft, example.reward):
        summary = find_scorecard(artifact, None, None)
        assert summary is not None and summary[1].key == newer.key
    assert find_scorecard(example.model, None, None) is None


def test_a_scorecard_is_named_and_must_be_of_this_checkpoint(
    example: ExampleStore, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"checkpoints": {"sft": example.sft.key}}
    add_scorecard(example, full_card() | {"settings": settings}, "4")
    add_scorecard(example, full_card() | {"settings": settings}, "5")
    assert export("22222222", "--scorecard", "44444444") == 0
    assert "(key `444444444444`" in (tmp_path / "out" / "README.md").read_text()
    assert export("00000000", "--scorecard", "44444444", output=tmp_path / "other") == 2
    assert "it does not measure this checkpoint" in capsys.readouterr().err
    assert export("22222222", "--scorecard", "11111111", output=tmp_path / "other") == 2
    assert "--scorecard 11111111 is an InstructionData, not a Scorecard" in capsys.readouterr().err


def test_lineage_and_pipeline_come_from_the_store(example: ExampleStore) -> None:
    assert [first_folder.stage for first_folder in lineage(example.reward)] == ["model", "data", "sft", "reward"]
    assert [first_folder.stage for first_folder in lineage(example.sft)] == ["model", "data", "sft"]
    pipeline = pipeline_of(example.sft)
    assert pipeline is not None and pipeline["name"] == "quick"
    others = {"sft": {"kind": "sft", "key": example.sft.key}}
    example.store.remember_run("later", others, {"name": "later"})
    assert (pipeline_of(example.sft) or {})["name"] == "quick", "the run that made it, not the last one that reached it"
    example.store.delete(example.model.path)
    assert [first_folder.stage for first_folder in lineage(example.sft)] == ["data", "sft"]


# ---- the base of an adapter -----------------------------------------------------------------------------------------


def test_another_base_is_refused_by_its_weights(
    example: ExampleStore,
    export: Callable[..., int],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = str(example.sft.path / "adapter")
    second_folder = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    assert export(adapter, "--base", str(second_folder), output=tmp_path / "same") == 0, "a copy of the right one"
    weights = load_file(second_folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.0001
    save_file(weights, second_folder / "model.safetensors", metadata={"format": "pt"})
    assert export(adapter, "--base", str(second_folder)) == 2
    printed = capsys.readouterr().err
    assert "is not the base that" in printed and "000000000000: model.safetensors has another sha256" in printed
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_missing_base_is_refused_and_unrecorded_base_noted(
    example: ExampleStore, export: Callable[..., int], tiny_model: Path, trained: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    assert export(str(adapter), output=tmp_path / "recorded") == 0, "its config names a folder that is here"
    assert "no record says which base" in capsys.readouterr().out
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/gone"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert export(str(adapter)) == 2
    assert "its base, 'org/gone', is not here; name it with --base" in capsys.readouterr().err
    assert export(str(adapter), "--base", str(tiny_model)) == 0
    assert same_weights(tmp_path / "out", trained / "model")
    example.store.delete(example.model.path)
    word = str(example.sft.path / "adapter")
    assert export(word, "--base", str(tiny_model), output=tmp_path / "noted") == 0
    assert "is no longer in its store" in capsys.readouterr().out
    assert export(word, "--base", "33333333", output=tmp_path / "wrong") == 2
    assert "was trained on 000000000000; name that one" in capsys.readouterr().err


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (["22222222", "--base", "00000000"], "--base is for adapters"),
        (["22222222", "--private"], "go with --push REPO; name one"),
        (["22222222", "--dry-run"], "go with --push REPO; name one"),
        (["22222222", "--push", "one-word"], "is no name of a Hub model"),
        (["22222222", "--license", "a;b"], "is no name of a license"),
        (["11111111"], "is an InstructionData, not a checkpoint"),
        (["99999999"], "no artifact's key starts with"),
        (["22222222", "--dtype", "float16"], "invalid choice"),
    ],
)
def test_a_wrong_command_says_what_is_wrong_and_writes_nothing(
    words: list[str], printed: str, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.iterdir())
    assert export(*words) == 2
    assert printed in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_a_folder_that_is_taken_is_left_alone(
    example: ExampleStore, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert export("22222222") == 2 and "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert export("22222222", output=tmp_path / "out" / "mine.txt") == 2 and "is a file" in capsys.readouterr().err
    assert export("22222222", output=example.store.root / "out") == 2 and "inside the store" in capsys.readouterr().err


def test_a_difference_fails_and_leaves_nothing(
    export: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differs(source: Any, folder: Path, *rest: Any, **named: Any) -> None:
        assert (folder / "model.safetensors").is_file()
        raise StageFailed("the exported folder answers otherwise: token 5")

    monkeypatch.setattr("align.export.verify.verify", differs)
    assert export("22222222", check=True) == 1
    printed = capsys.readouterr().err
    assert "answers otherwise: token 5" in printed and "Nothing was written" in printed
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


# ---- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_hub(hub: Hub, online: None, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in, also for a command that makes its own client."""
    monkeypatch.setattr("huggingface_hub.HfApi", functools.partial(HfApi, endpoint=hub.address))
    return hub


def test_push_deletes_weights_that_it_does_not_replace(
    on_hub: Hub, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub.files = [
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json", "notes.md",
        "model.safetensors", "quantized.gguf",
    ]  # fmt: skip
    assert export("22222222", "--push", "me/set", "--private") == 0
    sent = operations(on_hub)
    assert set(sent["file"]) == FILES
    for name in FILES:
        assert sent["file"][name] == (tmp_path / "out" / name).read_bytes()
    gone = {"model-00001-of-00002.safetensors", "model.safetensors.index.json", "adapter_config.json"}
    assert set(sent["deletedFile"]) == gone
    printed = capsys.readouterr().out
    assert all(f"deleted on the Hub: {name}" in printed for name in gone) and "notes.md" not in printed
    assert f"Pushed: {on_hub.address}" in printed and "7 files" in printed
    assert on_hub.created[0].get("type", "model") == "model" and on_hub.created[0]["name"] == "set"
    assert ("POST", "/api/models/me/set/commit/main") in on_hub.asked
    assert TOKEN not in printed and on_hub.tokens == {f"Bearer {TOKEN}"}


def test_a_dry_run_lists_and_sends_nothing(
    on_hub: Hub, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("22222222", "--push", "me/set", "--revision", "v2", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "To the Hub: me/set, v2, public unless its owner's default says otherwise" in printed
    assert all(name in printed for name in FILES) and "License: " in printed
    assert on_hub.asked == [] and (tmp_path / "out").is_dir()


def test_a_branch_is_made_and_the_summary_is_json(
    on_hub: Hub, export: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("22222222", "--push", "me/set", "--revision", "v2", "--json") == 0
    summary = json.loads(capsys.readouterr().out)["push"]
    assert summary["pushed"] and summary["revision"] == "v2" and summary["commit"] == "c" * 40
    assert ("POST", "/api/models/me/set/branch/v2") in on_hub.asked
    assert ("POST", "/api/models/me/set/commit/v2") in on_hub.asked


def test_forbidding_license_is_refused_before_writing(
    on_hub: Hub, tmp_path: Path, tiny_model: Path, trained: Path, tiny_reward: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = make_store(tmp_path / "nc", tiny_model, trained, tiny_reward, {"first": "CC-BY-NC-4.0"})
    words = ["export", "22222222", "--no-check", "--store", str(example.store.root), "--push", "me/set", "--output"]
    assert main([*words, str(tmp_path / "out")]) == 2
    assert "forbids commercial use" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and on_hub.asked == []
    assert main([*words, str(tmp_path / "yes"), "--yes"]) == 0
    assert main([*words, str(tmp_path / "stated"), "--license", "cc-by-nc-4.0"]) == 0
    assert len(on_hub.commits) == 2


def test_private_weights_do_not_go_to_a_public_repository(
    on_hub: Hub, export: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    on_hub.private = False
    assert export("22222222", "--push", "me/set", "--private") == 2
    assert "is there already, and public" in capsys.readouterr().err
    assert on_hub.commits == []


def test_the_current_folder_is_not_replaced(
    export: Callable[..., int], example: ExampleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert export(example.sft.key[:8], output=Path(".")) == 2
    assert "--output .: is the current folder" in capsys.readouterr().err
