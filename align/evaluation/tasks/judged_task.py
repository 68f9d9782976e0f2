"""What graded and compared tasks share: systems answer turn by turn, and settings are told. Torch-free.

Left out: what judges say (``judged_grades.py``, ``judged_contests.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align.data.rows import Message, assistant, user
from align.evaluation.tasks.base import Answers, Given, Item, Measured, Respondent, Task, Turn
from align.inference.protocol import Sampling
from align.store.fingerprint import digest

if TYPE_CHECKING:
    from align.evaluation.tasks.judged import JudgedConfig

LABELS = {"mt_bench": "MT-Bench", "alpaca_eval": "AlpacaEval"}
Talk = list[Message]
"""A conversation with its last answer."""


class JudgedTask(Task):
    """Questions, and who judges the answers."""

    responds = True
    kind = "judged"
    question = ""
    """The words in which the judge is asked."""
    rubric = ""
    """What makes an answer good, unless the settings say otherwise."""

    def __init__(self, name: str, config: JudgedConfig, items: list[Item], given: Given) -> None:
        self.name, self.items, self.config, self.seed = name, items, config, given.seed
        self.label = LABELS.get(config.preset or "", name)
        self.turns = 1 + max(len(item.data["later"]) for item in items)
        self.by = config.judge.endpoint.model if config.judge.endpoint is not None else config.judge.which or ""
        self.usage: dict[str, Any] = {}
        """Requests, tokens and cost of the judge, once it was asked."""
        self._described = config.described(given.base)
        self.rubric = config.judge.rubric or self.rubric

    def settings(self) -> dict[str, Any]:
        """Data, sampling, judge and the digest of the words it is asked in; after scoring also what that took."""
        config = self.config
        judge = dict(config.judge.identity())
        if config.judge.endpoint is not None:
            judge |= {"rubric": self.rubric, "question": digest(self.question)[:12]}
        sources = sorted({item.source for item in self.items})
        return {
            "data": self._described,
            "preset": config.preset,
            "mode": config.how,
            "turns": self.turns,
            "references": sum(bool(item.data["references"]) for item in self.items),
            "sampling": {
                "max_tokens": config.max_tokens,
                "temperature": {source: config.sampling_temperature(source) for source in sources},
                "top_p": config.top_p,
                "seed": self.seed,
            },
            "judge": judge,
            "usage": self.usage,
        }

    def respond(self, respondent: Respondent) -> Answers:
        """Turn by turn: later messages come after the system's own earlier answers."""
        places: dict[float, list[int]] = {}
        for at, item in enumerate(self.items):
            places.setdefault(self.config.sampling_temperature(item.source), []).append(at)
        found: Answers = [[] for _ in self.items]
        for temperature, own in sorted(places.items()):
            for turn in range(self.turns):
                sampling = Sampling(self.config.max_tokens, temperature, self.config.top_p, seed=self.seed + turn)
                if turn == 0:
                    self._begin(respondent, sampling, own, found)
                else:
                    self._go_on(respondent, sampling, own, found, turn)
        return found

    def _begin(self, respondent: Respondent, sampling: Sampling, places: list[int], found: Answers) -> None:
        prompts = [list(self.items[at].prompt) for at in places]
        answers = respondent.answer(prompts, sampling, self.examples(respondent.info.shots))
        for at, prompt, samples in zip(places, prompts, answers, strict=True):
            found[at] = [[Turn(prompt, one)] for one in samples]

    def _go_on(self, respondent: Respondent, sampling: Sampling, places: list[int], found: Answers, turn: int) -> None:
        """A best-of-N system has N conversations to each question, of which the best is chosen when they are whole."""
        going = [
            (turns, self.items[at].data["later"][turn - 1])
            for at in places
            if len(self.items[at].data["later"]) >= turn
            for turns in found[at]
        ]
        if not going:
            return
        prompts = [[*talk(turns[-1]), user(message)] for turns, message in going]
        answers = respondent.answer(prompts, sampling, self.examples(respondent.info.shots), going_on=True)
        for (turns, _), prompt, samples in zip(going, prompts, answers, strict=True):
            turns.append(Turn(prompt, samples[0]))

    def reference(self, at: int, turns: int) -> str:
        """Reference answers to an item's first messages, as a judge reads them; empty for none."""
        from align.evaluation.judges.grading import show_references

        references = self.items[at].data["references"][:turns]
        return show_references(references) if references else ""


def talk(turn: Turn) -> Talk:
    """The whole conversation of a turn."""
    return [*turn.prompt, assistant(turn.response.text)]


def answer_notes(answers: Sequence[Sequence[Turn]]) -> dict[str, Any]:
    """What to know of one system's answers, of all turns: cut off at the limit, empty, characters on average."""
    responses = [turn.response for turns in answers for turn in turns]
    return {
        "answers": len(responses),
        "cut_off": sum(not one.finished for one in responses),
        "empty": sum(not one.text.strip() for one in responses),
        "mean_characters": round(sum(len(one.text) for one in responses) / max(1, len(responses)), 1),
    }


def measured(columns: Mapping[str, Sequence[float | None]], notes: dict[str, Any]) -> Measured:
    """Values of one sample each; an item without a number weighs nothing, so that it takes no part."""
    values = {name: [[0.0 if one is None else one] for one in column] for name, column in columns.items()}
    weights = {name: [float(one is not None) for one in column] for name, column in columns.items() if None in column}
    return Measured(values, weights, notes)
