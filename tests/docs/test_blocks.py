"""Every block of YAML, Python and shell of six documents runs as it stands; one that cannot says why."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.config.recipe.recipe import Recipe
from align.config.runtime import Runtime
from align.config.validation import validate
from align.models.built_in import CHAT_TEMPLATE
from tests.support.document_files import HOST, write_files
from tests.support.documents import ROOT, Block, Reader, answer, read_blocks, small_pipelines
from tests.support.environments.talker import make_talker
from tests.support.inference.fake_chat import FakeChat

GUIDES = ("getting_started", "tasks", "rewards", "environments", "python", "own_methods")
PAGES = ("README.md", *(f"docs/{name}.md" for name in GUIDES))
BLOCKS = [block for page in PAGES for block in read_blocks(page)]
NOT_RUN = [block for block in BLOCKS if block.reason]
FENCES = ("```yaml", "```python", "```bash")
RUN = [block for block in BLOCKS if not block.reason]


def name_of(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.fixture(scope="module")
def talker(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_talker(tiny_model, folder / "judge", ["[[5]]"], CHAT_TEMPLATE)
    return make_talker(tiny_model, folder / "talker", ["4", "5", "ok", "no"], CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def readers(
    talker: Path, tmp_path_factory: pytest.TempPathFactory, stages_in_process: None
) -> Iterator[dict[str, Reader]]:
    """A reader of each page, in a folder as the clone is. All have one store."""
    base = tmp_path_factory.mktemp("documents")
    fake = FakeChat(answer)
    fake.models = ["judge-1", "some-large-model", "big"]
    result = {}
    for page in PAGES:
        folder = base / Path(page).stem
        folder.mkdir()
        for name in ("pipelines", "data_recipes", "examples"):
            (folder / name).symlink_to(ROOT / name)
        write_files(folder)
        for model in ("talker", "judge"):
            (folder / model).symlink_to(talker.parent / model)
        for block in read_blocks(page):
            if block.file:
                (folder / block.file).write_text(block.text, encoding="utf-8")
        result[page] = Reader(folder, HOST)
    with pytest.MonkeyPatch.context() as patch, small_pipelines(fake.url, talker.parent):
        patch.setenv("ALIGN_STORE", str(base / "store"))
        for key in ("JUDGE_KEY", "EXAMPLE_KEY"):
            patch.setenv(key, "secret")
        patch.chdir(result["docs/getting_started.md"].folder)
        result["docs/getting_started.md"].run_command(
            ["align", "data", "build", "host.yaml", "--output", "other-build"]
        )
        yield result
    fake.stop()


def parameter(block: Block) -> Any:
    """Return a test's parameter; three runs of all stages are slow, and tests/examples runs the script by default."""
    return pytest.param(block, marks=[pytest.mark.slow] if "three_seeds.py" in block.text else [])


@pytest.mark.parametrize("block", map(parameter, RUN), ids=name_of)
def test_document_block_runs(block: Block, readers: dict[str, Reader], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = readers[block.page]
    monkeypatch.chdir(reader.folder)
    monkeypatch.syspath_prepend(str(reader.folder))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    for path in reader.folder.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)  # another page's
    reader.try_block(block)


@pytest.mark.parametrize("block", [block for block in NOT_RUN if block.language == "yaml"], ids=name_of)
def test_block_that_is_not_run_is_valid(block: Block) -> None:
    shown = yaml.safe_load(block.text)
    if "runtime" in shown:
        assert validate(Runtime, shown["runtime"], block.page)
    else:
        assert validate(Recipe, {"kind": "prompts", **shown}, block.page).sources


def test_at_most_one_block_in_ten_is_not_run() -> None:
    assert len(BLOCKS) >= 50
    assert len(NOT_RUN) <= len(BLOCKS) / 10
    fences = [line for page in PAGES for line in (ROOT / page).read_text().splitlines() if line.startswith("```")]
    assert len([line for line in fences if line.split()[0] in FENCES]) == len(BLOCKS)
