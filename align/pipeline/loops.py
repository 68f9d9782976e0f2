"""Loops in a pipeline: a block of stages repeated for some rounds, each round's result carried into the next.

``expand`` writes a loop out into plain stages before anything else reads them: ``dpo`` of a loop of three rounds
becomes ``dpo-1``, ``dpo-2`` and ``dpo-3``, each with a separate key. Caching, resuming, plan and report therefore do
not need to handle loops. Outside the loop ``dpo`` is the last round's stage, and ``dpo-*`` in a list is every round's.

A name of the block is the same round's stage. A carried name is ``first`` in round 1 and the previous round's ``then``
afterwards. ``dpo-*`` inside the block is every round so far. Round r adds r - 1 to the seed, so rounds do not repeat
one another's random choices, and round 1 is the block without a loop. Loops in loops are not supported, nor is ending
early on a result (all stages must be known before any has run). Never imports torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from align.config.base import Config, input_fields, names_in_block, rename_in_block
from align.config.stages.continue_from import CONTINUE, changes_in, continued_stage
from align.config.validation import suggest, validate
from align.errors import UserError
from align.pipeline.registry import LOOP, STAGES, find_stage, stage_of

EVERY = "-*"
MAX_SEED = 2**32


class CarryConfig(Config):
    """The stages that a carried name stands for."""

    first: str
    """Stage above the loop that the name means in the first round: the checkpoint to start from."""
    then: str
    """Stage of the block that the name means from the second round on: the previous round's."""


class LoopConfig(Config):
    """A block of stages and its number of rounds; the names are the same in every round."""

    rounds: int = Field(ge=1, le=100)
    """Number of rounds of the block. Increasing it keeps finished rounds."""
    carry: dict[str, str | CarryConfig] = Field({})
    """Names that stages of the block read and that change with the round: ``{policy: {first: sft, then: dpo}}``.
    ``{sft: dpo}`` is short for a name that is the first round's stage itself. Without it only the seeds differ."""
    stages: dict[str, dict[str, Any]] = Field(min_length=1)
    """The stages of a round, in order."""
    changes: dict[int, dict[str, dict[str, Any]]] = Field({})
    """Fields that a round sets to other values, by its number and stage: ``{2: {dpo: {beta: 0.05}}}``."""


@dataclass
class Expanded:
    """Stages without loops, their places in the file, and the rounds of those that a loop repeats."""

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    """Name -> its place in the YAML, ``stages.loop.stages.dpo[round 2]``."""
    rounds: dict[str, list[str]] = field(default_factory=dict)
    """Name in a loop -> its stages, the first round's first."""

    def resolve(self, name: str) -> str:
        """Return the stage that a name means: itself, or the last round's."""
        return self.rounds[name][-1] if name in self.rounds and name not in self.stages else name

    def every(self, name: str) -> list[str]:
        """Return all stages that a name means: the stage itself, or each round's stage."""
        return self.rounds[name] if name in self.rounds and name not in self.stages else [name]

    def without_round(self, stage: str) -> str:
        """Return the name of a stage in the file: the name in its loop, or the stage's own name."""
        return next((name for name, rounds in self.rounds.items() if stage in rounds), stage)

    def match_rounds(self, pattern: str) -> list[str] | None:
        """Return the stages that ``dpo-*`` means; None for a text that is no such pattern."""
        name = pattern.removesuffix(EVERY)
        return list(self.rounds[name]) if pattern.endswith(EVERY) and name in self.rounds else None


def is_loop(name: str, block: Mapping[str, Any]) -> bool:
    """Return whether this block of ``stages:`` is a loop: by its name, or by ``stage: loop``."""
    return bool(block.get("stage", name) == LOOP)


def kind_in(name: str, blocks: Mapping[str, Any]) -> str:
    """Return the kind of a stage: its ``stage``, or the kind of the stage that it continues, or its name."""
    visited: set[str] = set()
    while isinstance(blocks.get(name), Mapping) and name not in visited:
        visited.add(name)
        source = continued_stage(blocks[name])
        if "stage" in blocks[name] or source is None:
            return str(blocks[name].get("stage", name))
        name = source
    return name


def expand(blocks: Mapping[str, dict[str, Any]], file: str, seed: int) -> Expanded:
    """Write out every loop of ``stages:``. ``file`` begins the places of errors, ``seed`` is the pipeline's.

    Raises ``UserError`` for a loop with unknown keys, for a carried name that is unused or does not exist, and for
    names that clash. Errors inside stages are found later, as in any stage.
    """
    expanded = Expanded()
    plain_names = [name for name, block in blocks.items() if not is_loop(name, block)]
    every = {name: blocks[name] for name in plain_names}
    for name, block in blocks.items():
        place = f"stages.{name}"
        if name in plain_names:
            # Only its place in the order: its inputs are renamed below, once every round has its name.
            expanded.stages[name] = block
            expanded.places[name] = place
            continue
        loop = validate(LoopConfig, {key: block[key] for key in block if key != "stage"}, f"{file}: {place}")
        _check_stages(loop, {*plain_names, *expanded.stages}, expanded.rounds, f"{file}: {place}")
        _check_carry(loop, {*plain_names, *expanded.stages, *expanded.rounds}, f"{file}: {place}")
        _check_changes(loop, f"{file}: {place}")
        every |= loop.stages
        _write_out(name, loop, expanded, seed)
    # Plain stages come last: they may read stages of a loop below them in the file.
    for name in plain_names:
        expanded.stages[name] = _rename_inputs(
            kind_in(name, every), blocks[name], expanded.resolve, expanded.match_rounds
        )
    return expanded


def _check_stages(loop: LoopConfig, reserved: set[str], repeated: Mapping[str, list[str]], place: str) -> None:
    """Check that the block's stages are no loops, and that neither their names nor their rounds' are in use."""
    for name, block in loop.stages.items():
        if is_loop(name, block):
            raise UserError(f"{place}.stages.{name}: a loop in a loop; write its rounds into the outer one.")
        stage_of(name, block, f"{place}.stages")
        for stage_name in (name, *(f"{name}-{number}" for number in range(1, loop.rounds + 1))):
            if stage_name in reserved or stage_name in repeated:
                owner = "another loop" if name in repeated else "the pipeline"
                raise UserError(
                    f"{place}.stages.{name}: '{stage_name}' is a stage of {owner} already; rename one of them."
                )


def _check_carry(loop: LoopConfig, outside: set[str], place: str) -> None:
    """Check that every carried name is read in the block, and that its stages are there."""
    names_read = [target for name, block in loop.stages.items() for target in _names_read(name, block, loop)]
    # Any name that remains unexplained may be a misspelled carried name.
    explained = {*outside, *loop.stages, *loop.carry}
    unknown = [name for name in names_read if name not in explained]
    for name, carried in loop.carry.items():
        carry_place = f"{place}.carry.{name}"
        first, then = _first_and_then(name, carried)
        if name in loop.stages:
            raise UserError(
                f"{carry_place}: the block has a stage '{name}' itself; give the carried stage another name."
            )
        if then not in loop.stages:
            raise UserError(
                f"{carry_place}: there is no stage '{then}' in the loop's block.{suggest(then, loop.stages)}"
            )
        if name not in names_read:
            raise UserError(f"{carry_place}: no stage of the block reads '{name}'.{suggest(name, unknown)}")
        if first not in outside:
            remedy = suggest(first, outside)
            if isinstance(carried, str):
                remedy = f" Say which stage it is in the first round: {{first: STAGE, then: {then}}}."
            raise UserError(f"{carry_place}: there is no stage '{first}' outside of the loop.{remedy}")
        if name in outside and name != first:
            raise UserError(
                f"{carry_place}: '{name}' is a stage of the pipeline, so the name would mean two. Choose a new name."
            )


def _first_and_then(name: str, carried: str | CarryConfig) -> tuple[str, str]:
    """Return the stages that a carried name means in the first round and, one round back, in later rounds."""
    if isinstance(carried, str):
        return name, carried
    return carried.first, carried.then


def _check_changes(loop: LoopConfig, place: str) -> None:
    for number, changes in loop.changes.items():
        round_place = f"{place}.changes.{number}"
        if not 1 <= number <= loop.rounds:
            raise UserError(f"{round_place}: there is no such round; they are 1 to {loop.rounds}.")
        for name in changes:
            if name not in loop.stages:
                raise UserError(
                    f"{round_place}: there is no stage '{name}' in the loop's block.{suggest(name, loop.stages)}"
                )


def _names_read(name: str, block: Mapping[str, Any], loop: LoopConfig) -> list[str]:
    """Return the names that a stage of the block reads, in any round."""
    names: list[str] = []
    # A name may be read only after a round's changes, so every version of the block counts.
    versions = [block, *(changes[name] for changes in loop.changes.values() if name in changes)]
    for version in versions:
        merged = {**block, **version}
        for field_name in _input_fields(name, merged):
            names += names_in_block(merged, field_name) + names_in_block(changes_in(merged), field_name)
    return names


def _input_fields(name: str, block: Mapping[str, Any]) -> list[str]:
    """Return the fields of a block that may name stages; empty if the kind is not known."""
    try:
        config_class = find_stage(block.get("stage", name)).config_class()
    except (KeyError, TypeError, UserError):
        return []  # refused later, with its place
    return list(input_fields(config_class))


def _write_out(loop_name: str, loop: LoopConfig, expanded: Expanded, seed: int) -> None:
    """Append the loop's rounds to ``expanded`` as plain stages."""
    written: dict[str, list[str]] = {name: [] for name in loop.stages}
    for number in range(1, loop.rounds + 1):

        def in_this_round(name: str, number: int = number) -> str:
            """Return the stage that a name in the block means in this round."""
            # A carried name: an outside stage in round 1, afterwards the result of the round before.
            carried = loop.carry.get(name)
            if carried is not None:
                first, then = _first_and_then(name, carried)
                return expanded.resolve(first) if number == 1 else f"{then}-{number - 1}"
            return f"{name}-{number}" if name in loop.stages else expanded.resolve(name)

        def rounds_so_far(pattern: str) -> list[str] | None:
            """Return the stages that ``dpo-*`` means inside the block."""
            name = pattern.removesuffix(EVERY)
            if pattern.endswith(EVERY) and name in written:
                # Inside the block a pattern means the rounds so far, since later rounds do not exist yet.
                return list(written[name])
            return expanded.match_rounds(pattern)

        for name, block in loop.stages.items():
            changes = loop.changes.get(number, {}).get(name, {})
            # The kind is written out, because a name with a round, ``dpo-2``, is not a kind.
            stage_block = {"stage": name, **copy.deepcopy(block), **copy.deepcopy(changes)}
            stage_block = _rename_inputs(name, stage_block, in_this_round, rounds_so_far)
            stage_seed = stage_block.get("seed", seed)
            # A seed that the round sets itself stays, and a stage that continues another has that stage's; true is an
            # int for Python, and is refused later.
            if (
                number > 1
                and "seed" not in changes
                and continued_stage(stage_block) is None
                and isinstance(stage_seed, int)
                and not isinstance(stage_seed, bool)
            ):
                # Another seed each round, or every round would sample the same responses from the same prompts.
                stage_block["seed"] = (stage_seed + number - 1) % MAX_SEED
            stage_name = f"{name}-{number}"
            expanded.stages[stage_name] = stage_block
            round_suffix = f"[round {number}]" if number > 1 else ""
            expanded.places[stage_name] = f"stages.{loop_name}.stages.{name}{round_suffix}"
            written[name].append(stage_name)
    expanded.rounds.update(written)


def _rename_inputs(
    name: str,
    block: dict[str, Any],
    rename: Callable[[str], str],
    match_rounds: Callable[[str], list[str] | None],
) -> dict[str, Any]:
    """Return a copy of a stage's block whose fields that name stages have the stages' real names."""
    renamed = dict(block)
    for field_name in _input_fields(name, block):
        value = block.get(field_name)
        if "." in field_name:
            renamed = rename_in_block(renamed, field_name, rename)
        elif isinstance(value, str):
            stages = match_rounds(value)
            renamed[field_name] = rename(value) if stages is None else stages
        elif isinstance(value, list):
            items: list[Any] = []
            for item in value:
                stages = match_rounds(item) if isinstance(item, str) else [item]
                items += [rename(item)] if stages is None else stages
            renamed[field_name] = items
    change = changes_in(block)
    if change:
        kind = str(block.get("stage", name))
        renamed[CONTINUE] = {**renamed[CONTINUE], "change": _rename_inputs(kind, change, rename, match_rounds)}
    # Some kinds also name stages outside their input fields, such as in gates and baselines.
    stage = STAGES.get(str(block.get("stage", name)))
    config_class = stage.config_class() if stage is not None else None
    if config_class is not None and hasattr(config_class, "rename_stages"):
        renamed = config_class.rename_stages(renamed, rename)
    return renamed
