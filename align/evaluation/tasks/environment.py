"""Episodes in an environment: how often a system succeeds, and how it gets there.

An environment scores its own episodes. A success is an episode whose score, or a part of it, reaches a bound. If its
environment failed, an episode is no success and has no score: it counts only in ``success``, pass@k and
``failure_rate``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.environment import SimulatedUserConfig
from align.config.stages.evaluation.tasks import EnvironmentTaskConfig
from align.config.validation import suggest
from align.data.rows import Message, read_rows, user
from align.data.tool_calls import tool_call_format
from align.environments.environment import EnvironmentSource
from align.environments.episode import Episode
from align.environments.sources import open_environment
from align.environments.turn_template import TurnTemplate
from align.errors import UserError, shorten
from align.evaluation.answers import Episodes, EpisodeSet, Item, Measured, Values
from align.evaluation.judge import warn_if_unreachable
from align.evaluation.scorecard import Metric
from align.evaluation.tasks.base import Task, TaskInputs
from align.evaluation.tasks.records import TaskRecord, describe_records, draw, file_identities, item_ids
from align.evaluation.tasks.records import load_records as load_file_records
from align.store.fingerprint import canonical

if TYPE_CHECKING:
    from align.evaluation.participants import Performer
    from align.evaluation.scoring import ScoringContext

SUCCESS = "success"
SCORE = "score"
FAILURES = "failure_rate"
TURNS = "turns"
CALLS = "calls"
TOOL_ERRORS = "tool_errors"
PART_SUCCESS = 1.0
"""Value of a part from which on it is a success."""
ROUNDING = 1e-9
"""A sum of parts reaches a bound that it misses only by rounding."""
PLACE = "environment"
NEEDED_NOW = "It plays the user of episodes: start it now, unless all of them are cached."
SOURCE = "rows"
"""Source of rows that name none."""


def build(name: str, config: EnvironmentTaskConfig, inputs: TaskInputs) -> EnvironmentTask:
    """Build the task from its rows, and import and check the environment.

    Raises ``UserError`` for an environment that cannot be opened, and for rows that it could not get.
    """
    source = open_environment(config.environment, PLACE)
    task = EnvironmentTask(name, config, load_records(config, inputs), source, inputs)
    _check_user(task, config.environment.user, inputs)
    return task


def _check_user(task: EnvironmentTask, user: SimulatedUserConfig | None, inputs: TaskInputs) -> None:
    """Raise ``UserError`` for a simulated user that cannot answer; warn of a server that does not yet."""
    if user is None:
        return
    place = f"{PLACE}.user"
    for row in task.rows:
        user.system_message(row, place)
    if user.endpoint is not None:
        warn_if_unreachable(user.endpoint, f"tasks.{task.name}.{place}.endpoint", inputs.warn, NEEDED_NOW)
    else:
        from align.environments.user_models import read_template

        read_template(inputs.users[str(user.model)].model, f"{place}.model")


def identities(config: EnvironmentTaskConfig, base: Path) -> dict[str, str]:
    """Return digests of the files, and the environment's settings with the digest of its code.

    The user's checkpoint goes by its name, which is a label of the stage's ``users``.
    """
    digests = file_identities(config, base) | {PLACE: config.environment.identity(PLACE)}
    user = config.environment.user
    return digests if user is None or user.model is None else digests | {f"{PLACE}.user.model": user.model}


def load_records(config: EnvironmentTaskConfig, inputs: TaskInputs) -> list[TaskRecord]:
    """Return the rows, at most ``max_items``, of files or of a stage's ``test`` split."""
    if config.rows is None:
        return load_file_records(config, inputs.base, inputs.seed)
    path = inputs.rows[config.rows].split("test")
    records = [TaskRecord(f"{config.rows}: {row['id']}", row) for row in read_rows(path)]
    if not records:
        raise UserError(f"rows: {path} has no rows; give its stage a test split (test_size above 0).")
    return draw(records, config.max_items, inputs.seed)


class EnvironmentTask(Task):
    """The rows, and the environment that episodes of them are played in."""

    kind = "environment"
    plays = True
    primary = SUCCESS

    def __init__(
        self,
        name: str,
        config: EnvironmentTaskConfig,
        records: list[TaskRecord],
        source: EnvironmentSource,
        inputs: TaskInputs,
    ) -> None:
        self.name = name
        self.title = f"Episodes in {config.environment.label}"
        self.metrics = describe_metrics(config, has_tools=bool(source.tools))
        self._config = config
        ids = item_ids(records, "id")
        self.rows = rows = [_row(id, record) for id, record in zip(ids, records, strict=True)]
        self.items = [Item(id, row["source"], _shown_prompt(row)) for id, row in zip(ids, rows, strict=True)]
        if config.rows is None:
            self._data = describe_records(config, inputs.base)
        else:
            self._data = {"rows": config.rows, "max_items": config.max_items}
        self.episode_count = len(rows) * config.samples
        user = config.environment.user
        checkpoint = None if user is None or user.model is None else inputs.users[user.model]
        # The settings give the user's checkpoint only by name, so its weights are added to the identity.
        identity = config.environment.identity(PLACE)
        self.episode_set = EpisodeSet(
            task=name,
            environment=config.environment,
            source=source,
            identity=identity if checkpoint is None else canonical([identity, checkpoint.weights]),
            rows=rows,
            ids=ids,
            samples=config.samples,
            temperature=config.temperature,
            seed=inputs.seed,
            user_dir=None if checkpoint is None else checkpoint.model,
        )

    def settings(self) -> dict[str, Any]:
        """Return data, the environment with its limits, what counts as a success, and sampling."""
        environment = self._config.environment
        return {
            "data": self._data,
            "environment": environment.model_dump(mode="json", by_alias=True, exclude_defaults=True),
            "success": self._config.success,
            "sampling": {
                "temperature": self._config.temperature,
                "samples": self._config.samples,
                "seed": self.episode_set.seed,
            },
        }

    def check_checkpoint(self, tokenizer: Any, max_length: int, where: str) -> None:
        """Refuse a chat template without a place for the tools, and an episode that is longer than the engine."""
        environment = self._config.environment
        tools = self.episode_set.source.tools
        turns = TurnTemplate(tokenizer, tools or None, where)
        if tools:
            tool_call_format(environment.tool_format, turns.template)
        if environment.max_tokens >= max_length:
            raise UserError(
                f"environment.max_tokens is {environment.max_tokens}, and the engine holds {max_length} tokens, those "
                "of the prompt included. Lower it, or raise max_context where the checkpoint has more positions."
            )

    def play(self, performer: Performer) -> Episodes:
        """Have one system play."""
        episodes = performer.play(self.episode_set)
        # Now, and not when the last system has played.
        self._check_success(episodes)
        return episodes

    def _check_success(self, episodes: Episodes) -> None:
        """Raise ``UserError`` if ``success`` names no part of the scores."""
        name = self._config.success
        if not isinstance(name, str):
            return
        scored = [episode for samples in episodes for episode in samples if not math.isnan(episode.score)]
        parts = dict.fromkeys(part for episode in scored for part in episode.parts)
        if scored and name not in parts:
            listed = f"Its parts are {', '.join(parts)}." if parts else "It has no parts; name a number instead."
            raise UserError(
                f"tasks.{self.name}: success '{name}' is no part of the environment's score. {listed}"
                f"{suggest(name, parts)}"
            )

    def score_episodes(self, episodes: Mapping[str, Episodes], context: ScoringContext) -> dict[str, Measured]:
        """Return success, pass@k, score and counts of every episode; warn of environments that failed."""
        measured = {}
        for system, per_row in episodes.items():
            played = [episode for samples in per_row for episode in samples]
            failed = [episode for episode in played if episode.stop == "failed"]
            if failed:
                context.warn(
                    f"{self.name}: {len(failed)} of {len(played)} episodes of {system} failed, and count as no "
                    f"success; the first in {shorten(failed[0].failure, 300)}"
                )
            measured[system] = Measured(self._values(per_row), notes=count_ends(played))
        return measured

    def _values(self, episodes: Episodes) -> dict[str, Values]:
        successes = _each(episodes, self._is_success)
        values = {
            SUCCESS: successes,
            # An environment that failed has no score; its row's other episodes have scores.
            SCORE: [[episode.score for episode in samples if not math.isnan(episode.score)] for samples in episodes],
            TURNS: _each(episodes, lambda episode: len(episode.turns)),
            CALLS: _each(episodes, lambda episode: len(episode.calls)),
            TOOL_ERRORS: _each(episodes, lambda episode: sum(bool(call.error) for call in episode.calls)),
            FAILURES: _each(episodes, lambda episode: episode.stop == "failed"),
        }
        for k in powers_of_two(self._config.samples):
            values[pass_name(k)] = [[pass_at(k, len(samples), round(sum(samples)))] for samples in successes]
        return {name: values[name] for name in self.metrics}

    def _is_success(self, episode: Episode) -> bool:
        if episode.stop == "failed" or math.isnan(episode.score):
            return False
        success = self._config.success
        if isinstance(success, str):
            return episode.parts.get(success, -math.inf) >= PART_SUCCESS - ROUNDING
        return episode.score >= success - ROUNDING


def describe_metrics(config: EnvironmentTaskConfig, has_tools: bool) -> dict[str, Metric]:
    """Return the metrics of a task, in the order shown. Metrics of calls need an environment with tools."""
    bound = f"{config.success} of 1 or more" if isinstance(config.success, str) else f"a score from {config.success:g}"
    metrics = {SUCCESS: Metric("success rate", "higher", "", f"share of episodes that end with {bound}")}
    for k in powers_of_two(config.samples):
        metrics[pass_name(k)] = Metric(
            f"pass@{k}", "higher", "", f"probability that one of {k} episodes is a success (arXiv 2107.03374)"
        )
    metrics[SCORE] = Metric("score", "higher", "", "the environment's score, over episodes that it did not fail in")
    metrics[TURNS] = Metric("turns", None, "", "turns of the policy in an episode")
    if has_tools:
        metrics[CALLS] = Metric("calls", None, "", "calls of tools in an episode")
        metrics[TOOL_ERRORS] = Metric(
            "tool errors", "lower", "", "calls in an episode that cannot be read, have wrong arguments, or raise"
        )
    metrics[FAILURES] = Metric("failure rate", "lower", "", "share of episodes in which the environment failed")
    return metrics


def powers_of_two(samples: int) -> list[int]:
    """Return the k of pass@k: 2, 4, 8, … up to the number of samples. pass@1 is the success rate."""
    return [1 << power for power in range(1, samples.bit_length())]


def pass_at(k: int, samples: int, successes: int) -> float:
    """Probability that any of ``k`` samples succeeds, estimated without bias from the successes among ``samples``.

    The share of sets of k samples with a success in them (Chen et al. 2021, arXiv 2107.03374, eq. 1).
    """
    if not 1 <= k <= samples or not 0 <= successes <= samples:
        raise ValueError(f"pass@{k} of {successes} successes in {samples} samples is not defined")
    return 1 - math.comb(samples - successes, k) / math.comb(samples, k)


def pass_name(k: int) -> str:
    """Return the name of pass@k as gates spell it."""
    return f"pass_at_{k}"


def count_ends(episodes: Sequence[Episode]) -> dict[str, int]:
    """Count the episodes, how they ended, and their calls that could not be read."""
    return {
        "episodes": len(episodes),
        "truncated": sum(episode.stop == "truncated" for episode in episodes),
        "max_turns": sum(episode.stop == "max_turns" for episode in episodes),
        "failed": sum(episode.stop == "failed" for episode in episodes),
        "malformed_calls": sum(call.error == "malformed" for episode in episodes for call in episode.calls),
    }


def _each(episodes: Episodes, measure: Callable[[Episode], float]) -> Values:
    return [[float(measure(episode)) for episode in samples] for samples in episodes]


def _row(id: str, record: TaskRecord) -> dict[str, Any]:
    """Return a record as the environment's ``reset`` gets it, with a prompt of messages if it has one.

    Raises ``UserError`` for a prompt of another type, and for values that JSON cannot hold: processes and journals pass
    rows on as JSON.
    """
    row = {**record, "id": id, "source": str(record.get("source") or SOURCE)}
    for field in record:
        try:
            json.dumps(record[field], allow_nan=False)
        except (TypeError, ValueError):
            raise record.field_error(field, "a value that JSON has") from None
    if record.get("prompt") is None:
        row.pop("prompt", None)
    elif isinstance(record["prompt"], str):
        row["prompt"] = [user(record.text("prompt"))]
    elif record.messages("prompt") is None:
        raise record.field_error("prompt", "text or messages, each with role and content")
    return row


def _shown_prompt(row: Mapping[str, Any]) -> list[Message]:
    """Return what a row asks, for the reader of samples: its prompt, or all of it if only the environment knows."""
    if "prompt" in row:
        return list(row["prompt"])
    return [user(json.dumps({name: value for name, value in row.items() if name != "source"}, ensure_ascii=False))]
