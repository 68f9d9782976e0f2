"""Environments of verifiers, of its own classes: sums with a tool, and a user who wants to be greeted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import verifiers.v1 as vf


class SumConfig(vf.TasksetConfig):
    count: int = 5


class SumData(vf.TaskData):
    answer: int


class SumState(vf.State):
    calls: int = 0


class AdderConfig(vf.ToolsetConfig):
    pass


class Adder(vf.Toolset[AdderConfig, SumState]):
    TOOL_PREFIX = None

    async def setup_task(self, task: Any) -> None:
        self.task = task

    @vf.tool
    async def add(self, first: int, second: int) -> int:
        """Add two numbers."""
        self.state.calls += 1
        if first < 0:
            raise ValueError("no negative numbers")
        return first + second


class SumTask(vf.Task[SumData, SumState, vf.TaskConfig]):
    @classmethod
    def toolsets(cls, config: Any) -> list[Any]:
        return [Adder(AdderConfig())]

    @vf.reward(weight=2.0)
    async def right(self, task: Any, trace: Any) -> float:
        return float(trace.last_reply == str(task.answer))

    @vf.metric
    async def calls(self, trace: Any) -> float:
        return float(trace.state.calls)

    @vf.metric
    async def tool_messages(self, trace: Any) -> float:
        return float(len(trace.tool_messages))


class SumTaskset(vf.Taskset[SumTask, SumConfig]):
    def load(self) -> Iterator[Any]:
        for number in range(self.config.count):
            data = SumData(prompt=f"What is {number} + 1?", system_prompt="Be right.", answer=number + 1)
            yield SumTask(data, self.config.task)


__all__ = ["SumTaskset"]
