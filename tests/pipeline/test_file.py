"""Pipeline files: bases that a file extends, variables of the environment, overrides before any check."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from align import Pipeline
from align.cli.main import main
from align.config.yaml import dump_yaml, load_yaml, parse_yaml
from align.pipeline.file import fill_in_variables, merge
from tests.support.refusals import Refused

RECIPE = Path("data_recipes/embedded.yaml").absolute()
BASE = f"""\
name: base
seed: 3
stages:
  model: {{source: tiny}}
  data: {{recipe: {RECIPE}}}
  sft: {{model: model, data: data, tuning: {{method: lora, rank: 4, alpha: 8}}, learning_rate: 1.0e-3, epochs: 2}}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def write(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_changes_what_it_extends(base: Path) -> None:
    path = write(base.parent, "extends: base.yaml\nname: mine\nstages: {sft: {tuning: {rank: 16}, epochs: 1}}\n")
    pipeline = Pipeline.load(path)
    assert pipeline.name == "mine" and pipeline.config.seed == 3
    sft = pipeline.nodes["sft"].config
    assert (sft.tuning.rank, sft.tuning.alpha, sft.epochs) == (16, 8, 1)  # type: ignore[attr-defined]


def test_the_key_is_that_of_the_same_values_in_one_file(base: Path) -> None:
    path = write(base.parent, "extends: base.yaml\nname: mine\nstages: {sft: {epochs: 1}}\n")
    full = write(base.parent, BASE.replace("epochs: 2", "epochs: 1"), "whole.yaml")
    assert Pipeline.load(path).nodes["sft"].key == Pipeline.load(full).nodes["sft"].key


def test_another_method_leaves_nothing_of_the_base_block(base: Path) -> None:
    path = write(base.parent, "extends: base.yaml\nstages: {sft: {tuning: {method: full}}}\n")
    assert Pipeline.load(path).raw["stages"]["sft"]["tuning"] == {"method": "full"}


def test_a_block_that_says_the_kind_of_its_name_keeps_its_base(base: Path) -> None:
    path = write(base.parent, "extends: base.yaml\nstages: {sft: {stage: sft, epochs: 1}}\n")
    assert Pipeline.load(path).nodes["sft"].config.learning_rate == 1.0e-3  # type: ignore[attr-defined]
    assert merge({"sft": {"lr": 1}}, {"sft": {"stage": "pretrain"}}) == {"sft": {"stage": "pretrain"}}
    assert merge({"x": {"stage": "sft", "lr": 1}}, {"x": {"stage": "dpo"}}) == {"x": {"stage": "dpo"}}


def test_the_path_of_a_base_starts_at_the_files_folder(base: Path) -> None:
    path = write(base.parent / "deeper", "extends: ../base.yaml\nname: mine\n")
    write(base.parent, "extends: deeper/mine.yaml\nseed: 9\n", "third.yaml")
    assert Pipeline.load(path).config.seed == 3
    assert Pipeline.load(base.parent / "third.yaml").config.seed == 9


def test_functions_are_found_in_the_folder_of_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setenv("ALIGN_MODULE_FOLDERS", "")
    ppo = "{policy: model, prompts: data, score: 'own_base_module:final', learning_rate: 1.0e-5, updates: 2}"
    write(tmp_path / "base", f"{BASE}  ppo: {ppo}\n", "base.yaml")
    write(tmp_path / "base", "def final(prompt, response):\n    return 1.0\n", "own_base_module.py")
    path = write(tmp_path / "other", "extends: ../base/base.yaml\nname: mine\n")
    assert Pipeline.load(path).nodes["ppo"].config.score == "own_base_module:final"  # type: ignore[attr-defined]


def test_shipped_pipeline_is_extended_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: smoke\nname: mine\nseed: 9\n")
    pipeline = Pipeline.load(path)
    assert (pipeline.name, pipeline.config.seed) == ("mine", 9)
    assert {node.name: node.key for node in Pipeline.load(path, ["seed=7"])} == {
        node.name: node.key for node in Pipeline.load("pipelines/smoke.yaml")
    }


def test_file_wins_over_a_shipped_pipeline(base: Path) -> None:
    base.rename(base.parent / "smoke")
    assert Pipeline.load(write(base.parent, "extends: smoke\nname: mine\n")).config.seed == 3


def test_misspelled_shipped_pipeline_is_suggested(refused: Refused, tmp_path: Path) -> None:
    refused(lambda: Pipeline.load(write(tmp_path, "extends: smoek\nname: mine\n")))


def test_a_circle_of_bases_is_refused(refused: Refused, tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    refused(Pipeline.load, tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "extends",
    ["no.yaml", "3", "[a, b]"],
)
def test_a_base_that_is_no_file_is_refused(refused: Refused, tmp_path: Path, extends: str) -> None:
    refused(lambda: Pipeline.load(write(tmp_path, f"extends: {extends}\n")))


def test_variables_are_filled_in(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_NAME", "tuesday")
    monkeypatch.delenv("MODEL_DIR", raising=False)
    path = write(
        base.parent,
        "extends: base.yaml\nname: run-${RUN_NAME}\ndescription: costs $${5}\n"
        "stages: {model: {source: '${MODEL_DIR:-tiny}'}}\n",
    )
    pipeline = Pipeline.load(path)
    assert (pipeline.name, pipeline.config.description) == ("run-tuesday", "costs ${5}")
    assert pipeline.nodes["model"].key == Pipeline.load(base).nodes["model"].key


@pytest.mark.parametrize(
    "text",
    [
        "${NOT_SET}",
        "${HF_TOKEN}",
        "${not closed",
        "${1}",
    ],
)
def test_a_variable_that_cannot_be_filled_in_is_refused(
    refused: Refused, base: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    path = write(base.parent, f"extends: base.yaml\nstages: {{model: {{source: '{text}'}}}}\n")
    refused(Pipeline.load, path)


@given(
    st.recursive(
        st.text(st.characters(exclude_characters="$")),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_texts_without_variables_stay_as_they_are(value: object) -> None:
    assert fill_in_variables(value, "x.yaml") == value


def test_overrides_supply_what_a_file_lacks(refused: Refused, base: Path) -> None:
    path = write(base.parent, BASE.replace("data: data, ", ""), "lacks.yaml")
    refused(Pipeline.load, path)
    for overrides in (["stages.sft.data=data"], {"stages.sft.data": "data"}):
        assert Pipeline.load(path, overrides).nodes["sft"].key == Pipeline.load(base).nodes["sft"].key


def test_an_override_that_names_nothing_is_refused(refused: Refused, base: Path) -> None:
    refused(Pipeline.load, base, ["stages.stf.epochs=1"])


def test_merge_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}}
    assert merge(base, {"a": {"c": [3]}, "d": 4}) == {"a": {"b": 1, "c": [3]}, "d": 4}
    assert base == {"a": {"b": 1, "c": [1, 2]}}


def test_plan_prints_the_resolved_file(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(base.parent, "extends: base.yaml\nname: mine\n")
    assert main(["plan", str(path), "--resolved", "--set", "stages.sft.epochs=1"]) == 0
    printed = parse_yaml(capsys.readouterr().out, "stdout")
    assert printed == {**load_yaml(base), "name": "mine"} | {"stages": printed["stages"]}
    assert printed["stages"]["sft"]["epochs"] == 1


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
)


@given(st.dictionaries(st.text(st.characters(categories=["Ll"]), min_size=1), SCALARS | st.lists(SCALARS)))
def test_dumped_yaml_reads_back_as_the_same(value: dict[str, object]) -> None:
    assert parse_yaml(dump_yaml(value), "dumped") == value


@pytest.mark.parametrize(
    "text", ["1e3", "no", "010", "12:30", "true", "~", "", "null", " x", "a: b", "- x", "1_000", "# x", "x\ny\n"]
)
def test_texts_that_look_like_something_else_stay_texts(text: str) -> None:
    assert parse_yaml(dump_yaml({"a": text}), "dumped") == {"a": text}


ANCHORED = f"""\
name: mine
x-lora: &lora {{tuning: {{method: lora, rank: 4, alpha: 8}}}}
defaults:
  training: &training
    <<: *lora
    model: model
    learning_rate: 1.0e-3
    epochs: 1
stages:
  model: {{source: tiny}}
  data: {{recipe: {RECIPE}}}
  sft: {{<<: *training, data: data, epochs: 2}}
"""


def test_blocks_for_anchors_are_merged_and_left_out(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(base.parent, ANCHORED)
    pipeline = Pipeline.load(path)
    assert set(pipeline.raw) == {"name", "stages"}
    assert pipeline.raw["stages"]["sft"]["epochs"] == 2, "a key of the block itself wins over the merged one"
    assert pipeline.set("seed=3").nodes["sft"].key == Pipeline.load(base).nodes["sft"].key
    assert main(["plan", str(path), "--resolved"]) == 0
    printed = parse_yaml(capsys.readouterr().out, "stdout")
    assert printed == pipeline.raw


def test_a_dictionary_leaves_them_out_too(base: Path) -> None:
    values = yaml.safe_load(ANCHORED)
    assert Pipeline.from_dict(values).raw == Pipeline.load(write(base.parent, ANCHORED)).raw


def test_a_base_leaves_its_blocks_for_anchors_to_itself(base: Path) -> None:
    write(base.parent, ANCHORED, "anchored.yaml")
    path = write(base.parent, "extends: anchored.yaml\nx-note: ${NOT_SET}\nname: third\n")
    assert set(Pipeline.load(path).raw) == {"name", "stages"}


@pytest.mark.parametrize("block", ["{sft: {epochs: 3}}", "&unused {sft: {epochs: 3}}", "[base, other]", "3"])
def test_defaults_that_nothing_refers_to_are_refused(refused: Refused, base: Path, block: str) -> None:
    path = write(base.parent, f"extends: base.yaml\ndefaults: {block}\n")
    refused(Pipeline.load, path)


def test_only_the_top_of_a_file_has_blocks_for_anchors(refused: Refused, base: Path) -> None:
    path = write(base.parent, BASE + "  x-more: {model: model}\n")
    refused(Pipeline.load, path)
