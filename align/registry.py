"""Everything that align can be extended by: one record type for each kind of addition, and the records that are here.

align's own records are in ``align.core``. An extension is a folder of ``align/extensions``, or a distribution with an
entry point in the group ``align.extensions``; each has one ``EXTENSION``, which lists what it adds. Records name code
by import path, so that reading them imports none of it: ``align --help`` reads all records.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from align.errors import UserError
from align.store.artifacts import Kind

GROUP = "align.extensions"
"""Group of entry points, and package of align's own extensions."""
FOLDER = Path(__file__).with_name("extensions")
CORE = "core"
"""Name of align's own record."""


class NoModule(UserError):
    """There is no module of that name."""


def load(path: str) -> Any:
    """Import ``package.module:name``, or the module of a path without a name.

    Raises ``NoModule`` when there is no such module, ``UserError`` when it has no such name.
    """
    module, _, name = path.partition(":")
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # The dots keep ``my`` from matching ``mypackage``.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise NoModule(f"'{path}': there is no module '{error.name}' here or installed.") from None
    if name and not hasattr(imported, name):
        close = [f" Did you mean '{near}'?" for near in difflib.get_close_matches(name, dir(imported), n=1)]
        raise UserError(f"'{path}': {module} has no '{name}'.{''.join(close)}")
    return getattr(imported, name) if name else imported


# ---- what an extension may add -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """One kind of stage.

    ``config`` and ``run`` are import paths (``module:name``), so listing stages does not import them. ``version`` is
    bumped when the same config should now give another result. ``makes`` is an artifact kind, or ``None`` when the
    config class decides with a method ``makes() -> Kind``. A config class may also have ``identities(base: Path) ->
    dict[str, str]``, the digests or pinned revisions of everything outside the store that the stage reads (``base`` is
    the folder relative paths start from); a missing file raises ``UserError``.
    """

    kind: str
    version: int
    makes: Kind | None
    config: str
    run: str
    purpose: str
    path: str = ""
    """Import path of this record itself (``module:NAME``), for a stage that no extension adds."""
    distributed: bool = False
    """True if several processes may run ``run`` at once (``runtime.launch``), as ranks of torch.distributed."""
    samples: bool = False
    """True if ``run`` opens an engine that samples responses."""
    estimator: str | None = None
    """Import path of the module that estimates memory: ``estimate(config, models, runtime)`` and ``job`` with the same
    arguments for a kind that trains, ``inference(config, models)`` for a kind that samples or scores."""
    inspector: str | None = None
    """Import path of the module that inspects a config's sources outside the store, if the config cannot do that
    itself: ``pinned(config, base)``, ``identities(config, base)``, ``makes(config)``, ``architecture(config, base)``,
    ``plan_warnings(config, base)``, ``remedy(config, base, kinds)``; each is optional."""
    headline: Mapping[str, str] | None = field(default=None, hash=False)
    """Metrics of a finished stage that its closing line in a terminal shows: name → label. None shows the first
    numbers that there are."""
    lint: str | None = None
    """Import path of the ``RowEncoding`` (``align.lint.encodings``) by which the linter reads rows as the kind does, in
    ``lint_stage`` and ``align data lint --kind``. None for a kind that trains on no rows with turns."""
    card_verb: str | None = None
    """Past participle with which a model card says what the kind did to the weights, as in "fine-tuned on responses".
    None for a kind that makes no weights."""

    @property
    def name(self) -> str:
        """The kind, by which the stage is found."""
        return self.kind

    def makes_with(self, config: Any) -> Kind:
        """Return the kind of artifact that the stage makes with this config."""
        if self.makes is not None:
            return self.makes
        decide = self.inspect("makes")
        kind: Kind = config.makes() if decide is None else decide(config)
        return kind

    def pinned(self, config: Any, base: Path) -> Any:
        """Return the config with the fields filled in that pin what it names, such as the commit of a Hub model.

        Raises ``UserError`` for what is missing.
        """
        pin = self.inspect("pinned")
        return config if pin is None else pin(config, base)

    def identities(self, config: Any, base: Path) -> dict[str, str]:
        """Return digests or pinned revisions of everything that the stage reads outside the store.

        Relative paths start at ``base``. Raises ``UserError`` for what is missing.
        """
        identify = self.inspect("identities")
        if identify is not None:
            return dict(identify(config, base))
        identities: dict[str, str] = config.identities(base) if hasattr(config, "identities") else {}
        evaluation = getattr(config, "evaluate", None)
        if evaluation is not None:
            identities |= load("align.evaluation.tasks:training_identities")(evaluation, base)
        return identities

    def remedy(self, config: Any, base: Path, kinds: Sequence[Kind]) -> str:
        """Return a sentence on how the stage would make an artifact of ``kinds`` instead, or an empty text."""
        advise = self.inspect("remedy")
        return "" if advise is None else advise(config, base, kinds)

    def inspect(self, name: str) -> Callable[..., Any] | None:
        """Import the inspector's function ``name``; None if the kind has no inspector with such a function."""
        return None if self.inspector is None else getattr(load(self.inspector), name, None)

    def config_class(self) -> Any:
        """Import the config class, an ``align.config.base.Config``; never imports torch."""
        return load(self.config)

    @property
    def trainer_class(self) -> str | None:
        """Import path of the class that accepts the options under ``trainer:``; None for a kind without such options.

        The config class names it, because it checks the options.
        """
        config = self.config_class()
        return getattr(config, "trainer_class", None) if "trainer" in config.model_fields else None

    def runner(self) -> Callable[[Any], dict[str, Any]]:
        """Import the stage's ``run``; called only in the stage's own process."""
        run: Callable[[Any], dict[str, Any]] = load(self.run)
        return run


@dataclass(frozen=True)
class Command:
    """One command, with its line in ``align --help``."""

    name: str
    purpose: str
    code: str
    """Import path of a module or an object with ``run(options) -> int`` and ``add_arguments(parser)``."""
    works: bool = False
    """True if the command continues when its output cannot be written any more."""


@dataclass(frozen=True)
class Task:
    """One kind of evaluation task."""

    name: str
    settings: str
    """Import path of its class of settings, a ``TaskConfig``. Torch-free."""
    code: str
    """Import path of the module with ``build(name, config, inputs)``, which reads the items. It is called once, before
    anything expensive starts, and raises ``UserError`` for data that does not fit."""
    identities: str = ""
    """Import path of a function ``(config, base)``, which returns the digests of inputs outside the store; by default
    those of the files that its settings name."""


@dataclass(frozen=True)
class Step:
    """One kind of step of a data recipe."""

    name: str
    settings: str
    """Import path of its class of settings; empty for a step that recipes do not write."""
    code: str
    """Import path of the class of the ``RowStep`` or ``TableStep``, made from its settings and a ``StepContext``. It
    loads models and tokenizers, and raises ``UserError`` for a missing model or tokenizer."""
    needs_all_rows: bool = False
    """True for a ``TableStep``, which decides over the sketches of all rows."""
    runs_model: bool = False
    """True for a step that uses all cores or a GPU, and so must not run in several processes at once."""
    identities: str = ""
    """Import path of a function for ``step_identities``; without one, the step reads only the rows."""


@dataclass(frozen=True)
class Score:
    """A short name of a function that scores responses, for ``score:`` and ``metrics:``."""

    name: str
    function: str
    """Import path, ``module:function``."""


@dataclass(frozen=True)
class View:
    """A view of the studio, with its title in the navigation.

    Its JavaScript module is ``views/NAME.js`` in the folder ``static`` next to its Python module.
    """

    name: str
    title: str
    code: str
    """Import path of the module with ``create_router(context: StudioContext) -> APIRouter``."""


@dataclass(frozen=True)
class Topic:
    """Blocks of YAML that do not belong to one stage: a word of ``align fields``, and a page of the reference."""

    name: str
    title: str
    purpose: str
    blocks: tuple[str, ...]
    """Import paths of the blocks' classes, or of unions of them."""


@dataclass(frozen=True)
class Adapter:
    """A project whose environments ``environment:`` may name, by the field that names one."""

    name: str
    """Field of ``align.config.environment.EnvironmentConfig``."""
    code: str
    """Import path of a function ``(config, place) -> EnvironmentSource``, which raises ``UserError``."""


@dataclass(frozen=True)
class Format:
    """A format of ``align export``."""

    name: str
    code: str
    """Import path of a ``Writer`` (``align.cli.export_formats``)."""


Addition = Stage | Command | Task | Step | Score | View | Topic | Adapter | Format
Point = TypeVar("Point", Stage, Command, Task, Step, Score, View, Topic, Adapter, Format)


@dataclass(frozen=True)
class Extension:
    """The purpose of an extension, and everything that it adds."""

    purpose: str
    adds: tuple[Addition, ...]


# ---- what is here --------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Extensions by name, align's core first, and the errors of those that did not load."""

    extensions: dict[str, Extension] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, find: Callable[[], object]) -> None:
        """Add an extension, or note why it cannot be used."""
        try:
            extension = find()
            if not isinstance(extension, Extension):
                raise TypeError(f"it is a {type(extension).__name__}, not an align.registry.Extension")
            known = {(type(added), added.name): owner for owner, added in self.additions()}
            for added in extension.adds:
                owner = known.get((type(added), added.name))
                if owner is not None:
                    raise ValueError(f"{owner} has the {type(added).__name__.lower()} '{added.name}' already")
            self.extensions[name] = extension
        except Exception as error:  # whatever it is: everything else must work
            self.failures[name] = f"{type(error).__name__}: {error}"

    def additions(self) -> Iterator[tuple[str, Addition]]:
        """Yield the records of all extensions, each with the extension's name."""
        for name, extension in self.extensions.items():
            yield from ((name, added) for added in extension.adds)


@cache
def found() -> Found:
    """Find the extensions in ``align/extensions`` and in other distributions."""
    here = Found({CORE: load("align.core").EXTENSION})
    for module in pkgutil.iter_modules([str(FOLDER)], f"{GROUP}."):
        here.add(module.name.rpartition(".")[2], partial(_read_record, module.name))
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        here.add(entry.name, entry.load)
    return here


def _read_record(module: str) -> object:
    return load(module).EXTENSION


def registered(point: type[Point]) -> dict[str, Point]:
    """Return the records of one type by name: those of the core in its order, then those of extensions."""
    return {added.name: added for _, added in found().additions() if isinstance(added, point)}


def loaded(point: type[Point], path: Callable[[Point], str]) -> dict[str, Any]:
    """Return the object behind an import path of each record of one type, by the record's name.

    An extension whose code does not import is noted as a failure, and its record is missing.
    """
    objects: dict[str, Any] = {}
    for owner, added in found().additions():
        if not isinstance(added, point) or not path(added):
            continue
        try:
            objects[added.name] = load(path(added))
        except Exception as error:
            if owner == CORE:
                raise
            found().failures[owner] = f"{type(error).__name__}: {error}"
    return objects


def failure_note() -> str:
    """Return a sentence on the extensions that did not load, for messages about unknown names; empty without any."""
    failures = [f"{name} ({error})" for name, error in found().failures.items()]
    return f" These extensions did not load: {', '.join(failures)}." if failures else ""
