"""``examples/notebook.ipynb``: a valid notebook without outputs, whose cells run."""

from __future__ import annotations

import ast
import json
from typing import Any

import matplotlib.figure
import pandas
import pytest

from align import Pipeline
from tests.examples.conftest import ROOT
from tests.support import ipython

NOTEBOOK = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))


def execute() -> tuple[dict[str, Any], list[Any]]:
    """Run the code cells as a kernel does; return the variables, and the value of each cell's last line."""
    variables: dict[str, Any] = {"__name__": "__main__"}
    values = []
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] != "code":
            continue
        statements = ast.parse("".join(cell["source"])).body
        values.append(_execute_cell(statements, variables))
    return variables, values


def _execute_cell(statements: list[Any], variables: dict[str, Any]) -> Any:
    last = statements[-1]
    has_value = isinstance(last, ast.Expr)
    exec(compile(ast.Module(statements[:-1] if has_value else statements, []), "cell", "exec"), variables)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), variables) if has_value else None


def check(variables: dict[str, Any], values: list[Any], displays: ipython.Displays) -> None:
    assert len(displays.contents) == 3
    for contents in displays.contents:
        lines = contents[-1]["text/plain"].splitlines()
        stages_shown = dict.fromkeys(line.split()[1] for line in lines if line.startswith(("·", "✓")))
        assert list(stages_shown) == ["model", "data", "sft", "evaluate"]
    stages, systems, difference, curve, losses, table = [value for value in values if value is not None]
    assert [line.partition(":")[0] for line in stages] == ["model", "data", "sft", "evaluate"]
    assert set(systems.system) == {"model", "sft"} and systems.low.notna().any()
    assert (difference.policy, difference.against) == ("sft", "model")
    for axes, lines in ((curve, 1), (losses, 2)):
        assert isinstance(axes.figure, matplotlib.figure.Figure)
        assert len(axes.lines) == lines and len(axes.lines[0].get_ydata()) > 1
    assert isinstance(table, pandas.DataFrame) and list(table.index) == [1e-3, 3e-3]
    assert variables["runs"][3e-3].ran == []


def test_the_file_is_a_notebook_without_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        assert isinstance(cell["source"], list) and cell["metadata"] == {}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_its_cells_run(finished: list[Pipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    displays = ipython.install(monkeypatch)
    check(*execute(), displays)
    assert len(finished) == 3


@pytest.mark.slow
def test_its_cells_train(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    displays = ipython.install(monkeypatch)
    variables, values = execute()
    check(variables, values, displays)
    assert variables["run"].ran == ["model", "data", "sft", "evaluate"]
    assert variables["runs"][1e-3].ran == ["sft", "evaluate"]
    history = variables["run"].log_history("sft")
    assert history[-1]["step"] == 10
