"""Stage synthesise, against a fake server and the tiny model: what is written, resumed, and refused."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from align.artifacts import Artifact, Kind
from align.data.rows import read_rows, user, write_rows
from align.errors import UserError
from align.pipeline import Pipeline
from align.rollouts import endpoint_client
from align.rollouts.requests import RequestCache
from align.stage import EngineConfig, Runtime, StageContext
from align.stages.synthesise import SynthesiseConfig, run
from tests.rollouts.fake_chat import FakeChat, completion

FILES = ("train.parquet", "test.parquet", "samples.jsonl", "dropped.jsonl", "ledger.json")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_client, "FIRST_WAIT", 0.01)


def _talk(body: dict[str, Any]) -> Any:
    """Answers that follow from the request: of one to nine words, and a judge who prefers more of them."""
    content = body["messages"][-1]["content"]
    if content.startswith("Reply with the one word"):
        return completion("ready")
    if "### Answer A" in content:
        first, _, rest = content.partition("### Answer A\n")[2].partition("\n\n### Answer B\n")
        lengths = [len(first.split()), len(rest.partition("\n\n###")[0].split())]
        mark = "C" if lengths[0] == lengths[1] else "A" if lengths[0] > lengths[1] else "B"
        return completion(f"Words count. [[{mark}]]")
    rng = random.Random(f"{body['seed']}/{content}")
    if "numbered list" in content:
        words = [f"w{rng.randrange(500)}" for _ in range(40)]
        return completion("\n".join(f"{9 + n}. Tell me {' '.join(words[n * 5 : n * 5 + 5])}" for n in range(8)))
    return completion(" ".join(f"w{rng.randrange(9)}" for _ in range(rng.randint(1, 9))))


@pytest.fixture
def fake() -> Iterator[FakeChat]:
    server = FakeChat(_talk)
    yield server
    server.stop()


def word_score(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    """A scorer by import path: words."""
    return [float(len(response.split())) for response in responses]


def _rows(count: int, name: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{name}{i}", "source": "t", "prompt": [user(f"Say {name} {i}")], "checks": ""} for i in range(count)
    ]


def _artifact(folder: Path, name: str, kind: Kind, model: Path | None = None) -> Artifact:
    (folder / name).mkdir(parents=True, exist_ok=True)
    if model is not None and not (folder / name / "model").exists():
        (folder / name / "model").symlink_to(model)
    return Artifact(name, kind, folder / name, {"key": f"key of {name}"})


def _context(
    folder: Path, weights: Path | None = None, scorer: Path | None = None, train: int = 6, test: int = 3, **config: Any
) -> StageContext:
    inputs: dict[str, Any] = dict.fromkeys(("model", "prompts", "reward", "judge_model"))
    if config.get("prompts"):
        inputs["prompts"] = _artifact(folder, "prompts", Kind.PROMPTS)
        write_rows(folder / "prompts" / "train.parquet", _rows(train, "a"))
        write_rows(folder / "prompts" / "test.parquet", _rows(test, "b"))
    for name, kind, folder_of in (
        ("model", Kind.POLICY, weights), ("judge_model", Kind.POLICY, weights), ("reward", Kind.REWARD, scorer)
    ):  # fmt: skip
        if config.get(name):
            inputs[name] = _artifact(folder, name, kind, folder_of)
    for name in ("output", "checkpoints"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return StageContext(
        name="synthesise",
        config=SynthesiseConfig(**config),
        inputs=inputs,
        seed=11,
        runtime=Runtime(engine=EngineConfig(name="transformers")),
        output=folder / "output",
        checkpoints=folder / "checkpoints",
        events=folder / "events.jsonl",
    )


def _endpoint(fake: FakeChat, **settings: Any) -> dict[str, Any]:
    return {"url": fake.url, "model": "good-model", "name": "fake", "retries": 2, "timeout": 5} | settings


def _ledger(context: StageContext) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((context.output / "ledger.json").read_text())
    return found


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _seeds(folder: Path) -> str:
    path = folder / "seeds.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"Seed number {n} of all"}) + "\n" for n in range(20)))
    return str(path)


def test_instructions(fake: FakeChat, tmp_path: Path) -> None:
    task = {"type": "instructions", "count": 30, "at_once": 2, "test_size": 0.3}
    context = _context(tmp_path, task=task, endpoint=_endpoint(fake), seeds=_seeds(tmp_path))
    metrics = run(context)
    train, test = (read_rows(context.output / f"{split}.parquet") for split in ("train", "test"))
    assert len(train) + len(test) == 30 and test
    assert all(row["prompt"][0]["content"].startswith("Tell me w") and row["similarity"] <= 0.7 for row in train)
    ledger = _ledger(context)
    assert ledger["candidates"]["out"] == 30 and ledger["requests"]["in"] == len(fake.bodies)
    assert ledger["usage"]["model"]["requests"] == len(fake.bodies) == metrics["asked_in_this_attempt"]
    assert metrics["train_rows"] == len(train)
    assert all((context.output / name).is_file() for name in FILES)


def test_too_few_instructions_are_a_warning(fake: FakeChat, tmp_path: Path) -> None:
    task = {"type": "instructions", "count": 30, "max_requests": 1}
    context = _context(tmp_path, task=task, endpoint=_endpoint(fake), prompts="data", train=20)
    assert run(context)["train_rows"] <= 8
    assert "of 30 instructions came out of 1 requests" in context.events.read_text()


def test_responses_keep_their_splits_and_the_system_message_is_not_in_the_rows(fake: FakeChat, tmp_path: Path) -> None:
    context = _context(
        tmp_path, task={"type": "responses", "n": 2}, endpoint=_endpoint(fake), prompts="data", system="Be brief.",
        max_prompts={"train": 4},
    )  # fmt: skip
    run(context)
    train, test = (read_rows(context.output / f"{split}.parquet") for split in ("train", "test"))
    assert {row["id"].split("-")[0] for row in train} == {"a0", "a1", "a2", "a3"}
    assert {row["id"].split("-")[0] for row in test} == {"b0", "b1", "b2"}
    assert train[0]["prompt"] == [user("Say a 0")]
    assert fake.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    lines = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["train"] * 4 + ["test"] * 3
    assert all(len(line["texts"]) == 2 for line in lines)


def test_best_of_by_a_function(fake: FakeChat, tmp_path: Path) -> None:
    context = _context(
        tmp_path, task={"type": "best_of", "n": 4}, endpoint=_endpoint(fake), prompts="data",
        score="tests.stages.test_synthesise:word_score",
    )  # fmt: skip
    run(context)
    lines = {json.loads(line)["id"]: json.loads(line) for line in (context.output / "samples.jsonl").open()}
    rows = read_rows(context.output / "train.parquet")
    assert len(rows) == 6
    for row in rows:
        assert row["score"] == max(lines[row["id"]]["scores"]) == len(row["completion"][0]["content"].split())


def test_pairs_by_a_judge_in_both_orders(fake: FakeChat, tmp_path: Path) -> None:
    judge = {"endpoint": _endpoint(fake, model="judge-model")}
    context = _context(tmp_path, task={"type": "pairs", "n": 3}, endpoint=_endpoint(fake), prompts="data", judge=judge)
    metrics = run(context)
    for split in ("train", "test"):
        for pair in read_rows(context.output / f"{split}.parquet"):
            assert len(pair["chosen"][0]["content"].split()) > len(pair["rejected"][0]["content"].split())
    assert fake.prompts()[0] == "Reply with the one word: ready", "the judge is tried before anything is generated"
    assert fake.bodies[0]["model"] == "judge-model" and fake.bodies[1]["model"] == "good-model"
    ledger = _ledger(context)
    judged = sum(count for name, count in ledger["notes"].items() if name.startswith("judge said"))
    assert judged == ledger["usage"]["judge"]["requests"] - 1 <= 9 * 6
    ties = read_rows(context.output / "ties.parquet")
    assert metrics["ties"] == len(ties) == ledger["ties"]
    assert {tie["why"] for tie in ties} <= {"tie", "orders disagree"}
    assert {"train", "test"} >= {tie["split"] for tie in ties}


def test_pairs_by_a_reward_model_from_a_checkpoint(tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> None:
    context = _context(
        tmp_path, tiny_model, tiny_reward, task={"type": "pairs", "n": 3}, model="sft", prompts="data", reward="reward",
        max_tokens=12, precision="float32",
    )  # fmt: skip
    metrics = run(context)
    pairs = read_rows(context.output / "train.parquet")
    assert 0 < len(pairs) <= 6 and metrics["engines"] == ["transformers"]
    assert all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
    usage = _ledger(context)["usage"]["model"]
    assert usage["requests"] == 27 and usage["completion_tokens"] <= 27 * 12 and usage["uncounted"] == 0


def test_a_checkpoint_as_judge_takes_the_engine_over(tiny_model: Path, tmp_path: Path) -> None:
    context = _context(
        tmp_path, tiny_model, task={"type": "pairs", "n": 2}, model="sft", prompts="data", judge_model="sft2",
        judge={"max_tokens": 4}, max_tokens=8,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"no train row came out \(9 prompts.*verdict not readable"):
        run(context)
    assert _ledger(context)["usage"]["judge"]["requests"] > 0


def test_long_prompts_are_dropped_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    context = _context(
        tmp_path, tiny_model, task={"type": "responses"}, model="sft", prompts="data", max_tokens=4, max_prompt_tokens=3
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"no train row came out \(9 prompts, 9 no answer of use, 9 answers, 9 request fai"
    ):
        run(context)
    dropped = [json.loads(line) for line in (context.output / "dropped.jsonl").open()]
    assert "max_prompt_tokens is 3" in dropped[0]["detail"]["error"]


def test_a_model_that_cannot_hold_prompt_and_answer_says_so(tiny_model: Path, tmp_path: Path) -> None:
    context = _context(
        tmp_path, tiny_model, task={"type": "responses"}, model="sft", prompts="data", max_tokens=100_000
    )  # fmt: skip
    with pytest.raises(UserError, match=r"9 request failed"):
        run(context)
    assert "with max_tokens 100000 the model's" in (context.output / "dropped.jsonl").read_text()


def test_prices_and_a_budget(fake: FakeChat, tmp_path: Path) -> None:
    config = {
        "task": {"type": "responses", "n": 3}, "prompts": "data", "max_tokens": 10,
        "endpoint": _endpoint(fake, price_input=1.0, price_output=2.0, concurrency=2),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"max_cost 0.0006 is reached: 0.000\d+ spent.*raise max_cost and run again"):
        run(_context(tmp_path, **config, max_cost=0.0006))
    first = len(fake.bodies)
    assert 10 < first < 27
    metrics = run(_context(tmp_path, **config, max_cost=1.0))
    assert len(fake.bodies) == 27
    usage = metrics["usage"]["model"]
    assert usage["cost"] == pytest.approx((usage["prompt_tokens"] + 2 * usage["completion_tokens"]) / 1e6)
    assert metrics["cost"] == metrics["spent"] == usage["cost"]


def test_a_second_stage_takes_what_the_first_put_into_the_shared_cache(fake: FakeChat, tmp_path: Path) -> None:
    config = {"task": {"type": "responses", "n": 3}, "prompts": "data", "cache": str(tmp_path / "cache")}
    one = _context(tmp_path / "one", endpoint=_endpoint(fake), **config)
    run(one)
    two = _context(tmp_path / "two", endpoint=_endpoint(fake), **config)
    run(two)
    assert len(fake.bodies) == 27
    usage = _ledger(two)["usage"]["model"]
    assert (usage["requests"], usage["copied"]) == (0, 27)
    names = set(FILES) - {"ledger.json"}
    assert {name: _digests(one.output)[name] for name in names} == {name: _digests(two.output)[name] for name in names}


CONFIGS: dict[str, dict[str, Any]] = {
    "instructions": {"task": {"type": "instructions", "count": 60, "at_once": 3}},
    "responses": {"task": {"type": "responses", "n": 8}, "prompts": "prompts"},
    "best_of": {
        "task": {"type": "best_of", "n": 8}, "prompts": "prompts", "score": "tests.stages.test_synthesise:word_score"
    },
    "pairs": {"task": {"type": "pairs", "n": 4}, "prompts": "prompts"},
}  # fmt: skip


def _work(folder: Path, fake: FakeChat, kind: str, tmp_path: Path) -> Path:
    config = dict(CONFIGS[kind]) | {"endpoint": _endpoint(fake, concurrency=3)}
    if kind == "instructions":
        config["seeds"] = _seeds(tmp_path)
    if kind == "pairs":
        config["judge"] = {"endpoint": _endpoint(fake, model="judge-model", concurrency=3)}
    return _lay_out(_context(folder, **config))


def _lay_out(context: StageContext, engine: str = "auto") -> Path:
    """A folder as the runner lays it out for a stage's process."""
    folder = context.output.parent
    inputs: dict[str, Any] = {}
    for name, artifact in context.inputs.items():
        inputs[name] = artifact and {"stage": artifact.stage, "path": str(artifact.path)}
        if artifact is not None:
            record = {"makes": str(artifact.kind), "key": artifact.record["key"]}
            (artifact.path / "record.json").write_text(json.dumps(record))
    work = {
        "name": "s", "stage": "synthesise", "config": context.config.model_dump(mode="json"), "seed": 11,
        "runtime": Runtime(engine=EngineConfig(name=engine)).model_dump(mode="json"), "inputs": inputs,
    }  # fmt: skip
    (folder / "work.json").write_text(json.dumps(work))
    return folder


def _process(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "align.stage_process", str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("kind", "most"),
    [("pairs", 3), *(pytest.param(kind, 10**6, marks=pytest.mark.slow) for kind in CONFIGS)],
)
def test_killed_again_and_again_it_comes_to_the_same_bytes_and_asks_nothing_twice(
    fake: FakeChat, tmp_path: Path, kind: str, most: int
) -> None:
    whole = _work(tmp_path / "whole", fake, kind, tmp_path)
    process = _process(whole)
    assert process.wait() == 0, process.stderr and process.stderr.read()
    asked = len(fake.bodies)
    fake.bodies.clear()
    fake.delay = 0.01
    killed = _work(tmp_path / "killed", fake, kind, tmp_path)
    rng, kills, answered = random.Random(kind), 0, 0
    while True:
        before = len(fake.bodies)
        process = _process(killed)
        aim = before + rng.randint(1, max(2, asked // 4))
        while process.poll() is None and (len(fake.bodies) < aim or kills == most):
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        while fake.under_way:  # the server still answers those who have gone
            time.sleep(0.005)
        cache = RequestCache(killed / "checkpoints")
        assert len(cache) >= answered, "what was answered is still there"
        answered = len(cache)
        cache.close()
    assert process.returncode == 0, process.stderr and process.stderr.read()
    assert kills >= 3
    # only what was under way at a kill, three requests at most, may be asked once more
    keys = [json.dumps(body, sort_keys=True) for body in fake.bodies]
    assert len(set(keys)) == asked and len(keys) - asked <= 3 * kills
    assert _digests(killed / "output") == _digests(whole / "output")


def test_a_killed_checkpoint_run_comes_to_the_same_bytes(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from align.rollouts.transformers import TransformersEngine
    from align.synthesis import local_model

    monkeypatch.setattr(local_model, "CHUNK", 4)
    config: dict[str, Any] = {
        "task": {"type": "responses", "n": 3},
        "model": "sft",
        "prompts": "data",
        "max_tokens": 16,
    }
    whole = _context(tmp_path / "whole", tiny_model, **config)
    run(whole)
    killed = _context(tmp_path / "killed", tiny_model, **config)
    real, calls = TransformersEngine.generate, []

    def dies_third(self: Any, *given: Any) -> Any:
        calls.append(len(given[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(TransformersEngine, "generate", dies_third)
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    with (killed.checkpoints / "answers.jsonl").open("ab") as file:  # the third chunk, half written
        file.write(b'{"answers": [{"answer": {"completion_tok')
    run(killed)
    assert calls == [4, 4, 4, 4, 4, 4, 4, 3], "27 answers in chunks of 4, the third twice"
    assert _digests(killed.output) == _digests(whole.output)


@pytest.mark.slow
def test_vllm_killed_between_its_chunks_comes_to_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    config: dict[str, Any] = {
        "task": {"type": "responses", "n": 8}, "model": "sft", "prompts": "data", "max_tokens": 128, "train": 120,
    }  # fmt: skip

    def answered(folder: Path) -> int:
        path = folder / "checkpoints" / "answers.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    whole, killed = (_lay_out(_context(tmp_path / name, tiny_model, **config), "vllm") for name in ("whole", "killed"))
    process = _process(whole)
    assert process.wait() == 0, process.stderr and process.stderr.read()
    assert answered(whole) == 8, "984 answers in chunks of 128"
    for chunks in (1, 4):
        process = _process(killed)
        while process.poll() is None and answered(killed) < chunks:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert chunks <= answered(killed) < 8
    process = _process(killed)
    assert process.wait() == 0, process.stderr and process.stderr.read()
    assert answered(killed) == 8
    assert _digests(killed / "output") == _digests(whole / "output")


# ---- settings -------------------------------------------------------------------------------------------------------

SERVER = {"url": "https://api.example.com/v1", "model": "m"}
RESPONSES = {"task": {"type": "responses"}, "prompts": "data", "endpoint": SERVER}
PAIRS = {"task": {"type": "pairs"}, "prompts": "data", "endpoint": SERVER}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (RESPONSES | {"endpoint": None}, "model or endpoint answers, one of them; neither is set"),
        (RESPONSES | {"model": "sft"}, "both are set"),
        (RESPONSES | {"prompts": None}, "responses needs prompts"),
        (RESPONSES | {"seeds": "x.jsonl"}, "seeds are for instructions"),
        (RESPONSES | {"score": "gold"}, "responses has no use for score"),
        (RESPONSES | {"max_cost": 1}, "max_cost needs endpoint.price_input"),
        (RESPONSES | {"endpoint": None, "model": "sft", "max_cost": 1}, "max_cost is for endpoints"),
        (RESPONSES | {"task": {"type": "responses", "n": 2}, "temperature": 0}, "temperature 0 gives the same answer"),
        ({"task": {"type": "instructions"}, "endpoint": SERVER}, "instructions need seeds"),
        (PAIRS, "pairs needs one of reward, score, judge; none set"),
        (PAIRS | {"score": "gold", "reward": "r"}, "needs one of reward, score, judge; reward, score set"),
        (PAIRS | {"judge": {}}, "judge.endpoint or judge_model judges, one of them; neither is set"),
        (PAIRS | {"judge": {"endpoint": SERVER}, "judge_model": "sft"}, "both are set"),
        (PAIRS | {"score": "gold", "judge_model": "sft"}, "judge_model needs `judge"),
        (PAIRS | {"task": {"type": "pairs", "min_margin": 1}, "judge": {"endpoint": SERVER}}, "a judge gives none"),
        (PAIRS | {"task": {"type": "best_of"}, "judge": {"endpoint": SERVER}}, "best_of has no use for judge"),
        (PAIRS | {"task": {"type": "best_of", "n": 2, "keep": 3}, "score": "gold"}, "keep 3 is more than n 2"),
    ],
)
def test_settings_that_make_no_sense(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        SynthesiseConfig(**config)


def _pipeline(folder: Path, **changed: Any) -> Pipeline:
    stage = {
        "task": {"type": "pairs", "n": 2}, "endpoint": SERVER, "prompts": "data", "judge": {"endpoint": dict(SERVER)}
    } | changed  # fmt: skip
    data = {"recipe": "data_recipes/embedded.yaml"}
    return Pipeline({"name": "p", "stages": {"data": data, "synthesise": stage}}, base=folder)


def test_the_key_holds_what_decides_the_rows_and_nothing_else() -> None:
    base = Path.cwd()
    node = _pipeline(base).nodes["synthesise"]
    assert node.makes == Kind.PREFERENCES
    same = [
        {"endpoint": SERVER | {"concurrency": 3, "retries": 9, "timeout": 3, "price_input": 1, "price_output": 1}},
        {"cache": "elsewhere"},
        {"on_error": "drop"},
        {"endpoint": SERVER | {"price_input": 1, "price_output": 1}, "max_cost": 5,
         "judge": {"endpoint": SERVER | {"price_input": 1, "price_output": 1}}},
    ]  # fmt: skip
    assert {_pipeline(base, **one).nodes["synthesise"].key for one in same} == {node.key}
    other = [
        {"endpoint": SERVER | {"model": "n"}},
        {"endpoint": SERVER | {"url": "https://api.example.org/v1"}},
        {"endpoint": SERVER | {"extra": {"top_k": 2}}},
        {"judge": {"endpoint": SERVER | {"model": "n"}}},
        {"judge": {"endpoint": SERVER, "rubric": "Shorter."}},
        {"temperature": 0.5},
        {"task": {"type": "pairs", "n": 3}},
    ]
    assert len({_pipeline(base, **one).nodes["synthesise"].key for one in other} | {node.key}) == 8


def test_a_seed_file_counts_by_its_content(tmp_path: Path) -> None:
    def key(name: str) -> str:
        stage = {"task": {"type": "instructions"}, "endpoint": SERVER, "seeds": name}
        return Pipeline({"name": "p", "stages": {"synthesise": stage}}, base=tmp_path).nodes["synthesise"].key

    (tmp_path / "one.jsonl").write_text("{}")
    (tmp_path / "two.jsonl").write_text("{}")
    (tmp_path / "three.jsonl").write_text("{ }")
    assert key("one.jsonl") == key("two.jsonl") != key("three.jsonl")
    with pytest.raises(UserError, match=r"stages.synthesise: seeds: there is no file .*four.jsonl"):
        key("four.jsonl")


def test_what_the_guide_shows_is_accepted(tmp_path: Path) -> None:
    import re

    import yaml

    (block,) = re.findall(r"```yaml\n(.*?)```", Path("docs/synthesis.md").read_text(encoding="utf-8"), re.DOTALL)
    shown = yaml.safe_load(block)
    shown["stages"]["instructions"]["seeds"] = _seeds(tmp_path)
    made = {node.name: node.makes for node in Pipeline(shown, "docs/synthesis.md")}
    assert list(made.values()) == [Kind.MODEL, Kind.PROMPTS, Kind.INSTRUCTIONS, Kind.PREFERENCES]


def test_an_unreachable_judge_is_found_before_anything_is_generated(fake: FakeChat, tmp_path: Path) -> None:
    gone = FakeChat()
    gone.stop()
    judge = {"endpoint": _endpoint(gone)}
    with pytest.raises(UserError, match=r"judge.endpoint.url: http://127.0.0.1:\d+/v1 could not be asked"):
        run(_context(tmp_path, task={"type": "pairs"}, endpoint=_endpoint(fake), prompts="data", judge=judge))
    assert fake.bodies == []


def test_a_misspelt_scorer_is_found_before_anything_is_generated(fake: FakeChat, tmp_path: Path) -> None:
    config = {"task": {"type": "pairs"}, "prompts": "data", "score": "tests.stages.test_synthesise:word_scor"}
    with pytest.raises(UserError, match=r"has no function 'word_scor'. Did you mean 'word_score'"):
        run(_context(tmp_path, endpoint=_endpoint(fake), **config))
    assert fake.bodies == []
