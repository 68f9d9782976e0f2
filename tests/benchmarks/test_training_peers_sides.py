"""Command lines and files of each side: the same settings in every side's own words, and options that exist."""

import os
from dataclasses import fields as dataclass_fields
from pathlib import Path

import pytest
import yaml
from trl import DPOConfig, KTOConfig, ModelConfig, RewardConfig, ScriptArguments, SFTConfig

from align.pipeline.pipeline import Pipeline
from align.pipeline.process_limits import usable_cores
from benchmarks.training_peers.environments import ROOT
from benchmarks.training_peers.rows import write_rows
from benchmarks.training_peers.sides import Place, command_of, environment_of, trl_options
from benchmarks.training_peers.works import WORKS, Settings

CONFIGS = {"sft": SFTConfig, "reward": RewardConfig, "dpo": DPOConfig, "kto": KTOConfig}
EVERY_WORK = pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "run").mkdir()
    return Place(model=tmp_path / "model", rows=tmp_path / "rows", run=tmp_path / "run")


def options_of(work, settings, place, as_shipped=False):
    texts = trl_options(work, settings, place, as_shipped)
    return dict(zip((text.removeprefix("--") for text in texts[::2]), texts[1::2], strict=True))


def read_factory(work, settings, place):
    command = command_of("llamafactory", Path("llamafactory-cli"), work, settings, place)
    assert command == ["llamafactory-cli", "train", "train.yaml"]
    return yaml.safe_load((place.run / "train.yaml").read_text())


def read_pipeline(work, settings, place):
    assert command_of("align", Path("align"), work, settings, place) == ["align", "run", "pipeline.yaml"]
    return yaml.safe_load((place.run / "pipeline.yaml").read_text())["stages"]


@EVERY_WORK
def test_pipeline_is_one_that_align_accepts(work, place, tmp_path, tiny_model):
    answers = {"chosen": "yes", "rejected": "no"} if work.kind in ("reward", "dpo") else {"completion": "yes"}
    row = {"prompt": [{"role": "user", "content": "ready?"}]}
    row |= {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    row |= {"label": True} if work.kind == "kto" else {}
    write_rows([row], work.kind, place.rows)
    command_of("align", Path("align"), work, Settings(), Place(tiny_model, place.rows, place.run))
    pipeline = Pipeline.load(place.run / "pipeline.yaml")
    stage = next(node for node in pipeline if node.name == work.kind)
    assert stage.config.batch_size == stage.config.micro_batch_size == 8
    assert stage.config.tuning.method == work.tuning
    # A reward stage refuses data without a held-out pair; the others train on all rows and have none.
    sources = yaml.safe_load((place.run / "rows.yaml").read_text())["sources"]
    assert [source.get("part") for source in sources] == [None, "test"][: 1 + (work.kind == "reward")]


@EVERY_WORK
def test_options_of_trl_exist_in_its_own_classes(work, place):
    known = {
        field.name for owner in (CONFIGS[work.kind], ModelConfig, ScriptArguments) for field in dataclass_fields(owner)
    }
    assert options_of(work, Settings(), place).keys() <= known


@EVERY_WORK
def test_all_sides_have_the_same_settings(work, place):
    settings = Settings(batch=8, micro_batch=4)
    trl, factory = options_of(work, settings, place), read_factory(work, settings, place)
    align = read_pipeline(work, settings, place)[work.kind]
    assert align["micro_batch_size"] == factory["per_device_train_batch_size"] == 4
    assert trl["per_device_train_batch_size"] == "4"
    assert trl["gradient_accumulation_steps"] == str(factory["gradient_accumulation_steps"]) == "2"
    assert align["learning_rate"] == factory["learning_rate"] == float(trl["learning_rate"]) == work.learning_rate
    assert align["max_length"] == factory["cutoff_len"] == int(trl["max_length"]) == work.max_length
    assert align["tuning"]["method"] == factory["finetuning_type"] == work.tuning
    assert ("use_peft" in trl) == (work.tuning == "lora")
    if work.tuning == "lora":
        assert align["tuning"]["rank"] == factory["lora_rank"] == int(trl["lora_r"])
        assert align["tuning"]["alpha"] == factory["lora_alpha"] == int(trl["lora_alpha"])
    if work.kind in ("dpo", "kto"):
        assert align["beta"] == factory["pref_beta"] == float(trl["beta"])


@pytest.mark.parametrize(("precision", "is_low"), [("bfloat16", True), ("float32", False)])
def test_precision_is_for_every_side(place, precision, is_low):
    work = WORKS["sft_lora"]
    settings = Settings(precision=precision)
    assert options_of(work, settings, place)["bf16"] == str(is_low)
    assert read_factory(work, settings, place)["bf16"] is is_low
    assert read_pipeline(work, settings, place)["sft"]["precision"] == precision


def test_trl_as_shipped_keeps_its_own_checkpointing(place):
    work = WORKS["sft_lora"]
    assert "gradient_checkpointing" not in options_of(work, Settings(), place, as_shipped=True)
    assert options_of(work, Settings(), place)["gradient_checkpointing"] == "False"


def test_checkpointing_is_for_every_side(place):
    work, settings = WORKS["sft_lora"], Settings(checkpointing=True)
    assert options_of(work, settings, place, as_shipped=True)["gradient_checkpointing"] == "True"
    assert options_of(work, settings, place)["gradient_checkpointing"] == "True"
    assert read_factory(work, settings, place)["disable_gradient_checkpointing"] is False
    assert read_pipeline(work, settings, place)["sft"]["gradient_checkpointing"] is True


def test_command_of_trl_names_the_work(place):
    assert command_of("trl", Path("/env/bin/trl"), WORKS["kto_lora"], Settings(), place)[:2] == ["/env/bin/trl", "kto"]


def test_only_trl_and_align_as_shipped_choose_their_own_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", "/checkout")
    threads = {
        side: environment_of(side).get("OMP_NUM_THREADS") for side in ("align", "trl", "trl_threads", "llamafactory")
    }
    assert threads == {
        "align": None,
        "trl": None,
        "trl_threads": str(usable_cores()),
        "llamafactory": str(usable_cores()),
    }
    assert environment_of("align")["PYTHONPATH"] == str(ROOT)
    assert "PYTHONPATH" not in environment_of("llamafactory")
    assert environment_of("trl")["PATH"] == os.environ["PATH"]
