"""Loops in a pipeline: a block of stages repeated for some rounds, each round's result carried into the next.

``expand`` writes a loop out into plain stages before anything else looks at them: ``dpo`` of a loop of three rounds
becomes ``dpo-1``, ``dpo-2`` and ``dpo-3``, each with a key of its own, so caching, resuming, plan and report know
nothing of loops. Outside the loop ``dpo`` is the last round's stage, and ``dpo-*`` in a list is every round's.

A name of the block is the same round's stage; a carried name is ``first`` in round 1 and the round before's ``then``
later; ``dpo-*`` inside the block is every round so far. Round r adds r - 1 to the seed, so that rounds do not repeat
one another's random choices and round 1 is what the block would be without a loop. Left out: loops in loops, and ending
early on a result (the stages must be known before any has run). Never imports torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from align.config.base import Config, input_fields
from align.config.validation import suggest, validate
from align.errors import UserError
from align.pipeline.registry import STAGES, find_stage
from align.pipeline.stage_kinds import LOOP, stage_of

EVERY = "-*"
MAX_SEED = 2**32


class CarryConfig(Config):
    """What a carried name stands for."""

    first: str
    """Stage above the loop that it is in the first round: the checkpoint to start from."""
    then: str
    """Stage of the block that it is from the second round on: that of the round before."""


class LoopConfig(Config):
    """A block of stages and how often it runs; the same names in every round."""

    rounds: int = Field(ge=1, le=100)
    """How often the block runs; one more leaves finished rounds as they are."""
    carry: dict[str, str | CarryConfig] = Field({})
    """Names that stages of the block read and that change with the round: ``{policy: {first: sft, then: dpo}}``.
    ``{sft: dpo}`` is short for a name that is the first round's stage itself. Without it only the seeds differ."""
    stages: dict[str, dict[str, Any]] = Field(min_length=1)
    """The stages of a round, in order."""
    changes: dict[int, dict[str, dict[str, Any]]] = Field({})
    """What a round sets otherwise, by its number and stage: ``{2: {dpo: {beta: 0.05}}}``."""


@dataclass
class Expanded:
    """Stages without loops, where each is written, and the rounds of those that a loop repeats."""

    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    """Name → its place in the YAML, ``stages.loop.stages.dpo[round 2]``."""
    rounds: dict[str, list[str]] = field(default_factory=dict)
    """Name in a loop → its stages, the first round's first."""

    def resolve(self, name: str) -> str:
        """The stage that a name means: itself, or the last round's."""
        return self.rounds[name][-1] if name in self.rounds and name not in self.stages else name

    def every(self, name: str) -> list[str]:
        """All stages that a name means: itself, or that of each round."""
        return self.rounds[name] if name in self.rounds and name not in self.stages else [name]


def is_loop(name: str, block: Mapping[str, Any]) -> bool:
    """Whether this block of ``stages:`` is a loop: by its name, or by ``stage: loop``."""
    return bool(block.get("stage", name) == LOOP)


def expand(blocks: Mapping[str, dict[str, Any]], where: str, seed: int) -> Expanded:
    """``stages:`` with every loop written out. ``where`` is the file, ``seed`` the pipeline's.

    Raises ``UserError`` for a loop that is not one: unknown keys, a carried name that nothing reads or that does not
    exist, names that clash. What stages themselves get wrong is found later, as everywhere.
    """
    found = Expanded()
    plain = [name for name, block in blocks.items() if not is_loop(name, block)]
    for name, block in blocks.items():
        place = f"stages.{name}"
        if name in plain:
            found.stages[name], found.places[name] = block, place
            continue
        loop = validate(LoopConfig, {key: block[key] for key in block if key != "stage"}, f"{where}: {place}")
        _check_stages(loop, {*plain, *found.stages}, found.rounds, f"{where}: {place}")
        _check_carry(loop, {*plain, *found.stages, *found.rounds}, f"{where}: {place}")
        _check_changes(loop, f"{where}: {place}")
        _write_out(name, loop, found, seed)
    for name in plain:
        found.stages[name] = _renamed(name, blocks[name], found.resolve, lambda text: _every_round(text, found))
    return found


def _check_stages(loop: LoopConfig, taken: set[str], repeated: Mapping[str, list[str]], place: str) -> None:
    """The block's stages are no loops, and neither they nor their rounds have names that are taken."""
    for name, block in loop.stages.items():
        if is_loop(name, block):
            raise UserError(f"{place}.stages.{name}: a loop in a loop; write its rounds into the outer one.")
        stage_of(name, block, f"{place}.stages")
        for made in (name, *(f"{name}-{number}" for number in range(1, loop.rounds + 1))):
            if made in taken or made in repeated:
                of = "of another loop" if name in repeated else "of the pipeline"
                raise UserError(f"{place}.stages.{name}: '{made}' is a stage {of} already; rename one of them.")


def _check_carry(loop: LoopConfig, outside: set[str], place: str) -> None:
    """Every carried name is read in the block, begins with a stage outside and goes on with one of the block."""
    read = [one for name, block in loop.stages.items() for one in _read_names(name, block, loop)]
    unknown = [one for one in read if one not in outside and one not in loop.stages and one not in loop.carry]
    for name, carried in loop.carry.items():
        at = f"{place}.carry.{name}"
        first, then = (name, carried) if isinstance(carried, str) else (carried.first, carried.then)
        if name in loop.stages:
            raise UserError(f"{at}: the block has a stage '{name}' itself; give what is carried another name.")
        if then not in loop.stages:
            raise UserError(f"{at}: there is no stage '{then}' in the loop's block.{suggest(then, loop.stages)}")
        if name not in read:
            raise UserError(f"{at}: no stage of the block reads '{name}'.{suggest(name, unknown)}")
        if first not in outside:
            remedy = suggest(first, outside)
            if isinstance(carried, str):
                remedy = f" Say which one it is in the first round: {{first: STAGE, then: {then}}}."
            raise UserError(f"{at}: there is no stage '{first}' outside of the loop.{remedy}")
        if name in outside and name != first:
            raise UserError(f"{at}: '{name}' is a stage of the pipeline, so here it would be two. Choose a new name.")


def _check_changes(loop: LoopConfig, place: str) -> None:
    for number, changed in loop.changes.items():
        at = f"{place}.changes.{number}"
        if not 1 <= number <= loop.rounds:
            raise UserError(f"{at}: there is no such round; they are 1 to {loop.rounds}.")
        for name in changed:
            if name not in loop.stages:
                raise UserError(f"{at}: there is no stage '{name}' in the loop's block.{suggest(name, loop.stages)}")


def _read_names(name: str, block: Mapping[str, Any], loop: LoopConfig) -> list[str]:
    """Names of what a stage of the block reads, in any round."""
    found = []
    for changed in (block, *(each[name] for each in loop.changes.values() if name in each)):
        for value in _inputs(name, {**block, **changed}).values():
            found += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
    return found


def _inputs(name: str, block: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a block that name stages, as they are written; none where the kind is not known."""
    try:
        config_class = find_stage(block.get("stage", name)).config_class()
    except (KeyError, TypeError, UserError):
        return {}  # refused later, with its place
    return {field_name: block[field_name] for field_name in input_fields(config_class) if field_name in block}


def _write_out(loop_name: str, loop: LoopConfig, found: Expanded, seed: int) -> None:
    """The loop's rounds as plain stages, at the end of what is found so far."""
    made: dict[str, list[str]] = {name: [] for name in loop.stages}
    for number in range(1, loop.rounds + 1):

        def now(name: str, number: int = number) -> str:
            """What a name in the block is in this round."""
            carried = loop.carry.get(name)
            if carried is not None:
                first, then = (name, carried) if isinstance(carried, str) else (carried.first, carried.then)
                return found.resolve(first) if number == 1 else f"{then}-{number - 1}"
            return f"{name}-{number}" if name in loop.stages else found.resolve(name)

        def so_far(text: str) -> list[str] | None:
            name = text.removesuffix(EVERY)
            return list(made[name]) if text.endswith(EVERY) and name in made else _every_round(text, found)

        for name, block in loop.stages.items():
            changed = loop.changes.get(number, {}).get(name, {})
            written = {"stage": name, **copy.deepcopy(block), **copy.deepcopy(changed)}
            written = _renamed(name, written, now, so_far)
            own = written.get("seed", seed)
            if number > 1 and "seed" not in changed and isinstance(own, int) and not isinstance(own, bool):
                written["seed"] = (own + number - 1) % MAX_SEED
            full = f"{name}-{number}"
            found.stages[full] = written
            found.places[full] = f"stages.{loop_name}.stages.{name}" + (f"[round {number}]" if number > 1 else "")
            made[name].append(full)
    found.rounds.update(made)


def _every_round(text: str, found: Expanded) -> list[str] | None:
    """The stages that ``dpo-*`` means, or None for a text that is no such pattern."""
    name = text.removesuffix(EVERY)
    return list(found.rounds[name]) if text.endswith(EVERY) and name in found.rounds else None


def _renamed(
    name: str, block: dict[str, Any], one: Callable[[str], str], several: Callable[[str], list[str] | None]
) -> dict[str, Any]:
    """A copy of a stage's block in which the fields that name stages say the real ones."""
    written = dict(block)
    for field_name, value in _inputs(name, block).items():
        if isinstance(value, str):
            listed = several(value)
            written[field_name] = one(value) if listed is None else listed
        elif isinstance(value, list):
            items: list[Any] = []
            for item in value:
                listed = several(item) if isinstance(item, str) else [item]
                items += [one(item)] if listed is None else listed
            written[field_name] = items
    kind = STAGES.get(str(block.get("stage", name)))
    config_class = kind.config_class() if kind is not None else None
    if config_class is not None and hasattr(config_class, "rename_stages"):
        written = config_class.rename_stages(written, one)
    return written


__all__ = ["LOOP", "CarryConfig", "Expanded", "LoopConfig", "expand", "is_loop"]
