"""A sweep's trials as all its workers share them: what was tried, what to try next, who is behind.

A study lies in a folder of the store: Optuna's journal (which has a lock of its own, a link that NFS makes once), and a
lock for each trial that is being run. A trial whose lock nobody holds was interrupted, as is one whose holder was
silent for the store's lease; the next worker, on whatever machine, goes on with it under its own number. The sampler
of each trial is seeded by the sweep's seed and the trial's number, so that a sweep that was interrupted asks for the
same trials as one that was not: Optuna's own samplers would begin their random numbers anew. This file and
``optuna_words.py`` alone know Optuna. Left out: running a trial (``work.py``). Never imports torch.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from align.errors import UserError
from align.store.json_files import DamagedFile, as_json, parse_sealed, write_sealed
from align.store.locks import Hold, Lock, LockLost
from align.store.store import SWEEPS, Store
from align.sweep.optuna_terms import distribution_of, handle_of, pruner_of, sampler_of, suggest
from align.sweep.plan import Sweep
from align.sweep.space import Draw, grid

JOURNAL, ABOUT, LOCKS = "journal.log", "sweep.json", "locks"
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
    hold: Hold
    handle: optuna.Trial


class TrialLost(Exception):
    """Another worker has taken the trial over while this one was silent; what it came to is the other's to tell."""


class Study:
    """A sweep's trials, shared by all its workers. Make one with :meth:`open`."""

    def __init__(self, store: Store, sweep: Sweep) -> None:
        config = sweep.config
        self.store, self.config, self.space, self.objectives = store, config, sweep.space, sweep.objectives
        self.folder = folder_of(store, sweep)
        self.limit = config.trials or (len(grid(self.space, "")) if config.sampler == "grid" else DEFAULT_TRIALS)
        self._locks: dict[int, Lock] = {}
        """Of trials. Kept from look to look: only who has watched a lock can tell that its holder is silent."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with _named_damage(self.folder):
            self._study = optuna.create_study(
                storage=_storage(self.folder),
                study_name=config.name,
                directions=["maximize" if one.higher else "minimize" for one in self.objectives],
                pruner=pruner_of(config.prune),
                load_if_exists=True,
            )
            self._study.get_trials(deepcopy=False)

    @classmethod
    def open(cls, store: Store, sweep: Sweep, *, fresh: bool = False) -> Study:
        """The sweep's study in ``store``, begun where there is none.

        One whose trials have other parts in common is refused with ``UserError``, which says which; with ``fresh`` it
        is put aside.
        """
        config, parts, folder = sweep.config, as_json(dict(sweep.parts())), folder_of(store, sweep)
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / ABOUT
        with _alone(store, folder):
            known = {} if fresh else _known(about)
            same = known == parts
            if about.exists() and (fresh or (not same and not _has_results(folder, config.name))):
                number = next(at for at in range(1, 10**6) if not (folder / f"earlier-{at}").exists())
                (folder / f"earlier-{number}").mkdir()
                for name in (JOURNAL, ABOUT):
                    if (folder / name).exists():
                        (folder / name).rename(folder / f"earlier-{number}" / name)
            if about.exists():
                _compare(_known(about) or {}, parts, config.name)
            else:
                write_sealed(about, parts)
            study = cls(store, sweep)
            if config.sampler == "grid":
                queued = sum(RETRY not in one.user_attrs for one in study._study.get_trials(deepcopy=False))
                for draw in grid(study.space, "")[queued : study.limit]:
                    study._study.enqueue_trial(dict(draw))
        return study

    # ---- asking -------------------------------------------------------------------------------------------------

    def next(self) -> Trial | None:
        """An interrupted trial to go on with, else a new one, else None: as many as wanted were begun.

        Before it is None, those that run on other machines are watched until each has shown that it lives.
        """
        while True:
            with _alone(self.store, self.folder):
                found = self._study.get_trials(deepcopy=False)
                taken = self._interrupted(found) or self._new(found)
            if taken is not None:
                return taken
            running = [one.number for one in found if one.state == TrialState.RUNNING]
            if all(self._lock(number).holder_lives(self.store.patience) for number in running):
                return None

    def _interrupted(self, found: Sequence[FrozenTrial]) -> Trial | None:
        for one in found:
            if one.state != TrialState.RUNNING or (hold := self._take(one.number)) is None:
                continue
            if self._study.get_trials(deepcopy=False)[one.number].state != TrialState.RUNNING:  # told since that look
                self._give_back(hold)
                continue
            self._study.sampler = sampler_of(self.config, one.number)
            handle = handle_of(self._study, one)
            # what was drawn before comes again; what the interruption left undrawn is drawn now
            draw = {each.name: suggest(handle, each) for each in self.space}
            return Trial(one.number, draw, True, hold, handle)
        return None

    def _new(self, found: Sequence[FrozenTrial]) -> Trial | None:
        begun = [one for one in found if one.state != TrialState.WAITING]
        if len(begun) - sum(RETRY in one.user_attrs for one in begun) >= self.limit and not _retries(found):
            return None
        self._study.sampler = sampler_of(self.config, len(found))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a sampler is experimental
            made = self._study.ask({one.name: distribution_of(one) for one in self.space})
        hold = self._take(made.number)
        assert hold is not None
        return Trial(made.number, dict(made.params), False, hold, made)

    def retry(self) -> int:
        """Put failed trials, each once, before the new ones; returns how many."""
        with _alone(self.store, self.folder):
            found = self._study.get_trials(deepcopy=False)
            taken = {one.user_attrs.get(RETRY) for one in found}
            failed = [one for one in found if one.state == TrialState.FAIL and one.number not in taken]
            for one in failed:
                self._study.enqueue_trial(dict(one.params), user_attrs={RETRY: one.number})
        return len(failed)

    def _lock(self, number: int) -> Lock:
        place = self.folder / LOCKS / f"trial-{number}"
        return self._locks.setdefault(number, Lock(place, self.store.lease))

    def _take(self, number: int) -> Hold | None:
        return self.store.patience.keep_trying(self._lock(number).try_acquire)

    def _give_back(self, hold: Hold) -> None:
        self.store.patience.keep_trying(hold.release)

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
        self._give_back(trial.hold)

    def _tell(self, trial: Trial, state: TrialState, values: list[float] | None, notes: Mapping[str, Any]) -> None:
        try:
            self.store.patience.keep_trying(trial.hold.confirm)
        except LockLost as lost:
            raise TrialLost(str(lost)) from None
        for name, value in notes.items():
            trial.handle.set_user_attr(name, value)
        self._study.tell(trial.number, values, state)
        self._give_back(trial.hold)

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


def folder_of(store: Store, sweep: Sweep) -> Path:
    """Where a sweep's study lies."""
    return store.root / SWEEPS / sweep.config.name


def _known(about: Path) -> dict[str, Any] | None:
    """What the trials of a study have in common; None where none was begun. ``UserError`` for a damaged file."""
    try:
        return parse_sealed(about.read_bytes())
    except FileNotFoundError:
        return None
    except DamagedFile as error:
        raise UserError(f"{about}: damaged: it {error}. --fresh begins the sweep anew; finished stages stay.") from None


@contextlib.contextmanager
def _alone(store: Store, folder: Path) -> Iterator[None]:
    """No other worker, on whatever machine, opens the study or asks it meanwhile."""
    hold = Lock(folder / LOCKS / "ask", store.lease).acquire(lambda _: None, store.patience)
    try:
        yield
    finally:
        store.patience.keep_trying(hold.release)


def _storage(folder: Path) -> JournalStorage:
    # absolute: the lock beside it is a link to it, and a link starts at its own folder
    return JournalStorage(JournalFileBackend(str((folder / JOURNAL).resolve())))


@contextlib.contextmanager
def _named_damage(folder: Path) -> Iterator[None]:
    """Turn what Optuna stumbles over in its journal into a ``UserError`` that names the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        raise UserError(
            f"{folder / JOURNAL}: damaged: Optuna cannot read it ({type(error).__name__}: {error}). --fresh begins the "
            "sweep anew; finished stages stay."
        ) from None


def _has_results(folder: Path, name: str) -> bool:
    """Whether a trial of the study in ``folder`` came to its end."""
    if not (folder / JOURNAL).exists():
        return False
    with _named_damage(folder):
        storage = _storage(folder)
        if name not in optuna.get_all_study_names(storage):  # interrupted before the study itself was written
            return False
        found = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
    return any(one.state.is_finished() for one in found)


def _retries(found: Sequence[FrozenTrial]) -> bool:
    return any(one.state == TrialState.WAITING and RETRY in one.user_attrs for one in found)


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> None:
    changed = [part for part in {**old, **new} if old.get(part) != new.get(part)]
    if "space" in changed:  # the pipeline is looked at with the space's own values
        changed = [part for part in changed if part != "pipeline"]
    if changed:
        raise UserError(
            f"the sweep '{name}' was begun with another {' and another '.join(changed)}, so its trials cannot be "
            "compared. Give this one another name, or begin anew with --fresh (finished stages stay)."
        )


__all__ = ["Study", "Trial", "TrialLost", "Tried", "folder_of"]
