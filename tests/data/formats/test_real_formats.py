"""Conversions of real files, with counts that their publishers and an independent look at them say."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.config.recipe.source_settings import FilesSource
from align.config.recipe.step_settings import PairsStep
from align.data.formats import convert
from align.data.rows import BadRecord, Dropped, Row
from align.data.sources import choose_format, read
from align.data.steps.step import StepContext, start_step
from tests.support.refusals import Refused


def converted(folder: Path, path: str, kind: str, **settings: Any) -> tuple[str, list[Row], Counter[str]]:
    """The format chosen, the rows, and what was dropped."""
    source = FilesSource(type="files", paths=[path], **settings)
    choice = choose_format(source, read(source, folder), kind)
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    for item in choice.records:
        assert not isinstance(item, BadRecord)
        for actual in convert(item[1], choice.format, item[0], kind):
            if isinstance(actual, Dropped):
                dropped[actual.reason] += 1
            else:
                rows.append(actual)
    return choice.format.form, rows, dropped


def test_dolly(shared_data: Path) -> None:
    form, rows, dropped = converted(shared_data, "dolly-3k/dolly_3k.json", "instructions")
    assert (form, len(rows), dropped) == ("alpaca", 2996, {})
    document = json.loads((shared_data / "dolly-3k" / "dolly_3k.json").read_text())
    folded = sum(bool(record["input"].strip()) for record in document)
    assert 0 < folded == sum("\n\n" + r["input"] in row["prompt"][0]["content"] and r["input"].strip() != ""
                             for r, row in zip(document, rows, strict=True))  # fmt: skip


def transcripts(folder: Path) -> Iterator[dict[str, str]]:
    for path in sorted((folder / "hh-rlhf").glob("*.jsonl.gz")):
        with gzip.open(path, "rt") as file:
            yield from map(json.loads, file)


def test_hh_rlhf(shared_data: Path) -> None:
    form, rows, dropped = converted(shared_data, "hh-rlhf/*.jsonl.gz", "preferences")
    assert (form, len(rows)) == ("hh_rlhf", 4632)
    records = list(transcripts(shared_data))
    assert len(records) == 2354 + 2312 == len(rows) + dropped.total()
    assert dropped["chosen equals rejected"] == sum(r["chosen"] == r["rejected"] for r in records) == 2
    # An independent cut: the text up to the last turn.
    ends = [tuple(r[side].rpartition("\n\nAssistant:")[0] for side in ("chosen", "rejected")) for r in records]
    assert dropped["prompts differ"] == sum(first != second for first, second in ends) == 14
    assert all(row[side][0]["content"] for row in rows for side in ("chosen", "rejected"))
    # No reply's opening ends up in the prompt, though hundreds of pairs begin alike.
    alike = sum(row["chosen"][0]["content"][:2] == row["rejected"][0]["content"][:2] for row in rows)
    assert alike > 400 and all(row["prompt"][-1]["role"] == "user" for row in rows)
    for record, row in zip(records[:20], rows[:20], strict=True):
        assert record["chosen"].endswith(row["chosen"][0]["content"])


def test_hh_rlhf_as_instructions_keeps_pairs_with_equal_sides(shared_data: Path) -> None:
    rows, dropped = converted(shared_data, "hh-rlhf/*.jsonl.gz", "instructions")[1:]
    records = list(transcripts(shared_data))
    equal = [record for record in records if record["chosen"] == record["rejected"]]
    answers = {(row["prompt"][-1]["content"], row["completion"][0]["content"]) for row in rows}
    last = [[part.strip() for part in record["chosen"].rpartition("\n\nAssistant:")[::2]] for record in equal]
    assert equal and all((before.rpartition("\n\nHuman: ")[2], answer) in answers for before, answer in last)
    assert not dropped.keys() & {"chosen equals rejected", "prompts differ"}


def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for reply in node["replies"]:
        yield from nodes(reply)


def test_oasst_trees_make_754_pairs(shared_data: Path) -> None:
    path = "oasst-en100/en_100_tree.jsonl"
    form, rows, dropped = converted(shared_data, path, "preferences", options={"synthetic": True})
    assert (form, len(rows), dropped) == ("oasst", 212, {})
    step = start_step(PairsStep(type="pairs", how="all"), StepContext("preferences", 0, Path(), Path()))
    new_rows = [actual for actual in step.apply(rows) if isinstance(actual, list)]
    assert len(new_rows) == 212 and sum(map(len, new_rows)) == 754
    assert all(pair["chosen"][0]["role"] == pair["rejected"][0]["role"] == "assistant" for m in new_rows for pair in m)
    assert len({pair["id"] for pairs in new_rows for pair in pairs}) == 754


def test_oasst_leaves_out_what_models_wrote(shared_data: Path) -> None:
    path = "oasst-en100/en_100_tree.jsonl"
    trees = [json.loads(line) for line in (shared_data / path).read_text().splitlines()]
    synthetic = {node["text"] for tree in trees for node in nodes(tree["prompt"]) if node["synthetic"]}
    rows, dropped = converted(shared_data, path, "preferences")[1:]
    assert (len(rows), dropped.total()) == (207, 5)
    messages = {response["content"] for row in rows for response in row["responses"]}
    messages |= {message["content"] for row in rows for message in row["prompt"]}
    assert synthetic and not messages & synthetic
    rows, dropped = converted(shared_data, path, "instructions", options={"synthetic": True})[1:]
    assert (len(rows), dropped) == (100, {})
    assert converted(shared_data, path, "instructions", options={"languages": ["de"]})[2].total() == 100


def test_llamafactory_demos(shared_data: Path) -> None:
    folder = shared_data / "llamafactory-demo"
    form, rows, dropped = converted(folder, "dpo_en_demo.json", "preferences")
    assert (form, len(rows), dropped) == ("preferences", 300, {})
    document = json.loads((folder / "dpo_en_demo.json").read_text())
    for record, row in zip(document, rows, strict=True):
        assert row["chosen"][0]["content"] == record["chosen"]["value"]
        assert len(row["prompt"]) == len(record["conversations"])
    form, rows, dropped = converted(folder, "kto_en_demo.json", "unpaired")
    assert (form, len(rows), dropped) == ("unpaired", 300, {})
    assert Counter(row["label"] for row in rows) == {True: 150, False: 150}
    assert len(converted(folder, "kto_en_demo.json", "instructions", format="unpaired")[1]) == 150
    form, rows, _ = converted(folder, "alpaca_en_demo.json", "instructions")
    assert (form, len(rows)) == ("alpaca", 999)
    document = json.loads((folder / "alpaca_en_demo.json").read_text())
    folded = [row["prompt"][0]["content"] != r["instruction"] for r, row in zip(document, rows, strict=True)]
    assert sum(folded) == sum(bool(record["input"].strip()) for record in document) == 412
    _, rows, _ = converted(folder, "identity.json", "instructions")
    assert len(rows) == 91 and any("{{name}}" in row["completion"][0]["content"] for row in rows)


def test_stack_exchange_pairs(shared_data: Path) -> None:
    path = "stackexchange-paired-tiny/stack_exchange_paired_tiny.json"
    form, rows, dropped = converted(shared_data, path, "preferences")
    document = json.loads((shared_data / path).read_text())
    assert (form, len(rows), dropped) == ("preferences", 25, {})
    assert [row["chosen"][0]["content"] for row in rows] == [record["response_j"] for record in document]


def test_llms_from_scratch(refused: Refused, shared_data: Path) -> None:
    folder = shared_data / "llms-from-scratch"
    form, rows, _ = converted(folder, "instruction-data.json", "instructions")
    assert (form, len(rows)) == ("alpaca", 1100)
    path = "instruction-data-with-preference.json"
    form, rows, dropped = converted(folder, path, "preferences")
    document = json.loads((folder / path).read_text())
    same = sum(record["chosen"].strip() == record["rejected"].strip() for record in document)
    assert (form, len(rows), dict(dropped)) == ("preferences", 1094, {"chosen equals rejected": same})
    refused(converted, folder, path, "instructions")


def test_self_instruct_and_prompts(shared_data: Path) -> None:
    form, rows, _ = converted(shared_data, "self-instruct/seed_tasks.jsonl", "instructions")
    assert (form, len(rows)) == ("self_instruct", 175)
    form, rows, _ = converted(shared_data, "xstest/xstest_prompts.csv", "prompts")
    with (shared_data / "xstest" / "xstest_prompts.csv").open(newline="") as file:
        requests = [record["prompt"] for record in csv.DictReader(file)]
    assert form == "prompt" and [row["prompt"][0]["content"] for row in rows] == requests and len(rows) == 450
    assert len(converted(shared_data, "ifeval/input_data.jsonl", "prompts")[1]) == 541
