"""Warnings of a plan about settings of stages that are to run, from files on this machine. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator

from align.config.stages.model import ModelConfig
from align.pipeline.pipeline import Node, Pipeline
from align.pipeline.registry import load_object

POLICY_FIELDS = ("policy", "model", "policies")
"""Inputs of a stage whose weights come from a model stage."""
POSITIONS = "align.models.model_plan:known_positions"
"""The function that looks up a model's context; its package has modules that import torch, so it is loaded by name."""


def stage_warnings(pipeline: Pipeline, node: Node) -> list[str]:
    """Return warnings about a stage's settings, one sentence or more each."""
    inspect = node.stage.inspect("plan_warnings")
    texts = list(inspect(node.config, pipeline.base)) if inspect is not None else []
    return [*texts, *_too_many_tokens(pipeline, node)]


def _too_many_tokens(pipeline: Pipeline, node: Node) -> Iterator[str]:
    """Yield a warning if ``max_tokens`` leaves no room for a prompt in the context of a model that samples."""
    max_tokens = getattr(node.config, "max_tokens", None)
    if not isinstance(max_tokens, int):
        return
    for model in _model_stages(pipeline, node):
        config = model.config
        if not isinstance(config, ModelConfig):
            continue
        name = config.base_model or config.source
        positions = load_object(POSITIONS)(
            name, config.base_revision if config.base_model is not None else config.revision, pipeline.base
        )
        if positions is not None and max_tokens >= positions:
            yield (
                f"max_tokens {max_tokens} leaves no room for a prompt in the {positions} positions of '{name}' "
                f"(stage '{model.name}'). Set it well below {positions}."
            )


def _model_stages(pipeline: Pipeline, node: Node) -> list[Node]:
    """Return the model stages from which the weights of the stage's policies come."""
    stages: dict[str, Node] = {}
    for field, value in node.inputs.items():
        if field not in POLICY_FIELDS:
            continue
        for name in [value] if isinstance(value, str) else value or []:
            source = pipeline.nodes[name]
            roots = [source] if source.stage.kind == "model" else _model_stages(pipeline, source)
            stages |= {root.name: root for root in roots}
    return list(stages.values())
