"""Start of each side: its files, its command line and its environment. Torch-free.

``align``: ``align run``, as it comes. ``trl``: trl's command line as it comes, which trains on one thread (accelerate's
launcher sets ``OMP_NUM_THREADS=1`` where it is not set) and recomputes activations (``gradient_checkpointing`` is on by
default). ``trl_threads``: the same with all cores and without recomputation. ``llamafactory``: all cores, without
recomputation. With ``Settings.checkpointing`` all sides recompute.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align.pipeline.process_limits import usable_cores
from benchmarks.training_peers.environments import ROOT
from benchmarks.training_peers.works import ALPHA, BETA, RANK, SEED, Settings, Work

PEERS = ("trl", "trl_threads", "llamafactory")
SIDES = ("align", *PEERS)


@dataclass(frozen=True)
class Place:
    """Folders of a run: the model, the prepared rows of the work, an empty folder for the run itself."""

    model: Path
    rows: Path
    run: Path


def command_of(side: str, executable: Path, work: Work, settings: Settings, place: Place) -> list[str]:
    """Write what the side reads and return its command line. ``executable`` is in the side's own environment."""
    if side == "align":
        write_pipeline(work, settings, place)
        return [str(executable), "run", "pipeline.yaml"]
    if side == "llamafactory":
        write_llamafactory(work, settings, place)
        return [str(executable), "train", "train.yaml"]
    return [str(executable), work.kind, *trl_options(work, settings, place, as_shipped=side == "trl")]


def environment_of(side: str) -> dict[str, str]:
    """Return the environment of a side's command: no GPU, no Hub, no threads set but where the side sets all cores."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "MKL_", "GOMP_", "ALIGN_", "HF_", "GLIBC_TUNABLES", "TOKENIZERS_"))
    }
    common = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    threads = {} if side in ("align", "trl") else {"OMP_NUM_THREADS": str(usable_cores())}
    inherited.pop("PYTHONPATH", None)
    # Peers must not import this repository's packages. align's environment may have been made for another checkout.
    path = {"PYTHONPATH": str(ROOT)} if side == "align" else {}
    return {**inherited, **common, **threads, **path}


HELD_OUT_PAIR = {
    "prompt": [{"role": "user", "content": "Is water wet?"}],
    "chosen": [{"role": "assistant", "content": "Yes, it is."}],
    "rejected": [{"role": "assistant", "content": "I would rather not say."}],
}


def write_pipeline(work: Work, settings: Settings, place: Place) -> None:
    """Write align's ``pipeline.yaml`` and the recipe of its rows, all of which are trained on."""
    kinds = {"sft": "instructions", "reward": "preferences", "dpo": "preferences", "kto": "unpaired"}
    rows = str(place.rows / "rows" / "train.jsonl")
    recipe = {
        "description": "Rows of the comparison.",
        "kind": kinds[work.kind],
        "sources": [{"type": "files", "name": "rows", "license": "Apache-2.0", "paths": [rows]}],
        "test_size": 0,
    }
    if work.kind == "reward":
        # A reward stage wants a held-out pair. It is read before and after training, outside the loop.
        held_out = place.run / "held_out.jsonl"
        held_out.write_text(json.dumps(HELD_OUT_PAIR) + "\n", encoding="utf-8")
        source = {
            "type": "files",
            "name": "held-out",
            "license": "Apache-2.0",
            "paths": [str(held_out)],
            "part": "test",
        }
        recipe["sources"] = [*recipe["sources"], source]  # type: ignore[misc]
    stage: dict[str, Any] = {
        "model" if work.kind in ("sft", "reward") else "policy": "model",
        "data": "data",
        "tuning": {"method": "lora", "rank": RANK, "alpha": ALPHA} if work.tuning == "lora" else {"method": "full"},
        "learning_rate": work.learning_rate,
        "epochs": 1,
        "batch_size": settings.batch,
        "micro_batch_size": settings.micro_batch,
        "max_length": work.max_length,
        "precision": settings.precision,
    }
    if work.has_reference:
        stage["beta"] = BETA
    if settings.checkpointing:
        stage["gradient_checkpointing"] = True
    pipeline = {
        "name": work.name.replace("_", "-"),
        "seed": SEED,
        "runtime": {"store": "store"},
        "stages": {"model": {"source": str(place.model)}, "data": {"recipe": "rows.yaml"}, work.kind: stage},
    }
    _write_yaml(place.run / "rows.yaml", recipe)
    _write_yaml(place.run / "pipeline.yaml", pipeline)


def trl_options(work: Work, settings: Settings, place: Place, as_shipped: bool) -> list[str]:
    """Return the options of ``trl sft`` and its like."""
    options: dict[str, Any] = {
        "model_name_or_path": place.model,
        "dataset_name": place.rows / "rows",
        "output_dir": place.run / "out",
        "dtype": "float32",
        "bf16": settings.precision == "bfloat16",
        "use_cpu": True,
        "max_length": work.max_length,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "num_train_epochs": 1,
        "learning_rate": work.learning_rate,
        "logging_steps": 1,
        "report_to": "none",
        "seed": SEED,
    }
    if work.tuning == "lora":
        options |= {
            "use_peft": True,
            "lora_r": RANK,
            "lora_alpha": ALPHA,
            "lora_dropout": 0,
            "lora_target_modules": "all-linear",
        }
    if work.has_reference:
        options["beta"] = BETA
    if settings.checkpointing or not as_shipped:
        options["gradient_checkpointing"] = settings.checkpointing
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


def write_llamafactory(work: Work, settings: Settings, place: Place) -> None:
    """Write LLaMA-Factory's ``train.yaml``; its template is read from the model's tokenizer."""
    stages = {"sft": "sft", "reward": "rm", "dpo": "dpo", "kto": "kto"}
    options: dict[str, Any] = {
        "stage": stages[work.kind],
        "do_train": True,
        "model_name_or_path": str(place.model),
        "dataset_dir": str(place.rows / "llamafactory"),
        "dataset": "train",
        "cutoff_len": work.max_length,
        "output_dir": str(place.run / "out"),
        "finetuning_type": work.tuning,
        "bf16": settings.precision == "bfloat16",
        "use_cpu": True,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "num_train_epochs": 1,
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "include_num_input_tokens_seen": "non_padding",
        "disable_gradient_checkpointing": not settings.checkpointing,
        "report_to": "none",
        "seed": SEED,
    }
    if work.tuning == "lora":
        options |= {"lora_rank": RANK, "lora_alpha": ALPHA, "lora_target": "all"}
    if work.has_reference:
        options["pref_beta"] = BETA
    _write_yaml(place.run / "train.yaml", options)


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    # JSON first, so that paths and enums cannot become tags of YAML.
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False), encoding="utf-8")
