"""``align score``: score stored rows and responses again, compare two scores, and validate a score before training.

Heavy imports wait until it runs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from align.cli.parser import add_store, align_columns, print_json, print_warning
from align.config.scores import CheckName
from align.errors import UserError, printable, shorten

if TYPE_CHECKING:
    from align.cli.score_data import ScoreData
    from align.cli.score_spec import ScoreSpec
    from align.evaluation.rescoring import Agreement, Rescored, StoredResponse
    from align.evaluation.score_validation.validation import Validation
    from align.scoring.score import WeightedSum

MOST_COMPARED = 2
EXCERPT = 160
"""Characters of a response that an example shows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help="a recipe, a build, a key, PIPELINE:STAGE, or a file of records, like samples.jsonl",
    )
    parser.add_argument(
        "--with",
        action="append",
        required=True,
        metavar="SPEC",
        dest="specs",
        help="a score: a function, a `score:` list as YAML ('{math: answer}'), a .yaml file, or PIPELINE.yaml:STAGE; "
        "give two to compare them",
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="check references and wrong answers as a stage does before training; exit code 1 if it would refuse",
    )
    parser.add_argument("--split", choices=["train", "test"], default="train", help="rows to score (train)")
    parser.add_argument("--rows", metavar="BUILD", help="a build with the rows that stored responses answer")
    parser.add_argument(
        "--max-rows", type=int, metavar="N", help="rows to score, or to validate on (all; --validate: 32)"
    )
    parser.add_argument("--floor", type=float, metavar="X", help="share of rows that must pass a check (0.9)")
    parser.add_argument("--reference", metavar="COLUMN", help="column with the right answer, for --validate")
    parser.add_argument(
        "--waive",
        action="append",
        choices=get_args(CheckName),
        metavar="CHECK",
        help="show this check of --validate, but refuse nothing for it; repeatable: empty, wrong, row",
    )
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="disagreements to show (3)")
    parser.add_argument("--output", metavar="FILE", help="write the scores to a file of JSON lines")
    add_store(parser)


def run(options: argparse.Namespace) -> int:
    """Run ``align score``; return 0, or 1 for a score that a stage would refuse."""
    from align.cli.score_data import read_data
    from align.cli.score_spec import read_spec

    _check_options(options)
    specs = [read_spec(word, options.store) for word in options.specs]
    data = read_data(options.data, options.store, options.split, options.rows)
    with tempfile.TemporaryDirectory(prefix="align-score-") as folder:
        scorers = [spec.open(Path(folder) / str(index), print_warning) for index, spec in enumerate(specs)]
        if options.validate:
            return _validate(options, data, specs, scorers)
        return _score(options, data, specs, scorers)


def _check_options(options: argparse.Namespace) -> None:
    if len(options.specs) > MOST_COMPARED:
        raise UserError(f"--with is given {len(options.specs)} times; at most two scores are compared.")
    if options.max_rows is not None and options.max_rows < 1:
        raise UserError(f"--max-rows is {options.max_rows}; it must be at least 1.")
    if not options.validate:
        for name in ("floor", "reference", "waive"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} is for --validate; add that option.")
    elif options.output is not None:
        raise UserError("--output writes scores, and --validate scores only a sample; remove one of them.")


# ---- validation ----


def _validate(options: argparse.Namespace, data: ScoreData, specs: list[ScoreSpec], scorers: list[WeightedSum]) -> int:
    from align.config.scores import ScoreValidation
    from align.config.validation import validate
    from align.evaluation.score_validation.validation import check_references, columns_of, validate_parts

    given = {name: getattr(options, name) for name in ("floor", "reference", "waive")} | {"rows": options.max_rows}
    given = {name: value for name, value in given.items() if value is not None}
    validations = []
    for spec, scorer in zip(specs, scorers, strict=True):
        settings = validate(ScoreValidation, spec.validation.model_dump() | given, "score")
        columns = columns_of(spec.entries)
        check_references(scorer.parts, data.rows)
        validations.append(
            validate_parts(scorer.parts, data.rows, settings, place=spec.name, columns=columns, with_models=True)
        )
    if not any(validation.reports for validation in validations):
        raise UserError(f"{options.data}: {'; '.join(validations[0].all_notes())}.")
    if options.json:
        pairs = zip(specs, validations, strict=True)
        print_json([_validation_json(spec, validation) for spec, validation in pairs])
    else:
        for spec, validation in zip(specs, validations, strict=True):
            _print_validation(spec, validation)
    return int(any(validation.problems() for validation in validations))


def _validation_json(spec: ScoreSpec, validation: Validation) -> dict[str, Any]:
    return {
        "score": spec.name,
        "floor": validation.settings.floor,
        "rewards": validation.to_json(),
        "notes": validation.all_notes(),
        "problems": validation.problems(),
    }


def _print_validation(spec: ScoreSpec, validation: Validation) -> None:
    print(printable(f"{spec.name}:"))
    for line in align_columns(validation.table(), text_columns=1):
        print(printable(f"  {line}"))
    for note in validation.all_notes():
        print(printable(f"  {note}"))
    problems = validation.problems()
    for problem in problems:
        print(printable(f"✗ {problem}."))
    if problems:
        waived = [f"--waive {name}" for name in validation.failing()]
        print(f"If the score is meant so, repeat this with {' '.join(waived)}: a stage then has the line")
        print(f"  {validation.waiver()}")
    if not problems:
        print(f"A stage would accept this score (floor {validation.settings.floor:g}).")


# ---- scores ----


def _score(options: argparse.Namespace, data: ScoreData, specs: list[ScoreSpec], scorers: list[WeightedSum]) -> int:
    from align.evaluation.rescoring import compare, rescore, stored_scores

    responses = _limit(data, options.max_rows)
    if not responses:
        raise UserError(
            f"{options.data}: its rows have no responses to score; --validate scores references and wrong answers."
        )
    scored = [rescore(spec.name, scorer, responses) for spec, scorer in zip(specs, scorers, strict=True)]
    others = [*scored, *filter(None, [stored_scores(responses)])]
    agreement = compare(*others[:2]) if len(others) > 1 else None
    if options.output is not None:
        _write_scores(Path(options.output), responses, scored)
    if options.json:
        document: dict[str, Any] = {"data": data.name, "scores": [entry.summary() for entry in others]}
        document["agreement"] = None if agreement is None else agreement.to_json(responses, options.examples)
        print_json(document)
        return 0
    print(printable(f"{data.name}: {len(responses)} responses to {len({id(r.row) for r in responses})} rows"))
    for line in _summary_lines(others):
        print(printable(line))
    if agreement is not None:
        _print_agreement(agreement, responses, options.examples)
    return 0


def _limit(data: ScoreData, count: int | None) -> list[StoredResponse]:
    """Return the responses of at most ``count`` rows at equal distances."""
    if count is None or count >= len(data.rows):
        return data.responses
    chosen = {id(data.rows[index * len(data.rows) // count]) for index in range(count)}
    return [response for response in data.responses if id(response.row) in chosen]


def _summary_lines(scored: list[Rescored]) -> list[str]:
    """Return a table of the scores, their parts and their reasons."""
    table = [["score", "responses", "mean", "min", "max"]]
    reasons = []
    for entry in scored:
        summary = entry.summary()
        numbers = [_number(summary[name]) for name in ("mean", "min", "max")]
        table.append([entry.name, str(summary["responses"]), *numbers])
        for name, mean in summary["parts"].items():
            table.append([f"  {name}", "", _number(mean), "", ""])
        if summary["reasons"]:
            counts = ", ".join(f"{count} {reason}" for reason, count in summary["reasons"].items())
            reasons.append(f"reasons of {entry.name}: {counts}")
    return [*align_columns(table, text_columns=1), *reasons]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _print_agreement(agreement: Agreement, responses: list[StoredResponse], examples: int) -> None:
    """Print how two scores agree, and examples. Responses are hostile text."""
    first, second = agreement.first.name, agreement.second.name
    correlation = "" if agreement.correlation is None else f", rank correlation {agreement.correlation:.2f}"
    count = len(agreement.disagreements)
    share = count / agreement.compared if agreement.compared else 0.0
    print(printable(f"{first} and {second} disagree about {count} of {agreement.compared} ({share:.1%}){correlation}"))
    for example in agreement.to_json(responses, examples)["examples"]:
        print(printable(f"  row {shorten(repr(example['id']), 80)}, {example['response']}:"))
        for name, score, reason in zip((first, second), example["scores"], example["reasons"], strict=True):
            print(printable(f"    {name}: {score:g}{f' ({reason})' if reason else ''}"))
        print(printable(f"    {shorten(repr(example['text'][-EXCERPT:]), EXCERPT)}"))


def _write_scores(path: Path, responses: list[StoredResponse], scored: list[Rescored]) -> None:
    """Write a line for each response: id, place, and each score with its reason and its parts."""
    from align.store.json_files import write_text_atomically

    lines = []
    for index, response in enumerate(responses):
        line: dict[str, Any] = {"id": str(response.row.get("id", "")), "response": response.name, "scores": {}}
        for entry in scored:
            parts = {name: values[index] for name, values in entry.parts.items()}
            line["scores"][entry.name] = {"score": entry.scores[index], "reason": entry.reasons[index], **parts}
        lines.append(json.dumps(line, default=str) + "\n")
    write_text_atomically(path, "".join(lines))
