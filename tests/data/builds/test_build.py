"""Whole builds: the ledger adds up, every dropped record has its reason, and nothing but the recipe decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.config.recipe.recipe import Recipe
from align.data.builds import build as building
from align.data.builds import build_files, shards
from align.data.builds.build import build
from align.data.builds.ledger import Counts, summary_lines
from align.data.builds.shards import is_stored
from align.data.builds.workers import BuildResources
from align.data.checkers import gsm8k_answer
from align.data.rows import Row, assistant, read_rows, user, write_rows
from align.data.steps.split import group
from align.store.fingerprint import digest
from align.store.json_files import write_sealed
from tests.support.damage import flip_bit
from tests.support.records import put_record
from tests.support.refusals import Refused


class Built:
    """A build in a folder, with its rows."""

    def __init__(self, base: Path, folder: Path, content: dict[str, Any], **options: Any) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        recipe = Recipe.model_validate(content)
        self.ledger = build(recipe, base, folder.parent / f"{folder.name}-work", folder, **options)
        self.train, self.test = (read_rows(folder / f"{split}.parquet") for split in ("train", "test"))
        self.dropped = read_rows(folder / "dropped.parquet")
        self._check(content)

    def _check(self, content: dict[str, Any]) -> None:
        ledger = self.ledger
        assert ledger["rows_in"] + ledger["added"] == ledger["rows_out"] + sum(ledger["dropped"].values())
        assert ledger["splits"] == {"train": len(self.train), "test": len(self.test)}
        for line in [*ledger["steps"], *ledger["sources"]]:
            assert line["rows_in"] + line["added"] == line["rows_out"] + sum(line["dropped"].values())
        for before, after in zip(ledger["steps"], ledger["steps"][1:], strict=False):
            assert before["rows_out"] == after["rows_in"]
        assert len(self.dropped) == sum(ledger["dropped"].values())
        assert not {group(row) for row in self.train} & {group(row) for row in self.test}
        rows = self.train + self.test
        assert len({row["id"] for row in rows}) == len(rows)
        assert not any(name.startswith("_") for row in rows for name in row)
        assert json.loads(json.dumps(ledger)) == ledger


@pytest.fixture
def make(tmp_path: Path):
    number = iter(range(100))

    def made(sources: list[dict[str, Any]], kind: str = "instructions", base: Path = tmp_path, **content: Any) -> Built:
        options = {name: content.pop(name) for name in ("resources", "inputs") if name in content}
        return Built(base, tmp_path / f"built{next(number)}", {"kind": kind, "sources": sources, **content}, **options)

    return made


def write(path: Path, records: list[dict[str, Any]], form: str = "prompt_completion") -> dict[str, Any]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"type": "files", "name": path.stem, "paths": [path.name], "format": form}


def questions(count: int, name: str = "question", answer: str = "yes") -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {index}", "completion": answer} for index in range(count)]


def test_embedded_recipe(make) -> None:
    dataset = make([{"type": "embedded", "size": 600}], seed=17, near_duplicate_prompts=None)
    assert len(dataset.train) + len(dataset.test) == 600 and 35 < len(dataset.test) < 90
    prompts = make([{"type": "embedded", "size": 600}], "prompts", seed=17, near_duplicate_prompts=None)
    assert [row["id"] for row in prompts.test] == [row["id"] for row in dataset.test]
    assert "completion" not in prompts.train[0] and prompts.train[0]["checks"]


def test_duplicates_and_limit_are_counted(make, tmp_path: Path) -> None:
    records = questions(20)
    records += [records[0], {"prompt": "Question 0?", "completion": "yes"}, {"prompt": "q", "completion": ""}]
    dataset = make([write(tmp_path / "a.jsonl", records)], max_rows=15)
    assert dataset.ledger["dropped"] == {"duplicate": 2, "empty reply": 1, "over max_rows": 5}
    assert "a: 23 rows read, 15 kept" in list(summary_lines(dataset.ledger))
    first = next(row for row in dataset.dropped if row["where"].endswith("a.jsonl:22"))
    assert (first["source"], first["reason"]) == ("a", "duplicate")
    assert json.loads(first["detail"])["instead"]["where"].endswith("a.jsonl:1")
    assert json.loads(first["row"])["prompt"][0]["content"] == "Question 0?"
    (step,) = [line for line in dataset.ledger["steps"] if "duplicate" in line["dropped"]]
    assert [example["where"].rsplit(":", 1)[1] for example in step["examples"]["duplicate"]] == ["21", "22"]


def test_a_test_source_keeps_its_questions_out_of_training(make, tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "completion": "a"} for i in range(10)])
    test = write(tmp_path / "b.jsonl", [{"prompt": "Q3!", "completion": "other"}, {"prompt": "new", "completion": "a"}])
    dataset = make([train | {"part": "train"}, test | {"part": "test"}])
    assert (len(dataset.train), len(dataset.test)) == (9, 2)
    assert dataset.ledger["sources"][0]["dropped"] == {"its question is in the test split": 1}


def test_steps_go_in_order_and_their_counts_hand_over(make, tmp_path: Path) -> None:
    records = [*questions(30), *questions(5), {"prompt": "two\r\nlines", "completion": "yes"}]
    cap = {"type": "cap", "each": 20}
    steps = [{"type": "exact_duplicates"}, {"type": "normalize"}, cap, {"type": "near_duplicates"}]
    dataset = make([write(tmp_path / "a.jsonl", records)], steps=steps)
    lines = {line["step"]: line for line in dataset.ledger["steps"]}
    names = ["read", "exact_duplicates", "normalize", "usable", "cap", "near_duplicates", "identical", "split"]
    assert list(lines) == [f"{number} {name}" for number, name in enumerate(names)]
    assert lines["1 exact_duplicates"]["dropped"] == {"duplicate of an earlier row": 5}
    assert lines["2 normalize"]["changed"] == 1
    assert lines["4 cap"]["rows_out"] == 20


def test_a_mixture_repeats_training_rows_under_ids_of_their_own(make, tmp_path: Path) -> None:
    sources = [write(tmp_path / "a.jsonl", questions(40)), write(tmp_path / "b.jsonl", questions(10, "other"))]
    dataset = make(sources, steps=[{"type": "mix", "epochs": {"b": 3}}])
    once = make(sources)
    assert dataset.test == once.test
    count = sum(row["source"] == "b" for row in once.train)
    assert sum(row["source"] == "b" for row in dataset.train) == 3 * count
    assert dataset.ledger["sources"][1]["added"] == 2 * count
    assert dataset.ledger["steps"][-1]["step"].endswith("mix")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "SHARD_ROWS", 7)


STEPS = [{"type": "normalize"}, {"type": "exact_duplicates"}, {"type": "near_duplicates"}, {"type": "cap", "each": 25}]


def messy(tmp_path: Path) -> list[dict[str, Any]]:
    long = "tell me in a few words what the people of the town on the hill think of the new bridge over the river"
    some = [{"prompt": f"{long} {index % 5}", "completion": "  yes "} for index in range(12)]
    return [
        write(tmp_path / "a.jsonl", [*questions(40), *some, *questions(3)]),
        write(tmp_path / "b.jsonl", questions(18, "other")),
    ]


def test_four_processes_build_what_one_does(make, tmp_path: Path, small_shards) -> None:
    sources = messy(tmp_path)
    built = make(sources, steps=STEPS)
    four = make(sources, steps=STEPS, resources=BuildResources(workers=4))
    assert len(list((tmp_path / "built0-work").rglob("pass-0/*.json"))) > 8
    assert four.ledger == built.ledger
    assert (four.train, four.test, four.dropped) == (built.train, built.test, built.dropped)
    assert len(built.ledger["digests"]["train"]) == 64


def test_another_row_gives_another_digest(make, tmp_path: Path) -> None:
    before = make([write(tmp_path / "a.jsonl", questions(40))]).ledger["digests"]
    assert make([write(tmp_path / "a.jsonl", questions(40))]).ledger["digests"] == before
    assert make([write(tmp_path / "a.jsonl", questions(41))]).ledger["digests"] != before


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("after", [0, 3, 8, 11, 16, 21])
def test_a_killed_build_goes_on(tmp_path: Path, small_shards, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    content = {"kind": "instructions", "sources": messy(tmp_path), "steps": STEPS}
    uninterrupted = Built(tmp_path, tmp_path / "whole", content)
    done = 0
    write_shard = shards.write_shard

    def dies(*arguments: Any) -> None:
        nonlocal done
        if done == after:
            arguments[0].joinpath(f"{arguments[1]:05d}.parquet").write_bytes(b"half")
            raise Killed
        done += 1
        write_shard(*arguments)

    recipe = Recipe.model_validate(content)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", dies)
        (tmp_path / "again").mkdir()
        with pytest.raises(Killed):
            build(recipe, tmp_path, tmp_path / "again-work", tmp_path / "again")
    counted: list[int] = []
    monkeypatch.setattr(shards, "write_shard", lambda *a: (counted.append(a[1]), write_shard(*a)))
    ledger = build(recipe, tmp_path, tmp_path / "again-work", tmp_path / "again")
    assert ledger == uninterrupted.ledger
    assert len(counted) + after == len(list((tmp_path / "whole-work").rglob("pass-*/?????.json")))


def test_bad_records_stop_the_build_or_are_counted(refused: Refused, make, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", questions(20))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{broken\n{"promt": "x", "completion": "y"}\n')
    refused(make, [source])
    dataset = make([source], on_error="drop")
    assert dataset.ledger["dropped"] == {"unreadable": 2}
    examples = dataset.ledger["steps"][0]["examples"]["unreadable"]
    assert [example["where"].rsplit(":", 1)[1] for example in examples] == ["21", "22"]
    assert "Is 'promt' meant as 'prompt'?" in examples[1]["detail"]["error"]


def test_auto_says_what_it_chose(make, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", questions(20), form="auto")
    assert make([source]).ledger["format_choices"]["a"].startswith("prompt_completion: 20 of 20 records")


def sampled(folder: Path, answer: str, count: int = 30) -> Path:
    """A round of sampling as an artifact: its pairs are named by the prompt and the places of the two responses."""
    folder.mkdir()
    sides = {"chosen": [assistant(answer)], "rejected": [assistant("no")]}
    prompts = [
        {"id": f"{index}-0-1", "source": "s", "checks": "", "prompt": [user(f"question {index}")]}
        for index in range(count)
    ]
    write_rows(folder / "train.parquet", [prompt | sides for prompt in prompts])
    put_record(folder, key=digest(folder.name))
    return folder


def test_rounds_of_sampling_are_merged_without_a_loss(make, tmp_path: Path) -> None:
    rounds = [sampled(tmp_path / name, name.split()[0]) for name in ("one", "two", "two again")]
    sources = [{"type": "input", "index": index, "split": "train"} for index in range(3)]
    dataset = make(sources, "preferences", inputs=rounds)
    assert dataset.ledger["dropped"] == {"duplicate": 30}
    answers = [row["chosen"][0]["content"] for row in dataset.train + dataset.test]
    assert (answers.count("one"), answers.count("two")) == (30, 30)
    ids = {row["id"] for row in dataset.train + dataset.test}
    assert len(ids) == 60 and {f"{index}-0-1" for index in range(30)} < ids  # the first keeps its name


def test_an_artifact_and_an_input_are_read_as_rows(make, tmp_path: Path) -> None:
    first = make([write(tmp_path / "a.jsonl", questions(30)) | {"license": "MIT"}])
    (first.folder / "ledger.json").write_text(json.dumps(first.ledger))
    put_record(first.folder, key="ab" * 32)
    again = make([{"type": "input", "index": 0, "split": "train"}], inputs=[first.folder])
    assert again.ledger["rows_in"] == len(first.train)
    assert again.ledger["sources"][0]["license"] == "mit"
    assert {row["id"] for row in again.train + again.test} == {row["id"] for row in first.train}


def test_a_score_stays_in_the_rows(make, tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.jsonl", [{"prompt": f"q {index}", "completion": "x" * (index + 1)} for index in range(30)]
    )
    step = {"type": "score", "by": "function", "function": f"{__name__}:length", "keep": {"quantiles": [0.5, 1]}}
    dataset = make([source], steps=[step])
    assert dataset.ledger["dropped"] == {"score too low": 15}
    assert all(row["score"] == len(row["completion"][0]["content"]) >= 16 for row in dataset.train + dataset.test)


def length(rows: list[Row]) -> list[float]:
    return [len(row["completion"][0]["content"]) for row in rows]


def test_rows_with_tools_and_without_end_in_one_schema(make, tmp_path: Path, small_shards) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    with_tool = {
        "messages": [user("add one"), {"role": "assistant", "content": "", "tool_calls": [call]},
                     {"role": "tool", "content": "2"}, assistant("2")],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }  # fmt: skip
    plain = [{"messages": [user(f"hello {index}"), assistant("hi")]} for index in range(20)]
    dataset = make([write(tmp_path / "a.jsonl", [*plain, with_tool], "messages")])
    (row,) = [row for row in dataset.train + dataset.test if row["tools"]]
    assert json.loads(row["prompt"][1]["tool_calls"])[0]["function"]["name"] == "add"
    assert all("tool_calls" not in turn for row in dataset.train if not row["tools"] for turn in row["prompt"])


def test_files_hold_so_many_rows_at_most(make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [write(tmp_path / "a.jsonl", questions(60))]
    full = make(sources)
    monkeypatch.setattr(build_files, "FILE_ROWS", 10)
    dataset = make(sources)
    files = sorted(path.name for path in dataset.folder.glob("train-*"))
    assert files[0] == f"train-00000-of-{len(files):05d}.parquet" and len(files) == -(-len(full.train) // 10)
    assert dataset.train == full.train and dataset.ledger == full.ledger


def test_an_empty_split_says_where_the_rows_went(refused: Refused, make, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}])
    refused(make, [source])


def test_gsm8k_rows_check_their_own_answers(make, shared_data: Path) -> None:
    dataset = make([{"type": "files", "paths": ["gsm8k/train.jsonl"], "format": "gsm8k"}], base=shared_data)
    assert dataset.ledger["rows_in"] == 7473
    replies = [row["completion"][0]["content"] for row in dataset.train]
    assert gsm8k_answer(dataset.train, replies) == [1.0] * len(dataset.train)
    assert not any("<<" in reply for reply in replies)


def test_fields_that_were_not_used_are_named_with_their_counts(make, tmp_path: Path, small_shards) -> None:
    records = [{**record, "lang": "en", "meta": {"a": 1}} for record in questions(20)]
    records[3] |= {"note": "x"}
    dataset = make([write(tmp_path / "a.jsonl", records), write(tmp_path / "b.jsonl", questions(8, "other"))])
    assert [line["unused_fields"] for line in dataset.ledger["sources"]] == [{"lang": 20, "meta": 20, "note": 1}, {}]
    (line,) = [line for line in summary_lines(dataset.ledger) if "not used" in line]
    assert "lang (20), meta (20), note (1)" in line


@pytest.mark.parametrize(
    ("column", "count"),
    [
        ("contxt", 24),
        ("contxt", 130),
        ("passage", 130),
    ],
)
def test_a_column_that_no_record_has_is_an_error(
    refused: Refused, make, tmp_path: Path, column: str, count: int
) -> None:
    records = [{"prompt": f"q {index}", "context": "c", "completion": "a"} for index in range(count)]
    settings = {"columns": {"input": column}, "options": {"ignore": ["context"]}}
    refused(lambda: make([write(tmp_path / "a.jsonl", records) | settings]))


def test_a_column_may_come_late(make, tmp_path: Path) -> None:
    records = [{"instruction": f"q {number}", "output": "a"} for number in range(200)]
    records.append({"instruction": "late", "output": "yes", "passage": "text"})
    dataset = make([write(tmp_path / "a.jsonl", records) | {"columns": {"input": "passage"}, "format": "alpaca"}])
    assert any(row["prompt"][0]["content"] == "late\n\ntext" for row in dataset.train + dataset.test)


@pytest.mark.parametrize("steps", [[], [{"type": "filter", "chars": {"min": 100}}], [{"type": "near_duplicates"}]])
def test_empty_build_lists_what_each_step_dropped(refused: Refused, make, tmp_path: Path, steps, small_shards) -> None:
    answer = "yes" if steps and steps[0]["type"] == "filter" else " "
    for near in (0.8, None):
        refused(
            make, [write(tmp_path / "a.jsonl", questions(20, answer=answer))], steps=steps, near_duplicate_prompts=near
        )


def test_an_empty_source_is_named(refused: Refused, make, tmp_path: Path) -> None:
    refused(lambda: make([write(tmp_path / "a.jsonl", [])]))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"rows": 1}'])
def test_a_shard_whose_counts_are_damaged_is_made_again(tmp_path: Path, content: bytes) -> None:
    write_sealed(tmp_path / "00000.json", {"rows": 0, "seconds": {}, "digests": {}, **Counts().to_json()})
    assert shards.is_complete(tmp_path, 0)
    (tmp_path / "00000.json").write_bytes(content)
    assert shards.read_summary(tmp_path, 0) is None and not shards.is_complete(tmp_path, 0)
    (tmp_path / "verdict.json").write_bytes(content)
    assert not is_stored(tmp_path)


def test_damaged_files_of_unfinished_build_are_rebuilt(tmp_path: Path, small_shards) -> None:
    content = {"kind": "instructions", "sources": messy(tmp_path), "steps": STEPS}
    full = Built(tmp_path, tmp_path / "whole", content)
    work = tmp_path / "whole-work"
    files = [*work.rglob("pass-*/00001.*"), *work.rglob("pass-*/verdict-*/*")]
    assert {path.suffix for path in files} == {".json", ".parquet", ".npz", ".npy"}
    for number, path in enumerate(sorted(files)):
        good = path.read_bytes()
        path.write_bytes(flip_bit(good))
        output = tmp_path / f"again-{number}"
        output.mkdir()
        assert build(Recipe.model_validate(content), tmp_path, work, output) == full.ledger
        assert path.suffix in (".json", ".npz") or path.read_bytes() == good


@pytest.mark.parametrize(
    ("size", "full", "empty"), [(1.0, "test", "train"), (0, "train", "test"), (1, "test", "train")]
)
def test_a_split_may_be_empty_on_purpose(
    refused: Refused, make, tmp_path: Path, size: float, full: str, empty: str
) -> None:
    made = make([write(tmp_path / "a.jsonl", questions(12))], test_size=size, near_duplicate_prompts=None)
    assert made.ledger["splits"] == {full: 12, empty: 0}
    source = write(tmp_path / "b.jsonl", questions(12)) | {"part": full}
    assert make([source], test_size=size, near_duplicate_prompts=None).ledger["splits"][full] == 12
    refused(make, [source], test_size=0.5)
