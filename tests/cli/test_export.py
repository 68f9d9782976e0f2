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
from align.config.tuning import LoraTuning
from align.errors import StageFailed
from align.export.push import prepare, push
from align.models.loading import load_policy, load_reward, load_tokenizer
from align.models.tuning.apply import apply_tuning, save_tuned
from tests.data.test_push import CACHED, TOKEN, Hub, hub, online, operations
from tests.support.cli.given_store import Given, add_scorecard, lay_out
from tests.support.report.example_card import full_card

__all__ = ["hub", "online"]  # fixtures

FILES = {
    "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
}  # fmt: skip
FREE: dict[str, str | None] = {"first": "Apache-2.0"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """``model/`` and ``adapter/`` of a training stage; the adapter's config names the base's folder."""
    folder = tmp_path_factory.mktemp("trained")
    model = apply_tuning(load_policy(tiny_model), LoraTuning(rank=4, alpha=8), seed=1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    save_tuned(model, load_tokenizer(tiny_model), folder / "model")
    return folder


@pytest.fixture
def given(tmp_path: Path, tiny_model: Path, trained: Path, tiny_reward: Path) -> Given:
    return lay_out(tmp_path, tiny_model, trained, tiny_reward, FREE)


@pytest.fixture
def export(given: Given, tmp_path: Path) -> Callable[..., int]:
    """The command without the check, into ``out``."""

    def run(word: str, *more: str, check: bool = False, output: Path = tmp_path / "out") -> int:
        rest = [*more, *(() if check else ("--no-check",)), "--store", str(given.store.root)]
        return main(["export", word, "--output", str(output), *rest])

    return run


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


# ---- the whole way, with processes of their own and vLLM ------------------------------------------------------------


@pytest.fixture(scope="module")
def checked(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, trained: Path, tiny_reward: Path
) -> tuple[Path, Given]:
    pytest.importorskip("vllm")
    root = tmp_path_factory.mktemp("checked")
    given = lay_out(root, tiny_model, trained, tiny_reward, FREE)
    add_scorecard(given, full_card() | {"settings": {"checkpoints": {"sft": given.sft.key}}})
    word = str(given.sft.path / "adapter")
    assert (
        main(["export", word, "--output", str(root / "out"), "--dtype", "bfloat16", "--store", str(given.store.root)])
        == 0
    )
    return root / "out", given


def test_an_adapter_is_merged_checked_in_transformers_and_vllm_and_described(checked: tuple[Path, Given]) -> None:
    folder, given = checked
    assert {path.name for path in folder.iterdir()} == FILES and not leftovers(folder.parent)
    merged = load_file(given.sft.model / "model.safetensors")
    own = load_file(folder / "model.safetensors")
    assert all(torch.equal(own[name], merged[name].bfloat16()) for name in merged)
    text = (folder / "README.md").read_text()
    found = re.search(
        r"written: ([\d,]+) greedy tokens of 8 prompts are the checkpoint's, in float32, in (.*)\.\n", text
    )
    assert found is not None and int(found[1].replace(",", "")) >= 8 * 32
    assert re.fullmatch(r"transformers [\d.]+ and vllm [\d.]+", found[2])
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == "org/base" and card.data.datasets == ["org/set"]
    assert card.data.eval_results and card.data.model_name == "out"


# ---- what it takes --------------------------------------------------------------------------------------------------


def test_a_key_a_folder_and_an_adapter_are_the_same_checkpoint(
    given: Given, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, word in enumerate(
        ("22222222", str(given.sft.path), str(given.sft.model), str(given.sft.path / "adapter"))
    ):
        output = tmp_path / f"out-{number}"
        assert export(word, output=output) == 0
        assert same_weights(output, given.sft.model)
        assert "key `222222222222`" in (output / "README.md").read_text()
    said = capsys.readouterr().out
    assert "Not checked (--no-check)" in said and "no evaluation found" in said and "note:" not in said


def test_a_stage_of_a_pipeline(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.yaml").write_text(f"name: p\nstages:\n  model: {{source: {tiny_model}}}\n")
    store = ("--store", str(tmp_path / "store"))
    word = f"{tmp_path}/p.yaml:model"
    assert main(["export", word, "--output", str(tmp_path / "out"), "--no-check", *store]) == 2
    assert "not finished yet" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "p.yaml"), *store]) == 0
    assert main(["export", word, "--output", str(tmp_path / "out"), "--no-check", *store]) == 0
    assert same_weights(tmp_path / "out", tiny_model)


def test_a_reward_model_is_a_classifier(given: Given, export: Callable[..., int], tmp_path: Path) -> None:
    assert export("33333333") == 0
    assert same_weights(tmp_path / "out", given.reward.model)
    load_reward(tmp_path / "out")
    # or vLLM, which serves such a checkpoint as a classifier, would answer with the sigmoid of the score
    assert json.loads((tmp_path / "out" / "config.json").read_text())["problem_type"] == "regression"
    assert ModelCard.load(tmp_path / "out" / "README.md").data.pipeline_tag == "text-classification"


def test_json_says_what_was_done(given: Given, export: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    card = add_scorecard(given, full_card() | {"settings": {"checkpoints": {"sft": given.sft.key}}})
    assert export("22222222", "--json", "--dtype", "bfloat16") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["key"] == given.sft.key and found["dtype"] == "bfloat16" and found["checked"] is None
    assert found["scorecard"] == card.key and found["files"]["model.safetensors"] > 0


def test_an_empty_folder_may_be_named(export: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert export("22222222") == 0 and (tmp_path / "out" / "README.md").is_file()


# ---- where results come from ----------------------------------------------------------------------------------------


def test_the_newest_scorecard_that_measures_the_checkpoint_is_taken(given: Given) -> None:
    settings = {"checkpoints": {"sft": given.sft.key}}
    add_scorecard(given, full_card() | {"settings": settings}, "4")
    newer = add_scorecard(given, full_card() | {"settings": settings | {"reward_model": given.reward.key}}, "5")
    add_scorecard(given, full_card() | {"settings": {"checkpoints": {"sft": "9" * 64}}}, "6")
    for artifact in (given.sft, given.reward):
        found = find_scorecard(artifact, None, None)
        assert found is not None and found[1].key == newer.key
    assert find_scorecard(given.model, None, None) is None


def test_a_scorecard_is_named_and_must_be_of_this_checkpoint(
    given: Given, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"checkpoints": {"sft": given.sft.key}}
    add_scorecard(given, full_card() | {"settings": settings}, "4")
    add_scorecard(given, full_card() | {"settings": settings}, "5")
    assert export("22222222", "--scorecard", "44444444") == 0
    assert "(key `444444444444`" in (tmp_path / "out" / "README.md").read_text()
    assert export("00000000", "--scorecard", "44444444", output=tmp_path / "other") == 2
    assert "this checkpoint is not among those it measures" in capsys.readouterr().err
    assert export("22222222", "--scorecard", "11111111", output=tmp_path / "other") == 2
    assert "--scorecard 11111111 is a InstructionData, not a Scorecard" in capsys.readouterr().err


def test_lineage_and_pipeline_come_from_the_store(given: Given) -> None:
    assert [one.stage for one in lineage(given.reward)] == ["model", "data", "sft", "reward"]
    assert [one.stage for one in lineage(given.sft)] == ["model", "data", "sft"]
    pipeline = pipeline_of(given.sft)
    assert pipeline is not None and pipeline["name"] == "quick"
    others = {"sft": {"kind": "sft", "key": given.sft.key}}
    given.store.remember_run("later", others, {"name": "later"})
    assert (pipeline_of(given.sft) or {})["name"] == "quick", "the run that made it, not the last one that reached it"
    given.store.delete(given.model.path)
    assert [one.stage for one in lineage(given.sft)] == ["data", "sft"]


# ---- the base of an adapter -----------------------------------------------------------------------------------------


def test_another_base_is_refused_by_its_weights(
    given: Given, export: Callable[..., int], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = str(given.sft.path / "adapter")
    other = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    assert export(adapter, "--base", str(other), output=tmp_path / "same") == 0, "a copy of the right one"
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 1.0001
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert export(adapter, "--base", str(other)) == 2
    said = capsys.readouterr().err
    assert "is not the base that" in said and "000000000000: model.safetensors has another sha256" in said
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


def test_a_damaged_base_in_the_store_is_refused(
    given: Given, export: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = given.model.model / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] *= 1.0001
    save_file(weights, path, metadata={"format": "pt"})
    assert export(str(given.sft.path / "adapter")) == 2
    assert "model.safetensors has another sha256" in capsys.readouterr().err


def test_a_base_that_is_gone_is_asked_for_and_one_without_records_is_noted(
    given: Given, export: Callable[..., int], tiny_model: Path, trained: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    assert export(str(adapter), output=tmp_path / "recorded") == 0, "its config names a folder that is here"
    assert "nothing records which base" in capsys.readouterr().out
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/gone"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert export(str(adapter)) == 2
    assert "its base, 'org/gone', is not here; name it with --base" in capsys.readouterr().err
    assert export(str(adapter), "--base", str(tiny_model)) == 0
    assert same_weights(tmp_path / "out", trained / "model")
    given.store.delete(given.model.path)
    word = str(given.sft.path / "adapter")
    assert export(word, "--base", str(tiny_model), output=tmp_path / "noted") == 0
    assert "is gone from its store" in capsys.readouterr().out
    assert export(word, "--base", "33333333", output=tmp_path / "wrong") == 2
    assert "was trained on 000000000000; name that one" in capsys.readouterr().err


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["22222222", "--base", "00000000"], "--base is for adapters"),
        (["22222222", "--private"], "are about --push REPO; name one"),
        (["22222222", "--dry-run"], "are about --push REPO; name one"),
        (["22222222", "--push", "one-word"], "is no name of a Hub model"),
        (["22222222", "--license", "a;b"], "is no name of a license"),
        (["11111111"], "is a InstructionData, not a checkpoint"),
        (["99999999"], "no artifact's key starts with"),
        (["22222222", "--dtype", "float16"], "invalid choice"),
    ],
)
def test_a_wrong_command_says_what_is_wrong_and_writes_nothing(
    words: list[str], said: str, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(tmp_path.iterdir())
    assert export(*words) == 2
    assert said in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_a_folder_that_is_taken_is_left_alone(
    given: Given, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    assert export("22222222") == 2 and "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert export("22222222", output=tmp_path / "out" / "mine.txt") == 2 and "is a file" in capsys.readouterr().err
    assert export("22222222", output=given.store.root / "out") == 2 and "inside the store" in capsys.readouterr().err


def test_a_difference_fails_and_leaves_nothing(
    export: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differs(source: Any, folder: Path, *rest: Any, **named: Any) -> None:
        assert (folder / "model.safetensors").is_file()
        raise StageFailed("the exported folder answers otherwise: token 5")

    monkeypatch.setattr("align.export.verify.check", differs)
    assert export("22222222", check=True) == 1
    said = capsys.readouterr().err
    assert "answers otherwise: token 5" in said and "Nothing was written" in said
    assert not (tmp_path / "out").exists() and not leftovers(tmp_path)


# ---- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_hub(hub: Hub, online: None, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in, also for a command that makes its own client."""
    monkeypatch.setattr("huggingface_hub.HfApi", functools.partial(HfApi, endpoint=hub.address))
    return hub


def test_a_push_sends_the_folder_and_deletes_weights_that_it_does_not_replace(
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
    said = capsys.readouterr().out
    assert all(f"deleted there: {name}" in said for name in gone) and "notes.md" not in said
    assert f"Pushed: {on_hub.address}" in said and "7 files" in said
    assert on_hub.created[0].get("type", "model") == "model" and on_hub.created[0]["name"] == "set"
    assert ("POST", "/api/models/me/set/commit/main") in on_hub.asked
    assert TOKEN not in said and on_hub.tokens == {f"Bearer {TOKEN}"}


def test_a_dry_run_lists_and_sends_nothing(
    on_hub: Hub, export: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("22222222", "--push", "me/set", "--revision", "v2", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "To the Hub: me/set, v2, public unless its owner's default says otherwise" in said
    assert all(name in said for name in FILES) and "License: " in said
    assert on_hub.asked == [] and (tmp_path / "out").is_dir()


def test_a_branch_is_made_and_the_summary_is_json(
    on_hub: Hub, export: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert export("22222222", "--push", "me/set", "--revision", "v2", "--json") == 0
    found = json.loads(capsys.readouterr().out)["push"]
    assert found["pushed"] and found["revision"] == "v2" and found["commit"] == "c" * 40
    assert ("POST", "/api/models/me/set/branch/v2") in on_hub.asked
    assert ("POST", "/api/models/me/set/commit/v2") in on_hub.asked


def test_a_license_that_may_forbid_it_is_asked_about_before_anything_is_written(
    on_hub: Hub, tmp_path: Path, tiny_model: Path, trained: Path, tiny_reward: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = lay_out(tmp_path / "nc", tiny_model, trained, tiny_reward, {"first": "CC-BY-NC-4.0"})
    words = ["export", "22222222", "--no-check", "--store", str(given.store.root), "--push", "me/set", "--output"]
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


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_never_shows_the_token(status: int, hub: Hub, online: None, tiny_model: Path) -> None:
    from align.data.licenses import License
    from align.errors import UserError

    hub.refuse = status
    upload = prepare(tiny_model, "me/set", License(("mit",), ""), None, private=True)
    with pytest.raises(UserError, match="HF_TOKEN") as caught:
        push(upload, "x", HfApi(endpoint=hub.address))
    assert TOKEN not in str(caught.value) and CACHED not in str(caught.value) and "***" in str(caught.value)


def test_a_hub_that_is_away_is_a_failure(hub: Hub, online: None, tiny_model: Path) -> None:
    from align.data.licenses import License

    address = hub.address
    hub.shutdown()
    hub.server_close()
    upload = prepare(tiny_model, "me/set", License(("mit",), ""), None, private=False)
    with pytest.raises(StageFailed, match="cannot be reached"):
        push(upload, "x", HfApi(endpoint=address))
