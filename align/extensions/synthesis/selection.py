"""Selection of rows from several responses to each prompt: all different ones, or the best. Torch-free.

``run.py`` samples the responses; ``pairing.py`` makes preference pairs of them. The ledger has counts that add up, and
every dropped text with its reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from align.data.builds.ledger import EXAMPLES, Tally
from align.data.rows import Row
from align.data.steps.split import group, share
from align.extensions.synthesis.config import BestOfTask, ResponsesTask
from align.stages.prompt_responses import PromptResponses, prompt_fields

ROWS, ANSWERS = "prompts", "answers"
OTHER_BEGINNINGS = "episodes begin differently"
"""Reason to drop a prompt whose responses cannot be compared."""


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
