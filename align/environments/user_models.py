"""The model that plays the user of an environment: a checkpoint, or an OpenAI-compatible server. Torch-free at import.

transformers samples a checkpoint in the stage's own process, because vLLM holds one engine a process, and the policy
may have that one. Answers that are asked for together are one batch. An answer of a server is cached when it arrives,
so a killed stage requests no answer twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.config.base import Precision
from align.config.environment import USER_INPUT, EnvironmentConfig, SimulatedUserConfig
from align.config.runtime import Runtime
from align.config.runtime.launch import world_size
from align.data.rows import Message, assistant, user
from align.environments.simulated_user import SimulatedUser, UserAnswer, UserRequest, read_answer
from align.environments.turn_template import TurnTemplate
from align.errors import UserError
from align.inference.cached_client import CachedClient, open_caches, prices_of
from align.inference.endpoint_client import Endpoint, EndpointLost
from align.inference.engine import max_positions, open_transformers
from align.inference.protocol import BatchEngine, OnHang, TurnRequest
from align.inference.requests import Answer, Request
from align.pipeline.context import StageContext

FOLDER = "user"
"""Folder of a server's answers."""
NAME = "user"
"""Name of the model in the client's statistics."""
MAX_LOST = 2
"""Consecutive requests without any answer after which a server counts as gone. A single request may be at fault."""
READY = [user("Reply with the one word: ready")]
"""A test request, sent before anything expensive starts."""


@dataclass(frozen=True)
class UserResources:
    """Resources of a stage for the model that plays the user."""

    runtime: Runtime
    precision: Precision
    folder: Path
    """Folder that survives a kill of the stage, for a server's answers."""
    shared: Path | None
    """Folder that runs share; None if there is none."""
    warn: Callable[[str], object]
    on_hang: OnHang | None = None
    processes: int = 1
    """Processes of the stage, which share a server's budget."""
    outage_fails_episodes: bool = False
    """True to fail the unanswered episodes if the server is lost. Otherwise ``EndpointLost`` ends the stage, so no
    artifact contains the effect of an outage."""


def open_user(
    config: SimulatedUserConfig, model_dir: Path | None, resources: UserResources, where: str
) -> SimulatedUser:
    """Open a user and check it; ``model_dir`` is the folder of its checkpoint, None for a server.

    A server gets a test request. Raises ``UserError``, which begins with ``where``, if the model cannot be used.
    """
    if config.endpoint is None:
        assert model_dir is not None
        return CheckpointUser(
            config,
            model_dir,
            resources.runtime,
            resources.precision,
            where=f"{where}.model",
            on_hang=resources.on_hang,
        )
    endpoint_user = EndpointUser(config, resources, where)
    endpoint_user.check()
    return endpoint_user


def open_stage_user(context: StageContext, *, outage_fails_episodes: bool = False) -> SimulatedUser | None:
    """Open the model that plays the user of a stage's episodes; None if its environment has no user.

    ``UserResources`` explains ``outage_fails_episodes``.
    """
    config = context.config.environment.user
    if config is None:
        return None
    artifact = context.inputs.get(USER_INPUT)
    resources = UserResources(
        runtime=context.runtime,
        precision=context.precision,
        folder=context.checkpoints,
        shared=context.shared_answers(),
        warn=context.warn,
        on_hang=context.fail_at_once,
        processes=playing_processes(context.runtime),
        outage_fails_episodes=outage_fails_episodes,
    )
    model_dir = None if artifact is None else artifact.model
    return open_user(config, model_dir, resources, f"{context.name}.environment.user")


def playing_processes(runtime: Runtime) -> int:
    """Return the number of processes that play episodes. With a pool of servers the first process plays all."""
    return 1 if runtime.rollouts.pooled else world_size()


def check_user_rows(config: EnvironmentConfig, rows: Iterable[Mapping[str, Any]], where: str) -> None:
    """Raise ``UserError`` for a row without a column that the user's prompt quotes; ``where`` is the stage's name.

    The check needs no model, so stages check all rows before they load a model.
    """
    if config.user is None:
        return
    for row in rows:
        user_prompt(config, where, row)


def user_prompt(config: EnvironmentConfig, where: str, row: Mapping[str, Any]) -> str:
    """Return the system message of the user's model for a row. Raises ``UserError`` for a missing column."""
    assert config.user is not None
    return config.user.system_message(row, f"{where}.environment.user")


def user_usage(user: SimulatedUser | None) -> dict[str, Any]:
    """Return requests, tokens and cost of the user's server as ``user``; empty if there is no server."""
    usage = {} if user is None else user.usage()
    return {"user": usage} if usage else {}


class EndpointUser(SimulatedUser):
    """A server that plays the user."""

    in_background = True

    def __init__(self, config: SimulatedUserConfig, resources: UserResources, where: str) -> None:
        """Open the caches. Raises ``UserError`` if the endpoint's key is not in the environment."""
        assert config.endpoint is not None
        self._config = config
        self._where = where
        self._outage_fails_episodes = resources.outage_fails_episodes
        # A request that the server rejects (a content filter, a length) fails one episode, not the run.
        self._endpoint = Endpoint(config.endpoint, drop=True, place=f"{where}.endpoint")
        shared = None if resources.shared is None else resources.shared / FOLDER
        cache, shared_cache = open_caches(resources.folder / FOLDER, shared, "answers", resources.warn)
        prices = prices_of(config.endpoint)
        self._client = CachedClient(
            cache,
            shared_cache,
            config.max_cost,
            {} if prices is None else {NAME: prices},
            processes=resources.processes,
        )

    def check(self) -> None:
        """Send a test request. Raises ``UserError`` or ``EndpointLost`` if the server cannot be used."""
        # No cache has the sample number, so every attempt of a stage asks the server.
        request = self._request(READY, sample=time.time_ns())
        answer = self._client.ask(self._endpoint, [request], NAME)[0]
        if answer.error:
            raise UserError(f"{self._where}.endpoint: the server {answer.error}.")

    def answer(self, requests: Sequence[UserRequest]) -> list[UserAnswer]:
        """Return an answer to each request, in order; a failure if the server's answer cannot be used.

        Raises ``UserError`` for settings that the server refuses, and for a spent budget. Raises ``EndpointLost`` if a
        request runs out of attempts, unless that fails its episode; earlier answers are cached.
        """
        server_requests = [self._request(request.messages, seed=request.seed) for request in requests]
        if not self._outage_fails_episodes:
            return [self._read(answer) for answer in self._client.ask(self._endpoint, server_requests, NAME)]
        answers = self._ask_on(server_requests)
        return [answers[request.key] for request in server_requests]

    def _request(self, messages: list[Message], seed: int = 0, sample: int = 0) -> Request:
        return Request(
            model=self._endpoint.identity,
            messages=messages,
            max_tokens=self._config.max_tokens,
            temperature=self._config.temperature,
            seed=seed,
            sample=sample,
        )

    def _ask_on(self, requests: list[Request]) -> dict[str, UserAnswer]:
        """Return answers by key. A request that runs out of attempts fails, and the other requests are sent again.

        The server counts as gone after ``MAX_LOST`` such requests without an answer between them.
        """
        answers: dict[str, UserAnswer] = {}
        lost_in_a_row = 0
        while True:
            unasked = [request for request in requests if request.key not in answers]
            try:
                replies = self._client.ask(self._endpoint, unasked, NAME)
            except EndpointLost as error:
                # Earlier answers are in the cache.
                new = self._cached(unasked)
                lost = UserAnswer(failure=error.problem)
                # An answer shows that the server is reachable, so the count starts again.
                lost_in_a_row = len(error.requests) + (0 if new else lost_in_a_row)
                is_gone = not new and (lost_in_a_row >= MAX_LOST or not error.requests)
                answers |= new | {request.key: lost for request in (unasked if is_gone else error.requests)}
                continue
            answers |= {request.key: self._read(reply) for request, reply in zip(unasked, replies, strict=True)}
            return answers

    def _cached(self, requests: list[Request]) -> dict[str, UserAnswer]:
        """Return the answers in the stage's cache by key."""
        lookups = {request.key: self._client.cache.get(request.key) for request in requests}
        return {key: self._read(lookup.answer) for key, lookup in lookups.items() if lookup is not None}

    def _read(self, answer: Answer) -> UserAnswer:
        if answer.error:
            return UserAnswer(failure=f"the user's server {answer.error}.")
        if answer.refused:
            return UserAnswer(failure="the user's server declined to answer.")
        return read_answer(answer.text, answer.finished, self._config.stop)

    def usage(self) -> dict[str, Any]:
        """Return requests, tokens and cost of all attempts and processes of the stage so far."""
        return self._client.usage_of_stage(self._endpoint, NAME).to_json()


PROBE: list[Message] = [{"role": "system", "content": "Qanat"}, user("Xylem"), assistant("Vortex"), user("Zephyrus")]
"""A conversation as users read them."""


class CheckpointUser(SimulatedUser):
    """A checkpoint that plays the user."""

    in_background = False

    def __init__(
        self,
        config: SimulatedUserConfig,
        model_dir: Path,
        runtime: Runtime,
        precision: Precision,
        *,
        where: str,
        on_hang: OnHang | None = None,
    ) -> None:
        """Load the tokenizer. The weights are loaded when the first episodes begin.

        Raises ``UserError``, which begins with ``where``, for a chat template that cannot write the user's
        conversations.
        """
        self._config = config
        self._model_dir = model_dir
        self._runtime = runtime
        self._precision = precision
        self._on_hang = on_hang
        self._turns = read_template(model_dir, where)
        self._positions = max_positions(model_dir)
        self._engine: Any = None

    def load(self) -> None:
        """Load the weights once."""
        if self._engine is None:
            self._engine = open_transformers(self._model_dir, self._runtime, self._precision, self._on_hang)

    def answer(self, requests: Sequence[UserRequest]) -> list[UserAnswer]:
        """Return an answer to each request, in their order; the same set of requests is answered alike bit for bit."""
        self.load()
        engine: BatchEngine = self._engine
        prompts = [self._turns.prompt(request.messages) for request in requests]
        failures = [self._objection(len(prompt)) for prompt in prompts]
        fitting = [number for number, failure in enumerate(failures) if not failure]
        responses = engine.sample(
            [
                TurnRequest(requests[number].episode, prompts[number], self._config.max_tokens, requests[number].seed)
                for number in fitting
            ],
            self._config.temperature,
            1.0,
        )
        # A conversation that is too long fails only its episode.
        answers = [UserAnswer(failure=failure) for failure in failures]
        for number, response in zip(fitting, responses, strict=True):
            answers[number] = read_answer(response.text, response.finished, self._config.stop)
        return answers

    def _objection(self, prompt_tokens: int) -> str:
        """Return the reason why a prompt of this length cannot be answered; empty if it can."""
        if self._positions is None or prompt_tokens + self._config.max_tokens <= self._positions:
            return ""
        return (
            f"the user's model reads a conversation of {prompt_tokens} tokens, and has {self._positions} positions, "
            f"{self._config.max_tokens} of them for its answer."
        )

    def close(self) -> None:
        """Free the model."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def read_template(model_dir: Path, where: str) -> TurnTemplate:
    """Return the template of a user's model.

    Raises ``UserError``, which begins with ``where``, for a tokenizer without one, or that cannot write the user's
    conversations.
    """
    from align.models.loading import load_tokenizer  # imports torch

    try:
        tokenizer = load_tokenizer(model_dir)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    turns = TurnTemplate(tokenizer, None, where)
    try:
        turns.prompt(PROBE)
    except UserError as error:
        raise UserError(f"{where}: the user's model has a system message. {error}") from None
    return turns
