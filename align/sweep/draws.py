"""Values and early ends of a sweep's trials, in Optuna's terms. Only this file and ``study.py`` use Optuna."""

from __future__ import annotations

import hashlib

from align.config.extras import missing_extra
from align.sweep.config import PruneConfig, SweepConfig
from align.sweep.space import Choice, Dimension

try:
    import optuna
except ModuleNotFoundError:
    raise missing_extra("optuna", "sweep", "align sweep") from None


def make_distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """Return the values that a dimension may take."""
    if isinstance(dimension, Choice):
        return optuna.distributions.CategoricalDistribution(list(dimension.options))
    high = float(dimension.high)
    points = dimension.points() if dimension.step else None
    if points:
        high = float(points[-1])  # Optuna wants the last step itself
    if dimension.is_integer:
        step = int(dimension.step or 1)
        return optuna.distributions.IntDistribution(int(dimension.low), int(high), log=dimension.log, step=step)
    low = float(dimension.low)
    return optuna.distributions.FloatDistribution(low, high, log=dimension.log, step=dimension.step)


def suggest_value(trial: optuna.Trial, dimension: Dimension) -> float | int | str:
    """Return a trial's value of a dimension, drawn before or now."""
    kind = make_distribution(dimension)
    if isinstance(kind, optuna.distributions.CategoricalDistribution):
        return str(trial.suggest_categorical(dimension.name, kind.choices))
    if isinstance(kind, optuna.distributions.IntDistribution):
        return trial.suggest_int(dimension.name, kind.low, kind.high, step=kind.step, log=kind.log)
    assert isinstance(kind, optuna.distributions.FloatDistribution)
    return trial.suggest_float(dimension.name, kind.low, kind.high, step=kind.step, log=kind.log)


def make_pruner(config: PruneConfig | None) -> optuna.pruners.BasePruner:
    """Return the rule that ends trials early; one that ends none without a config."""
    if config is None:
        return optuna.pruners.NopPruner()
    if config.method == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=config.start)
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=config.start, reduction_factor=config.reduction)


def make_sampler(config: SweepConfig, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of trial ``number``, seeded by the sweep's seed and the number."""
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{number}".encode()).digest()[:4], "big")
    if config.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)  # a grid's trials are queued beforehand
