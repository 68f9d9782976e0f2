"""The JSON schema of pipeline files, for editors that complete and check while one types. Never imports torch."""

from __future__ import annotations

from typing import Any

from align.config.stages.continue_from import CONTINUE
from align.config.yaml import ANCHOR_BLOCK, ANCHOR_PREFIX
from align.pipeline.file import EXTENDS
from align.pipeline.loops import LoopConfig
from align.pipeline.pipeline import PipelineConfig
from align.pipeline.registry import STAGES
from align.pipeline.stage_kinds import LOOP, NAME_PATTERN


def pipeline_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a whole pipeline file."""
    schema = PipelineConfig.model_json_schema()
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    named: dict[str, Any] = {}
    for kind, stage in STAGES.items():
        block = stage.config_class().model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(block.pop("$defs", {}))
        block["description"] = stage.purpose
        block.setdefault("properties", {}).update(
            stage={"const": kind, "description": "the kind of stage"},
            seed={"type": "integer", "minimum": 0, "description": "instead of the pipeline's seed"},
        )
        if CONTINUE in block["properties"]:
            # A stage that continues another takes the fields that it leaves out from that one.
            block["anyOf"] = [{"required": block.pop("required", [])}, {"required": [CONTINUE]}]
        definitions[f"stage_{kind}"] = block
        named[kind] = {"anyOf": [{"$ref": f"#/$defs/stage_{kind}"}, {"$ref": "#/$defs/named_stage"}]}
    definitions["named_stage"] = {
        "required": ["stage"],
        "oneOf": [{"allOf": [{"$ref": f"#/$defs/stage_{kind}"}, {"required": ["stage"]}]} for kind in STAGES],
    }
    stages = {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": NAME_PATTERN},
        "properties": named,
        "additionalProperties": {"$ref": "#/$defs/named_stage"},
    }
    loop = LoopConfig.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(loop.pop("$defs", {}))
    loop["properties"]["stages"] = {**stages, "description": loop["properties"]["stages"]["description"]}
    loop["properties"]["stage"] = {"const": LOOP, "description": "the kind, for a loop of another name"}
    definitions["stage_loop"] = loop
    # It has the kind of the stage that it continues, so it needs no ``stage``.
    definitions["continued_stage"] = {"type": "object", "required": [CONTINUE], "not": {"required": ["stage"]}}
    either = [
        {"$ref": "#/$defs/named_stage"},
        {"$ref": "#/$defs/continued_stage"},
        {"allOf": [{"$ref": "#/$defs/stage_loop"}, {"required": ["stage"]}]},
    ]
    schema["properties"]["stages"] = {
        **stages,
        "description": "The stages in order; a name that is a stage kind needs no `stage:`.",
        "properties": {**named, LOOP: {"anyOf": [{"$ref": "#/$defs/stage_loop"}, either[0]]}},
        "additionalProperties": {"anyOf": either},
    }
    schema["properties"][EXTENDS] = {"type": "string", "description": "another pipeline file, which this one changes"}
    schema["properties"][ANCHOR_BLOCK] = {"description": "blocks with anchors; sets nothing by itself"}
    schema["patternProperties"] = {f"^{ANCHOR_PREFIX}": {"description": "blocks with anchors; sets nothing by itself"}}
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "align pipeline"
    return schema
