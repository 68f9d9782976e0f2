"""A session of one annotator: ask, answer, undo. The terminal and the studio drive it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from align.errors import UserError
from align.extensions.annotation.questions import Question, QuestionQueue
from align.store.annotations import (
    DECISIVE,
    AnnotationSet,
    Answer,
    AnswerWriter,
    Side,
    Verdict,
    find_set,
    new_id,
    now,
)
from align.store.locks import Lock


@dataclass(frozen=True)
class Reply:
    """An annotator's reply to a question; ``choice`` is the better side of the screen, None for tie and both bad."""

    verdict: Verdict
    choice: str | None = None
    tags: Sequence[str] = ()
    rewrite: str = ""
    comment: str = ""
    seconds: float = 0.0


class Session:
    """Questions and answers of an annotator in a set that has pairs.

    Raises ``UserError`` for a set or a name that cannot be used.
    """

    def __init__(self, root: Path, name: str, annotator: str) -> None:
        self.annotations: AnnotationSet = find_set(root, name)
        self.writer = AnswerWriter(self.annotations, annotator)
        self.annotator = annotator
        self.queue = QuestionQueue(name, self.annotations.pairs(), self.annotations.settings(), annotator)
        self.skipped: set[str] = set()
        self._again: Question | None = None
        lock = Lock(self.annotations.sessions / annotator)
        holder = lock.holder() or {}
        self._hold = lock.try_acquire()
        """A mark for other sessions of the same pseudonym. It excludes nobody."""
        self.conflict = ""
        """A warning if another session of the pseudonym is open; empty without one."""
        if self._hold is None:
            place = f" (process {holder['pid']} on {holder.get('host', '?')})" if holder else ""
            self.conflict = (
                f"'{annotator}' has another session open{place}. Both ask the same questions. End one of them, or use "
                "a pseudonym for each person."
            )

    def close(self) -> None:
        """End the session for other sessions of the pseudonym."""
        if self._hold is not None:
            self._hold.release()

    def next(self) -> Question | None:
        """Return the next question, or the question whose answer was undone; None if no question is left."""
        if self._again is not None:
            return self._again
        return self.queue.next(self.annotations.answers(), self.skipped)

    def following(self, question: Question) -> Question | None:
        """Return the question after this one if no other annotator answers meanwhile; None for the last."""
        answers = self.annotations.answers()
        answers.append(self._answer_to(question, Reply("tie"), "following"))
        return self.queue.next(answers, self.skipped)

    def question_of(self, pair: str) -> Question | None:
        """Return the question about a pair that is asked next: a duplicate if the annotator has answered the pair.

        None for a pair that the set does not have.
        """
        if pair not in self.queue.pairs:
            return None
        if self._again is not None and self._again.pair.id == pair:
            return self._again
        own_answers = [answer for answer in self.annotations.answers() if answer.annotator == self.annotator]
        return self.queue.ask(self.queue.pairs[pair], repeat=any(answer.pair == pair for answer in own_answers))

    def answer(self, question: Question, reply: Reply, identity: str = "") -> Answer:
        """Write an answer to the journal, and return it.

        Args:
            question: What was asked.
            reply: The verdict.
            identity: Id of the entry, by default a new one. An answer that the journal has already is not written
                again, so a caller may repeat a request.

        Raises:
            ValueError: The verdict has no such choice.
            UserError: Another session of the pseudonym has answered the question meanwhile.
        """
        present = [answer for answer in self.annotations.answers() if answer.id == identity] if identity else []
        if present:
            return present[0]
        if (reply.choice in ("left", "right")) != (reply.verdict in DECISIVE):
            raise ValueError(f"the verdict {reply.verdict} does not fit the choice {reply.choice}")
        self._refuse_second_answer(question)
        answer = self._answer_to(question, reply, identity or new_id())
        self.writer.write(answer)
        self._again = None
        return answer

    def _refuse_second_answer(self, question: Question) -> None:
        """Raise ``UserError`` for a question that the annotator has answered in another session since it was asked."""
        answers = [answer for answer in self.annotations.answers() if answer.pair == question.pair.id]
        if any(answer.annotator == self.annotator and answer.repeat == question.repeat for answer in answers):
            raise UserError(
                f"'{self.annotator}' has answered this pair in another session meanwhile, so this answer is not kept. "
                "Two sessions of one pseudonym are open: end one of them, or use a pseudonym for each person."
            )

    def _answer_to(self, question: Question, reply: Reply, identity: str) -> Answer:
        return Answer(
            id=identity,
            pair=question.pair.id,
            annotator=self.annotator,
            time=now(),
            left=question.left,
            verdict=reply.verdict,
            preferred=None if reply.choice is None else side_of(question, reply.choice),
            tags=list(reply.tags),
            rewrite=reply.rewrite,
            comment=reply.comment,
            seconds=round(reply.seconds, 2),
            repeat=question.repeat,
            active=question.active,
        )

    def skip(self, question: Question) -> None:
        """Leave a question for another session."""
        self.skipped.add(question.pair.id)
        self._again = None

    def undo(self) -> Question | None:
        """Withdraw the annotator's last answer, and return its question, which is asked again; None without answers."""
        own_answers = [answer for answer in self.annotations.answers() if answer.annotator == self.annotator]
        own_answers = [answer for answer in own_answers if answer.pair in self.queue.pairs]
        if not own_answers:
            return None
        last = own_answers[-1]
        self.writer.undo(last)
        self._again = Question(self.queue.pairs[last.pair], last.left, last.repeat, last.active)
        return self._again

    def count(self) -> tuple[int, int]:
        """Return the number of pairs answered, and of those that the annotator has or may get."""
        return self.queue.count(self.annotations.answers())

    def explain_count(self) -> str:
        """Return why not all pairs of the set are asked; empty if all are."""
        others = self.queue.left_to_others(self.annotations.answers())
        if not others:
            return ""
        pairs = len(self.queue.pairs)
        return (
            f"{pairs - others} of the {pairs} pairs are for {self.annotator}: others have answered {others}, and only "
            f"{self.queue.settings.overlap:.0%} of the pairs are for all (--overlap)."
        )


def side_of(question: Question, choice: str) -> Side:
    """Return the answer that was shown on a side of the screen."""
    other: Side = "b" if question.left == "a" else "a"
    return question.left if choice == "left" else other
