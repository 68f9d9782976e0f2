"""The plan of an evaluation: systems, prompts and tasks, built from a stage's settings and inputs, all checked."""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from align.config.scores import score_identities
from align.config.stages.evaluate import THOUGHT_METRICS, EvaluateConfig
from align.config.stages.evaluation.gates import Gate, parse_gates
from align.config.stages.evaluation.task_fields import TaskConfig
from align.data.rows import user
from align.errors import UserError
from align.evaluation.answers import Example
from align.evaluation.comparisons import Resampling
from align.evaluation.logprobs import check_heldout
from align.evaluation.participants import max_input_tokens
from align.evaluation.scorecard.gates import check_gates
from align.evaluation.systems import Policy, System, make_systems
from align.evaluation.tasks import build_task
from align.evaluation.tasks.base import Task, TaskInputs
from align.evaluation.tasks.records import draw
from align.inference.engine import max_positions
from align.inference.protocol import Sampling
from align.inference.thoughts import require_answer_room
from align.models.chat.template_settings import TemplateSettings, stored_settings
from align.pipeline.context import StageContext
from align.scoring.score import WeightedSum, open_metric, open_score
from align.scoring.scored import Scorer
from align.store.artifacts import Artifact, Kind
from align.store.fingerprint import digest

Row = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """A function that scores responses: the metric's name, its direction, its meaning, and its identity in keys."""

    metric: str
    better: Literal["higher", "lower"]
    meaning: str
    scorer: Scorer
    identity: str


@dataclass(frozen=True)
class Plan:
    """An evaluation's work; ``rows`` (the prompt set), ``tasks``, ``pairs`` and ``heldout`` may be empty."""

    systems: list[System]
    reference: str
    base: str | None
    rows: list[Row]
    prompts: dict[str, list[list[int]]]
    """Token ids of the prompt set, by system."""
    sampling: Sampling
    scorer: WeightedSum | None
    """A list of rewards that scores responses to the prompt set."""
    reward_identities: list[str]
    """Identities of the list's rewards, for the scorecard."""
    programs: list[Program]
    """Functions that score responses to the prompt set, in order."""
    pairs: list[Row]
    heldout: list[Row]
    heldout_length: int
    precision: Literal["bfloat16", "float32"]
    resampling: Resampling
    max_length: int
    """Tokens that the engine must hold, prompt and response together."""
    thinking_budget: int | None = None
    """Tokens after which thoughts are closed by force; None for no limit."""
    tasks: list[Task] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weights of a list of rewards, by name; empty without one."""
        if self.scorer is None:
            return {}
        return {part.name: part.weight for part in self.scorer.parts}

    @property
    def policies(self) -> list[Policy]:
        """The checkpoints behind the systems, each once."""
        return list({system.policy.name: system.policy for system in self.systems}.values())


def make_plan(context: StageContext) -> Plan:
    """Load rows and tokenizers, draw prompts by seed, build tasks, and check that they fit together.

    Raises ``UserError`` for an empty split, prompts that are all too long, data that does not fit a task, and gates on
    metrics that are not measured.
    """
    config: EvaluateConfig = context.config
    artifacts = context.inputs["policies"]
    # 1. The compared systems.
    policies = [make_policy(artifact, TemplateSettings.of(config), context.name) for artifact in artifacts]
    base = next((artifact.stage for artifact in artifacts if artifact.kind == Kind.MODEL), None)
    # Baselines without a file of examples fall back on solved questions of the prompt set's train split.
    shots = max((baseline.shots for baseline in config.baselines.values() if baseline.examples is None), default=0)
    systems = make_systems(policies, base, config.baselines, Path.cwd(), _fallback_examples(context, shots))
    # 2. Rows and tasks. A system that does not fit a task is refused here.
    pairs = _test_rows(context, "pairs", config.max_pairs)
    heldout = _test_rows(context, "heldout", config.max_heldout)
    tasks = _build_tasks(context, pairs)
    check_systems(tasks, systems)
    for policy in policies if heldout else []:
        check_heldout(policy.tokenizer, heldout, config.max_heldout_length)
    # 3. The prompt set under every system's template, and the length that the engine must hold.
    rows, prompts = _prompt_set(context, systems)
    max_length = _max_length(config, policies, prompts, tasks)
    check_checkpoints(tasks, policies, max_length)
    for policy in policies:
        for place, limit in config.response_limits.items():
            require_answer_room(config.thinking_budget, policy.tokenizer, limit, place)
    sampling = Sampling(
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        n=config.samples_per_prompt,
        seed=context.seed,
    )
    plan = Plan(
        systems=systems,
        reference=context.artifact("reference").stage,
        base=base,
        rows=rows,
        prompts=prompts,
        sampling=sampling,
        scorer=open_score(context) if isinstance(config.score, list) else None,
        reward_identities=list(score_identities(config.score).values()) if isinstance(config.score, list) else [],
        programs=_programs(context),
        pairs=pairs if context.inputs.get("reward") is not None else [],
        heldout=heldout,
        heldout_length=config.max_heldout_length,
        precision=context.precision,
        resampling=Resampling(config.bootstrap, context.seed),
        max_length=max_length,
        thinking_budget=config.thinking_budget,
        tasks=tasks,
        gates=parse_gates(config.gates, [system.name for system in systems], config.reference),
    )
    # 4. Gates, which may name any system and any metric of the plan.
    check_gates(plan.gates, _metric_names(plan, config), [system.info for system in systems], plan.reference)
    return plan


def make_policy(artifact: Artifact, settings: TemplateSettings, stage: str) -> Policy:
    """Return a compared checkpoint with the stage's settings of its chat template, which enter its key."""
    from align.models.loading import load_tokenizer

    tokenizer = load_tokenizer(artifact.model)
    settings.apply(tokenizer, f"stages.{stage}.")
    key = digest([artifact.weights, stored_settings(tokenizer.chat_template)]) if settings else artifact.weights
    return Policy(artifact.stage, artifact.model, key, tokenizer)


def render_for_all(
    rows: list[Row], systems: Sequence[System], max_tokens: int
) -> tuple[list[Row], Mapping[str, list[list[int]]], int]:
    """Return the rows whose prompt fits ``max_tokens`` under every template, and their ids by system.

    The last number counts the rows skipped. A row is skipped for all systems, so every comparison stays paired.
    Prompts are never cut: a cut prompt would be another question.
    """
    rendered = {
        system.name: [system.render(row["prompt"], tools=row.get("tools")) for row in rows] for system in systems
    }
    # All systems get the same rows: a prompt that is too long for one system would break the pairing.
    fitting = [index for index in range(len(rows)) if all(len(ids[index]) <= max_tokens for ids in rendered.values())]
    prompts = {name: [ids[index] for index in fitting] for name, ids in rendered.items()}
    return [rows[index] for index in fitting], prompts, len(rows) - len(fitting)


def _programs(context: StageContext) -> list[Program]:
    """Load the functions that score responses, and check judges. Raises ``UserError`` for a missing function."""
    from align.config.user_functions import function_identity, load_function

    config: EvaluateConfig = context.config
    programs = []
    places = ["score"] if isinstance(config.score, str) else []
    places += [f"metrics[{number}]" for number in range(len(config.metrics))]
    for place, settings in zip(places, config.metric_functions, strict=True):
        if settings.function is None:
            meaning = f"verdict of {settings.verifier}, from 0 to 1"
            if settings.criteria is not None:
                meaning = "weighted share of the criteria that the judge finds satisfied, at most 1"
            identity = settings.identity(place)
        else:
            identity = function_identity(settings.function, place)
            # The first line of the docstring says what the metric means.
            lines = (inspect.getdoc(load_function(settings.function, place)) or "").strip().splitlines()
            meaning = lines[0].rstrip(".").removeprefix("Return ") if lines else f"score by {settings.function}"
        scorer = open_metric(context, settings, place)
        programs.append(Program(settings.metric, settings.better, meaning, scorer, identity))
    return programs


def _prompt_set(context: StageContext, systems: list[System]) -> tuple[list[Row], dict[str, list[list[int]]]]:
    config: EvaluateConfig = context.config
    if config.prompts is None:
        return [], {}
    candidates = _test_rows(context, "prompts", config.max_prompts)
    rows, prompts, too_long = render_for_all(candidates, systems, config.max_prompt_tokens)
    if not rows:
        raise UserError(f"prompts: all {too_long} are longer than max_prompt_tokens={config.max_prompt_tokens}.")
    if too_long:
        context.warn(f"{too_long} prompts left out: longer than max_prompt_tokens={config.max_prompt_tokens}")
    return rows, dict(prompts)


def _test_rows(context: StageContext, field: str, limit: int | None) -> list[Row]:
    from align.data.rows import read_rows

    if context.inputs.get(field) is None:
        return []
    path = context.artifact(field).split("test")
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{field}: {path} has no rows; give its stage a test split (test_size above 0).")
    return draw(rows, limit, context.seed)


def _fallback_examples(context: StageContext, count: int) -> list[Example]:
    """Draw solved questions of the prompt set's train split, by seed, from as many sources as possible.

    Empty if the prompts' stage has no reference answers. Rows of several turns are no examples.
    """
    from align.data.rows import read_rows

    artifact = context.inputs.get("prompts")
    if count == 0 or artifact is None or artifact.kind != Kind.INSTRUCTIONS:
        return []
    rows = [
        row for row in read_rows(artifact.split("train")) if len(row["prompt"]) == 1 and len(row["completion"]) == 1
    ]
    random.Random(context.seed).shuffle(rows)  # noqa: S311
    # Round robin over the sources: first the first row of each source, then the second of each.
    counts: Counter[str] = Counter()
    ranked: list[tuple[int, int, Row]] = []
    for row in rows:
        ranked.append((counts[row["source"]], len(ranked), row))
        counts[row["source"]] += 1
    chosen = [row for _, _, row in sorted(ranked, key=lambda entry: entry[:2])[:count]]
    return [Example(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in chosen]


def _build_tasks(context: StageContext, pairs: list[Row]) -> list[Task]:
    config: EvaluateConfig = context.config
    inputs = TaskInputs(
        seed=context.seed,
        base=Path.cwd(),
        pairs=pairs,
        has_second_reward=context.inputs.get("second_reward") is not None,
        precision=context.precision,
        warn=context.warn,
        note=context.note,
        texts={artifact.stage: artifact for artifact in context.inputs.get("texts") or []},
        rows={artifact.stage: artifact for artifact in context.inputs.get("rows") or []},
        users={artifact.stage: artifact for artifact in context.inputs.get("users") or []},
    )
    return build_tasks(config.tasks, inputs)


def build_tasks(configs: Mapping[str, TaskConfig], inputs: TaskInputs) -> list[Task]:
    """Build tasks by their names. Raises ``UserError``, with the task's place, for data that does not fit."""
    tasks = []
    for name, config in configs.items():
        with _task_place(name):
            tasks.append(build_task(name, config, inputs))
    return tasks


def check_systems(tasks: list[Task], systems: list[System]) -> None:
    """Check that every system fits every task: above all, that there are as many examples as it shows."""
    # Before anything expensive: a task without enough examples would otherwise fail after hours of sampling.
    for task in tasks:
        with _task_place(task.name):
            task.check_systems([system.info for system in systems])
        for system in systems:
            reads = task.reads and system.info.role not in ("best_of", "again")
            plays = task.plays and system.info.role != "best_of"
            if not (task.responds or reads or plays):
                continue
            with _task_place(task.name):
                task.check(system.info)
                if task.responds or task.renders or task.plays:
                    system.conversation([user("?")], task.examples(system.info.shots))
                if reads:
                    tokenizer = system.policy.tokenizer
                    task.check_reading(system.info, tokenizer, max_input_tokens(system.policy.model_dir, tokenizer))


def check_checkpoints(tasks: list[Task], policies: list[Policy], max_length: int) -> None:
    """Check that every checkpoint can play the tasks' episodes, in an engine that holds ``max_length`` tokens."""
    for task in tasks:
        for policy in policies if task.plays else []:
            with _task_place(task.name):
                task.check_checkpoint(policy.tokenizer, max_length, policy.name)


@contextmanager
def _task_place(name: str) -> Iterator[None]:
    """Add the task's place to a ``UserError``."""
    try:
        yield
    except UserError as error:
        text = str(error).removeprefix(f"{name}: ")
        # Some tasks name themselves in full: their errors may also come later, when no caller adds the place.
        if not text.startswith((f"tasks.{name}: ", f"tasks.{name}.")):
            text = f"tasks.{name}: {text}"
        raise UserError(text) from None


def _max_length(
    config: EvaluateConfig, policies: list[Policy], prompts: dict[str, list[list[int]]], tasks: list[Task]
) -> int:
    """Return the engine's length: as the prompt set needs it, and for tasks up to ``max_context``."""
    longest_prompt = max((len(ids) for per_system in prompts.values() for ids in per_system), default=0)
    max_length = longest_prompt + config.max_tokens
    if not any(task.responds or task.plays for task in tasks):
        return max_length
    # The engine is opened once, so the checkpoint with the shortest context limits all of them.
    limits = [max_positions(policy.model_dir) or config.max_context for policy in policies]
    return max(max_length, min([config.max_context, *limits]))


def _metric_names(plan: Plan, config: EvaluateConfig) -> set[str]:
    """Return the metrics that the scorecard may have; a gate on any other is a mistake."""
    names = {f"{task.name}.{metric}" for task in plan.tasks for metric in task.metrics}
    if plan.heldout:
        names.add("heldout_loss")
    if plan.rows:
        names |= {"length", "finished", *THOUGHT_METRICS}
        names |= {*(program.metric for program in plan.programs), *config.reward_metrics}
        if plan.sampling.temperature > 0:
            names |= {"kl", "kl_k3"}
        if config.reward is not None:
            names.add("reward")
    return names
