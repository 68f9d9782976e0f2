"""Every shipped sweep loads against its pipeline, and every key in it is refused when it is misspelled."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from align.config.yaml import load_yaml
from align.errors import UserError
from align.extensions.sweep.config import load_sweep
from align.extensions.sweep.plan import Sweep
from tests.support.pipeline.misspelling import SWEEPS, keys, misspell, rename


def test_all_are_there() -> None:
    assert {"dpo"} <= {path.stem for path in SWEEPS}


@pytest.mark.parametrize("path", SWEEPS, ids=str)
def test_it_loads_and_shares_something(path: Path) -> None:
    sweep = Sweep.check(load_sweep(path), str(path))
    head = path.read_text(encoding="utf-8").split("name:")[0]
    assert head.startswith("#") and len(head) > 100, "the head comment says purpose, cost and measured result"
    needed = sweep.needed(sweep.first)
    assert set(sweep.shared) & needed, "trials share a stage"
    assert needed - set(sweep.shared), "and differ in one"


@pytest.mark.parametrize("path", SWEEPS, ids=str)
def test_misspelled_key_of_a_sweep_gets_a_suggestion(path: Path, tmp_path: Path) -> None:
    rng, raw = random.Random(0), load_yaml(path)
    raw["pipeline"] = str((path.parent / raw["pipeline"]).absolute())
    for place in keys(raw):
        key = str(place[-1])
        last = key.rpartition(".")[2]  # of a path its last part
        wrong = key.removesuffix(last) + misspell(last, rng)
        file = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump(rename(raw, place, wrong), sort_keys=False))
        with pytest.raises(UserError) as caught:
            Sweep.check(load_sweep(file), str(file))
        assert f"'{last}'" in str(caught.value), f"{place} as {wrong}: {caught.value}"
