"""Scores on the command line: a function, a ``score:`` list as YAML or in a file, or the score of a stage.

Has no heavy imports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli.arguments import RECIPE_SUFFIXES, find_artifact, find_checkpoint
from align.config.scores import RewardEntry, ScoreValidation
from align.config.user_functions import add_module_folder
from align.config.validation import suggest, validate
from align.config.yaml import load_yaml, parse_yaml
from align.errors import UserError, shorten

if TYPE_CHECKING:
    from align.scoring.models import RewardScorer
    from align.scoring.score import WeightedSum

PLACE = "--with"


@dataclass(frozen=True)
class ScoreSpec:
    """The rewards of a score."""

    name: str
    """Name in tables: the function, the only reward's name, or the file."""
    entries: list[RewardEntry]
    pipeline: str | None
    """Pipeline whose stages the entries ``reward`` name; None for checkpoints."""
    store: str | None
    validation: ScoreValidation = field(default_factory=ScoreValidation)
    """Settings of the validation: those of the stage, or the defaults."""

    def open(self, folder: Path, warn: Callable[[str], None]) -> WeightedSum:
        """Return the sum of the rewards; judges keep their answers in ``folder`` and in the store's cache.

        Raises ``UserError`` for a reward that cannot be used.
        """
        from align.judges.client import JudgmentCaches
        from align.runner.open_store import open_store
        from align.scoring.score import Part, WeightedSum, open_entry

        shared = open_store(None, self.store).cache
        parts = []
        for index, entry in enumerate(self.entries):
            place = f"score[{index}]"
            if entry.judge is not None and entry.judge.model is not None:
                raise UserError(
                    f"{PLACE} {self.name}: {place}.judge.model is a stage, and `align score` asks servers; write "
                    "`endpoint: {url: ..., model: ...}`."
                )
            if entry.judge is not None and entry.judge.max_cost is not None:
                warn(
                    f"{place}.judge.max_cost: {entry.judge.max_cost:g} is the budget of this command; each command has "
                    "its own. Answers to earlier commands are in the store and cost nothing."
                )
            caches = JudgmentCaches(folder / entry.label, shared, warn)
            reward = None if entry.reward is None else self._reward_scorer(entry.reward)
            parts.append(Part(entry.label, entry.weight, open_entry(entry, place, caches, reward=reward)))
        for part in parts:
            part.scorer.check()
        return WeightedSum(tuple(parts), is_list=len(parts) > 1)

    def _reward_scorer(self, name: str) -> RewardScorer:
        """Return the scorer of a reward model, which is loaded when it scores for the first time."""
        from align.config.runtime import Runtime
        from align.scoring.models import RewardScorer, load_checkpoint

        if self.pipeline is None:
            model = find_checkpoint(name, self.store)
        else:
            model = find_artifact(f"{self.pipeline}:{name}", self.store).model
        return RewardScorer(lambda: load_checkpoint(model, Runtime(), "auto"))


def read_spec(word: str, store: str | None) -> ScoreSpec:
    """Return the score that ``word`` describes. Raises ``UserError``, which begins with ``--with``, for anything else.

    A pipeline file is read, but its stages are not run.
    """
    file, _, stage = word.rpartition(":")
    if file.endswith(RECIPE_SUFFIXES) and Path(file).is_file():
        return _stage_spec(word, file, stage, store)
    path = Path(word)
    if word.endswith(RECIPE_SUFFIXES):
        add_module_folder(path)
        content: Any = load_yaml(path)
        if "stages" in content:
            raise UserError(f"{PLACE} {word}: is a pipeline; name a stage with a score: {word}:STAGE.")
    else:
        content = parse_yaml(word, f"{PLACE} {shorten(word)}")
    entries = _entries(content, f"{PLACE} {shorten(word)}")
    name = path.stem if word.endswith(RECIPE_SUFFIXES) else _name(entries)
    return ScoreSpec(name, entries, None, store)


def _stage_spec(word: str, file: str, stage: str, store: str | None) -> ScoreSpec:
    """Return the score of a stage of a pipeline."""
    from align.pipeline.pipeline import Pipeline

    pipeline = Pipeline.load(file)
    stage = pipeline.resolve(stage)
    if stage not in pipeline.nodes:
        raise UserError(f"{PLACE} {word}: there is no stage '{stage}'.{suggest(stage, pipeline.nodes)}")
    config = pipeline.nodes[stage].config
    score = getattr(config, "score", None)
    reward = getattr(config, "reward", None)
    entries = _entries(score, f"{PLACE} {word}") if score is not None else []
    if score is None and isinstance(reward, str):
        entries = [RewardEntry(reward=reward)]
    if not entries:
        raise UserError(f"{PLACE} {word}: the stage has no `score`, which `align score` could use.")
    return ScoreSpec(stage, entries, file, store, getattr(config, "score_validation", ScoreValidation()))


def _entries(content: Any, place: str) -> list[RewardEntry]:
    """Return the entries of a function's path, an entry, or a list of both; a mapping may have the key ``score``."""
    if isinstance(content, Mapping) and set(content) == {"score"}:
        content = content["score"]
    items = content if isinstance(content, list) else [content]
    entries = []
    for index, item in enumerate(items):
        where = f"{place}[{index}]" if isinstance(content, list) else place
        if isinstance(item, RewardEntry):
            entries.append(item)
        elif isinstance(item, str):
            entries.append(RewardEntry(function=item))
        else:
            entries.append(validate(RewardEntry, item, where))
    if not entries:
        raise UserError(f"{place}: has no reward; write a function, or an entry such as '{{math: answer}}'.")
    labels = [entry.label for entry in entries]
    repeated = next((label for label in labels if labels.count(label) > 1), None)
    if repeated is not None:
        raise UserError(f"{place}: two rewards are called '{repeated}'; set another `name` for one of them.")
    return entries


def _name(entries: list[RewardEntry]) -> str:
    """Return a short name of a score that is written on the command line."""
    return " + ".join(entry.label for entry in entries)
