"""The stand-in for vLLM's server with a real model behind it: it reads the weights it is told to and samples from them.

It runs in a thread of the test's process. ``stand_in.py`` is a process of its own that answers from the same model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align.inference.protocol import TurnRequest
from align.inference.transformers import TransformersEngine
from align.inference.weights import AdaptedWeights, checkpoint_weights
from tests.support.inference.fake_server import FakeServer
from tests.support.inference.stand_in import ANSWER, BEFORE_A_FAULT, READ


def read_weights(path: str, base: str) -> dict[str, torch.Tensor]:
    """Return the weights of a folder, merged into the weights of ``base`` if they are an adapter."""
    weights = dict(checkpoint_weights(Path(path)))
    return dict(AdaptedWeights(base, lambda: checkpoint_weights(Path(base)), weights)) if base else weights


class ModelServer(FakeServer):
    """Float32 on one CPU thread, one response at a time: what it answers depends on nothing but weights and request."""

    def __init__(self, model_dir: Path) -> None:
        self.engine = TransformersEngine(model_dir, device=torch.device("cpu"), dtype=torch.float32, batch_size=1)
        self.loads = self.answered = 0
        """Sets of weights it was given, and answers since the last."""
        self.fault_at = -1
        """Which set of weights ``fault`` follows, counted from 1."""
        self.fault: Callable[[Any], Any] = self.hang
        self.model_lock = threading.Lock()
        self.read: list[dict[str, torch.Tensor]] = []
        """Sets of weights of stand-ins, by their number."""
        self.held: int | None = None
        """The number of those in the engine; None for its own."""
        super().__init__()
        self.answers |= {"/v1/completions": self._complete, READ: self._read, ANSWER: self._answer}

    def load(self, path: str, base: str = "") -> None:
        """Read a set of weights."""
        with self.model_lock:
            self.loads, self.answered = self.loads + 1, 0
            self.engine.load_weights(read_weights(path, base).items())
            self.held = None

    def _complete(self, body: dict[str, Any]) -> Any:
        with self.model_lock:
            faulty = self.loads == self.fault_at and self.answered >= BEFORE_A_FAULT
            if not faulty:
                self.answered += 1
                return self._sample(body)
        return self.fault(body)

    def _read(self, folders: list[str]) -> int:
        """Keep the weights of a stand-in, whose file may be gone when it answers; return their number."""
        with self.model_lock:
            self.read.append(read_weights(*folders))
            return len(self.read) - 1

    def _answer(self, body: dict[str, Any]) -> Any:
        """Answer for a stand-in with its weights."""
        with self.model_lock:
            if self.held != body["weights"]:
                self.engine.load_weights(self.read[body["weights"]].items())
                self.held = body["weights"]
            return self._sample(body["request"])

    def _sample(self, body: dict[str, Any]) -> Any:
        request = TurnRequest(0, body["prompt"], body["max_tokens"], body["seed"])
        (response,) = self.engine.sample([request], body["temperature"], body["top_p"])
        choice = {
            "token_ids": response.token_ids,
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": response.logprobs},
            "finish_reason": "stop" if response.finished else "length",
        }
        return {"choices": [choice]}
