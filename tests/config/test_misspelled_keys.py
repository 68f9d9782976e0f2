"""Every key of every stage that makes weights, of every tuning and of the blocks inside is refused when misspelled."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest

from align.config.base import Config
from align.config.validation import validate
from align.errors import UserError
from align.pipeline.registry import STAGES
from tests.support.stages.kinds import METHODS


def slips(name: str) -> list[str]:
    """One letter left out, and two that changed places, each somewhere else in the word."""
    drop, swap = (len(name) * share // 4 for share in (3, 1))
    misspellings = [
        name[:drop] + name[drop + 1 :],
        name[:swap] + name[swap : swap + 2][::-1] + name[swap + 2 :],
    ]
    return [slip for slip in dict.fromkeys(misspellings) if slip not in ("", name)]


def models_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def tags(model: type[Config]) -> dict[str, str]:
    """What says in a YAML which of several blocks this is: ``{method: lora}``."""
    annotations = {name: typing.get_args(field.annotation) for name, field in model.model_fields.items()}
    return {name: values[0] for name, values in annotations.items() if len(values) == 1 and isinstance(values[0], str)}


def blocks(
    model: type[Config], path: tuple[tuple[str, dict[str, str]], ...] = ()
) -> Iterator[tuple[Any, type[Config]]]:
    """The config and every block inside, each with its path: the keys above and what tells those blocks apart."""
    if model.model_config.get("extra") == "allow":
        return  # its keys are the options of an own function
    yield path, model
    for name, field in model.model_fields.items():
        if dict[str, float] in typing.get_args(field.annotation):
            continue  # any key of the block may also be a column with its weight
        for inner in models_in(field.annotation):
            if is_named(field.annotation, inner):  # tasks: the kind is a name
                kind = tags(inner).get("task", "any")
                yield from blocks(inner, (*path, (name, {}), (kind, tags(inner))))
                continue
            place = f"{name}[0]" if is_listed(field.annotation, inner) else name
            yield from blocks(inner, (*path, (place, tags(inner))))


def is_listed(annotation: Any, model: type[Config]) -> bool:
    """True where a block is an item of a list in a field's type."""
    arguments = typing.get_args(annotation)
    return (typing.get_origin(annotation) is list and model in models_in(annotation)) or any(
        is_listed(argument, model) for argument in arguments
    )


def is_named(annotation: Any, model: type[Config]) -> bool:
    """Return True if a block is a value of a mapping in a field's type."""
    return typing.get_origin(annotation) is dict and model in models_in(annotation)


def test_blocks_are_found() -> None:
    paths = {tuple(name for name, _ in path) for path, _ in blocks(STAGES["sft"].config_class())}
    assert paths >= {("evaluate",), ("evaluate", "tasks", "ifeval"), ("evaluate", "tasks", "gsm8k")}
    assert {path for path in paths if path[:1] != ("evaluate",)} == {
        (),
        ("tuning",),
        ("tuning", "unfreeze"),
        ("tuning", "lisa"),
        ("early_stopping",),
        ("anchor",),
        ("continue_from",),
        ("lint",),
    }
    methods = {path[0][1].get("method") for path, _ in blocks(STAGES["ppo"].config_class()) if path}
    assert methods >= {"full", "lora", "qlora", "ia3", "peft", "prefix", "prompt", "p_tuning", "adapters"}
    assert slips("beta") == ["bet", "btea"]


def refusal(config: type[Config], path: Any, model: type[Config], name: str, wrong: str) -> str:
    """What is said of a block in which ``name`` stands as ``wrong``."""
    tag_values = tags(model)
    block: Any = {key: value for key, value in tag_values.items() if key != name} | {wrong: tag_values.get(name, 1)}
    for depth in range(len(path) - 1, -1, -1):
        above = path[depth - 1][1] if depth else {}
        name, bracket, _ = path[depth][0].partition("[")
        block = {**above, name: [block] if bracket else block}
    with pytest.raises(UserError) as caught:
        validate(config, block, "p.yaml: stages.x")
    return str(caught.value)


@pytest.mark.parametrize("kind", METHODS)
def test_every_misspelled_key_is_refused_at_its_place(kind: str) -> None:
    config = STAGES[kind].config_class()
    tried, missed = 0, []
    for path, model in blocks(config):
        if kind != "sft" and path and path[0][0] == "evaluate":
            continue  # the same block in every stage
        place = ".".join(("p.yaml: stages.x", *(key for key, _ in path)))
        for name in model.model_fields:
            for wrong in slips(name):
                if wrong in model.model_fields:
                    continue
                message = refusal(config, path, model, name, wrong)
                assert f"{place}: unknown key '{wrong}'." in message, message
                tried += 1
                if f"unknown key '{wrong}'. Did you mean '{name}'?" not in message:
                    missed.append(f"{place}.{name} as {wrong}")
    assert tried > (10 if kind == "merge" else 100)
    assert len(missed) <= 0.05 * tried, missed  # a slip can make a word that is nearer to another key
