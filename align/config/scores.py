"""The fields ``score:`` and ``metrics:``, by which stages score responses: functions and weighted rewards. Torch-free.

Leaves out the scoring itself (``align.scoring``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from align.config.base import Config, stage_input
from align.config.endpoint import RewardJudge, Seconds
from align.config.user_functions import SHORT, check_arguments, function_identity
from align.config.verifiers import VERIFIERS, VerifierFields
from align.store.artifacts import GENERATORS, Kind
from align.store.fingerprint import canonical

SOURCES = ("function", "judge", "reward", *VERIFIERS)
"""Fields of an entry, of which it has exactly one."""
FUNCTION_SECONDS = 1800.0
"""Default time limit of a call of a function that scores."""
RESERVED = frozenset({"length_correlation", "std"})
"""Names of other metrics that are logged next to the scores, whose names are ``score_<name>``."""
PART_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}")
NAME_RULE = (
    "a name has letters, digits, '_', '.' and '-', is neither 'std' nor 'length_correlation', and does not end with "
    "'_square'"
)
"""Description of the names that ``is_metric_name`` accepts, for messages."""


class ScoreJudge(RewardJudge):
    """A judge of responses: an endpoint, or the checkpoint of a stage, which is a generative reward model."""

    model: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint judges, instead of ``endpoint``. transformers samples it in the stage's own process."""

    @model_validator(mode="after")
    def _check_endpoint(self) -> Self:
        if self.endpoint is None and self.model is None:
            raise ValueError(
                "names no endpoint; write `endpoint: {url: ..., model: ...}`, or `model: STAGE` for a checkpoint."
            )
        if self.endpoint is not None and self.model is not None:
            raise ValueError("has endpoint and model, and one of them judges; remove the other.")
        return self


class RewardEntry(VerifierFields):
    """One reward of a list: a verifier, a function, an endpoint that judges, or a reward stage."""

    function: str | None = None
    """Function that scores responses: ``gold``, ``gsm8k_answer``, or an import path ``module:name``; sync or async."""
    judge: ScoreJudge | None = None
    """OpenAI-compatible server, or a stage's checkpoint, that grades responses or decides on ``criteria``."""
    reward: stage_input(Kind.REWARD) | None = None  # type: ignore[valid-type]
    """Reward stage whose checkpoint scores responses."""
    weight: float = 1.0
    """Factor of this reward in the sum. 0 logs it without any effect; negative values punish."""
    name: str | None = Field(None, pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,63}$")
    """Name in logs, curves and samples; by default the function's or the stage's name, the
    verifier's kind, or ``judge``."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the function in addition to rows and responses."""
    concurrency: int = Field(16, ge=1, le=4096)
    """Concurrent calls of an async function that accepts one response."""
    retries: int = Field(0, ge=0, le=20)
    """Further calls of a function of one response after an exception, after 1 s, 2 s, 4 s and so on; further requests
    to a judge of ``criteria`` whose reply cannot be read, at once."""
    on_error: Literal["stop"] | float = "stop"
    """Score of a response whose calls of the function all raised an exception, or whose judge gave no readable reply on
    ``criteria``. ``stop`` ends the stage instead; on ``criteria``, if more than ``judge.max_unreadable`` of the replies
    cannot be read, and it scores each of them as if only penalties were satisfied."""

    timeout: Seconds = Field(FUNCTION_SECONDS, gt=0)
    """Seconds that a call of the function may need, for one response or for a batch; ``30s`` and ``15m`` are times as
    well. A call that needs more has failed, as by an exception."""
    steps: str | None = Field(None, min_length=1)
    """Text between two steps of a response, such as two line feeds. The function then returns a list with a score for
    each step, which ``ppo`` places on the step's last token. The score of the response is their sum."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        sources = [name for name in SOURCES if getattr(self, name) is not None]
        if self.criteria is not None and self.judge is not None:
            sources.remove("judge")
        if len(sources) != 1:
            listed = f"has {' and '.join(sources)}" if sources else f"has none of {', '.join(SOURCES)}"
            raise ValueError(f"{listed}; a reward comes from exactly one of them.")
        if self.function is None and self.arguments:
            raise ValueError(f"arguments are for a function, and this is a {sources[0]}; remove them.")
        if sources[0] not in ("function", "criteria") and (self.retries or self.on_error != "stop"):
            raise ValueError(
                f"retries and on_error are for a function or criteria, and this is a {sources[0]}; remove them."
            )
        for name in self.changed("steps", "timeout") if self.function is None else []:
            remedy = "set judge.endpoint.timeout" if name == "timeout" and sources[0] == "judge" else "remove it"
            raise ValueError(f"{name} is for a function, and this is a {sources[0]}; {remedy}.")
        if is_reserved(self.label):
            raise ValueError(f"the name '{self.label}' is taken by another metric; set another `name`.")
        return self

    @property
    def label(self) -> str:
        """Name in logs, curves and samples."""
        if self.name is not None:
            return self.name
        if self.function is not None:
            return self.function.rpartition(":")[2]
        return str(self.reward) if self.reward is not None else self.verifier or "judge"

    @property
    def fallback(self) -> float | None:
        """Score of a response whose calls failed; None to end the stage."""
        return None if self.on_error == "stop" else self.on_error

    def identity(self, place: str) -> str:
        """Return everything that the reward of a response depends on, as JSON.

        Rates, retries and costs of a judge do not change it. Raises ``UserError``, which begins with ``place``, for a
        missing function and for arguments that it does not accept.
        """
        source: dict[str, Any] = {}  # a reward stage is an input of the stage, whose key is part of the key
        if self.function is not None:
            source = {"function": scoring_identity(self.function, self.arguments, place)}
        elif self.verifier is not None:
            source = {"verifier": self.verifier_identity()}
        elif self.judge is not None:
            source = {"judge": self.judge.identity()}
        fields: dict[str, Any] = {"name": self.label, "weight": self.weight}
        if self.fallback is not None:
            fields["on_error"] = self.fallback
        if self.steps is not None:
            fields["steps"] = self.steps
        if self.criteria is not None and self.retries:
            fields["retries"] = self.retries
        return canonical(fields | source | ({"arguments": self.arguments} if self.arguments else {}))


def is_metric_name(name: Any) -> bool:
    """Return True for a name that a function or an environment may give a metric in addition to its score."""
    return isinstance(name, str) and PART_NAME.fullmatch(name) is not None and not is_reserved(name)


def is_reserved(name: str) -> bool:
    """Return True for a name that no component of a score may have, since another metric would be mistaken for it."""
    return name in RESERVED or name.endswith("_square")


def _check_names(score: str | list[RewardEntry] | None) -> str | list[RewardEntry] | None:
    """Check that no two rewards have the same name."""
    labels = reward_names(score)
    for index, label in enumerate(labels):
        if label in labels[:index]:
            raise ValueError(
                f"two rewards are called '{label}' ([{labels.index(label)}] and [{index}]); set another `name` for one "
                "of them."
            )
    return score


Score = Annotated[str | Annotated[list[RewardEntry], Field(min_length=1)] | None, AfterValidator(_check_names)]
"""Type of the field ``score``: a function as a text, a list of rewards, or None."""


def reward_names(score: str | list[RewardEntry] | None) -> list[str]:
    """Return the names of a list's rewards; none for a single function, whose score is the stage's."""
    return [entry.label for entry in score] if isinstance(score, list) else []


def verifier_kinds(config: Any) -> dict[str, str]:
    """Return the kinds of the verifiers of a stage that scores, by their names in metrics.

    The verifier of an environment has no name of its own.
    """
    entries = config.score if isinstance(config.score, list) else []
    kinds = {entry.label: entry.verifier for entry in entries if entry.verifier is not None}
    score = getattr(getattr(config, "environment", None), "score", None)
    return kinds | ({"": str(score.verifier)} if isinstance(score, VerifierFields) else {})


def score_identities(score: str | list[RewardEntry] | None) -> dict[str, str]:
    """Return the identities of all that scores, for a stage's key.

    Raises ``UserError`` for a missing function and for arguments that it does not accept.
    """
    if score is None:
        return {}
    if isinstance(score, str):
        return {"score": scoring_identity(score, {}, "score")}
    return {f"score[{index}]": entry.identity(f"score[{index}]") for index, entry in enumerate(score)}


def describe_score(score: str | list[RewardEntry] | None) -> str:
    """Return what scores, for messages: the function, or the names of the list's rewards."""
    return score if isinstance(score, str) else ", ".join(reward_names(score))


def scoring_identity(path: str, arguments: dict[str, Any], place: str) -> str:
    """Return the identity of a function that scores.

    Raises ``UserError``, which begins with ``place``, for a missing function and for arguments that it does not accept.
    """
    identity = function_identity(path, place)
    # Functions with a short name have no arguments in YAML, so their source is not read.
    if path not in SHORT or arguments:
        check_arguments(path, arguments, place)
    return identity


METRIC_NAME = r"^[A-Za-z][A-Za-z0-9_-]{0,63}$"


class MetricFunction(VerifierFields):
    """A function or a verifier that scores responses, as a metric of the scorecard."""

    function: str | None = None
    """``gold``, or ``package.module:function``."""
    name: str | None = Field(None, pattern=METRIC_NAME)
    """Name of the metric; by default the function's, or the verifier's kind."""
    better: Literal["higher", "lower"] = "higher"
    """Scores that are better."""
    arguments: dict[str, Any] = Field({})
    """Keyword arguments for the function in addition to rows and responses."""

    keyed_when_set: ClassVar[frozenset[str]] = VerifierFields.verifier_fields | {"arguments"}
    unkeyed: ClassVar[frozenset[str]] = frozenset({"criteria", "judge"})

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        sources = [name for name in ("function", *VERIFIERS) if getattr(self, name) is not None]
        if len(sources) != 1:
            listed = f"has {' and '.join(sources)}" if sources else f"has none of function, {', '.join(VERIFIERS)}"
            raise ValueError(f"{listed}; a metric comes from exactly one of them.")
        if self.judge is not None and self.criteria is None:
            raise ValueError("judge is for criteria, and there are none; remove it, or write `criteria`.")
        if self.function is None and self.arguments:
            raise ValueError(f"arguments are for a function, and this is {sources[0]}; remove them.")
        return self

    @property
    def metric(self) -> str:
        """Name in the scorecard, in gates and on the page."""
        return self.name or (self.function or str(self.verifier)).rpartition(":")[2]

    def identity(self, place: str) -> str:
        """Return everything that the metric depends on; raises ``UserError`` as ``scoring_identity`` does."""
        if self.function is None:
            return canonical(self.verifier_identity())
        return scoring_identity(self.function, self.arguments, place)


MetricFunctions = str | Sequence[str | MetricFunction]
"""One function or several."""


def metric_functions(score: MetricFunctions | None) -> list[MetricFunction]:
    """Return the functions of a ``score`` setting, in order; none for None."""
    entries: Sequence[str | MetricFunction] = [score] if isinstance(score, str) else score or []
    return [MetricFunction(function=entry) if isinstance(entry, str) else entry for entry in entries]


CheckName = Literal[
    "reference", "empty", "other", "prompt", "wrong", "hedged", "long", "row", "twice", "answer_matters"
]
"""Checks of a score, as ``waive`` names them."""


class ScoreValidation(Config):
    """Validation of the score on a sample of rows before a model is loaded (docs/rewards.md).

    It changes no result, so it is in no key. Reward models are not validated; ``reward_floor`` checks them.
    """

    floor: float = Field(0.9, ge=0, le=1)
    """Share of rows that must pass a check. 0 only shows the table, and never refuses."""
    rows: int = Field(32, ge=0, le=10_000)
    """Rows to validate on, spread over the data, plus up to 6 for each form of answer (``1,080``, ``-4``, ``3/4``);
    0 for no validation."""
    judge_rows: int = Field(8, ge=0, le=10_000)
    """Rows to ask judges about, with five requests a row; 0 asks no judge."""
    reference: str | None = Field(None, min_length=1)
    """Column with the row's right answer, or ``checks.answer`` for an entry of one. By default the completion, else the
    column ``answer``, else ``checks.answer``, else the chosen answer of a pair."""
    waive: list[CheckName] = Field([])
    """Checks that are shown, but refuse nothing (docs/rewards.md)."""
