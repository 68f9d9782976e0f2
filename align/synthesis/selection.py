"""Selection of rows from several responses to each prompt: all different ones, or the best. Torch-free.

``run.py`` samples the responses; ``pairing.py`` makes preference pairs of them. The ledger has counts that add up, and
every dropped text with its reason.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.stages.synthesize import BestOfTask, ResponsesTask
from align.data.builds.ledger import EXAMPLES, Tally
from align.data.final_answers import AnswerText, split_thought
from align.data.rows import REQUIRED, Message, Row, assistant, kept_columns, write_rows
from align.data.steps.pairs import Answers
from align.data.steps.split import group, share
from align.environments.episode import Episode, answer_of, describe_episode, prompt_of, sampled_tokens
from align.inference.requests import Answer
from align.scoring.scored import Scorer
from align.store.fingerprint import canonical

ROWS, ANSWERS = "prompts", "answers"
OTHER_BEGINNINGS = "episodes begin differently"
"""Reason to drop a prompt whose responses cannot be compared."""


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


def usable_places(responses: PromptResponses, cut_off: str, ledger: Ledger) -> list[int]:
    """Return the places of the usable responses; the ledger counts the others as dropped."""
    usable = []
    for place, answer in enumerate(responses.answers):
        ledger.add(ANSWERS)
        reason = responses.fault(place, cut_off)
        if reason:
            ledger.drop(ANSWERS, reason, f"{responses.row['id']} answer {place}", answer.text, error=answer.error)
        else:
            usable.append(place)
    return usable


def _distinct(responses: PromptResponses, places: list[int], ledger: Ledger) -> list[int]:
    """Return the places without repeated texts; the ledger counts the repeats as dropped."""
    texts: set[str] = set()
    distinct = []
    for place in places:
        content = responses.content(place).strip()
        if content in texts:
            text = responses.answers[place].text.strip()
            ledger.drop(ANSWERS, "same as another answer", f"{responses.row['id']} answer {place}", text)
        else:
            texts.add(content)
            distinct.append(place)
    return distinct


def select_all(task: ResponsesTask, prompts: list[PromptResponses], ledger: Ledger) -> list[Row]:
    """Return every different response as a row."""
    rows = []
    for responses in prompts:
        ledger.add(ROWS)
        places = _distinct(responses, usable_places(responses, task.cut_off, ledger), ledger)
        if not places:
            ledger.drop(ROWS, "no answer of use", responses.row["id"])
            continue
        ledger.keep(ROWS)
        ledger.keep(ANSWERS, len(places))
        rows += [_instruction(responses, place, task.n > 1) for place in places]
    return rows


def _instruction(responses: PromptResponses, place: int, numbered: bool) -> Row:
    fields = prompt_fields(responses, place)
    name = f"{fields['id']}-{place}" if numbered else fields["id"]
    answer = {"completion": responses.completion(place), "completion_finished": responses.ended(place)}
    return {**fields, "id": name, **answer}


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


def select_best(task: BestOfTask, prompts: list[PromptResponses], ledger: Ledger) -> list[Row]:
    """Return the best ``keep`` different responses of each prompt, earlier ones first among equals.

    Scores must have been filled in. A prompt whose responses are all the same is dropped, since there was no choice.
    """
    rows = []
    for responses in prompts:
        ledger.add(ROWS)
        usable = usable_places(responses, task.cut_off, ledger)
        contents = {responses.content(place).strip() for place in usable}
        if not usable or (len(usable) > 1 and len(contents) == 1):
            drop_prompt(responses, usable, ledger, "all answers the same" if usable else "no answer of use")
            continue
        if not responses.begins_alike:
            drop_prompt(responses, usable, ledger, OTHER_BEGINNINGS)
            continue
        ranked = sorted(_distinct(responses, usable, ledger), key=lambda place: (-responses.score_of(place), place))
        # The order is by score, so the eligible responses come first.
        eligible = [place for place in ranked if task.min_score is None or responses.score_of(place) >= task.min_score]
        selected = eligible[: task.keep]
        for place in ranked:
            if place not in selected:
                reason = "not among the best" if place in eligible else "score below min_score"
                where = f"{responses.row['id']} answer {place}"
                ledger.drop(ANSWERS, reason, where, responses.answers[place].text, score=responses.score_of(place))
        if not selected:
            best = ranked[0]
            ledger.drop(
                ROWS,
                "no score reaches min_score",
                responses.row["id"],
                responses.answers[best].text,
                best=responses.score_of(best),
            )
            continue
        ledger.keep(ROWS)
        ledger.keep(ANSWERS, len(selected))
        for place in selected:
            rows.append({**_instruction(responses, place, task.keep > 1), "score": responses.score_of(place)})
    return rows


def drop_prompt(responses: PromptResponses, usable: list[int], ledger: Ledger, reason: str) -> None:
    """Count a prompt without a choice as dropped, with its usable responses."""
    for place in usable:
        ledger.drop(ANSWERS, reason, f"{responses.row['id']} answer {place}", responses.answers[place].text)
    ledger.drop(ROWS, reason, responses.row["id"], responses.answers[usable[0]].text if usable else "")


EXCERPT = 200
"""Characters of a dropped text in the ledger."""


class Ledger:
    """Counts by level (``prompts``, ``responses``, ``comparisons``, ...): everything added is kept or dropped."""

    def __init__(self) -> None:
        self.tallies: dict[str, Tally] = {}
        self.dropped: list[dict[str, Any]] = []
        self.notes: Counter[str] = Counter()
        self._examples: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)

    def add(self, level: str, count: int = 1) -> None:
        """Count inputs."""
        self.tallies.setdefault(level, Tally()).rows_in += count

    def keep(self, level: str, count: int = 1) -> None:
        """Count outputs."""
        self.tallies.setdefault(level, Tally()).rows_out += count

    def drop(self, level: str, reason: str, where: str, text: str = "", **detail: Any) -> None:
        """Count an input that is dropped; ``where`` names it."""
        self.tallies.setdefault(level, Tally()).dropped[reason] += 1
        self.dropped.append({"level": level, "reason": reason, "where": where, "text": text, "detail": detail})
        examples = self._examples[level, reason]
        if len(examples) < EXAMPLES:
            excerpt = text if len(text) <= EXCERPT else f"{text[:EXCERPT]}..."
            examples.append({"where": where, "text": excerpt, "detail": detail})

    def to_json(self) -> dict[str, Any]:
        """Return the counts of every level. Raises ``AssertionError`` if they do not add up."""
        levels = {}
        for level, tally in self.tallies.items():
            counts = tally.to_json()
            examples = {reason: self._examples[level, reason] for reason in counts["dropped"]}
            names = {"in": counts["rows_in"], "out": counts["rows_out"], "dropped": counts["dropped"]}
            levels[level] = {**names, "examples": examples}
        return levels

    def counts(self, level: str) -> str:
        """Return a level's counts for messages: ``12 prompts, 3 cut off, 2 empty answer``."""
        tally = self.tallies.get(level, Tally())
        reasons = [f"{count} {reason}" for reason, count in tally.dropped.most_common()]
        return ", ".join([f"{tally.rows_in} {level}", *reasons])


def split_by_prompt(rows: list[Row], test_size: float, seed: int) -> dict[str, list[Row]]:
    """Return each split's rows: prompts with a draw below ``test_size`` are tested, at least one if there are two."""
    # Split by prompt, like the split of a recipe; no split stays empty if there are two prompts.
    draws = {name: share(name, seed) for name in dict.fromkeys(map(group, rows))}
    tested = {name for name, draw in draws.items() if draw < test_size}
    if len(draws) > 1 and not tested:
        tested = {min(draws, key=draws.__getitem__)}
    if len(draws) > 1 and len(tested) == len(draws):
        tested.remove(max(draws, key=draws.__getitem__))
    return {
        "train": [row for row in rows if group(row) not in tested],
        "test": [row for row in rows if group(row) in tested],
    }


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
