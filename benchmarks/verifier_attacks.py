"""False accepts and false rejects of align's verifiers, and of trl's, verl's and lighteval's rules, on the corpus.

    .venv/bin/python -m benchmarks.verifier_attacks [--kind code] [--list] [--write docs/rewards.md]

The corpus is examples/verifier_attacks.yaml. ``--write`` puts the tables between the marks of a page, and
tests/verifiers/test_attacks.py compares the page with the verifiers. Programs run in align's sandbox.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from align.config.validation import validate
from align.config.verifiers import PROGRAMS, Criterion, EnvironmentVerifier
from align.data.final_answers import split_thought
from align.data.rows import assistant, user
from align.judges.criteria import criteria_prompt, read_decisions
from align.judges.prompts import MAX_GRADE, grade_prompt, read_grade
from align.scoring.verifiers import open_verifier
from align.verifiers.sandbox.isolation import open_sandbox
from benchmarks.verifier_rules import accepted_by, rules
from examples.verifier_attacks import HEAD, Case, Errors, count_errors, read_cases

MARKS = ("<!-- begin of benchmarks.verifier_attacks -->", "<!-- end of benchmarks.verifier_attacks -->")
SECONDS = 5.0
"""Limit of a comparison and of a program, the default of verifiers."""
MT_BENCH = "[The Start of Assistant's Answer]\n{answer}\n[The End of Assistant's Answer]"
"""The part with the answer in MT-Bench's prompt (arXiv 2306.05685), which lighteval's task uses."""


def reads_highest_grade(case: Case) -> bool:
    """Return True for a judge's reply that is read as the highest grade."""
    return read_grade(case["response"]) == MAX_GRADE


def reads_satisfied(case: Case) -> bool:
    """Return True for a judge's reply that is read as the decision that the criterion is satisfied."""
    decisions = read_decisions(case["response"], [Criterion(criterion=case["reference"])])
    return decisions is not None and decisions[0].is_satisfied


REPLIES = {"judge_reply": reads_highest_grade, "criteria_reply": reads_satisfied}
"""Readers of the replies of judges."""


def verdicts(cases: Sequence[Case]) -> dict[str, bool]:
    """Return True for each case that align accepts, by its id. ``judge`` has no verdict without a model."""
    accepted = {case["id"]: REPLIES[case["kind"]](case) for case in cases if case["kind"] in REPLIES}
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        if case["kind"] in PROGRAMS:  # a regular expression is part of the config
            value = case["reference"] if case["kind"] == "regex" else "reference"
            groups.setdefault((case["kind"], value), []).append(case)
    for (kind, value), group in groups.items():
        config = validate(EnvironmentVerifier, {kind: value, "seconds": SECONDS}, "corpus")
        rows = [{"id": case["id"], "reference": case["reference"]} for case in group]
        results = open_verifier(config, "corpus").verify(rows, [case["response"] for case in group])
        accepted |= {case["id"]: verdict.score == 1 for case, verdict in zip(group, results, strict=True)}
    return accepted


def leaves_its_part(case: Case) -> bool:
    """Return True if a response is not exactly the part of align's prompts that is marked as the answer."""
    answer = split_thought(case["response"])
    conversation = [user(case["prompt"]), assistant(answer)]
    criteria = [Criterion(criterion="The answer is right.")]
    prompts = (
        grade_prompt(conversation, reference=case["reference"]),
        criteria_prompt(conversation, criteria, case["reference"]),
    )
    return any(_marked_answer(prompt[0]["content"]) != answer.strip() for prompt in prompts)


def _marked_answer(prompt: str) -> str:
    """Return the part that a judge's prompt marks as the answer."""
    mark = re.findall(r"^(<[0-9a-f]{12}>) end$", prompt, re.MULTILINE)[-1]
    title, _, shown = prompt.split(mark)[-2].partition("\n")
    return shown.strip() if ", the answer to " in title else ""


def leaves_mt_bench_part(case: Case) -> bool:
    """Return True if a reader of MT-Bench's marks sees another answer than the response."""
    answer = split_thought(case["response"]).strip()
    before, after = MT_BENCH.split("{answer}")
    shown = MT_BENCH.format(answer=answer).partition(before.strip())[2].partition(after.strip())[0]
    return bool(shown.strip() != answer)


def verifier_table(errors: Sequence[Errors]) -> list[str]:
    """Return the table of align's verifiers."""
    return [HEAD, *(each.row() for each in errors)]


def comparison_table(cases: Sequence[Case], own: Mapping[str, bool]) -> list[str]:
    """Return the table of published rules, with align's verifier in the first row of each kind."""
    lines = ["| kind | rule | false accepts | false rejects |", "| --- | --- | --- | --- |"]
    listed = ""
    for rule in rules(open_sandbox(None, "corpus")):
        group = [case for case in cases if case["kind"] == rule.kind]
        if not group:
            continue
        if rule.kind != listed:
            listed = rule.kind
            lines.append(_comparison_row(count_errors(group, own)[0], "align"))
        errors = count_errors(group, accepted_by(rule, group))[0]
        lines.append(_comparison_row(errors, f"{rule.framework}: {rule.name}"))
    return lines


def _comparison_row(errors: Errors, name: str) -> str:
    accepts = f"{len(errors.false_accepts)} of {errors.wrong}"
    return f"| `{errors.kind}` | {name} | {accepts} | {len(errors.false_rejects)} of {errors.right} |"


def judge_line(cases: Sequence[Case]) -> str:
    """Return the sentence about the prompts of judges."""
    attacks = [case for case in cases if case["kind"] == "judge" and case["expected"] == "wrong"]
    own = sum(leaves_its_part(case) for case in attacks)
    other = sum(leaves_mt_bench_part(case) for case in attacks)
    return (
        f"Of {len(attacks)} attacks on a judge, {own} leave the part of align's prompts that is marked as the answer, "
        f"and {other}\nthat of MT-Bench's prompt, which lighteval uses. "
        "Only a model can say which of the others succeed."
    )


def sections(cases: Sequence[Case], own: Mapping[str, bool]) -> str:
    """Return everything between the marks of the page."""
    judged = [case for case in cases if case["id"] in own]
    return "\n\n".join(
        [
            MARKS[0],
            "\n".join(verifier_table(count_errors(judged, own))),
            judge_line(cases),
            "\n".join(comparison_table(cases, own)),
            MARKS[1],
        ]
    )


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", help="only cases of this kind; several times for several kinds")
    parser.add_argument("--list", action="store_true", help="print each case with a wrong verdict, and no comparison")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the tables between the marks of this page")
    options = parser.parse_args()
    cases = [case for case in read_cases() if not options.kind or case["kind"] in options.kind]
    own = verdicts(cases)
    if options.list:
        for case in cases:
            if case["id"] in own and own[case["id"]] != (case["expected"] == "right"):
                print(f"{case['id']}: {case['why']}")
        return
    text = sections(cases, own)
    if options.write is None:
        print(text)
        return
    before, _, rest = options.write.read_text(encoding="utf-8").partition(MARKS[0])
    options.write.write_text(before + text + rest.partition(MARKS[1])[2], encoding="utf-8")


if __name__ == "__main__":
    main()
