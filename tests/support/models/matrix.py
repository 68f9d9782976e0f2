"""The support matrix: each family in each kind of training, compared with plain transformers on single rows.

A cell trains one step of a real stage, records its micro-batch and its gradients, and computes the gradients again with
the family's own class in transformers, one row at a time and without padding (``single_rows.py``).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from align import Pipeline, Run
from align.errors import UserError
from align.export.export import Source, export
from align.models.checkpoints.conversion import plain_of
from align.models.checkpoints.files import SINGLE
from align.models.checkpoints.folder_checks import tensor_entries
from align.models.checkpoints.multimodal import is_multimodal, join, rest_of, split
from align.models.compute.architecture import UnknownArchitecture
from align.models.compute.model_types import read_architecture
from align.models.fast.real_tokens import computes_real_tokens
from align.models.tuning.peft_layers import merged_weights
from align.runner import run_stage, stage_process
from align.store.fingerprint import file_digest
from align.store.json_files import read_events
from tests.support import in_process
from tests.support.fork_server import shared_server
from tests.support.inference.vllm_families import compared_in_vllm
from tests.support.models.families import FAMILIES, write_family
from tests.support.models.multimodal import write_multimodal
from tests.support.models.single_rows import BETA, reference_loss

ROWS_OF_TABLE = (*FAMILIES, "gemma3 (multimodal)", "qwen3_5 (multimodal)")
TOLERANCE = 1e-5
"""Largest difference of a loss, and of a gradient as a share of the largest gradient."""
ROWS = 8
EXACT = {"precision": "float32", "learning_rate": 1e-3}
TRAINING = {**EXACT, "max_steps": 1, "batch_size": 4, "max_length": 128, "max_grad_norm": 1e9}
ROLLOUTS = {**EXACT, "updates": 1, "rollout_batch": 8, "max_tokens": 8, "max_prompt_tokens": 64}
LORA = {"method": "lora", "rank": 4}
CELLS: dict[str, dict[str, Any]] = {
    "sft": {"stage": "sft", "model": "model", "data": "data", **TRAINING},
    "packed": {"stage": "sft", "model": "model", "data": "data", "packing": True, **TRAINING},
    "lora": {"stage": "sft", "model": "model", "data": "data", "tuning": LORA, **TRAINING},
    "qlora": {
        "stage": "sft",
        "model": "model",
        "data": "data",
        "tuning": {**LORA, "method": "qlora"},
        **TRAINING,
    },
    "reward": {"stage": "reward", "model": "model", "data": "pairs", **TRAINING},
    "dpo": {"stage": "dpo", "policy": "model", "data": "pairs", "beta": BETA, **TRAINING},
    "kto": {"stage": "kto", "policy": "model", "data": "pairs", "beta": BETA, **TRAINING},
    "ppo": {
        "stage": "ppo",
        "policy": "model",
        "prompts": "data",
        "score": "examples.scorers:letters",
        "critic": "head",
        **ROLLOUTS,
    },
    "grpo": {
        "stage": "grpo",
        "policy": "model",
        "prompts": "data",
        "score": "examples.scorers:letters",
        "samples_per_prompt": 4,
        **ROLLOUTS,
    },
    "continue": {
        "stage": "sft",
        "model": "model",
        "data": "data",
        **TRAINING,
        "continue_from": "sft",
        "max_steps": 2,
    },
    "merge": {"stage": "merge", "policies": ["sft", "dpo"], "weights": [0.5, 0.5]},
    # The first step of a warm-up changes no weight.
    "export": {"stage": "sft", "model": "model", "data": "data", **TRAINING, "warmup_ratio": 0.0},
    # The load-balancing loss depends on the tokens of a process.
    # AdamW's first step would be as large for gradients of rounding errors as for others.
    "processes": {
        "stage": "sft",
        "model": "model",
        "data": "data",
        **TRAINING,
        "learning_rate": 0.5,
        "warmup_ratio": 0.0,
        "trainer": {"router_aux_loss_coef": 0.0, "optim": "sgd"},
    },
}
"""Column -> the stage that it trains."""
COLUMNS = (*CELLS, "memory", "vllm")
"""All columns. ``memory`` and ``vllm`` need no stage."""
BFLOAT16_TOLERANCE = 0.05
"""Largest difference of a log-probability of an engine that computes in bfloat16 only, in nats."""


@dataclass
class Recorded:
    """What a stage computed in its first step."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    reference: Any = None
    """The plain model in transformers with the weights before the step."""
    adapters: dict[str, tuple[torch.Tensor, float]] = field(default_factory=dict)
    """Matrix A and scaling of each adapter, by the name of the matrix that it adapts."""
    transposed: set[str] = field(default_factory=set)
    """Adapted matrices that are stored as (in, out): GPT-2's."""
    is_padded: bool = True


@dataclass(frozen=True)
class Cell:
    """A result: ``equal``, ``padded`` (equal on the general path), ``bfloat16``, ``refused``, or ``differs``."""

    status: str
    difference: float = 0.0
    message: str = ""


def run_cell(model_type: str, column: str, folder: Path) -> Cell:
    """Run a cell of the matrix in ``folder``, which the cells of a family share. Stages run in this process."""
    name, _, parts = model_type.partition(" ")
    if column == "vllm":
        return vllm_cell(name, folder / "vllm")
    model = folder / name
    if not model.exists():
        (write_multimodal if parts else write_family)(name, model)
    if column == "memory":
        return memory_cell(model, folder)
    if column == "export":
        return export_cell(model, folder)
    if column == "processes":
        return processes_cell(model, folder)
    recorded = Recorded()
    try:
        with recording(recorded):
            run = train(model, column, folder)
    except UserError as error:
        return Cell("refused", message=str(error))
    if column == "merge":
        difference = compare_merged(*(run.artifacts[name].model for name in ("merge", "sft", "dpo")))
    else:
        difference = compare(recorded, column, steps_of(run, column))
    status = "padded" if recorded.is_padded and recorded.gradients else "equal"
    return Cell(status if difference <= TOLERANCE else "differs", difference)


def memory_cell(model: Path, folder: Path) -> Cell:
    """Compare the parameters that a plan counts from the config with the model's, or with its text part's."""
    try:
        counted = read_architecture(model / "config.json").parameters
    except UnknownArchitecture as error:
        return Cell("refused", message=str(error))
    if is_multimodal(model):
        split(model, folder / "text", folder / "rest")
        model = folder / "text"
    difference = counted - sum(parameter.numel() for parameter in parameters(model))
    return Cell("differs" if difference else "equal", difference)


def export_cell(model: Path, folder: Path) -> Cell:
    """Export a trained model, and compare its parameters and the names in its files with the checkpoint's.

    Of a multimodal checkpoint the text part is compared, and the other parts' tensors with the original's.
    """
    run = train(model, "export", folder)
    checkpoint, exported = run.artifacts["export"].model, folder / "exported"
    before = zip(parameters(run.artifacts["model"].model), parameters(checkpoint), strict=True)
    assert any(not torch.equal(first, second) for first, second in before), "the training changed no weight"
    try:
        export(Source(checkpoint), exported)
    except UserError as error:
        return Cell("refused", message=str(error))
    rest = rest_of([run.artifacts["model"]])
    if rest is not None:
        join(rest, exported)
    if tensor_entries(exported).keys() != tensor_entries(model).keys():
        return Cell("differs", math.inf)
    if rest is not None:
        split(exported, folder / "exported_text", folder / "exported_rest")
        if file_digest(folder / "exported_rest" / SINGLE) != file_digest(rest / SINGLE):
            return Cell("differs", math.inf)
        exported = folder / "exported_text"
    pairs = zip(parameters(exported), parameters(checkpoint), strict=True)
    difference = max(float((value - expected).abs().max()) for value, expected in pairs)
    return Cell("differs" if difference else "equal", difference)


def processes_cell(model: Path, folder: Path) -> Cell:
    """Compare a step in two processes with the same step in one process, by the largest change of a parameter."""
    try:
        one = train(model, "processes", folder)
        with outside_of_this_process("processes"):
            two = train(model, "processes", folder, processes=2)
    except UserError as error:
        return Cell("refused", message=str(error))
    start, first, second = (
        torch.cat([parameter.flatten() for parameter in parameters(path)])
        for path in (one.artifacts["model"].model, one.artifacts["processes"].model, two.artifacts["processes"].model)
    )
    difference = float((second - first).abs().max() / (first - start).abs().max())
    return Cell("equal" if difference <= TOLERANCE else "differs", difference)


def vllm_cell(model_type: str, folder: Path) -> Cell:
    """Compare vLLM's log-probabilities of sampled tokens with transformers', before and after updates of the weights.

    The engine runs in a process of its own. Models have the sizes that vLLM accepts.
    """
    result = compared_in_vllm(model_type, folder)
    if "differences" not in result:
        return Cell("refused", message=result["message"])
    difference = max(result["differences"])
    is_exact = result["dtype"] == "float32"
    if difference > (TOLERANCE if is_exact else BFLOAT16_TOLERANCE):
        return Cell("differs", difference)
    return Cell("equal" if is_exact else "bfloat16", difference, result.get("message", ""))


@contextlib.contextmanager
def outside_of_this_process(stage: str) -> Iterator[None]:
    """Run one stage in a separate process, which the fork server of the tests starts. The other stages run here."""
    here = in_process.run_attempt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            run_stage,
            "run_attempt",
            lambda name, *args, **more: (stage_process.run_attempt if name == stage else here)(name, *args, **more),
        )
        patch.setattr(stage_process.this_thread, "server", shared_server())
        yield


def train(model: Path, column: str, folder: Path, processes: int = 1) -> Run:
    """Run the column's stage, in this number of processes, with the stages that it reads."""
    files = {"data": "rows.jsonl", "pairs": "pairs.jsonl"}
    for number, text in enumerate(files.values()):
        answer = ("completion",) if number == 0 else ("chosen", "rejected")
        rows = [{"prompt": f"Say {n}" + "x" * (n % 3), **{key: f"{key} {n}" for key in answer}} for n in range(ROWS)]
        (folder / text).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    stages: dict[str, Any] = {"model": {"source": str(model)}}
    stages |= {name: {"stage": "data", "dataset": str(folder / file)} for name, file in files.items()}
    before = ("sft", "dpo") if column == "merge" else ("sft",) if column == "continue" else ()
    stages |= {name: CELLS[name] for name in (*before, column)}
    runtime: dict[str, Any] = {"threads": 1, "engine": {"name": "transformers"}}
    if processes > 1:
        runtime["stages"] = {column: {"launch": {"processes": processes}}}
    pipeline = Pipeline({"name": "matrix", "seed": 1, "runtime": runtime, "stages": stages})
    return pipeline.run(store=folder / ("store" if processes == 1 else f"store of {processes}"))


def steps_of(run: Run, column: str) -> list[dict[str, Any]]:
    """Return the events of a stage's steps."""
    return [event for event in read_events(run.artifacts[column].path / "events.jsonl") if "loss" in event]


def compare_merged(merged: Path, *parts: Path) -> float:
    """Return the largest difference of a merged model's parameters from the mean of its two parts'."""
    means = [(first + second) / 2 for first, second in zip(*map(parameters, parts), strict=True)]
    return max(float((value - mean).abs().max()) for value, mean in zip(parameters(merged), means, strict=True))


def parameters(folder: Path) -> list[torch.Tensor]:
    """Return a checkpoint's parameters as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [parameter.detach() for parameter in model.parameters()]


@contextlib.contextmanager
def recording(recorded: Recorded) -> Iterator[None]:
    """Record the first step of the stages that train on rows."""
    from align.models.loading import new_reward
    from align.training.trainers import Prepared

    compute_loss = Prepared.compute_loss

    def record(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and not recorded.inputs:
            recorded.inputs = {name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)}
            recorded.is_padded = not computes_real_tokens(model) and "position_ids" not in inputs
            note_weights(recorded, trainer.model)
            trainer.optimizer.optimizer.register_step_pre_hook(lambda *_: note_gradients(recorded, trainer.model))
        return compute_loss(trainer, model, inputs, *args, **kwargs)

    def reward_with_head(*args: Any) -> Any:
        # A new head is 0, and the layers below it would then have no gradient.
        model = new_reward(*args)
        torch.manual_seed(0)
        model.score.weight.data.normal_(std=0.1)
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Prepared, "compute_loss", record)
        patch.setattr("align.models.tuning.apply.new_reward", reward_with_head)
        yield


def note_weights(recorded: Recorded, model: Any) -> None:
    """Keep a plain model with the weights of ``model``, adapters merged, and the adapters' matrices A."""
    plain = plain_of(model)
    recorded.reference = type(plain)._from_config(plain.config, dtype=torch.float32).eval()
    weights = {name: value.float().clone() for name, value in merged_weights(model)}
    recorded.reference.load_state_dict(weights, strict=False)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            target = name.removeprefix("base_model.model.")
            if module.fan_in_fan_out:
                recorded.transposed.add(target)
            recorded.adapters[target] = (module.lora_A["default"].weight.detach().clone(), module.scaling["default"])


def note_gradients(recorded: Recorded, model: Any) -> None:
    """Keep the gradients of the first step, by the plain name of each parameter."""
    if not recorded.gradients:
        recorded.gradients = {
            name.removeprefix("base_model.model."): parameter.grad.detach().float().clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


def compare(recorded: Recorded, column: str, events: list[dict[str, Any]]) -> float:
    """Return the largest difference from plain transformers: of the loss, and of the gradients by their largest."""
    if column in ("ppo", "grpo"):
        return float(events[0]["parity_gap_max"])
    loss = reference_loss(recorded.reference, recorded.inputs, column)
    loss.backward()
    expected = {name: p.grad for name, p in recorded.reference.named_parameters() if p.grad is not None}
    for name, (matrix, scaling) in recorded.adapters.items():
        # With B = 0, the gradient of B in W + s B A is s (dL/dW) A'.
        gradient = expected[f"{name}.weight"]
        if name in recorded.transposed:
            gradient = gradient.T
        expected[f"{name}.lora_B.default.weight"] = scaling * gradient @ matrix.T
    pairs = [(value, expected[name]) for name, value in recorded.gradients.items() if name in expected]
    assert pairs, f"no gradient of {column} was compared"
    largest = max(float(reference.abs().max()) for _, reference in pairs)
    gaps = [float((value - reference).abs().max()) / largest for value, reference in pairs]
    constant = {"dpo": math.log(2), "kto": 0.5}.get(column)
    logged = events[0]["loss"] if column != "continue" else float(loss)
    expected_loss = float(loss) if constant is None else constant
    return max(*gaps, abs(float(logged) - expected_loss))
