"""From a stage's settings and inputs to the plan of an evaluation: rows read, tasks built, everything checked."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.data.rows import user
from align.errors import UserError
from align.evaluation.comparisons import Resampling
from align.evaluation.gates import check_gates, parse_gates
from align.evaluation.plan import Plan
from align.evaluation.prompts import Policy, choose_rows, render_for_all
from align.evaluation.systems import System, make_systems
from align.evaluation.tasks.base import Example, Given, Task
from align.inference.protocol import Sampling
from align.pipeline.context import StageContext
from align.store.artifacts import Kind

if TYPE_CHECKING:
    from align.stages.evaluate import EvaluateConfig

Row = dict[str, Any]


def make_plan(context: StageContext) -> Plan:
    """Read rows and tokenizers, choose prompts by seed, build tasks, and put together what is evaluated.

    Raises ``UserError`` for an empty split, prompts that are all too long, data that does not fit a task, and gates on
    numbers that nothing makes.
    """
    from align.config.user_functions import function_identity
    from align.data.scoring import function_scorer
    from align.models.loading import load_tokenizer

    config: EvaluateConfig = context.config
    artifacts = context.inputs["policies"]
    policies = [Policy(one.stage, one.model, one.weights, load_tokenizer(one.model)) for one in artifacts]
    base = next((one.stage for one in artifacts if one.kind == Kind.MODEL), None)
    shots = max((one.shots for one in config.baselines.values() if one.examples is None), default=0)
    systems = make_systems(policies, base, config.baselines, Path.cwd(), _examples(context, shots))
    pairs, heldout = _rows_of(context, "pairs", config.max_pairs), _rows_of(context, "heldout", config.max_heldout)
    tasks = _build_tasks(context, pairs, heldout)
    _check_systems(tasks, systems)
    rows: list[Row] = []
    prompts: dict[str, list[list[int]]] = {}
    if config.prompts is not None:
        given = _rows_of(context, "prompts", config.max_prompts)
        rows, rendered, too_long = render_for_all(given, systems, config.max_prompt_tokens)
        prompts = dict(rendered)
        if not rows:
            raise UserError(f"prompts: all {too_long} are longer than max_prompt_tokens={config.max_prompt_tokens}.")
        if too_long:
            context.warn(f"{too_long} prompts left out: longer than max_prompt_tokens={config.max_prompt_tokens}")
    plan = Plan(
        systems=systems,
        reference=context.artifact("reference").stage,
        base=base,
        rows=rows,
        prompts=prompts,
        sampling=Sampling(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            n=config.samples_per_prompt,
            seed=context.seed,
        ),
        scorer=None if config.score is None else function_scorer(config.score),
        scorer_identity="" if config.score is None else function_identity(config.score),
        pairs=pairs if context.inputs.get("reward") is not None else [],
        heldout=heldout,
        heldout_length=config.max_heldout_length,
        precision=config.precision,
        resampling=Resampling(config.bootstrap, context.seed),
        longest=_longest(config, policies, prompts, tasks),
        tasks=tasks,
        gates=parse_gates(config.gates, [one.name for one in systems], config.reference),
    )
    check_gates(plan.gates, _metric_names(plan, config), [one.info for one in systems], plan.reference)
    return plan


def _rows_of(context: StageContext, field: str, most: int | None) -> list[Row]:
    from align.data.rows import read_rows

    if context.inputs.get(field) is None:
        return []
    path = context.artifact(field).split("test")
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{field}: {path} has no rows; give its stage a test split.")
    return choose_rows(rows, most, context.seed)


def _examples(context: StageContext, count: int) -> list[Example]:
    """Solved questions of the prompt set's train split, drawn by seed, of as many sources as there are.

    Empty where the prompts' stage has no reference answers.
    """
    from align.data.rows import read_rows

    artifact = context.inputs.get("prompts")
    if count == 0 or artifact is None or artifact.kind != Kind.INSTRUCTIONS:
        return []
    rows = [row for row in read_rows(artifact.split("train")) if len(row["prompt"]) == 1]
    random.Random(context.seed).shuffle(rows)  # noqa: S311
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, int, Row]] = []
    for row in rows:
        ranked.append((seen[row["source"]], len(ranked), row))
        seen[row["source"]] += 1
    chosen = [row for _, _, row in sorted(ranked, key=lambda one: one[:2])[:count]]
    return [Example(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in chosen]


def _build_tasks(context: StageContext, pairs: list[Row], heldout: list[Row]) -> list[Task]:
    config: EvaluateConfig = context.config
    given = Given(
        seed=context.seed,
        base=Path.cwd(),
        pairs=pairs,
        heldout=heldout,
        has_reward=context.inputs.get("reward") is not None,
        has_second_reward=context.inputs.get("second_reward") is not None,
        precision=config.precision,
        warn=context.warn,
        texts={one.stage: one for one in context.inputs.get("texts") or []},
    )
    tasks = []
    for name, block in config.tasks.items():
        try:
            tasks.append(block.build(name, given))
        except UserError as error:
            raise _in_task(name, error) from None
    return tasks


def _check_systems(tasks: list[Task], systems: list[System]) -> None:
    """Every system can be asked everything: examples above all, which a task may not have."""
    for task in tasks:
        for system in systems:
            if task.responds or (task.reads and system.info.role not in ("best_of", "again")):
                try:
                    task.check(system.info)
                    if task.responds or task.renders:
                        system.conversation([user("?")], task.examples(system.info.shots))
                except UserError as error:
                    raise _in_task(task.name, error) from None


def _in_task(name: str, error: UserError) -> UserError:
    text = str(error).removeprefix(f"{name}: ")
    return UserError(f"tasks.{name}: {text}")


def _longest(
    config: EvaluateConfig, policies: list[Policy], prompts: dict[str, list[list[int]]], tasks: list[Task]
) -> int:
    """Room that the engine must have: for the prompt set exactly what it needs, for tasks what the user allows."""
    longest = max((len(ids) for per in prompts.values() for ids in per), default=0) + config.max_tokens
    if not any(task.responds for task in tasks):
        return longest
    positions = [
        json.loads((policy.model_dir / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
        for policy in policies
    ]
    known = [value for value in positions if isinstance(value, int) and value > 0]
    return max(longest, min([config.max_context, *known]))


def _metric_names(plan: Plan, config: EvaluateConfig) -> set[str]:
    """Metrics that the scorecard may come to have; a gate on any other is a slip."""
    found = {f"{task.name}.{metric}" for task in plan.tasks for metric in task.metrics}
    if plan.heldout:
        found.add("heldout_loss")
    if plan.rows:
        found |= {"length", "finished"}
        found |= {"gold"} if plan.scorer is not None else set()
        found |= {"kl", "kl_k3"} if plan.sampling.temperature > 0 else set()
        found |= {"reward"} if config.reward is not None else set()
    return found
