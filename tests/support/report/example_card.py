"""A scorecard of format 3 with everything in it, built by the evaluation's own code from invented measurements."""

from __future__ import annotations

from typing import Any

import numpy as np

from align.config.stages.evaluation.gates import parse_gates
from align.evaluation.answers import Item, Measured
from align.evaluation.comparisons import Resampling
from align.evaluation.reward_accuracy import pair_accuracy
from align.evaluation.scorecard import Metric, SystemInfo
from align.evaluation.scorecard.scorecard_builder import Measurements, TaskResult, build
from align.evaluation.statistics import mean_interval, wilson
from align.evaluation.tasks.base import Task

POLICIES = ["model", "sft", "ppo"]
PROMPTS = 24
ITEMS = 40


def systems() -> list[SystemInfo]:
    """Three checkpoints, a prompted base model and the best of eight."""
    return [
        SystemInfo("model", "model", "base", "k0"),
        SystemInfo("sft", "sft", "checkpoint", "k1"),
        SystemInfo("ppo", "ppo", "checkpoint", "k2"),
        SystemInfo("prompted", "model", "prompted", "k3", "Answer <briefly>.", 3),
        SystemInfo("best8", "sft", "best_of", "k4", "", 0, 8),
    ]


class StubTask(Task):
    """A task with invented numbers."""

    responds = True

    def __init__(
        self, name: str, kind: str, title: str, metrics: dict[str, Metric], sources: list[str],
        settings: dict[str, Any], extra: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.kind, self.title, self.metrics = name, kind, title, metrics
        self.primary = next(iter(metrics))
        self.items = [Item(f"{name}-{index}", source, []) for index, source in enumerate(sources)]
        self._settings, self._extra = settings, extra or {}

    def settings(self) -> dict[str, Any]:
        return self._settings

    def extras(self) -> dict[str, Any]:
        return self._extra


def share(title: str, better: Any = "higher") -> Metric:
    """A rate."""
    return Metric(title, better, "share", f"what {title} means")


def example_tasks(rates: dict[str, float]) -> list[TaskResult]:
    """An instruction task, refusals in both directions, perplexity, and a judged one with win rates."""
    generator = np.random.default_rng(1)

    def coins(system: str, shift: float = 0.0) -> list[list[float]]:
        return [[float(hit)] for hit in generator.random(ITEMS) < np.clip(rates[system] + shift, 0, 1)]

    ifeval = StubTask(
        "ifeval", "ifeval", "IFEval",
        {"prompt_strict": share("Prompt, strict"), "prompt_loose": share("Prompt, loose")},
        ["length", "format"] * (ITEMS // 2), {"files": ["input_data.jsonl"], "max_tokens": 256, "seed": 17},
    )  # fmt: skip
    xstest = StubTask(
        "refusals", "xstest", "XSTest", {"refused_safe": share("Safe prompts refused", "lower"),
                                         "refused_unsafe": share("Unsafe prompts refused")},
        ["safe", "unsafe"] * (ITEMS // 2), {"rule": "words"},
    )  # fmt: skip
    general = StubTask(
        "general", "perplexity", "General text", {"bits_per_byte": Metric("Bits per byte", "lower", "bits", "text")},
        ["wiki"] * ITEMS, {"window": 512},
    )  # fmt: skip
    judged = StubTask(
        "mt", "judged", "MT-Bench", {"score": Metric("Judge's score", "higher", "1 to 10", "mean of both turns")},
        ["writing"] * ITEMS, {"judge": "judge-7b"},
        {"win_rates": [win_rate("ppo", "sft", 25, 5, 10), win_rate("ppo", "model", 36, 2, 2, True)]},
    )  # fmt: skip
    tasks = []
    half = [1.0, 0.0] * (ITEMS // 2)
    for task in (ifeval, xstest, general, judged):
        measured = {}
        for name in rates:
            if task is general and name == "best8":
                continue  # it has no distribution
            if task is general:
                values = {"bits_per_byte": [[1.0 + 0.3 * (name == "ppo") + draw] for draw in generator.random(ITEMS)]}
            elif task is judged:
                values = {"score": [[5 + 3 * rates[name] + draw] for draw in generator.random(ITEMS)]}
            else:
                values = {metric: coins(name, 0.1 * index) for index, metric in enumerate(task.metrics)}
            measurement = Measured(values, notes={"cut off": 3} if name == "ppo" else {})
            if task is xstest:
                measurement.weights = {"refused_safe": half, "refused_unsafe": half[::-1]}
            measured[name] = measurement
        tasks.append(TaskResult(task, measured))
    return tasks


def win_rate(first: str, second: str, wins: int, ties: int, losses: int, controlled: bool = False) -> dict[str, Any]:
    """A comparison by a judge."""
    n = wins + ties + losses + 7
    estimate = wilson(wins + (ties + 7) / 2, n).as_dict()
    return {
        "task": "mt", "judge": "judge-7b", "one": first, "other": second, "n": n, "wins": wins, "ties": ties,
        "losses": losses, "disagreements": 7, "unreadable": 1, "win_rate": estimate,
        "length_controlled": {**estimate, "value": estimate["value"] - 0.05} if controlled else None,
    }  # fmt: skip


def reward_report(stage: str = "reward", sections: bool = False) -> dict[str, Any]:
    """A report on a reward model: pairs, calibration, margins, length, a second scorer."""
    pair = {"chosen": [{"content": "aa"}], "rejected": [{"content": "b"}], "source": "words"}
    second_pair = {**pair, "source": "<b>lists</b>"}
    accuracy = pair_accuracy([pair, second_pair] * 5, [1.0] * 8 + [0.0] * 2, [0.5] * 10)
    confidences = (0.55, 0.7, 0.85, 0.95)
    hits = (5, 6, 9, 9)
    return accuracy | {
        "stage": stage,
        "task": "pairs",
        "by_margin": [
            {"low": low, "high": high, "n": 10, "accuracy": wilson(hit, 10).as_dict()}
            for low, high, hit in ((0.0, 0.5, 6), (0.5, 1.0, 8), (1.0, None, 10))
        ],
        "by_margin_of": "gold" if sections else "model",
        "shorter_chosen": wilson(6, 10).as_dict(),
        "calibration": {
            "ece": mean_interval([0.1, 0.2, 0.1], resamples=100, seed=0).as_dict(),
            "ece_plain": 0.15,
            "temperature": mean_interval([1.6, 1.8], resamples=100, seed=0).as_dict(),
            "note": None,
            "ece_scaled": mean_interval([0.05, 0.1, 0.1], resamples=100, seed=0).as_dict(),
            "bins": [
                {"low": index / 4, "high": (index + 1) / 4, "n": 10, "confidence": confidence,
                 "accuracy": wilson(hit, 10).as_dict()}
                for index, (confidence, hit) in enumerate(zip(confidences, hits, strict=True))
            ],
        },
        "length_correlation": mean_interval([0.3, 0.4, 0.2], resamples=100, seed=0).as_dict(),
        "agreement": {
            "other": "reward-b",
            "accuracy": wilson(8, 10).as_dict(),
            "kappa": mean_interval([0.6, 0.5], resamples=100, seed=0).as_dict(),
            "spearman": mean_interval([0.7, 0.6], resamples=100, seed=0).as_dict(),
        },
        "sections": {"Chat": wilson(9, 10).as_dict(), "Chat Hard": wilson(5, 10).as_dict()} if sections else None,
    }  # fmt: skip


def prompt_values(policies: list[str]) -> dict[str, dict[str, list[list[float]]]]:
    """Numbers on the prompt set: sft helps, ppo does not clearly."""
    generator = np.random.default_rng(0)
    values = {}
    for index, policy in enumerate(policies):
        gold = np.clip(generator.uniform(0, 0.3, PROMPTS) + 0.4 * min(index, 1), 0, 1)
        values[policy] = {
            "gold": [[float(value)] for value in gold],
            "reward": [[float(value * 2 + index)] for value in gold],
            "length": [[float(value)] for value in generator.integers(5, 40, PROMPTS)],
            "finished": [[1.0]] * PROMPTS,
            "kl": [[float(value)] for value in generator.gamma(2, index + 0.1, PROMPTS)],
        }
    return values


SETTINGS = {
    "prompts": PROMPTS,
    "samples_per_prompt": 1,
    "sampling": {"max_tokens": 48, "temperature": 1.0},
    "engines": ["transformers"],
    "seed": 17,
}


def small_card() -> dict[str, Any]:
    """Three checkpoints on 24 prompts of two sources, and a reward model; no tasks."""
    measurements = Measurements(systems()[:3], "sft", "model", ["<b>lists</b>", "words"] * (PROMPTS // 2))
    measurements.values = prompt_values(POLICIES)
    measurements.programs = {"gold": ("higher", "share of the constraints that hold")}
    pair = {"chosen": [{"content": "aa"}], "rejected": [{"content": "b"}], "source": "words"}
    accuracy = pair_accuracy([pair] * 10, [1.0] * 8 + [0.0] * 2, [0.5] * 10)
    measurements.reward_models = [accuracy | {"stage": "reward", "task": "pairs"}]
    return build(measurements, Resampling(300, 0), SETTINGS)


def full_card(prompts: bool = True) -> dict[str, Any]:
    """Five systems, four tasks, gates that fail, hold and cannot be decided, win rates and two reward models."""
    names = [system.name for system in systems()]
    measurements = Measurements(
        systems(), "sft", "model", ["<b>lists</b>", "words"] * (PROMPTS // 2) if prompts else []
    )
    if prompts:
        measurements.values = prompt_values(names)
        measurements.programs = {"gold": ("higher", "share of the constraints that hold")}
        del measurements.values["best8"]["kl"]  # it has no distribution; the scorecard states a bound
    measurements.tasks = example_tasks({"model": 0.2, "sft": 0.5, "ppo": 0.75, "prompted": 0.3, "best8": 0.6})
    measurements.reward_models = [reward_report(), reward_report("reward-b", sections=True)]
    gates = {
        "ifeval.prompt_strict": ">= sft - 0.02",
        "refusals.refused_safe": {"bound": "<= 0.05", "level": "warning"},
        "best8/general.bits_per_byte": ">= 0.5",
    } | ({"kl_to_sft": "<= 0.5", "gold": [">= 0.1"]} if prompts else {})
    measurements.gates = parse_gates(gates, names, "sft")
    return build(measurements, Resampling(300, 0), SETTINGS if prompts else {**SETTINGS, "prompts": 0})
