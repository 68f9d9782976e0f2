"""The executor blocks of a pipeline's plain values: ``--on``, and a stage that names another executor than the run.

``align.config.runtime.executor`` has the fields. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from align.config.runtime import Runtime
from align.config.runtime.executor import LOCAL, LocalExecutor, in_long_form, name_in
from align.errors import UserError

EXECUTOR = "executor"
BUILDS = "data"
"""The kind of stage that may hand its ``tasks`` to another executor than the run's."""


def in_long_forms(raw: dict[str, Any]) -> dict[str, Any]:
    """Replace ``executor: slurm`` by ``executor: {name: slurm}`` everywhere in ``raw``, in place; returns ``raw``.

    Blocks can then be merged, and ``--set runtime.executor.partition=gpu`` has a block to set.
    """
    for _, block in _holders(raw):
        if EXECUTOR in block:
            block[EXECUTOR] = in_long_form(block[EXECUTOR])
    return raw


def choose_executor(raw: dict[str, Any], name: str, warn: Callable[[str], None]) -> None:
    """Set the executor of ``--on`` in ``raw``, in place.

    Fields of the file's executor do not apply to another executor: they are removed, and ``warn`` gets a line about it.
    A block without a name gets this executor and keeps its fields.
    """
    if not isinstance(raw.setdefault("runtime", {}), dict):
        return  # the check of the pipeline refuses it
    block = raw["runtime"].get(EXECUTOR)
    previous = name_in(block)
    if (previous or LOCAL) == name:
        raw["runtime"][EXECUTOR] = {"name": name, **(block if isinstance(block, dict) else {})}
        return
    unused = []
    for place, holder in _holders(raw):
        block = holder.get(EXECUTOR)
        # A block without a name is for the file's executor, or for any executor if the file names none. A warning is
        # needed only for fields other than the name.
        if isinstance(block, dict) and (name_in(block) or previous or name) != name:
            unused += [f"{place}.{EXECUTOR}"] if set(block) - {"name"} else []
            del holder[EXECUTOR]
    raw["runtime"][EXECUTOR] = {"name": name, **raw["runtime"].get(EXECUTOR, {})}
    if unused:
        warn(f"--on {name}: the file's fields for {previous or 'other executors'} are not used ({', '.join(unused)}).")


def refuse_contradiction(runtime: Runtime, name: str | None) -> None:
    """Raise ``UserError`` if ``--set`` has named another executor than ``--on``, which is ``name``."""
    if name is not None and runtime.executor.name != name:
        raise UserError(f"--on {name}: --set runtime.executor names {runtime.executor.name}. Remove one of them.")


def _holders(raw: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the blocks that may hold an executor, each after its place."""
    runtime = raw.get("runtime")
    if not isinstance(runtime, dict):
        return
    yield "runtime", runtime
    stages = runtime.get("stages")
    for stage, block in stages.items() if isinstance(stages, dict) else ():
        if isinstance(block, dict):
            yield f"runtime.stages.{stage}", block


def objection_to_stage(kind: str, run: Runtime, stage: Runtime, overrides: Any) -> str | None:
    """Return why a stage of this kind cannot have the executor that it names, or None.

    ``run`` and ``stage`` are the runtimes of the run and of the stage; ``overrides`` is the stage's own executor block,
    None if it has none.
    """
    if overrides is None:
        return None
    if kind != BUILDS and "tasks" in overrides.model_fields_set:
        return f"tasks are jobs of a data build, and this is a stage of kind {kind}; leave it out."
    executor = stage.executor
    run_name = run.executor.name
    if executor.name == run_name:
        return None
    if kind != BUILDS:
        return (
            f"the stage names {executor.name}, and the run is on {run_name}. All stages run in one place, except the "
            f"tasks of data builds: write `runtime: {{executor: {{name: {executor.name}}}}}`, or remove the name here."
        )
    if run_name != LOCAL:
        return (
            f"the stage names {executor.name}, and the run is on {run_name}. Remove the name: only a local run hands "
            "tasks to another executor."
        )
    if not isinstance(executor, LocalExecutor) and executor.tasks is None:
        return (
            f"the stage itself runs here, since the run is local, and it hands no work to {executor.name} without "
            f"tasks: write `tasks: 100`, or run all stages with --on {executor.name}."
        )
    return None
