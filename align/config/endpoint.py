"""Endpoints that generate, and judges, which compare or grade answers. Torch-free."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from align.config.base import Config
from align.config.chat_template import TEMPLATE_FIELDS, TemplateVariables, Thinking
from align.errors import redact

LOCAL = ("127.0.0.1", "localhost", "::1")
RESERVED = frozenset(
    {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "n", "stream"}
)
"""Fields of a request that align sets."""
DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
SECONDS = {"s": 1, "m": 60, "h": 3600}


def _read_duration(value: Any) -> Any:
    """Return a time such as ``15m`` in seconds."""
    if not isinstance(value, str):
        return value
    match = DURATION.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"'{value}' is not a time; write seconds as a number, or 30s, 15m or 2h")
    return float(match[1]) * SECONDS[match[2]]


Seconds = Annotated[float, BeforeValidator(_read_duration, json_schema_input_type=float | str)]
"""A time in seconds: ``900``, ``900s``, ``15m`` or ``0.25h``."""


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
    requests_per_minute: int | None = Field(None, ge=1)
    """Most requests in any 60 seconds, retries included, by all threads of a process. Processes do not share it."""
    tokens_per_minute: int | None = Field(None, ge=1)
    """Most tokens of prompts and answers in any 60 seconds; a request under way counts with its ``max_tokens``."""
    timeout: Seconds = Field(120, gt=0)
    """Time limit of one attempt in seconds, from connecting to the last byte."""
    patience: Seconds = Field(900, ge=0)
    """Seconds to wait for a server that has answered before and is away: no connection, or status 502 or 503. ``15m``
    and ``2h`` are times as well. 0 counts such attempts only by ``retries``."""
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


PAIR_RUBRIC = (
    "Prefer the answer that does what was asked, is correct, and leaves out what nobody needs. Length, confidence and "
    "politeness are no merits of their own."
)
"""Default criteria of a comparison; part of the prompt, so a change of it changes cached verdicts."""


def refuse_settings_of_server(config: Config, endpoint: EndpointConfig | None) -> None:
    """Raise ``ValueError`` if a block sets variables of a chat template and a server renders it."""
    changed = config.changed(*sorted(TEMPLATE_FIELDS))
    if endpoint is not None and changed:
        raise ValueError(
            f"{changed[0]} is about a checkpoint's chat template, and the endpoint's server has its own; write "
            "`endpoint: {extra: {chat_template_kwargs: {...}}}`."
        )


class JudgeConfig(Config):
    """Judge that labels pairs for a synthesize stage.

    With ``endpoint`` null the judge is the checkpoint of the stage that ``judge_model`` names.
    """

    endpoint: EndpointConfig | None = None
    """The server that judges."""
    rubric: str = PAIR_RUBRIC
    """Criteria for the better answer; part of the prompt. ``{row[answer]}`` quotes a column that the recipe keeps."""
    max_tokens: int = Field(512, ge=1)
    """Longest verdict in tokens. A verdict that is cut off before its last line is unreadable, and is counted."""
    temperature: float = Field(0.0, ge=0, le=5)
    """0 asks for the likeliest verdict."""
    thinking: Thinking = None
    """``on`` or ``off`` sets the thinking switch of ``judge_model``'s chat template (docs/thinking.md)."""
    chat_template_kwargs: TemplateVariables = Field({})
    """Variables of ``judge_model``'s chat template, in place of the checkpoint's."""

    keyed_when_set: ClassVar[frozenset[str]] = TEMPLATE_FIELDS

    @model_validator(mode="after")
    def _check_template_is_own(self) -> JudgeConfig:
        refuse_settings_of_server(self, self.endpoint)
        return self

    @field_validator("rubric")
    @classmethod
    def _check_rubric(cls, rubric: str) -> str:
        if not rubric.strip():
            raise ValueError("is empty; say what makes an answer better")
        return rubric


class EndpointJudge(Config):
    """Settings of an endpoint that judges an evaluation's answers."""

    endpoint: EndpointConfig | None = None
    """The server that judges; a local vLLM server is one."""
    rubric: str | None = Field(None, pattern=r"\S")
    """Criteria for a good answer, in place of the default; part of every prompt. ``{row[answer]}`` quotes a field of
    the question's record."""
    max_tokens: int = Field(512, ge=1)
    """Longest verdict in tokens. A verdict that is cut off before its last line is unreadable, and is counted."""
    temperature: float = Field(0.0, ge=0, le=5)
    """0 asks for the likeliest verdict."""
    seed: int = Field(0, ge=0)
    """Another seed asks every question again: for a second opinion at a temperature above 0, or of a repaired
    server."""
    max_unreadable: float = Field(0.1, ge=0, lt=1)
    """Largest share of unreadable judgments of any system or pair; they are counted and skipped. More is an error."""
    max_cost: float | None = Field(None, gt=0)
    """Stop before all attempts of the stage cost more, by the endpoint's prices; raise it and run again to continue. A
    stage with other settings has a budget of its own."""

    @model_validator(mode="after")
    def _check_budget_has_prices(self) -> EndpointJudge:
        if self.max_cost is not None and (self.endpoint is None or self.endpoint.price_input is None):
            raise ValueError("max_cost needs endpoint.price_input and endpoint.price_output")
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that verdicts depend on."""
        settings = self.model_dump(include={"rubric", "max_tokens", "temperature", "seed"})
        return settings | (self.endpoint.identity() if self.endpoint is not None else {})


class RewardJudge(EndpointJudge):
    """An endpoint that grades responses from 1 to 10, or says which ``criteria`` they satisfy.

    The score of a grade is ``(grade - 1) / 9``, from 0 to 1. An unreadable grade scores 0, so a response does not gain
    by confusing the judge.
    """

    reference: str | None = Field(None, min_length=1)
    """Column of the prompts' rows with the right answer, which the judge is shown: ``answer``."""

    @model_validator(mode="after")
    def _check_endpoint(self) -> Self:
        if self.endpoint is None:
            raise ValueError("names no endpoint; write `endpoint: {url: ..., model: ...}`.")
        return self

    def identity(self) -> dict[str, Any]:
        """Return the settings that verdicts depend on."""
        return super().identity() | {"reference": self.reference}


class TaskJudge(EndpointJudge):
    """The judge of a task: ``{reward: true}``, the stage's reward model, or ``{endpoint: {...}}``."""

    reward: bool | Literal["second_reward"] = False
    """The stage's reward model (or its second one) prefers the answer it scores higher, whatever their order."""

    @model_validator(mode="after")
    def _check_single_judge(self) -> Self:
        if bool(self.reward) == (self.endpoint is not None):
            raise ValueError("name the judge: `reward: true` or `endpoint`, one of them")
        if self.reward:
            unused = sorted(self.changed("rubric", "max_tokens", "temperature", "seed"))
            if unused:
                raise ValueError(f"a reward model does not use {', '.join(unused)}; remove it")
        return self

    @property
    def reward_field(self) -> Literal["reward", "second_reward"] | None:
        """Input field of the reward model that judges; None for an endpoint."""
        if not self.reward:
            return None
        return "second_reward" if self.reward == "second_reward" else "reward"

    def identity(self) -> dict[str, Any]:
        """Return the settings that verdicts depend on; the reward model itself is an input of the stage."""
        return {"reward": self.reward_field} if self.reward else super().identity()
