"""The stand-in for vLLM's server with a real model behind it: it reads the weights it is told to and samples from them.

``python -m tests.support.inference.model_server --uds PATH --model FOLDER [what vLLM takes]`` answers until it is
ended. With
``$ALIGN_TEST_DIES_AT=3`` it kills itself in the middle of the answers that follow the third set of weights it is given.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align.inference.protocol import Sampling
from align.inference.transformers import TransformersEngine
from align.inference.weights import checkpoint_weights
from tests.support.inference.fake_server import FakeServer

BEFORE_A_FAULT = 2
"""Answers that are still given to the weights at which something goes wrong."""


class ModelServer(FakeServer):
    """Float32 on one CPU thread, one response at a time: what it answers depends on nothing but weights and request."""

    def __init__(self, model_dir: Path, path: str | None = None) -> None:
        self.engine = TransformersEngine(model_dir, device=torch.device("cpu"), dtype=torch.float32, batch_size=1)
        self.loads = self.answered = 0
        """Sets of weights it was given, and answers since the last."""
        self.fault_at = -1
        """Which set of weights ``fault`` follows, counted from 1."""
        self.fault: Callable[[Any], Any] = self.hang
        self.model_lock = threading.Lock()
        super().__init__(path)
        self.answers["/v1/completions"] = self._complete

    def load(self, path: str) -> None:
        """Read a set of weights."""
        with self.model_lock:
            self.loads, self.answered = self.loads + 1, 0
            self.engine.load_weights(checkpoint_weights(Path(path)))

    def _complete(self, body: dict[str, Any]) -> Any:
        with self.model_lock:
            faulty = self.loads == self.fault_at and self.answered >= BEFORE_A_FAULT
            if not faulty:
                self.answered += 1
                sampling = Sampling(body["max_tokens"], temperature=body["temperature"], top_p=body["top_p"])
                response = self.engine._decode([body["prompt"]], [body["seed"]], sampling)[0]
        if faulty:
            return self.fault(body)
        choice = {
            "token_ids": response.token_ids,
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": response.logprobs},
            "finish_reason": "stop" if response.finished else "length",
        }
        return {"choices": [choice]}


def main(arguments: list[str]) -> None:
    """Serve until this process is ended."""
    torch.set_num_threads(1)
    model_dir, path = (arguments[arguments.index(name) + 1] for name in ("--model", "--uds"))
    server = ModelServer(Path(model_dir), path)
    server.fault_at = int(os.environ.get("ALIGN_TEST_DIES_AT", "-1"))
    server.fault = lambda body: os.kill(os.getpid(), signal.SIGKILL)
    server.stopped.wait()


if __name__ == "__main__":
    main(sys.argv)
