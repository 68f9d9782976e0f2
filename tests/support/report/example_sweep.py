"""A sweep of invented runs: one base and one SFT model in all of them, and PPO with another KL penalty in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from align.evaluation.answers import Measured
from align.evaluation.comparisons import Resampling
from align.evaluation.scorecard import SystemInfo
from align.evaluation.scorecard.scorecard_builder import Measurements, TaskResult, build
from align.store.artifacts import Artifact, Kind
from tests.support.report.example_card import StubTask, share
from tests.support.report.example_run import HOSTILE, write_artifact

PROMPTS = 40
ITEMS = 30
OUTCOMES = {"kl-0": (0.75, 9.0), "kl-0_05": (0.7, 4.0), "kl-0_5": (0.45, 3.0)}
"""Run → mean gold score and KL of its PPO checkpoint: the last is worse than the second index nearly the same KL."""
COEFFICIENTS = (0.0, 0.05, 0.5)


def make_sweep(root: Path, outcomes: dict[str, tuple[float, float]] = OUTCOMES) -> dict[str, dict[str, Artifact]]:
    """Artifacts of every run by stage; stages before PPO are the same artifacts."""
    root.mkdir(parents=True, exist_ok=True)
    shared = {
        "model": write_artifact(root, "model", Kind.MODEL, config={"source": "tiny"}),
        "sft": write_artifact(root, "sft", Kind.POLICY, ("model",), {"loss": [2.0, 1.5, 1.0]},
                              config={"model": "model", "learning_rate": 1e-3}),
    }  # fmt: skip
    runs = {}
    for index, (name, (gold, kl)) in enumerate(outcomes.items()):
        folder = root / name
        folder.mkdir()
        curves = {"kl": [kl * step / 10 for step in range(10)], "score": [gold * step / 10 for step in range(10)]}
        ppo = write_artifact(
            folder, "ppo", Kind.POLICY, ("sft",), curves, key=f"{index}" * 64, seconds=60.0 + index,
            config={"policy": f"sft of {name}", "kl_coef": COEFFICIENTS[index % len(COEFFICIENTS)],
                    "advantage": {"gamma": 1.0}},
        )  # fmt: skip
        ppo.record["inputs"] = {"policy": "k"}
        evaluate = write_artifact(folder, "evaluate", Kind.SCORECARD, ("sft", "ppo"), key=f"e{index}" * 32,
                                  config={"policies": ["model", "sft", "ppo"], "max_tokens": 64})  # fmt: skip
        write_evaluation(evaluate.path, name, gold, kl, f"k-{name}")
        runs[name] = {**shared, "ppo": ppo, "evaluate": evaluate}
    return runs


def write_evaluation(folder: Path, run: str, gold: float, kl: float, key: str, items: int = ITEMS) -> dict[str, Any]:
    """Scorecard, samples and items; base and SFT answer alike in every run."""
    generator = np.random.default_rng(0)
    noise = generator.uniform(-0.1, 0.1, PROMPTS)
    means = {"model": (0.2, 6.0), "sft": (0.5, 0.0), "ppo": (gold, kl)}
    values = {
        name: {
            "gold": [[float(score + shift)] for shift in noise],
            "length": [[float(10 + index)] for index in range(PROMPTS)],
            "finished": [[1.0]] * PROMPTS,
            "kl": [[float(drift * (1 + shift))] for shift in noise],
        }
        for name, (score, drift) in means.items()
    }
    draws = generator.random(items)
    task = StubTask(
        "ifeval", "ifeval", "IFEval", {"prompt_strict": share("Prompt, strict")}, ["one"] * items, {"seed": 1}
    )
    hits = {name: [[float(draw < score)] for draw in draws] for name, (score, _) in means.items()}
    systems = [SystemInfo("model", "model", "base", "k0"), SystemInfo("sft", "sft", "checkpoint", "k1"),
               SystemInfo("ppo", "ppo", "checkpoint", key)]  # fmt: skip
    measurements = Measurements(
        systems, "sft", "model", ["words"] * PROMPTS, values,
        tasks=[TaskResult(task, {name: Measured({"prompt_strict": each}) for name, each in hits.items()})],
    )  # fmt: skip
    measurements.programs = {"gold": ("higher", "share of the constraints that hold")}
    settings = {"prompts": PROMPTS, "samples_per_prompt": 1, "engines": ["transformers"], "seed": 17,
                "sampling": {"max_tokens": 48, "temperature": 1.0}}  # fmt: skip
    card = build(measurements, Resampling(300, 0), settings)
    (folder / "scorecard.json").write_text(json.dumps(card))
    with (folder / "items.jsonl").open("w") as file:
        for index in range(PROMPTS):
            line = {name: {metric: per[index] for metric, per in each.items()} for name, each in values.items()}
            file.write(json.dumps({"task": "prompts", "id": str(index), "source": "words", "values": line}) + "\n")
        for index in range(items):
            line = {name: {"prompt_strict": each[index]} for name, each in hits.items()}
            file.write(json.dumps({"task": "ifeval", "id": f"i{index}", "source": "one", "values": line}) + "\n")
    with (folder / "samples.jsonl").open("w") as file:
        for index in range(PROMPTS):
            text = HOSTILE if index == 0 else f"answer {index}"
            responses = {
                name: [{"text": f"{text} of {name} in {run}", "tokens": 5, "finished": True,
                        "gold": values[name]["gold"][index][0]}]
                for name in means
            }  # fmt: skip
            prompt = [{"role": "user", "content": f"question {index}"}]
            file.write(json.dumps({"task": "prompts", "id": str(index), "source": "words", "prompt": prompt,
                                   "responses": responses}) + "\n")  # fmt: skip
    return card
