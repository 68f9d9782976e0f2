"""An adapter is exported as peft loads it, and refused if vLLM would not load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from align.export.export import Source
from align.export.lora import allowed_rank, bare_adapter, check_lora, require_adapter, write_lora
from align.models.checkpoints.files import ADAPTER_CONFIG
from align.models.loading import load_policy
from tests.support.models.adapters import write_trained
from tests.support.refusals import Refused

IDS = torch.tensor([[1, 40, 41, 42, 2, 1, 50, 60, 70, 80]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A stage's result: ``model/``, merged, and ``adapter/`` next to it."""
    return write_trained(tiny_model, tmp_path_factory.mktemp("trained"), spread=0.1)


def test_peft_adds_the_exported_adapter_to_its_base(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    write_lora(require_adapter(Source(trained / "model")), tmp_path / "out", "org/base")
    model = PeftModel.from_pretrained(load_policy(tiny_model), str(tmp_path / "out"))
    assert torch.allclose(logits(model), logits(load_policy(trained / "model")), atol=1e-4)
    assert not torch.allclose(logits(load_policy(tiny_model)), logits(model), atol=1e-2)
    config = json.loads((tmp_path / "out" / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == "org/base"


def test_checkpoint_without_adapter_is_refused(refused: Refused, tiny_model: Path) -> None:
    assert bare_adapter(Source(tiny_model)) is None
    refused(lambda: require_adapter(Source(tiny_model)))


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens"]},
        {"rank_pattern": {"q_proj": 8}},
        {"bias": "all"},
        {"r": 1024},
    ],
)
def test_adapter_that_vllm_cannot_load_is_refused(
    refused: Refused, changes: dict[str, Any], trained: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    refused(check_lora, folder)


def test_rank_of_server_holds_every_adapter() -> None:
    assert [allowed_rank(rank) for rank in (1, 4, 8, 9, 300)] == [1, 8, 8, 16, 320]
