"""Responses to prompts: what can be learned of each, their scores, and pairs of them. Torch-free."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.data.final_answers import AnswerText, split_thought
from align.data.rows import REQUIRED, Message, Row, assistant, kept_columns, write_rows
from align.data.steps.pairs import Answers, make_pairs
from align.environments.episode import Episode, answer_of, describe_episode, prompt_of, sampled_tokens
from align.inference.requests import Answer
from align.scoring.scored import Scorer
from align.store.fingerprint import canonical


@dataclass
class PromptResponses:
    """A prompt's row and the responses to it; ``scores`` and ``verdicts`` are filled in later, if there are any."""

    row: Row
    answers: list[Answer]
    scores: list[float | None] = field(default_factory=list)
    parts: dict[str, list[float | None]] = field(default_factory=dict)
    """Scores and metrics of each reward of a list, or of an environment, by name."""
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)
    """The episodes that the answers are the last turns of, if an environment played them."""
    tools: str = ""
    """JSON schemas of the environment's tools; empty for none."""

    @classmethod
    def of_episodes(cls, row: Row, episodes: list[Episode], tools: list[dict[str, Any]]) -> PromptResponses:
        """Return the responses of a row whose environment was played; their scores are the environment's."""
        answers = [
            Answer(
                text=episode.text,
                finished=episode.finished,
                completion_tokens=sampled_tokens(episode),
                error=episode.failure,
            )
            for episode in episodes
        ]
        schemas = json.dumps(tools, ensure_ascii=False) if tools else ""
        return cls(row, answers, episodes=episodes, tools=schemas)

    @property
    def usable(self) -> list[int]:
        """Places of the responses with text, and of the episodes that did not fail."""
        # Cut-off responses are usable here. Tasks with ``cut_off`` leave them out later.
        return [place for place in range(len(self.answers)) if not self.fault(place, "keep")]

    @property
    def begins_alike(self) -> bool:
        """True if the usable responses answer the same prompt: an environment may begin each of its episodes anew.

        Others cannot be compared by their scores.
        """
        prompts = [self.prompt(place) for place in self.usable] if self.episodes else []
        return all(prompt == prompts[0] for prompt in prompts)

    def fault(self, place: int, cut_off: str) -> str:
        """Return the reason why a response is unusable; empty for a usable one."""
        if self.episodes:
            return _episode_fault(self.episodes[place], cut_off)
        return _find_fault(self.answers[place], cut_off)

    def prompt(self, place: int) -> list[Message]:
        """Return the messages that a response answers: the row's, or those that the environment began with."""
        return prompt_of(self.episodes[place]) if self.episodes else list(self.row["prompt"])

    def completion(self, place: int, side: str = "completion") -> list[Message]:
        """Return the messages of a response. A malformed call is learned by no ``side`` but ``rejected``."""
        if not self.episodes:
            return [assistant(self.answers[place].text)]
        return answer_of(self.episodes[place], marks_malformed=side != "rejected")

    def answer_text(self, place: int) -> AnswerText:
        """Return the text after the thought, which is scored."""
        return self.episodes[place].answer_text if self.episodes else split_thought(self.answers[place].text)

    def ended(self, place: int) -> bool:
        """Return whether the last turn of a response has its end."""
        return self.episodes[place].turns[-1].finished if self.episodes else self.answers[place].finished

    def content(self, place: int) -> str:
        """Return the text that a response has in common with equal ones; for an episode its conversation as JSON."""
        return canonical(answer_of(self.episodes[place])) if self.episodes else self.answers[place].text

    def score_of(self, place: int) -> float:
        """Return the score of a usable response; scores must have been filled in."""
        score = self.scores[place]
        assert score is not None, "every usable response has a score"
        return score

    def to_json(self, split: str) -> dict[str, Any]:
        """Return a line of ``samples.jsonl``."""
        first = next(iter(self.usable), 0)
        line: dict[str, Any] = {
            "split": split,
            "id": self.row["id"],
            "prompt": self.prompt(first) or self.row["prompt"],
            "texts": [answer.text for answer in self.answers],
            "finished": [answer.finished for answer in self.answers],
            "tokens": [answer.completion_tokens for answer in self.answers],
        }
        if self.scores:
            line["scores"] = self.scores
        if self.parts:
            line["parts"] = self.parts
        if self.verdicts:
            line["verdicts"] = self.verdicts
        if self.episodes:
            line["episodes"] = [describe_episode(episode) for episode in self.episodes]
        return line


def _find_fault(answer: Answer, cut_off: str) -> str:
    """Return the reason why a response is unusable; empty for a usable one."""
    if answer.error:
        return "request failed"
    if answer.refused:
        return "refused by the endpoint"
    if not answer.text.strip():
        return "empty answer"
    if cut_off == "drop" and not answer.finished:
        return "cut off at max_tokens"
    return ""


def _episode_fault(episode: Episode, cut_off: str) -> str:
    """Return the reason why an episode is unusable; empty for a usable episode."""
    if episode.stop == "failed":
        return "episode failed"
    if cut_off == "drop" and episode.stop == "truncated":
        return "cut off at max_tokens"
    if cut_off == "drop" and episode.stop == "max_turns":
        return "cut off at max_turns"
    last = answer_of(episode)[-1]
    if not last["content"].strip() and not last.get("tool_calls"):
        return "empty answer"
    return ""


def prompt_fields(responses: PromptResponses, place: int = 0) -> Row:
    """Return the fields that a new row copies from the prompt's row, with the prompt that the response answers."""
    row = responses.row
    fields = {
        "id": row["id"],
        "source": row["source"],
        "prompt": responses.prompt(place),
        "checks": row["checks"] or "",
        **({"tools": responses.tools} if responses.tools else {}),
    }
    return fields | kept_columns(row)


def pair_sides(responses: PromptResponses, place: int) -> Answers:
    """Return the messages of a response on each side of a pair; none if the response makes no pair."""
    if responses.fault(place, "keep"):
        return Answers([], [])
    return Answers(responses.completion(place, "chosen"), responses.completion(place, "rejected"))


def score_all(prompts: list[PromptResponses], scorer: Scorer | None) -> None:
    """Fill in the scores of every usable response, and of each reward of a list, in one call for all prompts.

    Episodes have their environment's score. The score of a ``scorer``, which reads their last turns, is added to it.
    """
    usable = [(responses, place) for responses in prompts for place in responses.usable]
    for responses in prompts:
        responses.scores = [None] * len(responses.answers)
    _add_environment_scores(usable)
    if not usable or scorer is None:
        return
    # One call for all prompts, so a reward model fills its batches.
    scored = scorer.score(
        [responses.row for responses, _ in usable],
        [responses.answer_text(place) for responses, place in usable],
        [not responses.answers[place].finished for responses, place in usable],
    )
    columns = scored.columns()
    for index, (responses, place) in enumerate(usable):
        # What an environment scored stays, and the scorer's value is added to it.
        environment_score = responses.scores[place]
        total = scored.total[index] if environment_score is None else environment_score + scored.total[index]
        responses.scores[place] = total
        for name, values in columns.items():
            _put_part(responses, place, name, values[index])


def _add_environment_scores(usable: list[tuple[PromptResponses, int]]) -> None:
    for responses, place in usable:
        if responses.episodes:
            episode = responses.episodes[place]
            responses.scores[place] = episode.score
            for name, value in episode.parts.items():
                _put_part(responses, place, name, value)


def _put_part(responses: PromptResponses, place: int, name: str, value: float) -> None:
    column = responses.parts.setdefault(name, [None] * len(responses.answers))
    column[place] = value if math.isfinite(value) else None


def write_table(path: Path, rows: list[Row], columns: tuple[str, ...]) -> None:
    """Write rows as Parquet; without any rows, the file has the required columns and ``columns``."""
    import pyarrow.parquet as pq

    if rows:
        write_rows(path, rows)
        return
    # A table without rows still needs its columns, so write one row and drop it.
    blank: Row = {name: [] if name in ("prompt", *columns) else "" for name in (*REQUIRED, *columns)}
    write_rows(path, [blank])
    pq.write_table(pq.read_table(path).slice(0, 0), path)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write records as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def pair_responses(
    responses: PromptResponses,
    scores: dict[int, float],
    how: Literal["best_worst", "all"],
    seed: int,
    *,
    noise: float = 0.0,
    ties: list[Row] | None = None,
) -> tuple[list[Row], dict[str, int]]:
    """Pair the responses that have a score; the others are blanked, since empty texts make no pair."""
    places = range(len(responses.answers))
    texts = [responses.content(place) if place in scores else "" for place in places]
    values = [scores.get(place, 0.0) for place in places]
    are_finished = [place in scores and responses.ended(place) for place in places]
    answers = [pair_sides(responses, place) for place in places] if responses.episodes else None
    return make_pairs(
        [prompt_fields(responses, min(scores, default=0))],
        [texts],
        [values],
        how,
        noise=noise,
        seed=seed,
        finished=[are_finished],
        answers=None if answers is None else [answers],
        ties=ties,
    )
