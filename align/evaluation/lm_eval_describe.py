"""lm-eval's tasks: which there are, which are refused, what they ask and measure. Runs in ``lm_eval_run``'s process.

This file and ``lm_eval_run.py`` are the only ones that touch lm-eval. Left out: running a task.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.config.validation import nearest
from align.errors import UserError
from align.evaluation.punkt import ensure_punkt

SHOWN_CHARACTERS = 2000
"""Of a question, for readers; long-context tasks would fill the report."""


def describe(job: Mapping[str, Any]) -> dict[str, Any]:
    """Load the tasks that ``job`` names, with their data, and say what they are.

    ``tasks`` (of lm-eval, no groups) → ``metrics`` with their filters, direction and aggregation, ``docs``, ``config``
    (a digest), ``shots``; ``selected`` says which of them each name in ``job`` stands for, and what a group averages.
    Raises ``UserError`` for unknown tasks, for those that run model-written code or read pictures, and for data that
    are not there or stand under no fixed commit.
    """
    import lm_eval

    unpinned = pin_data(job["revisions"])
    offer_nltk_data()
    manager = task_index(job["include"], job["tasks"])
    _refuse_unfit(manager, job["tasks"])
    tasks: dict[str, Any] = {}
    selected = []
    for name in job["tasks"]:
        loaded = _load(manager, name)
        twice = sorted(set(tasks) & set(loaded["tasks"]))
        if twice:
            raise UserError(f"tasks: '{name}' has '{twice[0]}' in it, which is also named before; name it once.")
        tasks |= loaded["tasks"]
        group = loaded.get("groups", {}).get(name)
        averaged = [
            {"metric": one.metric, "filters": one.filter_list, "by_size": one.weight_by_size}
            for one in (group.aggregate_metric_list or [] if group is not None else [])
            if one.aggregation == "mean"
        ]
        selected.append({"name": name, "tasks": list(loaded["tasks"]), "averaged": averaged})
    if unpinned:
        raise UserError(_ask_for_commits(sorted(unpinned)))
    _require_nltk_data()
    described = {name: _described(task, job["limit"]) for name, task in tasks.items()}
    return {"version": lm_eval.__version__, "selected": selected, "tasks": described}


def task_index(include: str | None, names: list[str]) -> Any:
    """lm-eval's index of tasks. Raises ``UserError`` for names that are not in it.

    Its own 14,000 take seconds to list, so they are left out where the user's folder has all that is asked for.
    """
    from lm_eval.tasks import TaskManager

    if include is not None:
        own = TaskManager(include_path=include, include_defaults=False)
        if all(entry is not None for name in names for _, entry in _entries(own, name)):
            return own
    manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.all_tasks:
            close = nearest(name, manager.all_tasks)
            hint = f" Did you mean '{close}'?" if close else ""
            own_tasks = "" if include is None else f" in {include} and"
            raise UserError(
                f"tasks: lm-eval knows no '{name}'{own_tasks} among its own.{hint} `lm-eval ls tasks` lists them."
            )
    return manager


def _entries(manager: Any, name: str, seen: frozenset[str] = frozenset()) -> Iterator[tuple[str, Any]]:
    """What a name stands for, groups and tags followed: names with their entries in the index, None for none."""
    entry = manager.task_index.get(name)
    yield name, entry
    if entry is None or name in seen:
        return
    inner = (entry.cfg or {}).get("task")
    members = [*(inner if isinstance(inner, list) else []), *(entry.tags if entry.kind.name == "TAG" else [])]
    for member in members:
        named = member.get("group") or member.get("task") if isinstance(member, Mapping) else member
        yield from _entries(manager, str(named), seen | {name})


def _refuse_unfit(manager: Any, names: list[str]) -> None:
    """Before anything of a task is loaded: some run code while they are."""
    for name in names:
        for inner, entry in _entries(manager, name):
            config = (entry.cfg if entry is not None else None) or {}
            if config.get("unsafe_code"):
                raise UserError(f"tasks: '{inner}' runs code that the model wrote, which align does not; leave it out.")
            if config.get("doc_to_image") or config.get("doc_to_audio"):
                raise UserError(f"tasks: '{inner}' shows pictures or sound, and policies here read text; leave it out.")


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = manager.load([name])
    except Exception as error:  # a task is a program, and its data come from anywhere
        said = " ".join(str(error).split())[:400]
        hint = (
            "HF_HUB_OFFLINE is set, so nothing comes from the Hub that was not fetched before; unset it, or describe "
            "the task over local files in a folder named by `include`."
            if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
            else "See whether its dataset is there; a task over local files goes into a folder named by `include`."
        )
        raise UserError(f"tasks: '{name}' does not load ({type(error).__name__}: {said}). {hint}") from error
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"tasks: '{task.task_name}' runs code that the model wrote, which align does not; leave it out."
            )
    return loaded


def pin_data(revisions: Mapping[str, str]) -> set[str]:
    """Have datasets of the Hub loaded at the given commits; the set returned fills with those that have none."""
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as formats

    unpinned: set[str] = set()
    original = datasets.load_dataset

    def load_dataset(path: str, *arguments: Any, **options: Any) -> Any:
        if path not in formats and not Path(path).exists():
            if path in revisions:
                options["revision"] = revisions[path]
            elif not re.fullmatch(r"[0-9a-f]{40}", str(options.get("revision"))):
                unpinned.add(path)
        return original(path, *arguments, **options)

    datasets.load_dataset = load_dataset
    return unpinned


def _ask_for_commits(paths: list[str]) -> str:
    """The message for datasets without a commit, with the commits there are now where the Hub answers."""
    from huggingface_hub import HfApi

    def commit(path: str) -> str:
        try:
            return str(HfApi().dataset_info(path, timeout=10).sha)
        except Exception:  # no network is no reason to say nothing
            return "COMMIT"

    block = ", ".join(f"{path}: {commit(path)}" for path in paths)
    return (
        f"tasks: {', '.join(paths)} would be read from the Hub as of today, and mean something else tomorrow. Say at "
        f"which commit (40 hexadecimal digits): `revisions: {{{block}}}`."
    )


def offer_nltk_data() -> None:
    """Keep lm-eval's IFEval from downloading at import what an installed package has."""
    with contextlib.suppress(UserError):  # most tasks need none of it
        ensure_punkt()


def _require_nltk_data() -> None:
    """lm-eval's IFEval splits sentences by NLTK's data, and would fail without them once everything is generated."""
    if any(name.endswith("ifeval.instructions_util") for name in sys.modules):
        ensure_punkt()


def _described(task: Any, limit: int | None) -> dict[str, Any]:
    from lm_eval.api.registry import AGGREGATION_REGISTRY
    from lm_eval.utils import handle_non_serializable, hash_string

    config = task.config
    names = {function: name for name, function in AGGREGATION_REGISTRY.items()}
    filters = [one["name"] for one in config.filter_list] if config.filter_list else ["none"]
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
    if isinstance(text, int):  # the choices are whole questions, and this is the number of the right one
        text = "\n".join(str(choice) for choice in task.doc_to_choice(document))
    text = str(text) or str(task.doc_to_target(document))
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _config_digest(task: Any) -> str:
    """Of everything a task's YAML says, the source of its functions included, whatever machine it lies on."""
    config = dict(task.dump_config())
    config["metadata"] = {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode("utf-8")).hexdigest()
