"""Verifiers as scorers: the same object scores for training, for ``evaluate`` and for ``align rollout``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from align.config.verifiers import VerifierFields
from align.data.rows import Row
from align.errors import UserError, require_extra, shorten
from align.scoring.scored import Kind, Scored, Scorer
from align.verifiers import answers, code
from align.verifiers.sandbox.isolation import Limits, Sandbox, is_installed, open_sandbox
from align.verifiers.verdict import CRASHED, REASONS, TIMED_OUT, UNPARSABLE, BadReference, Verdict, reference_value
from align.verifiers.workers import Comparison, cores, shared_pool

DIRECT: Mapping[str, Callable[[Any, str], Verdict]] = {
    "number": answers.number,
    "choice": answers.choice,
    "exact": answers.exact,
    "contains": answers.contains,
}
"""Verifiers whose time grows with the length of the answer only, so they need no process that can be killed."""
COMPARING = frozenset({"math", "number", "choice", "exact", "contains", "code"})
"""Verifiers by which a right answer scores 1 and any other 0. The others check a form, which a reference may lack."""
PACKAGES = {"math": "math_verify", "json_schema": "jsonschema"}
"""Packages of ``align-pipeline[verify]`` that a verifier needs."""


@dataclass
class VerifierScorer(Scorer):
    """A verifier as a scorer. Each reason of a score below 1 is a metric, 1 for a response with this reason, else 0."""

    config: VerifierFields
    place: str
    """Place of the entry in the YAML, for messages."""
    sandbox: Sandbox | None = None
    """Isolation of the programs of ``code``."""
    _checked: dict[str, code.ProgramTests | BadReference] = field(default_factory=dict, repr=False, compare=False)
    """Tests by their reference as JSON, or what is wrong with them."""

    @property
    def path(self) -> str:
        """Name in messages."""
        return str(self.config.verifier)

    @property
    def kind(self) -> Kind:
        """The scorer's kind."""
        return "verifier" if self.path in COMPARING else "format"

    def facts(self) -> dict[str, Any]:
        """Return the level of isolation of programs."""
        return {} if self.sandbox is None else {"sandboxes": self.sandbox.level}

    def score(self, rows: Sequence[Row], responses: Sequence[str], truncated: Sequence[bool] | None = None) -> Scored:
        """Return the scores, and as metrics 0 or 1 for each reason.

        Raises ``UserError`` for a row without the column, and for a reference that the verifier cannot read.
        """
        verdicts = self.verify(rows, responses)
        metrics = {
            reason: [float(verdict.reason == reason) for verdict in verdicts] for reason in reasons_of(self.path)
        }
        return Scored([verdict.score for verdict in verdicts], metrics=metrics)

    def verify(self, rows: Sequence[Row], responses: Sequence[str]) -> list[Verdict]:
        """Return the verdicts on the responses; raises as ``score`` does."""
        references = [self._reference(row) for row in rows]
        kind = self.path
        verdicts: list[Verdict | BadReference]
        # Programs run in sandboxes. Cheap comparisons run here, and all others in processes that can be killed.
        if kind == "code":
            verdicts = self._run_programs(references, responses)
        elif kind in DIRECT:
            verdicts = [self._compare(*pair) for pair in zip(references, responses, strict=True)]
        else:
            comparisons = [
                Comparison(kind, reference, response, self.config.seconds)
                for reference, response in zip(references, responses, strict=True)
            ]
            verdicts = shared_pool().verify(comparisons)
        return [self._check(row, verdict) for row, verdict in zip(rows, verdicts, strict=True)]

    def check_references(self, rows: Sequence[Row]) -> None:
        """Read the references of all rows. Raises as ``score`` does.

        Tests of programs run once with a program that returns nothing.
        """
        if self.path == "code":
            references = [self._reference(row) for row in rows]
            problems = self._read_tests(references)
            for row, problem in zip(rows, problems, strict=True):
                if isinstance(problem, BadReference):
                    raise self._refusal(row, problem)
        else:
            self.verify(rows, [""] * len(rows))

    def _reference(self, row: Row) -> Any:
        value = getattr(self.config, self.path)
        if self.path == "regex" or isinstance(value, dict):
            return value
        if self.path == "ifeval" and value == "instruction_id_list":
            return {name: reference_value(row, name, self.place) for name in ("instruction_id_list", "kwargs")}
        return reference_value(row, value, f"{self.place}.{self.path}")

    def _read_tests(self, references: Sequence[Any]) -> list[code.ProgramTests | BadReference]:
        """Return the tests in each reference, or what is wrong with it. Each is checked once."""
        names = [json.dumps(reference, sort_keys=True, default=str) for reference in references]
        unread = {
            name: reference for name, reference in zip(names, references, strict=True) if name not in self._checked
        }
        for name, reference in unread.items():
            try:
                self._checked[name] = code.read_tests(reference)
            except BadReference as error:
                self._checked[name] = error
        tests = {name: each for name in unread if isinstance(each := self._checked[name], code.ProgramTests)}
        assert self.sandbox is not None
        with ThreadPoolExecutor(cores(), "references") as threads:
            problems = code.check_references(list(tests.values()), self.sandbox, self._limits, threads.map)
        for name, problem in zip(tests, problems, strict=True):
            if problem is not None:
                self._checked[name] = problem
        return [self._checked[name] for name in names]

    @property
    def _limits(self) -> Limits:
        return Limits(self.config.seconds, self.config.memory_mb)

    def _run_programs(self, references: Sequence[Any], responses: Sequence[str]) -> list[Verdict | BadReference]:
        """Run the program of each response against its tests, as many at the same time as there are cores."""
        assert self.sandbox is not None
        sandbox, limits, tolerance = self.sandbox, self._limits, self.config.tolerance
        verdicts: list[Verdict | BadReference] = []

        def run(tests: code.ProgramTests | BadReference, response: str) -> Verdict | BadReference:
            if isinstance(tests, BadReference):
                return tests
            return code.verify(code.find_program(response, tests.entry_point), tests, sandbox, limits, tolerance)

        with ThreadPoolExecutor(cores(), "programs") as threads:
            for verdict in threads.map(run, self._read_tests(references), responses):
                verdicts.append(verdict)
                if self.report is not None:
                    self.report(len(verdicts), len(responses))
        return verdicts

    def _compare(self, reference: Any, response: str) -> Verdict | BadReference:
        try:
            return DIRECT[self.path](reference, response)
        except BadReference as error:
            return error

    def _check(self, row: Row, verdict: Verdict | BadReference) -> Verdict:
        if isinstance(verdict, Verdict):
            return verdict
        raise self._refusal(row, verdict)

    def _refusal(self, row: Row, problem: BadReference) -> UserError:
        value = shorten(repr(self._reference(row)), 80)
        return UserError(
            f"{self.place}.{self.path}: row {row.get('id', '')}: the reference {value} {problem}. Correct or drop the "
            "row, or use another verifier."
        )


def reasons_of(kind: str) -> tuple[str, ...]:
    """Return the reasons that a verifier can give."""
    if kind == "number":
        return tuple(reason for reason in REASONS if reason not in (TIMED_OUT, CRASHED))
    if kind in DIRECT:
        return tuple(reason for reason in REASONS if reason not in (TIMED_OUT, CRASHED, UNPARSABLE))
    return REASONS


def open_verifier(config: VerifierFields, place: str) -> VerifierScorer:
    """Return the scorer of a verifier. Raises ``UserError``, which begins with ``place``, for a missing package."""
    kind = str(config.verifier)
    if kind in PACKAGES:
        require_extra(PACKAGES[kind], "verify", f"{place}.{kind}:")
    if kind != "code":
        return VerifierScorer(config, place)
    sandbox = open_sandbox(config.sandbox, place)
    for name in config.packages if sandbox.level != "command" else ():
        if not is_installed(name):
            raise UserError(
                f"{place}.packages: {name} is not installed here. Install it (`pip install`), or remove it."
            )
    return VerifierScorer(config, place, replace(sandbox, packages=tuple(config.packages)))
