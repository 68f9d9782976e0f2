"""The command line ``align``. Torch is imported only by commands that need a model."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from align.cli.parser import (
    Handler,
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
from align.registry import Command, registered
from align.registry import load as load_path
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


RUN = Handler(import_late("align.cli.run:run"), _add_run)
PLAN = Handler(_plan, _add_plan)
EXPLAIN = Handler(_explain, _add_pipeline)
SCHEMA = Handler(_schema, add_store)
CHAT = Handler(_chat, _add_chat)
COMMANDS = registered(Command)


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the whole command line, or a parser that knows only the arguments of ``command``."""
    top = Parser(prog="align", description="From a base model to an aligned, scored checkpoint.")
    top.add_argument("--version", action="version", version=f"align {VERSION}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, entry in COMMANDS.items():
        subparser = commands.add_parser(name, help=entry.purpose)
        if command in (None, name):
            load_path(entry.code).add_arguments(subparser)
    return top


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse a command line, importing no other command than its own."""
    return parser(find_command(words)).parse_args(words)


LIBRARY_LOGGERS = ("DeepSpeed", "bitsandbytes")
"""Loggers of libraries that warn when they are imported. A stage's log keeps that; a command's output does not."""


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
        output.goes_on = COMMANDS[options.command].works
        output.is_document = bool(getattr(options, "json", False))
        if getattr(options, "offline", False):
            from align.patches.huggingface_hub import go_offline

            go_offline()
        with exported_store(getattr(options, "store", None)):
            return int(load_path(COMMANDS[options.command].code).run(options))
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
