"""Compared systems: checkpoints as they are, and ways to use one without training it (prompted, best of N, again).

A fine-tuned model should beat a prompted one, and PPO should beat the best of N answers of the model it started from,
chosen by the same reward model. The same checkpoint sampled again shows how far numbers move by chance alone.
Torch-free.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from align.config.stages.evaluate import BaselineConfig
from align.config.user_paths import user_path
from align.data.rows import Message, assistant, user
from align.errors import UserError
from align.evaluation.tasks.base import Example, SystemInfo
from align.inference.protocol import Sampling
from align.models.render import render_prompt
from align.store.fingerprint import digest, file_digest
from align.store.json_files import numbered_lines


@dataclass(frozen=True)
class Policy:
    """One compared checkpoint: its stage's name, its folder, the digest of its files, and its tokenizer."""

    name: str
    model_dir: Path
    key: str
    tokenizer: Any


@dataclass(frozen=True)
class System:
    """One compared system."""

    info: SystemInfo
    policy: Policy
    """The checkpoint that answers; its ``name`` is the stage's."""
    own_examples: tuple[Example, ...] = ()
    """Examples of the baseline's file, which precede a task's."""
    temperature: float = 1.0
    sample_seed: int | None = None
    fallback: tuple[Example, ...] = ()
    """Examples for tasks that have too few."""

    @property
    def name(self) -> str:
        """Name in the scorecard."""
        return self.info.name

    @cached_property
    def is_plain(self) -> bool:
        """True where conversations reach the checkpoint as they are."""
        return not self.info.system and not self.info.shots

    def conversation(self, messages: Sequence[Message], examples: Sequence[Example] = ()) -> list[Message]:
        """Return ``messages`` behind this system's own prompt. Raises ``UserError`` where there are too few examples.

        ``examples`` are the task's.
        """
        if self.is_plain:
            return list(messages)
        count = self.info.shots
        # In this order: the baseline's own file, the task's examples, and those of the prompt set.
        available = self.own_examples or (examples if len(examples) >= count else self.fallback)
        shots = list(available)[:count]
        if len(shots) < count:
            most = max(len(available), len(examples))
            raise UserError(
                f"baselines.{self.name}: shots is {count}, but there are {most} examples to show; name "
                "a file of them as `examples`, or give the task an examples_files (prompts: a stage of instructions)."
            )
        rest = list(messages)
        system = self.info.system
        # One system message: the baseline's text first, then the conversation's.
        opening: list[Message] = []
        if rest and rest[0]["role"] == "system":
            first = rest.pop(0)
            opening = [{"role": "system", "content": f"{system}\n\n{first['content']}"} if system else first]
        elif system:
            opening = [{"role": "system", "content": system}]
        turns = [turn for example in shots for turn in (user(example.question), assistant(example.answer))]
        return [*opening, *turns, *rest]

    def render(
        self, messages: Sequence[Message], examples: Sequence[Example] = (), tools: str | None = None
    ) -> list[int]:
        """Return the token ids of the prompted conversation, up to the answer's start."""
        return render_prompt(self.policy.tokenizer, self.conversation(messages, examples), tools)

    def sampling(self, sampling: Sampling) -> Sampling:
        """Return the sampling for the engine: N times the samples, never greedy, for best of N; else as it is.

        A system that is sampled again gets seeds of its own.
        """
        if self.sample_seed is not None:
            # Derived from both seeds, so that two baselines with different seeds differ in every task.
            seed = int(digest([sampling.seed, self.sample_seed])[:15], 16)
            seeds = None
            if sampling.seeds is not None:
                seeds = tuple(int(digest([seed, prompt_seed])[:15], 16) for prompt_seed in sampling.seeds)
            return replace(sampling, seed=seed, seeds=seeds)
        if self.info.best_of == 1:
            return sampling
        # Greedy decoding would give the same answer N times.
        temperature = sampling.temperature or self.temperature
        return replace(sampling, temperature=temperature, n=sampling.n * self.info.best_of)


def make_systems(
    policies: Sequence[Policy],
    base: str | None,
    baselines: dict[str, BaselineConfig],
    folder: Path,
    fallback: Sequence[Example] = (),
) -> list[System]:
    """Return the checkpoints in their order, then the baselines; ``fallback`` are examples for tasks with too few."""
    by_name = {policy.name: policy for policy in policies}
    systems = []
    for policy in policies:
        role: Literal["base", "checkpoint"] = "base" if policy.name == base else "checkpoint"
        systems.append(System(SystemInfo(policy.name, policy.name, role, policy.key), policy))
    for name, config in baselines.items():
        policy = by_name[config.of]
        examples = tuple(read_examples(config, folder))
        used = [[example.question, example.answer] for example in examples[: config.shots]]
        used_fallback = []
        if not examples:
            used_fallback = [[example.question, example.answer] for example in fallback[: config.shots]]
        key = digest(
            [
                policy.key,
                # The key covers only the examples that are shown, so that lines added to a file change no result.
                config.system,
                config.shots,
                used,
                used_fallback,
                config.best_of,
                config.temperature,
                config.sample_seed,
            ]
        )
        info = SystemInfo(name, config.of, _role(config), key, config.system, config.shots, config.best_of)
        systems.append(System(info, policy, examples, config.temperature, config.sample_seed, tuple(fallback)))
    return systems


def _role(config: BaselineConfig) -> Literal["prompted", "best_of", "again"]:
    if config.best_of > 1:
        return "best_of"
    return "prompted" if config.system or config.shots else "again"


def best_of_kl(n: int) -> float:
    """Upper bound on the KL of best-of-N from its sampling policy, in nats: log N - (N - 1)/N (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def example_identities(config: BaselineConfig, base: Path) -> dict[str, str]:
    """Return the digest of a baseline's examples file; empty without one."""
    if config.examples is None:
        return {}
    return {"examples": file_digest(_examples_path(config, base))}


def read_examples(config: BaselineConfig, base: Path) -> list[Example]:
    """Read a baseline's examples file; empty without one.

    Raises ``UserError`` for fewer examples than ``shots`` and for records without both fields.
    """
    if config.examples is None:
        return []
    path = _examples_path(config, base)
    examples = []
    for number, line in numbered_lines(path):
        try:
            record = json.loads(line)
            question = _first_text(record, "question", "prompt")
            examples.append(Example(question, _first_text(record, "answer", "completion")))
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}:{number}: expected a JSON object with the texts question and answer (or prompt and "
                "completion)."
            ) from None
    if len(examples) < config.shots:
        raise UserError(f"{path} has {len(examples)} examples, shots is {config.shots}; lower shots or add examples.")
    return examples


def _examples_path(config: BaselineConfig, base: Path) -> Path:
    path = user_path(str(config.examples), base)
    if not path.is_file():
        raise UserError(f"examples: there is no file '{path}'; relative paths start at the current folder.")
    return path


def _first_text(record: dict[str, Any], *names: str) -> str:
    for name in names:
        value = record.get(name)
        if isinstance(value, str) and value.strip():
            return value
    raise KeyError(names[0])
