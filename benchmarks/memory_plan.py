"""Peak memory of real stages on a CPU against what ``align plan`` counts for them; exit code 1 beyond 15 %.

    python -m benchmarks.memory_plan [--billion] [--only ppo] [--json FILE]

Each configuration runs in a process of its own (``benchmarks.memory_run``): the whole stage, from loading to saving, on
rows as long as they may be. What is compared is its peak beyond a baseline, a process that has imported everything and
run the stage on a model of under a megabyte. The largest takes 4 GiB, with ``--billion`` (a model of 1.1 billion
parameters) 9. The environment is that of a stage's process.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.capacity import estimate_sampling
from align.capacity.hardware import parse_hardware
from align.capacity.sampling import sampling_way
from align.capacity.sharding import Setting
from align.config.runtime import Runtime
from align.models.compute.architecture import Architecture
from align.models.compute.model_types import architecture_of
from align.models.model_plan import EMBEDDED_SIZES, TINY_SIZES
from align.pipeline.process_limits import SPINNING
from align.runner.huge_pages import page_environment
from align.runner.worker import ENVIRONMENT
from benchmarks.memory_run import BILLION, RUNTIME, WIDE, Measurer
from benchmarks.stage_work import FIELD, ROLLOUTS, TEST_ROWS, config_of, plan_job

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For threads that load weights too: torch's setting is the main thread's alone, and a fork has none of its pool."""
TOLERANCE = 0.15
MIB = 2**20
LORA, FULL = {"method": "lora"}, {"method": "full"}
LAST = {"method": "lora", "last_layers": 15}


@dataclass(frozen=True)
class Configuration:
    """One stage; ``length`` is of rows, of PPO's and of sample's prompts."""

    stage: str
    model: str
    length: int
    fields: dict[str, Any]
    rows: int = 4

    @property
    def label(self) -> str:
        """``sft lora 128 x 2``."""
        if self.stage == "sample":
            scored = "reward" if self.fields.get("reward") else "-"
            size = f"{self.length} + {self.fields['max_tokens']} x {self.rows * self.fields['n']}"
            return f"{self.stage:<6} {scored:<4} {self.model:<8} {size}"
        size = f"{self.length} x {self.fields['micro_batch_size']}"
        if self.stage in ROLLOUTS:
            size = f"{self.length} + {self.fields['max_tokens']} x {self.fields['micro_batch_size']}"
        tuning = self.fields["tuning"]
        kind = "last" if "last_layers" in tuning else tuning["method"]
        return f"{self.stage:<6} {kind:<4} {self.model:<8} {size}"


def _trl(stage: str, tuning: dict[str, Any], length: int, micro: int, model: str = "embedded") -> Configuration:
    fields = {"tuning": tuning, "batch_size": 2 * micro, "micro_batch_size": micro, "max_length": length}
    return Configuration(stage, model, length, fields | {"eval_rows": 4}, 4 * micro)


def _ppo(
    model: str, tuning: dict[str, Any], prompt: int, response: int, micro: int, stage: str = "ppo"
) -> Configuration:
    fields = {"tuning": tuning, "updates": 2, "rollout_batch": 8, "samples_per_prompt": 4, "micro_batch_size": micro}
    if model != "embedded":
        # Random weights give large logits, and these differ by 0.16 nats in bfloat16 for rounding alone.
        fields["trainer"] = {"probe_parity": False}
    return Configuration(stage, model, prompt, fields | {"max_prompt_tokens": prompt, "max_tokens": response})


def _sample(prompt: int, response: int, rows: int, fields: dict[str, Any]) -> Configuration:
    lengths = {"max_prompt_tokens": prompt, "max_tokens": response, "n": 4}
    return Configuration("sample", "embedded", prompt, lengths | fields, rows)


BY_LENGTH = {"score": "benchmarks.stage_work:by_length"}
CONFIGURATIONS = (
    _trl("sft", LORA, 128, 2), _trl("sft", LORA, 512, 1), _trl("sft", FULL, 128, 2), _trl("sft", FULL, 384, 1),
    _trl("sft", LAST, 512, 1),
    _trl("reward", LORA, 128, 2), _trl("reward", LORA, 512, 1), _trl("reward", FULL, 128, 1),
    _trl("dpo", LORA, 128, 1), _trl("dpo", LORA, 256, 1), _trl("dpo", FULL, 64, 1), _trl("dpo", FULL, 192, 1),
    _ppo("embedded", LORA, 64, 32, 4), _ppo("embedded", LORA, 256, 64, 8), _ppo("embedded", LAST, 256, 64, 8),
    _ppo("wide", FULL, 128, 64, 4), _ppo("wide", FULL, 384, 128, 8),
    _sample(256, 64, 16, BY_LENGTH), _sample(512, 16, 4, BY_LENGTH),
    _sample(128, 16, 8, {"score": None, "reward": "r"}),
)  # fmt: skip


BILLION_CONFIGURATIONS = tuple(
    configuration
    for tuning in (LORA, {"method": "qlora"})
    for configuration in (
        _trl("sft", tuning, 256, 2, "billion"),
        _trl("dpo", tuning, 128, 1, "billion"),
        _ppo("billion", tuning, 64, 16, 4, "grpo"),
        _ppo("billion", tuning, 64, 16, 4),
    )
)


def counted(wanted: Configuration) -> dict[str, int]:
    """Bytes by part that the plan counts for a process, when it is fullest."""
    model = _architecture(wanted.model)
    if wanted.stage == "sample":
        return _sampled(wanted, model)
    models = {FIELD[wanted.stage]: [model]} | ({"reward": [model]} if wanted.stage in ROLLOUTS else {})
    config, runtime = config_of(wanted.stage, wanted.fields), Runtime.model_validate(RUNTIME)
    job = plan_job(wanted.stage, config, models, runtime)
    memory = job.memory(Setting(job.micro_batch, accumulated=job.batch > job.micro_batch))
    parts: dict[str, int] = memory.fullest(job.tokens(job.micro_batch))
    return parts


def _sampled(wanted: Configuration, model: Architecture) -> dict[str, int]:
    """The same for a stage that samples, whose baseline has the libraries in it already."""
    models = {"policy": [model]} | ({"reward": [model]} if wanted.fields.get("reward") else {})
    config = config_of("sample", wanted.fields)
    inference = estimate_sampling.inference(config, models)
    # The data has few rows, so a call of the engine has fewer sequences than the stage's own limit.
    sequences = (wanted.rows + TEST_ROWS) * config.n
    load = replace(inference.sampling[0], call=min(inference.sampling[0].call, sequences))
    runtime = Runtime.model_validate(RUNTIME)
    way = sampling_way(replace(inference, sampling=(load,)), runtime, parse_hardware("cpu"))
    return {name: amount for name, amount in way.parts.items() if name != "context"}


def _architecture(name: str) -> Architecture:
    if name == "embedded":
        return architecture_of(EMBEDDED_SIZES)
    if name == "billion":
        return architecture_of(BILLION)
    hidden = WIDE["hidden_size"]
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": WIDE["layers"]}
    return architecture_of({**TINY_SIZES, **sizes, "num_attention_heads": hidden // 32})


def compare(measurer: Measurer, wanted: Configuration) -> dict[str, Any]:
    """Return the counted and the measured bytes, and the count's error as a share of the measurement."""
    parts, measurement = counted(wanted), measurer.measure(**vars(wanted))
    total = sum(parts.values())
    error = total / measurement["peak"] - 1
    return {"label": wanted.label, "counted": total, **measurement, "error": error, "parts": parts}


def main() -> int:
    """Run them one after another, print a table, and say whether all are within the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run those whose line contains this")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--billion", action="store_true", help="run a model of 1.1 billion parameters instead")
    options = parser.parse_args()
    if any(name not in os.environ for name in ENVIRONMENT) or os.environ.get("OMP_NUM_THREADS") != "1":
        # glibc and OpenMP read these variables when a process starts
        command = [sys.executable, "-m", "benchmarks.memory_plan", *sys.argv[1:]]
        stage = {**ENVIRONMENT, **page_environment(), **SPINNING, "TOKENIZERS_PARALLELISM": "false"}
        os.execve(sys.executable, command, {**stage, **os.environ, **ONE_THREAD})
    configurations = BILLION_CONFIGURATIONS if options.billion else CONFIGURATIONS
    chosen = [configuration for configuration in configurations if options.only in configuration.label]
    print("stage  tuning model   tokens x rows       counted  measured, MiB    off  anonymous, MiB")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        measurer = Measurer(Path(folder))
        for configuration in chosen:
            result = compare(measurer, configuration)
            results.append(result)
            print(
                f"{configuration.label:<40} {result['counted'] / MIB:8,.0f} {result['peak'] / MIB:9,.0f} "
                f"{result['error']:+13.1%} {result['anonymous'] / MIB:9,.0f}",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    beyond = [result["label"] for result in results if abs(result["error"]) > TOLERANCE]
    print(f"{len(results) - len(beyond)} of {len(results)} within {TOLERANCE:.0%}")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
