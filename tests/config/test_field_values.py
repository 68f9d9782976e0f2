"""Every field of every stage and of ``runtime`` against what a YAML may say: taken as its type, or refused by name.

Values are written into YAML as a user would. Nothing else than ``UserError`` comes of any, and a value that is taken
has the type that the field declares.
"""

from __future__ import annotations

import contextlib
import functools
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from align.config.runtime import Runtime
from align.config.validation import validate
from align.config.yaml import parse_yaml
from align.errors import UserError, printable
from align.pipeline.pipeline import Pipeline, PipelineConfig
from align.pipeline.registry import STAGES, stage_of
from tests.support.pipeline.shipped import is_runnable

REPOSITORY = Path(__file__).resolve().parents[2]
SCALARS = [
    "true", "yes", '"3"', "'true'", "010", "1:30:00", "0x10", "1_000", "3", "-1", "0", "3.0", "5e-4", "1e3", ".inf",
    "-.inf", ".nan", "1e400", "~", "''", "x", "'..x:Y'", "':'", "a:b", "'os:path'", "~nosuchuser/x", "'~'", "x" * 5000,
    "/" + "y/" * 3000, "'a\\0b'", '"a\\0b"', '"\\ud800"', '"\\u202e"', "2024-01-01", "!!binary aGk=", "!!set {a}",
    "99999999999999999999", "9" * 4400, "[]", "{}", "[1, x]", "{a: 1}", "{1: 2}", "{~: 1}", "[[[1]]]",
    "'https://u:geheim@h/v1'", "'s3://geheim:geheim@bucket/p'", "'u:geheim@h:8000'", "'*'", "'../..'", ".", "=", "'%'",
    "'{'", "'['", "'\\'", "'$('",
]  # fmt: skip


@functools.cache
def shipped() -> dict[str, tuple[Path, str]]:
    """A shipped pipeline and the name of a stage in it for each kind that there is one of."""
    stages_by_kind: dict[str, tuple[Path, str]] = {}
    for path in filter(is_runnable, sorted((REPOSITORY / "pipelines").rglob("*.yaml"))):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, block in raw.get("stages", {}).items():
            if name != "loop" and block.get("stage") != "loop":
                stages_by_kind.setdefault(stage_of(name, block, "x").kind, (path, name))
    return stages_by_kind


def paths_below(model: type[BaseModel], above: tuple[str, ...] = (), depth: int = 3) -> Iterator[tuple[str, ...]]:
    """Paths of all fields, those of blocks within blocks too."""
    for name, field in model.model_fields.items():
        yield (*above, name)
        for inner in models_in(field.annotation) if depth else ():
            yield from paths_below(inner, (*above, name), depth - 1)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models that a field may hold itself, not in a list or mapping."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    origin = typing.get_origin(annotation)
    if origin is not list and origin is not dict:
        for part in typing.get_args(annotation):
            yield from models_in(part)


def block_of(path: tuple[str, ...], scalar: str) -> str:
    """YAML in which the field at ``path`` has this value."""
    return "\n".join(f"{'  ' * depth}{name}:" for depth, name in enumerate(path)) + f" {scalar}\n"


def outcome(model: type[BaseModel], path: tuple[str, ...], scalar: str) -> str | None:
    """What is said of a value; None where it is taken. Raises ``AssertionError`` for anything in between."""
    try:
        block = parse_yaml(block_of(path, scalar), "p.yaml")
        config: Any = validate(model, block, "p.yaml: stages.s")
    except UserError as error:
        message = str(error)
        assert message.startswith("p.yaml"), message
        assert len(message) < 3000, message[:3000]
        assert "geheim" not in message, message
        return message
    for name in path:
        field = type(config).model_fields[name]
        config = getattr(config, name)
        TypeAdapter(field.annotation).validate_python(config, strict=True)
    return None


def models_below(model: type[BaseModel], known: dict[type[BaseModel], None]) -> None:
    """Add a model and those that its fields hold, in lists and mappings too."""
    if model in known:
        return
    known[model] = None
    for field in model.model_fields.values():
        for inner in every_model_in(field.annotation):
            models_below(inner, known)


def every_model_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models anywhere in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from every_model_in(part)


@functools.cache
def all_models() -> tuple[type[BaseModel], ...]:
    """Every block that a pipeline may have."""
    known: dict[type[BaseModel], None] = {}
    for model in [PipelineConfig, *(stage.config_class() for stage in STAGES.values())]:
        models_below(model, known)
    return tuple(known)


def fields() -> list[tuple[type[BaseModel], str]]:
    """Every field of every block."""
    return [(model, name) for model in all_models() for name in model.model_fields]


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 8))])
def test_every_field_accepts_its_type_or_names_itself(part: int) -> None:
    """Blocks lack what else is required, so many are refused for that, too."""
    assert len(fields()) > 900
    for model, name in fields()[part::8]:
        for scalar in SCALARS:
            outcome(model, (name,), scalar)


VALUES = st.one_of(
    st.text(max_size=40), st.floats(), st.integers(), st.booleans(), st.none(), st.binary(max_size=4), st.dates(),
    st.lists(st.text(max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3) | st.integers(), st.floats(), max_size=2),
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_nothing_but_a_user_error_comes_of_any_value(data: st.DataObject) -> None:
    model, name = data.draw(st.sampled_from(fields()))
    text = yaml.safe_dump(data.draw(VALUES), default_flow_style=True, width=10**6)
    outcome(model, (name,), text.removesuffix("\n").removesuffix("\n..."))


@pytest.mark.slow
@pytest.mark.parametrize("kind", shipped())
def test_shipped_pipeline_with_any_value_in_a_stage_field(kind: str) -> None:
    """Whole pipelines: a value that is taken goes into paths, imports, keys and digests as well."""
    path, name = shipped()[kind]
    pipeline = Pipeline.load(path)
    for field in paths_below(STAGES[kind].config_class(), depth=1):
        for scalar in SCALARS:
            change(pipeline, f"stages.{name}.{'.'.join(field)}", scalar)


@pytest.mark.parametrize(
    ("path", "scalar"),
    [
        ("stages.sft.stage", "'..x:Y'"),
        ("stages.sft.stage", "'os:path'"),
        ("stages.model.source", "~nosuchuser/x"),
        ("stages.model.source", "x" * 5000),
        ("stages.model.source", "/" + "y/" * 3000),
        ("stages.model.source", '"\\ud800"'),
        ("stages.model.source", '"a\\0b"'),
        ("stages.model.chat_template", "~nosuchuser/x"),
        ("stages.model.chat_template", "x" * 5000),
        ("stages.data.recipe", "x" * 5000),
        ("stages.data.recipe", "~nosuchuser/x"),
        ("stages.data.files", "['~nosuchuser/*']"),
        ("stages.sample.score", "'..x:Y'"),
        ("stages.ppo.trainer", "{adam_beta2: .nan}"),
        ("stages.sft.trainer", "{1: 2}"),
        ("stages.evaluate.policies", "[1]"),
        ("runtime.store", "~nosuchuser/x"),
    ],
)
def test_value_that_once_ended_in_a_traceback(path: str, scalar: str) -> None:
    with pytest.raises(UserError) if path != "runtime.store" else contextlib.nullcontext():
        quickstart().set(f"{path}={scalar}")


@functools.cache
def quickstart() -> Pipeline:
    """The shipped pipeline that has a stage of most kinds."""
    return Pipeline.load(REPOSITORY / "pipelines" / "quickstart.yaml")


def change(pipeline: Pipeline, path: str, scalar: str) -> None:
    """Set a field as ``--set`` does; nothing else than ``UserError`` may come of it."""
    try:
        pipeline.set(f"{path}={scalar}")
    except UserError as error:
        assert "geheim" not in str(error)
        assert len(str(error)) < 6000


def test_numbers_in_every_usual_spelling_are_taken() -> None:
    block = parse_yaml("{model: m, data: d, max_steps: 3, learning_rate: 5e-4, max_grad_norm: 1}", "x")
    config: Any = validate(STAGES["sft"].config_class(), block, "x")
    assert (config.max_steps, config.learning_rate, config.max_grad_norm) == (3, 5e-4, 1.0)
    assert isinstance(config.max_grad_norm, float)


def test_a_time_limit_is_text_with_and_without_quotes() -> None:
    raw = parse_yaml("{executor: {name: slurm, time: 04:30:00}, stages: {two: {executor: {time: 1-00:00:00}}}}", "x")
    runtime = validate(Runtime, raw, "x")
    assert (runtime.executor.time, runtime.for_stage("two").executor.time) == ("04:30:00", "1-00:00:00")


def test_messages_repeat_no_character_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from align.cli.main import main

    pipeline = tmp_path / "p.yaml"
    pipeline.write_text('name: n\nstages: {one: {stage: "\\u202egnp.exe\\u200b\\x1b[2J"}}\n', encoding="utf-8")
    assert main(["plan", str(pipeline), "--store", str(tmp_path / "store")]) == 2
    message = capsys.readouterr().err
    assert "\\u202egnp.exe\\u200b\\x1b[2J" in message
    assert printable(message) == message


@pytest.mark.parametrize("store", ["~nosuchuser/x", "\ud800", "\udcff", "x" * 5000, "a\0b", "s3://key:geheim@bucket/x"])
def test_a_store_that_cannot_be_one(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    from align.cli.main import main

    assert main(["list", "--store", store]) == 2
    message = capsys.readouterr().err
    assert message.strip() and "geheim" not in message and "Traceback" not in message


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "\ud800.yaml", "~nosuchuser/x.yaml"])
def test_a_pipeline_file_that_cannot_be_one(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    from align.cli.main import main

    assert main(["plan", path]) == 2
    assert capsys.readouterr().err.strip()
