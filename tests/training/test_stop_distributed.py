"""Two processes that are asked to stop save once, and one process goes on to the weights of a run without a break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from align.pipeline.pipeline import Node
from align.pipeline.stop_signal import Stopped, StopRequest
from align.runner.listener import Listener
from align.runner.runner import run_pipeline
from tests.support.training.distributed_runs import WITHIN, pipeline


class AskAt(Listener):
    """Asks when the stage reports so much."""

    def __init__(self, stop: StopRequest, done: int) -> None:
        self.stop, self.done = stop, done

    def stage_event(self, node: Node, event: dict[str, Any]) -> None:
        reached = event["event"] == "progress" and event.get("unit") in ("steps", "updates")
        if reached and event["done"] >= self.done and not self.stop.is_requested:
            self.stop.request()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kind", "changes"), [("sft", {"save_steps": 1000, "max_steps": 150}), ("ppo", {"save_updates": 100})]
)
def test_two_processes_stop_together_and_one_goes_on(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    stop = StopRequest()
    two = pipeline(kind, {"processes": 2}, **changes)
    with pytest.raises(Stopped, match=rf"stage '{kind}' stopped as asked, at step \d+ of \d+"):
        run_pipeline(two, store=tmp_path / "parts", listener=AskAt(stop, 1), stop=stop)
    (partial,) = (tmp_path / "parts").glob(f"{kind}/*.partial")
    assert len(list(partial.glob("checkpoints/checkpoint-*"))) == 1
    run_pipeline(pipeline(kind, {}, **changes), store=tmp_path / "parts")
    run_pipeline(pipeline(kind, {}, **changes), store=tmp_path / "whole")
    actual, expected = (
        load_file(next((tmp_path / name).glob(f"{kind}/*/model/model.safetensors"))) for name in ("parts", "whole")
    )
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=WITHIN, rtol=0)
