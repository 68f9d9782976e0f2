"""Episodes with slow tools: the part of ``episodes`` that measures what sleeping tools cost, in one process.

    python -m benchmarks.episodes_latency WORK OUT --tool-seconds 1   (called by episodes)

The same script is played with tools that return at once and with tools that sleep, in turn, each time with other
prompts and an empty prefix cache. Nothing is trained. The first play, which is not counted, warms the engine up.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.episodes_align import open_player, open_work_engine
from benchmarks.episodes_work import EpisodeShape, Script, load_tokenizer, read_work


def play(engine: Any, player: Any, rows: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Play an episode with each row; return the seconds, the tokens, and the share of prompts from the cache."""
    from align.environments.player import EpisodeTask

    if engine.name == "vllm":
        engine.llm.reset_prefix_cache()
    tasks = [EpisodeTask(row, seed + index) for index, row in enumerate(rows)]
    start = time.perf_counter()
    player.play(engine, tasks, temperature=1.0)
    seconds = time.perf_counter() - start
    hit_rate = (player.cache_statistics or {}).get("prefix_hit_rate")
    return {"seconds": seconds, "prefix_hit_rate": hit_rate, **player.counts[-1]}


def measure(work: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Play all; the work has a script, and rows, for each play."""
    shape: EpisodeShape = work["shape"]
    scripts: list[Script] = [work["script"][0]] * shape.updates
    tokenizer = load_tokenizer(work["model"])
    engine = open_work_engine(work, options.engine, batch=max(128, shape.batch))
    prompts = shape.batch // shape.samples
    players = {
        kind: open_player(replace(shape, tool_seconds=seconds), tokenizer, scripts, options.workers, options.isolation)
        for kind, seconds in (("quick", 0.0), ("slow", options.tool_seconds))
    }
    plays: dict[str, list[dict[str, Any]]] = {"quick": [], "slow": []}
    for number, kind in enumerate(play_order(shape.updates)):
        rows = work["rows"][number * prompts : (number + 1) * prompts]
        repeated = [row for row in rows for _ in range(shape.samples)]
        plays[kind].append(play(engine, players[kind], repeated, seed=1000 * number))
    for player in players.values():
        player.close()
    engine.close()
    return {
        "quick": plays["quick"][1:],
        "slow": plays["slow"],
        "warm_up": plays["quick"][0],
        "episodes": shape.batch,
        "calls": max(map(len, scripts[0])) - 1,
        "tool_seconds": options.tool_seconds,
        "workers": options.workers,
        "isolation": options.isolation,
        "engine": engine.name,
    }


def play_order(plays: int) -> list[str]:
    """Return kinds of tools in the order of plays: a quick one to warm up, then both in turn, either first in turn."""
    order = ["quick"]
    for pair in range((plays - 1) // 2):
        order += ["quick", "slow"] if pair % 2 == 0 else ["slow", "quick"]
    return order


def main() -> None:
    """Measure, and write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", choices=("auto", "vllm", "transformers"), default="vllm")
    parser.add_argument("--tool-seconds", type=float, default=1.0)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--isolation", choices=("thread", "process"), default="thread")
    options = parser.parse_args()
    results = measure(read_work(options.work), options)
    options.out.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
