"""Fixtures of the command line's tests: a store with a trained checkpoint, and the export command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from align.cli.main import main
from align.config.tuning import LoraTuning
from align.models.loading import load_policy, load_tokenizer
from align.models.tuning.apply import apply_tuning, save_tuned
from tests.support import toy
from tests.support.cli.example_store import LICENSES, ExampleStore, make_store


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """``model/`` and ``adapter/`` of a training stage; the adapter's config names the folder of the base."""
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
def pipeline_file(tmp_path: Path) -> Path:
    """Return the file of a pipeline of toy stages."""
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(toy.pipeline(), sort_keys=False))
    return path


@pytest.fixture
def example(tmp_path: Path, tiny_model: Path, trained: Path, tiny_reward: Path) -> ExampleStore:
    return make_store(tmp_path, tiny_model, trained, tiny_reward, LICENSES)


@pytest.fixture
def export(example: ExampleStore, tmp_path: Path) -> Callable[..., int]:
    """The command without the check, into ``out``."""

    def run(word: str, *more: str, check: bool = False, output: Path = tmp_path / "out") -> int:
        rest = [*more, *(() if check else ("--no-check",)), "--store", str(example.store.root)]
        return main(["export", word, "--output", str(output), *rest])

    return run
