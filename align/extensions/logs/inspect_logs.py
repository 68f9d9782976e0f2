"""Writes transcripts as logs of inspect_ai (``.eval``), with its own classes and writer. Torch-free.

``inspect view --log-dir FOLDER`` shows them. A sample is a conversation, an epoch another response to the same prompt.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from align.data.final_answers import split_thought
from align.extensions.logs.transcripts import Message, Transcript, TranscriptLog, read_calls
from align.store.artifacts import VERSION
from align.store.json_files import atomic_draft

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalResults, EvalSample
    from inspect_ai.model import ChatMessage

SCORER = "align"
LIMITS = {"max_turns": ("turn", "turns"), "truncated": ("token", "tokens")}
"""End of an episode -> type of inspect's limit, and the fact that has its value."""


def write_inspect_log(log: TranscriptLog, folder: Path) -> Path:
    """Write a log into a folder and return its file. An existing file is replaced."""
    from inspect_ai.log import write_eval_log

    # Systems of an evaluation may have any name.
    path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', log.name)}-{log.artifact.key[:12]}.eval"
    with atomic_draft(path) as draft:
        write_eval_log(make_inspect_log(log), str(draft), format="eval")
    return path


def make_inspect_log(log: TranscriptLog) -> EvalLog:
    """Return the log as an object of inspect_ai. Equal transcripts give equal logs."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalPlan, EvalPlanStep, EvalSpec, EvalStats

    record = log.artifact.record
    identity = f"{log.name}-{log.artifact.key[:12]}"
    created = str(record["created"])
    metadata = {"stage": log.artifact.stage, "key": log.artifact.key, "pipeline": record.get("pipeline")}
    if log.update is not None:
        metadata["update"] = log.update
    samples = [_make_sample(transcript, log, identity) for transcript in log.transcripts]
    prompts = dict.fromkeys(transcript.id for transcript in log.transcripts)
    return EvalLog(
        status="success",
        eval=EvalSpec(
            eval_id=identity,
            run_id=log.artifact.key[:12],
            task_id=identity,
            created=created,
            task=log.task,
            model=f"align/{log.system}",
            dataset=EvalDataset(name=log.task, samples=len(prompts), sample_ids=list(prompts)),
            config=EvalConfig(epochs=max((transcript.epoch for transcript in log.transcripts), default=1)),
            packages={"align": VERSION},
            metadata=metadata,
        ),
        plan=EvalPlan(steps=[EvalPlanStep(solver=f"align/{record['kind']}")]),
        results=_make_results(log),
        stats=EvalStats(started_at=created, completed_at=created),
        samples=samples,
    )


def _make_results(log: TranscriptLog) -> EvalResults:
    """Return mean and standard error of each score, or the evaluation's estimate with its interval."""
    from inspect_ai.log import EvalMetric, EvalResults, EvalScore

    scores = []
    for name, values in log.values().items():
        numbers = {"mean": fmean(values)}
        if len(values) > 1:
            numbers["stderr"] = stdev(values) / math.sqrt(len(values))
        estimate = log.estimates.get(name)
        if estimate is not None:
            known = {"mean": estimate.value, "low": estimate.low, "high": estimate.high}
            numbers = {key: value for key, value in known.items() if value is not None}
        metrics = {key: EvalMetric(name=key, value=value) for key, value in numbers.items()}
        unscored = len(log.transcripts) - len(values)
        scores.append(
            EvalScore(name=name, scorer=SCORER, scored_samples=len(values), unscored_samples=unscored, metrics=metrics)
        )
    count = len(log.transcripts)
    return EvalResults(total_samples=count, completed_samples=count, scores=scores)


def _make_sample(transcript: Transcript, log: TranscriptLog, identity: str) -> EvalSample:
    from inspect_ai.log import EvalError, EvalSample, EvalSampleLimit
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput
    from inspect_ai.scorer import Score

    # Messages have ids that depend on their place only; inspect's own ids are random.
    message = ChatMessageAssistant(id="output", content=transcript.response)
    choice = ChatCompletionChoice(message=message, stop_reason="stop" if transcript.finished else "max_tokens")
    limit = None
    if transcript.stop in LIMITS:
        kind, fact = LIMITS[transcript.stop]
        limit = EvalSampleLimit(type=kind, limit=float(transcript.facts.get(fact) or 0))  # type: ignore[arg-type]
    error = EvalError(message=transcript.failure, traceback="", traceback_ansi="") if transcript.failure else None
    score = transcript.scores.items()
    return EvalSample(
        id=transcript.id,
        epoch=transcript.epoch,
        uuid=f"{identity}-{transcript.id}-{transcript.epoch}",
        input=_make_messages(transcript.prompt, "prompt"),
        target=transcript.target,
        messages=_make_messages(transcript.messages, "message"),
        output=ModelOutput(model=f"align/{log.system}", choices=[choice]),
        scores={name: Score(value=value, explanation=transcript.reasons.get(name)) for name, value in score},
        metadata=transcript.facts,
        limit=limit,
        error=error,
    )


def _make_messages(messages: list[Message], prefix: str) -> list[ChatMessage]:
    return [_make_message(message, f"{prefix}-{number}") for number, message in enumerate(messages)]


def _make_message(message: Message, identity: str) -> ChatMessage:
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageTool, ChatMessageUser

    role = message.get("role")
    text = str(message.get("content") or "")
    if role == "assistant":
        calls = [_make_call(call, f"{identity}-{n}") for n, call in enumerate(read_calls(message))]
        return ChatMessageAssistant(id=identity, content=_make_content(message, text), tool_calls=calls or None)
    if role == "tool":
        return ChatMessageTool(
            id=identity, content=text, tool_call_id=message.get("tool_call_id"), function=message.get("name")
        )
    if role in ("system", "developer"):
        return ChatMessageSystem(id=identity, content=text)
    return ChatMessageUser(id=identity, content=text)


def _make_content(message: Message, text: str) -> Any:
    """Return the text of the model, with its thought as a separate part."""
    from inspect_ai.model import ContentReasoning, ContentText

    answer = split_thought(text)
    thought = str(message.get("reasoning_content") or "") or answer.thought
    if not thought:
        return text
    return [ContentReasoning(reasoning=thought), ContentText(text=str(answer))]


def _make_call(call: Message, identity: str) -> Any:
    from inspect_ai.tool import ToolCall

    return ToolCall(id=str(call.get("id") or identity), function=call["name"], arguments=call["arguments"])
