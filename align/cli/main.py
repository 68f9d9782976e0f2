"""The command line ``align``. Torch is imported only by commands that need a model."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from align.cli.parser import (
    Parser,
    add_assignments,
    add_executor,
    add_store,
    exported_store,
    find_command,
    import_late,
    load,
    print_json,
    print_pins,
)
from align.cli.streams import GuardedStream, OutputEnded, guarded_streams
from align.errors import StageFailed, UserError, is_no_space, no_space, printable
from align.pipeline.stop_signal import Stopped
from align.store.artifacts import VERSION

if TYPE_CHECKING:
    from align.capacity.memory import Estimate
    from align.pipeline.pipeline import Pipeline
    from align.runner.plan import Step

FAILED = 1
INTERRUPTED = 130


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pipeline", metavar="PIPELINE", help="a pipeline file, or the name of a shipped one: quickstart"
    )
    add_assignments(parser, "override a field, like stages.ppo.kl_coef=0.1; repeatable")
    parser.add_argument(
        "--offline", action="store_true", help="take models and datasets of the Hub from its cache on this machine"
    )
    add_store(parser)


def _add_stages(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="from_", metavar="STAGE", help="rerun this stage and all that depend on it")
    parser.add_argument("--only", metavar="STAGE", help="run this stage only; its inputs must be finished")
    parser.add_argument("--rebuild", action="append", default=[], metavar="STAGE", help="rerun this stage; repeatable")


def _add_run(parser: argparse.ArgumentParser) -> None:
    _add_pipeline(parser)
    _add_stages(parser)
    parser.add_argument("--strict", action="store_true", help="refuse artifacts from other source code")
    add_executor(parser, "stages")
    parser.add_argument("--detach", action="store_true", help="submit the stages to the cluster and return")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    from align.cli import plan_hardware

    _add_pipeline(parser)
    _add_stages(parser)
    parser.add_argument(
        "--resolved", action="store_true", help="print the pipeline with its base files, variables and --set filled in"
    )
    parser.add_argument(
        "--memory", action="store_true", help="estimate the memory of each tuning method and of PPO's critic"
    )
    plan_hardware.add_arguments(parser)


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, a key, or PIPELINE:STAGE")
    parser.add_argument("--store", metavar="DIR")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=256)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    add_store(parser)
    parser.add_argument(
        "--engines", action="store_true", help="import vLLM and check that its servers could start (half a minute)"
    )


def _plan(options: argparse.Namespace) -> int:
    from align.cli import plan_hardware
    from align.config.yaml import dump_yaml
    from align.runner.open_store import open_store
    from align.runner.plan import choose_stages, plan
    from align.runner.stage_speed import plan_notes as precision_notes

    pipeline = load(options)
    if options.resolved:
        if options.json:
            print_json(pipeline.resolved)
        else:
            print(printable(dump_yaml(pipeline.resolved)), end="")
            _print_recipes(pipeline)
        return 0
    store = open_store(pipeline, options.store)
    if options.hardware is not None:
        return plan_hardware.run(options, pipeline, store)
    plan_hardware.refuse_without_hardware(options)
    forced = choose_stages(pipeline, store, options.only, options.from_, tuple(options.rebuild))
    used = pipeline.touched_by(options.only)
    steps = [step for step in plan(pipeline, store, forced) if step.node.name in used]
    memory: Mapping[str, Estimate | str] = {}
    if options.memory:
        from align.capacity.plan import estimate_memory

        memory = estimate_memory(pipeline, store)
    if options.json:
        print_json([_step_json(step, memory.get(step.node.name)) for step in steps])
        return 0
    width = max(len(step.node.name) for step in steps)
    for step in steps:
        print(printable(f"{step.node.name:<{width}}  {step.action:<7}  {step.node.key[:12]}  {step.why}"))
        for note in step.notes:
            print(printable(f"{'':<{width}}  · {note}"))
    for note in precision_notes(pipeline, steps):
        print(printable(note))
    print_pins(pipeline)
    plan_hardware.print_memory(memory, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)
    return 0


def _print_recipes(pipeline: Pipeline) -> None:
    """Print, as comments, the recipe that each data stage with a dataset expands to."""
    from align.config.stages.inputs import DataConfig
    from align.config.yaml import dump_yaml
    from align.stages.data import resolved_recipe

    for node in pipeline:
        if isinstance(node.config, DataConfig) and node.config.dataset is not None:
            settings = resolved_recipe(node.config, pipeline.base).model_dump(mode="json", exclude_unset=True)
            print(f"\n# The recipe that stages.{node.name} stands for; in a file of its own it can get steps:")
            for line in dump_yaml(settings).splitlines():
                print(printable(f"# {line}"))


def _step_json(step: Step, estimate: Estimate | str | None) -> dict[str, Any]:
    """Return a step of the plan as plain data; an estimate that is a text says why the memory is not known."""
    node = step.node
    row: dict[str, Any] = {
        "stage": node.name,
        "kind": node.stage.kind,
        "key": node.key,
        "action": step.action,
        "why": step.why,
    }
    if step.notes:
        row["notes"] = list(step.notes)
    if estimate is not None:
        row["memory"] = {"unknown": estimate} if isinstance(estimate, str) else estimate.to_json()
    return row


def _explain(options: argparse.Namespace) -> int:
    from align.runner.open_store import open_store
    from align.runner.plan import History

    pipeline = load(options)
    store = open_store(pipeline, options.store)
    history = History(pipeline, store)
    changes = {node.name: history.explain(node) for node in pipeline}
    if options.json:
        print_json(changes)
        return 0
    for node in pipeline:
        print(printable(f"{node.name}: {history.state(node)}"))
        for line in changes[node.name]:
            print(printable(f"    {line}"))
    return 0


def _schema(options: argparse.Namespace) -> int:
    from align.pipeline.json_schema import pipeline_schema

    print_json(pipeline_schema())
    return 0


def _chat(options: argparse.Namespace) -> int:
    from align.cli.arguments import find_checkpoint
    from align.cli.lineage import refuse_damage

    checkpoint = find_checkpoint(options.checkpoint, options.store)
    refuse_damage(checkpoint, thorough=False)
    from align.cli.chat import chat

    return chat(checkpoint, system=options.system, temperature=options.temperature, max_tokens=options.max_tokens)


def _doctor(options: argparse.Namespace) -> int:
    from align.cli.doctor import examine

    findings = []
    for finding in examine(options.store, options.engines):
        findings.append(finding)
        if not options.json:
            # Print a line at a time: importing torch from a cold disk can last a minute.
            print(printable(f"{DOCTOR_MARKS[finding.level]} {finding.text}"), flush=True)
    if options.json:
        print_json([finding.to_json() for finding in findings])
    return 1 if any(finding.level == "problem" for finding in findings) else 0


DOCTOR_MARKS = {"ok": " ", "note": "!", "problem": "✗"}


@dataclass(frozen=True)
class Command:
    """One command: its line in ``align --help``, its function, and the function that adds its arguments."""

    purpose: str
    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None]


def _imported(module: str, purpose: str, name: str = "") -> Command:
    """Return a command of ``align.cli.MODULE``, which is imported when the command is used.

    A module with several commands has ``run_NAME`` and ``add_NAME_arguments`` instead of ``run`` and ``add_arguments``.
    """
    run = f"run_{name}" if name else "run"
    add_arguments = f"add_{name}_arguments" if name else "add_arguments"
    return Command(
        purpose, import_late(f"align.cli.{module}:{run}"), import_late(f"align.cli.{module}:{add_arguments}")
    )


COMMANDS: dict[str, Command] = {
    "run": Command(
        "run a pipeline and write its report; finished stages are skipped, a killed stage resumes",
        import_late("align.cli.run:run"),
        _add_run,
    ),
    "plan": Command(
        "show what `run` would do with each stage, and why; --memory and --hardware estimate what it needs",
        _plan,
        _add_plan,
    ),
    "explain": Command("show which fields changed since each stage last finished", _explain, _add_pipeline),
    "init": _imported(
        "init", "copy a commented starting point: a YAML file with data and functions; without a name, list them"
    ),
    "list": _imported("artifacts", "list the artifacts in the store and the runs that use them", "list"),
    "show": _imported(
        "artifacts", "show an artifact's record; --log prints its log, --verify checks the digest of every file", "show"
    ),
    "gc": _imported("artifacts", "list artifacts that no run uses any more; --delete deletes them", "gc"),
    "fields": _imported("fields", "print the fields of a stage or another block: type, default, bounds and meaning"),
    "schema": Command("print the JSON schema of pipeline files, for editors", _schema, add_store),
    "completion": _imported(
        "completion", "print a script for bash, zsh or fish that completes commands, options, files and stages"
    ),
    "chat": Command("chat with a checkpoint: a folder, an artifact's key, or PIPELINE:STAGE", _chat, _add_chat),
    "serve": _imported(
        "serve", "serve checkpoints by vLLM's OpenAI server on this machine, with a key; several adapters of one base"
    ),
    "doctor": Command("check the installation: packages, engine, device and disk space", _doctor, _add_doctor),
    "data": _imported(
        "data", "work with datasets: build a recipe, show its rows, lint them, compare builds, push one to the Hub"
    ),
    "eval": _imported(
        "evaluate", "score checkpoints and their base model by a suite of tasks; cached and resumable like any run"
    ),
    "rollout": _imported(
        "rollout", "play episodes of a stage's environment with a checkpoint and print them; nothing is trained"
    ),
    "score": _imported(
        "score", "score stored rows or responses again, compare two scores, or --validate a score before training"
    ),
    "annotate": _imported(
        "annotate", "choose the better of two answers in the terminal; --report shows agreement and when to stop"
    ),
    "report": _imported(
        "report", "write the report of a run, by name or by pipeline file; --open opens it in a browser"
    ),
    "compare": _imported(
        "report",
        "compare runs on one page: changed settings against results, score against KL, training curves",
        "compare",
    ),
    "export": _imported(
        "export", "write a checkpoint as an ordinary model folder, check its answers and describe it; --push uploads it"
    ),
    "export-log": _imported(
        "export_log", "write rollouts or evaluated answers as logs of inspect_ai or traces of trackio"
    ),
    "studio": _imported(
        "studio",
        "start the local web application of a store, which shows its runs live; --read-only changes nothing",
    ),
    "mcp": _imported("mcp", "offer the runs of a store to an assistant over standard input and output"),
    "sweep": _imported(
        "sweep",
        "try out a space over a pipeline's fields; unchanged stages are made once, an interrupted sweep goes on",
    ),
    "status": _imported(
        "status", "show the state of each stage of a run, here and on a cluster; without a name, of every run"
    ),
    "cancel": _imported(
        "status",
        "end a run's cluster jobs or its local process; finished stages and checkpoints are kept",
        "cancel",
    ),
    "push": _imported(
        "artifacts", "upload finished stages that the store's bucket lacks; runs do so by themselves", "push"
    ),
}


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the whole command line, or a parser that knows only the arguments of ``command``."""
    top = Parser(prog="align", description="From a base model to an aligned, scored checkpoint.")
    top.add_argument("--version", action="version", version=f"align {VERSION}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, entry in COMMANDS.items():
        subparser = commands.add_parser(name, help=entry.purpose)
        if command in (None, name):
            entry.add_arguments(subparser)
    return top


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, importing no other command than its own."""
    return parser(find_command(words)).parse_args(words)


LIBRARY_LOGGERS = ("DeepSpeed", "bitsandbytes")
"""Loggers of libraries that warn when they are imported. A stage's log keeps that; a command's output does not."""
WORKING_COMMANDS = ("run", "studio", "sweep", "eval", "export", "export-log", "data", "push")
"""Commands that continue when their output cannot be written any more."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0 done, 1 a stage failed, 2 wrong input, 75 stopped on request."""
    if "_ARGCOMPLETE" in os.environ:  # a shell completes a line
        from align.cli.completion import answer_shell

        answer_shell(parser)
    for name in LIBRARY_LOGGERS:
        # A filter stays when the library sets up its logger; a level would be overwritten.
        logging.getLogger(name).addFilter(_is_error)
    # A reader may close the output at any time (``| head``): commands that do work must continue.
    with guarded_streams() as output:
        try:
            code = _run_command(arguments, output)
            sys.stdout.flush()
        except OutputEnded:
            code = 0
        sys.stderr.flush()
        if output.error is None or isinstance(output.error, BrokenPipeError):
            return code
        print(
            f"standard output cannot be written ({output.error.strerror or output.error}); the rest of it is lost.",
            file=sys.stderr,
        )
        return code if output.goes_on and not output.is_document else code or FAILED


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _run_command(arguments: Sequence[str] | None, output: GuardedStream) -> int:
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        output.goes_on = options.command in WORKING_COMMANDS
        output.is_document = bool(getattr(options, "json", False))
        if getattr(options, "offline", False):
            from align.patches.huggingface_hub import go_offline

            go_offline()
        with exported_store(getattr(options, "store", None)):
            return COMMANDS[options.command].run(options)
    except (UserError, StageFailed, Stopped) as error:
        print("\n".join(printable(line) for line in str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if not is_no_space(error):  # of a page or a copy: a stage explains its own full disk
            raise
        print(no_space(), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
