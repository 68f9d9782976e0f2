"""Reward models on files of pairs: what is read of each layout, what is scored, and what stands in the scorecard."""

import dataclasses
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from align.config.stages.evaluation.tasks import RewardPairsConfig
from align.evaluation.comparisons import Resampling
from align.evaluation.reward_accuracy import SCORE, pair_accuracy
from align.evaluation.scorecard import SystemInfo
from align.evaluation.scorecard.scorecard_builder import Measurements, TaskResult, build
from align.evaluation.tasks import build_task
from align.evaluation.tasks.base import TaskInputs
from align.evaluation.tasks.records import record_source
from align.evaluation.tasks.reward_pairs import RewardPairsTask
from tests.support.evaluation.tasks.respondents import task_inputs


class Shelf:
    """A bench whose reward models are functions of prompt, answer and whether it ended."""

    seed = 3

    def __init__(self, *models) -> None:
        self.models = dict(zip(("reward", "second_reward"), models, strict=False))
        self.asked: list[tuple] = []

    def reward_stage(self, field: str = "reward") -> str | None:
        return {"reward": "rm", "second_reward": "rm-b"}[field] if field in self.models else None

    def reward_scores(self, prompts, answers, finished, field="reward") -> list[float]:
        self.asked.append((field, prompts, answers, finished))
        return [self.models[field](*entry) for entry in zip(prompts, answers, finished, strict=True)]

    def progress(self, done, total, unit) -> None:
        pass


def with_models(folder: Path, count: int = 1, warned: list[str] | None = None, seed: int = 0) -> TaskInputs:
    return dataclasses.replace(
        task_inputs(folder, seed),
        has_second_reward=count > 1,
        warn=(warned if warned is not None else []).append,
    )


def write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def make_task(folder: Path, records: list[dict], count: int = 1, warned: list | None = None, **more) -> RewardPairsTask:
    config = RewardPairsConfig(files=[write(folder / "mine.jsonl", records)], **more)
    return build_task("rm_set", config, with_models(folder, count, warned))


def length(prompt, answer, finished) -> float:
    return float(len(answer))


PAIRS = [
    {"prompt": "Hi", "chosen": "good day", "rejected": "no", "chosen_score": 1, "rejected_score": 0},
    {"prompt": "Name a color", "chosen": "red", "rejected": "I will not", "topic": "colors"},
    {"prompt": "Count", "chosen": "1 2 3", "rejected": "3 2 1"},
]


def test_pairs_are_scored_side_by_side(tmp_path):
    task = make_task(tmp_path, PAIRS)
    shelf = Shelf(length)
    assert task.score({}, shelf) == {}
    [(field, prompts, answers, finished)] = shelf.asked
    assert field == "reward"
    assert [prompt[0]["content"] for prompt in prompts] == ["Hi", "Hi", "Name a color", "Name a color"] + ["Count"] * 2
    assert answers == ["good day", "no", "red", "I will not", "1 2 3", "3 2 1"]
    assert all(finished)
    [report] = task.extras()["reward_models"]
    assert (report["stage"], report["task"], report["pairs"], report["ties"]) == ("rm", "rm_set", 3, 1)
    assert report["as_labeled"]["value"] == pytest.approx(1 / 3)  # the tie is wrong
    assert report["longer"]["value"] == pytest.approx(1.5 / 3)
    assert report["true"]["n"] == 1
    assert list(report["by_source"]) == ["mine.jsonl"]
    assert report["sections"] is None
    assert report["agreement"] is None
    assert json.loads(json.dumps(task.settings(), allow_nan=False)) == task.settings()
    assert (task.settings()["layout"], task.settings()["answers"]) == ("pairs", 6)


def test_every_pair_has_its_numbers_and_its_texts(tmp_path):
    task = make_task(tmp_path, PAIRS)
    task.score({}, Shelf(length))
    task.scored = [("rm", [([4.0], [math.nan]), ([1.5], [5.0]), ([2.5], [2.5])])]
    assert task.item_values() == {
        "rm": [
            {"chosen": [4.0], "rejected": [None], "margin": [None], "correct": [0.0]},
            {"chosen": [1.5], "rejected": [5.0], "margin": [-3.5], "correct": [0.0]},
            {"chosen": [2.5], "rejected": [2.5], "margin": [0.0], "correct": [0.0]},
        ]
    }
    answers = task.item_answers()
    assert answers[1]["chosen"] == [{"text": "red", "finished": True, "scores": {"rm": 1.5}}]
    assert answers[0]["rejected"] == [{"text": "no", "finished": True, "scores": {"rm": None}}]
    json.dumps([answers, task.item_values()], allow_nan=False)


def test_a_category_may_stand_in_any_field(refused, tmp_path):
    task = make_task(
        tmp_path, [{**record, "topic": f"t{index % 2}"} for index, record in enumerate(PAIRS)], category="topic"
    )
    task.score({}, Shelf(length))
    assert {name: entry["n"] for name, entry in task.reports[0]["by_source"].items()} == {"t0": 2, "t1": 1}
    refused(make_task, tmp_path, PAIRS, category="topic")


def test_every_file_is_a_category(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", PAIRS) for name in ("helpful", "harmless")]
    task = build_task("rm_set", RewardPairsConfig(files=files), with_models(tmp_path))
    task.score({}, Shelf(length))
    assert set(task.reports[0]["by_source"]) == {"helpful.jsonl", "harmless.jsonl"}


def test_two_reward_models_are_compared(tmp_path):
    task = make_task(tmp_path, PAIRS * 4, count=2)
    shelf = Shelf(length, lambda prompt, answer, finished: -float(len(answer)))
    task.score({}, shelf)
    assert [which for which, *_ in shelf.asked] == ["reward", "second_reward"]
    first, second = task.extras()["reward_models"]
    assert (first["stage"], second["stage"]) == ("rm", "rm-b")
    assert first["agreement"]["other"] == "rm-b"
    assert first["agreement"]["accuracy"]["value"] == pytest.approx(1 / 3)  # only in ties
    assert first["agreement"]["spearman"]["value"] == pytest.approx(-1)


def bench_record(subset: str, chosen: str, rejected: str) -> dict:
    return {"prompt": "Q", "chosen": chosen, "rejected": rejected, "subset": subset, "id": 1, "chosen_model": "x"}


def test_reward_bench(tmp_path):
    records = [
        bench_record("alpacaeval-easy", "long answer", "short"),
        bench_record("mt-bench-hard", "aa", "bb"),  # a tie is wrong
        bench_record("donotanswer", "longer", "short"),
        bench_record("math-prm", "a", "bb"),
        bench_record("hep-go", "bb", "a"),
        bench_record("hep-python", "bb", "a"),
    ]
    task = make_task(tmp_path, records)
    assert (task.layout, task.title) == ("reward_bench", "RewardBench")
    task.score({}, Shelf(length))
    sections = task.reports[0]["sections"]
    values = {name: section["value"] for name, section in sections.items()}
    assert values == {SCORE: 0.625, "Chat": 1, "Chat Hard": 0, "Safety": 1, "Reasoning": 0.5}
    assert task.reports[0]["by_source"]["hep-go"]["n"] == 1


def best_of(subset: str, name: str, chosen: list[str], rejected: list[str]) -> dict:
    return {"id": name, "prompt": f"Q{name}", "chosen": chosen, "rejected": rejected, "subset": subset}


BEST = [
    best_of("Math", "1", ["the longest"], ["a", "bb", "ccc"]),
    best_of("Math", "2", ["mid"], ["a", "bb", "longest"]),
    best_of("Focus", "3", ["tied"], ["tied", "a", "b"]),
    best_of("Ties", "tied:4", ["yellow", "orange"], ["no", "go"]),
    best_of("Ties", "ref:4", ["four"], ["two", "six", "ten"]),
]


def test_reward_bench_2(tmp_path):
    task = make_task(tmp_path, BEST)
    assert (task.layout, task.title, len(task.items)) == ("reward_bench_2", "RewardBench 2", 5)
    shelf = Shelf(length)
    task.score({}, shelf)
    [(_, prompts, answers, finished)] = shelf.asked
    assert len(prompts) == len(answers) == len(finished) == 4 + 4 + 4 + 4 + 4
    assert answers[:5] == ["the longest", "a", "bb", "ccc", "mid"]
    assert prompts[4] == [{"role": "user", "content": "Q2"}]
    values = {name: section["value"] for name, section in task.reports[0]["sections"].items()}
    # Focus: a tie of two. Ties: good answers score alike, 4 above the bad ones, and 1 for the ref prompt
    assert values == {"Math": 0.5, "Focus": 0.5, "Ties": pytest.approx(1.01)}
    assert task.reports[0]["pairs"] == 5
    assert task.settings()["answers"] == 20


def test_pairs_of_reward_bench_2_are_drawn_by_seed(tmp_path):
    records = [best_of("Math", str(index), ["good"], [f"bad {index} {n}" for n in range(3)]) for index in range(30)]
    config = RewardPairsConfig(files=[write(tmp_path / "best.jsonl", records)])

    def drawn(seed: int) -> list[str]:
        task = build_task("rb2", config, with_models(tmp_path, seed=seed))
        return [row["rejected"][0]["content"] for row in task._rows()]

    assert drawn(0) == drawn(0) != drawn(1)
    assert {text.rsplit(" ", 1)[1] for text in drawn(0)} == {"0", "1", "2"}
    # the scores of a pair are those of its own two answers
    task = build_task("rb2", config, with_models(tmp_path))
    task.score({}, Shelf(lambda prompt, answer, finished: 5.0 if answer == "good" else float(answer[-1])))
    by_hand = pair_accuracy(task._rows(), [5.0] * 30, [float(text[-1]) for text in drawn(0)])
    assert task.reports[0]["margin"]["value"] == pytest.approx(by_hand["margin"])


def test_what_belongs_together_in_ties_is_drawn_together(tmp_path):
    records = [best_of("Ties", f"{kind}:{index}", ["a"], ["b"]) for kind in ("ref", "tied") for index in range(20)]
    task = make_task(tmp_path, records, max_items=7)
    names = [comparison.id for comparison in task.comparisons]
    assert len(names) == 14
    assert {name.removeprefix("ref:") for name in names if "ref" in name} == {
        name.removeprefix("tied:") for name in names if "tied" in name
    }
    assert len(make_task(tmp_path, PAIRS * 5, max_items=7).comparisons) == 7


def test_what_makes_no_pair_is_counted(tmp_path):
    warned: list[str] = []
    more = [
        {"prompt": "Same", "chosen": "x", "rejected": "x"},
        {"prompt": "Tools", "chosen": "x", "rejected": "y", "tools": [{"name": "f"}]},
    ]
    task = make_task(tmp_path, PAIRS + more, warned=warned)
    assert len(task.comparisons) == 3
    assert len(warned) == 1
    assert warned[0].startswith("rm_set: 2 of 5 records make no pair: ")
    assert "it has tools (1)" in warned[0]


@pytest.mark.parametrize(
    ("records", "more"),
    [
        ([{"prompt": "x", "responses": [{"content": "a", "score": 1}]}], {}),
        ([{"question": "x", "answer": "y"}], {}),
        ([{"prompt": "x", "chosen": "a", "rejected": "a"}], {}),
        ([bench_record("hep-gp", "a", "b")], {"layout": "reward_bench"}),
        (PAIRS, {"layout": "reward_bench"}),
        (PAIRS, {"layout": "reward_bench_2"}),
        ([{**BEST[0], "chosen": "text"}], {"layout": "reward_bench_2"}),
        ([{**BEST[0], "rejected": []}], {"layout": "reward_bench_2"}),
        ([best_of("Ties", "4", ["a"], ["b"])], {}),
        ([BEST[3], BEST[3]], {}),
    ],
)
def test_records_of_another_kind_are_refused(refused, tmp_path, records, more):
    refused(make_task, tmp_path, records, **more)


def test_settings_that_are_refused(refused):
    refused(RewardPairsConfig)
    refused(RewardPairsConfig, files=["x"], layout="rewardbench")
    source = record_source(RewardPairsConfig(dataset="allenai/reward-bench", revision="a" * 40))
    assert source.split == "filtered"
    assert record_source(RewardPairsConfig(dataset="allenai/reward-bench-2", revision="a" * 40)).split == "test"


def test_a_scorecard_takes_the_reports_and_no_metrics(tmp_path):
    task = make_task(tmp_path, BEST)
    task.score({}, Shelf(length))
    systems = [SystemInfo("sft", "sft", "checkpoint", "key")]
    values = {"sft": {"length": [[1.0], [2.0]], "finished": [[1.0], [1.0]]}}
    measurements = Measurements(systems, "sft", None, ["a", "a"], values, tasks=[TaskResult(task, {})])
    card = build(measurements, Resampling(100, 0), {})
    assert card["reward_models"] == task.reports
    assert card["tasks"]["rm_set"]["metrics"] == []
    assert not any(name.startswith("rm_set") for name in card["metrics"])
    json.dumps(card, allow_nan=False)


def test_real_pairs_through_a_reward_model(tiny_reward, shared_data, tmp_path):
    from align.models.reward import RewardModel

    files = [str(shared_data / "hh-rlhf" / f"{name}-base.test.jsonl.gz") for name in ("helpful", "harmless")]
    config = RewardPairsConfig(files=files, max_items=20)
    warned: list[str] = []
    task = build_task("hh", config, with_models(tmp_path, warned=warned))
    assert len(task.comparisons) == 20
    raw = [json.loads(line) for file in files for line in gzip.decompress(Path(file).read_bytes()).splitlines()]
    equal = sum(record["chosen"] == record["rejected"] for record in raw)
    assert f" of {len(raw)} records make no pair: " in warned[0]
    assert f"chosen equals rejected ({equal})" in warned[0]
    model = RewardModel(tiny_reward, precision="float32")
    shelf = Shelf(None)
    shelf.reward_scores = lambda prompts, answers, finished, which: model.score(prompts, answers, finished)
    task.score({}, shelf)
    [report] = task.reports
    assert set(report["by_source"]) == {"helpful-base.test.jsonl.gz", "harmless-base.test.jsonl.gz"}
    assert sum(entry["n"] for entry in report["by_source"].values()) == 20
    assert report["length_correlation"]["n"] == 20
    rows = task._rows()
    scores = [model.score([row["prompt"] for row in rows], [row[side][0]["content"] for row in rows])
              for side in ("chosen", "rejected")]  # fmt: skip
    assert report["margin"]["value"] == pytest.approx(np.mean(np.subtract(*scores)), abs=1e-4)
