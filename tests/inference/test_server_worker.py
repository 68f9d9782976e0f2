"""What a server's worker tells of its weights: exact digests, and every load counted, whoever asks for it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from align.inference.server_worker import LOAD, NAME, REPORT, WEIGHT_METHODS, WeightsKeeper
from align.inference.weights import checkpoint_weights, combine, digest_all, tensor_digest


@pytest.fixture(autouse=True)
def replaced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts of vLLM that are replaced on a CPU. They are not, here: that would import vLLM."""
    parts: list[str] = []
    monkeypatch.setattr("align.inference.server_worker.use_cpu_norms", lambda: parts.append("norms"))
    monkeypatch.setattr("align.inference.server_worker.flatten_rotary", lambda model: None)
    monkeypatch.setattr("align.inference.server_worker.reload_on_cpu", lambda model: nullcontext())
    monkeypatch.setattr("align.inference.server_worker.draw_once_per_row", lambda runner, pick: parts.append("sampler"))
    return parts


class Worker(WeightsKeeper):
    """vLLM's worker as far as it matters here: a model, and methods that change it."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = torch.nn.Linear(3, 2)
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)

    def reload_weights(self, weights_path: str = "", weights_iterator: Any = None) -> None:
        weights = checkpoint_weights(Path(weights_path)) if weights_iterator is None else weights_iterator
        self.loaded = dict(weights)
        self.model.load_state_dict(self.loaded, strict=False)

    def update_weights(self, update_info: Any) -> None:
        """Take weights over NCCL."""


def saved(folder: Path, seed: int) -> tuple[str, str]:
    """A folder of weights, and their digest."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"weight": torch.randn(2, 3, generator=generator), "bias": torch.randn(2, generator=generator)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return str(folder), combine(digest_all(tensors.items()))


def test_digests_tell_names_types_shapes_and_every_bit_apart() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    flipped = tensor.clone()
    flipped[0, 0] = -0.0
    variants = [tensor, flipped, tensor.reshape(3, 2), tensor.to(torch.bfloat16), tensor.view(torch.int32)]
    assert len({tensor_digest(variant) for variant in variants}) == len(variants)
    assert tensor_digest(tensor.T.contiguous().T) == tensor_digest(tensor)  # strides are no content
    assert tensor_digest(torch.tensor(1.0)) != tensor_digest(torch.tensor([1.0]))
    pairs = [(f"{place}", tensor + place) for place in range(100)]
    assert combine(digest_all(pairs)) == combine(digest_all(reversed(pairs)))
    assert combine(digest_all(pairs)) != combine(digest_all(pairs[:-1]))


def test_cpu_parts_are_replaced_once_before_sampling(replaced: list[str]) -> None:
    Worker("meta").align_report_weights()
    assert replaced == []
    worker = Worker()
    worker.align_report_weights()
    worker.align_report_weights()
    assert replaced == ["norms", "sampler"]


def test_weights_are_loaded_if_their_digest_fits(tmp_path: Path) -> None:
    worker = Worker()
    folder, digest = saved(tmp_path / "one", 1)
    assert worker.align_report_weights() == {"version": None, "digest": None, "loads": 0}
    message = getattr(worker, LOAD)(path=folder, version="run:1", digest=digest)
    assert (message["version"], message["digest"], message["loads"]) == ("run:1", digest, 1)
    assert message == getattr(worker, REPORT)(content=True)
    before = worker.model.weight.clone()
    second_folder, _ = saved(tmp_path / "other", 2)
    with pytest.raises(ValueError, match="was announced"):
        worker.align_load_weights(second_folder, "run:2", digest)
    assert torch.equal(worker.model.weight, before)
    assert getattr(worker, REPORT)(content=True) == message


def test_an_adapter_is_added_to_its_base(tmp_path: Path) -> None:
    base = {"layers.0.q.weight": torch.ones(2, 3), "norm.weight": torch.ones(3)}
    parts = {"low": torch.ones(1, 3), "high": torch.ones(2, 1), "scale": torch.tensor(0.5, dtype=torch.float64)}
    adapter = {f"layers.0.q.weight.{part}": tensor for part, tensor in parts.items()}
    for name, tensors in (("base", base), ("adapter", adapter)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    digest, base_digest = (combine(digest_all(tensors.items())) for tensors in (adapter, base))
    worker = Worker()

    def load() -> set[str]:
        folders = {"path": str(tmp_path / "adapter"), "base": str(tmp_path / "base")}
        report = worker.align_load_weights(**folders, version="run:1", digest=digest, base_digest=base_digest)
        assert (report["version"], report["digest"]) == ("run:1", digest)
        # 1 + 0.5 * 1 * 1: added to the base each time
        assert torch.equal(worker.loaded["layers.0.q.weight"], torch.full((2, 3), 1.5))
        return set(worker.loaded)

    assert [load(), load()] == [set(base), {"layers.0.q.weight"}]
    worker.reload_weights(weights_path=saved(tmp_path / "other", 1)[0])
    assert load() == set(base)
    with pytest.raises(ValueError, match="base have the digest .* was announced"):
        worker.align_load_weights(str(tmp_path / "adapter"), "run:2", digest, str(tmp_path / "base"), "0" * 64)
    assert load() == {"layers.0.q.weight"}


def test_a_load_by_anybody_else_shows(tmp_path: Path) -> None:
    worker = Worker()
    folder, digest = saved(tmp_path / "one", 1)
    message = worker.align_load_weights(folder, "run:1", digest)
    worker.reload_weights(weights_path=folder)  # the very same weights: still nobody ordered it
    assert worker.align_report_weights(True) == message | {"loads": 2}
    worker.update_weights({})
    assert worker.align_report_weights()["loads"] == 3


def test_values_that_change_in_place_show(tmp_path: Path) -> None:
    worker = Worker()
    folder, digest = saved(tmp_path / "one", 1)
    message = worker.align_load_weights(folder, "run:1", digest)
    worker.model.bias.data[0] += 1e-6
    now = worker.align_report_weights(True)
    assert now["content"] != message["content"]
    assert now | {"content": message["content"]} == message


def test_weights_that_came_another_way_are_named() -> None:
    worker = Worker()
    message = getattr(worker, NAME)(version="run:nccl:1")
    assert (message["version"], message["digest"], message["loads"]) == ("run:nccl:1", None, 0)


def test_vllms_worker_has_these_methods() -> None:
    """A renamed one would go uncounted."""
    worker = pytest.importorskip("vllm.v1.worker.gpu_worker").Worker
    assert [name for name in WEIGHT_METHODS if not hasattr(worker, name)] == []
    assert not {name for name in dir(WeightsKeeper) if not name.startswith("__")} & set(dir(worker))
