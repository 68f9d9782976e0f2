"""Evaluates systems: they answer, they read, their answers are scored; then numbers are compared and written.

The one path that the ``evaluate`` stage and ``align eval`` take. A machine holds one thing at a time: first the engine,
then reward models, then the checkpoints themselves. What is dear is kept under what it depends on, so that an attempt
that was killed, and the next run that asks the same, go on from it. Files: see ``written.py``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from align.evaluation.bench import StageBench, SystemReader, SystemRespondent, keep_best
from align.evaluation.comparisons import Resampling
from align.evaluation.gates import Gate
from align.evaluation.generation import Generated, OpenEngine, ResponseCache, Sampler
from align.evaluation.measure import (
    LoadedModels,
    function_values,
    heldout_losses,
    kept,
    kl_values,
    reward_values,
    shape_values,
)
from align.evaluation.pairs import Scores, pair_reports, score_pairs
from align.evaluation.prompts import Policy
from align.evaluation.scorecard import Measurements, TaskFound, build
from align.evaluation.systems import System
from align.evaluation.tasks.base import Answers, Measured, Task, Turn, Values
from align.evaluation.written import write
from align.fingerprint import digest
from align.rollouts.protocol import Response, Sampling
from align.stage import StageContext

Row = dict[str, Any]
SAMPLER_TOLERANCE = {"float32": 0.01, "bfloat16": 0.15}
"""Largest mean |sampler - policy| log-probability per token, in nats: above it the engine holds other weights."""


@dataclass(frozen=True)
class Plan:
    """What is evaluated on what; ``rows`` (the prompt set), ``tasks``, ``pairs`` and ``heldout`` may be empty."""

    systems: list[System]
    reference: str
    base: str | None
    rows: list[Row]
    prompts: dict[str, list[list[int]]]
    """The prompt set as each system reads it."""
    sampling: Sampling
    scorer: Any
    scorer_identity: str
    pairs: list[Row]
    heldout: list[Row]
    heldout_length: int
    precision: Literal["bfloat16", "float32"]
    resampling: Resampling
    longest: int
    """Tokens that the engine must hold, prompt and response together."""
    tasks: list[Task] = field(default_factory=list)
    gates: list[Gate] = field(default_factory=list)

    @property
    def policies(self) -> list[Policy]:
        """The checkpoints behind the systems, each once."""
        return list({system.policy.name: system.policy for system in self.systems}.values())


@dataclass
class Answered:
    """What the systems said: to the prompt set, and to each task."""

    generated: dict[str, Generated]
    answers: dict[str, dict[str, Answers]]
    engines: list[str]
    tokens: int


def evaluate(context: StageContext, plan: Plan, open_engine: OpenEngine) -> tuple[dict[str, Any], Answered]:
    """Run the plan and return the scorecard and the answers."""
    folder = context.cache / "evaluation" if context.cache is not None else context.checkpoints
    bench = StageBench(context, folder, plan.reference, plan.base, plan.precision)
    answered = _answer(context, plan, open_engine, folder)
    values, reward_models = _score_by_models(context, plan, answered, bench, folder)
    if plan.scorer is not None:
        for name, one in answered.generated.items():
            values[name]["gold"] = function_values(plan.scorer, plan.rows, one)
    bench.close()
    models = LoadedModels(plan.policies, plan.reference, _device(context), plan.precision)
    token_kl = _measure_drift(context, plan, answered.generated, values, models, folder)
    heldout = _measure_heldout(context, plan, models, folder)
    tasks = _measure_tasks(context, plan, answered.answers, models, bench, folder)
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
    )
    card = build(found, plan.resampling, _settings(context, plan, answered.engines))
    write(context.output, plan, card, answered, found, token_kl)
    return card, answered


def _device(context: StageContext) -> Any:
    from align.models.threads import device_of

    return device_of(context.runtime)


def _answer(context: StageContext, plan: Plan, open_engine: OpenEngine, folder: Path) -> Answered:
    """Every system's answers, those of one checkpoint together; best-of-N systems have N times as many here."""
    sampler = Sampler(
        plan.policies,
        context.runtime,
        open_engine,
        ResponseCache(folder / "responses"),
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
    context: StageContext, plan: Plan, answered: Answered, bench: StageBench, folder: Path
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
            identity = digest([reward.weights, _identity(one), _asked(plan.rows), plan.precision])
            scored = partial(lambda each: reward_values(bench.model("reward").score, plan.rows, each), one)
            values[name]["reward"] = kept(folder, f"reward-{name}", identity, scored)
            context.progress(at + 1, len(answered.generated), unit="systems scored")
    return values, _reward_models(plan, bench, folder)


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


def _reward_models(plan: Plan, bench: StageBench, folder: Path) -> list[dict[str, Any]]:
    """Accuracy and calibration of the reward models on the held-out pairs, each beside the other as second scorer."""
    if not plan.pairs:
        return []
    scores: list[tuple[str, Scores]] = []
    for which in ("reward", "second_reward"):
        artifact = bench.artifact(which)
        if artifact is not None:
            identity = digest(["pair scores", artifact.weights, [row["id"] for row in plan.pairs], plan.precision])
            scored = partial(lambda name: score_pairs(plan.pairs, bench.model(name).score), which)
            chosen, rejected = kept(folder, "pairs", identity, scored)
            scores.append((artifact.stage, (chosen, rejected)))
    return pair_reports(plan.pairs, scores, seed=plan.resampling.seed, task="pairs")


def _measure_drift(
    context: StageContext,
    plan: Plan,
    generated: dict[str, Generated],
    values: dict[str, dict[str, Values]],
    models: LoadedModels,
    folder: Path,
) -> dict[str, list[list[float]]]:
    """KL to the reference of every system that has a distribution; returns it token by token, for samples."""
    found: dict[str, list[list[float]]] = {}
    for at, system in enumerate(plan.systems):
        if system.name in generated and system.info.role != "best_of":
            measured = _kl(context, plan, models, system, generated[system.name], folder)
            token_kl = measured.pop("token_kl", None)
            values[system.name] |= measured
            if token_kl:
                found[system.name] = token_kl
            context.progress(at + 1, len(plan.systems), unit="systems measured")
    return found


def _kl(
    context: StageContext, plan: Plan, models: LoadedModels, system: System, one: Generated, folder: Path
) -> dict[str, Any]:
    """KL of one system's responses; empty where it has no meaning.

    Raises ``RuntimeError`` when the checkpoint finds its responses far less or more likely than the engine did.
    """
    temperature = plan.sampling.temperature
    reference = next(each for each in plan.systems if each.name == plan.reference)
    policy = system.policy
    # Greedy responses are no sample to estimate from, and KL per token needs one vocabulary.
    if temperature == 0 or policy.tokenizer.get_vocab() != reference.policy.tokenizer.get_vocab():
        return {}
    if system is reference:
        zero = [[0.0] * len(samples) for samples in one.responses]
        return {"kl": zero, "kl_k3": zero}
    prompts, ref_prompts = plan.prompts[system.name], plan.prompts[plan.reference]
    own, ref = (models.logprobs_of(each.policy.name, temperature) for each in (system, reference))
    identity = digest(["kl 3", policy.key, reference.policy.key, _identity(one), digest([prompts, ref_prompts]),
                       temperature, plan.precision])  # fmt: skip
    found: dict[str, Any] = kept(
        folder, f"kl-{system.name}", identity, lambda: kl_values(own, ref, prompts, one, ref_prompts)
    )
    gap = found.pop("sampler_gap")
    exact = plan.precision == "float32" and context.runtime.engine.dtype != "bfloat16"
    tolerance = SAMPLER_TOLERANCE["float32" if exact else "bfloat16"]
    print(f"{system.name}: sampler and policy differ by {gap:.4f} nats a token (at most {tolerance})")
    if not gap <= tolerance:
        raise RuntimeError(
            f"the {one.engine} engine and the checkpoint '{policy.name}' differ by {gap:.3f} nats a token, at most "
            f"{tolerance} was expected: the responses are not this checkpoint's. Set runtime.engine.name to "
            "transformers, and report this."
        )
    return found


def _measure_heldout(
    context: StageContext, plan: Plan, models: LoadedModels, folder: Path
) -> dict[str, tuple[list[float], list[int]]]:
    """Held-out loss of the checkpoints as they are, over the rows that every one of them could read."""
    if not plan.heldout:
        return {}
    losses: dict[str, tuple[list[int], list[float], list[int]]] = {}
    rows = digest([row["id"] for row in plan.heldout])
    for policy in plan.policies:
        identity = digest([policy.key, rows, plan.heldout_length, plan.precision])
        measure = partial(
            heldout_losses, models.logprobs_of(policy.name, 1.0), policy.tokenizer, plan.heldout, plan.heldout_length
        )
        indices, values, tokens = kept(folder, f"heldout-{policy.name}", identity, measure)
        losses[policy.name] = indices, values, tokens
        context.progress(len(losses), len(plan.policies), unit="held-out sets read")
    common = set.intersection(*(set(indices) for indices, _, _ in losses.values()))
    if len(common) < len(plan.heldout):
        left_out = len(plan.heldout) - len(common)
        context.warn(f"{left_out} of {len(plan.heldout)} held-out rows left out: longer than max_heldout_length")
    result = {}
    for name, (indices, values, tokens) in losses.items():
        places = [at for at, index in enumerate(indices) if index in common]
        result[name] = ([values[at] for at in places], [tokens[at] for at in places])
    return result


def _measure_tasks(
    context: StageContext,
    plan: Plan,
    answers: dict[str, dict[str, Answers]],
    models: LoadedModels,
    bench: StageBench,
    folder: Path,
) -> list[TaskFound]:
    """Every task's numbers: what systems read, checkpoint by checkpoint, then what scoring makes of their answers."""
    measured: dict[str, dict[str, Measured]] = {task.name: {} for task in plan.tasks}
    reading = [task for task in plan.tasks if task.reads]
    # best of N has no distribution to read with, and a checkpoint that is only sampled again reads as before
    readers = [system for system in plan.systems if system.info.role not in ("best_of", "again")]
    done = 0
    for system in sorted(readers, key=lambda one: plan.policies.index(one.policy)):
        for task in reading:
            measured[task.name][system.name] = task.read(SystemReader(system, models, folder, context.runtime))
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


def _identity(generated: Generated) -> str:
    return digest([[[one.token_ids, one.finished] for one in samples] for samples in generated.responses])


def _asked(rows: list[Row]) -> str:
    return digest([[row["prompt"], row.get("tools")] for row in rows])


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
