"""A suite: the ``evaluate`` block of a pipeline without its stage inputs, which the command line gives.

Beside that block's fields a suite may have ``description``, ``seed`` and ``runtime``, as a pipeline has.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.cli.checkpoints import BASE, Checkpoint, unique
from align.config.validation import suggest, validate
from align.config.yaml import load_yaml, parse_yaml
from align.errors import UserError
from align.pipeline.pipeline import NAME_PATTERN, Pipeline
from align.stages.evaluate import EvaluateConfig
from align.store.artifacts import PROMPT_SOURCES, Kind

TOP = ("description", "seed", "runtime")
GIVEN = {
    "policies": "CHECKPOINT...", "reference": "--reference", "reward": "--reward", "second_reward": "--second-reward",
    "prompts": "--prompts", "pairs": "--pairs", "heldout": "--heldout",
}  # fmt: skip
"""Fields that name stages, and where the command line says what they are."""
ROWS: dict[str, tuple[Kind, ...]] = {
    "prompts": PROMPT_SOURCES, "pairs": (Kind.PREFERENCES,), "heldout": (Kind.INSTRUCTIONS,),
}  # fmt: skip
KNOWN = [*TOP, *(name for name in EvaluateConfig.model_fields if name not in GIVEN)]
REWARDS = ("reward", "second_reward")
NAMED = ("tasks", "baselines", "gates")
"""Blocks of things by name."""


@dataclass(frozen=True)
class Suite:
    """A suite's file as it is, with ``--set`` applied."""

    where: str
    block: dict[str, Any]
    top: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What a run of it is called."""
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(self.where).stem).strip("-")[:50]
        return f"eval-{stem or 'suite'}"


def load_suite(path: str, assignments: Sequence[str] = ()) -> Suite:
    """Read a suite and change what ``assignments`` (``tasks.ifeval.max_items=50``) say; ``tasks.x=null`` takes one out.

    Raises ``UserError`` for a file that is none, and for fields that belong on the command line.
    """
    raw = load_yaml(Path(path))
    if isinstance(raw.get("stages"), Mapping):
        raise UserError(f"{path}: a pipeline, not a suite; `align run {path}` runs it. A suite is its evaluate block.")
    raw = copy.deepcopy(dict(raw))
    for text in assignments:
        _assign(raw, text)
    for name in raw:
        if name in GIVEN:
            raise UserError(f"{path}: {name} is given on the command line ({GIVEN[name]}), not in a suite.")
        if name not in KNOWN:
            raise UserError(f"{path}: unknown key '{name}'.{suggest(str(name), KNOWN)}")
    for name in NAMED:
        if isinstance(raw.get(name), dict):  # null takes one out: `--set tasks.gsm8k=null`
            raw[name] = {key: value for key, value in raw[name].items() if value is not None}
    top = {name: raw.pop(name) for name in TOP if name in raw}
    return Suite(path, raw, top)


def _assign(raw: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    parts = [part.strip() for part in path.split(".")]
    if not equals or not all(parts):
        raise UserError(f"--set {text}: expected path=value, like tasks.ifeval.max_items=50.")
    if parts[0] not in KNOWN and parts[0] not in GIVEN:
        raise UserError(f"--set {path}: unknown key '{parts[0]}'.{suggest(parts[0], KNOWN)}")
    at: Any = raw
    for index, part in enumerate(parts[:-1]):
        at = at.setdefault(part, {})
        if not isinstance(at, dict):
            raise UserError(f"--set {path}: '{'.'.join(parts[: index + 1])}' is {at!r}, not a block of keys.")
    at[parts[-1]] = parse_yaml(value, f"--set {path}")


def choose_reference(wanted: str | None, names: Sequence[str], bases: Sequence[str]) -> str:
    """The checkpoint that others are compared with: the one named, else the first that is not a base.

    One checkpoint beside its base has only the base to be compared with.
    """
    if wanted is None:
        trained = [name for name in names if name not in bases]
        return trained[0] if len(trained) > 1 else names[0]
    if wanted not in names:
        raise UserError(f"--reference {wanted}: no checkpoint is called so.{suggest(wanted, names)}")
    return wanted


def suite_pipeline(
    suite: Suite,
    checkpoints: Sequence[Checkpoint],
    bases: Sequence[str],
    reference: str,
    inputs: Mapping[str, dict[str, Any]],
    name: str | None,
    warn: Callable[[str], None],
) -> tuple[Pipeline, str]:
    """The pipeline of the suite, and the name of its evaluation.

    ``checkpoints`` come in the order compared, ``bases`` are names among them, ``inputs`` are the stages behind
    ``prompts``, ``reward`` and so on. Raises ``UserError`` with the suite's own places for whatever is wrong in it.
    """
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"--name {name}: letters, digits, - and _, beginning with a letter.")
    names = [one.name for one in checkpoints]
    stages: dict[str, Any] = {one.name: one.stage for one in checkpoints}
    block: dict[str, Any] = {**_with_aliases(suite.block, names, bases, reference, warn)}
    block |= {"policies": names, "reference": reference}
    for input_name, stage in inputs.items():
        called = unique(input_name, stages)
        stages[called] = stage
        block[input_name] = called
    validate(EvaluateConfig, block, suite.where)
    evaluation = unique("evaluate", stages)
    raw = {**suite.top, "name": name or suite.name, "stages": stages}
    stages[evaluation] = {"stage": "evaluate", **block}
    try:
        return Pipeline(raw, suite.where), evaluation
    except UserError as error:
        text = str(error)
        for end in (": ", "."):
            text = text.replace(f"{suite.where}: stages.{evaluation}{end}", f"{suite.where}: ")
        raise UserError(text) from None


def _with_aliases(
    block: Mapping[str, Any], names: Sequence[str], bases: Sequence[str], reference: str, warn: Callable[[str], None]
) -> dict[str, Any]:
    """The block with ``of: base`` and ``of: reference`` as the names that these have in this evaluation."""
    found = copy.deepcopy(dict(block))
    baselines = found.get("baselines")
    if not isinstance(baselines, dict):
        return found
    for name, one in list(baselines.items()):
        alias = one.get("of") if isinstance(one, dict) else None
        if alias in names or alias not in (BASE, "reference"):
            continue
        if alias == BASE and not bases:
            warn(f"baseline '{name}' left out: it uses the base model, and none is compared")
            del baselines[name]
            continue
        one["of"] = bases[0] if alias == BASE else reference
    return found
