"""Checkpoints of the pipeline as backends of requests, through one rollout engine.

A process can hold one vLLM engine: it is opened for the first checkpoint and loads the weights of the next one.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

from align.config.runtime.rollouts import SYNTHESIS_CHUNK
from align.errors import UserError
from align.inference.cached_client import AnswerSink
from align.inference.engine import SwitchingEngine, max_positions, open_engine
from align.inference.protocol import Response, RolloutEngine, Sampling
from align.inference.requests import Answer, Request
from align.inference.thoughts import ThoughtReader, generate
from align.models.chat.render import render_prompt, require_chat_template
from align.models.chat.template_settings import TemplateSettings, stored_settings
from align.models.loading import load_tokenizer
from align.pipeline.context import StageContext
from align.store.artifacts import Artifact


class Engines(SwitchingEngine):
    """The rollout engine of this process, for the model and a judge."""

    def __init__(self, context: StageContext, max_length: int) -> None:
        """Start without an engine; ``max_length`` is the longest prompt plus answer in tokens that must fit."""
        super().__init__(self._open)
        self.context = context
        self.max_length = max_length
        self.names: list[str] = []
        """Names of the engines opened so far."""

    def _open(self, model_dir: Path) -> RolloutEngine:
        context = self.context
        runtime = self.context.runtime
        # vLLM cannot load another architecture into its engine, nor open a second engine in this process.
        if self.names and runtime.engine.name != "transformers" and not runtime.rollouts.servers:
            context.warn("the judge is of another architecture than the model, so transformers samples its verdicts")
            runtime = runtime.with_transformers()
        context.phase("starting the engine")
        engine = open_engine(
            model_dir,
            runtime,
            precision=context.precision,
            max_length=min(self.max_length, max_positions(model_dir) or self.max_length),
            seed=context.seed,
            warn=context.warn,
            on_hang=context.fail_at_once,
        )
        self.names.append(engine.name)
        return engine


class LocalModel:
    """One checkpoint as a backend."""

    def __init__(self, engines: Engines, artifact: Artifact, max_prompt_tokens: int, precision: str) -> None:
        """Load the tokenizer. Raises ``UserError`` for a checkpoint without a chat template."""
        self.engines = engines
        self.model_dir = artifact.model
        self.max_prompt_tokens = max_prompt_tokens
        self.identity = {"checkpoint": artifact.weights, "precision": precision}
        self.tokenizer = load_tokenizer(artifact.model)
        require_chat_template(self.tokenizer, f"the checkpoint of stage '{artifact.stage}'")
        self.max_positions = max_positions(artifact.model)
        self.thinking_budget: int | None = None

    def set_template(self, settings: TemplateSettings, prefix: str) -> None:
        """Set variables of the chat template, which answers depend on. ``prefix`` is the place of the fields."""
        settings.apply(self.tokenizer, prefix)
        if settings:
            self.identity |= {"template": json.dumps(stored_settings(self.tokenizer.chat_template), sort_keys=True)}

    def set_thinking_budget(self, budget: int | None) -> None:
        """Close thoughts after ``budget`` tokens, on which answers depend; None for no limit."""
        self.thinking_budget = budget
        if budget is not None:
            self.identity |= {"thinking_budget": str(budget)}

    def answer(self, requests: list[Request], sink: AnswerSink) -> None:
        """Answer the requests in chunks; prompts that are too long get an ``error``."""
        fitting: list[tuple[Request, list[int]]] = []
        for request in requests:
            ids = self._render(request)
            fault = self._too_long(len(ids), request.max_tokens)
            if fault:
                sink.record([(request, Answer("", error=fault))])
            else:
                fitting.append((request, ids))
        # A chunk shares its sampling parameters.
        for _, group in itertools.groupby(fitting, key=lambda item: _sampling_key(item[0])):
            same_sampling = list(group)
            for start in range(0, len(same_sampling), SYNTHESIS_CHUNK):
                self._answer_chunk(same_sampling[start : start + SYNTHESIS_CHUNK], sink)

    def _too_long(self, prompt: int, answer: int) -> str:
        if prompt > self.max_prompt_tokens:
            return f"the prompt has {prompt} tokens, max_prompt_tokens is {self.max_prompt_tokens}"
        if self.max_positions is not None and prompt + answer > self.max_positions:
            return (
                f"the prompt has {prompt} tokens; with max_tokens {answer} the model's {self.max_positions} are too few"
            )
        return ""

    def _render(self, request: Request) -> list[int]:
        try:
            return render_prompt(self.tokenizer, request.messages)
        except Exception as error:  # a template may refuse a conversation, each in its own way
            roles = ", ".join(message["role"] for message in request.messages)
            raise UserError(f"the chat template of {self.model_dir} refuses messages of {roles}: {error}") from None

    def _answer_chunk(self, chunk: list[tuple[Request, list[int]]], sink: AnswerSink) -> None:
        first = chunk[0][0]
        sampling = Sampling(
            max_tokens=first.max_tokens,
            temperature=first.temperature,
            top_p=first.top_p,
            seeds=tuple(request.own_seed for request, _ in chunk),
            thinking_budget=self.thinking_budget,
        )
        engine = self.engines.with_weights(self.model_dir)
        answers = generate(engine, ThoughtReader(self.tokenizer), [ids for _, ids in chunk], sampling)
        # The engine may have been opened with another checkpoint's tokenizer, so the texts are decoded here.
        pairs = []
        for (request, ids), (response,) in zip(chunk, answers, strict=True):
            pairs.append((request, self._answer(ids, response)))
        sink.record(pairs)

    def _answer(self, ids: list[int], response: Response) -> Answer:
        text = str(self.tokenizer.decode(response.token_ids, skip_special_tokens=True))
        return Answer(
            text=replace(response, text=text).marked_text,
            finished=bool(response.finished),
            prompt_tokens=len(ids),
            completion_tokens=len(response.token_ids),
        )


def _sampling_key(request: Request) -> tuple[int, float, float]:
    return request.max_tokens, request.temperature, request.top_p
