"""Every file of a finished store is damaged in turn: a command names the file, or answers as if nothing were wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from align import Pipeline
from align.cli.main import main
from align.errors import UserError
from align.runner.plan import plan
from align.runner.runner import run_pipeline
from align.store.json_files import read_events
from align.store.store import Store
from tests.support import toy
from tests.support.damage import DAMAGES, ask, damaged, files_of, is_part_of_a_result, unnamed_damages
from tests.support.refusals import Refused
from tests.support.runs import Recorder

SMOKE = "pipelines/smoke.yaml"
REPORTED = ("record.json", "scorecard.json", "samples.jsonl", "ledger.json", "model.safetensors", "smoke.json")
KINDS = ("model", "data", "sft", "sample", "reward", "dpo", "ppo", "evaluate", "report")


@pytest.fixture
def raw() -> dict[str, Any]:
    return {**toy.pipeline(), "runtime": {"store": {"lease": 1}}}


def test_damage_to_small_store_is_reported_or_harmless(
    tmp_path: Path, raw: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALIGN_STORE", raising=False)
    store, file = tmp_path / "store", tmp_path / "toy.yaml"
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    assert main(["run", str(file), "--store", str(store)]) == 0
    key = Pipeline(raw).nodes["total"].key[:12]
    commands = [
        ["plan", str(file)], ["list"], ["show", key], ["show", key, "--verify"], ["gc"], ["status", "toy"],
        ["report", str(file)], ["compare", "a=toy", "b=toy"], ["run", str(file)],
    ]  # fmt: skip
    names = [name for name in files_of(store) if not name.startswith(("locks/", "reports/", "number/"))]
    assert unnamed_damages(store, names, lambda name, damage: commands, capsys) == []


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the smoke pipeline has run."""
    store = tmp_path_factory.mktemp("smoke") / "store"
    command = [sys.executable, "-m", "align.cli.main", "run", SMOKE, "--store", str(store), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=900)
    return store


def smoke_commands(name: str, damage: str) -> list[list[str]]:
    """What is asked of a store with this damage; what takes seconds only where the damage can reach it."""
    kind, _, rest = name.partition("/")
    key = rest.partition("/")[0]
    commands = [["plan", SMOKE], ["list"], ["gc"]]
    if kind in KINDS:
        commands.append(["show", f"{kind}/{key}", "--verify"])
    if damage == "bit" and name.rpartition("/")[2] in REPORTED:
        commands += [["report", "smoke"], ["compare", "a=smoke", "b=smoke"]]
    if damage != "deleted" or not name.endswith("record.json"):  # that stage would be made again
        commands.append(["run", SMOKE])
    return commands


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_damage_to_finished_store_is_reported_or_harmless(
    smoke: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALIGN_STORE", raising=False)
    names = [name for name in files_of(smoke) if not name.startswith(("locks/", "reports/"))]
    assert len(names) > 50
    assert unnamed_damages(smoke, names, smoke_commands, capsys) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_damage_to_a_checkpoint_is_exported(
    smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ALIGN_STORE", raising=False)
    (artifact,) = (smoke / "sft").iterdir()
    export = ["export", f"sft/{artifact.name}", "--output", str(tmp_path / "out"), "--no-check"]
    for path in sorted(path for path in artifact.rglob("*") if path.is_file()):
        name = path.relative_to(smoke).as_posix()
        for kind, damage in DAMAGES.items():
            if is_part_of_a_result(name, kind):
                with damaged(path, damage):
                    answer = ask(export, smoke, capsys)
                assert answer.code == 2 and path.name in answer.err, (name, kind, answer)
    assert not (tmp_path / "out").exists()
    assert ask(export, smoke, capsys).code == 0


def test_a_run_stops_at_a_damaged_record_and_rebuilds_it(refused: Refused, tmp_path: Path, raw: dict[str, Any]) -> None:
    """With a changed key the stage was made three times over, and the run failed for good."""
    pipeline = Pipeline(raw)
    run = run_pipeline(pipeline, store=tmp_path)
    record = run.artifacts["two"].path / "record.json"
    record.write_text(record.read_text().replace(run.artifacts["two"].record["key"], "0" * 64))
    before = sorted(tmp_path.rglob("number.txt"))
    refused(run_pipeline, pipeline, store=tmp_path)
    assert sorted(tmp_path.rglob("number.txt")) == before
    assert [step.action for step in plan(pipeline, run.store)] == ["cached", "damaged", "cached"]
    assert [step.action for step in plan(pipeline, run.store, {"two"})] == ["cached", "run", "cached"]
    again = run_pipeline(pipeline, store=tmp_path, rebuild=("two",))
    assert again.ran == ["two"]
    assert run_pipeline(pipeline, store=tmp_path).ran == []


def test_run_names_all_damaged_stages(tmp_path: Path, raw: dict[str, Any]) -> None:
    """So a store of an earlier align is brought up to date by one more command and not by one for each stage."""
    run = run_pipeline(Pipeline(raw), store=tmp_path)
    for artifact in run.artifacts.values():
        record = json.loads((artifact.path / "record.json").read_text())
        del record["seal"]
        (artifact.path / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError) as caught:
        run_pipeline(Pipeline(raw), store=tmp_path)
    lines = str(caught.value).splitlines()
    assert ["`--rebuild one`" in lines[0], "`--rebuild two`" in lines[1], "`--rebuild total`" in lines[2]] == [True] * 3
    assert all("no seal: it was changed, or written by an earlier version of align" in line for line in lines)
    assert run_pipeline(Pipeline(raw), store=tmp_path, rebuild=("one", "two", "total")).ran == ["one", "two", "total"]


@pytest.mark.parametrize("name", ["record.json", "number.txt"])
def test_only_ignores_damage_that_it_does_not_read(
    refused: Refused, tmp_path: Path, raw: dict[str, Any], name: str
) -> None:
    run = run_pipeline(Pipeline(raw), store=tmp_path)
    (run.artifacts["two"].path / name).write_text("")
    changed = Pipeline(raw).set("stages.one.number=5")
    assert run_pipeline(changed, store=tmp_path, only="one").ran == ["one"]
    refused(run_pipeline, changed, store=tmp_path, only="total")
    refused(run_pipeline, changed, store=tmp_path)


def test_a_record_in_another_ones_place_is_damaged(refused: Refused, tmp_path: Path, raw: dict[str, Any]) -> None:
    run = run_pipeline(Pipeline(raw), store=tmp_path)
    first, second = run.artifacts["one"].path, run.artifacts["two"].path
    shutil.rmtree(second)
    shutil.copytree(first, second)
    refused(lambda: run_pipeline(Pipeline(raw), store=tmp_path))
    assert len(run.store.all()) == 2


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"status": "done"}', '{"status": "done", "metrics": []}', "[" * 99999], ids=len
)
def test_what_a_stage_left_is_believed_only_where_whole(tmp_path: Path, raw: dict[str, Any], content: str) -> None:
    """A runner that died leaves these; with an unexpected content they were tracebacks."""
    pipeline, store = Pipeline(raw), Store.open(tmp_path)
    partial = store.partial("number", pipeline.nodes["one"].key)
    (partial / "output").mkdir(parents=True)
    for name in ("result.json", "attempts.json", "work.json", "events.jsonl"):
        (partial / name).write_text(content)
    store.remember_run("toy", pipeline.references, {})
    assert main(["status", "toy", "--store", str(tmp_path)]) == 0
    recorder = Recorder()
    run = run_pipeline(pipeline, store=store, listener=recorder)
    assert run.ran == ["one", "two", "total"]
    assert len(run.artifacts["one"].record["attempts"]) == 1
    messages = [str(text) for label, text in recorder.said if label == "warning"]
    assert any("result.json: damaged: it" in text and "goes on from its checkpoints" in text for text in messages)


@pytest.mark.parametrize(
    "line",
    [b"[]", b"1", b'{"event": "progress"}', b'{"event": "progress", "done": null, "total": 3}', b'{"event": 3}',
     b'{"event": "metrics", "step": "x"}', b"[" * 99999, b"\xff"],
    ids=len,
)  # fmt: skip
def test_a_damaged_event_is_skipped(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "events.jsonl"
    file.write_bytes(line + b'\n{"event": "note", "time": 1.0, "message": "x"}\n')
    assert [event["event"] for event in read_events(file)] == ["note"]
