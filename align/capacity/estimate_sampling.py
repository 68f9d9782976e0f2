"""Memory of sample and evaluate, counted from the config. Never imports torch.

Models that servers hold are named and not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.capacity.sampling import (
    MAX_SEQUENCES,
    Inference,
    SamplingLoad,
    ScoringLoad,
    UserLoad,
    reward_scoring,
    user_load,
    user_of,
)
from align.config.environment import EnvironmentConfig
from align.config.runtime.rollouts import EPISODES_TOGETHER, READ_TOKENS, SAMPLE_CHUNK
from align.config.stages.evaluate import EvaluateConfig
from align.config.stages.evaluation.task_fields import TaskConfig
from align.config.stages.evaluation.tasks import (
    EnvironmentTaskConfig,
    JudgedConfig,
    LmEvalConfig,
    MultipleChoiceConfig,
    PerplexityConfig,
    PreferenceConfig,
    RewardPairsConfig,
)
from align.config.stages.sample import SampleConfig
from align.models.compute.architecture import Architecture
from align.models.compute.costs import resolved

Models = Mapping[str, Sequence[Architecture]]


def inference(config: SampleConfig | EvaluateConfig, models: Models) -> Inference:
    """Return the load of a stage that samples or scores."""
    if isinstance(config, SampleConfig):
        return _sample(config, models)
    return _evaluate(config, models)


def reward_models(models: Models) -> Sequence[Architecture]:
    """Return the reward models of a stage that samples."""
    return (*models.get("reward", ()), *models.get("score.reward", ()))


def user_notes(environment: EnvironmentConfig | None) -> list[str]:
    """Return a note on the model that plays the user of episodes; empty without one."""
    user = None if environment is None else environment.user
    if user is None:
        return []
    return [f"{user.label}, which plays the user, {'is counted' if user.model else 'is not counted'}."]


# ---- sample ----


def _sample(config: SampleConfig, models: Models) -> Inference:
    """Return ``n`` responses to each prompt, and the reward models that score them.

    An episode counts as one response of ``max_tokens``.
    """
    load = SamplingLoad(
        name="policy",
        model=models["policy"][0],
        prompt_tokens=config.max_prompt_tokens,
        response_tokens=config.max_tokens,
        call=SAMPLE_CHUNK * config.n if config.environment is None else EPISODES_TOGETHER,
        uses_top_p=config.top_p < 1,
        user=user_load(config.environment, user_of(models), config.max_prompt_tokens),
    )
    return Inference(
        precision=resolved(config.precision),
        sampling=(load,),
        scoring=tuple(reward_scoring("reward", model, load.length) for model in reward_models(models)),
        notes=tuple(user_notes(config.environment)),
    )


# ---- evaluate ----


def _evaluate(config: EvaluateConfig, models: Models) -> Inference:
    """Return the answers of every system, and all models that score or read."""
    evaluation = _Evaluation(config, models)
    if config.prompts is not None:
        evaluation.add_prompt_set()
    for name, task in config.tasks.items():
        evaluation.add_task(name, task)
    if config.pairs is not None and config.reward is not None:
        evaluation.add_rewards(("reward", "second_reward"), config.max_context)
        evaluation.notes.append("pairs: assumed to have max_context tokens, since their length has no limit.")
    if config.heldout is not None:
        # One checkpoint after the other reads: the memory holds one.
        length = config.max_heldout_length
        evaluation.scoring += [evaluation.reading(name, length, length) for name in config.policies]
    return Inference(
        precision=resolved(config.precision),
        sampling=tuple(evaluation.sampling),
        scoring=tuple(evaluation.scoring),
        notes=tuple(evaluation.notes),
    )


class _Evaluation:
    """Loads of an evaluation, collected part by part."""

    def __init__(self, config: EvaluateConfig, models: Models) -> None:
        self.config = config
        self.models = models
        self.policies = dict(zip(config.policies, models["policies"], strict=True))
        self.users = dict(zip(config.users or (), models.get("users", ()), strict=True))
        """Checkpoints that play the user of episodes, by name; a task names its own."""
        self.systems = [(name, name, 1) for name in config.policies]
        """A system's name, the checkpoint that answers for it, and the answers from which its answer is chosen."""
        self.systems += [(name, baseline.of, baseline.best_of) for name, baseline in config.baselines.items()]
        # One process holds one vLLM, so several architectures are sampled with transformers.
        self.mixes_architectures = len(set(self.policies.values())) > 1
        self.sampling: list[SamplingLoad] = []
        self.scoring: list[ScoringLoad] = []
        self.notes: list[str] = []

    def add_prompt_set(self) -> None:
        """Add the responses to the prompts, the reward models that score them, and their KL to the reference."""
        config = self.config
        length = config.max_prompt_tokens + config.max_tokens
        answers = None if config.max_prompts is None else config.max_prompts * config.samples_per_prompt
        self._add_answers(answers, config.max_prompt_tokens, config.max_tokens)
        self.add_rewards(("reward", "score.reward"), length)
        if config.temperature == 0:
            return
        for name, checkpoint, best_of in self.systems:
            if best_of > 1 or name == config.reference:
                continue
            # The log-probabilities of a system's answers under itself and under the reference.
            for reader in (checkpoint, config.reference):
                self.scoring.append(self.reading(reader, length, config.max_tokens))

    def _add_answers(
        self,
        answers: int | None,
        prompt_tokens: int,
        response_tokens: int,
        top_p: float = 1.0,
        *,
        best_of: bool = True,
        user: UserLoad | None = None,
    ) -> None:
        """Add every system's answers, and the reward model that chooses the best of N.

        Args:
            answers: Answers of a system that are kept; None if the config does not limit them.
            prompt_tokens: Tokens of the longest prompt.
            response_tokens: Tokens of the longest response.
            top_p: Share of the probability that is sampled from.
            best_of: Whether best-of-N systems answer.
            user: The checkpoint that plays the user of episodes.
        """
        for _, checkpoint, sampled in self.systems:
            if sampled > 1 and not best_of:
                continue
            load = SamplingLoad(
                name=checkpoint,
                model=self.policies[checkpoint],
                prompt_tokens=prompt_tokens,
                response_tokens=response_tokens,
                call=MAX_SEQUENCES if answers is None else max(1, answers * sampled),
                uses_top_p=top_p < 1,
                needs_transformers=self.mixes_architectures,
                user=user,
            )
            self.sampling.append(load)
            if sampled > 1:
                self.scoring.append(_scoring("reward", self.models["reward"][0], load.length))

    def add_rewards(self, fields: Sequence[str], length: int) -> None:
        """Add the reward models that the config's ``fields`` name, if any."""
        for field in fields:
            # Rewards of a list score as in all stages.
            load = reward_scoring if field == "score.reward" else _scoring
            self.scoring += [load(field, model, length) for model in self.models.get(field, ())]

    def add_task(self, name: str, task: TaskConfig) -> None:
        """Add one task's answers and scores, with a note on models that are not counted."""
        config = self.config
        if isinstance(task, LmEvalConfig):
            self.notes.append(f"{name}: lm-eval's own tasks run in a separate process and are not counted.")
        elif isinstance(task, MultipleChoiceConfig | PerplexityConfig | PreferenceConfig):
            length = config.max_context
            logit_tokens = min(config.max_context, config.max_tokens)
            if isinstance(task, PerplexityConfig):
                length = logit_tokens = task.max_length
            # Systems that share a checkpoint are read by it in turn, with the same memory.
            readers = dict.fromkeys(checkpoint for _, checkpoint, best_of in self.systems if best_of == 1)
            self.scoring += [self.reading(reader, length, logit_tokens) for reader in readers]
        elif isinstance(task, RewardPairsConfig):
            self.add_rewards(("reward", "second_reward"), config.max_context)
        elif isinstance(task, EnvironmentTaskConfig):
            self._add_episodes(name, task)
        else:
            self._add_answered_task(name, task)

    def _add_episodes(self, name: str, task: EnvironmentTaskConfig) -> None:
        """Add every system's episodes, each as one answer of ``max_tokens``; best-of-N systems play none."""
        user = task.environment.user
        self.notes += [f"{name}: {note}" for note in user_notes(task.environment)]
        tokens = task.environment.max_tokens
        prompt_tokens = max(1, self.config.max_context - tokens)
        checkpoint = None if user is None or user.model is None else self.users[user.model]
        load = user_load(task.environment, checkpoint, prompt_tokens)
        answers = None if task.max_items is None else task.max_items * task.samples
        self._add_answers(answers, prompt_tokens, tokens, best_of=False, user=load)

    def _add_answered_task(self, name: str, task: Any) -> None:
        config = self.config
        # Lengths of a task's prompts are not known before its templates are applied: count the longest possible.
        prompt_tokens = max(1, config.max_context - task.max_tokens)
        samples = getattr(task, "samples", 1)
        answers = None if task.max_items is None else task.max_items * samples
        self._add_answers(answers, prompt_tokens, task.max_tokens, getattr(task, "top_p", 1.0))
        if not isinstance(task, JudgedConfig):
            return
        if task.judge.endpoint is not None:
            self.notes.append(f"{name}: {task.judge.endpoint.model}, a server, judges; that is not counted.")
        elif task.judge.reward_field is not None:
            self.add_rewards([task.judge.reward_field], config.max_context)

    def reading(self, name: str, length: int, logit_tokens: int) -> ScoringLoad:
        """Return the load of a checkpoint that reads rows of ``length`` tokens."""
        tokens = max(READ_TOKENS, length)
        return ScoringLoad(name, self.policies[name], length, tokens, logit_tokens, is_rounded=True)


def _scoring(name: str, model: Architecture, length: int) -> ScoringLoad:
    """Return the load of the stage's own reward model, which reads ``READ_TOKENS`` tokens at a time."""
    return ScoringLoad(name, model, length, max(READ_TOKENS, length), is_rounded=True)
