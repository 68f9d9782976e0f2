"""Readers for tests: one that answers by a rule, one that is a real model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.evaluation.answers import Example
from align.evaluation.scorecard import SystemInfo
from align.models.built_in import make_tiny_tokenizer
from align.models.chat.render import render_prompt

Rule = Callable[[str, str], float]
"""Texts of context and answer → log-likelihood of the answer."""


class _Prompting:
    """Base of both readers: rendering behind a system's own prompt, and results cached in memory."""

    tokenizer: Any
    max_length = 2048
    model_dir = Path()
    runtime = None

    def __init__(self, info: SystemInfo | None) -> None:
        self.info = info or SystemInfo("sft", "sft", "checkpoint", "k")
        self.results: dict[str, tuple[Any, str]] = {}
        self.computed: list[str] = []

    def render(self, prompt: list[dict[str, str]], examples: Sequence[Example] = ()) -> list[int]:
        turns = [{"role": "system", "content": self.info.system}] if self.info.system else []
        for example in examples[: self.info.shots]:
            turns += [
                {"role": "user", "content": example.question},
                {"role": "assistant", "content": example.answer},
            ]
        return render_prompt(self.tokenizer, [*turns, *prompt])

    def cached(self, name: str, identity: Any, compute: Callable[[], Any]) -> Any:
        if name not in self.results or self.results[name][0] != identity:
            self.computed.append(name)
            self.results[name] = identity, json.dumps(compute())  # as on disk
        return json.loads(self.results[name][1])


class RuleReader(_Prompting):
    """Gives each answer what ``rule`` says of it, spread evenly over its tokens; remembers what it was asked."""

    def __init__(self, rule: Rule, info: SystemInfo | None = None) -> None:
        super().__init__(info)
        self.rule = rule
        self.tokenizer = make_tiny_tokenizer()
        self.asked: list[tuple[str, str]] = []

    def logprobs(self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        actual = []
        for context, answer in zip(contexts, continuations, strict=True):
            assert context
            texts = self.tokenizer.decode(list(context)), self.tokenizer.decode(list(answer))
            self.asked.append(texts)
            actual.append([self.rule(*texts) / len(answer)] * len(answer))
        return actual


class ModelReader(_Prompting):
    """A model in float32."""

    def __init__(self, folder: Path, info: SystemInfo | None = None) -> None:
        from align.models.loading import load_policy, load_tokenizer

        super().__init__(info)
        self.model_dir = folder
        self.tokenizer = load_tokenizer(folder)
        self.model = load_policy(folder).requires_grad_(False)

    def logprobs(self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[list[float]]:
        from align.evaluation.logprobs import response_logprobs

        return response_logprobs(
            self.model, contexts, continuations, temperature=1.0, precision="float32", pad=self.tokenizer.pad_token_id
        )

    def by_plain_loop(self, context: Sequence[int], answer: Sequence[int]) -> float:
        """Log-likelihood of an answer, one sequence at a time and token by token, in nats."""
        import torch

        ids = [*context, *answer]
        table = torch.log_softmax(self.model(torch.tensor([ids])).logits[0].double(), dim=-1)
        return sum(float(table[len(context) + index - 1, token]) for index, token in enumerate(answer))
