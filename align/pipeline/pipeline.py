"""YAML → checked, ordered stages with their keys.

``Pipeline`` is immutable: ``set`` returns a copy. Loading checks everything that can be checked without
running: names, types, ranges, order, artifact kinds, files. Never imports torch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from pydantic import Field, create_model, field_validator

from align.config.base import Config, PrecisionSetting, input_fields, input_names, names_in_block, settings_for_key
from align.config.runtime import Runtime, StageRuntime
from align.config.stages.continue_from import CONTINUE, changes_in
from align.config.synonyms import KINDS
from align.config.user_functions import add_module_folder
from align.config.validation import suggest, validate
from align.errors import UserError, redact, shorten, with_article
from align.pipeline.executors import choose_executor, in_long_forms, objection_to_stage, refuse_contradiction
from align.pipeline.file import Overrides, complete_values, read_pipeline_file, settle_pipeline
from align.pipeline.inheritance import START_FIELDS, Settings, default_rates, inherit, refuse_changes
from align.pipeline.loops import expand
from align.pipeline.overrides import apply_overrides, parse_assignment
from align.pipeline.registry import NAME_PATTERN, STAGES, stage_of
from align.registry import Stage
from align.store.artifacts import Kind
from align.store.fingerprint import digest


class PipelineConfig(Config):
    """The top level of a pipeline file."""

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the run: what ``align gc`` keeps and what ``align explain`` compares with."""
    description: str = ""
    """Free text for the report."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Every random choice of every stage follows from it."""
    precision: PrecisionSetting | None = None
    """Type of the matrix products of every stage that sets none itself; by default each stage's own default, auto."""
    runtime: Runtime = Runtime()
    """Machine, engine and store settings of the pipeline; they change no result and no key."""

    @field_validator("name", mode="before")
    @classmethod
    def _name_can_be_written(cls, name: object) -> object:
        """Refuse a name that is not allowed, with the nearest name that is."""
        if not isinstance(name, str) or re.fullmatch(NAME_PATTERN, name):
            return name
        # The suggestion must not repeat a password that the message hides.
        allowed = re.sub(r"[^A-Za-z0-9_-]+", "_", redact(name)).strip("_")[:64]
        allowed = allowed if allowed[:1].isalpha() else f"run_{allowed}"[:64].rstrip("_")
        rule = "letters, digits, - and _, at most 64, beginning with a letter"
        raise ValueError(f"expected {rule}; found {shorten(repr(name))}. Write `name: {allowed}`.")

    stages: dict[str, dict[str, Any]] = Field(min_length=1)
    """The stages in order; a name that is a stage kind needs no ``stage:``. A ``loop`` among them repeats some."""


@dataclass(frozen=True)
class Node:
    """One stage of a pipeline, checked: ``inputs`` maps a config field to a stage name, a list of them, or None."""

    name: str
    stage: Stage
    config: Config
    seed: int
    inputs: dict[str, str | list[str] | None]
    makes: Kind
    identities: dict[str, str]
    key: str
    parts: dict[str, Any] = field(repr=False)
    """Parts of the key; stored in the record to compare two keys field by field."""

    @property
    def input_names(self) -> list[str]:
        """Names of all stages that this stage reads, in config order, without repeats."""
        names_read: list[str] = []
        for value in self.inputs.values():
            names = [value] if isinstance(value, str) else value or []
            names_read += [name for name in names if name not in names_read]
        return names_read


class Pipeline:
    """A pipeline file with overrides applied, checked and ordered."""

    def __init__(
        self,
        raw: Mapping[str, Any],
        where: str = "pipeline",
        base: Path | None = None,
        rounds: Mapping[str, list[str]] | None = None,
        sizes: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        """Check ``raw`` (the parsed YAML); relative paths in it start at ``base``, by default the current folder.

        Texts that are marked with their file (``align.config.user_paths``) start at its folder. ``rounds`` are the
        rounds of loops that ``raw`` has written out already. ``sizes`` are parameters of models that are not on this
        machine, by stage.
        """
        self.where = where
        self.base = base or Path.cwd()
        add_module_folder(Path(where))
        self.raw: dict[str, Any] = settle_pipeline(in_long_forms(copy.deepcopy(dict(raw))), self.base, where)
        _refuse_stages_at_top(self.raw, where)
        self.config = validate(PipelineConfig, self.raw, where, _stage_at_top(self.raw))
        # Loops are expanded first, so the code below sees only plain stages.
        self.expanded = expand(self.config.stages, where, self.config.seed)
        self.expanded.rounds.update(rounds or {})
        self.expanded.stages = inherit(self.expanded.stages, self._place)
        self.sizes = sizes
        self.nodes: dict[str, Node] = {}
        self.runtimes: dict[str, Runtime] = {}
        """The runtime of each stage: ``runtime`` with the stage's own part of it."""
        self.pins: dict[str, dict[str, Any]] = {}
        """Fields that the file leaves open and their values, such as a Hub model's commit or a learning rate."""
        kinds = {name: stage_of(name, block, f"{where}: stages") for name, block in self.expanded.stages.items()}
        # Check all keys and values first, to find a mistake in the last stage even if the first stage's file is
        # missing.
        checked = {name: self._validated(name, stage) for name, stage in kinds.items()}
        # Keep the file's order: a stage's key contains the keys of its inputs, which must be above it.
        for name, (config, seed) in checked.items():
            self.nodes[name] = self._build(name, config, seed, kinds)
        self.runtimes = self._runtimes()

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: Overrides = (),
        on: str | None = None,
        warn: Callable[[str], None] = lambda message: None,
        sizes: Mapping[str, int] = MappingProxyType({}),
    ) -> Self:
        """Load and check a pipeline file.

        ``on`` is the executor to use instead of the file's; ``warn`` gets a line if fields of the file's executor are
        dropped. ``overrides`` are applied before anything is checked, so they can supply what the file lacks:
        ``["stages.ppo.kl_coef=0.1"]`` or ``{"stages.ppo.kl_coef": 0.1}``. ``sizes`` are as in the constructor. Raises
        ``UserError`` with the file, the place in it and the remedy.
        """

        def choose(raw: dict[str, Any]) -> None:
            if on is not None:
                choose_executor(raw, on, warn)

        raw = read_pipeline_file(Path(path), overrides, PipelineConfig.model_fields, choose)
        pipeline = cls(raw, str(path), sizes=sizes)
        refuse_contradiction(pipeline.config.runtime, on)
        return pipeline

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], base: str | Path | None = None, overrides: Overrides = ()) -> Self:
        """Check a pipeline that is written as a dictionary, with the keys of a pipeline file.

        Equals what ``load`` makes of the same values in a file of the folder ``base`` (default: the current one), where
        the path of ``extends`` starts; the stages have the same keys. Tuples, paths and numbers of numpy become what
        YAML has for them. ``overrides`` are as of ``load``. Raises ``UserError`` with the place and the remedy.
        """
        place = "pipeline"
        folder = Path() if base is None else Path(base)
        return cls(complete_values(values, place, folder, overrides, PipelineConfig.model_fields), place)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.config.name

    @property
    def plain(self) -> dict[str, Any]:
        """The same pipeline as parsed YAML with every loop written out."""
        return {**self.raw, "stages": copy.deepcopy(self.expanded.stages)}

    @property
    def resolved(self) -> dict[str, Any]:
        """The parsed YAML with what its stages name pinned; loops stay loops, whose stages are pinned in each run."""
        stages = copy.deepcopy(self.config.stages)
        for name, fields in self.pins.items():
            if name in stages:
                stages[name] |= fields
        return {**self.raw, "stages": stages}

    @property
    def references(self) -> dict[str, dict[str, str]]:
        """Kind and key of every stage, by its name."""
        return {node.name: {"kind": node.stage.kind, "key": node.key} for node in self}

    def touched_by(self, only: str | None) -> set[str]:
        """Stages that a run makes or reads: all, or ``only`` that one and its inputs."""
        name = None if only is None else self.resolve(only)
        return set(self.nodes) if name not in self.nodes else {name, *self.nodes[name].input_names}

    def resolve(self, name: str) -> str:
        """Return the stage that a name means: for a stage of a loop, its last round."""
        return self.expanded.resolve(name)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def set(self, *assignments: str, **values: Any) -> Self:
        """A new pipeline with fields changed.

        Accepts ``"stages.ppo.kl_coef=0.1"`` (as ``--set`` does), ``("stages.ppo.kl_coef", 0.1)`` as two positional
        arguments, or keywords with ``__`` for dots: ``set(stages__ppo__kl_coef=0.1)``.
        """
        # Python allows no dots in keyword names, so ``stages__ppo__kl_coef`` stands for the path.
        pairs = [(key.replace("__", "."), value) for key, value in values.items()]
        # ``set(path, value)`` and ``set("a=1", "b=2")`` both have two arguments; the equals sign tells them apart.
        if len(assignments) == 2 and "=" not in assignments[0]:
            pairs.append((assignments[0], assignments[1]))
        else:
            pairs += [parse_assignment(text) for text in assignments]
        return self._with(pairs)

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """A new pipeline with many fields changed: path → value, in that order."""
        return self._with(changes.items())

    def _with(self, pairs: Iterable[tuple[str, Any]]) -> Self:
        raw = copy.deepcopy(self.raw)
        apply_overrides(raw, pairs, PipelineConfig.model_fields)
        return type(self)(raw, self.where, self.base)

    def _place(self, name: str) -> str:
        return f"{self.where}: {self.expanded.places[name]}"

    def _validated(self, name: str, stage: Stage) -> tuple[Config, int]:
        """The stage's block as its config, and its seed."""
        block = dict(self.expanded.stages[name])
        block.pop("stage", None)
        # ``seed`` and ``stage`` belong to the pipeline, not to the config of the kind.
        seed = block.pop("seed", self.config.seed)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise UserError(f"{self._place(name)}.seed: should be a whole number from 0 to 2**32-1; found {seed!r}.")
        config_class = stage.config_class()
        if self.config.precision is not None and "precision" in config_class.model_fields:
            block.setdefault("precision", self.config.precision)
        try:
            return validate(config_class, block, self._place(name)), seed
        except UserError as error:
            change = changes_in(block)
            if change:
                raise UserError(_place_changes(str(error), self._place(name), change)) from None
            # Once more with ``seed`` as a field, only for its message: ``sed: 1`` then suggests ``seed``.
            if "seed" not in config_class.model_fields:
                validate(_with_seed(config_class), block, self._place(name))
            raise

    def _runtimes(self) -> dict[str, Runtime]:
        """Return each stage's runtime; ``UserError`` for a name below ``runtime.stages`` that is no stage's."""
        names = {*self.expanded.stages, *self.expanded.rounds}
        for name in self.config.runtime.stages:
            if name not in names:
                raise UserError(f"{self.where}: runtime.stages: there is no stage '{name}'.{suggest(name, names)}")
        runtimes = {}
        continued = {node.inputs.get(CONTINUE) for node in self}
        for name in self.nodes:
            # The stage's own block comes before the block of its loop's stage.
            block_names = dict.fromkeys([name, self.expanded.without_round(name)])
            runtimes[name] = self.config.runtime.for_stage(*block_names, where=f"{self.where}: runtime.stages")
            # A later stage needs this stage's trainer state, whatever the file says about keeping it.
            if name in continued:
                runtimes[name] = runtimes[name].model_copy(update={"keep_state": True})
            blocks = self.config.runtime.stages
            stage_runtime = next((blocks[block] for block in block_names if block in blocks), None)
            self._check_runtime(self.nodes[name], runtimes[name], stage_runtime)
        return runtimes

    def _check_runtime(self, node: Node, runtime: Runtime, stage_runtime: StageRuntime | None) -> None:
        """Check a stage's runtime; ``stage_runtime`` is its own block, if it has one."""
        self._check_launch(node, runtime, stage_runtime)
        # 1. A stage names another executor than the run's only for the tasks of its data build.
        overrides = None if stage_runtime is None else stage_runtime.executor
        objection = objection_to_stage(node.stage.kind, self.config.runtime, runtime, overrides)
        if objection is not None:
            raise UserError(f"{self.where}: runtime.stages.{node.name}.executor: {objection}")
        # 2. The servers of a stage must be able to load new weights at the time that its ``in_flight`` sets.
        check = getattr(node.config, "sampling_objection", None)
        objection = None if check is None else check(runtime.rollouts)
        if objection:
            raise UserError(f"{self._place(node.name)}.in_flight: {objection}")

    def _check_launch(self, node: Node, runtime: Runtime, stage_runtime: StageRuntime | None) -> None:
        """Check that a stage with several processes trains at all, and that its batches can be split among them."""
        has_own_launch = stage_runtime is not None and stage_runtime.launch is not None
        place = f"{self.where}: runtime.{f'stages.{node.name}.' if has_own_launch else ''}launch"
        if not node.stage.distributed:
            if has_own_launch:
                raise UserError(
                    f"{place}: a stage of kind {node.stage.kind} trains nothing and runs in one process; remove it."
                )
            return
        check = getattr(node.config, "processes_objection", None)
        objection = check(runtime.launch) if check is not None else None
        if objection:
            raise UserError(f"{place}: stage '{node.name}': {objection}")

    def _build(self, name: str, config: Config, seed: int, kinds: dict[str, Stage]) -> Node:
        """Check what the stage reads, and work out its key."""
        stage = kinds[name]
        config_class = stage.config_class()
        # 1. The stages that it reads: are they there, above it, and of a kind that fits?
        inputs = {field_name: input_names(config, field_name) for field_name in input_fields(config_class)}
        self._check_inputs(name, config_class, inputs, kinds)
        # The short form of `continue_from` and its block name the same input.
        continued = inputs.pop(f"{CONTINUE}.stage", None)
        if continued is not None:
            inputs[CONTINUE] = continued
        # 2. Default learning rates, which follow from the size of the model: the key holds their values.
        start = next((inputs[field_name] for field_name in START_FIELDS if field_name in inputs), None)
        if isinstance(start, str):
            rates = default_rates(config, start, self.nodes, self.base, self._place(name), self.sizes)
            config = self._pin(name, config, config.model_copy(update=rates))
        # 3. A stage that continues another stage may change only some of that stage's fields.
        continued = inputs.get(CONTINUE)
        if isinstance(continued, str):
            source = self.nodes[continued]
            before = Settings(source.name, source.config, source.seed)
            refuse_changes(self._place(name), Settings(name, config, seed), before)
        # 4. What it reads outside the store: pin names, such as a Hub model to a commit, and digest files.
        with self._saying_where(name):
            config = self._pin(name, config, stage.pinned(config, self.base))
            makes = stage.makes_with(config)
            identities = stage.identities(config, self.base)
        # 5. The key: a digest of what decides the result.
        parts = self._key_parts(stage, config, seed, inputs, identities)
        try:
            key = digest(parts)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self._place(name)}: {str(error).removeprefix('$.config.')}.") from None
        return Node(name, stage, config, seed, inputs, makes, identities, key, parts)

    def _pin(self, name: str, config: Config, pinned: Config) -> Config:
        """Return ``pinned``, a stage's config with fields filled in, and note these fields."""
        before, after = config.model_dump(mode="json"), pinned.model_dump(mode="json")
        fields = {field: value for field, value in after.items() if value != before[field]}
        if fields:
            self.pins[name] = {**self.pins.get(name, {}), **fields}
            # A cluster's jobs read the plain pipeline, and must not resolve the names again.
            block = {**self.expanded.stages[name], **fields}
            if changes_in(block):
                pinned_change = {field: block[field] for field in changes_in(block)}
                block[CONTINUE] = {**block[CONTINUE], "change": pinned_change}
            self.expanded.stages[name] = block
        return pinned

    @contextlib.contextmanager
    def _saying_where(self, name: str) -> Iterator[None]:
        """Have errors of what a stage names, and of the system that looks for it, begin with the stage's place."""
        place = self._place(name)
        try:
            yield
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith(place) else f"{place}: {text}") from None
        except OSError as error:
            file = "" if error.filename is None else f"{shorten(str(error.filename))}: "
            raise UserError(f"{place}: {file}{error.strerror or error}.") from None

    def _check_inputs(
        self, name: str, config_class: type[Config], inputs: Mapping[str, Any], kinds: dict[str, Stage]
    ) -> None:
        for field_name, accepted in input_fields(config_class).items():
            value = inputs[field_name]
            for target in [value] if isinstance(value, str) else value or []:
                place = f"{self._place(name)}.{field_name}"
                if target not in kinds:
                    raise UserError(f"{place}: there is no stage '{target}'.{suggest(target, kinds)}")
                # Nodes are built in order, so a target without a node is below, or closes a circle.
                if target not in self.nodes:
                    cycle = self._cycle(name, target, kinds)
                    if cycle:
                        raise UserError(f"{place}: stages go in a circle: {' → '.join(cycle)}. Remove one link.")
                    raise UserError(f"{place}: stage '{target}' comes later; move it above '{name}', which reads it.")
                kind_made = self.nodes[target].makes
                if kind_made not in accepted.kinds:
                    fitting = [node.name for node in self.nodes.values() if node.makes in accepted.kinds]
                    node = self.nodes[target]
                    advice = node.stage.remedy(node.config, self.base, accepted.kinds) or "Add such a stage above it."
                    remedy = f"Point it at '{fitting[-1]}'." if fitting else advice
                    needs = with_article(" or ".join(accepted.kinds))
                    raise UserError(
                        f"{place} points at '{target}', {with_article(kind_made)}; "
                        f"{kinds[name].kind} needs {needs} there. {remedy}"
                    )

    def _cycle(self, name: str, target: str, kinds: dict[str, Stage]) -> list[str] | None:
        """Return the circle of stages that leads from ``target`` back to ``name``, if there is one."""
        # Depth-first search along the inputs as written; ``visited`` ends it in circles that do not contain ``name``.
        path, visited = [name], {name}

        def follow(stage_name: str) -> bool:
            path.append(stage_name)
            if stage_name == name:
                return True
            if stage_name not in visited and stage_name in kinds:
                visited.add(stage_name)
                block = self.expanded.stages[stage_name]
                fields = input_fields(kinds[stage_name].config_class())
                if any(follow(following) for field in fields for following in names_in_block(block, field)):
                    return True
            # This stage does not lead to ``name``.
            path.pop()
            return False

        return path if follow(target) else None

    def _key_parts(
        self, stage: Stage, config: Config, seed: int, inputs: Mapping[str, Any], identities: dict[str, str]
    ) -> dict[str, Any]:
        """Return the parts of the key. A single input's name is dropped; in a list names are labels, so they stay."""
        # Fields with an identity count by content: a renamed file leaves the key as it is, an edited file changes it.
        settings = settings_for_key(config, config.model_dump(mode="python", exclude=config.fields_outside_key()))
        keys: dict[str, Any] = {}
        for field_name, value in inputs.items():
            if isinstance(value, str):
                # The input's key replaces its name, so renaming a stage does not run stages again. An input within a
                # block is not part of the block's identity.
                if "." not in field_name:
                    settings.pop(field_name)
                keys[field_name] = self.nodes[value].key
            elif value is not None:
                keys[field_name] = [self.nodes[item].key for item in value]
        return {
            "stage": stage.kind,
            "version": stage.version,
            "config": settings,
            "seed": seed,
            "inputs": keys,
            "identities": identities,
        }


def _place_changes(message: str, place: str, change: Mapping[str, Any]) -> str:
    """Return an error of a stage's fields with the places of those that ``change`` of ``continue_from`` sets."""
    for field_name in change:
        message = re.sub(rf"{re.escape(place)}\.{field_name}\b", f"{place}.{CONTINUE}.change.{field_name}", message)
    return message


def _refuse_stages_at_top(raw: Mapping[str, Any], where: str) -> None:
    names = [f"'{key}'" for key, block in raw.items() if key in STAGES and isinstance(block, Mapping)]
    if names:
        raise UserError(f"{where}: {', '.join(names)} at the top of the file; write stages below `stages:`, indented.")


def _stage_at_top(raw: Mapping[str, Any]) -> type[Config] | None:
    """Return the config of the stage that a file of LLaMA-Factory (``stage: rm``) or axolotl (``rl: dpo``) trains."""
    word = raw.get("stage", raw.get("rl"))
    stage = STAGES.get(KINDS.get(word, word)) if isinstance(word, str) else None
    return stage.config_class() if stage else None


@functools.cache  # pydantic looks through every loaded module for each class it makes
def _with_seed(config_class: type[Config]) -> type[Config]:
    """Return the config with a field ``seed``, so the remedy for a misspelled ``seed`` names it."""
    return create_model(config_class.__name__, __base__=config_class, seed=(int | None, None))
