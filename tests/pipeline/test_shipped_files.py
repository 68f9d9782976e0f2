"""Every shipped YAML loads, and every key in it is refused when it is misspelled."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from align import Pipeline
from align.cli.suite import load_suite
from align.config.stages.evaluate import EvaluateConfig
from align.config.validation import validate, validate_plain
from align.config.yaml import load_yaml
from align.data.rows import read_rows
from align.errors import UserError
from align.evaluation.tasks import build_task
from tests.support.pipeline.misspelling import SWEEPS, keys, misspell, rename
from tests.support.pipeline.shipped import parameter

SUITES = sorted(Path("pipelines/suites").rglob("*.yaml"))
PIPELINES = [path for path in sorted(Path("pipelines").rglob("*.yaml")) if path not in SUITES + SWEEPS]
RECIPES = sorted(Path("data_recipes").rglob("*.yaml"))


def test_all_are_there() -> None:
    assert {"smoke", "quickstart", "checker", "hh", "gsm8k", "gym", "zephyr_7b", "g1_gsm8k"} <= {
        path.stem for path in PIPELINES
    }
    assert {"quick", "standard"} == {path.stem for path in SUITES}
    recipes = {path.stem for path in RECIPES}
    assert {"embedded", "dolly", "hh_helpful", "hh_harmless", "oasst", "oasst_sft", "ultrafeedback"} <= recipes
    assert {"gsm8k", "tulu3", "smoltalk", "ultrachat", "quickstart"} <= recipes


@pytest.mark.parametrize("path", map(parameter, PIPELINES), ids=str)
def test_every_pipeline_loads(path: Path) -> None:
    pipeline = Pipeline.load(path)
    assert pipeline.name
    head = path.read_text().split("name:")[0]
    assert head.startswith("#") and len(head) > 100, "the head comment says purpose, cost and measured result"


@pytest.mark.parametrize("path", map(parameter, PIPELINES), ids=str)
def test_every_pipeline_comes_back_from_json(path: Path) -> None:
    """As a stage's process reads its config, and a job of a cluster its pipeline."""
    pipeline = Pipeline.load(path)
    for node in pipeline:
        read_back = json.loads(json.dumps(node.config.model_dump(mode="json")))
        assert validate_plain(type(node.config), read_back) == node.config
        runtime = pipeline.runtimes[node.name]
        assert validate_plain(type(runtime), json.loads(runtime.model_dump_json())) == runtime
    for raw in (pipeline.raw, pipeline.plain):
        again = Pipeline(json.loads(json.dumps(raw)), str(path), pipeline.base, pipeline.expanded.rounds)
        assert [node.key for node in again] == [node.key for node in pipeline]


def suite_config(path: Path) -> EvaluateConfig:
    """The suite's own block, checked as ``align eval`` does."""
    suite = load_suite(str(path))
    policies = ["base", "trained"]
    return validate(EvaluateConfig, {**suite.block, "policies": policies, "reference": "base"}, str(path))


@pytest.mark.parametrize("path", SUITES, ids=str)
def test_every_suite_loads(path: Path) -> None:
    config = suite_config(path)
    head = path.read_text().split("description:")[0]
    assert head.startswith("#") and len(head) > 100, "the head comment says purpose, cost and where files go"
    for name in [file for task in config.tasks.values() for file in task.files or []]:  # type: ignore[attr-defined]
        assert f"#   {name} " in head


@pytest.mark.parametrize("path", SUITES, ids=str)
def test_every_suite_asks_real_files(
    path: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.evaluation.tasks.base import TaskInputs

    suite = path.resolve()
    (tmp_path / "data").symlink_to(shared_data)
    monkeypatch.chdir(tmp_path)
    config = suite_config(suite)
    task_inputs = TaskInputs(0, tmp_path, [], False, "float32", print, print)
    # of these two there is no file at hand: GSM8K's test split and text of one's own
    for name, task in config.tasks.items():
        if name not in ("gsm8k", "general"):
            built = build_task(name, task, task_inputs)
            assert len(built.items) == (task.max_items or len(built.items)) > 90  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_loads(path: Path) -> None:
    from align.config.recipe.recipe import load_recipe

    load_recipe(str(path), Path.cwd())


LOCAL = {
    "dolly": ("dolly-3k/dolly_3k.json", 2996),
    "hh_helpful": ("hh-rlhf/helpful-base.test.jsonl.gz", 2354),
    "hh_harmless": ("hh-rlhf/harmless-base.test.jsonl.gz", 2312),
    "oasst": ("oasst-en100/en_100_tree.jsonl", 100),
    "oasst_sft": ("oasst-en100/en_100_tree.jsonl", 100),
    "gsm8k": ("gsm8k/train.jsonl", 7473),
}
"""Files at hand of shipped recipes, and their records."""


@pytest.mark.usefixtures("stages_in_process")
@pytest.mark.parametrize("name", sorted(LOCAL))
def test_a_recipe_builds_from_real_files(name: str, shared_data: Path, tmp_path: Path) -> None:
    file, records = LOCAL[name]
    stage = {"stage": "data", "recipe": f"data_recipes/{name}.yaml", "files": [str(shared_data / file)]}
    run = Pipeline({"name": name, "stages": {"data": stage}}).run(store=tmp_path / "store")
    folder = run.artifacts["data"].path
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["rows_in"] == records
    assert ledger["rows_in"] + ledger["added"] == ledger["rows_out"] + sum(ledger["dropped"].values())
    assert ledger["splits"]["test"] > 0.05 * ledger["rows_out"]
    rows = [row for split in ("train", "test") for row in read_rows(folder / f"{split}.parquet")]
    assert len(rows) == ledger["rows_out"] and {row["source"] for row in rows} == {ledger["sources"][0]["source"]}
    assert (folder / "README.md").read_text().startswith("---\n") and (folder / "preview.html").stat().st_size > 10_000


def is_own_name(raw: dict[str, Any], place: tuple[Any, ...]) -> bool:
    """Whether the key is a name that its author chose, such as that of a task with its kind below it.

    So is that of a stage which says its kind and which no other stage reads.
    """
    if place[0] == "stages" and len(place) == 2 and "stage" in (raw["stages"][place[1]] or {}):
        others = [block for name, block in raw["stages"].items() if name != place[1]]
        return not any(place[1] in (value if isinstance(value, list) else [value])
                       for block in others for value in (block or {}).values())  # fmt: skip
    if place[0] == "stages" and len(place) > 3 and place[2] in ("tasks", "baselines"):
        raw, place = raw["stages"][place[1]], place[2:]
    named = place[0] == "tasks" and len(place) == 2 and "task" in raw["tasks"][place[1]]
    return named or (place[0] in ("baselines", "gates") and len(place) == 2)


def load_changed(path: Path, changed: dict[str, Any], folder: Path) -> None:
    """Load what a file became, as its kind is loaded."""
    import yaml

    from align.config.recipe.recipe import load_recipe

    if path in PIPELINES:
        Pipeline.from_dict(changed, path.parent)
        return
    copied = folder / path.name
    copied.write_text(yaml.safe_dump(changed, sort_keys=False))
    if path in SUITES:
        suite_config(copied)
    else:
        load_recipe(str(copied), Path.cwd())


def field_of(raw: dict[str, Any], place: tuple[Any, ...]) -> tuple[Any, ...]:
    """The names of a key and of what is above it, with the kind of a stage for its name."""
    block = raw.get("stages", {}).get(place[1]) if len(place) > 1 else None
    kind = (block or {}).get("stage", place[1]) if place[0] == "stages" and len(place) > 1 else None
    return tuple(name for name in (place[0], kind, *place[2 if kind else 1 :]) if not isinstance(name, int))


@pytest.mark.parametrize("slips", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_misspelled_key_of_a_sweep_gets_a_suggestion(slips: int, tmp_path: Path) -> None:
    rng = random.Random(0)
    tried, suggested, missed, known = 0, 0, [], set()
    for path in [*PIPELINES, *SUITES, *RECIPES]:
        raw = load_yaml(path)
        for place in [place for place in keys(raw) for _ in range(slips)]:
            wrong = misspell(str(place[-1]), rng)
            changed = rename(raw, place, wrong)
            if path not in RECIPES and is_own_name(raw, place):
                continue
            if path.stem == "gym" and "arguments" in place[:-1]:
                continue  # reasoning-gym's own, which it checks when it makes rows
            field = field_of(raw, place)
            if slips == 1 and field in known:
                continue  # of another file
            known.add(field)
            with pytest.raises(UserError) as caught:
                load_changed(path, changed, tmp_path)
            tried += 1
            if f"'{place[-1]}'" in str(caught.value):
                suggested += 1
            else:
                missed.append(f"{path}: {place} as {wrong}: {caught.value}")
    assert tried > 200
    assert suggested / tried >= 0.95, "\n".join(missed)


def yaml_blocks(path: str) -> list[str]:
    return re.findall(r"```yaml\n(.*?)```", Path(path).read_text(encoding="utf-8"), re.DOTALL)


def test_what_the_readme_and_the_guides_show_is_accepted(tmp_path: Path) -> None:
    """Whole pipelines, recipes, blocks of ``runtime``, single stages by the name of their kind, and rewards."""
    from align.config.recipe.recipe import Recipe
    from align.config.runtime import Runtime
    from align.config.yaml import load_yaml, parse_yaml
    from align.pipeline.file import fill_in_variables, merge
    from align.pipeline.registry import STAGES

    pages = ["README.md", "docs/getting_started.md", "docs/pipelines.md", "docs/ppo.md"]
    rewarded = {"policy": "sft", "prompts": "data", "learning_rate": 1e-5}
    evaluated = {"policies": ["sft"], "prompts": "data", "reference": "sft"}
    scored = {**rewarded, "score": "gold"}
    fields = {
        "score": ("grpo", rewarded),
        "environment": ("grpo", rewarded),
        "metrics": ("evaluate", evaluated),
        "score_validation": ("grpo", scored),
        "rollouts": ("grpo", scored),
    }
    pipelines: list[Pipeline] = []
    runtimes: list[Runtime] = []
    recipes: list[Recipe] = []
    stages: set[str] = set()
    for page in pages:
        for block in yaml_blocks(page):
            file = tmp_path / "shown.yaml"
            file.write_text(f"score:\n{block}" if block.startswith("- ") else block, encoding="utf-8")
            shown = load_yaml(file)
            base = None
            if "extends" in shown:
                extended = parse_yaml(Path("pipelines", shown.pop("extends")).read_text(), page)
                shown = fill_in_variables(merge(extended, shown), page)
                base = Path("pipelines").absolute()
            if "stages" in shown:
                pipelines.append(Pipeline(shown, page, base))
            elif "sources" in shown:
                recipes.append(validate(Recipe, shown, page))
            elif list(shown) == ["runtime"]:
                runtimes.append(Runtime.model_validate(shown["runtime"]))
            else:
                for name, config in shown.items():
                    if name in fields:
                        kind, others = fields[name]
                        STAGES[kind].config_class().model_validate({**others, name: config})
                        continue
                    STAGES[name].config_class().model_validate(config)
                    stages.add(name)
    assert sum("ppo" in pipeline.nodes for pipeline in pipelines) >= 2
    assert any(runtime.rollouts.servers for runtime in runtimes)
    assert recipes
    assert stages >= {"model", "sft", "ppo", "evaluate"}


def test_what_the_guide_to_methods_shows_is_accepted() -> None:
    """Whole pipelines, sweeps, stages, tunings a line each, and fields of any stage that trains."""
    from align.config.stages.sft import DistillConfig, SftConfig
    from align.config.yaml import parse_yaml
    from align.extensions.sweep.config import SweepConfig
    from align.pipeline.registry import STAGES

    plain = {"model": "model", "data": "data", "learning_rate": 1e-4}
    observations, nodes = set(), set()
    for block in yaml_blocks("docs/methods.md"):
        lines = block.splitlines()
        if all(line.startswith(("tuning:", "anchor:", "replay", "ema:")) for line in lines):
            for line in lines:
                SftConfig(**plain, **parse_yaml(line, "docs/methods.md"))
                observations.add(line.split(":")[0])
            continue
        if all(line.startswith("teacher:") for line in lines):
            for line in lines:
                DistillConfig(**plain, top_k=20, **parse_yaml(line, "docs/methods.md"))
            continue
        shown = parse_yaml(block, "docs/methods.md")
        if "stages" in shown:
            nodes |= Pipeline({"name": "rounds", **shown}, "docs/methods.md").nodes.keys()
        elif "space" in shown:
            SweepConfig.model_validate(shown)
        else:
            for name, config in shown.items():
                STAGES[name].config_class().model_validate(config)
        observations |= set(shown)
    assert nodes >= {"dpo-3", "sft_more", "ppo_more"}
    assert observations >= {
        "tuning",
        "replay",
        "ema",
        "anchor",
        "stages",
        "space",
        "sft",
        "pretrain",
        "reward",
        "dpo",
        "distill",
    }
