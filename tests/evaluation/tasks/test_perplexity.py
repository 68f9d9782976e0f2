"""Bits per byte: by hand, beside a plain loop and lm-eval, and what counts as a document."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given as drawn
from hypothesis import settings as limits
from hypothesis import strategies as st

from align.config.stages.evaluation.tasks import PerplexityConfig
from align.evaluation.scorecard import SystemInfo
from align.evaluation.tasks import build_task, task_identities
from align.evaluation.tasks import perplexity as module
from align.evaluation.tasks.base import TaskInputs
from align.evaluation.tasks.perplexity import Document, PerplexityTask, describe, divide, read_documents
from tests.support.evaluation.tasks.readers import ModelReader, RuleReader
from tests.support.refusals import Refused


def task_inputs(base: Path, messages: list[str] | None = None) -> TaskInputs:
    return TaskInputs(0, base, [], False, "float32", (messages if messages is not None else []).append, print)


def texts(folder: Path, **settings: Any) -> list[str]:
    return [document.text for document in read_documents(PerplexityConfig(**settings), task_inputs(folder))]


def write(path: Path, *records: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def of(*documents: str, max_length: int = 1024) -> PerplexityTask:
    return PerplexityTask("general", [Document("a.txt", text) for text in documents], max_length)


def test_bits_per_byte_by_hand() -> None:
    task = of("abcd", "éé")  # 4 bytes and 4 bytes, each byte a token
    cost = {"abcd": 8 * math.log(2), "éé": 2 * math.log(2)}
    measured = task.read(RuleReader(lambda context, answer: -cost[answer]))
    assert measured.values["bits_per_byte"] == [[pytest.approx(2.0)], [pytest.approx(0.5)]]
    assert measured.values["loss"] == [[pytest.approx(2 * math.log(2))], [pytest.approx(math.log(2) / 2)]]
    assert measured.weights == {"bits_per_byte": [4.0, 4.0], "loss": [4.0, 4.0]}
    assert task.primary == "bits_per_byte" and task.metrics["bits_per_byte"].better == "lower"


def test_bits_are_per_byte_whatever_the_tokens() -> None:
    task = of("abcdef", "éa")  # 6 and 3 bytes
    reader = RuleReader(lambda context, answer: 0.0)
    reader.tokenizer = SimpleNamespace(  # characters in twos
        encode=lambda text, **_: [len(text[index : index + 2]) for index in range(0, len(text), 2)],
        decode=lambda ids: "x" * len(ids),
        bos_token_id=None,
        eos_token_id=9,
        unk_token_id=1,
    )
    reader.rule = lambda context, answer: -3.0 * len(answer)
    measured = task.read(reader)
    assert measured.weights == {"bits_per_byte": [6.0, 3.0], "loss": [3.0, 1.0]}
    assert measured.values["bits_per_byte"] == [[pytest.approx(9 / 6 / math.log(2))], [pytest.approx(1 / math.log(2))]]
    assert measured.values["loss"] == [[3.0], [3.0]]


def test_the_first_token_is_read_behind_bos_and_windows_follow() -> None:
    task = of("abcdefg", max_length=3)
    reader = RuleReader(lambda context, answer: -float(len(answer)))
    measured = task.read(reader)
    assert reader.asked == [("<|im_start|>", "abc"), ("c", "def"), ("def", "g")]
    assert measured.values["loss"] == [[1.0]]
    assert measured.notes == {
        "tokens": 7, "unknown_tokens": 0, "windows": 3, "window": 3, "first_context": "<|im_start|>",
    }  # fmt: skip


def test_a_model_that_reads_less_has_shorter_windows() -> None:
    reader = RuleReader(lambda context, answer: -1.0)
    reader.max_length = 2
    assert of("abcde").read(reader).notes["window"] == 2
    assert [request for _, request in reader.asked] == ["ab", "cd", "e"]


def test_a_tokenizer_s_own_bos_is_no_part_of_the_text() -> None:
    from tokenizers.processors import TemplateProcessing

    reader = RuleReader(lambda context, answer: -1.0)
    bos = "<|im_start|>"
    reader.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, reader.tokenizer.bos_token_id)]
    )
    assert reader.tokenizer.encode("ab")[0] == reader.tokenizer.bos_token_id
    assert of("ab").read(reader).notes["tokens"] == 2
    assert reader.asked == [(bos, "ab")]


def test_a_system_s_prompt_plays_no_part() -> None:
    reader = RuleReader(lambda context, answer: -1.0, SystemInfo("p", "sft", "prompted", "k", "Be brief.", 3))
    of("ab").read(reader)
    assert reader.asked == [("<|im_start|>", "ab")]


def test_a_model_s_text_costs_what_a_plain_loop_says(tiny_model: Path) -> None:
    reader = ModelReader(tiny_model)
    text = "The quick brown fox jumps over the lazy dog."  # 44 bytes, a token each
    measured = of(text, max_length=16).read(reader)
    ids = reader.tokenizer.encode(text)
    windows = [([reader.tokenizer.bos_token_id], ids[:16]), (ids[15:16], ids[16:32]), (ids[27:32], ids[32:44])]
    loss = -sum(reader.by_plain_loop(context, window) for context, window in windows)
    assert measured.values["loss"] == [[pytest.approx(loss / 44, abs=1e-5)]]
    assert measured.values["bits_per_byte"] == [[pytest.approx(loss / 44 / math.log(2), abs=1e-5)]]


def test_a_model_s_text_costs_what_lm_eval_says(tiny_model: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    messages = ["The quick brown fox jumps over the lazy dog. " * 3, "é" * 40, "short"]
    # One window at a time: in a larger batch lm-eval 0.4.13 takes windows that are equal for one request.
    lm = HFLM(pretrained=str(tiny_model), dtype="float32", device="cpu", max_length=32, batch_size=1)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in messages]
    theirs = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    measured = of(*messages, max_length=32).read(ModelReader(tiny_model))
    for text, value, [bits] in zip(messages, theirs, measured.values["bits_per_byte"], strict=True):
        assert bits == pytest.approx(-value / math.log(2) / len(text.encode()), abs=1e-5)


def test_what_was_read_is_kept_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_CHARACTERS", 4)
    reader = RuleReader(lambda context, answer: -float(len(answer)))
    first = of("ab", "cd", "efgh").read(reader)
    assert reader.computed == ["general-0", "general-1"]
    assert of("ab", "cd", "efgh").read(reader) == first
    assert len(reader.computed) == 2
    of("ab", "cd", "other").read(reader)
    assert reader.computed[2:] == ["general-1"]
    of("ab", "cd", "other", max_length=7).read(reader)
    assert reader.computed[3:] == ["general-0", "general-1"], "another window is another result"


def test_texts_and_records_may_stand_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("a book")
    (tmp_path / "c.md").write_text("\ufeffnotes", encoding="utf-8")
    write(tmp_path / "d[1].jsonl", {"text": "one", "id": 1}, {"text": "two"})
    documents = read_documents(PerplexityConfig(files=["*"]), task_inputs(tmp_path))
    assert [(document.source, document.text) for document in documents] == [
        ("b.txt", "a book"), ("c.md", "notes"), ("d[1].jsonl", "one"), ("d[1].jsonl", "two"),
    ]  # fmt: skip
    assert texts(tmp_path, files=["d*.jsonl", "b.txt"]) == ["a book", "one", "two"]


@pytest.mark.parametrize(
    ("record", "settings", "expected"),
    [
        ({"content": "words", "n": 1}, {}, "words"),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, {}, "hi\n\nho"),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, {}, "hi\n\nho"),
        ({"prompt": [{"role": "user", "content": "hi"}], "completion": "ho"}, {}, "hi\n\nho"),
        (
            {"instruction": "do", "response": "done", "text": "no"},
            {"fields": ["instruction", "response"]},
            "do\n\ndone",
        ),
    ],
)
def test_what_a_record_s_text_is(tmp_path: Path, record: Any, settings: Any, expected: str) -> None:
    write(tmp_path / "a.jsonl", record)
    assert texts(tmp_path, files=["a.jsonl"], **settings) == [expected]


def test_empty_documents_are_left_out_and_said(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"text": "one"}, {"text": " \n"}, {"text": ""})
    messages: list[str] = []
    assert len(read_documents(PerplexityConfig(files=["a.jsonl"]), task_inputs(tmp_path, messages))) == 1
    assert messages == ["2 of 3 documents are empty and left out"]


def test_few_documents_are_said_to_be_few(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *[{"text": f"t{number}"} for number in range(10)])
    messages: list[str] = []
    assert len(build_task("general", PerplexityConfig(files=["a.jsonl"]), task_inputs(tmp_path, messages)).items) == 10
    assert messages == []
    build_task("general", PerplexityConfig(files=["a.jsonl"], max_items=9), task_inputs(tmp_path, messages))
    assert messages[0].startswith("general: 9 documents are a small sample")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": " "}\n'),
        ("a.jsonl", b'{"words": "x"}\n'),
        ("a.jsonl", b'{"messages": "x", "text": 3}\n{"prompt": 3}\n'),
        ("a.txt", b"\xff\xfe"),
        ("b.jsonl", b""),
    ],
)
def test_files_that_do_not_serve_are_explained(refused: Refused, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    refused(lambda: read_documents(PerplexityConfig(files=["a.*"]), task_inputs(tmp_path)))


def test_a_named_field_that_is_missing_is_explained(refused: Refused, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"response": "x"})
    refused(texts, tmp_path, files=["a.jsonl"], fields=["respnse"])


def test_long_documents_are_cut_or_divided(tmp_path: Path) -> None:
    lines = [f"line {number:03} of the book\n" for number in range(50)]  # 21 characters each
    (tmp_path / "book.txt").write_text("".join(lines))
    assert texts(tmp_path, files=["book.txt"], max_characters=30) == ["".join(lines)[:30]]
    pieces = texts(tmp_path, files=["book.txt"], chunk=200)
    assert pieces == ["".join(lines[index : index + 9]) for index in range(0, 50, 9)]
    some = texts(tmp_path, files=["book.txt"], chunk=200, max_items=3)
    assert len(some) == 3 and set(some) <= set(pieces)
    assert texts(tmp_path, files=["book.txt"], chunk=200, max_characters=10) == [piece[:10] for piece in pieces]


@limits(deadline=None)
@drawn(st.text(alphabet="ab \n", max_size=300), st.integers(2, 40))
def test_pieces_make_up_the_text(text: str, most: int) -> None:
    pieces = divide(text, most)
    assert "".join(pieces) == text
    assert all(len(piece) <= most for piece in pieces)
    assert all(len(piece) >= most // 2 for piece in pieces[:-1])


def test_files_enter_the_identity_by_content(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for path in (tmp_path / "a.txt", tmp_path / "x" / "a.txt"):
        path.write_text(str(path))
    write(tmp_path / "b.jsonl", {"text": "one"})
    config = PerplexityConfig(files=["**/*.txt", "b.jsonl"])
    before = task_identities(config, tmp_path)
    assert set(before) == {"a.txt", "a.txt (2)", "b.jsonl"}
    (tmp_path / "a.txt").write_text("other")
    after = task_identities(config, tmp_path)
    assert [name for name in before if before[name] != after[name]] == ["a.txt"]
    assert build_task("general", config, task_inputs(tmp_path)).settings()["files"] == after
    assert describe(config, tmp_path) == {"files": after}
    more = {"chunk": 500, "max_characters": 100, "max_items": 9, "fields": ["text"]}
    assert describe(PerplexityConfig(files=["a.txt"], **more), tmp_path) == {"files": {"a.txt": after["a.txt"]}, **more}


def test_equal_documents_have_distinct_ids_and_long_ones_are_cut() -> None:
    items = of("same", "same", "x" * 1000).items
    assert len({item.id for item in items}) == 3
    assert items[2].prompt[0]["content"] == "x" * 500 + " …"


def test_text_without_tokens_and_nan_are_refused(refused: Refused) -> None:
    reader = RuleReader(lambda context, answer: math.nan)
    refused(lambda: of("ab").read(reader))
    reader.tokenizer = SimpleNamespace(encode=lambda text, **_: [], bos_token_id=1, eos_token_id=2)
    refused(lambda: of("ab").read(reader))


def test_dolly_as_held_out_text(shared_data: Path) -> None:
    [file] = sorted((shared_data / "dolly-3k").glob("*.json*"))
    config = PerplexityConfig(files=[str(file)], fields=["instruction", "output"], max_items=50)
    task = build_task("dolly", config, task_inputs(Path()))
    assert len(task.items) == 50
    reader = RuleReader(lambda context, answer: -len(answer.encode()) * math.log(2))  # a bit a byte, if nothing is lost
    measured = task.read(reader)
    assert sum(measured.weights["bits_per_byte"]) == task.settings()["bytes"] == measured.notes["tokens"]
