"""``docs/contributing.md`` is followed: its files are written as the page has them, and its pipeline is run."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from align import Pipeline
from align.cli.main import main
from align.data.rows import assistant, read_rows, user, write_rows
from align.errors import StageFailed, UserError
from align.export.export import Written
from align.export.model_card import write_model_card
from align.export.model_card_facts import Facts
from align.lint.encodings import RowEncoding
from align.lint.trainer import lint_dataset
from align.pipeline.registry import STAGES, load_object
from align.registry import Stage
from align.store.artifacts import Artifact

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
TITLED = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```', re.MULTILINE | re.DOTALL)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with the page's files and the recipe they name, as the current folder."""
    files = dict(TITLED.findall(PAGE))
    modules = {f"mypackage/{name}.py" for name in ("config", "run", "terse_config", "terse_run")}
    assert set(files) == {*modules, "short.yaml", "terse.yaml"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "data_recipes").symlink_to(ROOT / "data_recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "mypackage"]:
        monkeypatch.delitem(sys.modules, name)  # another test's
    return tmp_path


def answer_lengths(artifact: Artifact) -> list[int]:
    return [len(row["completion"][-1]["content"].split()) for row in read_rows(artifact.split("train"))]


@pytest.mark.usefixtures("stages_in_process")
def test_the_stage_of_the_page_runs_and_is_cached(project):
    """One test for the whole page, because each run builds the dataset in a process."""
    pipeline = Pipeline.load("short.yaml")
    store = project / "store"
    run = pipeline.run(store=store)
    assert run.ran == ["data", "short"]
    data, short = run.artifacts["data"], run.artifacts["short"]
    short_lengths = [length for length in answer_lengths(data) if length <= 8]
    assert 0 < len(short_lengths) < len(answer_lengths(data))
    assert answer_lengths(short) == short_lengths
    assert run.metrics("short")["train_rows"] == len(short_lengths)
    assert pipeline.run(store=store).ran == []

    stricter = pipeline.set("stages.short.max_words=3").run(store=store)
    assert stricter.ran == ["short"]
    assert max(answer_lengths(stricter.artifacts["short"])) <= 3


def test_mistake_in_documented_stage_is_refused(project):
    pipeline = Pipeline.load("short.yaml")
    with pytest.raises(UserError, match=r"stages\.short: unknown key 'max_word'\. Did you mean 'max_words'\?"):
        pipeline.set("stages.short.max_word=3")
    with pytest.raises(UserError, match=r"stages\.short\.max_words: .*1"):
        pipeline.set("stages.short.max_words=0")


def test_an_error_of_the_run_reaches_the_user(project, tmp_path):
    source = (tmp_path / "mypackage" / "run.py").read_text(encoding="utf-8")
    assert "if not counts" in source
    (tmp_path / "mypackage" / "run.py").write_text(source.replace("if not counts", "if counts"), encoding="utf-8")
    with pytest.raises((UserError, StageFailed), match="no answer has 8 words or fewer; raise max_words"):
        Pipeline.load("short.yaml").run(store=tmp_path / "store")


@pytest.mark.usefixtures("stages_in_process")
def test_documented_training_stage_has_lint_and_card_verb(project):
    """Nothing but the page's files knows the kind."""
    pipeline = Pipeline.load("terse.yaml")
    run = pipeline.run(store=project / "store")
    data, terse = run.artifacts["data"], run.artifacts["terse"]
    short_rows = [length for length in answer_lengths(data) if length <= 8]
    assert run.metrics("terse")["rows"] == len(short_rows)
    looked_at = json.loads((terse.path / "findings.json").read_text(encoding="utf-8"))["looked_at"]
    assert looked_at["train"] == {"rows": len(short_rows), "of": len(short_rows)}

    lineage = [run.artifacts[name] for name in ("model", "data", "terse")]
    written = Written(False, "float32", 1000, "LlamaForCausalLM", {})
    (project / "card").mkdir()
    card = ModelCard.load(write_model_card(project / "card", Facts("terse", written, None, lineage)))
    assert card.data.tags == ["align", "terse"]
    assert "Its weights: model (imported) → terse (fine-tuned on short answers)." in card.text


def test_rows_are_linted_for_documented_training_stage(project, tiny_model):
    rows = [
        {
            "id": "1",
            "source": "s",
            "checks": "",
            "prompt": [user("Name a river.")],
            "completion": [assistant("The Nile, " * 60)],
        },
        {
            "id": "2",
            "source": "s",
            "checks": "",
            "prompt": [user("Name a comet.")],
            "completion": [assistant("Halley's.")],
        },
    ]
    (project / "rows").mkdir()
    write_rows(project / "rows" / "train.parquet", rows)
    arguments = ("--model", str(tiny_model), "--kind", "mypackage.terse_config:STAGE", "--max-length", "100")
    assert main(["data", "lint", str(project / "rows"), *arguments]) == 0
    with pytest.raises(UserError, match="'mypackage.config:STAGE' names no row encoding"):
        lint_dataset(project / "rows", str(tiny_model), "mypackage.config:STAGE")


def test_trainer_options_of_documented_stage_are_checked(project):
    pipeline = Pipeline.load("terse.yaml")
    assert pipeline.nodes["terse"].stage.trainer_class == "trl.trainer.sft_config:SFTConfig"
    with pytest.raises(UserError, match=r"stages\.terse\.trainer: .*SFTConfig has no such option.*'adam_beta2'"):
        pipeline.set("stages.terse.trainer={adam_bta2: 0.9}")
    with pytest.raises(UserError, match="'neftune_noise_alpha' is not set here: set 'neftune' next to 'trainer'"):
        pipeline.set("stages.terse.trainer={neftune_noise_alpha: 5}")


@pytest.mark.parametrize("kind", STAGES)
def test_every_kind_has_a_config_class_and_a_run_file(kind):
    """The page's table: the config class, the run function, and the record in the registry."""
    assert "`align/core.py`" in PAGE
    stage = STAGES[kind]
    assert isinstance(stage, Stage) and stage.kind == kind
    assert stage.config.startswith(("align.config.stages.", "align.extensions."))
    # Import paths lead to what the record says they are.
    assert stage.config_class().__module__ == stage.config.partition(":")[0]
    assert callable(stage.runner())
    assert stage.lint is None or isinstance(load_object(stage.lint), RowEncoding)


def test_only_registry_lists_kinds_that_train():
    """A table by kind would have to grow with every new kind; the record is the place for it."""
    trained = {kind for kind, stage in STAGES.items() if stage.distributed}
    for path in sorted((ROOT / "align").rglob("*.py")):
        if path == ROOT / "align" / "core.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
                members = node.elts
            elif isinstance(node, ast.Dict):
                members = [key for key in node.keys if key is not None]
            else:
                continue
            texts = {member.value for member in members if isinstance(member, ast.Constant)}
            # Four of trl's trainers, and losses that bear a stage's name, are no table of kinds.
            assert len(texts & trained) < 4, f"{path}:{node.lineno} lists {sorted(texts & trained)}"
