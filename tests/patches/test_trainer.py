"""Overrides of trainers' private methods are listed, and changed methods are refused."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest
from transformers import Trainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

import align.training
from align.errors import UserError
from align.patches.trainer import TRAINER, TRL, check_overrides
from align.rl.trainer import RLTrainer

PRIVATE = {
    name
    for trainer in (Trainer, SFTTrainer, DPOTrainer)
    for name, method in inspect.getmembers(trainer, inspect.isfunction)
    if name.startswith("_") and not name.startswith("__")
}
"""Private methods of the trainers of transformers and trl."""


def modules(package: ModuleType) -> Iterator[ModuleType]:
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        yield importlib.import_module(info.name)


def overridden_methods(package: ModuleType) -> set[str]:
    """Return the private methods of trainers that classes of a package define."""
    names = set()
    for module in modules(package):
        for value in vars(module).values():
            if inspect.isclass(value) and value.__module__ == module.__name__:
                names |= PRIVATE & {name for name, attribute in vars(value).items() if inspect.isfunction(attribute)}
    return names


def test_overrides_of_supervised_trainers_are_listed() -> None:
    assert overridden_methods(align.training) == TRAINER.keys() | {path.rpartition(".")[2] for path in TRL}


def test_rl_trainer_overrides_no_private_method() -> None:
    names = [name for trainer in (RLTrainer, *RLTrainer.__subclasses__()) for name in vars(trainer)]
    assert [name for name in names if name in PRIVATE] == []


def test_changed_method_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_overrides()
    monkeypatch.setattr(Trainer, "_run_epoch", lambda self, epoch: None)
    with pytest.raises(UserError, match=r"^transformers \S+: transformers:Trainer\._run_epoch has the parameters"):
        check_overrides()


def test_missing_method_of_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(DPOTrainer, "_precompute_ref_logps")
    with pytest.raises(UserError, match=r"^trl \S+ has no trl.trainer.dpo_trainer:DPOTrainer._precompute_ref_logps"):
        check_overrides()
