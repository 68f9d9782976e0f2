"""Computation of an evaluation once its responses are there: reward scores, KL and held-out losses.

    python -m benchmarks.evaluation --folder work --prompts 50

SmolLM2-135M as three checkpoints, with four responses of each to every prompt, held-out rows and pairs, through
``align.evaluation.evaluator`` with an engine that answers at once. For each kind of pass it prints seconds, and of the
tokens that were computed (without padding) the rate and the share of the matrix peak: 2 FLOPs for each weight of the
trunk and each token, and for each weight of the head and each position that predicts something, over a 2048-square
bf16 product. On a machine with other load, ``--threads 1`` and the shares by processor time are the ones to compare.
Left out: sampling, statistics, and the start of a process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 17
RESPONSE_TOKENS = 48
SYSTEMS = ("sft", "dpo", "ppo")
SAMPLES = 4
TRUNK, HEAD = 106_203_456, 28_311_552
"""Weights of SmolLM2-135M's layers, and of its head."""


@dataclass
class Work:
    """Seconds, tokens and operations of one kind of pass."""

    seconds: float = 0.0
    processor: float = 0.0
    """Seconds of the processor, by all threads."""
    tokens: int = 0
    """Tokens that the trunk computed, without padding."""
    predictions: int = 0
    """Positions that went through a vocabulary head."""


class Clock:
    """Time since it was made."""

    def __init__(self) -> None:
        self.started, self.processor = time.perf_counter(), time.process_time()

    def add_to(self, work: Work) -> None:
        """Add the time since the start to ``work``."""
        work.seconds += time.perf_counter() - self.started
        work.processor += time.process_time() - self.processor


class Meter:
    """Counts tokens and time of the passes of an evaluation, by kind of work."""

    def __init__(self) -> None:
        self.work: dict[str, Work] = {}
        self.current: Work | None = None
        self.loading = Work()

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function`` with its time and the tokens inside it counted under ``label``."""

        def run(*arguments: Any, **options: Any) -> Any:
            outer, clock = self.current, Clock()
            loaded = self.loading.seconds, self.loading.processor
            self.current = work = self.work.setdefault(label, Work())
            try:
                return function(*arguments, **options)
            finally:
                clock.add_to(work)
                # A model is loaded at its first pass.
                work.seconds -= self.loading.seconds - loaded[0]
                work.processor -= self.loading.processor - loaded[1]
                self.current = outer

        return run

    def loaded(self, load: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``load`` with its time counted, and the tokens of the model that it returns."""

        def run(*arguments: Any, **options: Any) -> Any:
            clock = Clock()
            model = load(*arguments, **options)
            clock.add_to(self.loading)
            model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)
            return model

        return run

    def _count(self, trunk: Any, arguments: Any, options: dict[str, Any]) -> None:
        if self.current is None:
            return
        mask = options.get("attention_mask")
        ids = options["input_ids"]
        if mask is not None and mask.shape == ids.shape:
            self.current.tokens += int(mask.sum())
        else:
            self.current.tokens += ids.numel()


def main() -> None:
    """Prepare the work where it is missing, run an evaluation, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    from align.pipeline.process_limits import set_waiting

    set_waiting()
    print(json.dumps(measure(arguments.folder, arguments.prompts, arguments.threads), indent=2))


def measure(folder: Path, prompts: int, threads: int) -> dict[str, Any]:
    """Run one evaluation in a new folder of results and return seconds, tokens and shares of the matrix peak."""
    import tempfile

    from align.config.runtime import Runtime
    from align.models.compute.processes import keep_freed_memory, use_threads

    # As the stage does.
    use_threads(Runtime(device="cpu", threads=threads))
    keep_freed_memory()
    meter = Meter()
    install(meter)
    inputs = prepare(folder, prompts)
    from align.evaluation import drift
    from align.evaluation.evaluator import Evaluation
    from align.evaluation.plan import make_plan

    drift.SAMPLER_TOLERANCE = dict.fromkeys(drift.SAMPLER_TOLERANCE, float("inf"))  # the responses are no model's
    peaks = [matrix_peak()]
    total = Work()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        context = make_context(Path(scratch), inputs, prompts)
        evaluation = Evaluation(context, make_plan(context))
        clock = Clock()
        evaluation.run(open_instantly)
        clock.add_to(total)
    peaks.append(matrix_peak())
    peak, processor_peak = (max(values) for values in zip(*peaks, strict=True))
    table: dict[str, Any] = {
        "threads": threads,
        "peak, GFLOP/s": round(peak / 1e9),
        "peak by processor time, GFLOP/s": round(processor_peak / 1e9),
        "whole": seconds_of(total),
        "loading": seconds_of(meter.loading),
    }
    for name, work in meter.work.items():
        flops = 2 * (TRUNK * work.tokens + HEAD * work.predictions)
        table[name] = seconds_of(work) | {
            "tokens": work.tokens,
            "predictions": work.predictions,
            "tokens/s": round(work.tokens / work.seconds),
            "share of the peak": round(flops / work.seconds / peak, 2),
            "share by processor time": round(flops / work.processor / processor_peak, 2),
        }
    return table


def open_instantly(model_dir: Path, runtime: Any) -> Any:
    """Open the engine that answers at once."""
    return InstantEngine()


def seconds_of(work: Work) -> dict[str, float]:
    """Return the seconds by the clock and by the processor."""
    return {"seconds": round(work.seconds, 1), "processor seconds": round(work.processor, 1)}


def install(meter: Meter) -> None:
    """Put the meter around the passes of reward models and checkpoints."""
    from align.evaluation import logprobs as measurement
    from align.evaluation.logprobs import response_logprobs
    from align.models import loading, reward

    reward.load_reward = meter.loaded(loading.load_reward)  # type: ignore[attr-defined]
    loading.load_policy = meter.loaded(loading.load_policy)
    reward.RewardModel.score = meter.timed("reward model", reward.RewardModel.score)  # type: ignore[method-assign]
    read = meter.timed("log-probabilities", response_logprobs)

    def counted(model: Any, prompts: Any, responses: Any, **options: Any) -> Any:
        values = read(model, prompts, responses, **options)
        pairs = {(tuple(prompt), tuple(response)) for prompt, response in zip(prompts, responses, strict=True)}
        meter.work["log-probabilities"].predictions += sum(len(response) for _, response in pairs)
        return values

    measurement.response_logprobs = counted  # type: ignore[attr-defined]


def matrix_peak() -> tuple[float, float]:
    """Return the FLOP/s of a 2048-square bf16 product by the clock and by processor time: the best of ten each."""
    import torch

    matrix = torch.randn(2048, 2048, dtype=torch.bfloat16)
    rates = []
    for _ in range(10):
        work, clock = Work(), Clock()
        matrix @ matrix
        clock.add_to(work)
        rates.append((2 * 2048**3 / work.seconds, 2 * 2048**3 / work.processor))
    by_clock, by_processor = (max(values) for values in zip(*rates, strict=True))
    return by_clock, by_processor


class InstantEngine:
    """An engine whose responses are there at once: texts of the embedded data, cut at the most tokens there may be."""

    name = "instant"

    def __init__(self) -> None:
        from align.data.families.embedded import generate
        from align.models.built_in import fetch
        from align.models.loading import load_tokenizer

        self.tokenizer = load_tokenizer(fetch())
        rows = generate(2000, SEED + 1)
        texts = [str(row["completion"][0]["content"]) for row in rows]
        self.texts: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        self.random = random.Random(SEED)

    def load_weights(self, weights: Any) -> None:
        """Load nothing."""

    def close(self) -> None:
        """Close nothing."""

    def generate(self, prompts: list[list[int]], sampling: Any, on_progress: Any = None) -> list[list[Any]]:
        """Return ``sampling.n`` responses of 24 to 48 tokens to each prompt."""
        return [[self._response(sampling.max_tokens) for _ in range(sampling.n)] for _ in prompts]

    def _response(self, most: int) -> Any:
        from align.inference.protocol import Response

        length = self.random.randint(most // 2, most)
        ids: list[int] = []
        while len(ids) < length:
            ids += self.random.choice(self.texts)
        return Response(ids[:length], [-1.0] * length, False, self.tokenizer.decode(ids[:length]))


def prepare(folder: Path, prompts: int) -> dict[str, Any]:
    """Return the inputs of the stage, made below ``folder`` where they are missing."""
    from align.data.families.embedded import generate
    from align.data.rows import assistant, write_rows
    from align.models.built_in import fetch
    from align.models.loading import load_tokenizer
    from align.store.artifacts import Artifact, Kind
    from benchmarks.ppo_work import save_reward

    model = fetch()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "reward" / "model").is_dir():
        save_reward(model, load_tokenizer(model), folder / "reward" / "model")

    def artifact(name: str, kind: Kind) -> Artifact:
        (folder / name).mkdir(exist_ok=True)
        return Artifact(name, kind, folder / name, {"key": name})

    policies = []
    for name in SYSTEMS:
        policies.append(artifact(name, Kind.POLICY))
        copy_model(model, folder / name / "model")
    rows = generate(prompts + 60 + 160, SEED)
    data, pairs = artifact("data", Kind.INSTRUCTIONS), artifact("pairs", Kind.PREFERENCES)
    write_rows(data.split("test"), rows[: prompts + 60])
    answers = [row["completion"][0]["content"] for row in generate(320, SEED + 2)]
    sides = [
        {key: row[key] for key in ("id", "source", "checks", "prompt")}
        | {"chosen": [assistant(answers[2 * number])], "rejected": [assistant(answers[2 * number + 1])]}
        for number, row in enumerate(rows[-160:])
    ]
    write_rows(pairs.split("test"), sides)
    return {
        "policies": policies,
        "reference": policies[0],
        "prompts": data,
        "heldout": data,
        "reward": artifact("reward", Kind.REWARD),
        "pairs": pairs,
    }


def copy_model(model: Path, folder: Path) -> None:
    """Link the model's files into ``folder``."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True)
    for file in model.iterdir():
        os.link(file, folder / file.name)


def make_context(folder: Path, inputs: dict[str, Any], prompts: int) -> Any:
    """Return the context of an ``evaluate`` stage."""
    from align.config.runtime import EngineConfig, Runtime
    from align.config.stages.evaluate import EvaluateConfig
    from align.pipeline.context import StageContext

    config = EvaluateConfig(
        policies=list(SYSTEMS),
        reference=SYSTEMS[0],
        prompts="data",
        heldout="data",
        max_heldout=60,
        reward="reward",
        pairs="pairs",
        samples_per_prompt=SAMPLES,
        max_tokens=RESPONSE_TOKENS,
        max_prompts=prompts,
        bootstrap=200,
    )
    for name in ("output", "checkpoints"):
        (folder / name).mkdir()
    return StageContext(
        name="evaluate",
        config=config,
        inputs=inputs,
        seed=SEED,
        runtime=Runtime(device="cpu", engine=EngineConfig(name="transformers")),
        output=folder / "output",
        checkpoints=folder / "checkpoints",
        events=folder / "events.jsonl",
    )


if __name__ == "__main__":
    main()
