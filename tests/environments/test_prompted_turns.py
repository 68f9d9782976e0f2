"""A stage's own messages before an environment's: rendered, and not in the episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from align.data.rows import user
from align.environments.prompted_turns import PromptedTurns, with_system

SYSTEM = {"role": "system", "content": "S"}


class Recorder:
    """Turns that keep the messages that they were asked to render."""

    eos = 9

    def __init__(self) -> None:
        self.rendered: list[list[dict[str, Any]]] = []

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        self.rendered.append(messages)
        return [1]

    def between(
        self, messages: list[dict[str, Any]], calls: Sequence[Any] = (), prompt: Sequence[dict[str, Any]] = ()
    ) -> list[int]:
        self.rendered.append([*prompt, *messages])
        return [2]


def test_a_system_message_stands_before_those_that_have_none() -> None:
    recorder = Recorder()
    turns = PromptedTurns(recorder, with_system("S"))
    assert (turns.eos, turns.prompt([user("a")]), turns.between([user("b")], (), [user("a")])) == (9, [1], [2])
    assert recorder.rendered == [[SYSTEM, user("a")], [SYSTEM, user("a"), user("b")]]
    own = [{"role": "system", "content": "mine"}, user("a")]
    assert with_system("S")(own) == own and with_system(None)([user("a")]) == [user("a")]
