"""What a server is given through the shared folder, and when its answer counts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from align.inference import weights as weights_folder
from align.inference.servers.server import ServerEngine
from align.inference.servers.server_client import BadReply, EngineLost
from align.inference.weights import checkpoint_weights, combine, digest_all
from tests.support.inference import fake_server
from tests.support.inference.fake_server import FakeServer
from tests.support.inference.server_harness import open_at, soon


def test_the_server_finds_a_whole_folder(fake: FakeServer, tiny_model: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    calls: list[tuple[str, set[str], dict[str, torch.Tensor]]] = []

    def load(path: str) -> None:
        folder = Path(path)
        tensors: dict[str, torch.Tensor] = {}
        for file in folder.glob("*.safetensors"):
            tensors |= load_file(file)
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert set(index["weight_map"]) == set(tensors)
        assert [entry.name for entry in folder.parent.iterdir() if "partial" in entry.name] == []
        calls.append((folder.name, {file.name for file in folder.iterdir()}, tensors))
        assert fake.calls[-1][1]["kwargs"]["digest"] == combine(digest_all(tensors.items()))

    fake.load = load  # type: ignore[method-assign]
    monkeypatch.setattr(weights_folder, "SHARD_BYTES", 100_000)
    fake.answers["/server_info"] = lambda body: fake_server.info(dtype="torch.bfloat16")
    engine = open_at(tiny_model, fake.address, torch.bfloat16, weights_folder=str(tmp_path / "shared"))
    engine.load_weights(checkpoint_weights(tiny_model))
    wanted = dict(checkpoint_weights(tiny_model))
    assert [name for name, _, _ in calls] == ["step_1", "step_2"]
    for _, files, tensors in calls:
        assert {weights_folder.READY, "config.json", "tokenizer.json", "chat_template.jinja"} <= files
        assert len([file for file in files if file.endswith(".safetensors")]) > 1
        assert set(tensors) == {*wanted, "lm_head.weight"}
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
        assert all(torch.equal(tensors[name], tensor.to(torch.bfloat16)) for name, tensor in wanted.items())
    assert [folder.name for folder in engine.folder.path.iterdir()] == ["step_2"]
    assert engine.folder.path.parent == tmp_path / "shared"
    engine.close()
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_missing_weight_never_reaches_the_server(fake: FakeServer, served: ServerEngine) -> None:
    some = [pair for pair in checkpoint_weights(served.spec.model_dir) if pair[0] != "model.norm.weight"]
    with pytest.raises(ValueError, match=r"lack model\.norm\.weight: a full set is needed"):
        served.load_weights(some)

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield from some
        raise OSError("no such adapter")

    with pytest.raises(OSError, match="no such adapter"):
        served.load_weights(broken())
    assert fake.calls == []
    assert [folder.name for folder in served.folder.path.iterdir()] == ["step_1"]


def test_weights_that_the_server_cannot_read(fake: FakeServer, served: ServerEngine) -> None:
    fake.answers["/collective_rpc"] = lambda body: (500, {"error": {"message": "Repo id must be"}})
    with pytest.raises(
        BadReply, match=r"Repo id must be.*/step_2: can it, under this very path\? runtime.rollouts.weights_f"
    ):
        served.load_weights(checkpoint_weights(served.spec.model_dir))
    for results in ([], ["failed"], None):
        fake.answers["/collective_rpc"] = lambda body, results=results: {"results": results}
        with pytest.raises(BadReply, match="results is no list of what each worker holds"):
            served.load_weights(checkpoint_weights(served.spec.model_dir))
    foreign_state = {"version": "another's:1", "digest": None, "loads": 1, "content": ""}
    fake.answers["/collective_rpc"] = lambda body: {"results": [foreign_state]}
    with pytest.raises(BadReply, match="it was told to hold"):
        served.load_weights(checkpoint_weights(served.spec.model_dir))
    assert "/reset_prefix_cache" not in fake.paths()
    served.client.timeout = 0.6
    fake.answers["/collective_rpc"] = fake.hang
    with soon(), pytest.raises(EngineLost, match=r"did not answer /collective_rpc within 0\.6 s"):
        served.load_weights(checkpoint_weights(served.spec.model_dir))


def test_old_prefixes_must_go(fake: FakeServer, served: ServerEngine) -> None:
    answers = iter([False, True])
    fake.answers["/reset_prefix_cache"] = lambda body: {"success": next(answers)}
    served.load_weights(checkpoint_weights(served.spec.model_dir))
    assert fake.paths() == ["/collective_rpc", "/reset_prefix_cache", "/reset_prefix_cache"]
    served.client.timeout = 1
    fake.answers["/reset_prefix_cache"] = lambda body: {"success": False}
    with soon(), pytest.raises(RuntimeError, match="kept its prefix cache"):
        served.load_weights(checkpoint_weights(served.spec.model_dir))
