"""A simulated user by an OpenAI-compatible server, through a cache and within a budget. Torch-free.

An answer is cached as soon as it comes, so that a killed stage asks for none twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.config.simulated_user import SimulatedUserConfig
from align.data.rows import user
from align.environments.simulated_user import UserAnswer, UserRequest, read_answer
from align.errors import UserError
from align.inference.cached_client import CachedClient, open_caches, prices_of
from align.inference.endpoint_client import Endpoint, EndpointLost
from align.inference.requests import Answer, Request

NAME = "user"
"""Name of the model among a client's."""
MAX_LOST = 2
"""Requests in a row without any answer after which a server is gone. A single one may be at fault itself."""
READY = [user("Reply with the one word: ready")]
"""A test request, sent before anything expensive starts."""


class EndpointUser:
    """A server that plays the user; a ``SimulatedUser``."""

    in_background = True

    def __init__(
        self,
        config: SimulatedUserConfig,
        folder: Path,
        shared: Path | None,
        *,
        where: str,
        warn: Callable[[str], object],
        processes: int = 1,
        outage_fails_episodes: bool = False,
    ) -> None:
        """Open the caches: ``folder`` survives a kill of the stage, ``shared`` spares other runs the same requests.

        ``processes`` of one stage that ask at the same time share what is left of the budget. With
        ``outage_fails_episodes`` a lost server fails the episodes that it did not answer, else it ends the stage.
        Raises ``UserError`` when the endpoint's key is not in the environment.
        """
        assert config.endpoint is not None
        self._config, self._where, self._outage_fails_episodes = config, where, outage_fails_episodes
        # A request that the server rejects (a content filter, a length) costs one episode, not the run.
        self._endpoint = Endpoint(config.endpoint, drop=True, place=f"{where}.endpoint")
        cache, shared_cache = open_caches(folder, shared, "answers", warn)
        prices = prices_of(config.endpoint)
        self._client = CachedClient(
            cache, shared_cache, config.max_cost, {} if prices is None else {NAME: prices}, processes=processes
        )

    def check(self) -> None:
        """Ask the server for a word. Raises ``UserError`` or ``EndpointLost`` for one that cannot be used."""
        request = Request(
            model=self._endpoint.identity,
            messages=READY,
            max_tokens=self._config.max_tokens,
            temperature=self._config.temperature,
            # In no cache, so that every attempt of a stage asks the server.
            sample=time.time_ns(),
        )
        answer = self._client.ask(self._endpoint, [request], NAME)[0]
        if answer.error:
            raise UserError(f"{self._where}.endpoint: the server {answer.error}.")

    def answer(self, requests: Sequence[UserRequest]) -> list[UserAnswer]:
        """Return an answer to each request, in their order; a failure where the server gave none that can be used.

        Raises ``UserError`` for settings that the server refuses, and for a spent budget. Raises ``EndpointLost`` for a
        request that runs out of attempts, unless that fails its episode; what was answered until then is cached.
        """
        server_requests = [
            Request(
                model=self._endpoint.identity,
                messages=request.messages,
                max_tokens=self._config.max_tokens,
                temperature=self._config.temperature,
                seed=request.seed,
            )
            for request in requests
        ]
        if not self._outage_fails_episodes:
            return [self._read(answer) for answer in self._client.ask(self._endpoint, server_requests, NAME)]
        answers = self._ask_on(server_requests)
        return [answers[request.key] for request in server_requests]

    def _ask_on(self, requests: list[Request]) -> dict[str, UserAnswer]:
        """Return answers by key. A request that runs out of attempts is a failure, and the rest is asked for again.

        The server counts as gone once ``MAX_LOST`` requests ran out of attempts and none was answered meanwhile.
        """
        answers: dict[str, UserAnswer] = {}
        lost_in_a_row = 0
        while True:
            unasked = [request for request in requests if request.key not in answers]
            try:
                replies = self._client.ask(self._endpoint, unasked, NAME)
            except EndpointLost as error:
                # What was answered before is in the cache.
                new = self._cached(unasked)
                lost = UserAnswer(failure=error.problem)
                # An answer in between shows that the server is there, so the count starts over.
                lost_in_a_row = len(error.requests) + (0 if new else lost_in_a_row)
                is_gone = not new and (lost_in_a_row >= MAX_LOST or not error.requests)
                answers |= new | {request.key: lost for request in (unasked if is_gone else error.requests)}
                continue
            answers |= {request.key: self._read(reply) for request, reply in zip(unasked, replies, strict=True)}
            return answers

    def _cached(self, requests: list[Request]) -> dict[str, UserAnswer]:
        """Return the answers that are in the stage's own cache, by key."""
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

    def load(self) -> None:
        """Do nothing: the weights are elsewhere."""

    def close(self) -> None:
        """Do nothing: connections are closed with each batch."""
