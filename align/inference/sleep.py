"""Lends a GPU's memory to the trainer between calls to a vLLM engine on the same GPU: vLLM's own sleep mode.

Asleep, the engine keeps its weights in the machine's memory and no keys and values. It falls asleep when responses are
done, and whatever is asked of it next wakes what that needs: a change of weights only the weights, so that the cache is
not there while the trainer merges adapters. Left out: level 2, which forgets the weights, since the stages ``sample``
and ``evaluate`` go on with the same ones.
"""

from __future__ import annotations

from typing import Any

WEIGHTS, CACHE = "weights", "kv_cache"
"""vLLM's names of what sleeps."""


class Sleep:
    """The sleep of one ``vllm.LLM``; when not ``enabled``, it is always awake."""

    def __init__(self, llm: Any, enabled: bool) -> None:
        self.llm, self.enabled = llm, enabled
        self.asleep: list[str] = []

    def fall(self) -> None:
        """Give the memory back, if all of it is awake. No request may be under way."""
        if self.enabled and not self.asleep:
            self.llm.sleep(level=1)
            self.asleep = [WEIGHTS, CACHE]

    def wake(self, *needed: str) -> None:
        """Wake what is needed and sleeps."""
        for tag in [one for one in self.asleep if one in needed]:
            self.llm.wake_up(tags=[tag])
            self.asleep.remove(tag)
