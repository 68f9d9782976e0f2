"""Every task is found by its kind, and its settings survive the way to a stage's process."""

import json

import pytest
from pydantic import TypeAdapter

from align.config.stages.evaluate import TASK_CONFIGS, AnyTask, EvaluateConfig, add_task_kinds

FILES = {"files": ["x.jsonl"]}
BLOCKS = {
    "ifeval": FILES,
    "ifbench": FILES,
    "gsm8k": FILES | {"shots": 2, "examples_files": ["y.jsonl"]},
    "xstest": FILES | {"max_items": 5},
    "humaneval": {"samples": 4, "temperature": 0.8},
    "mbpp": FILES | {"seconds": 2.0},
    "environment": FILES | {"environment": {"class": "games:Guess", "max_tokens": 64}},
    "multiple_choice": FILES | {"format": "arc"},
    "perplexity": FILES,
    "preference": {},
    "judged": FILES | {"judge": {"reward": True}},
    "reward_pairs": FILES,
    "reward_bench_2": FILES | {"mode": "ratings"},
    "lm_eval": {"tasks": ["arc_easy"], "include": "tasks"},
}


def test_every_kind_is_here():
    assert set(BLOCKS) == set(TASK_CONFIGS)


@pytest.mark.parametrize("kind", BLOCKS)
def test_settings_read_back_are_the_settings(kind):
    """A runner writes a stage's settings down with every default, and the stage's process reads them."""
    config = EvaluateConfig(
        policies=["a"], reference="a", reward="r", pairs="p", tasks={"mine": BLOCKS[kind] | {"task": kind}}
    )
    again = EvaluateConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert type(again.tasks["mine"]).__name__ == type(config.tasks["mine"]).__name__


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_misspelled_setting_is_refused(refused, kind):
    refused(lambda: TypeAdapter(AnyTask).validate_python(BLOCKS[kind] | {"task": kind, "max_itms": 3}))


def test_a_name_is_the_kind_unless_it_says_another(refused):
    assert add_task_kinds({"ifeval": {}, "mine": {"task": "gsm8k"}}) == {
        "ifeval": {"task": "ifeval"},
        "mine": {"task": "gsm8k"},
    }
    refused(add_task_kinds, {"ifevl": {}})
