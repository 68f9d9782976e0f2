"""One server of a pool: what it holds, and whether it can be used. ``pool.py`` decides that."""

from __future__ import annotations

from align.inference.server import ServerEngine
from align.inference.server_client import BadReply, Client, EngineLost

FAULTS = (EngineLost, BadReply, OSError)
"""Errors of one server that another server, or the same one after a restart, may not have."""
NO_WEIGHTS = -1
"""Version of a server that came back and waits for weights over NCCL."""


class Member:
    """One server of the pool."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.losses = 0
        """Times that it was lost, or failed to come back."""
        self.last_error = ""
        self.engine: ServerEngine
        self.version = 0
        """Version of the weights that it holds; 0 are those of the checkpoint."""
        self.ready = False
        """True while it holds the weights that it was given last."""
        self.is_loading = False
        """True while it reads new ones during a session, and until the session has seen how that ended."""
        self.coming_back = False

    @property
    def client(self) -> Client:
        """The client that makes its calls."""
        return self.engine.client

    def read(self, version: int) -> None:
        """Have it read a version of the weights. Raises as ``ServerEngine.read_weights``."""
        self.engine.read_weights(version)
        self.version = version
