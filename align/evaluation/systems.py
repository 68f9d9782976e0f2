"""What is compared: checkpoints as they are, and ways to use one without training it (prompting, best of N, again).

The first question about fine-tuning is whether a prompt would have done as well, and the honest rival of PPO is the
best of N answers of the model it started from, by the same reward model. The same checkpoint sampled again shows how
far numbers move by chance alone. Torch-free. Left out: sampling (``generation.py``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from align.config.base import Config
from align.config.user_paths import user_path
from align.data.rows import Message, assistant, user
from align.errors import UserError
from align.evaluation.prompts import Policy
from align.evaluation.tasks.base import Example, SystemInfo
from align.inference.protocol import Sampling
from align.models.render import render_prompt
from align.store.fingerprint import digest, file_digest


class BaselineConfig(Config):
    """A checkpoint used in another way: prompted, the best of several answers, or only sampled again."""

    of: str
    """Which of ``policies`` answers."""
    system: str = ""
    """A system message before every conversation; before the conversation's own where it has one."""
    shots: int = Field(0, ge=0, le=64)
    """Solved examples shown as earlier turns."""
    examples: str | None = None
    """JSON lines with ``question`` and ``answer`` (or ``prompt`` and ``completion``) for ``shots``, used in their
    order; by default each task's own, and where it has none answers of the train split of ``prompts``."""
    best_of: int = Field(1, ge=1, le=1024)
    """Answers drawn for each one kept: the one that ``reward`` scores highest."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of ``best_of`` where a task itself decodes greedily, which would give N equal answers."""

    sample_seed: int | None = Field(None, ge=0, lt=2**31)
    """Sample once more, with this seed: a comparison of a checkpoint with itself (A/A), the noise floor of the table.
    Greedy answers do not change."""

    identified: ClassVar[frozenset[str]] = frozenset({"examples"})

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        prompted = bool(self.system or self.shots)
        ways = prompted + (self.best_of > 1) + (self.sample_seed is not None)
        if ways == 0:
            raise ValueError(f"is '{self.of}' as it is; say system, shots, best_of or sample_seed")
        if ways > 1:
            raise ValueError("mixes prompting, best_of and sample_seed; compare them as baselines of their own")
        if self.examples is not None and not self.shots:
            raise ValueError("examples are read for shots, and shots is 0")
        return self

    def identities(self, base: Path) -> dict[str, str]:
        """The digest of the examples' file."""
        if self.examples is None:
            return {}
        return {"examples": file_digest(self._path(base))}

    def read_examples(self, base: Path) -> list[Example]:
        """The file's examples; raises ``UserError`` for fewer than ``shots`` and for records without both fields."""
        if self.examples is None:
            return []
        path = self._path(base)
        found = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                question = _text(record, "question", "prompt")
                found.append(Example(question, _text(record, "answer", "completion")))
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"{path}:{number}: expected a JSON object with the texts question and answer (or prompt and "
                    "completion)."
                ) from None
        if len(found) < self.shots:
            raise UserError(f"{path} has {len(found)} examples, shots is {self.shots}; lower shots or add examples.")
        return found

    def _path(self, base: Path) -> Path:
        path = user_path(str(self.examples), base)
        if not path.is_file():
            raise UserError(f"examples: there is no file '{path}'; relative paths start at the current folder.")
        return path


@dataclass(frozen=True)
class System:
    """One compared system."""

    info: SystemInfo
    policy: Policy
    """The checkpoint that answers; its ``name`` is the stage's."""
    own_examples: tuple[Example, ...] = ()
    temperature: float = 1.0
    sample_seed: int | None = None
    fallback: tuple[Example, ...] = ()
    """Shown where a task has too few examples of its own."""

    @property
    def name(self) -> str:
        """As the scorecard calls it."""
        return self.info.name

    @cached_property
    def plain(self) -> bool:
        """Whether conversations reach the checkpoint as they are."""
        return not self.info.system and not self.info.shots

    def conversation(self, messages: Sequence[Message], examples: Sequence[Example] = ()) -> list[Message]:
        """``messages`` behind this system's own prompt. Raises ``UserError`` where there are too few examples."""
        if self.plain:
            return list(messages)
        count = self.info.shots
        given = self.own_examples or (examples if len(examples) >= count else self.fallback)
        shown = list(given)[:count]
        if len(shown) < count:
            most = max(len(given), len(examples))
            raise UserError(
                f"baselines.{self.name}: shots is {count}, but there are {most} examples to show; name "
                "a file of them as `examples`, or give the task an examples_files (prompts: a stage of instructions)."
            )
        head, rest = "", list(messages)
        if self.info.system:
            head = self.info.system
            if rest and rest[0]["role"] == "system":
                head = f"{head}\n\n{rest.pop(0)['content']}"
        opening: list[Message] = [{"role": "system", "content": head}] if head else []
        if not head and rest and rest[0]["role"] == "system":
            opening = [rest.pop(0)]
        turns = [turn for one in shown for turn in (user(one.question), assistant(one.answer))]
        return [*opening, *turns, *rest]

    def render(
        self, messages: Sequence[Message], examples: Sequence[Example] = (), tools: str | None = None
    ) -> list[int]:
        """Token ids of the prompted conversation, up to where the answer begins."""
        return render_prompt(self.policy.tokenizer, self.conversation(messages, examples), tools)

    def sampling(self, asked: Sampling) -> Sampling:
        """What the engine is asked for: N times the samples for a best-of-N system, and never greedily."""
        if self.sample_seed is not None:
            own = int(digest([asked.seed, self.sample_seed])[:15], 16)
            seeds = None if asked.seeds is None else tuple(int(digest([own, s])[:15], 16) for s in asked.seeds)
            return replace(asked, seed=own, seeds=seeds)
        if self.info.best_of == 1:
            return asked
        temperature = asked.temperature or self.temperature
        return replace(asked, temperature=temperature, n=asked.n * self.info.best_of)


def make_systems(
    policies: Sequence[Policy],
    base: str | None,
    baselines: dict[str, BaselineConfig],
    folder: Path,
    fallback: Sequence[Example] = (),
) -> list[System]:
    """Checkpoints in their order, then the ways to use them; ``fallback`` are examples where a task has too few."""
    by_name = {policy.name: policy for policy in policies}
    found = []
    for policy in policies:
        role: Any = "base" if policy.name == base else "checkpoint"
        found.append(System(SystemInfo(policy.name, policy.name, role, policy.key), policy))
    for name, config in baselines.items():
        policy = by_name[config.of]
        examples = tuple(config.read_examples(folder))
        used = [[one.question, one.answer] for one in examples[: config.shots]]
        others = [] if examples else [[one.question, one.answer] for one in fallback[: config.shots]]
        key = digest(
            [policy.key, config.system, config.shots, used, others, config.best_of, config.temperature,
             config.sample_seed]
        )  # fmt: skip
        way: Any = "best_of" if config.best_of > 1 else "prompted" if config.system or config.shots else "again"
        info = SystemInfo(name, config.of, way, key, config.system, config.shots, config.best_of)
        found.append(System(info, policy, examples, config.temperature, config.sample_seed, tuple(fallback)))
    return found


def best_of_kl(n: int) -> float:
    """Upper bound on the KL of best-of-N from what it draws from, in nats: log N - (N - 1)/N (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def _text(record: dict[str, Any], *names: str) -> str:
    for name in names:
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value
    raise KeyError(names[0])
