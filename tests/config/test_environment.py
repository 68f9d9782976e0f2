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


def refusal(block: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(UserError) as caught:
        environment(block, **fields)
    return str(caught.value)


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


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"max_tokens": 64}, "environment: has none of class, tools, verifiers, openenv; an environment comes from"),
        (COUNTER | {"openenv": "http://127.0.0.1:8010"}, "environment: has class and openenv; an environment comes"),
        ({"class": "a:B"}, "environment.max_tokens: this key is required and missing"),
        (COUNTER | {"clas": "a:B"}, "environment: unknown key 'clas'. Did you mean 'class'?"),
        (COUNTER | {"max_turn": 3}, "environment: unknown key 'max_turn'. Did you mean 'max_turns'?"),
        ({"class": 3, "max_tokens": 64}, "environment.class: should be a text or null; found 3"),
        ({"class": "no path", "max_tokens": 64}, "environment.class: 'no path' is not an import path; write"),
        ({"class": "a.b", "max_tokens": 64}, "environment.class: 'a.b' is not an import path"),
        ({"class": ":B", "max_tokens": 64}, "environment.class: ':B' is not an import path"),
        (COUNTER | {"score": "gold"}, "environment: score is for `tools`, and the class scores its episodes itself"),
        (FUNCTIONS | {"score": None}, "environment: tools need a `score`"),
        (FUNCTIONS | {"score": "golt"}, "environment.score: 'golt' is not an import path;"
         " write it as package.module:name. Did you mean 'gold'?"),
        (FUNCTIONS | {"tools": []}, "environment.tools: List should have at least 1 item"),
        (FUNCTIONS | {"tools": ["a:f", "b"]}, "environment.tools: 'b' is not an import path"),
        (FUNCTIONS | {"tools": ["a:f", "b:g", "c:f"]}, "environment.tools: two tools are called 'f' ([0] and [2])"),
        (FUNCTIONS | {"tools": ["a:größe"]}, "environment.tools: 'größe' cannot name a tool"),
        ({"verifiers": "a b", "max_tokens": 64}, "environment.verifiers: String should match"),
        ({"openenv": "127.0.0.1:80", "max_tokens": 64}, "environment.openenv: '127.0.0.1:80' should look like http"),
        ({"openenv": "http://a:b@c", "max_tokens": 64}, "environment.openenv: holds a name or password"),
        (COUNTER | {"max_turns": 0}, "environment.max_turns: should be greater than or equal to 1"),
        (COUNTER | {"max_turns": 33}, "environment: max_turns 33 can never fit into max_tokens 64: these turns and what"
         " comes between them are at least 65 tokens"),
        (COUNTER | {"turn_max_tokens": 65}, "environment: turn_max_tokens 65 is more than max_tokens 64"),
        (COUNTER | {"turn_max_tokens": 0}, "environment.turn_max_tokens: "),
        (COUNTER | {"tool_seconds": 0}, "environment.tool_seconds: should be greater than 0"),
        (COUNTER | {"workers": 0}, "environment.workers: should be greater than or equal to 1"),
        (COUNTER | {"isolation": "proces"}, "environment.isolation: 'proces' is none of 'thread' or 'process'. Did"),
        (COUNTER | {"max_result_tokens": 0}, "environment.max_result_tokens: "),
        (COUNTER | {"tool_format": ""}, "environment.tool_format: "),
        (COUNTER | {"tool_format": "hermez"}, "environment.tool_format: unknown format 'hermez'. Did you"
         " mean 'hermes'?"),
        (COUNTER | {"tool_format": "regex:(?P<name>x)"}, "environment.tool_format: '(?P<name>x)' has no"
         " group arguments"),
        (COUNTER | {"arguments": 3}, "environment.arguments: "),
    ],
)  # fmt: skip
def test_a_wrong_block_is_refused_at_its_place(block: dict[str, Any], message: str) -> None:
    assert message in refusal(block)


def test_the_last_turns_that_fit_are_taken() -> None:
    assert environment(COUNTER, max_turns=32).max_turns == 32


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (COUNTER | {"class": f"{CLASSES}:Countre"}, f"environment.class '{CLASSES}:Countre': {CLASSES} has no class"
         " 'Countre'. Did you mean 'Counter'?"),
        (COUNTER | {"class": f"{TOOLS}:double"}, "environment.class 'tests.support.environments.tools:double': double"
         " is a function; name a class, or list functions under `tools`."),
        (COUNTER | {"class": "no_such.module:A"}, "environment.class 'no_such.module:A': there is no module"),
        (COUNTER | {"class": f"{CLASSES}:WithoutReset"}, "the class has no method 'reset'. Did you mean 'resett'?"),
        (COUNTER | {"class": f"{CLASSES}:WithoutScore"}, "the class has no method 'score'. Add `score(self)`"),
        (COUNTER | {"arguments": {"stepsize": 2}}, "environment.class.arguments: Counter has no argument 'stepsize'."
         " Did you mean 'step_size'?"),
        (COUNTER | {"class": f"{CLASSES}:Game", "arguments": {"a": 2}}, "Game has no argument 'a'. It takes none"),
        (FUNCTIONS | {"tools": [f"{TOOLS}:dubble"]}, f"environment.tools[0] '{TOOLS}:dubble': {TOOLS} has no function"
         " 'dubble'. Did you mean 'double'?"),
        (FUNCTIONS | {"tools": [f"{TOOLS}:double", "no_such:f"]}, "environment.tools[1] 'no_such:f': there is no"),
        (FUNCTIONS | {"score": f"{TOOLS}:by_respons"}, f"environment.score '{TOOLS}:by_respons': {TOOLS} has no"
         " function 'by_respons'. Did you mean 'by_response'?"),
        (FUNCTIONS | {"arguments": {"x": 1}}, "environment.score.arguments: by_response has no argument 'x'"),
    ],
)  # fmt: skip
def test_classes_and_functions_are_checked_when_the_file_is_read(block: dict[str, Any], message: str) -> None:
    assert message in identity_refusal(block)


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
