"""Names of other tools are answered with align's field, which exists in the blocks it is named for."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from align.config.field_descriptions import reachable_models
from align.config.recipe.recipe import Recipe
from align.config.runtime import Runtime
from align.config.stages.inputs import DataConfig, ModelConfig
from align.config.synonyms import SYNONYMS, Synonym, find_synonym, has_field
from align.pipeline.pipeline import PipelineConfig
from align.pipeline.registry import STAGES

CONFIGS = {kind: stage.config_class() for kind, stage in STAGES.items()}
ROOTS: dict[str, type[BaseModel]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "recipe": Recipe,
    "pipeline": PipelineConfig,
    "runtime": Runtime,
}


@pytest.mark.parametrize("synonym", SYNONYMS, ids=lambda synonym: synonym.target)
def test_every_target_is_a_field(synonym: Synonym) -> None:
    block, _, path = synonym.target.rpartition(":")
    configs = [ROOTS[block]] if block else list(CONFIGS.values())
    assert any(has_field(path.split("."), [config]) for config in configs)


def test_targets_are_unique_and_every_name_is_answered() -> None:
    targets = [synonym.target for synonym in SYNONYMS]
    assert len(set(targets)) == len(targets)
    blocks = [model for config in [*CONFIGS.values(), *ROOTS.values()] for model in reachable_models(config)]
    for synonym in SYNONYMS:
        leaf = synonym.target.rpartition(":")[2]
        names = synonym.names
        assert len(set(names)) == len(names)
        for name in names:
            answers = [find_synonym(name, [block]) for block in dict.fromkeys(blocks) if name not in block.model_fields]
            assert any(answer is not None and f"{leaf}'" in answer for answer in answers), f"{name} -> {leaf}"
