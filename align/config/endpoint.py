"""Settings of an OpenAI-compatible server: address, model, prices, limits.

Leaves out the calls (``align.inference.endpoint_client``).
"""

from __future__ import annotations

import json
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from align.config.base import Config
from align.errors import redact

LOCAL = ("127.0.0.1", "localhost", "::1")
RESERVED = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "n", "stream"}
)
"""Fields of a request that align sets."""


class EndpointConfig(Config):
    """An OpenAI-compatible server. Only ``url`` (or ``name``), ``model`` and ``extra`` are part of a request's key."""

    url: str
    """Address up to and with the version, https://api.example.com/v1; http only for this machine (127.0.0.1)."""
    model: str = Field(min_length=1)
    """The server's name for the model."""
    name: str | None = None
    """Stands for ``url`` in keys and caches; set it when the same model may move to another address."""
    key_variable: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the key; the key itself is never written anywhere. null sends none."""
    price_input: float | None = Field(None, ge=0)
    """Price of a million prompt tokens, in any currency; with ``price_output`` the cost is estimated."""
    price_output: float | None = Field(None, ge=0)
    """Price of a million tokens of answers."""
    concurrency: int = Field(8, ge=1, le=1024)
    """Requests under way at once."""
    timeout: float = Field(120, gt=0)
    """Time limit of one attempt in seconds, from connecting to the last byte."""
    retries: int = Field(5, ge=0, le=100)
    """Further attempts after a timeout, a lost connection, status 429 or 5xx, or an answer that cannot be read."""
    send_seed: bool = True
    """Send each request's seed; false for a server that refuses the field."""
    length_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Name of the server's field for the length limit."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of each request, as the server documents them."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise ValueError("holds a name or password; export the key and name its variable in key_variable")
        is_odd = parts.query or parts.fragment or not parts.hostname or url.strip() != url
        if parts.scheme not in ("http", "https") or is_odd:
            raise ValueError(f"'{redact(url)}' should look like https://api.example.com/v1, without a query")
        if parts.scheme == "http" and parts.hostname not in LOCAL:
            raise ValueError(f"http to {parts.hostname} would send prompts and key in the clear; use https")
        if url.rstrip("/").endswith("/completions"):
            raise ValueError("should end before /chat/completions, which is added to it")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _check_fields(self) -> EndpointConfig:
        if (self.price_input is None) != (self.price_output is None):
            raise ValueError("price_input and price_output are set together or not at all")
        reserved = sorted(RESERVED & set(self.extra))
        if reserved:
            raise ValueError(f"extra sets {', '.join(reserved)}, which align sets itself")
        return self

    def identity(self) -> dict[str, str]:
        """Return the identity of this model in requests, caches and keys."""
        # A name, if there is one, identifies the model: its cached answers stay valid behind another address.
        extra = {"extra": json.dumps(self.extra, sort_keys=True)} if self.extra else {}
        return {"endpoint": self.name or self.url, "model": self.model, **extra}
