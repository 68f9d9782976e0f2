"""The JSON schema of pipeline files, for editors that complete and check while one types. Never imports torch."""

from __future__ import annotations

from typing import Any

from align.config.stages.continue_from import CONTINUE
from align.config.yaml import ANCHOR_BLOCK, ANCHOR_PREFIX
from align.pipeline.file import EXTENDS
from align.pipeline.loops import LoopConfig
from align.pipeline.pipeline import PipelineConfig
from align.pipeline.registry import LOOP, NAME_PATTERN, STAGES
from align.registry import Stage, loaded


def pipeline_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a whole pipeline file."""
    schema = PipelineConfig.model_json_schema()
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    stage_schemas = _define_stages(definitions)
    stages = {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": NAME_PATTERN},
        "properties": stage_schemas,
        "additionalProperties": {"$ref": "#/$defs/named_stage"},
    }
    _define_loop(definitions, stages)
    # It has the kind of the stage that it continues, so it needs no ``stage``.
    definitions["continued_stage"] = {"type": "object", "required": [CONTINUE], "not": {"required": ["stage"]}}
    for block in ("stage_evaluate", "TrainingEvaluation"):
        _name_tasks_by_kind(definitions[block]["properties"]["tasks"])
    for name in ("store", "report_to"):
        _accept_text(definitions["Runtime"]["properties"], name)
    named_stage = {"$ref": "#/$defs/named_stage"}
    loop = {"$ref": "#/$defs/stage_loop"}
    all_stages = {
        **stages,
        "properties": {**stage_schemas, LOOP: {"anyOf": [loop, named_stage]}},
        "additionalProperties": {
            "anyOf": [
                named_stage,
                {"$ref": "#/$defs/continued_stage"},
                {"allOf": [loop, {"required": ["stage"]}]},
            ]
        },
    }
    schema["properties"]["stages"] = {
        "type": "object",
        "description": "The stages in order; a name that is a stage kind needs no `stage:`.",
    }
    # A file that extends another file may omit whatever the other file has, in every block.
    schema["if"] = {"required": [EXTENDS]}
    schema["else"] = {"required": schema.pop("required"), "properties": {"stages": all_stages}}
    schema["properties"][EXTENDS] = {"type": "string", "description": "another pipeline file, which this one changes"}
    schema["properties"][ANCHOR_BLOCK] = {"description": "blocks with anchors; sets nothing by itself"}
    schema["patternProperties"] = {f"^{ANCHOR_PREFIX}": {"description": "blocks with anchors; sets nothing by itself"}}
    _allow_variables(schema)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "align pipeline"
    return schema


def _define_stages(definitions: dict[str, Any]) -> dict[str, Any]:
    """Add each kind's block and ``named_stage``, a block that says its kind; return the schema of each name."""
    stage_schemas: dict[str, Any] = {}
    for kind, config in loaded(Stage, lambda stage: stage.config).items():
        block = config.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(block.pop("$defs", {}))
        block["description"] = STAGES[kind].purpose
        block.setdefault("properties", {}).update(
            stage={"const": kind, "description": "the kind of stage"},
            seed={"type": "integer", "minimum": 0, "description": "instead of the pipeline's seed"},
        )
        if CONTINUE in block["properties"]:
            # A stage that continues another inherits the fields that it does not set.
            block["anyOf"] = [{"required": block.pop("required", [])}, {"required": [CONTINUE]}]
        definitions[f"stage_{kind}"] = block
        stage_schemas[kind] = {"anyOf": [{"$ref": f"#/$defs/stage_{kind}"}, {"$ref": "#/$defs/named_stage"}]}
    # A stage of a user's own is in a module, whose fields this schema does not know.
    own_stage = {"properties": {"stage": {"type": "string", "pattern": ":"}}}
    definitions["named_stage"] = {
        "type": "object",
        "required": ["stage"],
        "oneOf": [
            *({"allOf": [{"$ref": f"#/$defs/stage_{kind}"}, {"required": ["stage"]}]} for kind in stage_schemas),
            own_stage,
        ],
    }
    return stage_schemas


def _define_loop(definitions: dict[str, Any], stages: dict[str, Any]) -> None:
    """Add ``stage_loop``, which repeats ``stages``."""
    loop = LoopConfig.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(loop.pop("$defs", {}))
    loop["properties"]["stages"] = {**stages, "description": loop["properties"]["stages"]["description"]}
    loop["properties"]["stage"] = {"const": LOOP, "description": "the kind, for a loop of another name"}
    definitions["stage_loop"] = loop


def _name_tasks_by_kind(tasks: dict[str, Any]) -> None:
    """Let a task that is called as its kind leave out ``task``, which any other name needs."""
    any_task = tasks["additionalProperties"]
    named_task = {"allOf": [{"required": ["task"]}, any_task]}
    kinds = any_task["discriminator"]["mapping"]
    tasks["properties"] = {kind: {"anyOf": [{"$ref": block}, named_task]} for kind, block in kinds.items()}
    tasks["additionalProperties"] = named_task


def _accept_text(properties: dict[str, Any], name: str) -> None:
    """Let the property be a text, too: the short form of its block or list."""
    about = {key: properties[name].pop(key) for key in ("description", "default") if key in properties[name]}
    properties[name] = {**about, "anyOf": [{"type": "string"}, properties[name]]}


def _allow_variables(node: Any) -> None:
    """Let every text with a pattern have a variable in it, ``${NAME}``, whose value no editor knows."""
    if isinstance(node, list):
        for item in node:
            _allow_variables(item)
    if isinstance(node, dict):
        if node.get("type") == "string" and "pattern" in node:
            node["pattern"] += r"|\$\{"
        for item in node.values():
            _allow_variables(item)
