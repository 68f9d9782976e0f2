"""Stage distill with vLLM's own server as teacher, over HTTP: both routes give a local teacher's distributions."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.models.built_in import make_tiny
from align.stages.distill import run
from tests.support.inference.vllm_server import vllm_server
from tests.support.stages.stage_contexts import distill_stage
from tests.support.training.harness import losses

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The tiny model with vLLM's default of 20 log-probabilities."""
    with vllm_server(tiny_model, tmp_path_factory.mktemp("server")) as url:
        yield {"url": url, "model": "tiny", "retries": 1, "timeout": 120}


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student: other weights than the teacher's."""
    return make_tiny(tmp_path_factory.mktemp("student") / "model", seed=5)


def test_vllm_server_teaches_as_local_model(
    tiny_model: Path, other_model: Path, server: dict[str, Any], tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"top_k": 20, "max_steps": 3, "on_policy": 0.5, "max_tokens": 4}
    local = distill_stage(tmp_path / "local", other_model, tiny_model, **fields)
    served = distill_stage(tmp_path / "vllm", other_model, tiny_model, teacher={"endpoint": server}, **fields)
    expected, metrics = run(local), run(served)
    assert metrics["own_steps"] > 0
    assert losses(served) == pytest.approx(losses(local), rel=1e-3)
    assert metrics["test_divergence_after"] == pytest.approx(expected["test_divergence_after"], rel=1e-3)


def test_vllm_completions_teach_text(other_model: Path, server: dict[str, Any], tmp_path: Path) -> None:
    block = {"endpoint": server, "api": "completions"}
    metrics = run(distill_stage(tmp_path / "run", other_model, other_model, teacher=block, top_k=20, max_steps=2))
    assert metrics["tokens_not_aligned"] == 0
    assert metrics["test_divergence_after"] < metrics["test_divergence_before"]


def test_vllm_limit_of_logprobs_is_explained(other_model: Path, server: dict[str, Any], tmp_path: Path) -> None:
    stage = distill_stage(tmp_path / "run", other_model, other_model, teacher={"endpoint": server}, top_k=64)
    with pytest.raises(UserError, match=r"Requested prompt logprobs of 64.*asked for top_k 64: .* --max-logprobs"):
        run(stage)
