"""A simulated user by an OpenAI-compatible server, through a cache and within a budget. Torch-free.

An answer is cached as soon as it comes, so that a killed stage asks for none twice.
"""

from __future__ import annotations

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
        request = Request(self._endpoint.identity, READY, self._config.max_tokens, self._config.temperature)
        answer = self._client.ask(self._endpoint, [request], NAME, fresh=True)[0]
        if answer.error:
            raise UserError(f"{self._where}.endpoint: the server {answer.error}.")

    def answer(self, requests: Sequence[UserRequest]) -> list[UserAnswer]:
        """Return an answer to each request, in their order; a failure where the server gave none that can be used.

        Raises ``UserError`` for settings that the server refuses, and for a spent budget. Raises ``EndpointLost`` for a
        request that runs out of attempts, unless that fails its episode; what was answered until then is cached.
        """
        asked = [
            Request(
                model=self._endpoint.identity,
                messages=request.messages,
                max_tokens=self._config.max_tokens,
                temperature=self._config.temperature,
                seed=request.seed,
            )
            for request in requests
        ]
        try:
            return [self._read(answer) for answer in self._client.ask(self._endpoint, asked, NAME)]
        except EndpointLost as error:
            if not self._outage_fails_episodes:
                raise
            # What was answered before the server was lost is in the cache.
            cached = [self._client.cache.get(request.key) for request in asked]
            lost = UserAnswer(failure=error.problem)
            return [lost if lookup is None else self._read(lookup.answer) for lookup in cached]

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
