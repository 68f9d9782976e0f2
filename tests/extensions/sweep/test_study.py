"""The study on disk: what is asked next, what an interruption leaves, what another file of the same name is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from align.errors import UserError
from align.extensions.sweep.study import Study, Trial, TrialLost
from align.extensions.sweep.table import sentences, trial_rows
from align.store.store import Store
from tests.support.sweep import toy_sweep

SPACE: dict[str, Any] = {
    "stages.ppo.height": {"low": 0.0, "high": 1.0},
    "stages.ppo.steps": {"low": 1, "high": 8},
    "stages.ppo.kind": ["a", "b"],
}


def value(trial: Trial) -> list[float]:
    return [float(trial.draw["stages.ppo.height"]) - 0.1 * (trial.draw["stages.ppo.kind"] == "a")]


def finish(study: Study, most: int = 10**6) -> list[dict[str, Any]]:
    """Run to the end with a made-up result; the draws in order."""
    draws = []
    while len(draws) < most and (trial := study.next()) is not None:
        draws.append(trial.draw)
        study.complete(trial, value(trial))
    return draws


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_an_interrupted_sweep_asks_for_the_same_trials(sampler: str, tmp_path: Path) -> None:
    sweep = toy_sweep.check(tmp_path, space=SPACE, trials=16, sampler=sampler, seed=5)
    full = finish(toy_sweep.opened(sweep, tmp_path / "whole"))
    parts: list[dict[str, Any]] = []
    for most in (3, 1, 8, 99):  # past TPE's ten random trials, too
        parts += finish(toy_sweep.opened(sweep, tmp_path / "parts"), most)
    assert parts == full and len(full) == 16
    assert len({first["stages.ppo.height"] for first in full}) == 16, "no draw comes twice"
    second = toy_sweep.check(tmp_path, space=SPACE, trials=16, sampler=sampler, seed=6)
    assert finish(toy_sweep.opened(second, tmp_path / "other")) != full


def test_tpe_learns_where_random_does_not(tmp_path: Path) -> None:
    def late(sampler: str) -> float:
        sweep = toy_sweep.check(tmp_path, space=SPACE, trials=40, sampler=sampler)
        draws = finish(toy_sweep.opened(sweep, tmp_path / sampler))[20:]
        return sum(float(draw["stages.ppo.height"]) for draw in draws) / len(draws)

    assert late("tpe") > 0.75 > 0.6 > late("random")


def test_abandoned_trial_continues_under_its_number(tmp_path: Path) -> None:
    sweep = toy_sweep.check(tmp_path, space=SPACE, trials=3)
    study = toy_sweep.opened(sweep, tmp_path / "s")
    first = study.next()
    assert first is not None and not first.resumed
    second_study = toy_sweep.opened(sweep, tmp_path / "s")
    second = second_study.next()
    assert second is not None and second.number == 1, "the first one is being run"
    first.hold.release()  # as the end of its process does
    again = second_study.next()
    assert again is not None and (again.number, again.draw, again.resumed) == (0, first.draw, True)
    second_study.complete(again, [0.5])
    assert [trial.state for trial in study.trials()] == ["done", "unfinished"]
    assert study.trials()[0].values == [0.5]


ELSEWHERE = """
import fcntl, json, sys, time
from pathlib import Path
from align.store import locks
from tests.support.sweep import toy_sweep
locks._machine = lambda: sys.argv[1]
fcntl.flock = lambda *_: None  # as on a file system that keeps such locks on each machine
folder, most = Path(sys.argv[2]), int(sys.argv[3])
space = {"stages.ppo.height": [0.1 * n for n in range(8)]}
sweep = toy_sweep.check(folder / sys.argv[1], space=space, sampler="grid", trials=None)
study = toy_sweep.opened(sweep, folder / "store", lease=2.0)
while most and (trial := study.next()) is not None:
    print(trial.number, flush=True)
    most -= 1
    if most:
        study.complete(trial, [0.5])
time.sleep(0 if most else 600)
"""


def elsewhere(folder: Path, machine: str, most: int) -> subprocess.Popen[str]:
    """A worker on another machine, which says what trials it takes; it keeps the last of ``most`` for ever."""
    (folder / machine).mkdir()
    command = [sys.executable, "-c", ELSEWHERE, machine, str(folder), str(most)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_workers_on_several_machines_take_each_trial_once(tmp_path: Path) -> None:
    workers = [elsewhere(tmp_path, machine, 99) for machine in ("a", "b", "c")]
    chosen = [number for worker in workers for number in worker.communicate(timeout=240)[0].split()]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert sorted(map(int, chosen)) == list(range(8))


def test_trial_of_a_dead_machine_continues_after_silence(tmp_path: Path) -> None:
    worker = elsewhere(tmp_path, "a", 8)
    assert worker.stdout is not None
    try:
        assert [int(worker.stdout.readline()) for _ in range(8)] == list(range(8))
        space = {"stages.ppo.height": [0.1 * n for n in range(8)]}
        sweep = toy_sweep.check(tmp_path, space=space, sampler="grid", trials=None)
        study = toy_sweep.opened(sweep, tmp_path / "store", lease=2.0)
        assert study.next() is None, "the other shows that it lives"
    finally:
        worker.kill()
        worker.wait()
    actual = study.next()
    assert actual is not None and (actual.number, actual.resumed) == (7, True)
    study.complete(actual, [0.7])
    assert study.next() is None and {trial.state for trial in study.trials()} == {"done"}


def test_a_worker_whose_trial_was_taken_over_tells_nothing_of_it(tmp_path: Path) -> None:
    sweep = toy_sweep.check(tmp_path, space=SPACE, trials=1)
    first, second = toy_sweep.opened(sweep, tmp_path / "s"), toy_sweep.opened(sweep, tmp_path / "s")
    trial = first.next()
    assert trial is not None
    claim = trial.hold.claims
    claim.create(trial.hold.number + 1, claim.read(trial.hold.number))  # as another does after this one's silence
    with pytest.raises(TrialLost, match="was taken by process"):
        first.complete(trial, [0.9])
    assert second.trials()[0].state == "unfinished"


def test_trial_that_died_undrawn_gets_the_same_draw(tmp_path: Path) -> None:
    sweep = toy_sweep.check(tmp_path, space=SPACE, trials=2)
    expected = finish(toy_sweep.opened(sweep, tmp_path / "whole"))
    study = toy_sweep.opened(sweep, tmp_path / "s")
    study._study.ask()  # no parameters yet
    trial = toy_sweep.opened(sweep, tmp_path / "s").next()
    assert trial is not None and trial.resumed and trial.draw == expected[0]


def test_a_grid_is_run_in_order_and_more_of_it_later(tmp_path: Path) -> None:
    space = {"stages.ppo.kind": ["a", "b"], "stages.ppo.height": [0.2, 0.4]}
    some = toy_sweep.check(tmp_path, space=space, sampler="grid", trials=3)
    draws = finish(toy_sweep.opened(some, tmp_path / "s"))
    heights = [(draw["stages.ppo.kind"], draw["stages.ppo.height"]) for draw in draws]
    assert heights == [("a", "0.2"), ("a", "0.4"), ("b", "0.2")]
    full = toy_sweep.check(tmp_path, space=space, sampler="grid", trials=None)
    assert [list(trial.values()) for trial in finish(toy_sweep.opened(full, tmp_path / "s"))] == [["b", "0.4"]]
    assert toy_sweep.opened(full, tmp_path / "s").next() is None


def test_retry_of_a_partial_grid_adds_no_other_trial(tmp_path: Path) -> None:
    space = {"stages.ppo.kind": ["a", "b"], "stages.ppo.height": [0.2, 0.4]}
    study = toy_sweep.opened(toy_sweep.check(tmp_path, space=space, sampler="grid", trials=2), tmp_path / "s")
    first = study.next()
    assert first is not None
    study.fail(first, error="no")
    assert len(finish(study)) == 1 and study.retry() == 1
    assert finish(study) == [first.draw]


def test_retry_of_a_grid_precedes_its_other_trials(tmp_path: Path) -> None:
    space = {"stages.ppo.kind": ["a", "b"], "stages.ppo.height": [0.2, 0.4, 0.6]}
    full = toy_sweep.check(tmp_path, space=space, sampler="grid", trials=None)
    study = toy_sweep.opened(full, tmp_path / "s")
    first = study.next()
    assert first is not None
    study.fail(first, error="no")
    assert finish(study, 1) and study.retry() == 1
    again = study.next()
    assert again is not None and again.is_retry and not again.resumed and again.draw == first.draw
    study.fail(again, error="no")
    assert study.retry() == 1
    # a lower limit: two trials were begun, so one more may be, beside the retry
    lower = toy_sweep.opened(toy_sweep.check(tmp_path, space=space, sampler="grid", trials=3), tmp_path / "s")
    assert [list(draw.values()) for draw in finish(lower)] == [["a", "0.2"], ["a", "0.6"]]


def test_a_trial_run_again_takes_no_new_ones_place(tmp_path: Path) -> None:
    study = toy_sweep.opened(toy_sweep.check(tmp_path, space=SPACE, trials=2), tmp_path / "s")
    first = study.next()
    assert first is not None
    study.fail(first, error="no")
    assert study.retry() == 1
    again = finish(study)
    assert len(again) == 2 and again[0] == first.draw != again[1]


def test_failed_trials_count_and_can_be_run_again(tmp_path: Path) -> None:
    sweep = toy_sweep.check(tmp_path, space=SPACE, trials=2)
    study = toy_sweep.opened(sweep, tmp_path / "s")
    first, second = study.next(), study.next()
    assert first is not None and second is not None
    study.fail(first, error="no")
    study.complete(second, [0.1])
    assert study.next() is None and study.best() == [1]
    assert study.retry() == 1 and study.retry() == 0
    again = study.next()
    assert again is not None and again.draw == first.draw and again.number == 2
    study.complete(again, [0.9])
    assert study.next() is None and study.best() == [2]


def test_trials_with_the_same_value_tie_and_none_of_them_is_best(tmp_path: Path) -> None:
    sweep = toy_sweep.check(tmp_path, space=SPACE, trials=3)
    study = toy_sweep.opened(sweep, tmp_path / "s")
    for gold in (0.0, -1.0, 0.0):
        trial = study.next()
        assert trial is not None
        study.complete(trial, [gold])
    assert study.best() == [0, 2]
    lines = sentences(sweep, trial_rows(sweep, study))
    assert "No trial is best: 0, 2 (*) all have 0.000." in lines
    assert not any(line.startswith("Best") for line in lines)


def test_two_objectives_have_a_front(tmp_path: Path) -> None:
    sweep = toy_sweep.check(tmp_path, space=SPACE, trials=3, minimize="ppo.kl")
    study = toy_sweep.opened(sweep, tmp_path / "s")
    for values in ([0.5, 1.0], [0.9, 4.0], [0.4, 2.0]):
        trial = study.next()
        assert trial is not None
        study.complete(trial, values)
    assert sorted(study.best()) == [0, 1]


def test_different_sweep_of_the_same_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    sweep = toy_sweep.check(tmp_path, space=SPACE, trials=2)
    finish(toy_sweep.opened(sweep, folder))
    finish(toy_sweep.opened(toy_sweep.check(tmp_path, space=SPACE, trials=4, workers=2), folder))
    raw = toy_sweep.pipeline()
    raw["stages"]["one"]["number"] = 9
    for changes, part in [
        ({"space": {**SPACE, "stages.ppo.height": {"low": 0.0, "high": 2.0}}}, "another space,"),
        ({"maximize": "ppo.kl"}, "another objective,"),
        ({"seed": 3}, "another sampler,"),
        ({"raw": raw}, "another pipeline,"),
        ({"raw": raw, "minimize": "ppo.kl"}, "another objective and another pipeline,"),
    ]:
        second_study = toy_sweep.check(tmp_path, **{"space": SPACE, "trials": 2, **changes})
        with pytest.raises(UserError, match=part):
            toy_sweep.opened(second_study, folder)
    fresh = toy_sweep.opened(toy_sweep.check(tmp_path, raw, space=SPACE, trials=2), folder, fresh=True)
    assert fresh.trials() == [] and (folder / "sweeps" / "sw" / "earlier-1" / "journal.log").is_file()


def test_a_sweep_of_which_nothing_is_done_may_change(tmp_path: Path) -> None:
    study = toy_sweep.opened(toy_sweep.check(tmp_path, space=SPACE, maximize="ppo.golld"), tmp_path / "s")
    trial = study.next()
    assert trial is not None
    study.release(trial)
    assert toy_sweep.opened(toy_sweep.check(tmp_path, space=SPACE), tmp_path / "s").trials() == []


def test_successive_halving_ends_who_is_behind_at_a_rung(tmp_path: Path) -> None:
    prune = {"maximize": "ppo.score", "start": 2, "reduction": 2}
    study = toy_sweep.opened(toy_sweep.check(tmp_path, space=SPACE, trials=4, prune=prune), tmp_path / "s")
    ends = []
    for height in (1.0, 0.5, 2.0, 0.1):
        trial = study.next()
        assert trial is not None
        ended = next((step for step in range(1, 9) if study.should_prune(trial, step, height * step)), None)
        ends.append(ended)
        if ended is None:
            study.complete(trial, [height])
        else:
            study.prune(trial)
    # rungs at 2, 4, 8: the first has no rival; each later one must be in the better half of those that came as far
    assert ends == [None, 2, None, 2]
    assert [entry.state for entry in study.trials()] == ["done", "ended early", "done", "ended early"]


def test_what_is_private_in_optuna_is_still_there() -> None:
    study = optuna.create_study()
    trial = study.ask()
    chosen = optuna.Trial(study, study.get_trials()[0]._trial_id)
    assert chosen.number == trial.number and chosen.suggest_float("x", 0, 1) == chosen.suggest_float("x", 0, 1)


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"seal": 1}'])
def test_a_damaged_file_about_the_study_is_named(tmp_path: Path, content: str) -> None:
    sweep = toy_sweep.check(tmp_path, space=SPACE, trials=3)
    about = toy_sweep.opened(sweep, tmp_path / "s").folder / "sweep.json"
    about.write_text(content)
    with pytest.raises(UserError, match=r"sweep\.json: damaged: it .*--fresh starts the sweep over"):
        toy_sweep.opened(sweep, tmp_path / "s")
    Study.open(Store.open(tmp_path / "s"), sweep, fresh=True)
    toy_sweep.opened(sweep, tmp_path / "s")


@pytest.mark.parametrize("line", ["[]", "{}", "{", '{"op_code": "x"}', '{"op_code": 4, "worker_id": "a"}'])
def test_a_damaged_journal_is_named(tmp_path: Path, line: str) -> None:
    sweep = toy_sweep.check(tmp_path, space=SPACE, trials=3)
    study = toy_sweep.opened(sweep, tmp_path / "s")
    finish(study, 1)
    journal = study.folder / "journal.log"
    journal.write_text("\n".join([*journal.read_text().splitlines(), line, line, ""]))
    with pytest.raises(UserError, match=r"journal\.log: damaged: Optuna cannot read it"):
        toy_sweep.opened(sweep, tmp_path / "s")
