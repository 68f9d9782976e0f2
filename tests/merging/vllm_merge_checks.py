"""Checkpoints of schedules, averages and merges in vLLM, in one engine: ``python vllm_merge_checks.py TINY ROOT``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from align.artifacts import Kind
from align.models.loading import load_policy
from align.rollouts.engine import open_engine
from align.rollouts.weights import checkpoint_weights
from align.runtime import EngineConfig, Runtime
from align.stage import STAGES
from tests.rollouts.vllm_adapter_checks import difference
from tests.stages.test_merge import context
from tests.training.test_replay import replaying
from tests.training.test_unfreezing import made

WAYS: dict[str, dict[str, Any]] = {
    "unfreeze": {"tuning": {"method": "full", "unfreeze": {"at": {0: 1, 4: 2}, "head": True}, "layer_decay": 0.8}},
    "lisa": {"tuning": {"method": "full", "lisa": {"layers": 1, "every": 3}, "freeze": ["*norm*"]}},
    "ema": {"tuning": {"method": "full"}, "ema": 0.9, "anchor": {"to": "kl", "weight": 0.1}},
}


def main(tiny: Path, root: Path) -> None:
    found = {"base": tiny}
    for name, fields in WAYS.items():
        run = made("sft", root / name, tiny, max_steps=10, learning_rate=1e-2, **fields)
        STAGES["sft"].runner()(run)
        found[name] = run.output / "model"
    run = replaying("sft", root / "replay", tiny, max_steps=10, learning_rate=1e-2)
    STAGES["sft"].runner()(run)
    found["replay"] = run.output / "model"
    (root / "start").mkdir()
    (root / "start" / "model").symlink_to(tiny)
    given = found | {"base": root / "start" / "model"}
    for method in ("linear", "ties", "warp"):
        merged = context(root / method, given, Kind.POLICY, policies=["lisa", "ema"], base="base", method=method)
        STAGES["merge"].runner()(merged)
        found[method] = merged.output / "model"

    runtime = Runtime(engine=EngineConfig(name="vllm", cpu_kv_cache_gb=0.1))
    engine = open_engine(found["warp"], runtime, precision="float32", max_length=128, seed=7, warn=print)
    before = found["warp"]
    for name in ("warp", *(name for name in found if name != "warp")):
        engine.load_weights(checkpoint_weights(found[name]))
        gap = difference(engine, load_policy(found[name]))
        assert gap < 1e-3, (name, gap)
        if name != "warp":
            assert difference(engine, load_policy(before)) > 0.01, f"{name} is no other model, so nothing was checked"
        before = found[name]
    engine.close()
    print("all checks passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
