"""A sweep's trials in Optuna, shared by all its workers: finished trials, the next trial, trials that are behind.

A study is a folder of the store with Optuna's journal (which has its own lock, by a link that NFS makes once) and a
lock for each running trial. A trial whose lock is free, or whose holder was silent for the store's lease, was
interrupted: the next worker, on any machine, continues it under its number. Each trial's sampler is seeded by the
sweep's seed and the trial's number, so an interrupted sweep tries the same values as an uninterrupted sweep; Optuna's
own samplers would start their random numbers again. Never imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import UserError, missing_extra
from align.extensions.sweep.config import Choice, Dimension, Draw, PruneConfig, SweepConfig, grid
from align.extensions.sweep.plan import Sweep
from align.patches.optuna import trial_id
from align.store.json_files import DamagedFile, parse_sealed, write_sealed
from align.store.locks import Hold, Lock, LockLost
from align.store.store import SWEEPS, Store

try:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ModuleNotFoundError:
    raise missing_extra("optuna", "sweep", "align sweep") from None

JOURNAL, ABOUT, LOCKS = "journal.log", "sweep.json", "locks"
STATES = {
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "ended early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
    TrialState.WAITING: "waits",
}
RETRY = "retry_of"
"""Attribute of a trial that repeats a failed one: that one's number."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial in the study: ``state`` is ``done``, ``failed``, ``ended early`` or ``unfinished``."""

    number: int
    state: str
    draw: Draw
    values: list[float]
    """One per objective when it is done, else empty."""
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trial:
    """A trial that this process runs. No other process runs it while ``hold`` lasts."""

    number: int
    draw: Draw
    resumed: bool
    hold: Hold
    handle: optuna.Trial

    @property
    def is_retry(self) -> bool:
        """True when it repeats a failed trial."""
        return RETRY in self.handle.user_attrs


class TrialLost(Exception):
    """Another worker took the trial over while this worker was silent, and records its outcome."""


class Study:
    """A sweep's trials, shared by all its workers. Open it with :meth:`open`."""

    def __init__(self, store: Store, sweep: Sweep) -> None:
        config = self.config = sweep.config
        self.store, self.space, self.objectives = store, sweep.space, sweep.objectives
        self.folder, self.limit = folder_of(store, sweep), sweep.trial_count()
        self._locks: dict[int, Lock] = {}
        """Trial → lock, kept between looks: a holder is known to be silent only by watching its lock."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with _explain_damage(self.folder):
            self._storage = _storage(self.folder)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=config.name,
                directions=["maximize" if objective.higher else "minimize" for objective in self.objectives],
                pruner=make_pruner(config.prune),
                load_if_exists=True,
            )
            self._study.get_trials(deepcopy=False)

    @classmethod
    def open(cls, store: Store, sweep: Sweep, *, fresh: bool = False) -> Study:
        """Open the sweep's study in ``store``, or begin one.

        Raises ``UserError`` for a study whose trials have other settings in common, and names them. With ``fresh`` such
        a study is moved aside.
        """
        config, parts, folder = (
            sweep.config,
            json.loads(json.dumps(dict(sweep.parts()), default=str)),
            folder_of(store, sweep),
        )
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / ABOUT
        with _study_lock(store, folder):
            # 1. Move an old study aside if asked to, or if it differs and no trial of it has finished.
            is_same = not fresh and _read_parts(about) == parts
            if about.exists() and (fresh or (not is_same and not _has_results(folder, config.name))):
                _move_aside(folder)
            # 2. Continue the study that is there, or begin one.
            if about.exists():
                sweep.refuse_other_parts(_read_parts(about) or {}, parts)
            else:
                write_sealed(about, parts)
            study = cls(store, sweep)
            # 3. A grid's trials are all queued, once.
            if config.sampler == "grid":
                study._queue_grid()
        return study

    def _queue_grid(self) -> None:
        trials = self._study.get_trials(deepcopy=False)
        queued = sum(RETRY not in trial.user_attrs for trial in trials)
        for draw in grid(self.space, "")[queued : self.limit]:
            self._study.enqueue_trial(dict(draw))

    # ---- taking trials ------------------------------------------------------------------------------------------

    def next(self) -> Trial | None:
        """Return an interrupted trial, else a retry, else a new trial, else None: all were begun and none is abandoned.

        Before None is returned, trials of other machines are watched until each has shown that its worker lives.
        """
        while True:
            # Only one worker at a time chooses a trial.
            with _study_lock(self.store, self.folder):
                trials = self._study.get_trials(deepcopy=False)
                trial = self._take_interrupted(trials) or self._take_retry(trials) or self._take_new(trials)
            if trial is not None:
                return trial
            running = [trial.number for trial in trials if trial.state == TrialState.RUNNING]
            if all(self._lock(number).holder_lives(self.store.retry) for number in running):
                return None

    def _take_interrupted(self, trials: Sequence[FrozenTrial]) -> Trial | None:
        """Return a running trial whose lock is free, with its draw completed."""
        for frozen in trials:
            if frozen.state != TrialState.RUNNING:
                continue
            hold = self._acquire(frozen.number)
            if hold is None:
                continue
            # Its worker may have recorded the outcome, and released the lock, after ``trials`` was read.
            if self._study.get_trials(deepcopy=False)[frozen.number].state != TrialState.RUNNING:
                self._release(hold)
                continue
            return self._complete_draw(frozen, hold, resumed=True)
        return None

    def _take_retry(self, trials: Sequence[FrozenTrial]) -> Trial | None:
        """Return a failed trial that is queued to run again. Retries do not count toward the limit."""
        # Not by ``ask``, which returns the first queued trial: a grid's others were queued before.
        for frozen in trials:
            if frozen.state == TrialState.WAITING and RETRY in frozen.user_attrs:
                self._storage.set_trial_state_values(trial_id(frozen), TrialState.RUNNING)
                hold = self._acquire(frozen.number)
                # Trials are chosen under the study's lock, so no other worker can have seen this trial yet.
                assert hold is not None
                return self._complete_draw(frozen, hold, resumed=False)
        return None

    def _complete_draw(self, frozen: FrozenTrial, hold: Hold, *, resumed: bool) -> Trial:
        """Return a trial of the study with all its values."""
        self._study.sampler = make_sampler(self.config, frozen.number)
        handle = optuna.Trial(self._study, trial_id(frozen))
        # Values that were drawn before come again; the others are drawn now.
        draw = {dimension.name: suggest_value(handle, dimension) for dimension in self.space}
        return Trial(frozen.number, draw, resumed, hold, handle)

    def _take_new(self, trials: Sequence[FrozenTrial]) -> Trial | None:
        """Return a new trial, or None when all were begun."""
        begun = [trial for trial in trials if trial.state != TrialState.WAITING]
        if sum(RETRY not in trial.user_attrs for trial in begun) >= self.limit:
            return None
        # The number that a new trial gets. A queued trial has its values already, so its seed does not matter.
        self._study.sampler = make_sampler(self.config, len(trials))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a sampler is experimental
            handle = self._study.ask({dimension.name: make_distribution(dimension) for dimension in self.space})
        hold = self._acquire(handle.number)
        # Trials are chosen under the study's lock, so no other worker can have seen this trial yet.
        assert hold is not None
        return Trial(handle.number, dict(handle.params), False, hold, handle)

    def retry(self) -> int:
        """Queue failed trials, each once, before the new trials; returns their number."""
        with _study_lock(self.store, self.folder):
            trials = self._study.get_trials(deepcopy=False)
            retried = {trial.user_attrs.get(RETRY) for trial in trials}
            failed = [trial for trial in trials if trial.state == TrialState.FAIL and trial.number not in retried]
            for trial in failed:
                self._study.enqueue_trial(dict(trial.params), user_attrs={RETRY: trial.number})
        return len(failed)

    def _lock(self, number: int) -> Lock:
        place = self.folder / LOCKS / f"trial-{number}"
        return self._locks.setdefault(number, Lock(place, self.store.lease))

    def _acquire(self, number: int) -> Hold | None:
        return self.store.retry.call(self._lock(number).try_acquire)

    def _release(self, hold: Hold) -> None:
        self.store.retry.call(hold.release)

    # ---- outcomes -----------------------------------------------------------------------------------------------

    def complete(self, trial: Trial, values: Sequence[float], **notes: Any) -> None:
        """Record a trial's values, one per objective. Raises ``TrialLost``, as do ``fail`` and ``prune``."""
        self._record(trial, TrialState.COMPLETE, list(values), notes)

    def fail(self, trial: Trial, **notes: Any) -> None:
        """Record that a trial failed."""
        self._record(trial, TrialState.FAIL, None, notes)

    def prune(self, trial: Trial, **notes: Any) -> None:
        """Record that a trial ended early."""
        self._record(trial, TrialState.PRUNED, None, notes)

    def release(self, trial: Trial) -> None:
        """Leave the trial to the next worker."""
        self._release(trial.hold)

    def _record(self, trial: Trial, state: TrialState, values: list[float] | None, notes: Mapping[str, Any]) -> None:
        try:
            self.store.retry.call(trial.hold.confirm)
        except LockLost as error:
            raise TrialLost(str(error)) from None
        # Notes before the state: Optuna refuses attributes of a trial that has ended.
        for name, value in notes.items():
            trial.handle.set_user_attr(name, value)
        self._study.tell(trial.number, values, state)
        self._release(trial.hold)

    def should_prune(self, trial: Trial, step: int, value: float) -> bool:
        """Record a point of the curve; return True when the trial should end there.

        ``value`` has the sign with which higher is better exactly if it is for the objective.
        """
        # A resumed stage repeats points that an earlier attempt has reported.
        values = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        if step not in values:
            trial.handle.report(value, step)
        return trial.handle.should_prune()

    # ---- reading ------------------------------------------------------------------------------------------------

    def trials(self) -> list[TrialRecord]:
        """Return every trial that was begun, in order."""
        records = []
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state == TrialState.WAITING:
                continue
            names = [dimension.name for dimension in self.space]
            draw = {name: trial.params[name] for name in names if name in trial.params}
            values = list(trial.values) if trial.state == TrialState.COMPLETE else []
            records.append(TrialRecord(trial.number, STATES[trial.state], draw, values, dict(trial.user_attrs)))
        return records

    def best(self) -> list[int]:
        """Return the numbers of the trials that no other beats: the best with its ties, or a front of several aims."""
        if not any(trial.state == "done" for trial in self.trials()):
            return []
        # Optuna has one best trial for one objective, the first of equal trials, and a Pareto front for several.
        if len(self.objectives) == 1:
            top = [self._study.best_trial.value]
            return [trial.number for trial in self.trials() if trial.values == top]
        return [trial.number for trial in self._study.best_trials]


def folder_of(store: Store, sweep: Sweep) -> Path:
    """Return the folder of a sweep's study."""
    return store.root / SWEEPS / sweep.config.name


# ---- the folder of a study --------------------------------------------------------------------------------------


def _read_parts(about: Path) -> dict[str, Any] | None:
    """Return what a study's trials have in common; None if there is no study. Raises ``UserError`` for damage."""
    try:
        return parse_sealed(about.read_bytes())
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        raise UserError(
            f"{about}: damaged: it {error}. --fresh starts the sweep over; finished stages are kept."
        ) from None


def _move_aside(folder: Path) -> None:
    """Move a study's files into the first free folder ``earlier-<number>``."""
    number = next(number for number in range(1, 10**6) if not (folder / f"earlier-{number}").exists())
    target = folder / f"earlier-{number}"
    target.mkdir()
    for name in (JOURNAL, ABOUT):
        if (folder / name).exists():
            (folder / name).rename(target / name)


@contextlib.contextmanager
def _study_lock(store: Store, folder: Path) -> Iterator[None]:
    """Keep other workers, on any machine, from opening the study or taking a trial meanwhile."""
    hold = Lock(folder / LOCKS / "ask", store.lease).acquire(lambda _: None, store.retry)
    try:
        yield
    finally:
        store.retry.call(hold.release)


def _storage(folder: Path) -> JournalStorage:
    # Absolute: the journal's lock is a link to it, and a relative link starts at its own folder.
    return JournalStorage(JournalFileBackend(str((folder / JOURNAL).resolve())))


@contextlib.contextmanager
def _explain_damage(folder: Path) -> Iterator[None]:
    """Turn Optuna's errors about its journal into a ``UserError`` that names the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise UserError(
            f"{folder / JOURNAL}: damaged: Optuna cannot read it ({type(error).__name__}: {error}). --fresh starts the "
            "sweep over; finished stages are kept."
        ) from None


def _has_results(folder: Path, name: str) -> bool:
    """Return True when a trial of the study in ``folder`` has ended."""
    if not (folder / JOURNAL).exists():
        return False
    with _explain_damage(folder):
        storage = _storage(folder)
        if name not in optuna.get_all_study_names(storage):  # interrupted before the study itself was written
            return False
        trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    return any(trial.state.is_finished() for trial in trials)


def make_distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """Return the possible values of a dimension."""
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
    """Return the rule that ends trials early; without a config it ends none."""
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
