"""The description of a stage, all stages of align (``stages.yaml``), and the stage that a YAML block names.

Torch-free: a stage's ``run`` is named by import path and imported only in the stage's own process.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.config.base import Config
from align.config.user_functions import search_module_folders
from align.config.validation import hint_nearest, nearest, suggest
from align.errors import UserError, shorten, with_article
from align.pipeline.context import StageContext
from align.store.artifacts import Kind
from align.store.record import NAME

try:  # thirty times as fast, if PyYAML was built with libyaml
    from yaml import CSafeLoader as Loader
except ImportError:
    from yaml import SafeLoader as Loader  # type: ignore[assignment]


TASKS = "align.evaluation.tasks"
"""The package of evaluation tasks, which imports this one and is therefore loaded by name."""


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
    """Import path of this record itself (``module:NAME``), for a stage that is not in ``STAGES``."""
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

    def makes_with(self, config: Config) -> Kind:
        """Return the kind of artifact that the stage makes with this config."""
        if self.makes is not None:
            return self.makes
        decide = self.inspect("makes")
        return config.makes() if decide is None else decide(config)  # type: ignore[attr-defined, no-any-return]

    def pinned(self, config: Config, base: Path) -> Config:
        """Return the config with the fields filled in that pin what it names, such as the commit of a Hub model.

        Raises ``UserError`` for what is missing.
        """
        pin = self.inspect("pinned")
        return config if pin is None else pin(config, base)  # type: ignore[no-any-return]

    def identities(self, config: Config, base: Path) -> dict[str, str]:
        """Return digests or pinned revisions of everything that the stage reads outside the store.

        Relative paths start at ``base``. Raises ``UserError`` for what is missing.
        """
        identify = self.inspect("identities")
        if identify is not None:
            return identify(config, base)  # type: ignore[no-any-return]
        identities: dict[str, str] = config.identities(base) if hasattr(config, "identities") else {}
        evaluation = getattr(config, "evaluate", None)
        if evaluation is not None:
            identities |= importlib.import_module(TASKS).training_identities(evaluation, base)
        return identities

    def remedy(self, config: Config, base: Path, kinds: Sequence[Kind]) -> str:
        """Return a sentence on how the stage would make an artifact of ``kinds`` instead, or an empty text."""
        advise = self.inspect("remedy")
        return "" if advise is None else advise(config, base, kinds)

    def inspect(self, name: str) -> Callable[..., Any] | None:
        """Import the inspector's function ``name``; None if the kind has no inspector with such a function."""
        return None if self.inspector is None else getattr(importlib.import_module(self.inspector), name, None)

    def config_class(self) -> type[Config]:
        """Import the config class; never imports torch."""
        return load_object(self.config)  # type: ignore[no-any-return]

    @property
    def trainer_class(self) -> str | None:
        """Import path of the class that accepts the options under ``trainer:``; None for a kind without such options.

        The config class names it, because it checks the options.
        """
        config = self.config_class()
        return getattr(config, "trainer_class", None) if "trainer" in config.model_fields else None

    def runner(self) -> Callable[[StageContext], dict[str, Any]]:
        """Import the stage's ``run``; called only in the stage's own process."""
        return load_object(self.run)  # type: ignore[no-any-return]


def load_object(path: str) -> Any:
    """Import ``package.module:name``, also from the current folder and from YAML files' folders.

    Raises ``UserError`` when there is no such module or name.
    """
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), name]):
        raise UserError(f"'{shorten(path)}' is not an import path; write package.module:name.")
    search_module_folders()
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        # The dots keep ``my`` from matching ``mypackage``.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        if str(Path.cwd()) in sys.path:
            raise UserError(f"'{path}': there is no module '{error.name}' here or installed.") from None
        # Append the folder, because a file of the user's must not hide an installed module.
        sys.path.append(str(Path.cwd()))
        return load_object(path)
    if not hasattr(imported, name):
        raise UserError(f"'{path}': {module} has no '{name}'.{hint_nearest(name, dir(imported))}")
    return getattr(imported, name)


def _read_stages() -> dict[str, Stage]:
    """Read ``stages.yaml``; a kind's ``config`` and ``run`` are by default in the files that have its name."""
    text = Path(__file__).with_name("stages.yaml").read_text(encoding="utf-8")
    stages = {}
    for kind, fields in yaml.load(text, Loader).items():
        makes = Kind(fields.pop("makes")) if "makes" in fields else None
        name = "".join(part.capitalize() for part in kind.split("_"))
        config = fields.pop("config", f"align.config.stages.{kind}:{name}Config")
        run = fields.pop("run", f"align.stages.{kind}:run")
        stages[kind] = Stage(kind=kind, makes=makes, config=config, run=run, **fields)
    return stages


STAGES = _read_stages()
"""Every stage of align, in the order of a usual pipeline."""


def find_stage(kind: str) -> Stage:
    """Return the stage of a kind, or a user's stage by the import path of its ``Stage`` (``module:NAME``).

    Raises ``KeyError`` for a name that is neither and ``UserError`` for an import path that does not load.
    """
    if ":" not in kind:
        return STAGES[kind]
    stage = load_object(kind)
    if not isinstance(stage, Stage):
        raise UserError(f"'{kind}' is {with_article(type(stage).__name__)}, not an align.pipeline.registry.Stage.")
    if not re.fullmatch(NAME, stage.kind):
        raise UserError(
            f"'{kind}': its kind {stage.kind!r} cannot name a folder of the store. Write it with letters, digits and "
            "'_', '.', ':' or '-', beginning with a letter, a digit or '_'."
        )
    return stage


NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,63}$"
LOOP = "loop"
"""Name and kind of a loop, which is written like a stage."""


def stage_of(name: str, block: Mapping[str, Any], above: str) -> Stage:
    """Return the record of the stage that ``block`` sets up: by its ``stage``, else by its name.

    ``above`` is the place of the blocks, ``pipelines/hh.yaml: stages``. Raises ``UserError`` for a name that is not
    allowed and for an unknown kind, with the nearest known one.
    """
    kind = block.get("stage", name)
    place = f"{above}.{name}"
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(f"{above}: '{name}' is not a valid stage name; use letters, digits, - and _.")
    if not isinstance(kind, str):
        raise UserError(f"{place}.stage: expected the kind of a stage; found {kind!r}. One of {', '.join(STAGES)}.")
    if ":" in kind:
        try:
            return find_stage(kind)
        except UserError as error:
            text = str(error)
            raise UserError(text if text.startswith(place) else f"{place}.stage: {text}") from None
    if kind in STAGES:
        return STAGES[kind]
    kinds = [*STAGES, LOOP]
    if "stage" in block:
        raise UserError(f"{place}.stage: unknown stage '{kind}'.{suggest(kind, kinds)}")
    # Neither a kind nor a block with ``stage``. It may be a misspelled kind, else a misspelled ``stage``.
    hint = nearest(kind, kinds)
    if hint:
        raise UserError(
            f"{above}: unknown stage '{name}'. Did you mean '{hint}'? "
            f"(A name of your own needs `stage: {hint}` below it.)"
        )
    misspelled = nearest("stage", [str(key) for key in block])
    if misspelled:
        raise UserError(f"{place}: unknown key '{misspelled}'. Did you mean 'stage'?")
    raise UserError(f"{place}: say which stage this is, with `stage:` one of {', '.join(STAGES)}.")
