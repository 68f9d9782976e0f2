"""Estimator of ``evaluate``: answers of every system, and the scoring and reading of texts. Torch-free.

Counted from the config: every system answers the prompt set and every task with answers; reward models score;
checkpoints read their own answers (KL), held-out rows and pairs. A note names what takes time that is not known in
advance: tasks that read texts of unknown length, data whose number of records is not known, judges that are servers,
lm-eval's own tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.capacity.inference import (
    UNKNOWN_CALL,
    Inference,
    Rows,
    SamplingLoad,
    ScoringLoad,
    UserLoad,
    reward_scoring,
    user_load,
    user_note,
)
from align.config.batch_sizes import READ_TOKENS
from align.config.stages.environment_task import EnvironmentTaskConfig
from align.config.stages.evaluate import EvaluateConfig
from align.config.stages.evaluation_fields import TaskConfig
from align.config.stages.evaluation_tasks import (
    JudgedConfig,
    LmEvalConfig,
    MultipleChoiceConfig,
    PerplexityConfig,
    PreferenceConfig,
    RewardPairsConfig,
)
from align.errors import UserError
from align.evaluation.judges.judged import make_items
from align.evaluation.tasks.task_records import load_records
from align.models.architecture import Architecture
from align.models.compute_types import resolved

Models = Mapping[str, Sequence[Architecture]]
UNKNOWN_LENGTH = "its memory is counted, not its time: the length of its texts is not known."


def inference(config: EvaluateConfig, models: Models, rows: Mapping[str, Rows]) -> Inference:
    """Return everything that the stage's models do."""
    evaluation = _Evaluation(config, models, rows)
    if config.prompts is not None:
        evaluation.add_prompt_set()
    for name, task in config.tasks.items():
        evaluation.add_task(name, task)
    evaluation.add_pairs()
    evaluation.add_heldout()
    return Inference(
        precision=resolved(config.precision),
        sampling=tuple(evaluation.sampling),
        scoring=tuple(evaluation.scoring),
        row="prompts" if config.prompts is not None else "items",
        rows=evaluation.prompts or max(evaluation.task_sizes, default=0),
        rows_are_known=rows.get("prompts", Rows(0, 0)).is_known,
        is_partial=evaluation.is_partial,
        notes=tuple(evaluation.notes),
    )


class _Evaluation:
    """Loads of an evaluation, collected part by part."""

    def __init__(self, config: EvaluateConfig, models: Models, rows: Mapping[str, Rows]) -> None:
        self.config, self.models, self.rows = config, models, rows
        self.policies = dict(zip(config.policies, models["policies"], strict=True))
        self.users = dict(zip(config.users or (), models.get("users", ()), strict=True))
        """Checkpoints that play the user of episodes, by name; a task names its own."""
        self.systems = [(name, name, 1) for name in config.policies]
        """A system's name, the checkpoint that answers for it, and the answers sampled for each one that is kept."""
        self.systems += [(name, baseline.of, baseline.best_of) for name, baseline in config.baselines.items()]
        # One process holds one vLLM, so several architectures are sampled with transformers.
        self.mixes_architectures = len(set(self.policies.values())) > 1
        self.sampling: list[SamplingLoad] = []
        self.scoring: list[ScoringLoad] = []
        self.notes: list[str] = []
        self.is_partial = False
        self.prompts = 0
        self.task_sizes: list[int] = []
        """Items of each task whose number is known."""

    # ---- answers ----

    def add_prompt_set(self) -> None:
        """Add the responses to the prompts, a reward model's scores of them, and their KL to the reference."""
        config = self.config
        self.prompts = self.rows["prompts"].count_test(config.max_prompts)
        answers = self.prompts * config.samples_per_prompt
        length = config.max_prompt_tokens + config.max_tokens
        self._add_answers(self.prompts, config.samples_per_prompt, config.max_prompt_tokens, config.max_tokens)
        for field in ("reward", "score.reward"):
            self._add_reward(field, answers * len(self.systems), length)
        if config.temperature == 0:
            return
        for name, checkpoint, best_of in self.systems:
            if best_of > 1 or name == config.reference:
                continue
            # the log-probabilities of a system's answers under itself and under the reference
            for reader in (checkpoint, config.reference):
                self.scoring.append(self._reading(reader, answers, length, config.max_tokens))

    def _add_answers(
        self,
        prompts: int | None,
        samples: int,
        prompt_tokens: int,
        response_tokens: int,
        top_p: float = 1.0,
        *,
        best_of: bool = True,
        user: UserLoad | None = None,
    ) -> None:
        """Add every system's answers; a reward model scores those of a best of N. ``prompts`` is None if unknown.

        Without ``best_of`` the best-of-N systems take no part. ``user`` plays the user of episodes.
        """
        systems = self.systems if best_of else [system for system in self.systems if system[2] == 1]
        for _, checkpoint, answers in systems:
            sequences = None if prompts is None else prompts * samples * answers
            load = SamplingLoad(
                name=checkpoint,
                model=self.policies[checkpoint],
                sequences=sequences,
                prompts=prompts or 0,
                prompt_tokens=prompt_tokens,
                response_tokens=response_tokens,
                call=UNKNOWN_CALL if sequences is None else max(1, sequences),
                uses_top_p=top_p < 1,
                needs_transformers=self.mixes_architectures,
                user=user,
            )
            self.sampling.append(load)
            if answers > 1:
                reward = self.models["reward"][0]
                self.scoring.append(_scoring("reward", reward, sequences, load.length))

    def _add_reward(self, field: str, rows: int | None, length: int) -> None:
        """Add the scores of the reward models that the config's ``field`` names, if any."""
        # Rewards of a list score as in all stages.
        count = reward_scoring if field == "score.reward" else _scoring
        self.scoring += [count(field, model, rows, length) for model in self.models.get(field, ())]

    # ---- tasks ----

    def add_task(self, name: str, task: TaskConfig) -> None:
        """Add one task's answers and scores, with a note on what is not counted."""
        config = self.config
        if isinstance(task, LmEvalConfig):
            self._leave_out(f"{name}: lm-eval's own tasks run in its own process and are not counted.")
        elif isinstance(task, MultipleChoiceConfig | PerplexityConfig | PreferenceConfig):
            length, logit_tokens = config.max_context, min(config.max_context, config.max_tokens)
            if isinstance(task, PerplexityConfig):
                length = logit_tokens = task.max_length
            # Systems that share a checkpoint are read by it in turn, with the same memory.
            readers = dict.fromkeys(checkpoint for _, checkpoint, best_of in self.systems if best_of == 1)
            self.scoring += [self._reading(reader, None, length, logit_tokens) for reader in readers]
            self._leave_out(f"{name}: {UNKNOWN_LENGTH}")
        elif isinstance(task, RewardPairsConfig):
            for field in ("reward", "second_reward"):
                self._add_reward(field, None, config.max_context)
            self._leave_out(f"{name}: {UNKNOWN_LENGTH}")
        elif isinstance(task, EnvironmentTaskConfig):
            self._add_episodes(name, task)
        else:
            self._add_answered_task(name, task)

    def _add_episodes(self, name: str, task: EnvironmentTaskConfig) -> None:
        """Add every system's episodes, each as one answer of ``max_tokens``; best-of-N systems play none."""
        rows = task.max_items if task.rows is not None else _count_items(name, task)[0]
        if rows is None:
            self._leave_out(f"{name}: its memory is counted, not its time: the number of its rows is not known.")
        else:
            self.task_sizes.append(rows)
        self._leave_out(f"{name}: the time of the environment and its tools is not counted.")
        user = task.environment.user
        if user is not None:
            self._leave_out(f"{name}: {user_note(user)}")
        tokens = task.environment.max_tokens
        prompt_tokens = max(1, self.config.max_context - tokens)
        checkpoint = None if user is None or user.model is None else self.users[user.model]
        load = user_load(task.environment, checkpoint, prompt_tokens)
        self._add_answers(rows, task.samples, prompt_tokens, tokens, best_of=False, user=load)

    def _leave_out(self, note: str) -> None:
        """Note something that is not counted."""
        self.notes.append(note)
        self.is_partial = True

    def _add_answered_task(self, name: str, task: Any) -> None:
        config = self.config
        items, later_turns = _count_items(name, task)
        if items is None:
            self._leave_out(
                f"{name}: its memory is counted, not its time: its records are on the Hub, and max_items is not set."
            )
        else:
            self.task_sizes.append(items)
        # Lengths of a task's prompts are not known before its templates are applied: count the longest possible.
        prompt_tokens = max(1, config.max_context - task.max_tokens)
        questions = None if items is None else items + later_turns
        samples, top_p = getattr(task, "samples", 1), getattr(task, "top_p", 1.0)
        self._add_answers(questions, samples, prompt_tokens, task.max_tokens, top_p)
        if not isinstance(task, JudgedConfig):
            return
        if task.judge.endpoint is not None:
            self._leave_out(f"{name}: {task.judge.endpoint.model}, a server, judges; that is not counted.")
        elif task.judge.reward_field is not None:
            judgments = None if questions is None else questions * len(self.systems)
            self._add_reward(task.judge.reward_field, judgments, config.max_context)

    # ---- texts that are read ----

    def add_pairs(self) -> None:
        """Add the reward models' scores of the pairs."""
        config = self.config
        if config.pairs is None or config.reward is None:
            return
        pairs = self.rows["pairs"].count_test(config.max_pairs)
        for field in ("reward", "second_reward"):
            self._add_reward(field, 2 * pairs, config.max_context)
        self.notes.append("pairs: assumed to have max_context tokens; nothing limits their length.")

    def add_heldout(self) -> None:
        """Add every checkpoint's loss on the held-out rows."""
        config = self.config
        if config.heldout is None:
            return
        # One checkpoint after the other: the memory holds one.
        rows, length = self.rows["heldout"].count_test(config.max_heldout), config.max_heldout_length
        for name in self.policies:
            self.scoring.append(self._reading(name, rows, length, length))

    def _reading(self, name: str, rows: int | None, length: int, logit_tokens: int) -> ScoringLoad:
        tokens = max(READ_TOKENS, length)
        return ScoringLoad(name, self.policies[name], length, tokens, rows, logit_tokens, is_rounded=True)


def _scoring(name: str, model: Architecture, rows: int | None, length: int) -> ScoringLoad:
    """Return the load of the stage's own reward model, which reads ``READ_TOKENS`` tokens at a time."""
    return ScoringLoad(name, model, length, max(READ_TOKENS, length), rows, is_rounded=True)


def _count_items(name: str, task: Any) -> tuple[int | None, int]:
    """Return a task's items and their turns after the first; None for items that only the Hub knows.

    Files that cannot be read are no error here: the stage itself refuses them, with their place.
    """
    if task.files is None:
        return task.max_items, 0
    try:
        records = load_records(task, Path.cwd(), 0)
        if isinstance(task, JudgedConfig):
            # Each later turn of a conversation is an answer of its own.
            return len(records), sum(len(item.data["later"]) for item in make_items(records, None, None, name))
    except UserError:
        return task.max_items, 0
    return len(records), 0
