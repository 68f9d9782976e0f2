"""Conversations of stored rollouts and evaluations, for exports to other projects' viewers. Torch-free.

A log has the conversations of one update of a stage, or of one system in one task of an evaluation. The sampled texts
are those that the store has, with their thoughts; token ids and numbers by token are not part of a log.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.compute as pc

from align.errors import UserError
from align.evaluation.scorecard import Estimate, Scorecard
from align.store.artifacts import Artifact, Kind
from align.store.rollouts import ROLLOUTS, VALIDATIONS, open_rollouts, rollout_files, rollout_rows

SAMPLES = "samples.jsonl"
PROMPT_SET = "prompts"
MEASURES = ("reward", "kl")
"""Fields of an answer in an evaluation that count as scores."""
COLUMNS = (
    *("update", "round", "split", "prompt_id", "prompt", "reference", "response", "score", "scores", "reasons"),
    *("explanation", "gold", "tokens", "finished", "learned", "kl", "thought_tokens"),
    *("messages", "calls", "turns", "turn_scores", "stop", "failure"),
)
"""Columns of stored rollouts that an export reads."""
FACTS = ("update", "round", "split", "tokens", "learned", "thought_tokens", "turns", "turn_scores", "stop")
"""Columns that become metadata."""

Message = dict[str, Any]
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Transcript:
    """One conversation with its scores."""

    id: str
    epoch: int
    """1 for the first response of the log to the prompt."""
    prompt: list[Message]
    messages: list[Message]
    """The whole conversation, which begins with the prompt."""
    response: str
    finished: bool
    target: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Reasons of the scores, by name."""
    facts: dict[str, Any] = field(default_factory=dict)
    stop: str = ""
    """End of an episode."""
    failure: str = ""


@dataclass(frozen=True)
class TranscriptLog:
    """Conversations that are shown together."""

    name: str
    task: str
    system: str
    """Stage whose checkpoint answered, or name of an evaluation's system."""
    artifact: Artifact
    transcripts: list[Transcript]
    update: int | None = None
    estimates: dict[str, Estimate] = field(default_factory=dict)
    """Estimates of an evaluation, by score."""

    def values(self) -> dict[str, list[float]]:
        """Return the scores by name, of the transcripts that have them."""
        values: dict[str, list[float]] = {}
        for transcript in self.transcripts:
            for name, score in transcript.scores.items():
                values.setdefault(name, []).append(score)
        return values

    def means(self) -> dict[str, float]:
        """Return the mean of each score."""
        return {name: fmean(values) for name, values in self.values().items()}


def read_logs(
    artifact: Artifact,
    *,
    validations: bool = False,
    updates: range | None = None,
    limit: int | None = None,
    notify: Notify | None = None,
) -> Iterator[TranscriptLog]:
    """Yield the logs of a stage that samples or evaluates; only one log is in memory.

    Args:
        artifact: A finished stage.
        validations: Read the responses to held-out prompts instead of those that the stage learned from.
        updates: Updates to read; by default all.
        limit: Highest number of conversations in a log.
        notify: Is told of tasks that store no answers.

    Raises:
        UserError: The stage has neither rollouts nor answers.
    """
    if artifact.kind == Kind.SCORECARD:
        if validations or updates is not None:
            raise UserError(f"{artifact.stage}: is an evaluation, which has no updates and no validations.")
        return _evaluation_logs(artifact, limit, notify or (lambda _: None))
    folder = artifact.path / (VALIDATIONS if validations else ROLLOUTS)
    if not rollout_files(folder):
        raise UserError(
            f"{artifact.stage}: stores no {folder.name}. Stages that sample store rollouts with `rollouts.keep` above "
            "0 and validations with `eval_updates`; stages of the kind `evaluate` store answers."
        )
    return _rollout_logs(artifact, folder, updates, limit)


# ---- rollouts ----


def _rollout_logs(
    artifact: Artifact, folder: Path, updates: range | None, limit: int | None
) -> Iterator[TranscriptLog]:
    data = open_rollouts(folder)
    stored = pc.unique(data.to_table(columns=["update"])["update"]).to_pylist()
    chosen = [update for update in stored if updates is None or update in updates]
    if not chosen:
        last = max((update for update in stored if update is not None), default=None)
        raise UserError(f"{artifact.stage}: has no update in that range; its last update is {last}.")
    for update in chosen:
        wanted = pc.field("update").is_null() if update is None else pc.field("update") == update
        epochs: dict[str, int] = {}
        transcripts: list[Transcript] = []
        for row in rollout_rows(data, COLUMNS, filter=wanted):
            if limit is not None and len(transcripts) >= limit:
                break
            epochs[row["prompt_id"]] = epochs.get(row["prompt_id"], 0) + 1
            transcripts.append(_read_rollout(row, epochs[row["prompt_id"]]))
        suffix = "" if update is None else f"-{update:06d}"
        name = f"{artifact.stage}-{folder.name}{suffix}"
        yield TranscriptLog(name, artifact.stage, artifact.stage, artifact, transcripts, update)


def _read_rollout(row: Mapping[str, Any], epoch: int) -> Transcript:
    prompt = _as_messages(row["prompt"])
    messages = row["messages"] or [*prompt, {"role": "assistant", "content": row["response"] or ""}]
    scores = {"score": row["score"], "gold": row["gold"], "kl": row["kl"], **(row["scores"] or {})}
    reasons = dict(row["reasons"] or {})
    for name, explanation in (row["explanation"] or {}).items():
        reasons.setdefault(name, explanation if isinstance(explanation, str) else json.dumps(explanation))
    facts = {name: row[name] for name in FACTS if row[name] is not None}
    return Transcript(
        id=row["prompt_id"],
        epoch=epoch,
        prompt=prompt,
        messages=messages,
        response=row["response"] or "",
        finished=bool(row["finished"]),
        target=row["reference"] or "",
        scores=_numbers(scores),
        reasons=reasons,
        facts=facts | _call_facts(row["calls"]),
        stop=row["stop"] or "",
        failure=row["failure"] or "",
    )


def _as_messages(prompt: Any) -> list[Message]:
    """Return a prompt, messages or a text, as messages."""
    if isinstance(prompt, list):
        return prompt
    return [{"role": "user", "content": "" if prompt is None else str(prompt)}]


def _call_facts(calls: Any) -> dict[str, Any]:
    """Return the calls of an episode with their results as metadata."""
    return {"calls": calls} if calls else {}


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores that are finite numbers."""
    numbers = {name: float(value) for name, value in scores.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


# ---- evaluations ----


def _evaluation_logs(artifact: Artifact, limit: int | None, notify: Notify) -> Iterator[TranscriptLog]:
    """Yield a log for each task and system."""
    card = Scorecard.read(artifact.path, artifact.stage)
    answered = set()
    for task, lines in groupby(_read_samples(artifact.path / SAMPLES), lambda line: str(line["task"])):
        # The two sides of a pair that reward models scored are not answers of systems.
        answers = [line for line in lines if "columns" not in line]
        systems = dict.fromkeys(name for line in answers for name in line["responses"])
        for system in systems:
            answered.add(task)
            yield TranscriptLog(
                name=f"{artifact.stage}-{task}-{system}",
                task=f"{artifact.stage}/{task}",
                system=system,
                artifact=artifact,
                transcripts=_read_answers(answers, system, limit),
                estimates=_task_estimates(card, task, system),
            )
    without = sorted({metric.task for metric in card.metrics.values()} - answered - {""})
    if without:
        notify(f"{', '.join(without)}: no answers are stored, so there is no log")
    if not answered:
        raise UserError(f"{artifact.stage}: its tasks store no answers; tasks that generate text do.")


def _read_samples(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); `align show KEY --verify` checks the artifact.") from None


def _task_estimates(card: Scorecard, task: str, system: str) -> dict[str, Estimate]:
    """Return the estimates of a task by score; metrics of a task are called ``task.metric``."""
    prefix = "" if task == PROMPT_SET else f"{task}."
    return {
        name.removeprefix(prefix): estimate
        for name, estimate in card.estimates.get(system, {}).items()
        if name in card.metrics and card.metrics[name].task == task
    }


def _read_answers(lines: list[dict[str, Any]], system: str, limit: int | None) -> list[Transcript]:
    transcripts: list[Transcript] = []
    for line in lines:
        for number, sample in enumerate(line["responses"].get(system, ()), start=1):
            if limit is not None and len(transcripts) >= limit:
                return transcripts
            transcripts.append(_read_answer(line, sample, number))
    return transcripts


def _read_answer(line: Mapping[str, Any], sample: Mapping[str, Any], number: int) -> Transcript:
    prompt = _as_messages(line["prompt"])
    columns = line.get("row") or {}
    scores = {**{name: sample.get(name) for name in MEASURES}, **(sample.get("scores") or {})}
    facts = {name: sample[name] for name in FACTS if name != "turns" and sample.get(name) is not None}
    explanation = sample.get("explanation") or {}
    return Transcript(
        id=str(line["id"]),
        epoch=number,
        prompt=prompt,
        messages=_conversation(prompt, sample),
        response=str(sample.get("text") or ""),
        finished=bool(sample.get("finished", True)),
        target=next((str(columns[name]) for name in ("answer", "reference") if columns.get(name)), ""),
        scores=_numbers(scores | (sample.get("parts") or {})),
        reasons={name: text if isinstance(text, str) else json.dumps(text) for name, text in explanation.items()},
        facts=facts | _call_facts(sample.get("calls")) | {"source": line.get("source")},
        stop=str(sample.get("stop") or ""),
        failure=str(sample.get("failure") or ""),
    )


def _conversation(prompt: list[Message], sample: Mapping[str, Any]) -> list[Message]:
    """Return all messages of a sample: of an episode, of a conversation of several turns, or of a single answer."""
    if sample.get("messages"):
        return list(sample["messages"])
    turns = sample.get("turns")
    if not isinstance(turns, list) or not turns:
        return [*prompt, {"role": "assistant", "content": str(sample.get("text") or "")}]
    messages = list(prompt)
    for number, turn in enumerate(turns):
        if number:
            messages.append({"role": "user", "content": turn["prompt"]})
        messages.append({"role": "assistant", "content": turn["text"]})
    return messages


# ---- calls ----


def read_calls(message: Message) -> list[Message]:
    """Return the calls of a message as ``name``, ``arguments`` (an object) and ``id`` if it has an id."""
    stored = message.get("tool_calls")
    if isinstance(stored, str):
        stored = _parse_json(stored)
    calls = []
    for call in stored if isinstance(stored, list) else []:
        inner = call.get("function", call) if isinstance(call, dict) else {}
        arguments = inner.get("arguments") if isinstance(inner, dict) else None
        if isinstance(arguments, str):
            arguments = _parse_json(arguments)
        # A model may write anything as the arguments.
        readable = arguments if isinstance(arguments, dict) else {"arguments": arguments}
        calls.append({"name": str(inner.get("name") or ""), "arguments": readable, "id": call.get("id")})
    return calls


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
