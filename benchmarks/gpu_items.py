"""The items of each part of the evidence for a GPU: which stages of which models are measured, and how.

An item is one process, or a few, that fit into one command. ``benchmarks.gpu_evidence`` runs those that have no result
yet; an item with an obstacle is named in the table and not run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_adapters import AdapterItem
from benchmarks.gpu_models import SHAPES
from benchmarks.gpu_peers import PeerItem
from benchmarks.gpu_run import StageItem

PARTS = ("tests", "training", "plan", "card", "peers", "adapters", "determinism", "quickstart", "proof")
ROWS = ("sft", "reward", "dpo")
"""Stages that train on rows."""
ROLLOUTS = ("ppo", "grpo")
METHODS = ("full", "lora")
NEVER_SAVE = 100_000


@dataclass(frozen=True)
class Machine:
    """Machine that the items run on."""

    device: str
    tiny: bool

    @property
    def shapes(self) -> tuple[str, ...]:
        """Models that are trained; two layers of either Qwen are the same."""
        return tuple(SHAPES)[:2] if self.tiny else tuple(SHAPES)

    @property
    def sizes(self) -> dict[str, int]:
        """Tokens, rows and steps: enough for a steady rate on a card, few enough for a processor."""
        if self.tiny:
            return {"length": 64, "batch": 4, "micro": 2, "steps": 4, "prompt": 32, "response": 8, "rollout": 8,
                    "responses": 4}  # fmt: skip
        return {"length": 1024, "batch": 16, "micro": 4, "steps": 12, "prompt": 256, "response": 128, "rollout": 64,
                "responses": 16}  # fmt: skip

    def obstacle(self, package: str) -> str | None:
        """Return why a package's kernels or engine cannot be measured here; None where they can."""
        if package in ("liger_kernel", "flash_attn", "unsloth") and self.device != "cuda":
            return f"{package} needs a GPU"
        return None if importlib.util.find_spec(package) else f"{package} is not installed"


@dataclass(frozen=True)
class Item:
    """One item of a part."""

    name: str
    stage: StageItem | None = None
    """The stage that is run; None for a test, a peer, an adapter or the quickstart."""
    peer: PeerItem | None = None
    adapter: AdapterItem | None = None
    runs: int = 1
    """Processes that run it one after another."""
    obstacle: str | None = None


def training_items(machine: Machine) -> list[Item]:
    """Return every stage, tuning and model with torch's attention and transformers' engine, then the alternatives."""
    stages = list(_stages((*ROWS, *ROLLOUTS)))
    plain = [_item(machine, shape, stage, method) for shape in machine.shapes for stage, method in stages]
    return [*plain, *_alternatives(machine)]


def _stages(stages: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for stage in stages:
        for method in METHODS:
            yield stage, method


def _alternatives(machine: Machine) -> Iterator[Item]:
    """Yield the same stages with vLLM, Liger's kernels and flash-attn."""
    for shape in machine.shapes:
        for stage, method in _stages(ROLLOUTS):
            yield _item(machine, shape, stage, method, "vllm", obstacle=machine.obstacle("vllm"))
        for stage, method in _stages(ROWS):
            yield _item(machine, shape, stage, method, "liger", obstacle=machine.obstacle("liger_kernel"))
        for stage, method in _stages(ROWS):
            yield _item(machine, shape, stage, method, "flash", obstacle=machine.obstacle("flash_attn"))


def _item(
    machine: Machine, shape: str, stage: str, method: str, variant: str = "", *, obstacle: str | None = None
) -> Item:
    fields = _fields(machine, stage, method)
    if variant == "liger":
        fields["trainer"] = {"use_liger_kernel": True}
    measured = StageItem(
        shape,
        stage,
        method,
        machine.device,
        machine.tiny,
        *_data_sizes(machine, stage),
        fields=fields,
        engine="vllm" if variant == "vllm" else "transformers",
        attention="flash" if variant == "flash" else "sdpa",
    )
    return Item(" ".join(filter(None, (shape, stage, method, variant))), measured, obstacle=obstacle)


def _data_sizes(machine: Machine, stage: str) -> tuple[int, int]:
    """Return the tokens of a row, or of a prompt, and the number of rows."""
    sizes = machine.sizes
    return (sizes["prompt"], sizes["rollout"]) if stage in ROLLOUTS else (sizes["length"], 2 * sizes["batch"])


def _fields(machine: Machine, stage: str, method: str) -> dict[str, Any]:
    """Return the fields of a stage's config."""
    sizes, tuning = machine.sizes, {"tuning": {"method": method}}
    if stage in ROLLOUTS:
        return tuning | {
            "updates": 4, "rollout_batch": sizes["rollout"], "samples_per_prompt": 4,
            "micro_batch_size": sizes["responses"], "max_prompt_tokens": sizes["prompt"],
            "max_tokens": sizes["response"], "save_updates": NEVER_SAVE,
        }  # fmt: skip
    return tuning | {
        "batch_size": sizes["batch"], "micro_batch_size": sizes["micro"], "max_length": sizes["length"],
        "max_steps": sizes["steps"], "epochs": 1000, "eval_rows": 4, "save_steps": NEVER_SAVE,
    }  # fmt: skip


def plan_items(machine: Machine) -> list[Item]:
    """Return stages whose memory is far apart: long rows, large micro-batches, recomputed activations."""
    small, large = "qwen2.5-0.5b", "qwen2.5-1.5b"
    sizes = machine.sizes
    long, wide = {"max_length": 4 * sizes["length"]}, {"micro_batch_size": sizes["batch"]}
    recomputed = {"gradient_checkpointing": True}
    return [
        _plan_item(machine, small, "sft", "full", "long rows", {**long, "micro_batch_size": 1}),
        _plan_item(machine, small, "sft", "full", "recomputed", {**wide, **recomputed}),
        _plan_item(machine, small, "sft", "lora", "wide", wide),
        _plan_item(machine, small, "reward", "lora", "wide", wide),
        _plan_item(machine, small, "dpo", "full", "recomputed", {**long, "micro_batch_size": 1, **recomputed}),
        _plan_item(machine, large, "sft", "lora", "recomputed", {**wide, **recomputed}),
        _plan_item(machine, large, "dpo", "lora", "long rows", {**long, "micro_batch_size": 1}),
        _plan_item(machine, small, "ppo", "full", "long responses", {"max_tokens": 4 * sizes["response"]}),
        _plan_item(machine, small, "ppo", "lora", "wide", {"micro_batch_size": sizes["rollout"]}),
        _plan_item(machine, large, "grpo", "lora", "long responses", {"max_tokens": 4 * sizes["response"]}),
    ]


def _plan_item(machine: Machine, shape: str, stage: str, method: str, label: str, changes: dict[str, Any]) -> Item:
    fields = {**_fields(machine, stage, method), **changes}
    # Three steps: memory is what counts, and the first two are not timed.
    fields |= {"updates": 3} if stage in ROLLOUTS else {"max_steps": 3}
    length, rows = _data_sizes(machine, stage)
    length = fields.get("max_length", length)
    measured = StageItem(shape, stage, method, machine.device, machine.tiny, length, rows, fields)
    return Item(f"{shape} {stage} {method}, {label}", measured)


CARD_GIB = 22.3
"""Memory that ``align plan`` counts as usable on a card of 24 GB."""


def card_items(machine: Machine) -> list[Item]:
    """Return stages that a card of 24 GB holds by the plan, with no more memory than that, whatever the card has."""
    score = {"score": "benchmarks.stage_work:by_length"}
    lora, qlora = {"tuning": {"method": "lora", "rank": 16}}, {"tuning": {"method": "qlora", "rank": 16}}
    return [
        _card_item(machine, "qwen3-8b", "sft", lora | {"max_length": 2048}),
        _card_item(machine, "qwen3-8b", "sft", qlora | {"max_length": 2048}, "bitsandbytes"),
        _card_item(machine, "qwen3-8b", "dpo", lora | {"max_length": 2048}),
        _card_item(machine, "qwen3-8b", "reward", lora | {"max_length": 2048}),
        _card_item(machine, "qwen3-4b", "grpo", lora | score, "vllm"),
        _card_item(machine, "qwen3-4b", "ppo", lora | score, "vllm"),
        # More rows than fit, because nothing tells the stage of the smaller memory: its first step is repeated.
        _card_item(machine, "qwen3-8b", "sft", lora | {"max_length": 2048, "micro_batch_size": "auto"}),
        _card_item(machine, "qwen3-4b", "grpo", lora | score | {"micro_batch_size": "auto"}, "vllm"),
    ]


def _card_item(machine: Machine, shape: str, stage: str, changes: dict[str, Any], package: str | None = None) -> Item:
    """Return a stage in the memory of a card of 24 GB, in micro-batches of one row by default."""
    method = changes["tuning"]["method"]
    fields = _fields(machine, stage, method) | {"micro_batch_size": 1} | changes
    label = ", memory found" if fields["micro_batch_size"] == "auto" else ""
    if stage in ROLLOUTS:
        fields |= {"updates": 3} if machine.tiny else {"updates": 3, "max_prompt_tokens": 512, "max_tokens": 1024}
        length, rows = fields["max_prompt_tokens"], machine.sizes["rollout"]
    else:
        fields |= {"max_steps": 4, "gradient_checkpointing": True} | (
            {"max_length": machine.sizes["length"]} if machine.tiny else {}
        )
        length, rows = fields["max_length"], 2 * machine.sizes["batch"]
    engine = "vllm" if package == "vllm" else "transformers"
    measured = StageItem(
        shape, stage, method, machine.device, machine.tiny, length, rows, fields, engine, card=CARD_GIB
    )
    obstacle = machine.obstacle(package) if package else None
    return Item(f"{shape} {stage} {method}{label}", measured, obstacle=obstacle)


def peer_items(machine: Machine) -> list[Item]:
    """Return SFT with LoRA of trl and Unsloth, on the sizes of ``training_items``."""
    sizes = machine.sizes
    item = (machine.device, machine.tiny, sizes["length"], sizes["batch"], sizes["micro"], sizes["steps"])
    return [
        Item(f"{shape} sft lora {peer}", peer=PeerItem(peer, shape, *item), obstacle=machine.obstacle(peer))
        for shape in machine.shapes
        for peer in ("trl", "unsloth")
    ]


def adapter_items(machine: Machine) -> list[Item]:
    """Return updates of an adapter and samples with it, merged into vLLM's weights and by its LoRA kernels."""
    measured = [
        AdapterItem(way, shape, rank, machine.device, machine.tiny)
        for shape in machine.shapes
        for rank in (16, 64)
        for way in ("merged", "kernels")
    ]
    obstacle = machine.obstacle("vllm")
    return [Item(f"{item.shape} r{item.rank} {item.way}", adapter=item, obstacle=obstacle) for item in measured]


def determinism_items(machine: Machine) -> list[Item]:
    """Return stages that run twice, with deterministic kernels and, two of them, without."""
    stages = (("sft", "full"), ("reward", "lora"), ("dpo", "lora"), ("ppo", "full"), ("grpo", "lora"))
    strict = [_twice(machine, stage, method, deterministic=True) for stage, method in stages]
    return [*strict, *(_twice(machine, stage, "full", deterministic=False) for stage in ("sft", "ppo"))]


def _twice(machine: Machine, stage: str, method: str, *, deterministic: bool) -> Item:
    shape = "qwen2.5-0.5b"
    length, rows = _data_sizes(machine, stage)
    fields = _fields(machine, stage, method)
    fields |= {"updates": 3} if stage in ROLLOUTS else {"max_steps": 4}
    measured = StageItem(
        shape, stage, method, machine.device, machine.tiny, length, rows, fields, deterministic=deterministic
    )
    label = "deterministic" if deterministic else "default kernels"
    return Item(f"{shape} {stage} {method}, {label}", measured, runs=2)
