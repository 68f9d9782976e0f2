"""The shipped fields of other packages' classes equal the tested versions'. Other versions check their own options."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from align.config.options import check_options, check_trainer_options, check_type, field_dumps
from align.config.options.field_dumps import PEFT, SHIPPED, TRAINERS, class_options
from align.config.stages.sft import SftConfig
from tests.support.refusals import Refused

SFT = "trl.trainer.sft_config:SFTConfig"
REFRESH = "The shipped fields are out of date. Write them again: python -m tools.dump_fields"
ROOT = Path(__file__).parents[3]


@pytest.fixture
def other_versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another trl, transformers and peft than the tested ones."""
    monkeypatch.setattr(field_dumps, "_installed_version", lambda package: "99.0")
    class_options.cache_clear()
    yield
    class_options.cache_clear()


def test_shipped_fields_have_the_tested_versions() -> None:
    pins = dict(re.findall(r"^(trl|transformers|peft)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    shipped = json.loads(SHIPPED.read_text())
    assert shipped[TRAINERS]["versions"] | shipped[PEFT]["versions"] == pins, REFRESH


def test_shipped_fields_equal_the_imported_classes() -> None:
    shipped = json.loads(SHIPPED.read_text())
    expected = shipped[TRAINERS]["versions"] | shipped[PEFT]["versions"]
    installed = {package: field_dumps._installed_version(package) for package in expected}
    if installed != expected:
        pytest.skip(f"the shipped fields are those of {expected}; installed: {installed}")
    from tools.dump_fields import shipped_text

    assert SHIPPED.read_text() == shipped_text(), REFRESH


@pytest.mark.usefixtures("other_versions")
def test_other_versions_leave_options_to_the_class(refused: Refused) -> None:
    assert class_options(SFT) is None
    check_trainer_options(SFT, {"new_option": 1, "adam_beta2": "high"}, (), {})
    check_options("vera", {"new_option": 1})
    check_type("vera")
    refused(check_trainer_options, SFT, {"num_train_epochs": 1}, (), {"num_train_epochs": "set 'epochs'"})
    refused(check_type, "veru")


def test_a_users_class_checks_its_own_options() -> None:
    assert class_options("theirs.arguments:Arguments") is None


def test_config_accepts_options_of_other_versions(other_versions: None) -> None:
    config = SftConfig.model_validate({"model": "m", "data": "d", "trainer": {"new_option": 1}})
    assert config.trainer == {"new_option": 1}
