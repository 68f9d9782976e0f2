"""A suite: the ``evaluate`` block of a pipeline, without the checkpoints that the command line supplies.

A suite may also have ``name``, ``description``, ``seed`` and ``runtime``, as a pipeline has. Its ``prompts``, ``pairs``
and ``heldout`` are recipes or builds, not stages; its ``rows`` are several by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.cli.checkpoints import BASE, Checkpoint
from align.config.shipped import find_shipped
from align.config.stages.evaluate import EvaluateConfig
from align.config.user_paths import PathField, locate, settle_path, unmark
from align.config.validation import suggest, validate
from align.config.yaml import load_yaml
from align.errors import UserError
from align.pipeline.overrides import assign, parse_assignment
from align.pipeline.pipeline import Pipeline
from align.pipeline.registry import NAME_PATTERN
from align.report.page.assets import unique_name
from align.store.artifacts import PROMPT_SOURCES, Kind

PIPELINE_FIELDS = ("name", "description", "seed", "runtime")
INPUT_OPTIONS = {
    "policies": "CHECKPOINT...",
    "reference": "--reference",
    "reward": "--reward",
    "second_reward": "--second-reward",
}
"""Fields that name stages, and the words of the command line that set them."""
ROWS: dict[str, tuple[Kind, ...]] = {
    "prompts": PROMPT_SOURCES,
    "pairs": (Kind.PREFERENCES,),
    "heldout": (Kind.INSTRUCTIONS,),
}
"""Inputs that are rows, with the kinds of artifacts that they may be."""
KNOWN_FIELDS = [*PIPELINE_FIELDS, *(name for name in EvaluateConfig.model_fields if name not in INPUT_OPTIONS)]
NAMED_ROWS = "rows"
"""Field of rows by name, each of the kinds in ``PROMPT_SOURCES``; tasks name them."""
REWARDS = ("reward", "second_reward")
NAMED_BLOCKS = ("tasks", "baselines", "gates")
"""Blocks whose entries have names; a null removes an entry."""


@dataclass(frozen=True)
class Suite:
    """A parsed suite with ``--set`` applied: the ``evaluate`` block and the fields of the pipeline."""

    where: str
    block: dict[str, Any]
    top: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    """Recipes or builds of ``prompts``, ``pairs`` and ``heldout``."""
    named_rows: dict[str, str] = field(default_factory=dict)
    """Recipes or builds of ``rows``, by the names under which tasks have them."""

    @property
    def name(self) -> str:
        """Name of the suite's runs: its own, else ``eval-`` and the file's."""
        if self.top.get("name") is not None:
            return str(self.top["name"])
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(self.where).stem).strip("-")[:50]
        return f"eval-{stem or 'suite'}"


@dataclass(frozen=True)
class ComparedCheckpoints:
    """Checkpoints in the order of comparison; ``bases`` and ``reference`` are names among them."""

    checkpoints: Sequence[Checkpoint]
    bases: Sequence[str]
    reference: str

    @property
    def names(self) -> list[str]:
        """Names of all checkpoints, in order."""
        return [checkpoint.name for checkpoint in self.checkpoints]


def load_suite(path: str, assignments: Sequence[str] = ()) -> Suite:
    """Load a suite and apply ``assignments`` such as ``tasks.ifeval.max_items=50``; ``tasks.x=null`` removes a task.

    ``path`` may be a shipped suite's name. Raises ``UserError`` for a file that is not a suite, and for fields that
    belong on the command line.
    """
    path = find_shipped(path, "suite")
    raw = locate(load_yaml(Path(path)), Path(path))
    if isinstance(raw.get("stages"), Mapping):
        raise UserError(f"{path}: a pipeline, not a suite; `align run {path}` runs it. A suite is its evaluate block.")
    # Assignments change nested blocks in place.
    raw = copy.deepcopy(dict(raw))
    for text in assignments:
        assign(raw, *parse_assignment(text, "tasks.ifeval.max_items=50"), (*KNOWN_FIELDS, *INPUT_OPTIONS))
    for name in raw:
        if name in INPUT_OPTIONS:
            raise UserError(f"{path}: {name} belongs on the command line ({INPUT_OPTIONS[name]}), not in a suite.")
        if name not in KNOWN_FIELDS:
            raise UserError(f"{path}: unknown key '{name}'.{suggest(str(name), KNOWN_FIELDS)}")
    for name in NAMED_BLOCKS:
        if isinstance(raw.get(name), dict):  # drop entries set to null: `--set tasks.gsm8k=null`
            raw[name] = {key: value for key, value in raw[name].items() if value is not None}
    top = {name: unmark(raw.pop(name)) for name in PIPELINE_FIELDS if name in raw}
    rows = {name: raw.pop(name) for name in ROWS if raw.get(name) is not None}
    named_rows = raw.pop(NAMED_ROWS, None) or {}
    if not isinstance(named_rows, Mapping):
        raise UserError(f"{path}: rows is {unmark(named_rows)!r}; name each: `rows: {{sums: sums.yaml}}`.")
    return Suite(
        path,
        raw,
        top,
        {name: _settle_rows(word, f"{path}: {name}") for name, word in rows.items()},
        {str(name): _settle_rows(word, f"{path}: rows.{name}") for name, word in named_rows.items()},
    )


def _settle_rows(word: Any, place: str) -> str:
    """Return the recipe, folder or key that a word of the suite means."""
    if not isinstance(word, str):
        raise UserError(f"{place} is {word!r}; expected a recipe, a build's folder, or a key.")
    return settle_path(word, Path.cwd(), place, PathField(may_be_name=True))


def choose_reference(chosen: str | None, names: Sequence[str], bases: Sequence[str]) -> str:
    """Return the checkpoint that others are compared with: ``chosen``, else the first that is not a base.

    If only one checkpoint is not a base, the reference is the first checkpoint of all: the trained checkpoint is
    compared with its base.
    """
    if chosen is None:
        trained = [name for name in names if name not in bases]
        return trained[0] if len(trained) > 1 else names[0]
    if chosen not in names:
        raise UserError(f"--reference {chosen}: no checkpoint has this name.{suggest(chosen, names)}")
    return chosen


def suite_pipeline(
    suite: Suite,
    compared: ComparedCheckpoints,
    inputs: Mapping[str, dict[str, Any]],
    name: str | None,
    warn: Callable[[str], None],
) -> tuple[Pipeline, str]:
    """Return the suite's pipeline and the name of its ``evaluate`` stage.

    ``inputs`` are the stages for ``prompts``, ``reward`` and so on, and under ``rows.sums`` for the rows ``sums``;
    ``name`` is the run's, None for the suite's name. Raises ``UserError`` with places in the suite's file.
    """
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"--name {name}: letters, digits, - and _, beginning with a letter.")
    stages: dict[str, Any] = {checkpoint.name: checkpoint.stage for checkpoint in compared.checkpoints}
    block = _resolve_aliases(suite.block, compared, warn)
    block |= {"policies": compared.names, "reference": compared.reference}
    for input_name, stage in inputs.items():
        field_name, _, row_name = input_name.partition(".")
        if row_name in stages:
            raise UserError(f"{suite.where}: {input_name}: another input is called '{row_name}'; choose another name.")
        # Tasks name rows, so these stages keep their names.
        stage_name = row_name or unique_name(field_name, stages)
        stages[stage_name] = stage
        block[field_name] = [*block.get(field_name, []), stage_name] if row_name else stage_name
    # Validate the block first, with the suite's file as its place: the pipeline would report other places.
    validate(EvaluateConfig, block, suite.where)
    evaluation = unique_name("evaluate", stages)
    raw = {**suite.top, "name": name or suite.name, "stages": stages}
    # The suite's own stage comes last: it reads all others.
    stages[evaluation] = {"stage": "evaluate", **block}
    try:
        return Pipeline(raw, suite.where), evaluation
    except UserError as error:
        # The user knows the suite's fields, not the pipeline around them.
        text = str(error)
        for end in (": ", "."):
            text = text.replace(f"{suite.where}: stages.{evaluation}{end}", f"{suite.where}: ")
        raise UserError(text) from None


def _resolve_aliases(
    block: Mapping[str, Any], compared: ComparedCheckpoints, warn: Callable[[str], None]
) -> dict[str, Any]:
    """Return the block with ``of: base`` and ``of: reference`` replaced by the names of those checkpoints."""
    resolved = copy.deepcopy(dict(block))
    baselines = resolved.get("baselines")
    if not isinstance(baselines, dict):
        return resolved
    for name, baseline in list(baselines.items()):
        alias = baseline.get("of") if isinstance(baseline, dict) else None
        if alias in compared.names or alias not in (BASE, "reference"):
            continue
        if alias == BASE and not compared.bases:
            warn(f"baseline '{name}' is left out: it uses the base model, and this evaluation has none")
            del baselines[name]
            continue
        baseline["of"] = compared.bases[0] if alias == BASE else compared.reference
    return resolved
