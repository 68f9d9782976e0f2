"""Perplexity of a pipeline's own held-out texts, and of a base model that reads some of the domain's texts first."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.config.stages.evaluate import EvaluateConfig
from align.config.stages.evaluation.tasks import PerplexityConfig
from align.config.validation import validate
from align.data.rows import write_rows
from align.evaluation.scorecard import SystemInfo
from align.evaluation.tasks import build_task
from align.evaluation.tasks.base import TaskInputs
from align.models.loading import load_policy, load_tokenizer
from align.store.artifacts import Artifact, Kind
from tests.support.evaluation.tasks.readers import ModelReader
from tests.support.refusals import Refused

TRAIN = [f"The {word} is on the table. It is {word}." for word in ("lamp", "book", "cup", "pen")]
TEST = ["The plate is on the table. It is plate.", "The fork is on the table.", *(f"Number {n}." for n in range(9))]


def task_inputs(folder: Path) -> TaskInputs:
    folder.mkdir(exist_ok=True)
    for split, texts in (("train", TRAIN), ("test", TEST)):
        rows = [{"id": str(n), "source": "t", "text": text} for n, text in enumerate(texts)]
        write_rows(folder / f"{split}.parquet", rows)
    texts = {"books": Artifact("books", Kind.TEXTS, folder, {})}
    return TaskInputs(0, folder, [], False, "float32", print, print, texts)


def cost(model_dir: Path, before: str, text: str) -> float:
    """Nats of ``text`` behind ``before``, token by token in a plain forward pass."""
    model, tokenizer = load_policy(model_dir), load_tokenizer(model_dir)
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    head = [prefix, *tokenizer.encode(before, add_special_tokens=False)]
    ids = [*head, *tokenizer.encode(text, add_special_tokens=False)]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    return -sum(float(logprobs[index - 1, ids[index]]) for index in range(len(head), len(ids)))


def test_held_out_texts_of_a_stage_are_read(tiny_model: Path, tmp_path: Path) -> None:
    task = build_task("domain", PerplexityConfig(texts="books"), task_inputs(tmp_path / "data"))
    assert [document.text for document in task.documents] == TEST
    measured = task.read(ModelReader(tiny_model))
    for (value,), text in zip(measured.values["bits_per_byte"], TEST, strict=True):
        assert value == pytest.approx(cost(tiny_model, "", text) / math.log(2) / len(text), rel=1e-4)
    assert task.settings()["texts"] == "books"


@pytest.mark.parametrize(("shots", "system"), [(2, ""), (0, "Tables hold things."), (1, "Tables hold things.")])
def test_a_prompted_system_reads_texts_first(shots: int, system: str, tiny_model: Path, tmp_path: Path) -> None:
    task = build_task("domain", PerplexityConfig(texts="books", max_length=400), task_inputs(tmp_path / "data"))
    reader: Any = ModelReader(tiny_model)
    reader.info = SystemInfo("shown", "model", "prompted", "k", system=system, shots=shots)
    assert task.prefix_texts is not None and set(task.prefix_texts) == set(TRAIN)
    before = "".join(f"{part}\n\n" for part in [*([system] if system else []), *task.prefix_texts[:shots]])
    measured = task.read(reader)
    for (value,), text in zip(measured.values["loss"], TEST, strict=True):
        assert value == pytest.approx(cost(tiny_model, before, text) / len(text), rel=1e-4)
    assert measured.notes["tokens_shown_before"] == len(before)
    assert measured.notes["tokens"] == sum(map(len, TEST))


def test_later_windows_keep_what_was_shown(tiny_model: Path, tmp_path: Path) -> None:
    task = build_task("domain", PerplexityConfig(texts="books", max_length=60), task_inputs(tmp_path / "data"))
    reader: Any = ModelReader(tiny_model)
    reader.info = SystemInfo("shown", "model", "prompted", "k", system="Tables hold", shots=0)
    calls: list[tuple[list[int], list[int]]] = []
    full = reader.logprobs
    reader.logprobs = lambda contexts, windows: (
        calls.extend(zip(contexts, windows, strict=True)) or full(contexts, windows)
    )
    task.read(reader)
    assert all(reader.tokenizer.decode(context[1:]).startswith("Tables hold\n\n") for context, _ in calls)
    assert max(len(context) + len(windows) for context, windows in calls) <= 61
    assert len(calls) > len(TEST) or max(map(len, TEST)) <= 47


def test_a_prompted_system_never_reads_more_than_a_window(tiny_model: Path, tmp_path: Path) -> None:
    task = build_task("domain", PerplexityConfig(texts="books", max_length=30), task_inputs(tmp_path / "data"))
    reader: Any = ModelReader(tiny_model)
    reader.info = SystemInfo("shown", "model", "prompted", "k", system="Tables hold", shots=0)
    reads: list[tuple[int, str]] = []
    full = reader.logprobs

    def record(contexts: list[list[int]], windows: list[list[int]]) -> list[list[float]]:
        # The last target is never an input.
        for context, targets in zip(contexts, windows, strict=True):
            reads.append((len(context) + len(targets) - 1, reader.tokenizer.decode(targets)))
        return full(contexts, windows)

    reader.logprobs = record
    measured = task.read(reader)
    # 13 tokens of the system's and one of context leave 16 targets: the first document of 40 takes three windows.
    assert [text for _, text in reads[:3]] == [TEST[0][:16], TEST[0][16:32], TEST[0][32:]]
    assert [size for size, _ in reads[:3]] == [29, 30, 30]  # the first one's context is what is shown
    assert max(size for size, _ in reads) == 30
    assert measured.notes["tokens"] == sum(map(len, TEST))


@pytest.mark.parametrize("max_length", range(2, 30))
def test_every_window_has_room_for_a_target_or_is_refused(
    refused: Refused, max_length: int, tiny_model: Path, tmp_path: Path
) -> None:
    config = PerplexityConfig(texts="books", max_length=max_length)
    task = build_task("domain", config, task_inputs(tmp_path / "data"))
    reader: Any = ModelReader(tiny_model)
    reader.info = SystemInfo("shown", "model", "prompted", "k", system="x", shots=0)  # three tokens
    reader.logprobs = lambda contexts, windows: [[0.0] * len(targets) for targets in windows]
    if max_length > 6:
        assert task.read(reader).notes["tokens"] == sum(map(len, TEST))
        return
    refused(task.read, reader)


def test_there_must_be_enough_to_show_and_room_for_it(refused: Refused, tiny_model: Path, tmp_path: Path) -> None:
    task = build_task("domain", PerplexityConfig(texts="books", max_length=60), task_inputs(tmp_path / "data"))
    refused(lambda: task.check(SystemInfo("shown", "model", "prompted", "k", shots=5)))
    tokenizer, info = load_tokenizer(tiny_model), SystemInfo("shown", "model", "prompted", "k", shots=4)
    refused(task.check_reading, info, tokenizer, 2048)
    refused(lambda: task.check_reading(replace(info, shots=1), tokenizer, 20))
    task.check_reading(replace(info, shots=0), tokenizer, 20)


@pytest.mark.parametrize(
    "task",
    [
        {"texts": "book"},
        {"text": "books"},
        {"texts": "books", "files": ["a.txt"]},
        {},
    ],
)
def test_mistakes_are_named(refused: Refused, task: dict[str, Any]) -> None:
    block = {"policies": ["model"], "reference": "model", "texts": ["books"]}
    block["tasks"] = {"domain": {"task": "perplexity", **task}}
    refused(validate, EvaluateConfig, block, "p.yaml: stages.evaluate")
