"""The smoke pipeline, from the command line to the report: every stage for real, on a tiny model."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import command_of, descendants

SMOKE = "pipelines/smoke.yaml"


def align(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "align.cli.main", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ},
        timeout=280,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the smoke pipeline has run, with its PPO stage killed once on the way."""
    folder = tmp_path_factory.mktemp("smoke") / "store"
    process = subprocess.Popen(
        [sys.executable, "-m", "align.cli.main", "run", SMOKE, "--store", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    end = time.time() + 250
    while not list(folder.glob("ppo/*.partial/checkpoints/*")):
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.time() < end, "PPO wrote no checkpoint"
        time.sleep(0.05)
    # Also the process that stages are forked from, whose name a stage may have kept.
    for child in descendants(process.pid):
        if re.search(r"align\.runner\.(worker|fork_server)", command_of(child)):
            child.kill()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1, output
    assert "SIGKILL" in output
    align("run", SMOKE, "--store", str(folder))
    return folder


def test_every_stage_is_done_and_a_second_run_runs_none(store: Path) -> None:
    document = json.loads(align("run", SMOKE, "--store", str(store), "--json").stdout)
    assert list(document["stages"]) == [
        "model", "data", "sft", "sample", "reward", "dpo", "ppo", "evaluate", "report",
    ]  # fmt: skip
    assert not any(stage["ran"] for stage in document["stages"].values())
    assert not list(store.glob("*/*.partial"))


def test_no_stage_reports_leaks_of_frozen_objects(store: Path) -> None:
    logs = [path.read_text(encoding="utf-8") for path in store.glob("*/*/log.txt")]
    assert len(logs) == 9
    assert not any("leaked" in log for log in logs)


def test_the_report_and_the_scorecard_name_every_policy(store: Path) -> None:
    page = next(iter(store.glob("report/*/report.html"))).read_text(encoding="utf-8")
    scorecard = json.loads(next(iter(store.glob("evaluate/*/scorecard.json"))).read_text(encoding="utf-8"))
    for policy in ("model", "sft", "dpo", "ppo"):
        assert policy in page
        assert policy in json.dumps(scorecard)


def test_record_plan_and_page_show_the_type_of_products(store: Path) -> None:
    records = {path.parent.parent.name: json.loads(path.read_text()) for path in store.glob("*/*/record.json")}
    types = {kind: record["precision"] for kind, record in records.items()}
    assert types["sft"] in ("bfloat16", "float32")
    assert set(types.values()) == {types["sft"], None}
    assert {kind for kind, precision in types.items() if precision is None} == {"model", "data", "report"}
    assert f", in {types['sft']}" in align("plan", SMOKE, "--store", str(store)).stdout
    page = next(iter(store.glob("report/*/report.html"))).read_text(encoding="utf-8")
    assert re.search(rf"Precision</\w+>\s*<\w+[^>]*>{types['sft']}<", page)


def test_every_checkpoint_is_plain_safetensors_without_pickles(store: Path) -> None:
    folders = [path.parent for path in store.glob("*/*/model/config.json")]
    assert len(folders) == 5
    for folder in folders:
        assert list(folder.glob("*.safetensors"))
        assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_base_model_without_chat_template_is_refused(store: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run(["cp", "-rL", str(next(iter(store.glob("model/*/model")))), str(bare)], check=True)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    done = align(
        "run", SMOKE, "--store", str(tmp_path / "store"), "--only", "model", "--set", f"stages.model.source={bare}",
        expect=2,
    )  # fmt: skip
    assert "chat_template" in done.stderr
    assert "Traceback" not in done.stderr
