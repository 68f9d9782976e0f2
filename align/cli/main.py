"""The commands. Imports nothing heavy: every answer that needs no model comes without torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from align.cli import artifacts, cancel, compare, data, evaluate, export, plan_hardware, push, report, status, sweep
from align.cli.parser import Parser, add_store, print_json
from align.cli.streams import GuardedStream, OutputEnded, guarded_streams
from align.errors import StageFailed, UserError
from align.pipeline.stop_signal import Stopped
from align.store.version import VERSION

FAILED = 1
INTERRUPTED = 130


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pipeline", metavar="PIPELINE", help="a pipeline file, like pipelines/quickstart.yaml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="assignments",
        help="override a field, like stages.ppo.kl_coef=0.1; may be given several times",
    )  # fmt: skip
    parser.add_argument("--from", dest="from_", metavar="STAGE", help="run this stage and all that need it anew")
    parser.add_argument("--only", metavar="STAGE", help="run this stage only; what it reads must be finished")
    parser.add_argument("--rebuild", action="append", default=[], metavar="STAGE", help="run this stage anew")
    add_store(parser)


def _run(options: argparse.Namespace) -> int:
    """run the pipeline and write its report; finished stages are skipped, a killed one resumes"""
    from align.cli.run import run

    return run(options)


def _plan(options: argparse.Namespace) -> int:
    """say what `run` would do, stage by stage, and why; --memory what it would hold, --hardware where it fits"""
    from align.capacity.estimate import estimate_memory
    from align.cli.console import memory_lines, printable
    from align.cli.run import load
    from align.config.yaml import dump_yaml
    from align.runner.open_store import open_store
    from align.runner.plan import choose_stages, plan

    pipeline = load(options)
    if options.resolved:
        print_json(pipeline.raw) if options.json else print(dump_yaml(pipeline.raw), end="")
        return 0
    store = open_store(pipeline, options.store)
    if options.hardware is not None:
        return plan_hardware.run(options, pipeline, store)
    plan_hardware.refuse_without_hardware(options)
    anew = choose_stages(pipeline, store, options.only, options.from_, tuple(options.rebuild))
    steps = plan(pipeline, store, anew)
    memory = estimate_memory(pipeline, store) if options.memory else {}
    if options.json:
        counted = {name: {"unknown": e} if isinstance(e, str) else e.to_json() for name, e in memory.items()}
        print_json([
            {"stage": s.node.name, "kind": s.node.stage.kind, "key": s.node.key, "action": s.action, "why": s.why}
            | ({"memory": counted[s.node.name]} if s.node.name in counted else {})
            for s in steps
        ])  # fmt: skip
        return 0
    width = max(len(step.node.name) for step in steps)
    for step in steps:
        print(printable(f"{step.node.name:<{width}}  {step.action:<7}  {step.node.key[:12]}  {step.why}"))
    for name, found in memory.items():
        print("", *memory_lines(name, found), sep="\n")
    return 0


def _explain(options: argparse.Namespace) -> int:
    """say which fields changed since each stage was last finished"""
    from align.cli.console import printable
    from align.cli.run import load
    from align.runner.open_store import open_store
    from align.runner.plan import History

    pipeline = load(options)
    store = open_store(pipeline, options.store)
    history = History(pipeline, store)
    found = {}
    for node in pipeline:
        last = history.previous(node)
        found[node.name] = history.explain(node)
        if not options.json:
            state = "never finished" if last is None else "unchanged" if last.record["key"] == node.key else "changed"
            print(f"{node.name}: {state}")
            for line in found[node.name]:
                print(printable(f"    {line}"))
    if options.json:
        print_json(found)
    return 0


def _schema(options: argparse.Namespace) -> int:
    """print the JSON schema of pipeline files, for editors"""
    from align.pipeline.json_schema import pipeline_schema

    print_json(pipeline_schema())
    return 0


def _chat(options: argparse.Namespace) -> int:
    """talk with a checkpoint: a folder, an artifact's key, or PIPELINE:STAGE"""
    from align.cli.arguments import find_checkpoint
    from align.cli.lineage import refuse_damage

    checkpoint = find_checkpoint(options.checkpoint, options.store)
    refuse_damage(checkpoint, thorough=False)
    from align.cli.chat import chat

    return chat(checkpoint, system=options.system, temperature=options.temperature, max_tokens=options.max_tokens)


def _doctor(options: argparse.Namespace) -> int:
    """say what is installed, which engine and device would be used, what is missing"""
    from align.cli.console import printable
    from align.cli.doctor import examine

    findings = examine(options.store)
    if options.json:
        print_json([vars(finding) for finding in findings])
    else:
        for finding in findings:
            print(printable(f"{ {'ok': ' ', 'note': '!', 'problem': '✗'}[finding.level] } {finding.what}"))
    return 1 if any(finding.level == "problem" for finding in findings) else 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run, "plan": _plan, "explain": _explain, "list": artifacts.list_artifacts,
    "show": artifacts.show, "gc": artifacts.collect_garbage,
    "schema": _schema, "chat": _chat, "doctor": _doctor, "data": data.run,
    "eval": evaluate.run, "report": report.run, "compare": compare.run, "export": export.run, "sweep": sweep.run,
    "status": status.run, "cancel": cancel.run, "push": push.run,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = Parser(prog="align", description="From a base model to an aligned, scored checkpoint.")
    top.add_argument("--version", action="version", version=f"align {VERSION}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    made = {name: commands.add_parser(name, help=function.__doc__) for name, function in COMMANDS.items()}
    for name in ("run", "plan", "explain"):
        _add_pipeline(made[name])
    for name in ("doctor", "schema"):
        add_store(made[name])
    artifacts.add_arguments(made["list"], made["show"], made["gc"])
    made["run"].add_argument("--strict", action="store_true", help="refuse artifacts made by other source code")
    made["run"].add_argument("--on", choices=["here", "slurm", "ray"], default="here", help="what runs the stages")
    made["run"].add_argument("--detach", action="store_true", help="hand the stages to the cluster and come back")
    made["plan"].add_argument(
        "--resolved", action="store_true", help="print the pipeline with its base files, variables and --set filled in"
    )
    made["plan"].add_argument("--memory", action="store_true", help="show what tuning and PPO's critic cost in memory")
    plan_hardware.add_arguments(made["plan"])
    chat = made["chat"]
    chat.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, a key, or PIPELINE:STAGE")
    chat.add_argument("--store", metavar="DIR")
    chat.add_argument("--system", help="a system message")
    chat.add_argument("--temperature", type=float, default=0.7)
    chat.add_argument("--max-tokens", type=int, default=256)
    data.add_commands(made["data"])
    evaluate.add_arguments(made["eval"])
    report.add_arguments(made["report"])
    compare.add_arguments(made["compare"])
    sweep.add_arguments(made["sweep"])
    export.add_arguments(made["export"])
    push.add_arguments(made["push"])
    status.add_arguments(made["status"])
    cancel.add_arguments(made["cancel"])
    return top


GOES_ON = ("run", "sweep", "eval", "export", "data", "push")
"""Commands that work on when nobody reads what they print."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 a stage failed, 2 the input is wrong, 75 stopped as asked."""
    with guarded_streams() as output:
        try:
            code = _answer(arguments, output)
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


def _answer(arguments: Sequence[str] | None, output: GuardedStream) -> int:
    try:
        options = parser().parse_args(arguments)
        output.goes_on = options.command in GOES_ON
        output.is_document = bool(getattr(options, "json", False))
        return COMMANDS[options.command](options)
    except (UserError, StageFailed, Stopped) as error:
        from align.cli.console import printable

        print("\n".join(printable(line) for line in str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
