"""The support matrix of families and kinds of training: no cell crashes, and none differs from transformers."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from align.inference.weights import checkpoint_weights
from tests.support.models.families import family_config, write_family
from tests.support.models.matrix import ROWS_OF_TABLE, run_cell, steps_of, train
from tools.model_matrix import NOT_RUN, PAGE, row_of, table_rows

pytestmark = pytest.mark.usefixtures("stages_in_process")

QUICK = [
    ("gemma3 (multimodal)", "export"),
    ("qwen3", "reward"),
    ("qwen3_moe", "merge"),
    ("lfm2", "packed"),
    ("gpt_oss", "kto"),
    ("granite", "grpo"),
    ("gemma3_text", "vllm"),
]
"""A cell of each kind: multimodal, dense, a mixture, a hybrid, attention sinks, scaled logits, and sliding windows."""
TEXT_PARTS = {"gemma3 (multimodal)": "gemma3_text", "qwen3_5 (multimodal)": "qwen3_5_text"}
HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("matrix")


@pytest.mark.parametrize(("model_type", "column"), QUICK)
def test_cell_equals_the_documented_one(model_type: str, column: str, folders: Path) -> None:
    if column == "vllm" and not HAS_VLLM:
        pytest.skip("vLLM is not installed")
    (folders / model_type).mkdir(exist_ok=True)
    cell = run_cell(model_type, column, folders / model_type)
    assert cell.status != "differs", f"{model_type} {column} differs by {cell.difference:.1e}"
    documented = table_rows(PAGE.read_text(encoding="utf-8"))[model_type][column]
    assert documented.startswith(cell.status)


def test_rl_of_a_mixture_freezes_and_compares_routers(tmp_path: Path) -> None:
    model = write_family("qwen3_moe", tmp_path / "qwen3_moe")
    run = train(model, "grpo", tmp_path)
    metrics = run.artifacts["grpo"].record["metrics"]
    assert metrics["frozen_router_parameters"] == 2 * 4 * 32  # layers x experts x hidden
    assert steps_of(run, "grpo")[0]["router_disagreement"] == 0.0
    before, after = (dict(checkpoint_weights(folder)) for folder in (model, run.artifacts["grpo"].model))
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved and not any(".gate." in name for name in moved)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ROWS_OF_TABLE)
def test_family_equals_the_documented_row(model_type: str, tmp_path: Path) -> None:
    documented = table_rows(PAGE.read_text(encoding="utf-8"))[model_type]
    columns = [column for column in documented if column != "vllm" or HAS_VLLM]
    expected = {column: documented[column] for column in columns if documented[column] != NOT_RUN}
    cells = {column: run_cell(model_type, column, tmp_path) for column in expected}
    assert not [column for column, cell in cells.items() if cell.status == "differs"]
    assert expected == row_of(cells)


def test_every_family_is_documented() -> None:
    assert table_rows(PAGE.read_text(encoding="utf-8")).keys() == set(ROWS_OF_TABLE)


def test_documented_properties_are_those_of_the_rows() -> None:
    table = PAGE.read_text(encoding="utf-8").split("### Which row covers what")[1].split("\n\n")[1]
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    rows = {name.strip(): set(re.findall(r"`([^`/]+)`", text)) for name, text in lines}
    configs = {name: family_config(TEXT_PARTS.get(name, name)) for name in ROWS_OF_TABLE}

    def rows_with(field: str) -> set[str]:
        return {name for name, config in configs.items() if getattr(config, field, None)}

    assert rows["tied head"] == rows_with("tie_word_embeddings")
    assert rows["sliding window, of 8 tokens"] == rows_with("sliding_window")
    assert rows["soft caps"] == rows_with("attn_logit_softcapping") & rows_with("final_logit_softcapping")
    scaled = {name for name in rows_with("logits_scaling") if configs[name].logits_scaling != 1}
    assert rows["scaled logits"] == scaled | rows_with("logit_scale")
