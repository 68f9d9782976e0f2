"""What the stage ``evaluate`` asks of devices: its systems' answers, and what is scored and read. Torch-free.

Counted from the config: every system answers the prompt set and every task that is answered; reward models score,
checkpoints read their own answers (KL), held-out rows and pairs. Named in a note where it takes time that cannot be
told before: tasks that read texts of unknown length, data whose number of records is not known, judges that are
servers, lm-eval's own tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.capacity.inference import Inference, Lot, Reading, Rows, scored
from align.errors import UserError
from align.evaluation.logprobs import BATCH_TOKENS
from align.evaluation.tasks.judged import JudgedConfig
from align.evaluation.tasks.judged_items import make_items
from align.evaluation.tasks.lm_eval import LmEvalConfig
from align.evaluation.tasks.multiple_choice import MultipleChoiceConfig
from align.evaluation.tasks.perplexity import PerplexityConfig
from align.evaluation.tasks.preference import PreferenceConfig
from align.evaluation.tasks.reward_pairs import RewardPairsConfig
from align.models.architecture import Architecture

if TYPE_CHECKING:
    from align.evaluation.tasks.base import TaskConfig
    from align.stages.evaluate import EvaluateConfig

Models = Mapping[str, Sequence[Architecture]]


def inference(config: EvaluateConfig, models: Models, rows: Mapping[str, Rows]) -> Inference:
    """Everything that the stage has models do."""
    counted = _Evaluation(config, models, rows)
    if config.prompts is not None:
        counted.prompt_set()
    for name, task in config.tasks.items():
        counted.task(name, task)
    counted.pairs_and_heldout()
    given = rows.get("prompts", Rows(0, 0))
    total = counted.prompts or max(counted.sizes, default=0)
    return Inference(
        config.precision,
        tuple(counted.lots),
        tuple(counted.readings),
        "prompts" if config.prompts is not None else "items",
        total,
        given.known,
        partly=counted.partly,
        notes=tuple(counted.notes),
    )


class _Evaluation:
    """Lots and readings as they come."""

    def __init__(self, config: EvaluateConfig, models: Models, rows: Mapping[str, Rows]) -> None:
        self.config, self.models, self.rows = config, models, rows
        self.policies = dict(zip(config.policies, models["policies"], strict=True))
        # a system's name, the checkpoint that answers for it, and how many answers it draws for each one it keeps
        self.systems = [(name, name, 1) for name in config.policies]
        self.systems += [(name, one.of, one.best_of) for name, one in config.baselines.items()]
        self.several = len(set(self.policies.values())) > 1
        self.lots: list[Lot] = []
        self.readings: list[Reading] = []
        self.notes: list[str] = []
        self.partly = False
        self.prompts = 0
        self.sizes: list[int] = []
        """Items of the tasks whose number is known."""

    # ---- what is answered ----

    def prompt_set(self) -> None:
        """Responses to the prompts, a reward model's scores of them, and their KL to the reference."""
        config = self.config
        self.prompts = self.rows["prompts"].held_out(config.max_prompts)
        answers = self.prompts * config.samples_per_prompt
        length = config.max_prompt_tokens + config.max_tokens
        self._ask(self.prompts, config.samples_per_prompt, config.max_prompt_tokens, config.max_tokens)
        for model in self.models.get("reward", ()):
            self.readings.append(scored("reward", model, answers * len(self.systems), length))
        if config.temperature == 0:
            return
        reference = self.policies[config.reference]
        for name, of, best_of in self.systems:
            if best_of == 1 and name != config.reference:
                for who in (of, config.reference):
                    beside = () if of == config.reference else (reference if who == of else self.policies[of],)
                    self.readings.append(self._read(who, answers, length, config.max_tokens, beside))

    def _ask(self, prompts: int | None, samples: int, prompt: int, response: int, top_p: float = 1.0) -> None:
        """Every system answers; the best of N is kept by the reward model's scores of all of them."""
        for _, of, best_of in self.systems:
            sequences = None if prompts is None else prompts * samples * best_of
            call = self.most if sequences is None else max(1, sequences)
            self.lots.append(
                Lot(of, self.policies[of], sequences, prompts or 0, prompt, response, call, top_p < 1, self.several)
            )
            if best_of > 1:
                reward = self.models["reward"][0]
                self.readings.append(scored("reward", reward, sequences, prompt + response))

    most = 1 << 20
    """Sequences of a task whose number is not known: as many as an engine takes."""

    # ---- tasks ----

    def task(self, name: str, task: TaskConfig) -> None:
        """What one task has systems and reward models do; a note says what of it is not counted."""
        config = self.config
        if isinstance(task, LmEvalConfig):
            self._left_out(f"{name}: lm-eval's own tasks run in its own process and are not counted.")
        elif isinstance(task, MultipleChoiceConfig | PerplexityConfig | PreferenceConfig):
            length = task.max_length if isinstance(task, PerplexityConfig) else config.max_context
            words = length if isinstance(task, PerplexityConfig) else min(length, config.max_tokens)
            for of in dict.fromkeys(of for _, of, best_of in self.systems if best_of == 1):
                self.readings.append(self._read(of, None, length, words, ()))
            self._left_out(f"{name}: its memory is counted, not its time: how long its texts are is not known.")
        elif isinstance(task, RewardPairsConfig):
            for field in ("reward", "second_reward"):
                self.readings += [scored(field, one, None, config.max_context) for one in self.models.get(field, ())]
            self._left_out(f"{name}: its memory is counted, not its time: how long its texts are is not known.")
        else:
            self._answered(name, task)

    def _left_out(self, note: str) -> None:
        """Say what is not counted."""
        self.notes.append(note)
        self.partly = True

    def _answered(self, name: str, task: Any) -> None:
        config, response = self.config, task.max_tokens
        items, turns = _items(name, task)
        if items is None:
            self._left_out(
                f"{name}: its memory is counted, not its time: its records are on the Hub, and max_items is not set."
            )
        else:
            self.sizes.append(items)
        prompt = max(1, config.max_context - response)
        asked = None if items is None else items + turns
        self._ask(asked, getattr(task, "samples", 1), prompt, response, getattr(task, "top_p", 1.0))
        if not isinstance(task, JudgedConfig):
            return
        if task.judge.endpoint is not None:
            self._left_out(f"{name}: {task.judge.endpoint.model}, a server, judges; that is not counted.")
        elif task.judge.which is not None:
            number = None if asked is None else asked * len(self.systems)
            self.readings += [
                scored(task.judge.which, one, number, config.max_context)
                for one in self.models.get(task.judge.which, ())
            ]

    # ---- what is read ----

    def pairs_and_heldout(self) -> None:
        """The reward models' accuracy on pairs, and every checkpoint's loss on held-out rows."""
        config = self.config
        if config.pairs is not None and config.reward is not None:
            pairs = self.rows["pairs"].held_out(config.max_pairs)
            for field in ("reward", "second_reward"):
                self.readings += [
                    scored(field, one, 2 * pairs, config.max_context) for one in self.models.get(field, ())
                ]
            self.notes.append("pairs: taken to be as long as max_context; nothing limits their length.")
        if config.heldout is None:
            return
        rows, length = self.rows["heldout"].held_out(config.max_heldout), config.max_heldout_length
        for of in self.policies:
            beside = () if of == config.reference else (self.policies[config.reference],)
            self.readings.append(self._read(of, rows, length, length, beside))

    def _read(self, who: str, rows: int | None, length: int, words: int, beside: tuple[Architecture, ...]) -> Reading:
        return Reading(who, self.policies[who], length, max(BATCH_TOKENS, length), rows, words, beside)


def _items(name: str, task: Any) -> tuple[int | None, int]:
    """Items of a task, and the turns that they have beside the first; None where that takes a look at the Hub.

    Of files that cannot be read nothing is said here: the stage itself refuses them, with their place.
    """
    if task.files is None:
        return task.max_items, 0
    try:
        records = task.records(Path.cwd(), 0)
        if isinstance(task, JudgedConfig):
            return len(records), sum(len(item.data["later"]) for item in make_items(records, None, None, name))
    except UserError:
        return task.max_items, 0
    return len(records), 0
