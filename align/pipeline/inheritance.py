"""Fields that follow from earlier stages: fields of the stage that is continued, and default learning rates.

``sft_more: {continue_from: sft, max_steps: 12}`` is ``sft`` with more steps, so it has every field of ``sft`` that it
does not set itself. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from align.config.base import Config
from align.config.stages.continue_from import (
    CONTINUE,
    DATA,
    END,
    LENGTHS,
    ChangedStage,
    awaits_store,
    changed_names,
    changes_in,
    continued_stage,
    end_in,
    fixed_reason,
    must_be_equal,
)
from align.config.stages.training import DefaultRates
from align.config.tuning import FullTuning
from align.config.validation import remedy_for_unknown, suggest, validate
from align.errors import UserError, plain_number
from align.pipeline.registry import STAGES
from align.registry import Stage

CHECKPOINT, COMPLETE = "checkpoint-", "complete.json"
"""Beginning of the name of a checkpoint's folder, before its step, and the file in it that is written last."""
START_FIELDS = ("model", "policy")
"""Fields of the checkpoint that a stage starts from."""


def inherit(blocks: Mapping[str, dict[str, Any]], place: Callable[[str], str]) -> dict[str, dict[str, Any]]:
    """Return the blocks with every continued stage's fields written into those that continue it.

    ``place`` returns a stage's place in the file. Raises ``UserError`` for a stage that is missing, comes later in the
    file, is of another kind, or does not train.
    """
    written: dict[str, dict[str, Any]] = {}
    for name, block in blocks.items():
        where = f"{place(name)}.{CONTINUE}"
        if isinstance(block.get(CONTINUE), Mapping):
            validate(ChangedStage, block[CONTINUE], where)
        source = continued_stage(block)
        written[name] = dict(block)
        if source is None:
            continue
        if source == name:
            raise UserError(f"{where}: '{name}' is the stage itself; name the finished stage that it continues.")
        if source not in blocks:
            raise UserError(f"{where}: there is no stage '{source}'.{suggest(source, blocks)}")
        if source not in written:
            raise UserError(f"{where}: stage '{source}' comes later; move it above '{name}'.")
        # ``written`` also has the fields that the source itself has inherited.
        base = dict(written[source])
        kind = base.pop("stage", source)
        base.pop(CONTINUE, None)
        base.pop(END, None)
        # Without ``stage``, a name that is a kind sets the kind; any other name gets the source's kind.
        kind_here = block.get("stage", name if name in STAGES else kind)
        if kind_here != kind:
            raise UserError(
                f"{where}: '{source}' is a stage of kind {kind} and this is a stage of kind {kind_here}. Only a stage "
                f"of the same kind can continue it; to start from its weights, name it as `{_start_field(kind_here)}`."
            )
        stage = STAGES.get(str(kind))
        if stage is not None and CONTINUE not in stage.config_class().model_fields:
            raise UserError(
                f"{where}: '{source}' is a stage of kind {kind}, which has no trainer's state to continue from. To "
                "train from its weights, start a new run with `model` or `policy` in place of continue_from."
            )
        change = changes_in(block)
        if stage is not None:
            _check_change(where, change, block, stage.config_class())
            _end_source(where, source, end_in(block), written[source], stage.config_class())
        written[name] = {"stage": kind, **base, **change, **block}
    return written


def _end_source(where: str, name: str, end: int | None, source: dict[str, Any], config_class: type[Config]) -> None:
    """Have the stage ``source`` end after ``end`` steps or updates, because another stage continues it there.

    Raises ``UserError`` for an end beyond its own, and for two stages that continue it at different ends.
    """
    if end is None:
        return
    field = "updates" if "updates" in config_class.model_fields else "max_steps"
    length = source.get(field, config_class.model_fields[field].default)
    if isinstance(length, int) and end > length:
        raise UserError(
            f"{where}.at is {end}, and '{name}' ends after {field} {length}. Set a smaller number, or `last`."
        )
    if source.get(END, end) != end:
        raise UserError(
            f"{where}.at is {end}, and '{name}' ends after {source[END]}, where another stage continues it. A stage "
            f"has one end in a pipeline: write the stage '{name}' a second time under another name for the other."
        )
    if end != length:
        source[END] = end


def _check_change(where: str, change: Mapping[str, Any], block: Mapping[str, Any], config_class: type[Config]) -> None:
    """Raise ``UserError`` for a change of a field that there is not, or that the block sets to another value."""
    for name, value in change.items():
        if name not in (*config_class.model_fields, "seed") or name == CONTINUE:
            raise UserError(
                f"{where}.change: unknown key '{name}'. {remedy_for_unknown(name, [config_class])}".rstrip()
            )
        if name in block and block[name] != value:
            raise UserError(
                f"{where}.change.{name} is {value!r}, and the stage itself has {name} {block[name]!r}. Remove one of "
                "them."
            )


def _start_field(kind: Any) -> str:
    stage = STAGES.get(str(kind))
    return (None if stage is None else _weights_field(stage.config_class())) or "model"


def _weights_field(config_class: type[Config]) -> str | None:
    """Return the field that names the checkpoint from which a stage starts."""
    return next((field for field in START_FIELDS if field in config_class.model_fields), None)


class Predecessor(Protocol):
    """An earlier stage of a pipeline."""

    @property
    def stage(self) -> Stage: ...

    @property
    def config(self) -> Config: ...

    @property
    def inputs(self) -> Mapping[str, str | list[str] | None]: ...


def default_rates(
    config: Config,
    start: str,
    nodes: Mapping[str, Predecessor],
    base: Path,
    place: str,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> Mapping[str, float | None]:
    """Return the learning rates that a stage leaves open, for the size of the model of the stage ``start``.

    A critic's rate that the file does not mention is the policy's, None, if the size is not known.

    Training keeps the size, so the models of a pipeline have the size of the first one. It is read from files that the
    key counts, never from the store, so a key does not depend on what has finished. ``sizes`` are parameters of models
    by stage, which come first. Raises ``UserError`` with ``place`` if the size is not known.
    """
    open_rates = config.default_rates(1) if isinstance(config, DefaultRates) else {}
    if not isinstance(config, DefaultRates) or not open_rates:
        return {}
    needed = [field for field in open_rates if field == "learning_rate" or field in config.model_fields_set]
    unknown = dict.fromkeys(open_rates)
    name = start
    while True:
        if name in sizes:
            return config.default_rates(sizes[name])
        node = nodes[name]
        count = node.stage.inspect("parameters")
        if count is not None:
            break
        sources = [node.inputs.get(field) for field in (*START_FIELDS, "base", "policies")]
        names = [source if isinstance(source, str) else source[0] for source in sources if source]
        if not names:
            if not needed:
                return unknown
            raise UserError(
                f"{place}.{needed[0]}: auto needs the number of parameters of '{start}', and stage '{name}' of kind "
                f"{node.stage.kind} does not tell it before it has run. Set {needed[0]}."
            )
        name = names[0]
    try:
        return config.default_rates(count(node.config, base))
    except ValueError as error:
        if not needed:
            return unknown
        raise UserError(
            f"{place}.{needed[0]}: auto needs the number of parameters of '{name}', which is not known: {error}. Set "
            f"{needed[0]}, or make the file known."
        ) from None


@dataclass(frozen=True)
class Settings:
    """Name, config and seed of a stage."""

    name: str
    config: Config
    seed: int


def refuse_changes(place: str, stage: Settings, source: Settings) -> None:
    """Raise ``UserError`` for a stage that changes a fixed field of its source, or has no steps left.

    ``source`` is the stage that it continues; ``place`` is its own place in the file.
    """
    config = stage.config
    for name in changed_names(config):
        reason = fixed_reason(source.config, name) or fixed_reason(config, name)
        if reason is not None:
            raise UserError(
                f"{place}.{CONTINUE}.change: {name} cannot change, because {reason}. Remove {name}"
                f"{_other_way(config, source.name)}."
            )
    values = {name: (getattr(config, name), getattr(source.config, name)) for name in must_be_equal(config)}
    values["seed"] = (stage.seed, source.seed)
    for name, (here, there) in values.items():
        if here != there:
            raise UserError(
                f"{place}.{name} is {_shown(here)} here and {_shown(there)} in '{source.name}', which it continues: "
                f"{_remedy(config, source, name, here)}"
            )
    tuning = getattr(config, "tuning", None)
    if isinstance(tuning, FullTuning) and tuning.scheduled:
        raise UserError(
            f"{place}.{CONTINUE}: tuning.unfreeze and lisa choose the trained weights from all steps of a run, so more "
            f"steps are another run. Remove them{_other_way(config, source.name)}."
        )
    if not awaits_store(config):
        refuse_no_more(place, config, source)


def _remedy(config: Config, source: Settings, name: str, value: Any) -> str:
    """Return how to continue ``source`` although its field ``name`` differs, or why that is not possible."""
    reason = fixed_reason(config, name)
    if reason is not None:
        return f"both must be equal, because {reason}. Remove {name}{_other_way(config, source.name)}."
    change = f"{{{name}: {_shown(value)}}}"
    return (
        f"to change it from there on, write `{CONTINUE}: {{stage: {source.name}, change: {change}}}` in its place"
        f"{_other_way(config, source.name)}."
    )


def refuse_no_more(place: str, config: Config, source: Settings) -> None:
    """Raise ``UserError`` for a stage that is no longer than the stage that it continues, from its last state."""
    end = getattr(source.config, END)
    if end is not None:
        _refuse_before_end(place, config, end)
        return
    lengths = [name for name in LENGTHS if hasattr(config, name)]
    before = {name: getattr(source.config, name) for name in lengths}
    after = {name: getattr(config, name) for name in lengths}
    if any(length_value(after[name]) > length_value(before[name]) for name in lengths):
        return
    # More rows make epochs longer.
    has_other_rows = any(getattr(config, name, None) != getattr(source.config, name, None) for name in DATA)
    if after == before and has_other_rows and "epochs" in lengths:
        return
    settings = ", ".join(f"{name} {plain_number(value)}" for name, value in before.items() if value is not None)
    raise UserError(
        f"{place}: '{source.name}' has {settings} and this stage no more, so nothing is left to train. Lengths count "
        f"from the start of '{source.name}'; set a larger {' or '.join(lengths)}, below the stage's name or in "
        f"`change` of {CONTINUE}."
    )


def _refuse_before_end(place: str, config: Config, end: int) -> None:
    field = "updates" if hasattr(config, "updates") else "max_steps"
    if length_value(getattr(config, field)) <= end:
        raise UserError(
            f"{place}: {field} is {getattr(config, field)}, and it continues after {end}; set larger {field}."
        )


def length_value(value: float | None) -> float:
    """Return a length of training as a number; None is no limit."""
    return float("inf") if value is None else float(value)


def _shown(value: Any) -> str:
    if isinstance(value, Config):
        settings = value.model_dump(exclude_defaults=True)
        if hasattr(value, "method"):
            settings = {"method": value.method, **settings}
        return f"{{{', '.join(f'{name}: {setting}' for name, setting in settings.items())}}}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()  # as YAML writes it
    return repr(value)


def _other_way(config: Config, source: str) -> str:
    field = _weights_field(type(config))
    if field is None or getattr(config, "has_vocabulary", True) is False:
        return ""
    return f", or start a new run from its weights with `{field}: {source}` in place of {CONTINUE}"


def with_end(parts: Mapping[str, Any], end: int | None) -> dict[str, Any]:
    """Return the parts of a stage's key with another ``end_after``."""
    config = {name: value for name, value in parts["config"].items() if name != END}
    return {**parts, "config": config | ({} if end is None else {END: end})}
