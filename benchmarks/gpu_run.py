"""Measure one real stage in this process, from loading to saving: speed, memory, and the bits of what it saved.

    python -m benchmarks.gpu_run WORK '{"shape": "qwen2.5-0.5b", "stage": "sft", "method": "lora", ...}'

The last line of the output is the result as JSON. ``benchmarks.gpu_evidence`` starts one such process for each item.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.capacity.sharding import Job, Setting
from align.config.runtime import Runtime
from align.models.compute.architecture import Architecture
from align.models.compute.model_types import read_architecture
from benchmarks.flops import forward_flops, learning_flops
from benchmarks.gpu_machine import PeakMemory, matrix_rate
from benchmarks.gpu_models import make_model
from benchmarks.stage_work import FIELD, ROLLOUTS, config_of, plan_job, reads_reward, run_stage

FIRST = 2
"""Steps, or updates, at the start that are left out of the speed: kernels are compiled and memory is taken there."""


@dataclass(frozen=True)
class StageItem:
    """One stage to measure."""

    shape: str
    stage: str
    method: str
    device: str
    tiny: bool
    length: int
    """Tokens of a row, or of a prompt."""
    rows: int
    """Rows, pairs or prompts of the data."""
    fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the stage's config."""
    engine: str = "transformers"
    attention: str = "sdpa"
    deterministic: bool = False
    card: float | None = None
    """GiB that torch may take, as on a smaller card; None for the whole card."""

    @property
    def runtime(self) -> Runtime:
        """Settings of the machine."""
        engine = {"name": self.engine}
        return Runtime.model_validate(
            {"device": self.device, "engine": engine, "deterministic": self.deterministic, "keep_state": False}
        )


def measure(item: StageItem, work: Path) -> dict[str, Any]:
    """Run the stage once below ``work`` and return its result; models are made there once and kept."""
    if item.deterministic:
        from align.models.compute.processes import use_deterministic_kernels

        use_deterministic_kernels()
    if item.card is not None and item.device == "cuda":
        limit_memory(item.card)
    (work / "models").mkdir(parents=True, exist_ok=True)
    model = make_model(work / "models", item.shape, tiny=item.tiny, device=item.device, attention=item.attention)
    job = planned_job(item, model)
    rate = matrix_rate(item.device)
    watch = PeakMemory(item.device)
    with tempfile.TemporaryDirectory(dir=work, prefix="run-") as folder:
        root = Path(folder) / "run"
        metrics = run_stage(root, item.stage, item.fields, model, item.length, item.rows, item.runtime)
        events = [json.loads(line) for line in (root / "events").read_text(encoding="utf-8").splitlines()]
        digest = weights_digest(root / "output")
    steps_a_second, tokens_a_second = speed(events)
    architecture = read_architecture(model / "config.json")
    operations = steps_a_second * _rows_of_step(item, job) * operations_of_row(item, architecture)
    setting = Setting(job.micro_batch, accumulated=job.batch > job.micro_batch, checkpointing=job.checkpointing,
                      gpu=item.device == "cuda")  # fmt: skip
    return {
        "tokens_per_second": tokens_a_second,
        "share": operations / rate,
        "peak": watch.peak(),
        "reserved": watch.reserved(),
        "plan": job.memory(setting).peak(job.tokens(job.micro_batch)),
        "engine": metrics.get("engine"),
        "micro_batch": metrics.get("micro_batch_size", item.fields["micro_batch_size"]),
        "repeated_steps": metrics.get("repeated_steps", 0),
        "sampling_share": sampling_share(metrics),
        "sha256": digest,
    }


def limit_memory(gib: float) -> None:
    """Let torch take no more than ``gib`` of the card: what does not fit there fails as on a smaller card."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))


def planned_job(item: StageItem, model: Path) -> Job:
    """Return what ``align plan`` counts for the stage."""
    architecture = read_architecture(model / "config.json")
    models = {FIELD[item.stage]: [architecture]} | (
        {"reward": [architecture]} if reads_reward(item.stage, item.fields) else {}
    )
    return plan_job(item.stage, config_of(item.stage, item.fields), models, item.runtime)


def _rows_of_step(item: StageItem, job: Job) -> int:
    """Return the rows between two events: those of an optimizer step, or the responses of an update."""
    config = config_of(item.stage, item.fields)
    rows: int = config.rollout_batch if item.stage in ROLLOUTS else job.batch
    return rows


def operations_of_row(item: StageItem, model: Architecture) -> float:
    """Return the floating-point operations of one row, all of the greatest length: training, references and rewards."""
    config = config_of(item.stage, item.fields)
    if item.stage in ROLLOUTS:
        return _operations_of_response(config, model)
    tokens = config.sides * config.max_length
    head = tokens if config.has_vocabulary else 0.0
    reference = config.refers * forward_flops(model, tokens, config.max_length, head)
    return float(learning_flops(model, config.tuning, tokens, config.max_length, head) + reference)


def _operations_of_response(config: Any, model: Architecture) -> float:
    """Return the operations of a rollout's response; reward model and critic are as large as the policy."""
    length = config.max_prompt_tokens + config.max_tokens
    # A prompt is read once for its responses.
    shares = config.samples_per_prompt if config.trainer.get("share_prompts", True) else 1
    tokens = config.max_prompt_tokens / shares + config.max_tokens
    learning = learning_flops(model, config.tuning, tokens, length, config.max_tokens)
    # The rollout's log-probabilities under the policy and the reference, and its rewards.
    scoring = 2 * forward_flops(model, tokens, length, config.max_tokens) + forward_flops(model, length, length)
    if getattr(config, "critic_source", None) in ("reward", "policy"):
        learning += learning_flops(model, config.tuning, tokens, length)
        scoring += forward_flops(model, tokens, length)
    if not config.tuning.trains_all:
        # The reference continues from the policy's hidden states below the first adapter.
        frozen_share = 1 - model.learning_layers(config.tuning) / model.layers
        scoring -= forward_flops(model, tokens, length) * frozen_share
    epochs = config.num_epochs * config.kept_per_prompt / config.samples_per_prompt
    return float(epochs * learning + scoring)


def speed(events: list[dict[str, Any]]) -> tuple[float, float]:
    """Return steps (updates) and real tokens a second from the event after the first ``FIRST`` to the last.

    Raises ``ValueError`` where the stage has too few steps for that.
    """
    points = [(event["done"], event["time"], event["tokens"]) for event in events if event["event"] == "progress"]
    points = [point for point in points if point[2] is not None]
    if len(points) < FIRST + 1:
        raise ValueError(f"{len(points)} steps are too few: the first {FIRST} are not timed")
    (first, started, tokens_before), (last, ended, tokens) = points[FIRST - 1], points[-1]
    seconds = ended - started
    return (last - first) / seconds, (tokens - tokens_before) / seconds


def sampling_share(metrics: dict[str, Any]) -> float | None:
    """Return the share of the updates' seconds in which the engine sampled; None for a stage without an engine."""
    sampling, total = metrics.get("seconds_sampling"), metrics.get("seconds")
    return sampling / total if sampling is not None and total else None


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 of all saved weights below ``folder``, by the order of their names."""
    files = sorted(folder.rglob("*.safetensors"))
    hasher = hashlib.sha256()
    for file in files:
        hasher.update(file.relative_to(folder).as_posix().encode() + b"\0")
        with file.open("rb") as weights:
            while chunk := weights.read(1 << 24):
                hasher.update(chunk)
    return hasher.hexdigest()


if __name__ == "__main__":
    print(json.dumps(measure(StageItem(**json.loads(sys.argv[2])), Path(sys.argv[1]))))
