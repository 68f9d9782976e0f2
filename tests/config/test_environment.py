"""``environment:`` of every stage: what it may say, what is refused, and what of it enters the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.config.environment import EnvironmentConfig
from align.config.validation import validate
from align.errors import UserError

CLASSES, TOOLS = "tests.support.environments.classes", "tests.support.environments.tools"
COUNTER = {"class": f"{CLASSES}:Counter", "max_tokens": 64}
FUNCTIONS = {"tools": [f"{TOOLS}:double", f"{TOOLS}:shout"], "score": f"{TOOLS}:by_response", "max_tokens": 64}


def environment(block: dict[str, Any], **fields: Any) -> EnvironmentConfig:
    return validate(EnvironmentConfig, block | fields, "p.yaml: stages.ppo.environment")


def identity_refusal(block: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        environment(block, **fields).identity()
    return str(caught.value)


def test_environment_has_one_of_four_sources() -> None:
    assert environment(COUNTER).label == f"{CLASSES}:Counter"
    assert environment(FUNCTIONS).label == f"{TOOLS}:double, {TOOLS}:shout"
    assert environment({"verifiers": "reverse-text", "max_tokens": 64}).label == "reverse-text"
    assert environment({"openenv": "http://127.0.0.1:8010/", "max_tokens": 64}).label == "http://127.0.0.1:8010"


def test_config_reads_back_from_its_dump() -> None:
    before = environment(COUNTER, arguments={"step_size": 2})
    assert EnvironmentConfig.model_validate_json(before.model_dump_json()) == before
    assert before.model_dump()["class_name"] == f"{CLASSES}:Counter"


def test_the_last_turns_that_fit_are_taken() -> None:
    assert environment(COUNTER, max_turns=32).max_turns == 32


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class E:\n def __init__(self, size): ...\n def reset(self, row): ...\n def score(self): ...",
         "environment.class: E needs size; write `arguments: {size: ...}` next to `class:`"),
        ("class B:\n def reset(self, row): ...\nclass E(B):\n def step(self): ...", "the class has no method 'score'"),
        ("class E(:\n pass", "odd_environment.py:1: cannot be read as Python (invalid syntax)"),
        ("from elsewhere import *", None),
        ("from elsewhere import E", None),
        ("from elsewhere import B\nclass E(B):\n pass", None),
        ("class E:\n def __getattr__(self, name): ...", None),
        ("class E:\n def reset(self, row): ...\n score = print", None),
        ("from dataclasses import dataclass\n@dataclass\nclass E:\n size: int\n def reset(self, row): ...\n"
         " def score(self): ...", None),
    ],
)  # fmt: skip
def test_a_source_that_does_not_tell_is_left_to_the_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str | None
) -> None:
    (tmp_path / "odd_environment.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    block = {"class": "odd_environment:E", "max_tokens": 64}
    if message is None:
        assert environment(block).identity()
    else:
        assert message in identity_refusal(block)


def test_identity_has_code_arguments_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "class E:\n def __init__(self, a=1): ...\n def reset(self, row): ...\n def score(self): ...\n"
    (tmp_path / "keyed_environment.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    block = {"class": "keyed_environment:E", "max_tokens": 64}
    before = environment(block).identity()
    assert environment(block, workers=3, isolation="process").identity() == before
    for change in ({"max_turns": 3}, {"arguments": {"a": 2}}, {"turn_max_tokens": 3}, {"tool_seconds": 1.0}):
        assert environment(block, **change).identity() != before
    (tmp_path / "keyed_environment.py").write_text(source + "# changed\n")
    assert environment(block).identity() != before


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = identity_refusal({"verifiers": "reverse-text", "max_tokens": 64})
    assert "environment.verifiers: needs the package verifiers, which is not installed:" in message
    assert "pip install 'align-pipeline[verifiers]'" in message
    message = identity_refusal({"openenv": "http://127.0.0.1:8010", "max_tokens": 64})
    assert "environment.openenv: needs the package openenv, which is not installed" in message


def test_an_environment_of_verifiers_is_identified_by_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.config.environment.require_extra", lambda *names: None)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.0")
    (tmp_path / "my_taskset.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    block = {"verifiers": "owner/my-taskset@1", "max_tokens": 64}
    before = environment(block).identity()
    (tmp_path / "my_taskset.py").write_text("a = 2\n")
    assert environment(block).identity() != before
    message = identity_refusal(block | {"verifiers": "no-taskset"})
    assert "environment.verifiers 'no-taskset': there is no module 'no_taskset'; install" in message


def test_the_schema_has_the_key_that_the_yaml_has() -> None:
    properties = EnvironmentConfig.model_json_schema()["properties"]
    assert properties["class"]["description"].startswith("Class of the user's")
    assert "class_name" not in properties
