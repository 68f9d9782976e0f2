"""Helpers for tests of judged tasks: systems that answer by rule, a scoring context, judges that read fences."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.stages.evaluation.tasks import JudgedConfig
from align.data.rows import Message
from align.evaluation.answers import Answers, Example
from align.evaluation.scorecard import SystemInfo
from align.evaluation.tasks import build_task
from align.evaluation.tasks.base import TaskInputs
from align.evaluation.tasks.graded import JudgedTask
from align.inference.protocol import Response, Sampling
from tests.support.inference.fake_chat import FakeChat, completion

Say = Callable[[list[Message], int], str]


@dataclass
class Scripted:
    """A system whose answer follows from the conversation and the sample's number."""

    name: str
    say: Say
    best_of: int = 1
    asked: list[tuple[list[Message], Sampling]] = field(default_factory=list)
    cut_off: bool = False

    @property
    def info(self) -> SystemInfo:
        role: Any = "best_of" if self.best_of > 1 else "checkpoint"
        return SystemInfo(self.name, self.name, role, f"key of {self.name}", best_of=self.best_of)

    def answer(
        self,
        prompts: Sequence[list[Message]],
        sampling: Sampling,
        examples: Sequence[Example] = (),
        *,
        is_continuation: bool = False,
    ) -> list[list[Response]]:
        self.asked += [(prompt, sampling) for prompt in prompts]
        count = sampling.n * (1 if is_continuation else self.best_of)
        texts = [[self.say(prompt, sample) for sample in range(count)] for prompt in prompts]
        return [[Response([1], [0.0], not self.cut_off, text) for text in samples] for samples in texts]


@dataclass
class FolderContext:
    """A scoring context on a folder."""

    folder: Path
    reference: str = "sft"
    base: str | None = None
    shared: Path | None = None
    score: Callable[..., list[float]] | None = None
    seed: int = 5
    warnings: list[str] = field(default_factory=list)
    told: list[tuple[float, float, str]] = field(default_factory=list)
    scored: list[str] = field(default_factory=list)

    def reward_scores(
        self, prompts: Sequence[list[Message]], answers: Sequence[str], finished: Sequence[bool], field: str = "reward"
    ) -> list[float]:
        assert self.score is not None
        self.scored.append(field)
        return self.score(list(prompts), list(answers), list(finished))

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def progress(self, done: float, total: float, unit: str) -> None:
        self.told.append((done, total, unit))


def task_inputs(base: Path, warnings: list[str] | None = None, **changed: Any) -> TaskInputs:
    """Return the inputs of a task."""
    settings: dict[str, Any] = {
        "seed": 5, "base": base, "pairs": [], "has_second_reward": False,
        "precision": "float32", "note": lambda message: None, "warn": ([] if warnings is None else warnings).append,
    }  # fmt: skip
    return TaskInputs(**{**settings, **changed})


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> str:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def endpoint(fake: FakeChat, **settings: Any) -> dict[str, Any]:
    """The endpoint of a stand-in; with ``concurrency`` 1, what it is asked has an order."""
    positions = {"url": fake.url, "model": "good-model", "name": "fake", "retries": 0, "patience": 0, "timeout": 20}
    return {"endpoint": {**positions, **settings}}


def make_task(folder: Path, count: int = 4, records: Sequence[dict[str, Any]] | None = None, **config: Any) -> Any:
    """A task on ``count`` plain prompts, or on ``records``."""
    rows = records or [{"id": f"q{n}", "prompt": f"Question {n}", "source": "plain"} for n in range(count)]
    files = [write_lines(folder / "questions.jsonl", rows)]
    task = build_task("judge-it", JudgedConfig(files=files, **config), task_inputs(folder))
    assert isinstance(task, JudgedTask)
    return task


def answers_of(task: JudgedTask, *systems: Scripted) -> dict[str, Answers]:
    """Return the systems' answers."""
    return {system.name: task.respond(system) for system in systems}


def constant(name: str, *texts: str) -> Scripted:
    """A system that says the nth text to question n, the last one to all that follow."""

    def say(prompt: list[Message], sample: int) -> str:
        number = int(re.findall(r"\d+", prompt[0]["content"])[0])
        return texts[min(number, len(texts) - 1)]

    return Scripted(name, say)


def parts(question: str) -> list[tuple[str, str]]:
    """Titles and texts of what a judge is shown, by the mark that it names."""
    mark = re.findall(r"begin with (<[0-9a-f]{12}>) is", question)[0]
    blocks = question.split(f"\n{mark} ")[1:]
    assert blocks[-1].startswith("end\n")
    actual = [block.partition("\n") for block in blocks[:-1]]
    return [(title, text.strip()) for title, _, text in actual]


def shown(question: str, title: str) -> str:
    """The texts under a title, one after the other."""
    return "\n".join(text for name, text in parts(question) if name == title)


def prefers(better: Callable[[str, str], str]) -> Callable[[dict[str, Any]], Any]:
    """A judge that says A, B or C by the two assistants' texts."""

    def reply(body: dict[str, Any]) -> Any:
        content = body["messages"][-1]["content"]
        mark = better(shown(content, "Assistant A"), shown(content, "Assistant B"))
        return completion(f"It reads better.\n[[{mark}]]")

    return reply


def longer(first: str, second: str) -> str:
    """Prefers more characters."""
    return "C" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
