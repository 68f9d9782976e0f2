"""Check settings of stages that are to run against the model they use, from files on this machine. Torch-free.

A setting that works badly is a warning of the plan. A setting with which the stage would fail is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from align.config.chat_template import TEMPLATE_FIELDS
from align.config.environment import EnvironmentConfig
from align.config.stages.evaluate import EvaluateConfig
from align.config.stages.evaluation.during_training import TrainingEvaluation
from align.config.stages.inputs import ModelConfig
from align.errors import UserError
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.registry import load_object

POLICY_FIELDS = ("policy", "model", "policies")
"""Inputs of a stage whose weights come from a model stage."""
POSITIONS = "align.models.model_plan:known_positions"
RECORD_SOURCES = "align.evaluation.tasks.records:reported_sources"
MISSING_TOOLS = "align.models.planned_template:explain_missing_tools"
TEMPLATE_SETTINGS = "align.models.planned_template:check_settings"
"""Functions about a model's files. Their package has modules that import torch, so they are loaded by name."""


def stage_warnings(pipeline: Pipeline, node: Node) -> list[str]:
    """Return warnings about a stage's settings, one sentence or more each.

    Raises ``UserError`` for a policy whose chat template does not write the environment's tools or lacks a variable
    that the stage sets, for responses that are longer than the model's context, and for tasks during training whose
    rows an ``evaluate`` stage reports.
    """
    _check_template_settings(pipeline, node)
    _check_reported_rows(pipeline, node)
    for place, environment in _environments(node):
        _check_tools(pipeline, node, environment, place)
    inspect = node.stage.inspect("plan_warnings")
    texts = list(inspect(node.config, pipeline.base)) if inspect is not None else []
    return [*texts, *_check_context(pipeline, node)]


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
