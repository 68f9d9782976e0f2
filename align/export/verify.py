"""Does an exported folder answer as its checkpoint, in transformers and in vLLM? Greedy, in float32, token by token.

Where answers part, the checkpoint itself is asked how far its two candidates were apart: two tokens that it gives the
same probability within rounding part by chance, and the answer counts up to there. Anything else is a difference, with
its place and its likely cause. A reward model's scores are compared in the same way. Torch-free; the models run in
processes of their own (``answering.py``).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from align.errors import StageFailed
from align.export.export import Source, stored_type
from align.export.verify_worker import Done, Job, run_job
from align.models.render import Message, render_conversation, render_prompt

Runner = Callable[[Job, Path], Done]

MAX_TOKENS = 48
TIE = 1e-3
"""Nats between two tokens that rounding may swap; engines differ by some 1e-5 in float32."""
SCORE_TOLERANCE = 1e-3
"""Largest difference of two scores, relative to their size (at least 1)."""
QUESTIONS: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "Paris."),
    ("Write two sentences about the sea.", "It is wide. It is never still."),
    ("What is 17 + 25? Explain briefly.", "17 + 25 = 42: 17 + 20 = 37, and 5 more."),
    ("Translate into German: Good morning, my friend.", "Guten Morgen, mein Freund."),
    ("def add(a, b):\n    return", "a + b"),
    ("¿Qué tiempo hace hoy? 🙂", "Hace sol."),
    ("List three colors.", "Red, green, blue."),
    ("Tell me a very short story about a fox.", "A fox found a key. It opened nothing. She kept it."),
)
"""What is asked, with answers for a reward model to score."""


@dataclass
class Agreement:
    """What was compared, for the user and the model card."""

    what: str
    """``tokens`` or ``scores``."""
    prompts: int
    compared: int
    """Tokens, or scores, that agree in every engine."""
    engines: list[str] = field(default_factory=list)
    largest_gap: float = 0.0
    """Between two engines: of a chosen token's log-probability in nats, or of a score."""
    ties: int = 0
    """Answers that part at two tokens of equal probability."""
    rounding: int | None = None
    """Of the answers, how many the type of the written weights changes by itself; None where they keep theirs."""
    unchecked: str | None = None
    """Why vLLM was not asked."""


def check(
    source: Source, exported: Path, dtype: str, scratch: Path, run: Runner = run_job, say: Callable[[str], None] = print
) -> Agreement:
    """Compare ``exported``, whose weights are ``dtype``, with ``source``; ``scratch`` is a folder for the processes.

    Weights that were rounded on the way are compared with the checkpoint's own, rounded in the same way. Raises
    ``StageFailed`` for a difference.
    """
    rows = _rows(source, exported)
    adapter = None if source.adapter is None else str(source.adapter)
    want: Literal["tokens", "scores"] = "scores" if source.is_reward() else "tokens"
    wanted = Job("transformers", str(source.folder), want, rows, max_tokens=MAX_TOKENS, adapter=adapter)
    narrowed = None if dtype == "float32" or (adapter is None and dtype == stored_type(source.folder)) else dtype
    say("the checkpoint answers, in transformers")
    plain = run(wanted, scratch / "source")
    reference = plain if narrowed is None else run(replace(wanted, round_to=narrowed), scratch / "rounded")
    compare = _compare_scores if source.is_reward() else _compare_tokens
    found = Agreement(want, len(rows), 0)
    if narrowed is not None and not source.is_reward():
        found.rounding = sum(one != other for one, other in zip(plain.tokens, reference.tokens, strict=True))
    asker = _Asker(replace(wanted, want="logprobs", round_to=narrowed), scratch / "ties", run)
    say("the exported folder answers, in transformers")
    own = run(Job("transformers", str(exported), want, rows, max_tokens=MAX_TOKENS), scratch / "transformers")
    compare(found, reference, own, asker, _saved_wrongly(source))
    if importlib.util.find_spec("vllm") is None:
        found.unchecked = "vLLM is not installed"
        return found
    say("the exported folder answers, in vLLM")
    theirs = run(Job("vllm", str(exported), want, rows, max_tokens=MAX_TOKENS), scratch / "vllm")
    if theirs.unusable is not None:
        found.unchecked = theirs.unusable
        return found
    itself = replace(asker, job=replace(asker.job, folder=str(exported), adapter=None, round_to=None))
    compare(found, own, theirs, itself, READ_WRONGLY)
    return found


READ_WRONGLY = (
    "transformers reads the same files as the checkpoint, so the files are right and vLLM computes something else: a "
    "setting of config.json that it does not know, another rope scaling or window, or for a difference at the first "
    "token a head that is tied here and not there"
)


def _saved_wrongly(source: Source) -> str:
    if source.adapter is not None:
        return "the adapter does not merge as it is applied, or its base is another one than it was trained on"
    return "what was written is not what was loaded: a weight under another name, or a setting that was not kept"


def _rows(source: Source, exported: Path) -> list[list[int]]:
    """The questions in token ids, which the exported tokenizer and template must give alike."""
    from align.models.loading import load_tokenizer

    def rendered(folder: Path) -> list[list[int]]:
        tokenizer = load_tokenizer(folder)
        asked: list[list[Message]] = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
        if not source.is_reward():
            return [render_prompt(tokenizer, messages) for messages in asked]
        return [
            render_conversation(tokenizer, [*messages, {"role": "assistant", "content": answer}])
            for messages, (_, answer) in zip(asked, QUESTIONS, strict=True)
        ]

    rows, again = rendered(source.tokenizer_folder), rendered(exported)
    for number, (one, other) in enumerate(zip(rows, again, strict=True), start=1):
        if one != other:
            raise StageFailed(
                f"the exported tokenizer or chat template gives question {number} other tokens, from position "
                f"{_parting(one, other)} on. Export from the checkpoint's own folder."
            )
    return rows


@dataclass(frozen=True)
class _Asker:
    """Asks a model in transformers how probable single tokens are."""

    job: Job
    scratch: Path
    run: Runner

    def gaps(self, contexts: Sequence[list[int]], pairs: Sequence[tuple[int, int]]) -> list[float]:
        """Nats between the two tokens of each pair, behind its context."""
        rows = [list(context) for context in contexts for _ in range(2)]
        tokens = [[token] for pair in pairs for token in pair]
        done = self.run(replace(self.job, rows=rows, responses=tokens), self.scratch)
        values = [scores[0] for scores in done.logprobs]
        return [abs(values[at] - values[at + 1]) for at in range(0, len(values), 2)]


def _parting(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place at which two sequences differ, or the shorter one ends."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _compare_tokens(found: Agreement, expected: Done, given: Done, asker: _Asker, cause: str) -> None:
    """Add a comparison to ``found``; ``StageFailed`` for a difference that is no tie."""
    partings = [
        None if one == other else _parting(one, other) for one, other in zip(expected.tokens, given.tokens, strict=True)
    ]
    shared = [len(one) if at is None else at for one, at in zip(expected.tokens, partings, strict=True)]
    gap = max(
        (abs(a - b) for one, other, upto in zip(expected.logprobs, given.logprobs, shared, strict=True)
         for a, b in zip(one[:upto], other[:upto], strict=True)), default=0.0,
    )  # fmt: skip
    places = [(row, at) for row, at in enumerate(partings) if at is not None]
    if places:
        _refuse_unless_tied(places, expected, given, asker, cause, gap, sum(shared))
    _note(found, expected, given, gap, len(places), sum(shared))


def _refuse_unless_tied(
    places: list[tuple[int, int]], expected: Done, given: Done, asker: _Asker, cause: str, gap: float, shared: int
) -> None:
    def token(done: Done, row: int, at: int) -> int | None:
        return done.tokens[row][at] if at < len(done.tokens[row]) else None

    pairs = [(token(expected, row, at), token(given, row, at)) for row, at in places]
    whole = [(a, b) for a, b in pairs if a is not None and b is not None]
    contexts = [
        [*asker.job.rows[row], *expected.tokens[row][:at]]
        for (row, at), (a, b) in zip(places, pairs, strict=True)
        if a is not None and b is not None
    ]
    apart = iter(asker.gaps(contexts, whole) if whole else [])
    gaps = [next(apart) if a is not None and b is not None else math.inf for a, b in pairs]
    tied = sum(one <= TIE for one in gaps)
    if tied == len(places) and shared * 2 >= sum(map(len, expected.tokens)):
        return
    (row, at), (a, b), nats = next(
        one for one in zip(places, pairs, gaps, strict=True) if one[2] > TIE or tied == len(places)
    )
    parting = f"token {b} instead of {a}, which are {nats:.3g} nats apart"
    if a is None or b is None:
        parting = f"it {'goes on' if a is None else 'ends'} where the other {'ends' if a is None else 'goes on'}"
    raise StageFailed(
        f"the exported folder answers otherwise: {given.version} differs from {expected.version} in {len(places)} of "
        f"{len(expected.tokens)} answers, first in answer {row + 1} at position {at + 1}: {parting}. Up to there "
        f"log-probabilities agree within {gap:.2g}. Likely cause: {cause}."
    )


def _compare_scores(found: Agreement, expected: Done, given: Done, asker: _Asker, cause: str) -> None:
    gaps = [abs(a - b) for a, b in zip(expected.scores, given.scores, strict=True)]
    for number, (gap, score) in enumerate(zip(gaps, expected.scores, strict=True), start=1):
        if not gap <= SCORE_TOLERANCE * max(1.0, abs(score)):  # also for NaN
            raise StageFailed(
                f"the exported folder scores otherwise: {given.version} gives answer {number} "
                f"{given.scores[number - 1]:.6g}, {expected.version} {score:.6g}. Likely cause: {cause}."
            )
    _note(found, expected, given, max(gaps), 0, len(gaps))


def _note(found: Agreement, expected: Done, given: Done, gap: float, ties: int, compared: int) -> None:
    found.engines = list(dict.fromkeys([*found.engines, expected.version, given.version]))
    found.largest_gap = max(found.largest_gap, gap)
    found.ties += ties
    found.compared = compared if found.compared == 0 else min(found.compared, compared)


def as_facts(found: Agreement) -> dict[str, Any]:
    """For ``--json``."""
    return dict(vars(found))
