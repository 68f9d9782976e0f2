"""Rules of trl, verl and lighteval for verdicts, to compare them with align's verifiers on the same cases.

trl's rule is its own function. The others are written here from their descriptions:

- verl, verl/utils/reward_score: ``gsm8k`` reads the last 300 characters, reads the last ``#### N`` (or, ``flexible``,
  the last number), removes commas and compares texts; ``math_verify`` compares all that math-verify extracts from the
  response, as an expression or in LaTeX, with the boxed reference.
- lighteval 0.13: ``expr_gold_metric`` of GSM8K and the metrics of MATH use the same extraction, with boxes first;
  ``gpqa_instruct_metric`` reads the letter after "answer", else any letter that stands by itself, the last one; ``exact
  match`` and ``quasi exact match`` compare texts, the latter without case, punctuation and articles (HELM).
- Programs: HumanEval's harness, verl's ``prime_code`` and lighteval's LiveCodeBench metric execute program and tests in
  one Python process. Here that process is in align's sandbox, so that the corpus can be run.

Left out: verl's and lighteval's own processes, their limits of memory, and weights of format.
"""

from __future__ import annotations

import multiprocessing
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from align.verifiers.code import ProgramTests, find_program, read_tests, verify
from align.verifiers.sandbox.isolation import Limits, Sandbox
from examples.verifier_attacks import Case

SECONDS = 20.0
"""Wall-clock limit of one verdict. A rule that exceeds it rejects the response."""
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_NUMBER = re.compile(r"-?[0-9.,]+")
_MARKED = re.compile(r"#### (-?[0-9.,]+)")
_ANSWER = re.compile(r"answer\b(?:\s+is)?\s*:?\s*[^\w\n]*([A-D])\b", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """A published rule for one kind of case."""

    framework: str
    name: str
    kind: str
    accept: Callable[[Case], bool]


def trl_accuracy(case: Case) -> bool:
    """Return the verdict of trl's ``accuracy_reward``."""
    from trl.rewards import accuracy_reward  # type: ignore[attr-defined]

    return accuracy_reward([[{"role": "assistant", "content": case["response"]}]], [case["reference"]])[0] == 1.0


def verl_gsm8k(case: Case) -> bool:
    """Compare the last ``#### N`` of the last 300 characters with the reference, as texts."""
    marked = _MARKED.findall(case["response"][-300:])
    return bool(marked) and marked[-1].replace(",", "") == case["reference"]


def verl_gsm8k_flexible(case: Case) -> bool:
    """Compare the last number of the last 300 characters with the reference, as texts."""
    numbers = [number for number in _NUMBER.findall(case["response"][-300:]) if number.strip(".")]
    return bool(numbers) and numbers[-1] == case["reference"]


def verl_math_verify(case: Case) -> bool:
    """Compare all that math-verify extracts with the boxed reference."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    gold = f"\\boxed{{{case['reference']}}}"
    return _math_verify(case, gold, [LatexExtractionConfig()], [ExprExtractionConfig(), LatexExtractionConfig()], 6)


def lighteval_expression(case: Case) -> bool:
    """Compare what math-verify extracts with the reference, boxes first: lighteval's rule for GSM8K."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    targets = [ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)]
    return _math_verify(case, case["reference"], [ExprExtractionConfig()], targets, 5)


def lighteval_latex(case: Case) -> bool:
    """Compare what math-verify extracts with the reference, boxes first: lighteval's rule for MATH."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    targets = [ExprExtractionConfig(), LatexExtractionConfig(boxed_match_priority=0)]
    return _math_verify(case, f"${case['reference']}$", [LatexExtractionConfig()], targets, 6)


def _math_verify(case: Case, gold: str, gold_targets: Sequence[Any], targets: Sequence[Any], digits: int) -> bool:
    from math_verify import parse
    from math_verify import verify as compare

    return bool(compare(parse(gold, gold_targets), parse(case["response"], targets), float_rounding=digits))


def lighteval_letter(case: Case) -> bool:
    """Take the last letter after "answer", else the last letter that stands by itself."""
    letters = _ANSWER.findall(case["response"]) or re.findall(r"\b([A-D])\b", case["response"])
    return bool(letters) and letters[-1].upper() == case["reference"]


def lighteval_exact(case: Case) -> bool:
    """Compare the texts."""
    return bool(case["response"].strip() == case["reference"].strip())


def lighteval_quasi_exact(case: Case) -> bool:
    """Compare the texts without case, punctuation and articles."""
    return _normalize(case["response"]) == _normalize(case["reference"])


def _normalize(text: str) -> str:
    plain = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(_ARTICLE.sub(" ", plain).split())


ONE_PROCESS = """
import contextlib, io, sys

def run_tests():
    program, tests, cases = {program!r}, {tests!r}, {cases!r}
    result = []
    if tests:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(program + "\\n" + tests, {{"__name__": "__main__"}})
    for input, expected in cases:
        output = io.StringIO()
        sys.stdin = io.StringIO(input)
        with contextlib.redirect_stdout(output):
            exec(program, {{"__name__": "__main__"}})
        if output.getvalue().split("\\n") != expected.split("\\n") and output.getvalue().strip() != expected.strip():
            return result
    result.append("passed")
    return result

out = sys.stdout
result = []
try:
    result = run_tests()
except BaseException:
    pass
if result and result[0] == "passed":
    print("passed", file=out)
"""
"""Program and tests in one process, as harnesses run them; only the processes and limits around it are align's."""


def one_process(case: Case, sandbox: Sandbox) -> bool:
    """Return True if program and tests end without an exception in one process."""
    tests = read_tests(case["reference"])
    text = "\n".join([tests.setup, *tests.asserts])
    if tests.entry_point:
        text += f"\ncheck({tests.entry_point})\n"
    program = find_program(case["response"], tests.entry_point)
    harness = ONE_PROCESS.format(program=program, tests=text.strip(), cases=list(tests.cases))
    return (
        bool(program.strip()) and verify(harness, ProgramTests(cases=(("", "passed"),)), sandbox, Limits()).score == 1
    )


def rules(sandbox: Sandbox) -> list[Rule]:
    """Return all rules; programs run in ``sandbox``."""
    return [
        Rule("trl", "`accuracy_reward`", "number", trl_accuracy),
        Rule("verl", "`gsm8k`, strict", "number", verl_gsm8k),
        Rule("verl", "`gsm8k`, flexible", "number", verl_gsm8k_flexible),
        Rule("lighteval", "GSM8K's `expr_gold_metric`", "number", lighteval_expression),
        Rule("trl", "`accuracy_reward`", "math", trl_accuracy),
        Rule("verl", "`math_verify`", "math", verl_math_verify),
        Rule("lighteval", "MATH's metric", "math", lighteval_latex),
        Rule("lighteval", "`gpqa_instruct_metric`", "choice", lighteval_letter),
        Rule("lighteval", "exact match", "exact", lighteval_exact),
        Rule("lighteval", "quasi exact match", "exact", lighteval_quasi_exact),
        Rule("verl, lighteval", "program and tests in one process", "code", lambda case: one_process(case, sandbox)),
    ]


def accepted_by(rule: Rule, cases: Sequence[Case]) -> Mapping[str, bool]:
    """Return the verdicts of a rule by case. A rule that hangs or raises rejects, in a process that can be killed."""
    verdicts: dict[str, bool] = {}
    process: Any = None
    for case in cases:
        if process is None:
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("fork").Process(target=_serve, args=(theirs, rule), daemon=True)
            process.start()
        ours.send(case)
        if ours.poll(SECONDS):
            verdicts[case["id"]] = ours.recv()
            continue
        verdicts[case["id"]] = False
        process.kill()
        process = None
    if process is not None:
        process.kill()
    return verdicts


def _serve(connection: Connection, rule: Rule) -> None:
    while True:
        case = connection.recv()
        try:
            connection.send(bool(rule.accept(case)))
        except Exception:
            connection.send(False)
