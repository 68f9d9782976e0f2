"""The block ``environment:``: what a policy acts in over several turns, and the user it talks to. Torch-free.

Leaves out the acting itself (``align.environments``).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from align.config.base import Config, settings_for_key, stage_input
from align.config.endpoint import EndpointConfig
from align.config.recipe.templates import MissingValue, parse_template
from align.config.scores import scoring_identity
from align.config.user_functions import (
    SHORT,
    check_class,
    function_identity,
    method_names,
    read_module,
    search_module_folders,
    top_level_names,
)
from align.config.validation import hint_nearest, suggest
from align.config.verifiers import EnvironmentVerifier
from align.errors import UserError, redact, require_extra, shorten
from align.store.artifacts import GENERATORS
from align.store.fingerprint import canonical, code_identity

SOURCES = ("class", "tools", "verifiers", "openenv")
"""Keys of which the block has exactly one. With ``user`` a ``score`` is enough."""
WITH_USER = ("class", "tools")
"""Sources that a simulated user can be combined with; the other sources bring their own users."""
METHODS = ("reset", "score")
"""Methods that a class must have."""
NO_TOOLS = frozenset({"reset", "score", "step", "close", "state", "load"})
"""Public methods of a class that are not tools."""
FREE = frozenset({"workers", "isolation"})
"""Fields that change no result, and no key."""
IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
TOOL_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


USER_INPUT = "environment.user.model"
"""Name of the user's checkpoint among a stage's inputs."""


class SimulatedUserConfig(Config):
    """A model that plays the user. Exactly one field of model and endpoint is set."""

    model: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint speaks as the user, by transformers in the stage's own process."""
    endpoint: EndpointConfig | None = None
    """OpenAI-compatible server that speaks as the user."""
    prompt: str = Field(pattern=r"\S")
    """System message of the user's model: who it is and what it wants. ``{goal}`` quotes a column of the row; a brace
    is written twice."""
    stop: str | None = Field(None, pattern=r"\S")
    """Text by which the user ends the conversation, as the prompt tells it to: ``###STOP###``. What follows it is
    dropped. Null: the user never ends it."""
    opens: bool = False
    """The user speaks first. The policy sees only the system messages of the row's prompt, or of the messages that
    ``reset`` returns."""
    max_tokens: int = Field(256, ge=1)
    """Most tokens of an answer. An answer that is cut off there fails its episode."""
    temperature: float = Field(1.0, ge=0, le=5)
    """Sampling temperature of the user; 0 is greedy."""
    max_cost: float | None = Field(None, gt=0)
    """Stop before all attempts of the stage cost more, by the endpoint's prices; raise it and run again to continue. A
    stage with other settings has a budget of its own."""

    @field_validator("prompt")
    @classmethod
    def _check_template(cls, prompt: str) -> str:
        parse_template(prompt)
        return prompt

    @model_validator(mode="after")
    def _check_single_model(self) -> Self:
        if (self.model is None) == (self.endpoint is None):
            have = "both are" if self.model else "neither is"
            raise ValueError(f"either model or endpoint speaks as the user; {have} set.")
        if self.max_cost is not None and (self.endpoint is None or self.endpoint.price_input is None):
            raise ValueError("max_cost needs endpoint.price_input and endpoint.price_output.")
        return self

    @property
    def label(self) -> str:
        """Name of the user's model in messages."""
        return str(self.model) if self.endpoint is None else f"{self.endpoint.model} at {self.endpoint.url}"

    def identity(self) -> dict[str, Any]:
        """Return all that answers depend on, but for a checkpoint: that is an input of the stage."""
        settings = self.model_dump(exclude={"model", "endpoint", "max_cost"})
        return settings if self.endpoint is None else settings | {"endpoint": self.endpoint.identity()}

    def system_message(self, row: Mapping[str, Any], place: str) -> str:
        """Return the prompt for a row. Raises ``UserError``, which begins with ``place``, for a column it lacks."""
        try:
            return parse_template(self.prompt).render(row)
        except MissingValue as error:
            columns = ", ".join(sorted(shorten(str(name)) for name in row))
            raise UserError(
                f"{place}.prompt: row {row.get('id', '')}: {error}. A recipe keeps a column with `keep`; the row has "
                f"{columns}."
            ) from None


class EnvironmentConfig(Config):
    """An environment that the policy acts in over the turns of an episode.

    Exactly one field of class, tools, verifiers and openenv is set, or a simulated user and a score.
    """

    # ``class`` is a word of Python's; a stage's process gets its config by the names of the fields.
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    class_name: str | None = Field(None, alias="class")
    """Class of the user's as ``module:Class``, one instance an episode: ``reset``, ``score``, and its tools."""
    tools: list[str] | None = Field(None, min_length=1)
    """Functions that the policy may call, each as ``module:function``, with type hints and a docstring."""
    score: str | EnvironmentVerifier | None = None
    """Scores an episode with ``tools`` or a ``user``: ``gold``, ``gsm8k_answer``, ``module:function``, or a verifier of
    its last turn, as ``{math: answer}``."""
    verifiers: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/@-]*$")
    """Installed environment of the package verifiers, by the name of its package: ``reverse-text``."""
    openenv: str | None = None
    """Address of a server that speaks OpenEnv: ``http://127.0.0.1:8000``."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the class, of the function in ``score``, of verifiers' environment, or of OpenEnv's
    ``reset``."""
    user: SimulatedUserConfig | None = None
    """A model that answers the policy's turns without a tool call. It works with ``class``, with ``tools``, or by
    itself."""
    max_turns: int = Field(4, ge=1, le=1000)
    """Most turns of the policy in an episode."""
    max_tokens: int = Field(ge=1)
    """Most tokens of an episode after its prompt, what tools and users say included."""
    turn_max_tokens: int | None = Field(None, ge=1)
    """Most tokens that the policy may write in one turn. Null: as many as the episode has left."""
    tool_seconds: float = Field(30.0, gt=0, le=86_400)
    """Time limit of one call of the environment in seconds."""
    workers: int = Field(64, ge=1, le=1024)
    """Calls of environments under way at once, over all episodes."""
    isolation: Literal["thread", "process"] = "thread"
    """``process`` runs each episode's environment in a separate process, which is killed when it hangs and whose crash
    ends only that episode. ``thread`` is faster."""
    max_result_tokens: int = Field(512, ge=1)
    """Most tokens of one result of a tool, or of one answer of the environment; more is cut, with a notice."""
    tool_format: str = Field("auto", min_length=1)
    """Format of the policy's tool calls: ``auto`` (as the chat template shows), ``hermes``, ``llama3``, ``mistral``,
    ``smollm3``, ``olmo3``, or ``regex:PATTERN`` with the named groups ``name`` and ``arguments``."""

    @field_validator("class_name", "score")
    @classmethod
    def _check_import_path(cls, path: Any) -> Any:
        if isinstance(path, str) and path not in SHORT:
            _check_path(path)
        return path

    @field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[str] | None) -> list[str] | None:
        for path in tools or []:
            _check_path(path)
        names = [tool_name(path) for path in tools or []]
        for index, name in enumerate(names):
            if not TOOL_NAME.fullmatch(name):
                raise ValueError(
                    f"'{name}' cannot name a tool; give the function a name of up to 64 letters, digits and '_'."
                )
            if name in names[:index]:
                raise ValueError(
                    f"two tools are called '{name}' ([{names.index(name)}] and [{index}]); rename one of the functions."
                )
        return tools

    @field_validator("tool_format")
    @classmethod
    def _check_format_of_tool_calls(cls, name: str) -> str:
        check_tool_format(name)
        return name

    @field_validator("openenv")
    @classmethod
    def _check_server_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        is_odd = parts.query or parts.fragment or not parts.hostname or url.strip() != url
        if "@" in parts.netloc:
            raise ValueError("holds a name or password, which would be written into records; remove them.")
        if parts.scheme not in ("http", "https") or is_odd:
            raise ValueError(f"'{redact(url)}' should look like http://127.0.0.1:8000, without a query.")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _check_single_source(self) -> Self:
        sources = self._sources()
        is_user_alone = not sources and self.user is not None
        if len(sources) != 1 and not is_user_alone:
            listed = f"has {' and '.join(sources)}" if sources else f"has none of {', '.join(SOURCES)}"
            raise ValueError(f"{listed}; an environment comes from exactly one of them.")
        if self.tools and self.score is None:
            raise ValueError("tools need a `score`: a function that says how good the episode is.")
        if is_user_alone and self.score is None:
            raise ValueError("a user without tools needs a `score`: a function that says how good the episode is.")
        if isinstance(self.score, EnvironmentVerifier) and self.arguments:
            raise ValueError(f"arguments are for a function, and the score is {self.score.label}; remove them.")
        if self.score is not None and not self.tools and not is_user_alone:
            raise ValueError(f"score is for `tools`, and the {sources[0]} scores its episodes itself; remove it.")
        if self.user is not None and sources and sources[0] not in WITH_USER:
            raise ValueError(f"user answers next to a class or tools, and {sources[0]} has its own users; remove it.")
        return self

    @model_validator(mode="after")
    def _check_turns_fit(self) -> Self:
        # Each turn has at least one token, and so does the text between two turns.
        least = 2 * self.max_turns - 1
        if self.max_tokens < least:
            raise ValueError(
                f"max_turns {self.max_turns} can never fit into max_tokens {self.max_tokens}: these turns and what "
                f"comes between them are at least {least} tokens. Raise max_tokens, or lower max_turns."
            )
        if self.turn_max_tokens is not None and self.turn_max_tokens > self.max_tokens:
            raise ValueError(
                f"turn_max_tokens {self.turn_max_tokens} is more than max_tokens {self.max_tokens}, which the whole "
                "episode has; lower it, or raise max_tokens."
            )
        return self

    @property
    def label(self) -> str:
        """Name of the environment in messages: a class, functions, a package, or an address."""
        source = self.class_name or ", ".join(self.tools or []) or self.verifiers or self.openenv
        return source or "a simulated user"

    def tool_names(self, place: str = "environment") -> list[str]:
        """Return the names of the tools, as far as the source of the user's code shows them. Runs no code."""
        if self.class_name is None:
            return [tool_name(path) for path in self.tools or []]
        methods = method_names(self.class_name, f"{place}.class")
        public_methods = [name for name in methods if not name.startswith("_")]
        return [name for name in public_methods if name not in NO_TOOLS]

    def identity(self, place: str = "environment") -> str:
        """Return everything that episodes depend on, as JSON: the code of the user's, and the settings.

        Runs no code of the user's. Raises ``UserError``, which begins with ``place``, for a missing class or function
        and for arguments that it does not accept.
        """
        # A verifier's identity is part of the code below.
        in_code = {"user", "score"} if isinstance(self.score, EnvironmentVerifier) else {"user"}
        settings = settings_for_key(self, self.model_dump(exclude={*FREE, *in_code}))
        user = {} if self.user is None else {"user": self.user.identity()}
        return canonical(settings | user | {"code": dict(self._code(place))})

    def _sources(self) -> list[str]:
        values = (self.class_name, self.tools, self.verifiers, self.openenv)
        return [name for name, value in zip(SOURCES, values, strict=True) if value is not None]

    def _code(self, place: str) -> Iterator[tuple[str, str]]:
        """Yield what the environment is made of, and the digest or version of each."""
        if self.class_name is not None:
            yield "class", function_identity(self.class_name, f"{place}.class")
            check_class(self.class_name, self.arguments, METHODS, f"{place}.class")
            if self.user is not None and "step" in method_names(self.class_name, f"{place}.class"):
                raise two_answers(self.class_name, place)
        for index, path in enumerate(self.tools or []):
            yield f"tools[{index}]", function_identity(path, f"{place}.tools[{index}]")
            _check_function(path, f"{place}.tools[{index}]")
        if isinstance(self.score, str):
            yield "score", scoring_identity(self.score, self.arguments, f"{place}.score")
        elif self.score is not None:
            yield "score", self.score.identity()
        if self.verifiers is not None:
            require_extra("verifiers", "verifiers", f"{place}.verifiers:")
            yield "verifiers", importlib.metadata.version("verifiers")
            yield self.verifiers, _taskset_identity(self.verifiers, f"{place}.verifiers")
        if self.openenv is not None:
            require_extra("openenv", "openenv", f"{place}.openenv:")


def take_episode_tokens(config: Config) -> None:
    """Set a stage's ``max_tokens`` to the ``max_tokens`` of its ``environment``.

    A validator of a stage with both fields calls it. Raises ``ValueError`` if the stage sets another number.
    """
    environment: EnvironmentConfig | None = getattr(config, "environment", None)
    if environment is None:
        return
    tokens = environment.max_tokens
    limit = getattr(config, "max_tokens", None)
    if "max_tokens" in config.model_fields_set and limit != tokens:
        raise ValueError(
            f"max_tokens is {limit}, and environment.max_tokens {tokens}; an episode has one limit. Remove max_tokens "
            "here."
        )
    # Without a note that it was set: the file did not set it.
    config.__dict__["max_tokens"] = tokens


def two_answers(path: str, place: str) -> UserError:
    """Return the error for a class that has a ``step`` and a simulated user."""
    return UserError(
        f"{place}.user: {tool_name(path)} has a `step`, which answers the policy's messages as the user does; remove "
        "one of them."
    )


def tool_name(path: str) -> str:
    """Return the name by which the policy calls a function."""
    return path.rpartition(":")[2]


def _check_path(path: str) -> None:
    if not IMPORT_PATH.fullmatch(path):
        raise ValueError(f"'{path}' is not an import path; write it as package.module:name.{hint_nearest(path, SHORT)}")


def _check_function(path: str, place: str) -> None:
    """Raise ``UserError`` for a name that the source of its module does not define."""
    module, _, name = path.partition(":")
    tree = read_module(module, path, place)
    names = None if tree is None else top_level_names(tree)
    if names is not None and name not in names:
        raise UserError(f"{place} '{path}': {module} has no function '{name}'.{suggest(name, names)}")


def _taskset_identity(name: str, place: str) -> str:
    """Return the digest of an environment's code, or verifiers' version for an environment that it ships."""
    # The name may have an owner before it and a version behind it.
    module = name.rpartition("/")[2].partition("@")[0].replace("-", "_").lower()
    package = importlib.util.find_spec("verifiers")
    places = package.submodule_search_locations if package is not None else None
    if any(Path(place, "v1", "tasksets", module).exists() for place in places or ()):
        return "of verifiers"
    search_module_folders()
    try:
        is_there = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        is_there = False
    if not is_there:
        raise UserError(
            f"{place} '{name}': there is no module '{module}'; install the environment's package where align is "
            "installed, or put the module next to the YAML file."
        )
    return code_identity(module)


TOOL_FORMATS = ("hermes", "llama3", "mistral", "smollm3", "olmo3")
"""Formats that ``align.data.tool_calls`` parses."""
AUTO = "auto"
PATTERN_PREFIX = "regex:"
GROUPS = ("name", "arguments")
"""Groups that a pattern must have."""


def check_tool_format(name: str) -> None:
    """Raise ``ValueError`` for the name of no format, and for a pattern that cannot be used."""
    if name.startswith(PATTERN_PREFIX):
        compile_call_pattern(name.removeprefix(PATTERN_PREFIX))
    elif name not in (AUTO, *TOOL_FORMATS):
        raise ValueError(
            f"unknown format '{shorten(name)}'.{hint_nearest(name, [*TOOL_FORMATS, AUTO])} "
            f"Known are auto, {', '.join(TOOL_FORMATS)} and regex:PATTERN."
        )


def compile_call_pattern(pattern: str) -> Any:
    """Return a compiled pattern of the package regex, whose searches can have a time limit; ``.`` matches line breaks.

    Raises ``ValueError`` for an invalid pattern, a pattern without the groups ``name`` and ``arguments``, and a pattern
    that matches an empty text.
    """
    import regex

    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"'{shorten(pattern)}' is not a regular expression ({error}). Correct it; special characters such as [ and "
            "{ need a backslash."
        ) from None
    missing = [group for group in GROUPS if group not in compiled.groupindex]
    if missing:
        raise ValueError(
            f"'{shorten(pattern)}' has no group {' and no group '.join(missing)}. Write them as (?P<name>...) and "
            "(?P<arguments>...)."
        )
    if compiled.match(""):
        raise ValueError(f"'{shorten(pattern)}' matches an empty text, so that every turn would call.")
    return compiled
