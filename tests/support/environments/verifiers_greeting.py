"""An environment of verifiers whose code plays the user over several turns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import verifiers.v1 as vf


class GreetingTask(vf.Task[vf.TaskData]):
    @vf.stop
    async def shouted(self, trace: vf.Trace) -> bool:
        return trace.last_reply.isupper()


class GreetingTaskset(vf.Taskset[GreetingTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self) -> Iterator[Any]:
        number = 0
        while True:
            yield GreetingTask(vf.TaskData(name=f"greeting {number}"), self.config.task)
            number += 1


class GreetingConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class GreetingEnv(vf.Env[GreetingConfig]):
    async def run(self, task: Any, agents: Any) -> None:
        polite: float = 0
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn("Greet me.")
            while not segment.terminated:
                if segment.last_reply == "explode":
                    raise ValueError("the user is gone")
                if "=" in segment.last_reply:
                    name, _, value = segment.last_reply.partition("=")
                    interaction.trace.record_metric(name, float(value))
                if segment.last_reply in ("nan", "inf"):
                    polite = float(segment.last_reply)
                polite += segment.last_reply == "Hello"
                if polite == 2:
                    break
                segment = await interaction.turn("Again." if polite else "Politely!")
        interaction.trace.record_reward("politeness", polite, 0.5)


__all__ = ["GreetingEnv", "GreetingTaskset"]
