"""A sweep's terms in Optuna's: ranges, samplers, pruners. Never imports torch."""

from __future__ import annotations

import hashlib

import optuna
from optuna.trial import FrozenTrial

from align.sweep.config import PruneConfig, SweepConfig
from align.sweep.space import Choice, Dimension


def suggest(trial: optuna.Trial, one: Dimension) -> float | int | str:
    """What a trial draws of this dimension."""
    kind = distribution_of(one)
    if isinstance(kind, optuna.distributions.CategoricalDistribution):
        return str(trial.suggest_categorical(one.name, kind.choices))
    if isinstance(kind, optuna.distributions.IntDistribution):
        return trial.suggest_int(one.name, kind.low, kind.high, step=kind.step, log=kind.log)
    assert isinstance(kind, optuna.distributions.FloatDistribution)
    return trial.suggest_float(one.name, kind.low, kind.high, step=kind.step, log=kind.log)


def handle_of(study: optuna.Study, one: FrozenTrial) -> optuna.Trial:
    """A trial that another process began, to go on with. Optuna has no public way to take one up."""
    return optuna.Trial(study, one._trial_id)


def pruner_of(config: PruneConfig | None) -> optuna.pruners.BasePruner:
    """What ends trials early."""
    if config is None:
        return optuna.pruners.NopPruner()
    if config.method == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=config.start)
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=config.start, reduction_factor=config.reduction)


def sampler_of(config: SweepConfig, number: int) -> optuna.samplers.BaseSampler:
    """What chooses the draw of trial ``number``, seeded by both."""
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{number}".encode()).digest()[:4], "big")
    if config.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)  # a grid's trials are queued beforehand


def distribution_of(one: Dimension) -> optuna.distributions.BaseDistribution:
    """What may be drawn."""
    if isinstance(one, Choice):
        return optuna.distributions.CategoricalDistribution(list(one.options))
    points = one.points() if one.step else None
    high = float(points[-1]) if points else one.high  # Optuna wants the last step itself
    if one.whole:
        return optuna.distributions.IntDistribution(int(one.low), int(high), log=one.log, step=int(one.step or 1))
    return optuna.distributions.FloatDistribution(float(one.low), float(high), log=one.log, step=one.step)
