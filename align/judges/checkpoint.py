"""A checkpoint of the pipeline as a judge: a generative reward model. Torch-free at import.

transformers samples it in the stage's own process, because vLLM holds one engine a process, and the policy may have
that one. Its weights are loaded when it judges for the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from align.config.base import Precision
from align.config.runtime import Runtime
from align.errors import UserError
from align.inference.cached_client import Sink
from align.inference.engine import max_positions, open_transformers
from align.inference.protocol import OnHang, TurnRequest
from align.inference.requests import Answer, Request
from align.inference.thoughts import ThoughtReader
from align.store.artifacts import Artifact

CHUNK = 64
"""Requests that are answered between two writes to the cache: a killed stage repeats at most these."""


class CheckpointJudge:
    """One checkpoint as a :class:`~align.inference.cached_client.Backend`."""

    def __init__(
        self, artifact: Artifact, runtime: Runtime, precision: Precision, place: str, on_hang: OnHang | None = None
    ) -> None:
        """Load the tokenizer. Raises ``UserError`` for a checkpoint without a chat template."""
        from align.models.chat.render import require_chat_template
        from align.models.loading import load_tokenizer  # imports torch

        self.identity = {"checkpoint": artifact.weights, "precision": str(precision)}
        self.name = artifact.stage
        self.place = place
        self.tokenizer: Any = load_tokenizer(artifact.model)
        require_chat_template(self.tokenizer, f"{place}.judge.model: the checkpoint of stage '{artifact.stage}'")
        self.reader = ThoughtReader(self.tokenizer)
        self._positions = max_positions(artifact.model)
        self._open: Callable[[], Any] = lambda: open_transformers(artifact.model, runtime, precision, on_hang)
        self._engine: Any = None

    def answer(self, requests: list[Request], sink: Sink) -> None:
        """Answer the requests in chunks; those that are too long for the model get an ``error``."""
        for start in range(0, len(requests), CHUNK):
            sink.record(self._answer_chunk(requests[start : start + CHUNK]))

    def _answer_chunk(self, requests: list[Request]) -> list[tuple[Request, Answer]]:
        prompts = [self._render(request) for request in requests]
        faults = [self._fault(len(ids), request.max_tokens) for ids, request in zip(prompts, requests, strict=True)]
        fitting = [index for index, fault in enumerate(faults) if not fault]
        if fitting and self._engine is None:
            self._engine = self._open()
        answers = [Answer("", error=fault) for fault in faults]
        turns = [
            TurnRequest(index, prompts[index], requests[index].max_tokens, requests[index].own_seed)
            for index in fitting
        ]
        # All requests of a judge have one temperature.
        responses = self._engine.sample(turns, requests[0].temperature, requests[0].top_p) if turns else []
        for index, response in zip(fitting, responses, strict=True):
            # The place of a thought is read from the tokens, since some marks of thoughts are special tokens.
            text = str(self.tokenizer.decode(response.token_ids, skip_special_tokens=True))
            answer = self.reader.read(prompts[index], replace(response, text=text)).answer_text
            answers[index] = Answer(
                text=str(answer),
                finished=bool(response.finished),
                prompt_tokens=len(prompts[index]),
                completion_tokens=len(response.token_ids),
            )
        return list(zip(requests, answers, strict=True))

    def _render(self, request: Request) -> list[int]:
        from align.models.chat.render import render_prompt

        try:
            return list(render_prompt(self.tokenizer, request.messages))
        except Exception as error:  # a template may refuse a conversation, each in its own way
            raise UserError(
                f"{self.place}.judge.model: its chat template refuses the judge's prompt: {error}"
            ) from None

    def _fault(self, prompt: int, answer: int) -> str:
        if self._positions is None or prompt + answer <= self._positions:
            return ""
        return (
            f"has {self._positions} positions, and the prompt has {prompt} tokens with max_tokens {answer} for the "
            "answer"
        )

    def close(self) -> None:
        """Free the model; another question would load it again."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
