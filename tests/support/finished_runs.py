"""Finished runs of any pipeline without running it: every stage published with invented numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.evaluation.comparisons import Resampling
from align.evaluation.scorecard import SystemInfo
from align.evaluation.scorecard.scorecard_builder import Measurements, build
from align.pipeline.pipeline import Node, Pipeline
from align.store.artifacts import Kind
from align.store.record import output_digests
from align.store.store import Store
from tests.support.records import record_of

STEPS = 6
PROMPTS = 10


def publish_run(pipeline: Pipeline, root: Path, luck: float = 0.0) -> None:
    """Publish every stage that the store does not have; ``luck`` is added to the scores of trained systems."""
    store = Store.open(root)
    for node in pipeline:
        if store.find(node.stage.kind, node.key, node.name) is None:
            _publish(store, node, luck)


def _publish(store: Store, node: Node, luck: float) -> None:
    output = store.partial(node.stage.kind, node.key) / "output"
    output.mkdir(parents=True)
    metrics: dict[str, Any] = {"steps": STEPS, "seconds": 0.5, "dropped": {"too long": 3}, "engines": ["none"]}
    if node.makes == Kind.SCORECARD:
        card = _card(node, luck)
        (output / "scorecard.json").write_text(json.dumps(card))
        metrics["values"] = {name: {"reward": 1.0} for name in card["policies"]}
    # The first two steps stand there twice, as after a resumed attempt: the later value counts.
    steps = [(1, 9.0), (2, 9.0), *((step, 1 / step) for step in range(1, STEPS + 1))]
    events = [{"event": "metrics", "time": 1.0, "step": step, "loss": loss} for step, loss in steps]
    events.append({"event": "metrics", "time": 2.0, "step": STEPS, "test_loss": 0.5, "score": 0.7, "kl": 0.1})
    (output / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    record = record_of(node.stage.kind, makes=str(node.makes), seconds=4.0, peak_memory_bytes=2**30, metrics=metrics)
    record |= {"key": node.key, "stage": node.name, "outputs": output_digests(output)}
    with store.lock(node.stage.kind, node.key, lambda _: None) as hold:
        store.publish(output, record, hold)


def _card(node: Node, luck: float) -> dict[str, Any]:
    """Return a scorecard of the evaluation's systems: each scores better than the one before."""
    policies, reference = list(node.config.policies), node.config.reference  # type: ignore[attr-defined]
    systems = [
        SystemInfo(name, name, "base" if index == 0 else "checkpoint", f"k{index}")
        for index, name in enumerate(policies)
    ]
    values: dict[str, Any] = {}
    for index, name in enumerate(policies):
        score = 0.1 * index + (luck if index else 0.0)
        rewards = [[score + 0.01 * (item % 5)] for item in range(PROMPTS)]
        values[name] = {"gold": rewards, "reward": rewards, "length": [[8.0 - index]] * PROMPTS}
    programs = {"gold": ("higher", "score by a program")}
    measured = Measurements(systems, reference, policies[0], ["words"] * PROMPTS, values, programs)
    return build(measured, Resampling(200, 1), {"prompts": PROMPTS, "engines": []})
