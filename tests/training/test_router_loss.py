"""The load-balancing loss of mixtures of experts: part of SFT, explicit elsewhere, and gone from the saved config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.store.json_files import read_events
from tests.support.models.families import write_family

pytestmark = pytest.mark.usefixtures("stages_in_process")

ROWS = [{"prompt": f"Say {n}", "completion": f"Number {n}"} for n in range(12)]
PAIRS = [{"prompt": f"Say {n}", "chosen": f"Number {n}", "rejected": f"No {n}"} for n in range(12)]
LN_2 = 0.693147
SHARED = {"learning_rate": 1e-3, "max_steps": 1, "batch_size": 4, "max_length": 128}


def first_loss(folder: Path, kind: str, model_type: str, **fields: Any) -> tuple[float, dict[str, Any]]:
    """Train one step; return its loss and the config of the trained model."""
    rows = PAIRS if kind in ("dpo", "orpo") else ROWS
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = folder / model_type
    if not model.exists():
        write_family(model_type, model)
    policy = {"model": "model"} if kind == "sft" else {"policy": "model"}
    stages = {
        "model": {"source": str(model)},
        "data": {"dataset": str(folder / "rows.jsonl")},
        kind: {**policy, "data": "data", **SHARED, **fields},
    }
    run = Pipeline({"name": "router", "seed": 1, "runtime": {"threads": 1}, "stages": stages}).run(store=folder / "s")
    artifact = run.artifacts[kind]
    events = [event for event in read_events(artifact.path / "events.jsonl") if "loss" in event]
    return events[0]["loss"], json.loads((artifact.path / "model" / "config.json").read_text())


def test_dpo_has_no_router_loss_unless_it_is_set(tmp_path: Path) -> None:
    loss, config = first_loss(tmp_path, "dpo", "mixtral")
    assert loss == pytest.approx(LN_2, abs=1e-6) and not config["output_router_logits"]
    # Four experts of which two are chosen: the term is 2 times 4 x sum(share x probability), at least 2.
    with_router, config = first_loss(tmp_path, "dpo", "mixtral", trainer={"router_aux_loss_coef": 0.5})
    assert LN_2 + 0.9 < with_router < LN_2 + 1.5 and not config["output_router_logits"]


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "granitemoe", "granitemoeshared", "granitemoehybrid"])
def test_sft_has_the_router_loss_of_the_config(model_type: str, tmp_path: Path) -> None:
    changes = {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "granitemoehybrid" else {}
    write_family(model_type, tmp_path / model_type, changes)
    with_router, config = first_loss(tmp_path, "sft", model_type)
    without, _ = first_loss(tmp_path, "sft", model_type, trainer={"router_aux_loss_coef": 0.0})
    assert 0.0015 < with_router - without < 0.01  # 0.001 times about 2, per layer or in all
    assert not config["output_router_logits"] and config["router_aux_loss_coef"] in (0.001, 0.9)


def test_dense_granite_hybrid_trains(tmp_path: Path) -> None:
    loss, config = first_loss(tmp_path, "sft", "granitemoehybrid")
    assert 5 < loss < 6 and "num_experts" not in config
