"""Evaluates systems: they answer, they read, their answers are scored; then numbers are compared and written.

The ``evaluate`` stage and ``align eval`` both run this code. A machine holds one model at a time: first the engine,
then reward models, then the checkpoints themselves. Expensive results are cached under a key of all their inputs, so
that a killed attempt resumes, and a later run with the same inputs reuses them. For the files see
``scorecard_files.py``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from align.environments.user_models import UserResources
from align.evaluation.answers import Answers, Measured, ResponseSet, RewardField, SystemResponses, Turn, Values
from align.evaluation.drift import DriftMeasurement
from align.evaluation.logprobs import LoadedModels
from align.evaluation.participants import Performer, Reader, Respondent
from align.evaluation.plan import Plan, Program
from align.evaluation.reward_accuracy import Scores, pair_reports, read_sides, score_sides
from align.evaluation.scorecard import ProgramDescription
from align.evaluation.scorecard.result_files import write
from align.evaluation.scorecard.scorecard_builder import Measurements, TaskResult, build
from align.evaluation.scoring import (
    SUM,
    ResultCache,
    ScoringContext,
    describe_rewards,
    has_thoughts,
    metric_values,
    reward_values,
    score_responses,
    select_best,
    shape_values,
    thought_values,
)
from align.evaluation.systems import OpenEngine, Policy, ResponseCache, Sampler, System
from align.pipeline.context import StageContext
from align.scoring.scored import Scored
from align.store.fingerprint import digest

PROMPT_SET = "prompts"
"""Name of the prompt set among the tasks."""
SCORED_TOGETHER = 4096
"""Answers of several systems that a reward model scores between two writes: a killed stage repeats at most these."""
MeasuredTasks = dict[str, dict[str, Measured]]
"""By task and system."""
REWARD_FIELDS: tuple[RewardField, ...] = ("reward", "second_reward")


def evaluate(context: StageContext, plan: Plan, open_engine: OpenEngine) -> tuple[dict[str, Any], SystemResponses]:
    """Run the plan and return the scorecard and the responses."""
    return Evaluation(context, plan).run(open_engine)


class Evaluation:
    """One run of a plan."""

    def __init__(self, context: StageContext, plan: Plan) -> None:
        self.context = context
        self.plan = plan
        # The shared cache outlives the stage, so another evaluation of the same checkpoints reads its results.
        folder = context.cache / "evaluation" if context.cache is not None else context.checkpoints
        self.results = ResultCache(folder, context.warn)
        self.scoring = ScoringContext(context, self.results, plan.reference, plan.base, plan.precision)

    @cached_property
    def models(self) -> LoadedModels:
        """The checkpoints' forward passes; first used after the engine has closed and freed the device."""
        from align.models.compute.processes import device_of

        plan = self.plan
        return LoadedModels(plan.policies, device_of(self.context.runtime), plan.precision)

    def run(self, open_engine: OpenEngine) -> tuple[dict[str, Any], SystemResponses]:
        """Run all phases, write the files, and return the scorecard and the responses."""
        plan = self.plan
        # Phase 1: the engine holds the device; every system answers the prompt set and the tasks.
        responses = self._respond(open_engine)
        # Phase 2: reward models choose the best of N, and score the prompt set and the held-out pairs.
        self._select_best(responses)
        values = self._score_prompt_set(responses)
        reward_models = self._measure_reward_models()
        # A list of rewards may load further models.
        self.scoring.close()
        programs, explanations = self._run_programs(responses, values)
        # Phase 3: the checkpoints' own forward passes measure KL and held-out loss, and read the tasks' texts.
        drift = DriftMeasurement(self.context, plan, self.models, self.results, responses.prompt_set)
        measured = self._read_with_checkpoints(drift)
        token_kl = drift.kl(values)
        heldout = drift.heldout()
        # Phase 4: programs, reward models and judges score the tasks' answers.
        tasks = self._score_tasks(measured, responses)
        self.scoring.close()
        measurements = Measurements(
            systems=[system.info for system in plan.systems],
            reference=plan.reference,
            base=plan.base,
            sources=[str(row["source"]) for row in plan.rows],
            values=values,
            programs=programs,
            explanations=explanations,
            heldout=heldout,
            tasks=tasks,
            reward_models=reward_models,
            gates=plan.gates,
            copies=find_copies(plan, responses),
        )
        card = build(measurements, plan.resampling, self._settings(responses.engines))
        write(self.context.output, plan, card, responses, measurements=measurements, token_kl=token_kl)
        return card, responses

    def _respond(self, open_engine: OpenEngine) -> SystemResponses:
        """Have every system answer, checkpoint by checkpoint; best-of-N systems give N times as many answers."""
        plan = self.plan
        sampler = Sampler(
            plan.policies,
            self.context.runtime,
            open_engine,
            ResponseCache(self.results.folder / "responses", self.results.warn),
            warn=self.context.warn,
            progress=lambda done, total: self.context.progress(done, total, unit="responses"),
            precision=plan.precision,
            thinking_budget=plan.thinking_budget,
        )
        tasks = [task for task in plan.tasks if task.responds]
        playing = [task for task in plan.tasks if task.plays]
        for system in plan.systems:
            sampler.expect(system.info.best_of * len(plan.rows) * plan.sampling.n)
            sampler.expect(system.info.best_of * sum(len(task.items) for task in tasks))
            sampler.expect(sum(task.episode_count for task in playing if system.info.role != "best_of"))
        responses = SystemResponses(
            answers={task.name: {} for task in tasks}, episodes={task.name: {} for task in playing}
        )
        try:
            # Systems of one checkpoint answer in a row, so the engine loads each checkpoint's weights once.
            for policy in plan.policies:
                for system in plan.systems:
                    if system.policy is not policy:
                        continue
                    if plan.rows:
                        responses.prompt_set[system.name] = sampler.generate(
                            policy, plan.prompts[system.name], system.sampling(plan.sampling)
                        )
                    respondent = Respondent(system, sampler, plan.max_length, self.context.warn)
                    for task in tasks:
                        responses.answers[task.name][system.name] = task.respond(respondent)
                    if system.info.role == "best_of":
                        continue
                    for task in playing:
                        responses.episodes[task.name][system.name] = task.play(self._performer(system, sampler))
        finally:
            sampler.close()
        responses.engines = sorted(sampler.engines)
        responses.tokens = sampler.tokens
        return responses

    def _performer(self, system: System, sampler: Sampler) -> Performer:
        return Performer(
            system,
            sampler,
            results=self.results,
            journals=self.context.checkpoints / "episodes",
            max_length=self.plan.max_length,
            users=UserResources(
                runtime=self.context.runtime,
                precision=self.plan.precision,
                folder=self.context.checkpoints,
                shared=self.context.cache,
                warn=self.context.warn,
                on_hang=self.context.fail_at_once,
            ),
            warn=self.context.warn,
            note=self.context.note,
        )

    def _select_best(self, responses: SystemResponses) -> None:
        """Replace the N answers of best-of-N systems by the best, and put systems in the plan's order."""
        for system in self.plan.systems:
            if system.info.role == "best_of":
                self._select_best_of(system, responses)
        order = self._order()
        responses.prompt_set = dict(sorted(responses.prompt_set.items(), key=lambda item: order[item[0]]))

    def _select_best_of(self, system: System, responses: SystemResponses) -> None:
        for per_system in responses.answers.values():
            per_system[system.name] = select_best(per_system[system.name], system.info.best_of, self.scoring)
        if system.name not in responses.prompt_set:
            return
        response_set = responses.prompt_set[system.name]
        turns: Answers = [
            # The prompt set's responses in the form of a task's answers, which ``select_best`` expects.
            [[Turn(row["prompt"], response)] for response in samples]
            for row, samples in zip(self.plan.rows, response_set.responses, strict=True)
        ]
        # As the prompt set's answers are scored afterwards: with the tools that they could call.
        tools = [row.get("tools") for row in self.plan.rows]
        selected = select_best(turns, system.info.best_of, self.scoring, tools)
        best = [[sample[-1].response for sample in samples] for samples in selected]
        responses.prompt_set[system.name] = ResponseSet(response_set.engine, best)

    def _score_prompt_set(self, responses: SystemResponses) -> dict[str, dict[str, Values]]:
        """Return each system's values on the prompt set: lengths, and rewards if there is a reward model."""
        plan = self.plan
        values = {name: shape_values(response_set) for name, response_set in responses.prompt_set.items()}
        if any(map(has_thoughts, responses.prompt_set.values())):
            for name, response_set in responses.prompt_set.items():
                values[name] |= thought_values(response_set)
        reward = self.scoring.artifact("reward")
        if reward is None:
            return values
        prompts = [[row["prompt"], row.get("tools")] for row in plan.rows]
        entries = {}
        for name, response_set in responses.prompt_set.items():
            # Texts, not tokens: a reward model with another tokenizer reads the text.
            texts = [
                [[str(response.answer_text), response.finished] for response in samples]
                for samples in response_set.responses
            ]
            # All that the scores depend on; the number is raised when the computation changes.
            entries[name] = f"reward-{name}", digest(["rewards 3", reward.weights, prompts, texts, plan.precision])
        scores_by_system = {name: self.results.read(*entry) for name, entry in entries.items()}
        missing = [name for name, scores in scores_by_system.items() if scores is None]
        score = partial(self.scoring.score, "reward")
        # Several systems at once: the model then reads each prompt once for the answers of all of them.
        for names in _scored_together(missing, responses.prompt_set):
            computed = reward_values(score, plan.rows, [responses.prompt_set[name] for name in names])
            for name, scores in zip(names, computed, strict=True):
                scores_by_system[name] = self.results.write(*entries[name], scores)
        for name, scores in scores_by_system.items():
            values[name]["reward"] = scores
        return values

    def _run_programs(
        self, responses: SystemResponses, values: dict[str, dict[str, Values]]
    ) -> tuple[dict[str, ProgramDescription], dict[str, list[dict[str, Any]]]]:
        """Add all programs' scores to ``values``; return their metrics' meaning, and judges' reasons by system."""
        plan = self.plan
        described: dict[str, ProgramDescription] = {}
        explanations = {}
        for name, response_set in responses.prompt_set.items():
            everything = Scored([])
            if plan.scorer is not None:
                everything = score_responses(plan.scorer, plan.rows, response_set)
                scores = metric_values(everything, SUM, response_set)
                values[name] |= scores
                described |= describe_rewards(plan.reward_weights, scores)
            for program in plan.programs:
                scored = score_responses(program.scorer, plan.rows, response_set)
                everything.parts[program.metric] = scored
                if program.scorer.kind == "function":
                    values[name][program.metric] = response_set.unflatten(scored.total)
                    continue
                verdicts = metric_values(scored, program.metric, response_set)
                values[name] |= verdicts
                described |= dict.fromkeys(verdicts, (None, _describe_verdicts(program)))
            explanations[name] = everything.explanations()
        if plan.scorer is not None:
            plan.scorer.close()  # the checkpoints need the memory
        described |= {program.metric: (program.better, program.meaning) for program in plan.programs}
        return described, explanations

    def _measure_reward_models(self) -> list[dict[str, Any]]:
        """Report on the reward models' accuracy and calibration on the held-out pairs, each compared with the other."""
        plan = self.plan
        if not plan.pairs:
            return []
        sides = read_sides(plan.pairs)
        scores: list[tuple[str, Scores]] = []
        for field in REWARD_FIELDS:
            artifact = self.scoring.artifact(field)
            if artifact is None:
                continue
            key = digest(["pair scores 3", artifact.weights, sides, plan.precision])
            score = partial(self._pair_scores, sides, field)
            chosen, rejected = self.results.read_or_compute("pairs", key, score)
            scores.append((artifact.stage, (chosen, rejected)))
        return pair_reports(plan.pairs, scores, seed=plan.resampling.seed, task="pairs")

    def _pair_scores(self, sides: Any, field: RewardField) -> Scores:
        return score_sides(sides, partial(self.scoring.score, field))

    def _read_with_checkpoints(self, drift: DriftMeasurement) -> MeasuredTasks:
        """Measure drift and read the tasks' texts, checkpoint by checkpoint, since each is loaded once."""
        measured: MeasuredTasks = {task.name: {} for task in self.plan.tasks}
        order = drift.reading_order()
        for policy in order:
            drift.measure(policy)
            self._read(policy, measured, loads_checkpoint=False)
        self.models.close()  # a process that loads the checkpoints itself may need the memory, or a judge
        for policy in order:
            self._read(policy, measured, loads_checkpoint=True)
        return measured

    def _read(self, policy: Policy, measured: MeasuredTasks, *, loads_checkpoint: bool) -> None:
        """Have a checkpoint's systems read the tasks that load it themselves, or those that do not."""
        plan = self.plan
        reading = [task for task in plan.tasks if task.reads]
        # Best of N has no distribution to read with, and a checkpoint that is only sampled again reads as before.
        readers = [system for system in plan.systems if system.info.role not in ("best_of", "again")]
        for system in readers:
            if system.policy is not policy:
                continue
            for task in reading:
                if task.loads_checkpoint != loads_checkpoint:
                    continue
                reader = Reader(system, self.models, self.results, self.context.runtime)
                measured[task.name][system.name] = task.read(reader)
                completed = sum(map(len, measured.values()))
                self.context.progress(completed, len(readers) * len(reading), unit="tasks read")

    def _score_tasks(self, measured: MeasuredTasks, responses: SystemResponses) -> list[TaskResult]:
        """Add the scores of the tasks' answers to what reading ``measured``; return every task's result."""
        plan = self.plan
        for task in plan.tasks:
            # Tasks that read have their numbers by now; scoring adds the numbers of tasks that respond.
            measured[task.name] |= task.score(responses.answers[task.name] if task.responds else {}, self.scoring)
            if task.plays:
                measured[task.name] |= task.score_episodes(responses.episodes[task.name], self.scoring)
        order = self._order()
        results = []
        for task in plan.tasks:
            by_system = sorted(measured[task.name].items(), key=lambda item: order.get(item[0], len(order)))
            results.append(TaskResult(task, dict(by_system)))
        return results

    def _order(self) -> dict[str, int]:
        return {system.name: index for index, system in enumerate(self.plan.systems)}

    def _settings(self, engines: list[str]) -> dict[str, Any]:
        context = self.context
        plan = self.plan
        reward, second_reward = (self.scoring.artifact(field) for field in REWARD_FIELDS)
        return {
            "prompts": len(plan.rows),
            "samples_per_prompt": plan.sampling.n,
            "sampling": replace(plan.sampling, thinking_budget=plan.thinking_budget).settings(),
            "precision": plan.precision,
            "engines": engines,
            "seed": context.seed,
            "score": ", ".join([*plan.reward_identities, *(program.identity for program in plan.programs)]),
            "heldout_rows": len(plan.heldout),
            "checkpoints": {artifact.stage: artifact.key for artifact in context.inputs["policies"]},
            "reward_model": reward and reward.key,
            "second_reward_model": second_reward and second_reward.key,
        }


def _scored_together(names: list[str], response_sets: dict[str, ResponseSet]) -> list[list[str]]:
    """Return the systems in groups of at most ``SCORED_TOGETHER`` answers, or of one system."""
    groups: list[list[str]] = []
    answers = 0
    for name in names:
        count = sum(len(samples) for samples in response_sets[name].responses)
        if not groups or answers + count > SCORED_TOGETHER:
            groups.append([])
            answers = 0
        groups[-1].append(name)
        answers += count
    return groups


def find_copies(plan: Plan, responses: SystemResponses) -> dict[str, list[str]]:
    """Return the systems of role ``again`` with the tasks in which they repeat their checkpoint word for word."""
    copies = {}
    for system in plan.systems:
        if system.info.role != "again":
            continue
        again, original = (_token_ids(responses, name) for name in (system.name, system.info.of))
        tasks = [task for task, ids in again.items() if ids == original[task]]
        if tasks:
            copies[system.name] = tasks
    return copies


def _describe_verdicts(program: Program) -> str:
    """Return the meaning of the metrics that a verifier gives in addition to its score."""
    if program.scorer.kind == "judge":
        return f"share of responses, or of their criteria, in the judgments of {program.metric}"
    return f"share of responses that fail {program.metric} for this reason"


def _token_ids(responses: SystemResponses, system: str) -> dict[str, Any]:
    """Return the token ids of all of a system's responses, by task."""
    by_task: dict[str, Any] = {}
    if system in responses.prompt_set:
        by_task[PROMPT_SET] = [
            [response.token_ids for response in samples] for samples in responses.prompt_set[system].responses
        ]
    for task, answers in responses.answers.items():
        by_task[task] = [
            [[turn.response.token_ids for turn in turns] for turns in samples] for samples in answers[system]
        ]
    for task, episodes in responses.episodes.items():
        if system in episodes:
            by_task[task] = [[episode.token_ids for episode in samples] for samples in episodes[system]]
    return by_task
