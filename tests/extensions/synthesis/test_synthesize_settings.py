"""Settings of stage synthesize: what is refused, what a key holds, what the guide shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.extensions.synthesis.config import SynthesizeConfig
from align.store.artifacts import Kind
from tests.support.refusals import Refused
from tests.support.stages.synthesis_harness import (
    write_seeds,
)

SERVER = {"url": "https://api.example.com/v1", "model": "m"}
RESPONSES = {"task": {"type": "responses"}, "prompts": "data", "endpoint": SERVER}
PAIRS = {"task": {"type": "pairs"}, "prompts": "data", "endpoint": SERVER}


@pytest.mark.parametrize(
    "config",
    [
        RESPONSES | {"endpoint": None},
        RESPONSES | {"model": "sft"},
        RESPONSES | {"prompts": None},
        RESPONSES | {"seeds": "x.jsonl"},
        RESPONSES | {"score": "gold"},
        RESPONSES | {"max_cost": 1},
        RESPONSES | {"endpoint": None, "model": "sft", "max_cost": 1},
        RESPONSES | {"task": {"type": "responses", "n": 2}, "temperature": 0},
        {"task": {"type": "instructions"}, "endpoint": SERVER},
        RESPONSES | {"thinking_budget": 64},
        PAIRS,
        PAIRS | {"score": "gold", "reward": "r"},
        PAIRS | {"judge": {"endpoint": SERVER, "thinking": False}},
        PAIRS | {"judge": {}},
        PAIRS | {"judge": {"endpoint": SERVER}, "judge_model": "sft"},
        PAIRS | {"score": "gold", "judge_model": "sft"},
        PAIRS | {"task": {"type": "pairs", "min_margin": 1}, "judge": {"endpoint": SERVER}},
        PAIRS | {"task": {"type": "best_of"}, "judge": {"endpoint": SERVER}},
        PAIRS | {"task": {"type": "best_of", "n": 2, "keep": 3}, "score": "gold"},
    ],
)
def test_settings_that_make_no_sense(refused: Refused, config: dict[str, Any]) -> None:
    refused(SynthesizeConfig, **config)


def _pipeline(folder: Path, **changed: Any) -> Pipeline:
    stage = {
        "task": {"type": "pairs", "n": 2}, "endpoint": SERVER, "prompts": "data", "judge": {"endpoint": dict(SERVER)}
    } | changed  # fmt: skip
    data = {"recipe": "data_recipes/embedded.yaml"}
    return Pipeline({"name": "p", "stages": {"data": data, "synthesize": stage}}, base=folder)


def test_the_key_holds_what_decides_the_rows_and_nothing_else() -> None:
    base = Path.cwd()
    node = _pipeline(base).nodes["synthesize"]
    assert node.makes == Kind.PREFERENCES
    same = [
        {"endpoint": SERVER | {"concurrency": 3, "retries": 9, "timeout": 3, "price_input": 1, "price_output": 1}},
        {"cache": "elsewhere"},
        {"cache": False},
        {"endpoint": SERVER | {"price_input": 1, "price_output": 1}, "max_cost": 5,
         "judge": {"endpoint": SERVER | {"price_input": 1, "price_output": 1}}},
    ]  # fmt: skip
    assert {_pipeline(base, **changes).nodes["synthesize"].key for changes in same} == {node.key}
    different = [
        {"endpoint": SERVER | {"model": "n"}},
        {"endpoint": SERVER | {"url": "https://api.example.org/v1"}},
        {"endpoint": SERVER | {"extra": {"top_k": 2}}},
        {"judge": {"endpoint": SERVER | {"model": "n"}}},
        {"judge": {"endpoint": SERVER, "rubric": "Shorter."}},
        {"temperature": 0.5},
        {"on_error": "drop"},
        {"task": {"type": "pairs", "n": 3}},
    ]
    assert len({_pipeline(base, **changes).nodes["synthesize"].key for changes in different} | {node.key}) == 9


def test_a_seed_file_counts_by_its_content(refused: Refused, tmp_path: Path) -> None:
    def key(name: str) -> str:
        stage = {"task": {"type": "instructions"}, "endpoint": SERVER, "seeds": name}
        return Pipeline({"name": "p", "stages": {"synthesize": stage}}, base=tmp_path).nodes["synthesize"].key

    (tmp_path / "one.jsonl").write_text("{}")
    (tmp_path / "two.jsonl").write_text("{}")
    (tmp_path / "three.jsonl").write_text("{ }")
    assert key("one.jsonl") == key("two.jsonl") != key("three.jsonl")
    refused(key, "four.jsonl")


def test_what_the_guide_shows_is_accepted(tmp_path: Path) -> None:
    import re

    import yaml

    (block,) = re.findall(r"```yaml\n(.*?)```", Path("docs/synthesis.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = yaml.safe_load(block)
    shown["stages"]["instructions"]["seeds"] = write_seeds(tmp_path)
    kinds = {node.name: node.makes for node in Pipeline(shown, "docs/synthesis.md")}
    assert list(kinds.values()) == [Kind.MODEL, Kind.PROMPTS, Kind.INSTRUCTIONS, Kind.PREFERENCES]
