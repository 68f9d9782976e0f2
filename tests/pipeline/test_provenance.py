"""The digest of a stage's source follows every import, without importing or parsing anything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from align.pipeline.provenance import find_imports, source_digest, stage_sources
from align.pipeline.registry import STAGES

PACKAGE = Path(__file__).parents[2] / "align"


def imports_by_parsing(source: bytes) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "align"}


def test_found_imports_equal_parsed_imports() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 400
    wrong = [str(file) for file in files if find_imports(file.read_bytes()) != imports_by_parsing(file.read_bytes())]
    assert wrong == []


@pytest.mark.parametrize(
    "source",
    [
        b"from align.a import b, c as d  # e, f\n",
        b"import align.a as b, os\nimport json\n",
        b"def f():\n    from align.a import (\n        b,  # not, these\n        c,\n    )\n",
        b"x = 'import align.b'\nfrom alignment import c\n",
    ],
)
def test_every_form_of_an_import_is_found(source: bytes) -> None:
    assert find_imports(source) == imports_by_parsing(source)


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("evaluate", "align.evaluation.tasks.ifeval"),
        ("evaluate", "align.evaluation.lm_eval.task"),
        ("data", "align.data.steps.deduplicate"),
        ("sft", "align.models.pretrained"),
    ],
)
def test_modules_that_are_imported_late_belong_to_a_stage(kind: str, module: str) -> None:
    assert module in stage_sources(STAGES[kind])


def test_two_stages_have_different_digests_that_stay_the_same() -> None:
    digests = {kind: source_digest(STAGES[kind]) for kind in ("sft", "data", "report")}
    assert len(set(digests.values())) == 3
    source_digest.cache_clear()
    assert digests == {kind: source_digest(STAGES[kind]) for kind in digests}
