"""``align plan`` on what a file leaves open: the commit that is taken, the recipe that a dataset stands for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from align.cli.main import main
from tests.support.hub_server import HubServer, online_hub

__all__ = ["online_hub"]


def plan(folder: Path, stages: dict[str, object], *options: str) -> int:
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump({"name": "own", "stages": stages}))
    return main(["plan", str(file), "--store", str(folder / "store"), *options])


def test_the_commit_of_a_hub_name_is_shown_and_written_out(
    online_hub: HubServer, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = online_hub.push_folder("models/org/tiny", tiny_model)
    assert plan(tmp_path, {"model": {"source": "org/tiny"}}) == 0
    assert f"model takes revision: {commit}" in capsys.readouterr().out
    assert plan(tmp_path, {"model": {"source": "org/tiny"}}, "--resolved") == 0
    assert yaml.safe_load(capsys.readouterr().out)["stages"]["model"] == {"source": "org/tiny", "revision": commit}


def test_offline_names_what_the_cache_lacks(
    online_hub: HubServer, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    online_hub.push_folder("models/org/tiny", tiny_model)
    assert plan(tmp_path, {"model": {"source": "org/tiny"}}, "--offline") == 2
    assert "is not in the Hub's cache, and --offline" in capsys.readouterr().err
    assert not online_hub.requests


def test_a_base_model_without_a_template_is_named_at_once(
    online_hub: HubServer, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    online_hub.push_folder("models/org/base", base)
    for source in (str(base), "org/base"):
        assert plan(tmp_path, {"model": {"source": source}}) == 2
        message = capsys.readouterr().err
        assert (
            f"stages.model: source: '{source}' has no chat template" in message
            and "chatml, chatml-tools, qwen2.5" in message
        )
        assert plan(tmp_path, {"model": {"source": source, "chat_template": "chatml"}}) == 0
        assert plan(tmp_path, {"model": {"source": source, "chat_template": "llama3"}}) == 2
        message = capsys.readouterr().err
        assert 'add_tokens: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]' in message
    assert not [line for line in online_hub.requests if "safetensors" in line]


def test_the_recipe_of_a_dataset_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    stages = {"data": {"dataset": str(tmp_path / "rows.jsonl")}}
    assert plan(tmp_path, stages, "--resolved") == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["stages"]["data"]["kind"] == "instructions"
    comments = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")]
    assert comments[0].startswith("The recipe that stages.data stands for")
    assert yaml.safe_load("\n".join(comments[1:])) == {
        "kind": "instructions",
        "sources": [{"type": "files", "paths": [str(tmp_path / "rows.jsonl")], "format": "prompt_completion"}],
    }
