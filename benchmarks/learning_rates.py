"""Regret of the default learning rates: a sweep around the default of each kind of stage.

    python -m benchmarks.learning_rates --dolly dolly_3k.json --store /tmp/rates --json FILE

``sft`` learns Dolly's answers and is measured by the loss on held-out answers. The other kinds start from the
quickstart's SFT stage, on its pairs and prompts: ``reward`` is measured by the loss on held-out pairs, ``dpo``, ``ppo``
and ``grpo`` by the gold score of greedy answers to held-out prompts. The regret of a rate is its distance from the best
rate of the sweep. Every run is a stage in the store, so a second call runs only what is new.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from align import Pipeline
from align.errors import StageFailed

LORA = {"method": "lora", "rank": 16, "alpha": 32}
FULL = {"method": "full"}
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Rates of a sweep, as multiples of the default."""
QUICKSTART = Path("pipelines/quickstart.yaml")
RECIPES = {"data": Path("data_recipes/quickstart.yaml"), "dolly": Path("data_recipes/dolly.yaml")}
ROWS = {"batch_size": 16, "micro_batch_size": 16, "max_length": 192}
UPDATES = {
    "policy": "sft",
    "prompts": "data",
    "updates": 9,
    "rollout_batch": 64,
    "num_mini_batches": 2,
    "micro_batch_size": 32,
    "max_tokens": 48,
    "max_prompt_tokens": 128,
    "missing_eos_penalty": 0.3,
    "save_updates": 9,
    "rollouts": {"keep": 0.0},
}
ROUNDS = {"updates": 3, "rollout_batch": 256, "micro_batch_size": 16, "save_updates": 3}
SFT = {
    "stage": "sft",
    "model": "model",
    "data": "dolly",
    **ROWS,
    "batch_size": 8,
    "micro_batch_size": 8,
    "max_rows": 160,
    "eval_rows": 96,
}
REWARD = {"stage": "reward", "model": "sft", "data": "sample", **ROWS, "max_rows": 480, "eval_rows": 200}
PAIRS = {"policy": "sft", "data": "sample", **ROWS, "max_rows": 400, "eval_rows": 40}
SETTINGS: dict[str, dict[str, Any]] = {
    "sft": SFT,
    "reward": REWARD,
    "dpo": {"stage": "dpo", **PAIRS},
    "kto": {"stage": "kto", **PAIRS},
    "simpo": {"stage": "simpo", **PAIRS},
    "orpo": {"stage": "orpo", **PAIRS, "policy": "model"},
    "ppo": {"stage": "ppo", "reward": "reward", **UPDATES, "samples_per_prompt": 4},
    "grpo": {"stage": "grpo", "score": "gold", **UPDATES, "samples_per_prompt": 8},
    "rejection": {"stage": "rejection", "score": "gold", **UPDATES, "samples_per_prompt": 8, **ROUNDS},
}
KINDS = {
    f"{kind}, {name}": {**settings, "tuning": tuning}
    for kind, settings in SETTINGS.items()
    for name, tuning in (("LoRA", LORA), ("full", FULL))
}
"""Kind and tuning -> the settings of its stage, without the rate."""


@dataclass(frozen=True)
class Trial:
    """One rate of a kind: the metric of each seed, infinitely bad if training failed."""

    kind: str
    rate: float
    is_default: bool
    values: list[float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.values)


SCORE = {
    "stage": "evaluate",
    "policies": ["trial"],
    "reference": "trial",
    "prompts": "data",
    "score": "gold",
    "max_tokens": 48,
    "max_prompts": 220,
}


def base_stages(dolly: str) -> dict[str, Any]:
    """Return the stages that all trials share: the quickstart's, and Dolly's rows."""
    quickstart = Pipeline.load(QUICKSTART).plain["stages"]
    stages = {name: quickstart[name] for name in ("model", "sft", "sample", "reward")}
    recipes: dict[str, dict[str, Any]] = {
        name: {"stage": "data", "recipe": str(RECIPES[name].resolve())} for name in RECIPES
    }
    recipes["dolly"]["files"] = [dolly]
    return {"model": stages.pop("model"), **recipes, **stages}


def make_pipeline(stages: Mapping[str, Any], trial: Mapping[str, Any], *, by_loss: bool) -> Pipeline:
    """Return the pipeline of one trial, with the stages that it reads."""
    blocks = {**stages, "trial": trial} | ({} if by_loss else {"score": SCORE})
    whole = Pipeline.from_dict({"name": "rates", "stages": blocks})
    needed = ["score" if "score" in blocks else "trial"]
    for name in needed:  # grows while it is read
        needed += [source for source in whole.nodes[name].input_names if source not in needed]
    kept = {name: block for name, block in blocks.items() if name in needed}
    return Pipeline.from_dict({"name": "rates", "stages": kept})


def measure(kind: str, stages: Mapping[str, Any], seeds: Sequence[int], store: str) -> list[Trial]:
    """Return the trials of a kind, with rates around its default."""
    settings = KINDS[kind]
    by_loss = settings["stage"] in ("sft", "reward")
    config: Any = make_pipeline(stages, settings, by_loss=by_loss).nodes["trial"].config
    trials = []
    for factor in FACTORS:
        rates = {"learning_rate": float(f"{config.learning_rate * factor:.2g}")}
        if settings["stage"] == "ppo":
            rates["critic_learning_rate"] = config.critic_learning_rate
        values = []
        for seed in seeds:
            pipeline = make_pipeline(stages, {**settings, **rates, "seed": seed}, by_loss=by_loss)
            values.append(measure_trial(pipeline, store, by_loss=by_loss))
            print(f"{kind} {rates['learning_rate']:g} seed {seed}: {values[-1]:.4f}", flush=True)
        trials.append(Trial(kind, rates["learning_rate"], factor == 1.0, values))
    return trials


def measure_trial(pipeline: Pipeline, store: str, *, by_loss: bool) -> float:
    """Return the held-out loss or the gold score of a trial; the worst value if its training failed."""
    try:
        run = pipeline.run(store=store)
    except StageFailed as error:
        print(error, flush=True)
        return math.inf if by_loss else 0.0
    if by_loss:
        return float(run.metrics("trial")["test_loss_after"])
    return float(run.metrics("score")["values"]["trial"]["gold"])


def print_table(trials: Sequence[Trial]) -> None:
    """Print one row per kind: the metric at each multiple of the default, and the regret of the default."""
    for kind in dict.fromkeys(trial.kind for trial in trials):
        sweep = [trial for trial in trials if trial.kind == kind]
        by_loss = KINDS[kind]["stage"] in ("sft", "reward")
        best = (min if by_loss else max)(sweep, key=lambda trial: trial.mean)
        default = next(trial for trial in sweep if trial.is_default)
        cells = [f"{trial.rate:.2g}: {trial.mean:.3f}" for trial in sweep]
        regret = abs(default.mean - best.mean)
        print(f"| {kind} | {default.rate:.2g} | {' | '.join(cells)} | {best.rate:.2g} | {regret:.3f} |")


def main() -> None:
    """Run the sweeps, and print and write their table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dolly", required=True, help="file with Dolly's rows")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[17])
    parser.add_argument("--store", required=True)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    stages = base_stages(options.dolly)
    trials = []
    for kind in options.kinds:
        trials += measure(kind, stages, options.seeds, options.store)
        print_table(trials)
        if options.json is not None:
            options.json.write_text(json.dumps([asdict(trial) for trial in trials], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
