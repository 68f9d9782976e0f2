"""Requests and their cache: names, what survives a kill, what several processes share."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest

from align.errors import UserError
from align.rollouts.requests import Answer, Request, RequestCache

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
    ]
    assert len({one.key for one in [ONE, *changed]}) == 8
    assert len({one.own_seed for one in [ONE, *changed]}) == 8
    assert all(0 <= one.own_seed < 2**31 for one in changed)
    # the name is part of the format on disk: a change would orphan every cache
    assert ONE.key == "ce78a1e105e3df460978b723a419d354b01f6d8a36c1e284bbc426d68af9f8b0"


def test_answers_are_found_again(tmp_path: Path) -> None:
    first, second, third = _requests(3)
    cache = RequestCache(tmp_path)
    assert cache.get(first.key) is None
    cache.put([(first, Answer("a\n✓", prompt_tokens=3, completion_tokens=2)), (second, Answer("", refused=True))])
    cache.put([(third, Answer("c", finished=False))], copied=True)
    for one in (cache, RequestCache(tmp_path)):
        assert len(one) == 3 and third.key in one
        found = one.get(first.key)
        assert found is not None and found.answer == Answer("a\n✓", prompt_tokens=3, completion_tokens=2)
        assert [found.copied, one.get(third.key).copied] == [False, True]  # type: ignore[union-attr]
        assert [request.sample for request, _ in one.asked()] == [0, 1]


@pytest.mark.parametrize("cut", [1, 2, 40, 10_000])
def test_a_half_written_last_line_is_cut_off_whatever_its_length(tmp_path: Path, cut: int) -> None:
    first, second, third = _requests(3)
    cache = RequestCache(tmp_path)
    cache.put([(first, Answer("kept"))])
    whole = cache.path.read_bytes()
    cache.put([(second, Answer("x" * 200_000)), (third, Answer("lost with it"))])
    full = cache.path.read_bytes()
    cache.path.write_bytes(full[:-cut])
    again = RequestCache(tmp_path)
    assert cache.path.read_bytes() == whole
    assert [one.key in again for one in (first, second, third)] == [True, False, False]
    again.put([(second, Answer("anew"))])
    assert RequestCache(tmp_path).get(second.key).answer.text == "anew"  # type: ignore[union-attr]


def test_a_writer_that_dies_does_not_spoil_the_line_of_another(tmp_path: Path) -> None:
    first, second, _ = _requests(3)
    cache = RequestCache(tmp_path)
    with cache.path.open("ab") as file:  # another process, killed in the middle of its line
        file.write(b'{"answers": [{"key"')
    cache.put([(first, Answer("a"))])
    cache.put([(second, Answer("b"))])
    again = RequestCache(tmp_path)
    assert len(again) == 2 and again.unreadable == 0


def test_lines_that_mean_nothing_are_counted_and_left(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path)
    cache.put([(ONE, Answer("a"))])
    line = json.loads(cache.path.read_text())
    line["answers"][0]["answer"]["surprise"] = 1
    bad = [b"\0\0\0\n", b"[]\n", b'{"answers": [{"key": "zz"}]}\n', json.dumps(line).encode() + b"\n"]
    cache.path.write_bytes(b"".join(bad) + cache.path.read_bytes())
    again = RequestCache(tmp_path)
    assert again.unreadable == 4
    assert again.get(ONE.key).answer.text == "a"  # type: ignore[union-attr]


def _fill(folder: Path, start: int) -> None:
    cache = RequestCache(folder)
    for sample in range(start, start + 50):
        cache.put([(replace(ONE, sample=sample), Answer(f"{sample} " * 300))])


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(tmp_path, start)) for start in (0, 50)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    cache = RequestCache(tmp_path)
    assert (len(cache), cache.unreadable) == (100, 0)
    assert cache.get(replace(ONE, sample=77).key).answer.text == "77 " * 300  # type: ignore[union-attr]


def test_attempts_given_up_are_remembered(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path)
    cache.lose(ONE)
    cache.lose(ONE)
    assert RequestCache(tmp_path).lost == [ONE, ONE]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache of requests .*file.* cannot be opened"):
        RequestCache(tmp_path / "file" / "cache")
