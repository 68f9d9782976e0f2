"""Fields of a sweep file: pipeline, search space, objectives, sampler, pruning. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from align.config.base import Config
from align.config.located_paths import UserPath, locate, settle
from align.config.validation import validate
from align.config.yaml import load_yaml
from align.errors import UserError
from align.pipeline.stage_kinds import NAME_PATTERN


class PruneConfig(Config):
    """Pruning: trials end early when one of a stage's curves is behind those of other trials."""

    maximize: str | None = None
    """``STAGE.CURVE`` that should rise, such as ``ppo.score``."""
    minimize: str | None = None
    """``STAGE.CURVE`` that should fall, such as ``sft.loss``. Where a stage chooses its checkpoint by validation rows,
    ``sft.test_loss`` is its ``validation_loss``."""
    method: Literal["successive_halving", "median"] = "successive_halving"
    """``successive_halving`` (1810.05934): of the trials that reached a rung, the best 1 / ``reduction`` go on; rungs
    are at ``start``, ``start * reduction``, … ``median``: a trial that is worse than the median at a step ends."""
    start: int = Field(ge=1)
    """Step of the curve before which no trial ends."""
    reduction: int = Field(2, ge=2)
    """One in so many trials goes on at each rung; 3 saves more and errs more."""

    @model_validator(mode="after")
    def _one_curve(self) -> PruneConfig:
        if (self.maximize is None) == (self.minimize is None):
            raise ValueError("name one curve, as `maximize: STAGE.CURVE` or as `minimize: STAGE.CURVE`.")
        if not all(self.target.partition(".")):
            raise ValueError(f"'{self.target}' names no curve; write STAGE.CURVE, such as ppo.score.")
        return self

    @property
    def target(self) -> str:
        """``STAGE.CURVE`` of either direction."""
        return str(self.maximize if self.minimize is None else self.minimize)


class SweepConfig(Config):
    """The top level of a sweep file."""

    name: str = Field(pattern=NAME_PATTERN, max_length=50)
    """Name of the sweep; its trials are the runs ``NAME-0``, ``NAME-1``, …"""
    description: str = ""
    """Free text."""
    pipeline: UserPath
    """The pipeline's file; a relative path starts at the sweep's folder."""
    set: dict[str, Any] = Field({})
    """Overrides of the pipeline's fields in every trial, by path: ``{stages.sft.max_rows: 200}``."""
    space: dict[str, Any] = Field(min_length=1)
    """Search space: a path with its range (``{low: 1.0e-5, high: 1.0e-3, log: true}``), a list of values or named
    values; or a name of your own with a set of changes for each choice."""
    maximize: str | list[str] = Field([])
    """Objective: ``SYSTEM.METRIC`` of the scorecard (``ppo.gold``), or ``STAGE.METRIC`` of a stage's record."""
    minimize: str | list[str] = Field([])
    """Objective where less is better. One objective in all, or several: then the best trade-offs are found."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    """``tpe`` learns from the trials so far (1907.10902); ``grid`` takes every combination, in order."""
    trials: int | None = Field(None, ge=1)
    """Trials in all, failed and ended ones included; 20 by default, for ``grid`` all combinations."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seed of the sampler; with one worker the same seed tries the same values, however often it is interrupted."""
    workers: int = Field(1, ge=1)
    """Parallel trials, each a process; ``--workers`` overrides it. Changes no trial's result."""
    prune: PruneConfig | None = None
    """Pruning of trials that are behind."""

    @model_validator(mode="after")
    def _check_objectives(self) -> SweepConfig:
        # Owners and metrics are checked against the pipeline later, in ``plan.py``.
        names = [name for name, _ in self.objectives]
        if not names:
            raise ValueError(
                "no objective decides which trial is best; write `maximize: SYSTEM.METRIC`, such as ppo.gold."
            )
        for name in names:
            if not all(name.partition(".")):
                raise ValueError(f"'{name}' is no objective; write SYSTEM.METRIC, such as ppo.gold.")
            if names.count(name) > 1:
                raise ValueError(f"'{name}' is an objective twice; name it once.")
        if self.prune is not None and len(names) > 1:
            raise ValueError("prune ends trials by one objective, and there are several. Take `prune` or one out.")
        return self

    @property
    def objectives(self) -> list[tuple[str, bool]]:
        """Objectives as (name, True where higher is better)."""
        maximized = [self.maximize] if isinstance(self.maximize, str) else self.maximize
        minimized = [self.minimize] if isinstance(self.minimize, str) else self.minimize
        return [(name, True) for name in maximized] + [(name, False) for name in minimized]


def load_sweep(path: str | Path) -> SweepConfig:
    """Read and check a sweep file; ``UserError`` names file, YAML path and remedy."""
    raw = load_yaml(Path(path))
    if "stages" in raw and "pipeline" not in raw:
        raise UserError(f"{path}: a pipeline, not a sweep; `align run` runs it. A sweep says `pipeline: {path}`.")
    settled = settle(SweepConfig, locate(raw, Path(path)), Path.cwd(), str(path))
    return validate(SweepConfig, settled, str(path))


__all__ = ["PruneConfig", "SweepConfig", "load_sweep"]
