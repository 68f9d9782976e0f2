"""Requests and their cache: names, what survives a kill, what several processes share."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.errors import UserError
from align.inference.requests import Answer, Request, RequestCache
from align.store.json_files import parse_sealed, seal

ONE = Request({"checkpoint": "abc"}, [{"role": "user", "content": "Hi"}], max_tokens=8, seed=3)


def _requests(count: int) -> list[Request]:
    return [replace(ONE, sample=sample) for sample in range(count)]


def test_a_request_is_named_by_all_that_decides_its_answer() -> None:
    same = Request({"checkpoint": "abc"}, [{"content": "Hi", "role": "user"}], max_tokens=8, seed=3)
    assert same.key == ONE.key and len(ONE.key) == 64
    changed = [
        replace(ONE, model={"checkpoint": "abd"}),
        replace(ONE, messages=[{"role": "user", "content": "Hi "}]),
        replace(ONE, max_tokens=9),
        replace(ONE, temperature=0.9),
        replace(ONE, top_p=0.9),
        replace(ONE, seed=4),
        replace(ONE, sample=1),
        replace(ONE, tools="[]"),
    ]
    assert len({entry.key for entry in [ONE, *changed]}) == 9
    assert len({entry.own_seed for entry in [ONE, *changed]}) == 9
    assert all(0 <= entry.own_seed < 2**31 for entry in changed)
    # the name is part of the format on disk: a change would orphan every cache
    assert ONE.key == "ce78a1e105e3df460978b723a419d354b01f6d8a36c1e284bbc426d68af9f8b0"


def test_answers_are_found_again(tmp_path: Path) -> None:
    first, second, third = _requests(3)
    cache = RequestCache(tmp_path)
    assert cache.get(first.key) is None
    cache.put([(first, Answer("a\n✓", prompt_tokens=3, completion_tokens=2)), (second, Answer("", refused=True))])
    cache.put([(third, Answer("c", finished=False))], copied=True)
    for entry in (cache, RequestCache(tmp_path)):
        assert len(entry) == 3 and third.key in entry
        actual = entry.get(first.key)
        assert actual is not None and actual.answer == Answer("a\n✓", prompt_tokens=3, completion_tokens=2)
        assert [actual.copied, entry.get(third.key).copied] == [False, True]  # type: ignore[union-attr]
        assert [request.sample for request, _ in entry.asked()] == [0, 1]


@pytest.mark.parametrize("cut", [1, 2, 40, 10_000])
def test_half_written_last_line_is_ignored(tmp_path: Path, cut: int) -> None:
    first, second, third = _requests(3)
    cache, path = RequestCache(tmp_path), tmp_path / "answers-1.jsonl"
    cache.put([(first, Answer("kept"))])
    cache.put([(second, Answer("x" * 200_000)), (third, Answer("lost with it"))])
    path.write_bytes(path.read_bytes()[:-cut])
    again = RequestCache(tmp_path)
    assert again.unreadable == 0
    assert [entry.key in again for entry in (first, second, third)] == [True, False, False]
    again.put([(second, Answer("anew"))])
    assert RequestCache(tmp_path).get(second.key).answer.text == "anew"  # type: ignore[union-attr]


def test_failed_write_does_not_damage_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = _requests(3)
    cache = RequestCache(tmp_path)
    cache.put([(first, Answer("a"))])
    real = os.pwrite

    def full(handle: int, data: bytes, offset: int) -> int:  # a disk that takes half of it, and then no more
        if offset > real_end:
            raise OSError(errno.ENOSPC, "no space left on device")
        return real(handle, data[: len(data) // 2], offset)

    real_end = (tmp_path / "answers-1.jsonl").stat().st_size
    with monkeypatch.context() as patched, pytest.raises(OSError, match="no space"):
        patched.setattr(os, "pwrite", full)
        cache.put([(second, Answer("b" * 1000))])
    cache.put([(third, Answer("c"))])
    again = RequestCache(tmp_path)
    assert [entry.key in again for entry in (first, second, third)] == [True, False, True]
    assert again.unreadable == 0 and cache.get(third.key) == again.get(third.key)


def test_the_file_that_earlier_versions_shared_is_read(tmp_path: Path) -> None:
    first, second, _ = _requests(3)
    RequestCache(tmp_path).put([(first, Answer("a"))])
    (tmp_path / "answers-1.jsonl").rename(tmp_path / "answers.jsonl")
    cache = RequestCache(tmp_path)
    cache.put([(second, Answer("b"))])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["answers-1.jsonl", "answers.jsonl"]
    assert [answer.text for _, answer in RequestCache(tmp_path).asked()] == ["a", "b"]


def test_lines_that_mean_nothing_are_counted_and_left(tmp_path: Path) -> None:
    RequestCache(tmp_path).put([(ONE, Answer("a"))])
    path = tmp_path / "answers-1.jsonl"
    line = parse_sealed(path.read_bytes())
    line["answers"][0]["answer"]["surprise"] = 1
    strange = [seal(line), seal({"answers": [{"key": "zz"}]}), {"answers": []}, []]
    bad = [b"\0\0\0", b"[" * 100_000, *(json.dumps(each).encode() for each in strange)]
    path.write_bytes(b"\n".join(bad) + b"\n" + path.read_bytes())
    again = RequestCache(tmp_path)
    assert again.unreadable == len(bad)
    assert again.get(ONE.key).answer.text == "a"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("written", "changed"),
    [('"text": "good"', '"text": "evil"'), (ONE.key, "0" * 64), ('"copied": false', '"copied": true')],
    ids=["text", "key", "origin"],
)
def test_an_answer_that_was_changed_is_asked_again(tmp_path: Path, written: str, changed: str) -> None:
    RequestCache(tmp_path).put([(ONE, Answer("good"))])
    path = tmp_path / "answers-1.jsonl"
    text = path.read_text()
    assert written in text
    path.write_text(text.replace(written, changed))
    again = RequestCache(tmp_path)
    assert (again.unreadable, len(again), again.get(ONE.key)) == (1, 0, None)


def test_no_file_is_written_by_two(tmp_path: Path) -> None:
    caches = [RequestCache(tmp_path) for _ in range(2)]
    for _ in range(2):
        for request, cache in zip(_requests(2), caches, strict=True):
            cache.put([(request, Answer(f"{request.sample}"))])
    for sample, request in enumerate(_requests(2)):
        assert request.key in (tmp_path / f"answers-{sample + 1}.jsonl").read_text()
        assert len((tmp_path / f"answers-{sample + 1}.jsonl").read_text().splitlines()) == 2


def _fill(folder: Path, start: int, together: Any) -> None:
    fcntl.flock = lambda *_: None  # as on a file system that keeps such locks on each machine
    together.wait()
    cache = RequestCache(folder)
    for sample in range(start, start + 200):
        request, answer = replace(ONE, sample=sample), Answer(f"{sample} " * 300)
        cache.put([(request, answer)])
        actual = cache.get(request.key)
        assert actual is not None and actual.answer == answer


def test_processes_on_several_machines_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)
    workers = [context.Process(target=_fill, args=(tmp_path, start, together)) for start in (0, 200, 400)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    cache = RequestCache(tmp_path)
    assert (len(cache), cache.unreadable) == (600, 0)
    assert cache.get(replace(ONE, sample=77).key).answer.text == "77 " * 300  # type: ignore[union-attr]


def test_attempts_given_up_are_remembered(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path)
    cache.record_lost(ONE)
    cache.record_lost(ONE)
    assert RequestCache(tmp_path).lost == [ONE, ONE]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache of requests .*file.* cannot be opened"):
        RequestCache(tmp_path / "file" / "cache")
