"""A simulated user by a checkpoint, which transformers samples in the stage's own process.

vLLM holds one engine a process, and the policy may have that one. Answers that are asked for together are one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.config.base import Precision
from align.config.environment import SimulatedUserConfig
from align.config.runtime import Runtime
from align.data.rows import Message, assistant, user
from align.environments.simulated_user import UserAnswer, UserRequest, read_answer
from align.environments.turn_template import TurnTemplate
from align.errors import UserError
from align.inference.engine import open_transformers
from align.inference.protocol import BatchEngine, OnHang, TurnRequest
from align.inference.switching import max_positions
from align.models.loading import load_tokenizer

PROBE: list[Message] = [{"role": "system", "content": "Qanat"}, user("Xylem"), assistant("Vortex"), user("Zephyrus")]
"""A conversation as users read them."""


class CheckpointUser:
    """A checkpoint that plays the user; a ``SimulatedUser``."""

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

    def usage(self) -> dict[str, Any]:
        """Return an empty mapping, because there is no server."""
        return {}

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
