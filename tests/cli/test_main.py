import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align import Pipeline
from align.cli.main import COMMANDS, LIBRARY_LOGGERS, main, parser


@pytest.fixture
def store(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def test_run_plan_list_show_gc(pipeline_file: Path, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(pipeline_file), "--store", store]) == 0
    assert capsys.readouterr().out.count(" run ") == 3
    assert main(["explain", str(pipeline_file), "--store", store, "--only", "one"]) == 2
    assert "unrecognized arguments: --only one" in capsys.readouterr().err
    assert main(["plan", str(pipeline_file), "--store", store, "--only", "two", "--json"]) == 0
    assert [step["stage"] for step in json.loads(capsys.readouterr().out)] == ["two"]
    assert main(["run", str(pipeline_file), "--store", store, "--set", "stages.two.number=5"]) == 0
    output = capsys.readouterr().out
    assert "total 6" in output
    assert main(["run", str(pipeline_file), "--store", store, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["stages"]["total"]["ran"] is True
    assert document["stages"]["one"]["ran"] is False
    assert main(["explain", str(pipeline_file), "--store", store, "--set", "stages.total.scale=3"]) == 0
    assert "scale: 1.0 → 3.0" in capsys.readouterr().out
    key = document["stages"]["total"]["key"]
    assert main(["show", key[:8], "--store", store]) == 0
    assert '"total": 3' in capsys.readouterr().out
    assert main(["show", key[:8], "--store", store, "--log"]) == 0
    assert "total" in capsys.readouterr().out
    assert main(["show", key[:8], "--store", store, "--verify"]) == 0
    assert "all digests agree" in capsys.readouterr().out
    assert main(["show", key[:8], "--store", store, "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert main(["show", key[:8], "--store", store, "--log", "--json"]) == 2
    assert "leave out --json" in capsys.readouterr().err
    assert main(["list", "--store", store]) == 0
    listed = capsys.readouterr().out
    assert listed.count("no run") == 2
    assert main(["gc", "--store", store]) == 0
    assert "2 folders" in capsys.readouterr().out
    assert main(["gc", "--store", store, "--delete"]) == 0
    assert main(["list", "--store", store]) == 0
    assert "no run" not in capsys.readouterr().out.replace("2 folders", "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu", "x"], "unknown command 'rnu'. Did you mean 'run'?"),
        (["trian", "x"], "unknown command 'trian'. In align this is `align run`."),
        (["run", "nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["run", "{file}", "--stor", "x"], "unrecognized arguments: --stor x. Did you mean '--store'?"),
        (["run", "{file}", "--set", "stages.one.numbr=2"], "unknown key 'numbr'. Did you mean 'number'?"),
        (["run", "{file}", "--only", "onee"], "--only onee: there is no such stage. Did you mean 'one'?"),
        (["plan", "data_recipes/embedded.yaml"], "is a data recipe, not a pipeline. `align data build` builds it"),
        (["plan", "pipelines/sweeps/dpo.yaml"], "is a sweep, not a pipeline; `align sweep` runs it."),
        (["show", "abc"], "no artifact's key starts with 'abc'"),
        (["chat", "{file}"], "is a whole pipeline; name a stage of it: {file}:one, {file}:two, {file}:total."),
        (["eval", "{file}", "--suite", "quick"], "is a whole pipeline; name a stage of it: {file}:one"),
        (["chat", "abc"], "no artifact's key starts with 'abc'"),
        (["run", "{file}", "--store", "{file}"], "not an align store"),
    ],
)
def test_mistakes_end_with_2_and_one_message(
    arguments: list[str], expected: str, pipeline_file: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(file=pipeline_file) for word in arguments]
    if "--store" not in words and words[0] not in ("rnu", "trian") and "--stor" not in words:
        words += ["--store", store]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert expected.format(file=pipeline_file) in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_explain_names_the_run_that_finished_a_stage(
    pipeline_file: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(pipeline_file), "--store", store]
    other = ["--set", "name=other"]
    assert main(["run", *words, *other]) == 0
    assert main(["run", *words, *other, "--set", "stages.total.scale=3"]) == 0
    capsys.readouterr()
    assert main(["explain", *words]) == 0
    assert "one: finished as 'one' in run 'other'\n" in capsys.readouterr().out
    # A run that returns to settings of an earlier one is cached, although the last one had others.
    assert main(["explain", *words, *other]) == 0
    output = capsys.readouterr().out
    assert "one: unchanged\n" in output
    assert "total: changed, and finished before with these settings\n" in output
    assert main(["plan", *words, "--json"]) == 0
    assert {step["action"] for step in json.loads(capsys.readouterr().out)} == {"cached"}


WITHOUT_TORCH = (
    "--help",
    "schema",
    "score --help",
    "plan pipelines/zephyr_7b.yaml",
    "plan pipelines/quickstart.yaml --memory",
    "run pipelines/quickstart.yaml --set stages.ppo.kl_ceof=1",
    "eval tiny --suite pipelines/suites/quick.yaml --set bootstrp=1",
    "report nothing",
    "compare a b",
    "fields ppo",
    "fields evaluate tasks.max_tokens",
)
TASKS = ("likelihood", "multiple_choice", "perplexity", "records")


def test_these_answer_without_torch(store: str) -> None:
    code = (
        "import importlib, sys\n"
        "from align.cli.main import main\n"
        "for line in sys.argv[2:]:\n"
        "    try:\n        main(line.split())\n    except SystemExit:\n        pass\n"
        "    heavy = {'torch', 'transformers', 'trl', 'vllm', 'datasets'} & set(sys.modules)\n"
        "    assert not heavy, (line, heavy)\n"
        "for name in sys.argv[1].split():\n"
        "    importlib.import_module(f'align.evaluation.tasks.{name}')\n"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, " ".join(TASKS), *WITHOUT_TORCH],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ".", "ALIGN_STORE": store},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


UNUSED_BY_A_PLAN = {
    "numpy", "pyarrow", "rich", "jinja2", "httpx", "pandas", "matplotlib", "align.cli.export",
    "align.extensions.sweep.command", "align.runner.listener", "align.data.builds.build",
    "align.evaluation.tasks.ifeval", "align.data.steps.deduplicate",
}  # fmt: skip
"""Modules that no shipped pipeline's plan needs; each took 10 to 100 ms of every command."""


@pytest.mark.parametrize("pipeline", ["quickstart", "methods", "hh"])
def test_a_plan_imports_nothing_that_it_does_not_need(pipeline: str, store: str) -> None:
    code = "import sys\nfrom align.cli.main import main\nmain(sys.argv[1:])\nprint(*sys.modules, file=sys.stderr)\n"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", f"pipelines/{pipeline}.yaml", "--store", store],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "align.runner.plan" in done.stderr.split()
    assert UNUSED_BY_A_PLAN & set(done.stderr.split()) == set()


def test_a_cached_run_imports_nothing_that_writes_pages(pipeline_file: Path, store: str) -> None:
    code = "import sys\nfrom align.cli.main import main\nmain(sys.argv[1:])\nprint(*sys.modules, file=sys.stderr)\n"
    words = [sys.executable, "-c", code, "run", str(pipeline_file), "--store", store]
    environment = {**os.environ, "PYTHONPATH": "."}
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert "cached" in done.stdout
    assert {"align.report.run.run_report", "pyarrow", "jinja2", "numpy"} & set(done.stderr.split()) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_command_has_same_options_in_either_parser(name: str) -> None:
    alone, all_commands = (choices_of(parser(command))[name] for command in (name, None))
    assert alone.format_help() == all_commands.format_help()


def choices_of(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices


def test_a_plan_says_on_request_what_ppo_costs_in_memory(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "pipelines/quickstart.yaml", "--store", store]
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert main([*words, "--memory"]) == 0
    with_memory = capsys.readouterr().out
    assert with_memory.startswith(plain) and "GiB" not in plain
    assert "ppo: memory of a process in GiB, counted for 134.5 million parameters" in with_memory
    assert with_memory.count("\n  *  lora r16  reward ") == 1
    assert main([*words, "--memory", "--json"]) == 0
    stages = {entry["stage"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert [name for name, entry in stages.items() if "memory" in entry] == ["sft", "reward", "dpo", "ppo"]
    chosen = [choice for choice in stages["ppo"]["memory"]["choices"] if choice["chosen"]]
    assert chosen[0]["settings"] == {"tuning": "lora r16", "critic": "reward"}
    assert chosen[0]["memory"]["reference"] == 0 and chosen[0]["memory"]["total"] > 2**30


def test_the_schema_accepts_and_refuses() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from align.pipeline.json_schema import pipeline_schema

    schema = pipeline_schema()
    good = yaml.safe_load(Path("pipelines/quickstart.yaml").read_text())
    jsonschema.validate(good, schema)
    good["stages"]["sft_more"] = {"continue_from": "sft", "epochs": 2}
    good["stages"]["ppo"] = {"continue_from": "ppo_before", "updates": 40}
    jsonschema.validate(good, schema)
    good["stages"]["sft"]["learning_rat"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(good, schema)


def test_the_python_api_is_the_same_pipeline(pipeline_file: Path, store: str) -> None:
    run = Pipeline.load(pipeline_file).set("stages.two.number", 7).run(store=store)
    assert run.metrics("total") == {"total": 8}


def test_import_warnings_of_libraries_are_silent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["schema"])
    for name in LIBRARY_LOGGERS:
        logger = logging.getLogger(name)
        kept = [logger.filter(logging.LogRecord(name, level, "", 1, "text", None, None)) for level in (30, 40)]
        assert [bool(record) for record in kept] == [False, True]
