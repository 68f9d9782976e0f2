"""Generated answers for every verifier: each gets a verdict with a known reason, in bounded time and memory."""

from __future__ import annotations

import random
import resource
import time
from typing import Any

import pytest

from align.config.validation import validate
from align.config.verifiers import PROGRAMS, EnvironmentVerifier
from align.scoring.verifiers import open_verifier
from align.verifiers.verdict import REASONS
from align.verifiers.workers import MEMORY

LATEX = r"""
\boxed{ \frac{ \sqrt{ \text{ \left( \right) \int_0^1 \sum_{i=1}^{n} \cdot \pm \begin{pmatrix} \end{pmatrix} \infty \log
\sin \mathbb{R} \cup \in \le \% \! 10^{10^{10}} x y e i \pi !! null NaN <think> </think> [THINK]
"""
PIECES = (
    *"0123456789+-*/^_=<>()[]{}|\\$%&#~`'\",.;:!?\n\t −×÷√∞½²３٤π",
    *LATEX.split(),
    *("9" * 200, "the answer is ", "Answer: ", "#### ", " or ", " and ", "\ud800", "\x00", "\u202e"),
    *("```json\n", "```python\n", "\n```", '{"a": ', "def f(x):\n    return ", "print(", "import os\n", "f(f"),
    *("while True: pass\n", "exit()\n", "lambda: ", "__import__('os')"),
)
FIELDS: dict[str, dict[str, Any]] = {
    "math": {"math": "answer"},
    "number": {"number": "answer"},
    "choice": {"choice": "letter"},
    "exact": {"exact": "answer"},
    "contains": {"contains": "answer"},
    "regex": {"regex": r"(\w\s?)+ or (\w+)\Z"},
    "json_schema": {"json_schema": {"type": "object", "properties": {"a": {"pattern": "^(a+)+$"}}}},
    "ifeval": {"ifeval": "instructions"},
    "code": {"code": "tests", "memory_mb": 128},
}
ROW = {
    "id": "0",
    "answer": "\\frac{1}{2}",
    "letter": "B",
    "instructions": {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    "tests": ["assert f(2) == 4"],
}


def generate(count: int, seed: int) -> list[str]:
    """Return random answers of up to 60 pieces, one in twenty of up to 4,000."""
    source = random.Random(seed)
    lengths = [source.choice([4000] if source.random() < 0.05 else [5, 20, 60]) for _ in range(count)]
    return ["".join(source.choices(PIECES, k=source.randint(0, length))) for length in lengths]


def check(kind: str, count: int, seconds: float) -> None:
    scorer = open_verifier(validate(EnvironmentVerifier, FIELDS[kind] | {"seconds": seconds}, "p.yaml"), kind)
    answers = generate(count, seed=count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The peak of children includes those of earlier tests in this process, for example an engine's.
    earlier = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    start = time.monotonic()
    verdicts = scorer.verify([ROW] * count, answers)
    assert len(verdicts) == count
    for answer, verdict in zip(answers, verdicts, strict=True):
        assert verdict.reason in ("", *REASONS) and 0 <= verdict.score <= 1, answer
        assert (verdict.score == 1) == (not verdict.reason), answer
    # Each answer ends within its limit, and a worker that is killed starts again within a minute.
    assert time.monotonic() - start < count * (2 * seconds + 60)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 * 1024
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 <= max(earlier, 2 * MEMORY)
    print(kind, {reason: sum(verdict.reason == reason for verdict in verdicts) for reason in ("", *REASONS)})


def test_every_verifier_is_fuzzed() -> None:
    assert set(FIELDS) == set(PROGRAMS)


@pytest.mark.parametrize("kind", sorted(set(FIELDS) - {"math", "ifeval"}))
def test_generated_answers_get_a_verdict(kind: str) -> None:
    check(kind, 20 if kind == "code" else 100, seconds=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(FIELDS))
def test_ten_thousand_answers_get_a_verdict(kind: str) -> None:
    check(kind, 1_000 if kind == "code" else 10_000, seconds=2.0 if kind == "math" else 0.5)
