"""The process of a stand-in for vLLM's server: its answers come from the model of a ``ModelServer`` elsewhere.

``python -m tests.support.inference.stand_in --uds PATH --model FOLDER [what vLLM takes]`` answers until it is ended,
without torch, whose import would take longer than its answers. ``$ALIGN_TEST_MODEL`` has the address and the key of the
``ModelServer``. With ``$ALIGN_TEST_DIES_AT=3`` it kills itself in the middle of the answers that follow the third set
of weights it is given.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import urllib.request
from typing import Any

from tests.support.inference.fake_server import FakeServer

BEFORE_A_FAULT = 2
"""Answers that are still given to the weights at which something goes wrong."""
READ, ANSWER = "/test/read", "/test/answer"
"""Routes of a ``ModelServer`` for stand-ins: read a set of weights, which gives its number; answer with that number."""


class StandIn(FakeServer):
    """Holds the number of its weights, of which the ``ModelServer`` has the values."""

    def __init__(self, model_dir: str, path: str) -> None:
        self.model, _, self.key = os.environ["ALIGN_TEST_MODEL"].partition(" ")
        self.dies_at = int(os.environ.get("ALIGN_TEST_DIES_AT", "-1"))
        self.loads = self.answered = 0
        self.count = threading.Lock()
        self.weights = self._ask(READ, [model_dir, ""])
        super().__init__(path)
        self.answers["/v1/completions"] = self._complete

    def load(self, path: str, base: str = "") -> None:
        """Have a set of weights read."""
        self.weights = self._ask(READ, [path, base])
        with self.count:
            self.loads, self.answered = self.loads + 1, 0

    def _complete(self, body: dict[str, Any]) -> Any:
        with self.count:
            if self.loads == self.dies_at and self.answered >= BEFORE_A_FAULT:
                os.kill(os.getpid(), signal.SIGKILL)
            self.answered += 1
        return self._ask(ANSWER, {"weights": self.weights, "request": body})

    def _ask(self, route: str, body: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.model + route, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=100) as reply:
            return json.load(reply)


def main(arguments: list[str]) -> None:
    """Serve until this process is ended."""
    model_dir, path = (arguments[arguments.index(name) + 1] for name in ("--model", "--uds"))
    StandIn(model_dir, path).stopped.wait()


if __name__ == "__main__":
    main(sys.argv)
