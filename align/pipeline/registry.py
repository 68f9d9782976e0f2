"""The description of a stage, and the one visible dict of all stages.

Torch-free: a stage's ``run`` is named by import path and imported only in the stage's own process.
"""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.base import Config
from align.config.user_functions import search_module_folders
from align.errors import UserError, shorten
from align.pipeline.context import StageContext
from align.store.artifacts import Kind
from align.store.record import NAME


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
    ``plan_warnings(config, base)``; each is optional."""
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
        return config.identities(base) if hasattr(config, "identities") else {}

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
        # Appended, not put first: a file of the user's must not hide an installed module.
        sys.path.append(str(Path.cwd()))
        return load_object(path)
    if not hasattr(imported, name):
        close = difflib.get_close_matches(name, dir(imported), n=1)
        raise UserError(f"'{path}': {module} has no '{name}'." + (f" Did you mean '{close[0]}'?" if close else ""))
    return getattr(imported, name)


ENCODINGS = "align.lint.encodings"
"""Module of the ways to read a row."""
PAIRS: dict[str, Any] = {
    "headline": {"test_accuracy_after": "held-out accuracy", "test_margin_after": "margin"},
    "lint": f"{ENCODINGS}:PAIRS",
}
"""Fields of a stage that learns from pairs."""
ROLLOUTS = {"score_first": "score", "score_last": "→", "kl_last": "KL", "engine": "engine"}
"""Closing line of a stage that learns from its own rollouts."""


def _stage(kind: str, version: int, makes: Kind | None, purpose: str, **others: Any) -> Stage:
    """Return the record of a kind whose files have its name; ``others`` are further fields of ``Stage``."""
    name = "".join(part.capitalize() for part in kind.split("_"))
    config = f"align.config.stages.{kind}:{name}Config"
    return Stage(kind, version, makes, config, f"align.stages.{kind}:run", purpose, **others)


def _inspected(kind: str, version: int, makes: Kind | None, purpose: str, **others: Any) -> Stage:
    """Return the record of a kind whose run file also looks at what its config names."""
    return _stage(kind, version, makes, purpose, inspector=f"align.stages.{kind}", **others)


def _trained(kind: str, version: int, purpose: str, card_verb: str, **others: Any) -> Stage:
    """Return the record of a kind that trains on rows."""
    fields = {"makes": Kind.POLICY, "estimator": "align.capacity.estimate_training", **others}
    return _stage(kind, version, purpose=purpose, card_verb=card_verb, distributed=True, **fields)


def _on_policy(kind: str, version: int, purpose: str, card_verb: str) -> Stage:
    """Return the record of a kind that trains on its own rollouts."""
    fields = {"headline": ROLLOUTS, "lint": f"{ENCODINGS}:PROMPTS", "estimator": "align.capacity.estimate_rl"}
    return _trained(kind, version, purpose, card_verb, samples=True, **fields)


STAGES: dict[str, Stage] = {
    stage.kind: stage
    for stage in (
        _inspected(
            "model",
            2,
            Kind.MODEL,
            "bring a base model into the store as plain safetensors",
            headline={"parameters": "parameters", "architecture": ""},
            card_verb="imported",
        ),
        _inspected("artifact", 1, None, "take a finished artifact from a store or a checkpoint's folder as it is"),
        _inspected(
            "data",
            6,
            None,
            "build a dataset from a recipe",
            headline={"train_rows": "train", "test_rows": "test"},
        ),
        _trained("pretrain", 5, "continued pre-training on plain texts, packed", "pre-trained further on plain texts"),
        _trained(
            "sft",
            5,
            "supervised fine-tuning on responses",
            "fine-tuned on responses",
            headline={"test_loss_before": "held-out loss", "test_loss_after": "→"},
            lint=f"{ENCODINGS}:SUPERVISED",
        ),
        _stage(
            "sample",
            5,
            Kind.PREFERENCES,
            "sample responses from a checkpoint, score and pair them",
            samples=True,
            estimator="align.capacity.estimate_sampling",
            headline={"train_pairs": "pairs", "train_mean_score": "mean score", "engine": "engine"},
        ),
        _stage(
            "synthesize",
            4,
            None,
            "make instructions, responses or pairs with a model or an endpoint",
            samples=True,
            estimator="align.capacity.estimate_sampling",
        ),
        _trained(
            "reward",
            5,
            "train a reward model on pairs",
            "trained to score responses",
            headline={"test_accuracy_after": "held-out accuracy", "test_accuracy_true_after": "on true labels"},
            lint=f"{ENCODINGS}:SCORED_PAIRS",
            makes=Kind.REWARD,
        ),
        _trained("dpo", 5, "direct preference optimization on pairs", "trained with DPO on preference pairs", **PAIRS),
        _trained(
            "kto",
            5,
            "learning from single answers marked as wanted or not",
            "trained with KTO on answers marked as wanted or not",
            **PAIRS | {"lint": f"{ENCODINGS}:UNPAIRED"},
        ),
        _trained(
            "orpo",
            5,
            "fine-tuning and preference learning in one loss, without a reference",
            "trained with ORPO on preference pairs",
            **PAIRS,
        ),
        _trained(
            "cpo",
            5,
            "contrastive preference optimization, without a reference",
            "trained with CPO on preference pairs",
            **PAIRS,
        ),
        _trained(
            "simpo",
            5,
            "preference optimization per token with a margin, without a reference",
            "trained with SimPO on preference pairs",
            **PAIRS,
        ),
        _trained(
            "distill",
            6,
            "learn a larger teacher's distribution over the next token",
            "distilled from a larger teacher",
            headline={"test_divergence_before": "held-out nats from the teacher", "test_divergence_after": "→"},
            lint=f"{ENCODINGS}:SUPERVISED",
        ),
        _on_policy("ppo", 6, "PPO with a critic against a reward model or a checker", "trained with PPO and a critic"),
        _on_policy(
            "grpo",
            5,
            "GRPO and its variants: responses to a prompt compared, without a critic",
            "trained with GRPO",
        ),
        _on_policy("rloo", 4, "REINFORCE with the other responses to a prompt as the baseline", "trained with RLOO"),
        _on_policy(
            "online_dpo",
            4,
            "DPO on pairs of the policy's own responses, update by update",
            "trained with DPO on pairs of its own responses",
        ),
        _on_policy(
            "rejection",
            4,
            "best-of-N fine-tuning on the policy's own responses, in rounds",
            "fine-tuned on the best of its own responses",
        ),
        _stage(
            "merge",
            1,
            None,
            "make one checkpoint of several: soups, SLERP, TIES, DARE, WARP",
            card_verb="merged from several checkpoints",
        ),
        _stage(
            "evaluate",
            9,
            Kind.SCORECARD,
            "compare systems on prompts, benchmarks and by judges, with intervals",
            samples=True,
            estimator="align.capacity.estimate_sampling",
            inspector="align.evaluation.tasks",
            headline={"reward_accuracy": "RM accuracy"},
        ),
        _stage("report", 2, Kind.REPORT, "one HTML page about the whole run", headline={"stages": "stages"}),
    )
}
"""Every stage there is, in the order of a usual pipeline."""


def find_stage(kind: str) -> Stage:
    """Return the stage of a kind, or a user's stage by the import path of its ``Stage`` (``module:NAME``).

    Raises ``KeyError`` for a name that is neither and ``UserError`` for an import path that does not load.
    """
    if ":" not in kind:
        return STAGES[kind]
    stage = load_object(kind)
    if not isinstance(stage, Stage):
        raise UserError(f"'{kind}' is a {type(stage).__name__}, not an align.pipeline.registry.Stage.")
    if not re.fullmatch(NAME, stage.kind):
        raise UserError(
            f"'{kind}': its kind {stage.kind!r} cannot name a folder of the store. Write it with letters, digits and "
            "'_', '.', ':' or '-', beginning with a letter, a digit or '_'."
        )
    return stage
