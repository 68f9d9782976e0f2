"""Verdicts with their reasons, the same in ``score:``, ``metrics:`` and environments."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.config.environment import EnvironmentConfig
from align.config.scores import MetricFunction, RewardEntry
from align.config.validation import validate
from align.config.verifiers import VERIFIERS, EnvironmentVerifier
from align.data.checkers import gsm8k_answer
from align.environments.sources import open_environment
from align.errors import StageFailed, UserError
from align.scoring.verifiers import open_verifier
from align.verifiers import answers, mathematics
from align.verifiers.verdict import PLACES, WHOLE, Verdict, explain_low_scores, explain_reasons, reasons_in
from align.verifiers.workers import Comparison, Worker
from tests.support.environments.opened import TOOLS

RIGHT, NO_ANSWER, UNPARSABLE, UNEQUAL, TIMED_OUT = "", "no_answer", "unparsable", "unequal", "timed_out"


def reasons(fields: dict[str, Any], pairs: list[tuple[Any, str]]) -> list[str]:
    """Return the reasons of the verdicts on (reference, answer) pairs."""
    scorer = open_verifier(validate(EnvironmentVerifier, fields, "p.yaml"), "score[0]")
    rows = [{"id": str(index), "answer": reference} for index, (reference, _) in enumerate(pairs)]
    verdicts = scorer.verify(rows, [answer for _, answer in pairs])
    assert all((verdict.score == 1.0) == (not verdict.reason) for verdict in verdicts)
    return [verdict.reason for verdict in verdicts]


DIRECT = [
    ("number", "72", "16 + 56 = 72.", RIGHT),
    ("number", 3.5, "The answer is \\frac{7}{2}", RIGHT),
    ("number", "72", "71", UNEQUAL),
    ("number", "72", "71 or 72", NO_ANSWER),
    ("number", "72", "<think>72", NO_ANSWER),
    ("choice", "B", "Because of that, the answer is **B**.", RIGHT),
    ("choice", "(b)", "(B) Paris", RIGHT),
    ("choice", "B", "\\boxed{\\text{B}}", RIGHT),
    ("choice", "B", "Answer: C", UNEQUAL),
    ("choice", "B", "Answer: A or B", NO_ANSWER),
    ("choice", "B", "Answer: A\nAnswer: B", NO_ANSWER),
    ("choice", "B", "B is wrong, so is C", NO_ANSWER),
    ("choice", "B", "The answer is option B, because C) is wrong.", NO_ANSWER),
    ("choice", "B", "The answer is option B, because it fits.", RIGHT),
    ("choice", "B", "Answer: B. C. D.", NO_ANSWER),
    ("choice", "B", "<answer>Ｂ</answer>", RIGHT),
    ("exact", "to be", " to be\n", RIGHT),
    ("exact", "to be", "To be", UNEQUAL),
    ("exact", "to be", " ", NO_ANSWER),
    ("contains", "Paris", "It is paris.", RIGHT),
    ("contains", ["Paris", "Lyon"], "Lyon, Nice", UNEQUAL),
    ("contains", "14", "It is 14.5", UNEQUAL),
    ("contains", "14", "It is 114", UNEQUAL),
    ("contains", "14", "It is 0.14", UNEQUAL),
    ("contains", "14", "It is -14", UNEQUAL),
    ("contains", "14", "<!-- 14 -->", UNEQUAL),
]


@pytest.mark.parametrize("kind", ["number", "choice", "exact", "contains"])
def test_verdict_of_direct_verifiers(kind: str) -> None:
    cases = [case for case in DIRECT if case[0] == kind]
    assert reasons({kind: "answer"}, [(case[1], case[2]) for case in cases]) == [case[3] for case in cases]


@pytest.mark.parametrize(
    "piece", ["x", "word ", "answer ", " ", "<answer>", "the answer is ", "B, C, ", "\\text{", "~~a", "or "]
)
def test_choice_reads_long_answers_in_linear_time(piece: str) -> None:
    # A pattern that begins anew at each character needs minutes for these.
    assert answers.choice("B", piece * (100_000 // len(piece))).score == 0.0


def test_choice_that_is_given_twice_is_one_answer() -> None:
    assert [answers.choice("B", text).score for text in ("B, B", "(B), (B)", "B, C", "B or B, C")] == [
        1.0,
        1.0,
        0.0,
        0.0,
    ]


MARKS = [
    "{}",
    "**{}**",
    "*{}*",
    "_{}_",
    "__{}__",
    "`{}`",
    "***{}***",
    "**`{}`**",
    "_**{}**_",
    "${}$",
    "\\({}\\)",
    "\\[{}\\]",
    "$$\n{}\n$$",
    "\\text{{{}}}",
    "\\textbf{{{}}}",
    "\\boxed{{{}}}",
    "$\\boxed{{{}}}$",
    "**\\boxed{{{}}}**",
    "$\\mathbf{{{}}}$",
    "$\\mathrm{{{}}}$",
    "$\\underline{{{}}}$",
    "<b>{}</b>",
    "<u>{}</u>",
]
SENTENCES = [
    "{}",
    "The answer is {}",
    "Answer: {}",
    "#### {}",
    "Final Answer: {}",
    "**Answer:** {}",
    "So, the final answer is: {}",
    "Therefore the answer is\n{}",
    "### Final Answer\n\n{}",
    "The correct answer is {} because of the rule.",
]


@pytest.mark.parametrize(
    ("verify", "right", "sentences"),
    [
        (answers.number, "18", [*SENTENCES, "He makes {} per day."]),
        (answers.contains, "18", [*SENTENCES, "He makes {} per day."]),
        (answers.choice, "B", SENTENCES),
        (answers.exact, "18", SENTENCES[:1]),
        (mathematics.verify, "18", SENTENCES),
    ],
)
def test_marks_around_an_answer_do_not_count(
    verify: Callable[[Any, str], Verdict], right: str, sentences: list[str]
) -> None:
    texts = [sentence.format(mark.format(right)) for mark in MARKS for sentence in sentences]
    assert [text for text in texts if verify(right, text).score != 1] == []
    assert [text for text in texts if verify({"18": "81", "B": "C"}[right], text).score] == []


@pytest.mark.parametrize(
    ("kind", "reference", "right", "wrong"),
    [
        ("contains", "café", "cafe\u0301", "cafe"),
        ("contains", "New York", "New\n**York**", "New\nYorker"),
        ("contains", "Paris", "It is _Paris_.", "~~Paris~~ London"),
        ("exact", "to be", "**to be**", "**to** be"),
        ("exact", "café", "`cafe\u0301`", "cafe"),
        ("json_schema", {"type": "object"}, "~~~json\n{}\n~~~", "~~~json\n{}\n```"),
        ("json_schema", {"type": "object"}, "\ufeff{}", "\ufeff"),
        ("json_schema", {"format": "date"}, '"2026-01-05"', '"2026-13-05"'),
        ("json_schema", {"format": "date-time"}, '"2026-01-05T10:00:00.123456789Z"', '"2026-02-30T10:00:00Z"'),
        ("json_schema", {"format": "uri"}, '"file:///a"', '"no uri"'),
    ],
)
def test_answers_are_read_as_they_are_shown(kind: str, reference: Any, right: str, wrong: str) -> None:
    verify = getattr(answers, kind)
    assert verify(reference, right).score == 1.0
    assert verify(reference, wrong).score == 0.0


MATH = [
    ("5", "so it is \\boxed{5}", RIGHT),
    ("\\frac{1}{2}", "\\boxed{0.5}", RIGHT),
    ("x + 1", "The answer is $1 + x$.", RIGHT),
    ("5", "#### 5", RIGHT),
    ("5", "5", RIGHT),
    ("7/2", "\\boxed{3\\frac{1}{2}}", RIGHT),
    ("300000000", "\\boxed{3 \\cdot 10^8}", RIGHT),
    ("5", "\\boxed{\\boxed{5}}", RIGHT),
    ("5", "\\boxed{5 \\text{ cm}}", RIGHT),
    ("5", "\\boxed{6}", UNEQUAL),
    ("5", "\\boxed{4 \\text{ or } 5}", UNEQUAL),
    ("5", "\\boxed{2 + 3}", UNEQUAL),  # copied from the question
    ("7", "\\boxed{3 4}", UNEQUAL),  # math-verify adds them
    ("5", "\\boxed{4} or \\boxed{5}", NO_ANSWER),
    ("5", "First 5.\nThen no more.", NO_ANSWER),  # no fallback to the last number
    ("5", "<think>\\boxed{5}", NO_ANSWER),
    ("5", "\\boxed{5", NO_ANSWER),
    ("5", "\\boxed{6 \\boxed{5}}", NO_ANSWER),
    ("5", "The answer is 6.\nThe answer is 5.", NO_ANSWER),
    ("5", "The answer is 6?\nLet me check.\nThe answer is 5.", RIGHT),
    ("5", "#### 6\n\\boxed{5}", NO_ANSWER),
    ("5", "\\boxed{6 = 5}", UNEQUAL),
    ("10", "\\boxed{\\binom{5}{2}}", UNEQUAL),  # copied from the question
    ("13", "\\boxed{\\frac{1001}{77}}", UNEQUAL),
    ("x + 1", "\\boxed{\\frac{x^2 - 1}{x - 1}}", UNEQUAL),
    ("5 \\text{ cm}", "\\boxed{5 \\text{ km}}", UNEQUAL),
    ("5", "\\boxed{5 \\text{ km/h}}", RIGHT),
    ("5", "\\boxed{\\text{５}}", RIGHT),
    ("1000", "\\boxed{1\\,000}", RIGHT),
    ("\\frac{1}{2}", "\\boxed{½}", RIGHT),
    ("5", "\\boxed{5 |}", UNPARSABLE),
    ("5", "\\boxed{5 \\text{ (or 6)}}", UNPARSABLE),  # math-verify drops the text as a unit
    ("5", "\\boxed{" + "(" * 900 + "}", UNPARSABLE),
]


def test_math_has_a_reason_for_each_verdict() -> None:
    pairs = [(reference, answer) for reference, answer, _ in MATH]
    assert reasons({"math": "answer", "seconds": 60.0}, pairs) == [reason for *_, reason in MATH]


WRONG_FORMS = [
    ("5 \\text{ cm}^2", "5 cm^3"),
    ("5\\text{ cm}^2", "\\boxed{5\\text{ cm}^3}"),
    ("90^\\circ", "\\boxed{90}\\text{ radians}"),
    ("90^\\circ", "\\boxed{90 \\text{ radians}}"),
    ("90^\\circ", "\\boxed{90 \\text{ rad}}"),
    ("\\$5", "\\boxed{5 \\text{ cents}}"),
    ("42", "\\boxed{42 \\text{ million}}"),
    ("42", "\\boxed{42 million}"),
    ("42", "\\boxed{42 \\text{ dozen}}"),
    ("42", "\\boxed{42 \\text{ is wrong}}"),
    ("42", "\\boxed{42_5}"),
    ("1011_2", "\\boxed{1011_3}"),
    ("42", "<!-- \\boxed{42} -->"),
    ("42", "I don't know <!-- \\boxed{42} -->"),
    ("\\frac{\\sqrt3}{2}", "\\boxed{\\sin\\frac\\pi3}"),
    ("(4,6)", "\\boxed{(1+3,2+4)}"),
    ("-2", "\\boxed{\\det\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}}"),
    ("6.63e-34", "\\boxed{1.6e-19}"),
    ("6.63 \\times 10^{-34}", "\\boxed{1.6 \\times 10^{-19}}"),
    ("0.0001", "\\boxed{0.0002}"),
    ("1e-9", "\\boxed{0}"),
    ("\\sqrt{2}", "\\boxed{\\sqrt{1+1}}"),
    ("2\\sqrt3", "\\boxed{\\sqrt{12}+0\\cdot 5}"),
    ("\\pi", "\\boxed{3.14}"),
    ("\\frac{1}{3}", "\\boxed{0.33}"),
    ("5", "\\boxed{4 or 5}"),
    ("5", "\\boxed{5, 6}"),
    ("\\{1,2\\}", "\\boxed{\\{1,2,3\\}}"),
    ("(0,1)", "\\boxed{[0,1]}"),
    ("10", "\\boxed{10^{10}}"),
    ("100", "\\boxed{1000}"),
    ("x^2+1", "\\boxed{x^2+2}"),
    ("12", "\\boxed{3\\times4}"),
    ("8", "\\boxed{2^3}"),
    ("e", "\\boxed{\\exp(1)}"),
    ("\\ln 2", "\\boxed{\\int_1^2 \\frac1x dx}"),
    ("7", "\\boxed{3+4}"),
    ("5\\text{ m/s}", "\\boxed{5\\text{ m/s}^2}"),
    ("5", "\\boxed{5x}"),
    ("12\\text{ inches}", "\\boxed{12\\text{ feet}}"),
    ("0.5", "\\boxed{5\\%}"),
    ("7", "\\boxed{7!}"),
    ("7", "\\boxed{7 \\text{ if } x>0}"),
    ("7", "\\boxed{7}? No, \\boxed{8}"),
    ("7", "\\boxed{7 \\text{ or } 8}"),
    ("3", "\\boxed{\\pm 3}"),
    ("\\pm 3", "\\boxed{3}"),
    ("\\frac{1}{2}", "\\boxed{\\frac{1}{2} \\text{ or } 2}"),
    ("(1,2)", "\\boxed{(2,1)}"),
    ("\\{1,2\\}", "\\boxed{1}"),
    ("x>3", "\\boxed{x\\ge 3}"),
    ("x>3", "\\boxed{x<3}"),
    ("10^{6}", "\\boxed{10^{7}}"),
    ("3.0e8", "\\boxed{3.0e9}"),
    ("1.5", "\\boxed{15}"),
    ("100", "\\boxed{1e3}"),
    ("5", "\\boxed{5\\text{ (approximately 6)}}"),
    ("25", "\\boxed{5^2}"),
    ("6", "\\boxed{3!}"),
    ("4", "\\boxed{\\sqrt{16}}"),
    ("1", "\\boxed{\\cos 0}"),
    ("3", "\\boxed{|{-3}|}"),
    ("2", "\\boxed{\\lfloor 2.7 \\rfloor}"),
    ("\\sqrt{5}", "\\boxed{\\sqrt{2+3}}"),
    ("2\\pi", "\\boxed{\\pi+\\pi}"),
    ("(2,3)", "\\boxed{(1+1, 3)}"),
    ("\\begin{pmatrix}2\\\\3\\end{pmatrix}", "\\boxed{\\begin{pmatrix}1+1\\\\3\\end{pmatrix}}"),
    ("x^2", "\\boxed{x^3}"),
    ("2x+1", "\\boxed{2x-1}"),
    ("17", "The answer is 16 or 17."),
    ("17", "I think 17 maybe 18"),
    ("17", "\\boxed{17 \\text{ or maybe } 18}"),
    ("17", "\\boxed{}17"),
    ("17", "\\boxed{?}"),
    ("17", "\\boxed{17, 18, 19}"),
    ("30^\\circ", "\\boxed{30\\text{ grads}}"),
    ("45 \\text{ minutes}", "\\boxed{45 \\text{ hours}}"),
    ("20\\%", "\\boxed{20 \\text{ dollars}}"),
    ("5 \\text{ million}", "\\boxed{5 \\text{ billion}}"),
    ("FF_{16}", "\\boxed{FF_{8}}"),
    ("12", "\\boxed{12 \\text{ minus 5}}"),
    ("12", "\\boxed{12 \\text{ is not right}}"),
    ("12", "\\boxed{\\text{twelve or so}}"),
    ("8", "\\boxed{2\\cdot 4}"),
    ("0", "\\boxed{10^{-8}}"),
    ("1", "\\boxed{0.9999}"),
    ("1000000", "\\boxed{1000001}"),
    ("123456789", "\\boxed{123456788}"),
    ("2^{100}", "\\boxed{2^{101}}"),
    ("\\frac{22}{7}", "\\boxed{\\pi}"),
    ("e^2", "\\boxed{7.389}"),
]
"""Reference and wrong answer: other units, scales and bases, values left to compute, tiny numbers, hidden boxes."""
RIGHT_FORMS = [
    ("5", "\\boxed{{5}}"),
    ("5", "\\boxed{\\mathbf 5}"),
    ("5", "\\boxed{\\mathbf{5}}"),
    ("42", "Final Answer:\n42"),
    ("42", "**Answer:**\n\n42"),
    ("42", "\\boxed{42}\u200b"),
    ("42", "The answer is **42**."),
    ("0.5", "\\boxed{\\frac12} = \\boxed{0.5}"),
    ("\\frac12", "\\boxed{0.5}. So \\boxed{\\frac{1}{2}}"),
    ("42", "**Final Answer:** $42$"),
    ("42", "**Final Answer**: \\(42\\)"),
    ("5\\text{ cm}", "\\boxed{5 \\text{ cm}}"),
    ("5", "\\boxed{5\\text{ cm}}"),
    ("90^\\circ", "\\boxed{90}"),
    ("90^\\circ", "\\boxed{90 \\text{ degrees}}"),
    ("\\$5", "\\boxed{\\$5.00}"),
    ("5", "\\boxed{5 \\text{ dollars}}"),
    ("\\frac{1}{2}", "\\boxed{\\tfrac12}"),
    ("(3,-4)", "\\boxed{(3, -4)}"),
    ("(3,-4)", "\\boxed{\\left(3,-4\\right)}"),
    ("\\{1,2\\}", "\\boxed{\\{2,1\\}}"),
    ("x^2+2x+1", "\\boxed{(x+1)^2}"),
    ("1,000", "\\boxed{1000}"),
    ("1000", "\\boxed{1{,}000}"),
    ("50\\%", "\\boxed{50\\%}"),
    ("x=5", "\\boxed{5}"),
    ("5", "\\boxed{x=5}"),
    ("2\\sqrt{3}", "\\boxed{2\\sqrt 3}"),
    ("\\frac{\\sqrt3}{2}", "\\boxed{\\frac{\\sqrt{3}}{2}}"),
    ("3.14", "\\boxed{3.140}"),
    ("6.63e-34", "\\boxed{6.63\\times 10^{-34}}"),
    ("[0,1)", "\\boxed{[0,1)}"),
    ("x \\le 3", "\\boxed{(-\\infty,3]}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}"),
    ("1011_2", "\\boxed{1011_2}"),
    ("42", "### Answer\n\n42"),
    ("42", "The final answer is\n\n$$\\boxed{42}$$"),
    ("42", "Therefore, the answer is:\n\n$$42$$"),
    ("42", "Answer: 42\n\nHope this helps!"),
    ("\\text{Monday}", "\\boxed{\\text{Monday}}"),
    ("A", "\\boxed{A}"),
    ("5 \\text{ million}", "\\boxed{5 \\text{ million}}"),
    ("\\pi", "\\boxed{\\pi}"),
    ("\\sqrt{2}", "\\boxed{\\sqrt{2}}"),
    ("2+3i", "\\boxed{2+3i}"),
    ("\\frac{3}{4}", "\\boxed{3/4}"),
    ("10", "\\boxed{10 \\text{ km/h}}"),
    ("10\\text{ m/s}", "\\boxed{10\\,\\mathrm{m/s}}"),
    ("5 \\text{ cm}^2", "\\boxed{5\\text{ cm}^2}"),
    ("5 \\text{ cm}^2", "\\boxed{5}"),
    ("-\\frac{1}{2}", "\\boxed{\\frac{-1}{2}}"),
    ("7", "`7`"),
    ("7", "\\boxed{\\textbf{7}}"),
    ("7", "\\boxed{\\displaystyle 7}"),
    ("7", "\\boxed{\\,7\\,}"),
    ("7", "$\\boxed{7}$ apples"),
    ("12", "\\boxed{12 \\text{ ways}}"),
    ("12", "\\boxed{12\\text{ students}}"),
    ("12 \\text{ apples}", "\\boxed{12}"),
    ("5", "\\boxed{5\\ \\mathrm{cm}}"),
    ("25\\pi", "\\boxed{25\\pi\\text{ cm}^2}"),
    ("25\\pi", "\\boxed{25\\pi \\text{ square units}}"),
    ("36", "\\boxed{36\\text{ sq. in.}}"),
    ("36 \\text{ square inches}", "\\boxed{36\\text{ in}^2}"),
    ("60", "\\boxed{60\\text{ mph}}"),
    ("60 \\text{ miles per hour}", "\\boxed{60\\text{ mph}}"),
    ("60^\\circ", "$\\boxed{60^{\\circ}}$"),
    ("60", "\\boxed{60\u00b0}"),
    ("\\$1,250", "\\boxed{\\$1250}"),
    ("1250", "\\boxed{\\$1{,}250.00}"),
    ("0.25", "\\boxed{\\frac14}"),
    ("\\frac{5}{4}", "\\boxed{1.25}"),
    ("1\\frac14", "\\boxed{\\frac{5}{4}}"),
    ("10", "**Answer:** 10"),
    ("10", "Final Answer: **10**"),
    ("10", "The final answer is: $\\boxed{10}$. I hope it is correct."),
    ("10", "#### 10"),
    ("10", "\\[\\boxed{10}\\]"),
    ("10", "$$\n\\boxed{10}\n$$"),
    ("10", "Answer:\n\\[\n10\n\\]"),
    ("10", "So, the answer is\n\n10"),
    ("x=2,3", "\\boxed{\\{2,3\\}}"),
    ("\\{2,3\\}", "\\boxed{x=2 \\text{ or } x=3}"),
    ("2,3", "\\boxed{2, 3}"),
    ("\\pm3", "\\boxed{-3, 3}"),
    ("\\pm 3", "\\boxed{\\pm3}"),
    ("(-\\infty,2)\\cup(3,\\infty)", "\\boxed{(-\\infty, 2) \\cup (3, \\infty)}"),
    ("x\\in[0,1]", "\\boxed{[0,1]}"),
    ("\\frac{\\sqrt{2}}{2}", "\\boxed{\\frac{1}{\\sqrt{2}}}"),
    ("2\\sqrt{2}", "\\boxed{\\sqrt{8}}"),
    ("n(n+1)/2", "\\boxed{\\frac{n(n+1)}{2}}"),
    ("\\frac{n(n+1)}{2}", "\\boxed{\\frac{n^2+n}{2}}"),
    ("x^2-1", "\\boxed{(x-1)(x+1)}"),
    ("6.02\\times10^{23}", "\\boxed{6.02 \\times 10^{23}}"),
    ("3\\times10^8", "\\boxed{300000000}"),
    ("3e8", "\\boxed{3 \\cdot 10^{8}}"),
    ("0.001", "\\boxed{10^{-3}}"),
    ("i", "\\boxed{i}"),
    ("3+4i", "\\boxed{3 + 4i}"),
    ("\\frac{3}{5}", "\\boxed{\\dfrac{3}{5}}"),
    ("\\infty", "\\boxed{\\infty}"),
    ("\\text{no solution}", "\\boxed{\\text{no solution}}"),
    ("\\text{(B)}", "\\boxed{\\text{(B)}}"),
    ("\\text{Friday}", "\\boxed{Friday}"),
    ("42", "\\boxed{42}."),
    ("42", "\\boxed{ 42 }"),
    ("42", "\\boxed{\\large 42}"),
    ("42", "\\fbox{42}"),
    ("42", "<answer>42</answer>"),
    ("42", "<answer>\\boxed{42}</answer>"),
    ("-7", "\\boxed{-7}"),
    ("-7", "\\boxed{\u22127}"),
    ("2^{10}", "\\boxed{2^{10}}"),
    ("2^{10}", "\\boxed{1024}"),
    ("\\log_2 3", "\\boxed{\\log_2{3}}"),
    ("\\ln 2", "\\boxed{\\ln(2)}"),
    ("e^2", "\\boxed{e^{2}}"),
    ("\\sin 1", "\\boxed{\\sin(1)}"),
    ("5!", "\\boxed{120}"),
    ("\\binom{5}{2}", "\\boxed{10}"),
    ("7", "\\boxed{7}\n\nSo 7 people."),
    ("90", "\\boxed{90} degrees"),
    ("3", "\\boxed{x = 3}"),
    ("3", "x = \\boxed{3}"),
    ("y=2x+1", "\\boxed{y = 2x + 1}"),
    ("2x+1", "\\boxed{y=2x+1}"),
    ("f(x)=2x", "\\boxed{f(x)=2x}"),
    ("10:30", "\\boxed{10:30}"),
    ("3:2", "\\boxed{3:2}"),
]


@pytest.mark.parametrize(("cases", "score"), [(WRONG_FORMS, 0.0), (RIGHT_FORMS, 1.0)], ids=["wrong", "right"])
def test_math_reads_units_marks_and_values(cases: list[tuple[str, str]], score: float) -> None:
    verdicts = [mathematics.verify(reference, answer).score for reference, answer in cases]
    assert [case for case, verdict in zip(cases, verdicts, strict=True) if verdict != score] == []


@pytest.mark.parametrize("allowed", [resource.RLIM_INFINITY, 2**40])
def test_worker_has_a_limit_of_memory(allowed: int) -> None:
    code = (
        f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({allowed}, {allowed}))\n"
        "from align.verifiers.workers import MEMORY, load_verifier\n"
        "load_verifier('regex')\nsoft, hard = resource.getrlimit(resource.RLIMIT_AS)\n"
        "print(MEMORY < soft < MEMORY + 2**33, hard)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", str(allowed)]


def test_worker_that_hangs_is_killed_and_replaced() -> None:
    start = time.monotonic()
    pairs = [("", "a" * 60 + "b"), ("", "aaa"), ("", "")]
    assert reasons({"regex": "\\A(a+)+\\Z", "seconds": 0.5}, pairs) == [TIMED_OUT, RIGHT, NO_ANSWER]
    assert time.monotonic() - start < 60


def test_package_that_cannot_be_imported_ends_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jsonschema.py").write_text("import os\nos._exit(1)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    worker = Worker()
    with pytest.raises(StageFailed, match="the verifier json_schema did not start: its process died"):
        worker.verify(Comparison("json_schema", {}, "{}", 5.0))
    worker.close()


def test_json_schema_reads_text_and_fenced_blocks() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    pairs = [
        ("-", '{"a": 1}'),
        ("-", 'Here:\n```json\n{"a": 1}\n```\n'),
        ("-", '{"a": "1"}'),
        ("-", '{"a": NaN}'),
        ("-", '{"a": "1", "a": 1}'),
        ("-", '```\n{"a": 1}\n```\n{"a": "1"}'),
        ("-", "[" * 100_000),
        ("-", '```\n{"a": 1}\n```\n```\n{"a": 2}\n```'),
    ]
    expected = [RIGHT, RIGHT, UNEQUAL, UNPARSABLE, UNPARSABLE, NO_ANSWER, UNPARSABLE, NO_ANSWER]
    assert reasons({"json_schema": schema}, pairs) == expected
    assert reasons({"json_schema": "answer"}, [(json.dumps(schema), '{"a": 1}')]) == [RIGHT]


def test_ifeval_scores_the_share_of_followed_instructions() -> None:
    checks = {
        "instruction_id_list": ["startend:end_checker", "punctuation:no_comma"],
        "kwargs": [{"end_phrase": "Bye."}, {}],
    }
    config = validate(EnvironmentVerifier, {"ifeval": "checks"}, "p.yaml")
    scorer = open_verifier(config, "score[0]")
    rows = [{"id": "0", "checks": json.dumps(checks)}] * 3
    scored = scorer.score(rows, ["Well. Bye.", "Well, bye. Bye.", ""])
    assert scored.total == [1.0, 0.5, 0.0]
    assert scored.metrics["unequal"] == [0.0, 1.0, 0.0] and scored.metrics["no_answer"] == [0, 0, 1]


def test_reasons_are_metrics_of_the_reward() -> None:
    scorer = open_verifier(RewardEntry(number="checks.answer"), "score[0]")
    row = {"id": "0", "checks": json.dumps({"answer": "72"})}
    scored = scorer.score([row] * 3, ["72", "71", "none"])
    assert scored.total == [1.0, 0.0, 0.0]
    assert scored.metrics == {
        "no_answer": [0.0, 0.0, 1.0],
        "unparsable": [0.0, 0.0, 0.0],
        "unequal": [0.0, 1.0, 0.0],
    }
    assert gsm8k_answer([row] * 3, ["72", "71", "none"]) == scored.total


@pytest.mark.parametrize(
    ("fields", "row", "message"),
    [
        ({"number": "answr"}, {"answer": "5"}, "score[0].number: row 7 has no 'answr'.*the row has answer, id"),
        ({"number": "checks.answer"}, {"checks": "{}"}, "has no 'checks.answer'"),
        ({"number": "answer"}, {"answer": "none"}, "row 7: the reference 'none' is no number. Correct or drop the row"),
        ({"json_schema": "answer"}, {"answer": "[}"}, "the reference .* is no JSON"),
        ({"json_schema": {"type": "objct"}}, {}, "is no JSON schema: 'objct' is not valid"),
        ({"ifeval": "answer"}, {"answer": "{}"}, "has no instruction_id_list and kwargs"),
    ],
)
def test_unusable_reference_names_row_and_column(fields: dict[str, Any], row: dict[str, Any], message: str) -> None:
    scorer = open_verifier(validate(EnvironmentVerifier, fields, "p.yaml"), "score[0]")
    with pytest.raises(UserError, match=message.replace("[0]", r"\[0\]")):
        scorer.score([{"id": "7", **row}], ["{}"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"math": "answer", "function": "gold"}, "has function and math; a reward comes from exactly one"),
        ({"math": "answer", "memory_mb": 128}, "memory_mb is for code, and this is math"),
        ({"function": "gold", "seconds": 1.0}, "seconds is for a verifier"),
        ({"regex": "("}, "regex: is no regular expression"),
        ({"math": "answer", "arguments": {"a": 1}}, "arguments are for a function, and this is a math"),
        ({"code": "tests", "sandbox": {"command": ["x"], "unsafe": True}}, "has command and unsafe"),
    ],
)
def test_wrong_verifier_is_refused_at_its_place(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(RewardEntry, fields, "p.yaml: score[0]")


def test_metric_and_environment_use_the_same_verifier() -> None:
    metric = validate(MetricFunction, {"number": "answer"}, "p.yaml")
    scored = open_verifier(metric, "metrics[0]").score([{"answer": "5"}], ["5"])
    assert metric.metric == "number" and scored.total == [1.0]
    fields = {"tools": [f"{TOOLS}:double"], "score": {"number": "answer"}, "max_tokens": 64}
    config = validate(EnvironmentConfig, fields, "p.yaml: environment")
    with pytest.raises(UserError, match="arguments are for a function, and the score is number; remove them"):
        validate(EnvironmentConfig, fields | {"arguments": {"a": 1}}, "p.yaml: environment")
    environment = open_environment(config, "environment").make()
    environment.reset({"id": "0", "answer": "5", "prompt": []})
    scores = environment.score([{"role": "assistant", "content": "It is 5."}])
    assert scores.total == 1.0 and scores.parts["unequal"] == 0.0
    assert config.identity() != config.model_copy(update={"score": EnvironmentVerifier(exact="answer")}).identity()


def test_reasons_are_the_metrics_of_one():
    scores = {"math": 0.0, "math_timed_out": 1.0, "math_unequal": 0.0, "unequal": 1.0, "style": 1.0, "f_failed": 1.0}
    assert reasons_in(scores) == {"math": "timed_out", "score": "unequal", "f": "failed"}


@pytest.mark.parametrize(
    ("kind", "counts", "text"),
    [
        (
            "math",
            {"no_answer": 32},
            r"32 of 32: no_answer; `math` reads a box \(.*\), ####, 'answer is',.* in the prompt$",
        ),
        ("number", {"unequal": 12, "unparsable": 20}, "^20 of 32: unparsable, 12 of 32: unequal; `number` reads a box"),
        ("choice", {"unequal": 32}, "`choice` read other answers than the references"),
        ("exact", {"unequal": 32}, "`exact` compares the whole answer: ask for the answer and nothing else"),
        ("contains", {"no_answer": 32}, "`contains` found empty answers"),
        ("json_schema", {"no_answer": 32}, "`json_schema` reads an answer that is JSON"),
        ("code", {"crashed": 30, "unequal": 2}, "`code` runs programs that end with an error"),
        ("math", {"timed_out": 32}, "`math` reached its limit of time: raise `seconds`"),
    ],
)
def test_reasons_name_what_the_verifier_reads(kind: str, counts: dict[str, int], text: str) -> None:
    assert re.search(text, explain_reasons(kind, counts, 32))


def test_every_verifier_says_what_it_reads() -> None:
    assert {*PLACES, *WHOLE} == set(VERIFIERS)


def test_reasons_are_told_for_scores_near_0_only() -> None:
    kinds = {"math": "math", "ifeval": "ifeval"}
    rates = {"math_no_answer": 0.97, "ifeval_unequal": 1.0}
    # Half of the instructions followed is a score of 1/2, with a reason.
    (line,) = explain_low_scores(kinds, rates, 64, {"math": 0.03, "ifeval": 0.5})
    assert line.startswith("62 of 64: no_answer; `math` reads")
    assert explain_low_scores(kinds, rates | {"math_no_answer": 0.9}, 64, {"math": 0.1, "ifeval": 0.5}) == []
