"""Choosing the pages of a stage's process by a measurement."""

from __future__ import annotations

import mmap
import time
from typing import Any

import pytest

from align.runner import huge_pages


class Memory:
    """Memory whose first write into each page of 2 MiB costs ``seconds``."""

    def __init__(self, seconds: float, clock: list[float]) -> None:
        self.seconds = seconds
        self.clock = clock
        self.pages: set[int] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Memory:
        return self

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def madvise(self, advice: int) -> None:
        assert advice == mmap.MADV_HUGEPAGE

    def __setitem__(self, position: int, value: int) -> None:
        page = position // huge_pages.HUGE_PAGE
        if page not in self.pages:
            self.pages.add(page)
            self.clock[0] += self.seconds


@pytest.mark.parametrize(("seconds", "is_fast", "pages"), [(0.0005, True, 128), (0.05, False, 6)])
def test_huge_pages_are_fast_if_they_cost_little(monkeypatch, seconds: float, is_fast: bool, pages: int) -> None:
    clock = [0.0]
    memory = Memory(seconds, clock)
    monkeypatch.setattr(huge_pages.mmap, "mmap", memory)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert huge_pages.has_fast_huge_pages() is is_fast
    assert len(memory.pages) == pages  # a slow machine is not asked for the rest


def test_huge_pages_are_slow_if_the_kernel_has_none(monkeypatch) -> None:
    def refuse(self: Memory, advice: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(Memory, "madvise", refuse)
    monkeypatch.setattr(huge_pages.mmap, "mmap", Memory(0.0, [0.0]))
    assert not huge_pages.has_fast_huge_pages()
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert not huge_pages.has_fast_huge_pages()
