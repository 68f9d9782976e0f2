"""Check settings of stages that are to run against the model they use, from files on this machine. Torch-free.

A setting that works badly is a warning of the plan. A setting with which the stage would fail is refused.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

from align.config.chat_template import TEMPLATE_FIELDS
from align.config.environment import EnvironmentConfig
from align.config.scores import metric_functions, verifier_kinds
from align.config.stages.continue_from import (
    CONTINUE,
    LENGTHS,
    OBSERVED,
    STATE,
    fixed_reason,
    steps_per_length,
    unit_of,
)
from align.config.stages.evaluate import EvaluateConfig
from align.config.stages.evaluation.during_training import TrainingEvaluation
from align.config.stages.inputs import DataConfig, ModelConfig
from align.config.tuning import Ia3Tuning, LowRank
from align.errors import UserError
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.provenance import source_digest
from align.pipeline.registry import load_object
from align.runner.open_store import stopped_ends
from align.runner.stage_result import read_work
from align.store.artifacts import Artifact, Kind
from align.store.store import Store

POLICY_FIELDS = ("policy", "model", "policies")
"""Inputs of a stage whose weights come from a model stage."""
POSITIONS = "align.models.model_plan:known_positions"
TARGETS = "align.models.model_plan:check_targets"
RECORD_SOURCES = "align.evaluation.tasks.records:reported_sources"
MISSING_TOOLS = "align.models.planned_template:explain_missing_tools"
TEMPLATE_SETTINGS = "align.models.planned_template:check_settings"
NO_THOUGHTS = "align.models.planned_template:writes_no_thoughts"
REFERENCES = "align.evaluation.score_validation.stage:check_planned_references"
PREVIEW = "align.data.builds.dataset_recipe:preview_rows"
RECIPE = "align.stages.data:resolved_recipe"
VALIDATION = "align.evaluation.score_validation.stage:validate_planned_score"
"""Functions about models, tasks and scores. Their packages have modules that import torch, so they are loaded by
name."""
PREVIEWED = 256
"""Records of each source of a recipe that was not built yet from which a plan makes rows."""
MOST_ROWS = 10_000
"""Rows of a finished dataset that a plan reads."""


def stage_warnings(pipeline: Pipeline, node: Node, store: Store, runs_scores: bool = True) -> list[str]:
    """Return warnings about a stage's settings, one sentence or more each.

    Raises ``UserError`` for a policy whose chat template does not write the environment's tools or lacks a variable
    that the stage sets, for responses that are longer than the model's context, for tasks during training whose rows an
    ``evaluate`` stage reports, for names of modules that the model does not have, for references that a verifier cannot
    read, and, if ``runs_scores``, for a score that the stage's validation would refuse.
    """
    _check_template_settings(pipeline, node)
    _check_reported_rows(pipeline, node)
    _check_targets(pipeline, node)
    for place, environment in _environments(node):
        _check_tools(pipeline, node, environment, place)
    inspect = node.stage.inspect("plan_warnings")
    texts = list(inspect(node.config, pipeline.base)) if inspect is not None else []
    texts += [*_check_context(pipeline, node), *_unused_settings(pipeline, node)]
    return [*texts, *_check_score(pipeline, node, store, runs_scores)]


def _environments(node: Node) -> Iterator[tuple[str, EnvironmentConfig]]:
    """Yield the environments of a stage and of its evaluation tasks, with their places in the file."""
    holders = {"environment": node.config}
    for prefix, block in (("", node.config), ("evaluate.", getattr(node.config, "evaluate", None))):
        tasks = getattr(block, "tasks", None) or {}
        holders |= {f"{prefix}tasks.{name}.environment": task for name, task in tasks.items()}
    for place, holder in holders.items():
        environment = getattr(holder, "environment", None)
        if isinstance(environment, EnvironmentConfig):
            yield place, environment


def _check_template_settings(pipeline: Pipeline, node: Node) -> None:
    """Raise ``UserError`` if a policy's chat template does not read a variable that the stage sets."""
    if node.stage.kind == "model" or not any(getattr(node.config, name, None) for name in TEMPLATE_FIELDS):
        return
    for model in _model_stages(pipeline, node):
        if isinstance(model.config, ModelConfig):
            load_object(TEMPLATE_SETTINGS)(model.config, pipeline.base, node.config, f"stages.{node.name}.")


def _check_reported_rows(pipeline: Pipeline, node: Node) -> None:
    """Raise ``UserError`` if a task during training reads a file or a split that an ``evaluate`` stage reports."""
    evaluation = getattr(node.config, "evaluate", None)
    if not isinstance(evaluation, TrainingEvaluation):
        return
    record_sources = load_object(RECORD_SOURCES)
    for other in pipeline:
        if not isinstance(other.config, EvaluateConfig):
            continue
        reported: dict[str, str] = {}
        for task in other.config.tasks.values():
            reported |= record_sources(task, pipeline.base)
        for name, task in evaluation.tasks.items():
            for identity, source in record_sources(task, pipeline.base).items():
                if identity in reported:
                    raise UserError(
                        f"stages.{node.name}.evaluate.tasks.{name}: stage '{other.name}' reports numbers on the same "
                        f"records ({source}), so training must not look at them. Divide the records into two files."
                    )


def _check_targets(pipeline: Pipeline, node: Node) -> None:
    """Raise ``UserError`` for modules under ``tuning`` that the stage's model does not have."""
    tuning = getattr(node.config, "tuning", None)
    names: dict[str, list[str]] = {}
    if isinstance(tuning, LowRank | Ia3Tuning):
        names["targets"] = tuning.targets if isinstance(tuning.targets, list) else []
    if isinstance(tuning, LowRank):
        names["save_modules"] = tuning.save_modules
    for model in _model_stages(pipeline, node) if any(names.values()) else ():
        for field, values in names.items():
            place = f"stages.{node.name}.tuning.{field}"
            if isinstance(model.config, ModelConfig):
                load_object(TARGETS)(
                    *(model.config, pipeline.base, values, place),
                    is_matrix=field == "targets",
                    has_head=node.stage.makes is not Kind.REWARD,
                )


def _unused_settings(pipeline: Pipeline, node: Node) -> Iterator[str]:
    """Yield a warning for each setting that can have no effect."""
    config: Any = node.config
    evaluation = getattr(config, "evaluate", None)
    intervals = {name: getattr(config, name, None) for name in ("eval_updates", "eval_steps")}
    if isinstance(evaluation, TrainingEvaluation):
        intervals["evaluate.every"] = evaluation.every
    for field in ("updates", "max_steps"):
        end = getattr(config, field, None)
        for name, every in intervals.items():
            if isinstance(end, int) and isinstance(every, int) and every > end:
                yield (
                    f"{name} {every} is beyond the end at {field} {end}, so nothing is measured between start and end. "
                    f"Lower it, or raise {field}."
                )
    if getattr(config, "thinking_budget", None) is None:
        return
    for model in _model_stages(pipeline, node):
        if isinstance(model.config, ModelConfig) and load_object(NO_THOUGHTS)(model.config, pipeline.base):
            yield (
                f"thinking_budget has no effect unless the policy was trained on thoughts: the chat template of "
                f"'{model.config.source}' (stage '{model.name}') writes none. Remove it, or use a model that thinks."
            )


def _check_score(pipeline: Pipeline, node: Node, store: Store, runs_scores: bool) -> Iterator[str]:
    """Check references and score of a stage on the rows that it will read, as far as they are here.

    Yields notes of the validation, or the command that validates a score that only the stage validates.
    """
    config: Any = node.config
    prompts = node.inputs.get("prompts")
    # A later round of a loop has the score of the first.
    is_repeated = node.name != pipeline.expanded.without_round(node.name) and not node.name.endswith("-1")
    if not isinstance(prompts, str) or is_repeated or getattr(config, "replay", None) is not None:
        return
    place = f"stages.{node.name}"
    validation = getattr(config, "score_validation", None)
    metrics = metric_functions(config.metrics) if isinstance(config, EvaluateConfig) else []
    has_verifiers = "score" in type(config).model_fields and bool(verifier_kinds(config))
    has_verifiers = has_verifiers or any(entry.verifier is not None for entry in metrics)
    is_validated = validation is not None and validation.rows > 0 and config.environment is None
    # ``gold`` is align's own, for rows that align made.
    is_validated = is_validated and config.score not in (None, "gold")
    if not (has_verifiers or is_validated):
        return
    source = pipeline.nodes[prompts]
    rows, are_final = _planned_rows(pipeline, source, store, "test" if validation is None else "train")
    if rows:
        load_object(REFERENCES)(config, rows, place, are_final)
    if not is_validated or not runs_scores:
        return
    notes = load_object(VALIDATION)(config, rows, place) if rows and are_final else None
    if notes is not None:
        yield from notes
        return
    is_built = store.find_intact(source.stage.kind, source.key, source.name) is not None
    before = "" if is_built else f"once `align run {pipeline.where} --only {prompts}` has made its rows, "
    yield (
        f"the score is validated when the stage starts; {before}`align score {pipeline.where}:{prompts} --with "
        f"{pipeline.where}:{node.name} --validate` does it at once"
    )


def _planned_rows(pipeline: Pipeline, source: Node, store: Store, split: str) -> tuple[list[Any], bool]:
    """Return rows that a stage will read, and False if a recipe's steps may still change or drop them.

    Of a dataset that was not built yet the first records of its files. No rows if they are not on this machine.
    """
    artifact = store.find_intact(source.stage.kind, source.key, source.name)
    if artifact is not None:
        from align.data.rows import iter_rows

        return list(itertools.islice(iter_rows(artifact.split(split)), MOST_ROWS)), True
    if not isinstance(source.config, DataConfig):
        return [], False
    recipe = load_object(RECIPE)(source.config, pipeline.base)
    return load_object(PREVIEW)(recipe, pipeline.base, PREVIEWED) or [], not recipe.steps


def _check_tools(pipeline: Pipeline, node: Node, environment: EnvironmentConfig, place: str) -> None:
    """Raise ``UserError`` if the chat template of any of the stage's policies has no place for tools."""
    names = environment.tool_names(place)
    if not names:
        return
    for model in _model_stages(pipeline, node):
        if not isinstance(model.config, ModelConfig):
            continue
        missing = load_object(MISSING_TOOLS)(model.config, pipeline.base, names)
        if missing is not None:
            raise UserError(f"stages.{node.name}.{place}: stage '{model.name}': {missing}")


def _check_context(pipeline: Pipeline, node: Node) -> Iterator[str]:
    """Compare the tokens of a stage that samples with the context of its models.

    Yields a warning if the longest prompt and response together do not fit. Raises ``UserError`` if a response would
    leave no room for a prompt.
    """
    max_tokens = getattr(node.config, "max_tokens", None)
    max_prompt_tokens = getattr(node.config, "max_prompt_tokens", None)
    if not isinstance(max_tokens, int):
        return
    for model in _model_stages(pipeline, node):
        config = model.config
        if not isinstance(config, ModelConfig):
            continue
        # An adapter has the positions of its base.
        name = config.base_model or config.source
        revision = config.revision if config.base_model is None else config.base_revision
        positions = load_object(POSITIONS)(name, revision, pipeline.base)
        if positions is None:
            continue
        context = f"the {positions} positions of '{name}' (stage '{model.name}')"
        if max_tokens >= positions:
            raise UserError(
                f"stages.{node.name}.max_tokens: {max_tokens} leaves no room for a prompt in {context}. Set it well "
                f"below {positions}."
            )
        if isinstance(max_prompt_tokens, int) and max_prompt_tokens + max_tokens > positions:
            yield (
                f"max_prompt_tokens {max_prompt_tokens} and max_tokens {max_tokens} are more than {context}, and vLLM "
                "refuses them. Lower one of the two."
            )


def _model_stages(pipeline: Pipeline, node: Node) -> list[Node]:
    """Return the model stages from which the weights of the stage's policies come."""
    stages: dict[str, Node] = {}
    for field, value in node.inputs.items():
        if field not in POLICY_FIELDS:
            continue
        for name in [value] if isinstance(value, str) else value or []:
            source = pipeline.nodes[name]
            # Training keeps context and template, so a policy's are found at the model that it started from.
            roots = [source] if source.stage.kind == "model" else _model_stages(pipeline, source)
            stages |= {root.name: root for root in roots}
    return list(stages.values())


def check_sources(pipeline: Pipeline, store: Store, used: set[str], strict: bool) -> list[str]:
    """Return warnings for cached stages in ``used`` that other source code made under the same version.

    Raises ``UserError`` for them when ``strict``.
    """
    warnings = []
    for node in pipeline:
        if node.name not in used:
            continue
        artifact = store.find_intact(node.stage.kind, node.key, node.name)
        if artifact is not None and artifact.record.get("source") != source_digest(node.stage):
            warnings.append(node.name)
    if not warnings:
        return []
    text = f"made by other source code under the same stage version: {', '.join(warnings)}"
    if strict:
        raise UserError(f"{text}. `--rebuild {warnings[0]}` makes it again; without --strict it is used as it is.")
    return [f"{text}. They are used as they are; --rebuild STAGE makes one again, --strict refuses them."]


def suggest_change(pipeline: Pipeline, node: Node, artifacts: Iterable[Artifact], store: Store) -> str | None:
    """Return how to continue a finished or stopped stage of this name with the settings of ``node``; else None.

    ``artifacts`` are those of the store. The stage counts if it differs by settings that may change on continuing it.
    """
    if CONTINUE not in type(node.config).model_fields or getattr(node.config, CONTINUE) is not None:
        return None
    for config, state in _earlier_states(pipeline, node, artifacts, store):
        after = node.config.model_dump(mode="json")
        changed = {name: value for name, value in after.items() if name in config and config[name] != value}
        if not changed.keys() - {*LENGTHS, *OBSERVED} or any(fixed_reason(node.config, name) for name in changed):
            continue
        settings = ", ".join(f"{name}: {json.dumps(value)}" for name, value in changed.items())
        return (
            f"'{node.name}' {state} with other settings, and this run begins anew. To continue it with these settings, "
            f"leave stages.{node.name} as it was and add `{node.name}_more: {{{CONTINUE}: {{stage: {node.name}, at: "
            f"last, change: {{{settings}}}}}}}` below it."
        )
    return None


def _earlier_states(
    pipeline: Pipeline, node: Node, artifacts: Iterable[Artifact], store: Store
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield config and state, as a clause, of stopped and of finished stages with this name, seed and run."""
    for partial in (store.root / node.stage.kind).glob("*.partial"):
        ends = stopped_ends(partial, steps_per_length(node.config))
        with contextlib.suppress(OSError, UserError):
            work = read_work(partial)
            if ends and (work.name, work.pipeline, work.seed) == (node.name, pipeline.name, node.seed):
                yield work.config, f"was stopped after {unit_of(node.config)} {max(ends)}"
    for artifact in artifacts:
        record = artifact.record
        identity = (record["stage"], record["kind"], record.get("pipeline"), record.get("seed"))
        if (
            identity == (node.name, node.stage.kind, pipeline.name, node.seed)
            and f"{STATE}/state.json" in record["outputs"]
        ):
            yield record["config"], "is finished"
