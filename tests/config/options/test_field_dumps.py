"""Dumps of fields: the shipped one is right, others are made once, kept, and never trusted when damaged."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.config.options import check_trainer_options, check_type, field_dumps
from align.config.options.field_dumps import (
    PEFT,
    SHIPPED,
    TRAINERS,
    FieldDump,
    UnreadableClass,
    class_options,
    field_dump,
)
from align.config.stages.preference import OrpoConfig

SFT = "trl.trainer.sft_config:SFTConfig"
REFRESH = "The shipped fields are out of date. Write them again: python -m align.training.dump_fields"
ROOT = Path(__file__).parents[3]
PLAIN = """
from dataclasses import dataclass

@dataclass
class Arguments:
    patience: int = 3
"""


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> Callable[[str], Path]:
    """A function that writes a module ``theirs.arguments``, which may be imported."""
    monkeypatch.syspath_prepend(str(tmp_path / "project"))
    file = tmp_path / "project" / "theirs" / "arguments.py"
    file.parent.mkdir(parents=True)

    def write(source: str) -> Path:
        file.write_text(source, encoding="utf-8")
        look_up_anew()
        return file

    return write


def look_up_anew() -> None:
    """Forget what this process has read, as a new one."""
    class_options.cache_clear()
    field_dump.cache_clear()


def fake_dump(monkeypatch: pytest.MonkeyPatch, dump: FieldDump) -> list[str]:
    """Have ``dump`` be the result of every process; returns the list that subjects are added to."""
    subjects: list[str] = []

    def make(subject: str, versions: dict[str, str]) -> FieldDump:
        subjects.append(subject)
        return dump

    monkeypatch.setattr(field_dumps, "_make_dump", make)
    return subjects


def set_versions(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    real = field_dumps._installed_version
    monkeypatch.setattr(field_dumps, "_installed_version", lambda package: versions.get(package) or real(package))


# --- shipped ---


def test_the_shipped_fields_are_those_of_the_tested_versions() -> None:
    pins = dict(re.findall(r"^(trl|transformers|peft)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    shipped = json.loads(SHIPPED.read_text())
    assert shipped[TRAINERS]["versions"] | shipped[PEFT]["versions"] == pins, REFRESH


def test_the_shipped_fields_are_those_of_the_imported_classes() -> None:
    shipped = json.loads(SHIPPED.read_text())
    expected = shipped[TRAINERS]["versions"] | shipped[PEFT]["versions"]
    installed = {package: field_dumps._installed_version(package) for package in expected}
    if installed != expected:
        pytest.skip(f"the shipped fields are those of {expected}; installed: {installed}")
    from align.training.dump_fields import shipped_text

    assert SHIPPED.read_text() == shipped_text(), REFRESH


@pytest.mark.usefixtures("empty_cache", "no_process")
def test_the_tested_versions_need_no_process_and_no_cache(empty_cache: Path) -> None:
    assert class_options(SFT)["adam_beta1"].annotation == "float"
    assert "vera" in field_dump(PEFT).classes
    assert not empty_cache.exists()


# --- other versions ---


@pytest.mark.usefixtures("forked_dumps")
def test_other_versions_are_read_once_in_a_process_of_their_own(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = class_options(SFT)
    look_up_anew()
    set_versions(monkeypatch, trl="1.17.3")
    with caplog.at_level(logging.WARNING):
        assert class_options(SFT) == known
        assert class_options("align.rl.arguments:RolloutArguments")["critic_adam_epsilon"].annotation == "float"
    assert [record.message for record in caplog.records] == [
        "reading the options of trainers for trl 1.17.3, transformers "
        f"{field_dumps._installed_version('transformers')}, once (some seconds)"
    ]
    assert len(list((empty_cache / "class-fields").iterdir())) == 1

    look_up_anew()
    monkeypatch.setattr(field_dumps.subprocess, "run", lambda *arguments, **options: pytest.fail("read again"))
    assert class_options(SFT) == known
    # Another version has another file, and peft's fields do not depend on trl.
    assert "vera" in field_dump(PEFT).classes
    set_versions(monkeypatch, trl="1.17.4")
    look_up_anew()
    with pytest.raises(pytest.fail.Exception, match="read again"):
        class_options(SFT)


@pytest.mark.usefixtures("forked_dumps")
def test_other_versions_of_peft_are_read_too(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = field_dump(PEFT)
    look_up_anew()
    set_versions(monkeypatch, peft="0.22.0")
    assert field_dump(PEFT) == known
    assert [file.name.partition("-")[0] for file in (empty_cache / "class-fields").iterdir()] == ["peft"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: text.replace("float", "str"),  # complete JSON, but not what was written
        lambda text: "[]",
        lambda text: json.dumps({"classes": {"x:Y": {}}}),
    ],
)
def test_a_damaged_file_is_made_again(
    damage: Callable[[str], str], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_versions(monkeypatch, trl="1.17.3")
    subjects = fake_dump(monkeypatch, FieldDump({SFT: {"adam_beta1": {"type": "float"}}}))
    assert class_options(SFT)["adam_beta1"].annotation == "float"
    (file,) = (empty_cache / "class-fields").iterdir()
    intact = file.read_text()
    file.write_text(damage(intact))
    look_up_anew()
    assert class_options(SFT)["adam_beta1"].annotation == "float"
    assert subjects == [TRAINERS, TRAINERS]
    assert file.read_text() == intact


def test_a_change_of_align_makes_a_dump_again(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_versions(monkeypatch, trl="1.17.3")
    subjects = fake_dump(monkeypatch, FieldDump({SFT: {}}))
    real = field_dumps.file_digest
    class_options(SFT)
    look_up_anew()
    monkeypatch.setattr(field_dumps, "file_digest", lambda file: real(file) + ("x" if file.name == "rl.py" else ""))
    class_options(SFT)
    assert subjects == [TRAINERS, TRAINERS]


def test_a_cache_that_cannot_be_written_costs_time_only(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty_cache.write_text("a file where the folder should be")
    set_versions(monkeypatch, trl="1.17.3")
    fake_dump(monkeypatch, FieldDump({SFT: {"adam_beta1": {"type": "float"}}}))
    assert class_options(SFT)["adam_beta1"].annotation == "float"
    assert re.search(r"cache/class-fields/trainers-\w+\.json cannot be written .*Set ALIGN_CACHE", caplog.text)


def test_a_class_that_fails_does_not_keep_the_others_from_use(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its failure is not kept: the next command tries that class again, alone."""
    orpo = OrpoConfig.trainer_class
    set_versions(monkeypatch, trl="1.17.3")
    dump = FieldDump({SFT: {"adam_beta1": {"type": "float"}}}, {orpo: "importing it failed"})
    subjects = fake_dump(monkeypatch, dump)
    assert class_options(SFT)
    with pytest.raises(UnreadableClass, match="importing it failed"):
        class_options(orpo)
    with pytest.raises(ValueError, match="ORPOConfig, cannot be read: importing it failed"):
        OrpoConfig(policy="sft", data="data", learning_rate=1e-6)
    look_up_anew()
    assert class_options(SFT)
    with pytest.raises(UnreadableClass, match="importing it failed"):
        class_options(orpo)
    assert subjects == [TRAINERS, orpo]


def test_a_class_that_trl_no_longer_has_is_kept_as_gone(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orpo = OrpoConfig.trainer_class
    set_versions(monkeypatch, trl="1.17.3")
    subjects = fake_dump(monkeypatch, FieldDump({SFT: {}, orpo: "trl has no file experimental/orpo/orpo_config.py."}))
    for _ in range(2):
        look_up_anew()
        with pytest.raises(LookupError, match=r"trl has no file experimental/orpo/orpo_config\.py"):
            class_options(orpo)
    assert subjects == [TRAINERS]


# --- processes that fail ---


def run_code(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have the process run ``code`` instead."""
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **rest: real([sys.executable, "-c", code], **rest))


def test_a_process_that_ends_early_is_named_with_its_last_words(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_versions(monkeypatch, trl="1.17.3", peft="0.22.0")
    run_code(monkeypatch, "import sys; print('undefined symbol: foo', file=sys.stderr); sys.exit(3)")
    message = (
        "cannot be read: the process that imports it ended with exit code 3: undefined symbol: foo. "
        f"`{sys.executable} -P -m align.training.dump_fields trainers -` shows the whole error."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_trainer_options(SFT, {"adam_beta1": 0.9}, (), {})
    with pytest.raises(ValueError, match=r"the methods of peft cannot be read: .* exit code 3: undefined symbol: foo"):
        check_type("vera")
    assert not empty_cache.exists()


def test_a_process_that_hangs_is_ended(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_versions(monkeypatch, peft="0.22.0")
    monkeypatch.setattr(field_dumps, "TIMEOUT_SECONDS", 0.5)
    run_code(monkeypatch, "import time; time.sleep(60)")
    with pytest.raises(ValueError, match=r"ended with no result after 0\.5 s"):
        check_type("vera")


# --- users' classes ---


def test_a_users_class_is_read_again_only_when_its_code_changes(
    package: Callable[[str], Path], empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "theirs.arguments:Arguments"
    package(PLAIN)
    assert {name: option.annotation for name, option in class_options(path).items()} == {"patience": "int"}
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("read again"))
        look_up_anew()
        assert set(class_options(path)) == {"patience"}
    package(PLAIN + "    patients: list[str] | None = None\n")
    assert class_options(path)["patients"].annotation == "list[str] | None"


def test_a_users_class_is_found_where_this_process_finds_it(
    package: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of the current folder must not hide an installed one."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "pydantic.py").write_text("raise RuntimeError('hidden')")
    monkeypatch.chdir(tmp_path / "elsewhere")
    package(PLAIN)
    assert set(class_options("theirs.arguments:Arguments")) == {"patience"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('no license')", r"importing theirs\.arguments failed \(RuntimeError: no license\)"),
        ("import nowhere_to_be", r"importing theirs\.arguments failed \(ModuleNotFoundError: .*nowhere_to_be"),
        ("import sys; sys.exit(4)", r"the process that imports it ended with exit code 4"),
        ("import os; os._exit(5)", r"the process that imports it ended with exit code 5: no message"),
        ("def (", r"arguments\.py:1: cannot be read as Python"),
        ("x = 1", r"arguments\.py has no class Arguments"),
        ("class Arguments: pass", r"Arguments in .*arguments\.py is no dataclass"),
        ("Arguments = 3", r"Arguments in .*arguments\.py is no dataclass"),
    ],
)
def test_unreadable_user_class_is_refused_with_reason(
    source: str, message: str, package: Callable[[str], Path]
) -> None:
    package(source)
    with pytest.raises(ValueError, match=f"theirs.arguments:Arguments, cannot be read: .*{message}"):
        check_trainer_options("theirs.arguments:Arguments", {"patience": 3}, (), {})


def test_no_torch_is_imported_where_a_dump_is_made(package: Callable[[str], Path], tmp_path: Path) -> None:
    package(
        "from dataclasses import dataclass\nfrom peft import PeftConfig\n\n"
        "@dataclass\nclass Arguments(PeftConfig):\n    x: int = 3\n"
    )
    code = (
        "import sys; from align.config.options.field_dumps import class_options\n"
        f"sys.path.insert(0, {str(tmp_path / 'project')!r})\n"
        "assert class_options('theirs.arguments:Arguments')['peft_version'].annotation == 'str | None'\n"
        "assert not {'torch', 'peft', 'transformers', 'theirs'} & set(sys.modules)"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # The command line shows it as one line.
    assert done.stderr.startswith("reading the options of theirs.arguments:Arguments for trl ")
    assert done.stderr.count("\n") == 1
