"""Stage sample on a tiny model: pairs, counts, resume in the middle, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.config.runtime import EngineConfig, Runtime
from align.config.stages.sample import SampleConfig
from align.config.user_functions import load_function
from align.data.rows import read_rows, write_rows
from align.inference.transformers import TransformersEngine
from align.models.loading import load_tokenizer
from align.pipeline.context import StageContext
from align.stages import sample
from align.stages.sample import run
from align.store.artifacts import Artifact, Kind
from align.store.rollouts import ROLLOUTS, open_rollouts
from tests.support.refusals import Refused
from tests.support.stored_rollouts import stored_rows


def flat_score(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    return [0.5] * len(responses)


def length_score(rows: list[dict[str, Any]], responses: list[str]) -> list[float]:
    assert all(row["gold"] == {"of": row["id"]} for row in rows), "columns that the recipe keeps reach the scorer"
    return [len(response.encode()) / 100 for response in responses]


def _rows(count: int, name: str) -> list[dict[str, Any]]:
    return [
        {"id": f"{name}{i}", "source": "t", "prompt": [{"role": "user", "content": f"Say {i}"}], "checks": ""}
        | {"gold": {"of": f"{name}{i}"}}
        for i in range(count)
    ]


def _context(folder: Path, model: Path, train: int = 5, test: int = 3, **config: Any) -> StageContext:
    for name in ("output", "checkpoints", "prompts", "policy"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_rows(folder / "prompts" / "train.parquet", _rows(train, "a"))
    write_rows(folder / "prompts" / "test.parquet", _rows(test, "b"))
    if not (folder / "policy" / "model").exists():
        (folder / "policy" / "model").symlink_to(model)
    config = {"policy": "sft", "prompts": "data", "n": 3, "max_tokens": 8, "score": f"{__name__}:length_score"} | config
    return StageContext(
        name="sample",
        config=SampleConfig(**config),
        inputs={
            "policy": Artifact("sft", Kind.POLICY, folder / "policy", {"key": "sft"}),
            "prompts": Artifact("data", Kind.PROMPTS, folder / "prompts", {}),
            "reward": None,
        },
        seed=11,
        runtime=Runtime(engine=EngineConfig(name="transformers")),
        output=folder / "output",
        checkpoints=folder / "checkpoints",
        events=folder / "events.jsonl",
    )


@pytest.fixture(autouse=True)
def _score_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of this file as scorers, wherever the test runner put it."""
    functions = {"length_score": length_score, "flat_score": flat_score}
    monkeypatch.setattr("align.scoring.functions.load_function", lambda path, role: functions[path.split(":")[1]])


def test_pairs_samples_and_counts(tiny_model: Path, tmp_path: Path) -> None:
    context = _context(tmp_path, tiny_model, max_prompts={"train": 4})
    metrics = run(context)
    lines = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    assert [line["split"] for line in lines] == ["train"] * 4 + ["test"] * 3
    assert all(line["row"] == {"gold": {"of": line["id"]}} for line in lines)
    assert all(len(line["texts"]) == len(line["scores"]) == len(line["finished"]) == 3 for line in lines)
    for split in ("train", "test"):
        pairs = read_rows(context.output / f"{split}.parquet")
        assert metrics[f"{split}_pairs"] == len(pairs) > 0
        assert all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)
        assert all(pair["id"].startswith(pair["gold"]["of"] + "-") for pair in pairs)
    assert metrics["engine"] == "transformers"
    assert metrics["train_prompts"] == 4
    assert metrics["tokens"] == sum(sum(line["tokens"]) for line in lines)
    assert 0 <= metrics["train_eos_rate"] <= 1


def test_thoughts_are_closed_and_not_scored(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "policy" / "model"))
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    tokenizer.save_pretrained(model)
    refused(lambda: run(_context(tmp_path, model, max_tokens=24, thinking_budget=13)))
    context = _context(tmp_path, model, max_tokens=24, thinking_budget=4)
    metrics = run(context)
    lines = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    closed = 0
    for line in lines:
        fields = (line[name] for name in ("texts", "thought_end", "open_thought", "scores"))
        for text, end, is_open, score in zip(*fields, strict=True):
            # A random model may end its turn within the budget.
            assert is_open == (not text[:end].rstrip().endswith("</think>"))
            assert score == len(text[end:].encode()) / 100
            closed += not is_open
    assert closed > 10
    assert metrics["train_mean_thought_tokens"] > 11 and metrics["train_open_thoughts"] < 0.5


def test_samples_have_the_reasons_of_a_verifier(tiny_model: Path, tmp_path: Path) -> None:
    # The column `gold` is a mapping, whose entry `of` no response has; the second reward makes pairs.
    score = [{"exact": "gold.of"}, {"function": f"{__name__}:length_score"}]
    context = _context(tmp_path, tiny_model, score=score, max_prompts={"train": 2, "test": 1})
    metrics = run(context)
    lines = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    assert all(line["parts"]["exact"] == [0.0] * 3 for line in lines)
    reasons = [line["parts"][f"exact_{reason}"] for line in lines for reason in ("no_answer", "unequal")]
    assert sum(map(sum, reasons)) == 9 and metrics["train_mean_score_exact"] == 0.0
    (line,) = metrics["score_reasons"]
    assert " of 6: unequal" in line and "`exact` compares the whole answer" in line


def test_score_without_pairs_ends_with_the_reasons(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    context = _context(tmp_path, tiny_model, score=[{"exact": "gold.of"}], score_validation={"rows": 0})
    refused(run, context)


def test_killed_in_the_middle_it_goes_on_to_the_same_result(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE_CHUNK", 2)
    uninterrupted = _context(tmp_path / "whole", tiny_model)
    run(uninterrupted)
    parts = _context(tmp_path / "parts", tiny_model)
    real, calls = sample._ChunkSampler._sample, []

    def dies_third(self: Any, prompts: Any, start: int, sampling: Any) -> Any:
        calls.append((prompts.split, start))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, prompts, start, sampling)

    monkeypatch.setattr(sample._ChunkSampler, "_sample", dies_third)
    with pytest.raises(KeyboardInterrupt):
        run(parts)
    run(parts)
    assert calls == [("train", 0), ("train", 2), ("train", 4), ("train", 4), ("test", 0), ("test", 2)]
    name = "samples.jsonl"
    assert (parts.output / name).read_text() == (uninterrupted.output / name).read_text()
    tables = [open_rollouts(context.output / ROLLOUTS).to_table() for context in (uninterrupted, parts)]
    assert len(tables[0]) == 24 and tables[1].equals(tables[0])


def test_rollouts_have_tokens_and_scores_of_all_samples(tiny_model: Path, tmp_path: Path) -> None:
    context = _context(tmp_path, tiny_model)
    run(context)
    lines = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    rows = stored_rows(context.output / ROLLOUTS)
    for line in lines:
        own = [row for row in rows if (row["split"], row["prompt_id"]) == (line["split"], line["id"])]
        assert [row["index"] for row in own] == [0, 1, 2]
        assert [row["response"] for row in own] == line["texts"]
        assert [row["score"] for row in own] == pytest.approx(line["scores"])
        assert [row["tokens"] for row in own] == line["tokens"]
        assert {tuple(row["prompt_ids"]) for row in own} == {tuple(own[0]["prompt_ids"])}
        for row in own:
            assert row["prompt"] == line["prompt"]
            assert len(row["token_ids"]) == len(row["sampler_logprobs"]) == len(row["token_texts"]) == row["tokens"]
            assert all(value < 0 for value in row["sampler_logprobs"]) and all(row["response_mask"])
    assert len(rows) == 3 * len(lines) and {row["update"] for row in rows} == {None}


def test_limits_of_stored_rollouts_change_no_result(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "SAMPLE_CHUNK", 2)
    contexts = {"whole": {}, "share": {"keep": 0.5}, "none": {"keep": 0.0}, "full": {"max_gb": 3e-5}}
    counts = {}
    for name, rollouts in contexts.items():
        context = _context(tmp_path / name, tiny_model, rollouts=rollouts)
        run(context)
        counts[name] = len(stored_rows(context.output / ROLLOUTS))
        samples = (context.output / "samples.jsonl").read_text()
        assert samples == (tmp_path / "whole" / "output" / "samples.jsonl").read_text()
        calls: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(sample._ChunkSampler, "_sample", lambda *args, calls=calls: calls.append(args))
            run(context)
        assert not calls, "what was sampled is not sampled again to store it"
    assert counts["whole"] == 24 and counts["none"] == 0
    assert 0 < counts["share"] < 24 and 0 < counts["full"] < 24
    assert "the rollouts reached rollouts.max_gb 3e-05" in (tmp_path / "full" / "events.jsonl").read_text()


def test_responses_changed_between_attempts_are_sampled_again(tiny_model: Path, tmp_path: Path) -> None:
    context = _context(tmp_path, tiny_model)
    run(context)
    samples = (context.output / "samples.jsonl").read_text()
    chunks = sorted(context.checkpoints.glob("*.jsonl"))
    assert len(chunks) == 2
    for chunk in chunks:
        chunk.write_text(chunk.read_text().replace('"texts": ["', '"texts": ["not this '))
    run(context)
    assert (context.output / "samples.jsonl").read_text() == samples
    assert context.events.read_text().count("is not what was written there") == 2


def test_a_cut_off_response_gets_the_score_set_for_it(tiny_model: Path, tmp_path: Path) -> None:
    context = _context(tmp_path, tiny_model, cut_off_score=-1.0, max_tokens=64)
    run(context)
    lines = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    answers = [each for line in lines for each in zip(line["texts"], line["scores"], line["finished"], strict=True)]
    assert {finished for _, _, finished in answers} == {True, False}
    for text, score, finished in answers:
        assert score == (length_score([], [text])[0] if finished else -1.0)
    pairs = read_rows(context.output / "train.parquet")
    assert not all(pair["rejected_finished"] for pair in pairs)
    assert all(pair["chosen_finished"] for pair in pairs)


def test_reward_model_scores(tiny_model: Path, tiny_reward: Path, tmp_path: Path) -> None:
    context = _context(tmp_path, tiny_model, score=None, reward="reward", precision="float32")
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "model").symlink_to(tiny_reward)
    context.inputs["reward"] = Artifact("reward", Kind.REWARD, tmp_path / "reward", {})
    assert run(context)["train_pairs"] == 5


def test_no_pairs_is_an_error_and_no_test_pairs_a_warning(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    refused(lambda: run(_context(tmp_path / "one", tiny_model, score=f"{__name__}:flat_score")))
    context = _context(tmp_path / "two", tiny_model, test=0)
    run(context)
    assert read_rows(context.output / "test.parquet") == []
    assert "no test pair" in context.events.read_text()


def test_long_prompts_are_counted(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    refused(lambda: run(_context(tmp_path, tiny_model, max_prompt_tokens=5, long_rows="skip")))
    refused(lambda: run(_context(tmp_path, tiny_model, max_prompt_tokens=5)))


def test_exactly_one_scorer(refused: Refused) -> None:
    refused(SampleConfig, policy="sft", prompts="data", score=None)
    refused(SampleConfig, policy="sft", prompts="data", score="gold", reward="reward")


def test_an_engine_that_hangs_ends_the_stage(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(engine: TransformersEngine, *arguments: Any, **options: Any) -> None:
        engine.watchdog.on_hang("it hangs")  # type: ignore[misc]

    def end(message: str) -> None:
        raise SystemExit(message)

    monkeypatch.setattr(TransformersEngine, "generate", hangs)
    with pytest.raises(SystemExit, match="it hangs"):
        run(replace(_context(tmp_path, tiny_model), fail_at_once=end))


def test_a_list_of_rewards_is_told_part_by_part(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("align.scoring.functions.load_function", lambda path, role: load_function(path, role))
    score = [
        {"function": "tests.support.rewards:length", "arguments": {"limit": 10}},
        {"function": "tests.support.rewards:vowels", "weight": 0.5, "name": "open"},
    ]
    context = _context(tmp_path, tiny_model, score=score)
    metrics = run(context)
    lines = [json.loads(line) for line in (context.output / "samples.jsonl").read_text().splitlines()]
    for line in lines:
        parts = line["parts"]
        pairs = zip(parts["length"], parts["open"], strict=True)
        assert line["scores"] == pytest.approx([length + 0.5 * vowels for length, vowels in pairs])
        assert parts["length"] == pytest.approx([len(text) / 10 for text in line["texts"]])
    lengths = [value for line in lines if line["split"] == "train" for value in line["parts"]["length"]]
    assert metrics["train_mean_score_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert metrics["train_mean_score"] == pytest.approx(
        metrics["train_mean_score_length"] + 0.5 * metrics["train_mean_score_open"]
    )
