"""The one place that speaks to Optuna: what was tried, what to try next, who is behind.

A study lies in a folder: Optuna's journal, and a lock for each trial that is being run. A trial whose lock nobody holds
was interrupted; the next worker goes on with it under its own number. The sampler of each trial is seeded by the
sweep's seed and the trial's number, so that a sweep that was interrupted asks for the same trials as one that was not:
Optuna's own samplers would begin their random numbers anew. Left out: running a trial (``work.py``). Never imports
torch.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from align.errors import UserError
from align.sweep.config import PruneConfig, SweepConfig
from align.sweep.objectives import Objective
from align.sweep.space import Choice, Dimension, Draw, grid

JOURNAL, ABOUT = "journal.log", "sweep.json"
DEFAULT_TRIALS = 20
STATES = {
    TrialState.COMPLETE: "done", TrialState.PRUNED: "ended early", TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished", TrialState.WAITING: "waits",
}  # fmt: skip
RETRY = "retry_of"


@dataclass(frozen=True)
class Tried:
    """A trial as the study has it: ``state`` is ``done``, ``failed``, ``ended early`` or ``unfinished``."""

    number: int
    state: str
    draw: Draw
    values: list[float]
    """One per objective where it is done, else empty."""
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trial:
    """A trial that this process runs; nobody else does while it holds the lock."""

    number: int
    draw: Draw
    resumed: bool
    lock: FileLock
    handle: optuna.Trial


class Study:
    """A sweep's trials, shared by all its workers. Make one with :meth:`open`."""

    def __init__(self, folder: Path, config: SweepConfig, space: list[Dimension], objectives: list[Objective]) -> None:
        self.folder, self.config, self.space, self.objectives = folder, config, space, objectives
        self.limit = config.trials or (len(grid(space, "")) if config.sampler == "grid" else DEFAULT_TRIALS)
        self._ask_lock = FileLock(folder / "ask.lock")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(
            storage=_storage(folder),
            study_name=config.name,
            directions=["maximize" if one.higher else "minimize" for one in objectives],
            pruner=_pruner(config.prune),
            load_if_exists=True,
        )

    @classmethod
    def open(
        cls,
        folder: Path,
        config: SweepConfig,
        space: list[Dimension],
        objectives: list[Objective],
        parts: Mapping[str, Any],
        *,
        fresh: bool = False,
    ) -> Study:
        """The study in ``folder``, begun where there is none.

        ``parts`` is what its trials have in common. A study of other parts is refused with ``UserError``, which says
        which; with ``fresh`` it is put aside.
        """
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / ABOUT
        with FileLock(folder / "open.lock"):
            known = json.loads(about.read_text(encoding="utf-8")) if about.exists() else None
            same = known == json.loads(json.dumps(parts))
            if known is not None and (fresh or (not same and not _has_results(folder, config.name))):
                number = next(at for at in range(1, 10**6) if not (folder / f"earlier-{at}").exists())
                (folder / f"earlier-{number}").mkdir()
                for name in (JOURNAL, ABOUT):
                    if (folder / name).exists():
                        (folder / name).rename(folder / f"earlier-{number}" / name)
            if about.exists():
                _compare(json.loads(about.read_text(encoding="utf-8")), json.loads(json.dumps(parts)), config.name)
            else:
                about.write_text(json.dumps(parts, indent=1), encoding="utf-8")
            study = cls(folder, config, space, objectives)
            if config.sampler == "grid":
                queued = sum(RETRY not in one.user_attrs for one in study._study.get_trials(deepcopy=False))
                for draw in grid(space, "")[queued : study.limit]:
                    study._study.enqueue_trial(dict(draw))
        return study

    # ---- asking -------------------------------------------------------------------------------------------------

    def next(self) -> Trial | None:
        """An interrupted trial to go on with, else a new one, else None: as many as wanted were begun."""
        with self._ask_lock:
            found = self._study.get_trials(deepcopy=False)
            for one in found:
                if one.state == TrialState.RUNNING and (lock := self._lock(one.number)) is not None:
                    self._study.sampler = _sampler(self.config, one.number)
                    handle = _handle(self._study, one)
                    # what was drawn before comes again; what the interruption left undrawn is drawn now
                    draw = {each.name: _suggest(handle, each) for each in self.space}
                    return Trial(one.number, draw, True, lock, handle)
            begun = [one for one in found if one.state != TrialState.WAITING]
            if len(begun) - sum(RETRY in one.user_attrs for one in begun) >= self.limit and not _retries(found):
                return None
            self._study.sampler = _sampler(self.config, len(found))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a sampler is experimental
                made = self._study.ask({one.name: _distribution(one) for one in self.space})
            lock = self._lock(made.number)
            assert lock is not None
            return Trial(made.number, dict(made.params), False, lock, made)

    def retry(self) -> int:
        """Put failed trials, each once, before the new ones; returns how many."""
        with self._ask_lock:
            found = self._study.get_trials(deepcopy=False)
            taken = {one.user_attrs.get(RETRY) for one in found}
            failed = [one for one in found if one.state == TrialState.FAIL and one.number not in taken]
            for one in failed:
                self._study.enqueue_trial(dict(one.params), user_attrs={RETRY: one.number})
        return len(failed)

    def _lock(self, number: int) -> FileLock | None:
        lock = FileLock(self.folder / f"trial-{number}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    # ---- telling ------------------------------------------------------------------------------------------------

    def done(self, trial: Trial, values: Sequence[float], **notes: Any) -> None:
        """The trial came to these values, one per objective."""
        self._tell(trial, TrialState.COMPLETE, list(values), notes)

    def failed(self, trial: Trial, **notes: Any) -> None:
        """The trial came to nothing."""
        self._tell(trial, TrialState.FAIL, None, notes)

    def ended(self, trial: Trial, **notes: Any) -> None:
        """The trial was ended early."""
        self._tell(trial, TrialState.PRUNED, None, notes)

    def release(self, trial: Trial) -> None:
        """Leave the trial to whoever asks next."""
        trial.lock.release()

    def _tell(self, trial: Trial, state: TrialState, values: list[float] | None, notes: Mapping[str, Any]) -> None:
        for name, value in notes.items():
            trial.handle.set_user_attr(name, value)
        self._study.tell(trial.number, values, state)
        trial.lock.release()

    def behind(self, trial: Trial, step: int, value: float) -> bool:
        """Note a point of the curve that pruning goes by; whether the trial should end there.

        ``value`` is signed so that it points where the objective does.
        """
        known = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        if step not in known:
            trial.handle.report(value, step)
        return trial.handle.should_prune()

    # ---- looking back -------------------------------------------------------------------------------------------

    def tried(self) -> list[Tried]:
        """Every trial that was begun, in order."""
        return [
            Tried(
                one.number, STATES[one.state], self._draw(one),
                list(one.values) if one.state == TrialState.COMPLETE else [], dict(one.user_attrs),
            )
            for one in self._study.get_trials(deepcopy=False)
            if one.state != TrialState.WAITING
        ]  # fmt: skip

    def best(self) -> list[int]:
        """Numbers of the trials that no other one beats: the best one, or for several objectives the front."""
        if not any(one.state == "done" for one in self.tried()):
            return []
        if len(self.objectives) == 1:
            return [self._study.best_trial.number]
        return [one.number for one in self._study.best_trials]

    def _draw(self, one: FrozenTrial) -> Draw:
        return {name: one.params[name] for name in (each.name for each in self.space) if name in one.params}


def _storage(folder: Path) -> JournalStorage:
    # absolute: the lock beside it is a link to it, and a link starts at its own folder
    return JournalStorage(JournalFileBackend(str((folder / JOURNAL).resolve())))


def _has_results(folder: Path, name: str) -> bool:
    """Whether a trial of the study in ``folder`` came to its end."""
    if not (folder / JOURNAL).exists():
        return False
    try:
        found = optuna.load_study(study_name=name, storage=_storage(folder)).get_trials(deepcopy=False)
    except KeyError:  # interrupted before the study itself was written
        return False
    return any(one.state.is_finished() for one in found)


def _suggest(trial: optuna.Trial, one: Dimension) -> float | int | str:
    kind = _distribution(one)
    if isinstance(kind, optuna.distributions.CategoricalDistribution):
        return str(trial.suggest_categorical(one.name, kind.choices))
    if isinstance(kind, optuna.distributions.IntDistribution):
        return trial.suggest_int(one.name, kind.low, kind.high, step=kind.step, log=kind.log)
    assert isinstance(kind, optuna.distributions.FloatDistribution)
    return trial.suggest_float(one.name, kind.low, kind.high, step=kind.step, log=kind.log)


def _retries(found: Sequence[FrozenTrial]) -> bool:
    return any(one.state == TrialState.WAITING and RETRY in one.user_attrs for one in found)


def _handle(study: optuna.Study, one: FrozenTrial) -> optuna.Trial:
    """A trial that another process began, to go on with. Optuna has no public way to take one up."""
    return optuna.Trial(study, one._trial_id)


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> None:
    changed = [part for part in {**old, **new} if old.get(part) != new.get(part)]
    if "space" in changed:  # the pipeline is looked at with the space's own values
        changed = [part for part in changed if part != "pipeline"]
    if changed:
        raise UserError(
            f"the sweep '{name}' was begun with another {' and another '.join(changed)}, so its trials cannot be "
            "compared. Give this one another name, or begin anew with --fresh (finished stages stay)."
        )


def _pruner(config: PruneConfig | None) -> optuna.pruners.BasePruner:
    if config is None:
        return optuna.pruners.NopPruner()
    if config.method == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=config.start)
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=config.start, reduction_factor=config.reduction)


def _sampler(config: SweepConfig, number: int) -> optuna.samplers.BaseSampler:
    seed = int.from_bytes(hashlib.sha256(f"{config.seed}/{number}".encode()).digest()[:4], "big")
    if config.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)  # a grid's trials are queued beforehand


def _distribution(one: Dimension) -> optuna.distributions.BaseDistribution:
    if isinstance(one, Choice):
        return optuna.distributions.CategoricalDistribution(list(one.options))
    points = one.points() if one.step else None
    high = float(points[-1]) if points else one.high  # Optuna wants the last step itself
    if one.whole:
        return optuna.distributions.IntDistribution(int(one.low), int(high), log=one.log, step=int(one.step or 1))
    return optuna.distributions.FloatDistribution(float(one.low), float(high), log=one.log, step=one.step)


__all__ = ["Study", "Trial", "Tried"]
