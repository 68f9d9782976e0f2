"""Evaluates systems: they answer, they read, their answers are scored; then numbers are compared and written.

The one path that the ``evaluate`` stage and ``align eval`` take. A machine holds one thing at a time: first the engine,
then reward models, then the checkpoints themselves. What is dear is kept under what it depends on, so that an attempt
that was killed, and the next run that asks the same, go on from it. Files: see ``written.py``.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

from align.evaluation.bench import StageBench, SystemReader, SystemRespondent, keep_best
from align.evaluation.drift import measure_drift, measure_heldout
from align.evaluation.files import write
from align.evaluation.generation import Generated, OpenEngine, ResponseCache, Sampler
from align.evaluation.measure import (
    LoadedModels,
    Results,
    function_values,
    reward_values,
    shape_values,
)
from align.evaluation.pairs import Scores, pair_reports, read_sides, score_sides
from align.evaluation.plan import Answered, Plan
from align.evaluation.scorecard import Measurements, TaskFound, build
from align.evaluation.systems import System
from align.evaluation.tasks.base import Answers, Measured, Turn, Values
from align.inference.protocol import Response
from align.pipeline.context import StageContext
from align.store.fingerprint import digest

Row = dict[str, Any]
PROMPT_SET = "prompts"
"""The prompt set among tasks."""


def evaluate(context: StageContext, plan: Plan, open_engine: OpenEngine) -> tuple[dict[str, Any], Answered]:
    """Run the plan and return the scorecard and the answers."""
    folder = context.cache / "evaluation" if context.cache is not None else context.checkpoints
    results = Results(folder, context.warn)
    bench = StageBench(context, results, plan.reference, plan.base, plan.precision)
    answered = _answer(context, plan, open_engine, results)
    values, reward_models = _score_by_models(context, plan, answered, bench, results)
    if plan.scorer is not None:
        for name, one in answered.generated.items():
            values[name]["gold"] = function_values(plan.scorer, plan.rows, one)
    bench.close()
    models = LoadedModels(plan.policies, plan.reference, _device(context), plan.precision)
    token_kl = measure_drift(context, plan, answered.generated, values, models, results)
    heldout = measure_heldout(context, plan, models, results)
    tasks = _measure_tasks(context, plan, answered.answers, models, bench, results)
    bench.close()
    found = Measurements(
        systems=[system.info for system in plan.systems],
        reference=plan.reference,
        base=plan.base,
        sources=[str(row["source"]) for row in plan.rows],
        values=values,
        heldout=heldout,
        tasks=tasks,
        reward_models=reward_models,
        gates=plan.gates,
        copies=_copies(plan, answered),
    )
    card = build(found, plan.resampling, _settings(context, plan, answered.engines))
    write(context.output, plan, card, answered, found, token_kl)
    return card, answered


def _copies(plan: Plan, answered: Answered) -> dict[str, list[str]]:
    """Checkpoints sampled again that said the same once more, with the tasks in which they did."""
    copies = {}
    for system in plan.systems:
        if system.info.role == "again":
            again, first = (_tokens(answered, name) for name in (system.name, system.info.of))
            copies[system.name] = [task for task, tokens in again.items() if tokens == first[task]]
    return {name: tasks for name, tasks in copies.items() if tasks}


def _tokens(answered: Answered, system: str) -> dict[str, Any]:
    """Task → everything that a system said in it, as tokens."""
    tokens: dict[str, Any] = {}
    if system in answered.generated:
        responses = answered.generated[system].responses
        tokens[PROMPT_SET] = [[response.token_ids for response in samples] for samples in responses]
    for task, answers in answered.answers.items():
        tokens[task] = [
            [[turn.response.token_ids for turn in turns] for turns in samples] for samples in answers[system]
        ]
    return tokens


def _device(context: StageContext) -> Any:
    from align.models.threads import device_of

    return device_of(context.runtime)


def _answer(context: StageContext, plan: Plan, open_engine: OpenEngine, results: Results) -> Answered:
    """Every system's answers, those of one checkpoint together; best-of-N systems have N times as many here."""
    sampler = Sampler(
        plan.policies,
        context.runtime,
        open_engine,
        ResponseCache(results.folder / "responses", results.warn),
        context.warn,
        lambda done, total: context.progress(done, total, unit="responses"),
        plan.precision,
    )
    asked = [task for task in plan.tasks if task.responds]
    for system in plan.systems:
        sampler.expect(system.info.best_of * (len(plan.rows) * plan.sampling.n + sum(len(t.items) for t in asked)))
    found = Answered({}, {task.name: {} for task in asked}, [], 0)
    try:
        for policy in plan.policies:
            for system in (one for one in plan.systems if one.policy is policy):
                if plan.rows:
                    found.generated[system.name] = sampler.generate(
                        policy, plan.prompts[system.name], system.sampling(plan.sampling)
                    )
                respondent = SystemRespondent(system, sampler, plan.longest, context.warn)
                for task in asked:
                    found.answers[task.name][system.name] = task.respond(respondent)
    finally:
        sampler.close()
    found.engines, found.tokens = sorted(sampler.engines), sampler.tokens
    return found


def _score_by_models(
    context: StageContext, plan: Plan, answered: Answered, bench: StageBench, results: Results
) -> tuple[dict[str, dict[str, Values]], list[dict[str, Any]]]:
    """Keep the best of N, score every response, and ask how good the reward models are.

    Returns the values so far, by system, and what was found out about the reward models.
    """
    for system in plan.systems:
        if system.info.role == "best_of":
            _keep_best(plan, system, answered, bench)
    order = {system.name: at for at, system in enumerate(plan.systems)}
    answered.generated = dict(sorted(answered.generated.items(), key=lambda item: order[item[0]]))
    values = {name: shape_values(one) for name, one in answered.generated.items()}
    reward = bench.artifact("reward")
    if reward is not None:
        for at, (name, one) in enumerate(answered.generated.items()):
            key = digest(["rewards 2", reward.weights, _asked(plan.rows), _said(one), plan.precision])
            scored = partial(lambda each: reward_values(bench.model("reward").score, plan.rows, each), one)
            values[name]["reward"] = results.read_or_compute(f"reward-{name}", key, scored)
            context.progress(at + 1, len(answered.generated), unit="systems scored")
    return values, _reward_models(plan, bench, results)


def _keep_best(plan: Plan, system: System, answered: Answered, bench: StageBench) -> None:
    for per_system in answered.answers.values():
        per_system[system.name] = keep_best(per_system[system.name], system.info.best_of, bench)
    if system.name not in answered.generated:
        return
    one = answered.generated[system.name]
    turns: Answers = [
        [[Turn(row["prompt"], response)] for response in samples]
        for row, samples in zip(plan.rows, one.responses, strict=True)
    ]
    best: list[list[Response]] = [
        [sample[-1].response for sample in samples] for samples in keep_best(turns, system.info.best_of, bench)
    ]
    answered.generated[system.name] = Generated(one.engine, best)


def _reward_models(plan: Plan, bench: StageBench, results: Results) -> list[dict[str, Any]]:
    """Accuracy and calibration of the reward models on the held-out pairs, each beside the other as second scorer."""
    if not plan.pairs:
        return []
    sides = read_sides(plan.pairs)
    scores: list[tuple[str, Scores]] = []
    for which in ("reward", "second_reward"):
        artifact = bench.artifact(which)
        if artifact is not None:
            key = digest(["pair scores 2", artifact.weights, sides, plan.precision])
            scored = partial(lambda name: score_sides(sides, bench.model(name).score), which)
            chosen, rejected = results.read_or_compute("pairs", key, scored)
            scores.append((artifact.stage, (chosen, rejected)))
    return pair_reports(plan.pairs, scores, seed=plan.resampling.seed, task="pairs")


def _measure_tasks(
    context: StageContext,
    plan: Plan,
    answers: dict[str, dict[str, Answers]],
    models: LoadedModels,
    bench: StageBench,
    results: Results,
) -> list[TaskFound]:
    """Every task's numbers: what systems read, checkpoint by checkpoint, then what scoring makes of their answers."""
    measured: dict[str, dict[str, Measured]] = {task.name: {} for task in plan.tasks}
    reading = [task for task in plan.tasks if task.reads]
    # best of N has no distribution to read with, and a checkpoint that is only sampled again reads as before
    readers = [system for system in plan.systems if system.info.role not in ("best_of", "again")]
    done = 0
    for system in sorted(readers, key=lambda one: plan.policies.index(one.policy)):
        for task in reading:
            measured[task.name][system.name] = task.read(SystemReader(system, models, results, context.runtime))
            done += 1
            context.progress(done, len(readers) * len(reading), unit="tasks read")
    models.close()  # a judge may be large
    for task in plan.tasks:
        measured[task.name] |= task.score(answers[task.name], bench) if task.responds else task.score({}, bench)
    order = {system.name: at for at, system in enumerate(plan.systems)}
    return [
        TaskFound(task, dict(sorted(measured[task.name].items(), key=lambda item: order.get(item[0], len(order)))))
        for task in plan.tasks
    ]


def _asked(rows: list[Row]) -> list[Any]:
    """What a reward model reads of the prompts."""
    return [[row["prompt"], row.get("tools")] for row in rows]


def _said(generated: Generated) -> list[Any]:
    """What a reward model reads of the responses: their texts, which another tokenizer makes of the same tokens."""
    return [[[one.text, one.finished] for one in samples] for samples in generated.responses]


def _settings(context: StageContext, plan: Plan, engines: list[str]) -> dict[str, Any]:
    rewards = {which: context.inputs.get(which) for which in ("reward", "second_reward")}
    return {
        "prompts": len(plan.rows),
        "samples_per_prompt": plan.sampling.n,
        "sampling": asdict(plan.sampling),
        "precision": plan.precision,
        "engines": engines,
        "seed": context.seed,
        "score": plan.scorer_identity,
        "heldout_rows": len(plan.heldout),
        "checkpoints": {one.stage: one.key for one in context.inputs["policies"]},
        "reward_model": rewards["reward"] and rewards["reward"].key,
        "second_reward_model": rewards["second_reward"] and rewards["second_reward"].key,
    }
