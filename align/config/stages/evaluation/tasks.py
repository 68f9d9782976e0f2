"""Settings of every evaluation task. Torch-free.

The code of a kind is found by its settings class in ``align.evaluation.tasks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.config.endpoint import TaskJudge
from align.config.environment import EnvironmentConfig
from align.config.recipe.format_options import Format, FormatOptions
from align.config.recipe.record_mapping import RecordMapping
from align.config.recipe.source_settings import KNOWN_DATASETS
from align.config.stages.evaluation.task_fields import (
    CHOICE_COLUMNS,
    HUB_FIELDS,
    JUDGED_COLUMNS,
    RecordFields,
    SamplingFields,
    TaskConfig,
    TemperatureFields,
)
from align.config.user_paths import UserPath

if TYPE_CHECKING:
    AnyTask = TaskConfig

MAX_EXAMPLES = 32
"""Solved GSM8K problems that are kept for prompting; more would not fit most models' context."""
MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""MT-Bench's sampling temperatures by category (FastChat, llm_judge/common.py)."""
MT_BENCH_DEFAULT_TEMPERATURE = 0.7
"""FastChat's temperature for an unknown category."""
REWARD_PAIR_DATASETS = {"allenai/reward-bench": {"dataset": "allenai/reward-bench", "split": "filtered"}}
"""Datasets of pairs whose usual split is not ``test``."""
CHOICE_DATASETS = {
    "arc": KNOWN_DATASETS["arc_easy"],
    "mmlu": KNOWN_DATASETS["mmlu"],
    "truthfulqa": {**KNOWN_DATASETS["truthfulqa"], "config": "multiple_choice"},
}
"""Format of multiple choice → the benchmark's usual dataset."""

JudgingMode = Literal["grade", "compare"]
PairLayout = Literal["pairs", "reward_bench", "reward_bench_2"]


class IfevalConfig(RecordFields, SamplingFields, TaskConfig):
    """Settings of IFEval. Records: ``key``, ``prompt``, ``instruction_id_list``, ``kwargs``, as google/IFEval has."""

    task: Literal["ifeval"] = "ifeval"

    column_names: ClassVar[Sequence[str]] = ("key", "prompt", "instruction_id_list", "kwargs")
    max_tokens: int = Field(1280, ge=1)
    """Longest answer in tokens. 1280 is lm-eval's; many instructions ask for hundreds of words."""


class IfbenchConfig(IfevalConfig):
    """Settings of IFBench. Records: as IFEval's, with the instructions of allenai/IFBench_test."""

    task: Literal["ifbench"] = "ifbench"  # type: ignore[assignment]


class Gsm8kConfig(RecordFields, SamplingFields, TaskConfig):
    """Settings of GSM8K. Records: ``question`` and ``answer``, the solution with ``#### number`` at its end."""

    task: Literal["gsm8k"] = "gsm8k"

    column_names: ClassVar[Sequence[str]] = ("question", "answer")
    shots: int = Field(0, ge=0, le=MAX_EXAMPLES // 2)
    """Solved problems that every system sees as earlier turns; a prompted baseline's examples come on top."""
    suffix: str = ""
    """Text after every question, such as an instruction to end with #### and the number."""
    examples_files: list[UserPath] | None = Field(None, min_length=1)
    """Files of solved problems. They may be the same as ``files``: a problem shown as an example is not asked then."""
    examples_split: str | None = None
    """Split of solved problems, for a dataset of the Hub: train."""

    identified: ClassVar[frozenset[str]] = frozenset({"files", "examples_files"})

    @model_validator(mode="after")
    def _check_examples_exist(self) -> Self:
        if self.examples_split is not None and self.files is not None:
            raise ValueError("examples_split is a split on the Hub, and the problems are in files; use examples_files")
        if self.examples_split is not None and self.examples_files is not None:
            raise ValueError("examples come from examples_split or from examples_files; drop one of them")
        if self.shots and self.examples_files is None and self.examples_split is None:
            raise ValueError("shots need solved problems: give examples_files, or examples_split on the Hub")
        return self


class MultipleChoiceConfig(RecordFields, TaskConfig):
    """Multiple choice by log-likelihood.

    Other tables become questions with ``columns``: ``{question: goal, choices: [sol1, sol2], answer: label}``.
    """

    task: Literal["multiple_choice"] = "multiple_choice"

    column_names: ClassVar[Sequence[str]] = CHOICE_COLUMNS
    format: Literal["auto", "arc", "mmlu", "truthfulqa", "generic"] = "auto"
    """Format of a record; ``auto`` looks at the first hundred and reports its choice. ``generic`` has ``question``,
    ``choices`` (a list, a mapping, or columns ``A``, ``B`` and so on) and ``answer`` (a number, letter, text or truth
    value), and ``category`` for the table by source."""
    first_choice: Literal[0, 1] | None = None
    """Number of the first choice, where ``answer`` is a number. Numbers count from 0 by default; a number that is
    written as text needs this setting."""
    chat: bool = False
    """false reads plain text, lm-eval's default; true puts the question into a user turn under the chat template and
    reads each choice as the assistant's answer, without the end of its turn."""
    shots: int = Field(0, ge=0, le=64)
    """Solved examples before every question, the first of the examples; of the same subject for MMLU. A prompted
    system's number of shots overrides it."""
    examples_files: list[UserPath] | None = Field(None, min_length=1)
    """Files of examples in the questions' format; examples that are also questions are skipped."""
    examples_split: str | None = None
    """For a dataset of the Hub: the split of the examples (dev for MMLU, train for ARC)."""

    identified: ClassVar[frozenset[str]] = frozenset({"files", "examples_files"})
    keyed_when_set: ClassVar[frozenset[str]] = RecordFields.keyed_when_set | {"first_choice"}

    def hub_defaults(self) -> Mapping[str, str] | None:
        """Return the dataset of the benchmark that ``format`` names."""
        return CHOICE_DATASETS.get(self.format)

    @model_validator(mode="after")
    def _check_examples(self) -> Self:
        if self.examples_files is not None and self.examples_split is not None:
            raise ValueError("it has examples_files and examples_split; drop one of them")
        if self.examples_split is not None and self.files is not None:
            raise ValueError("examples_split is a split of a dataset of the Hub; with files, name examples_files")
        if self.shots and self.format == "truthfulqa":
            raise ValueError("TruthfulQA's prompt has six examples already; drop shots")
        if self.shots and self.examples_files is None and self.examples_split is None:
            raise ValueError(f"shots is {self.shots} and there are no examples; name examples_files or examples_split")
        return self


class XstestConfig(RecordFields, SamplingFields, TaskConfig):
    """Settings of XSTest. Records: ``prompt``, ``type``, ``label`` (``safe`` or ``unsafe``), and an optional ``id``.

    Without ``label``, as in the first version's files, types that begin with ``contrast`` are unsafe.
    """

    task: Literal["xstest"] = "xstest"

    column_names: ClassVar[Sequence[str]] = ("id", "prompt", "type", "label")


PART_NAME = r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$"
"""Names that an environment may give the parts of its score."""


class EnvironmentTaskConfig(RecordFields, TemperatureFields, TaskConfig):
    """Episodes in an environment, one or more for each row. Rows: as ``reset`` of the environment reads them.

    ``prompt`` (text or messages) begins an episode whose ``reset`` returns None; ``id`` names a row.
    """

    task: Literal["environment"] = "environment"

    column_names: ClassVar[Sequence[str]] = ("id", "source", "prompt", "answer", "checks")
    environment: EnvironmentConfig
    """Environment that the systems act in, as in the stages that learn from rollouts."""
    rows: str | None = None
    """Stage of prompts from the evaluation's ``rows``, whose ``test`` split is played instead of files."""
    success: float | Annotated[str, Field(pattern=PART_NAME)] = 1.0
    """Score from which on an episode counts as a success; or the name of a part of the score, which then has to be 1
    or more."""
    samples: int = Field(1, ge=1)
    """Episodes of each row; more than one needs a temperature above 0. The powers of two up to it give pass@k."""

    identified: ClassVar[frozenset[str]] = RecordFields.identified | {"environment"}

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        places = [
            name
            for name in ("files", *HUB_FIELDS, "header", "records", "delimiter", "encoding")
            if getattr(self, name) is not None
        ]
        if self.rows is None and not places:
            raise ValueError(
                "there are no rows to play; name `rows`, a stage of prompts, or `files`, or a dataset and revision on "
                "the Hub"
            )
        if self.rows is None:
            return super()._check_place()  # type: ignore[operator,no-any-return]
        if places:
            raise ValueError(f"it has rows, so '{places[0]}' has no effect; drop one of them")
        if self.columns:
            raise ValueError("columns map the columns of files, and the rows of a stage have align's own; drop columns")
        return self


class JudgedConfig(RecordFields, TaskConfig):
    """Settings of a judged task.

    Records have ``turns`` (MT-Bench), ``instruction`` with or without ``input`` and ``output`` (AlpacaEval), ``prompt``
    (text, turns or messages) or ``question``; ``category``, ``dataset`` or ``source`` names their category.
    """

    task: Literal["judged"] = "judged"

    column_names: ClassVar[Sequence[str]] = JUDGED_COLUMNS
    preset: Literal["mt_bench", "alpaca_eval"] | None = None
    """``mt_bench``: graded, temperature by category, references for math, reasoning and coding. ``alpaca_eval``:
    compared."""
    mode: JudgingMode | None = None
    """``grade``: 1 to 10 for each answer. ``compare``: the better of two systems' answers; the default without a
    preset."""
    judge: TaskJudge
    """The judge and its rubric."""
    against: Literal["reference", "base", "file", "all"] | None = None
    """Opponent of each system in ``compare``: the stage's reference (the default), the base model, the ``output`` of
    the records, or every other system."""
    references_files: list[UserPath] | None = Field(None, min_length=1)
    """Files of reference answers for the judge, by ``question_id``; by default the records' ``reference``."""
    max_tokens: int = Field(1024, ge=1)
    """Longest answer to each turn; 1024 is FastChat's. A longer one is cut off there, and counted."""
    temperature: float | None = Field(None, ge=0)
    """Sampling temperature of the answers; by default 0, and with ``mt_bench`` FastChat's for the category."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the likeliest tokens that make up this much probability; 1 keeps all."""

    identified: ClassVar[frozenset[str]] = RecordFields.identified | {"judge", "references_files"}

    @property
    def judging_mode(self) -> JudgingMode:
        """``mode``, or the preset's."""
        return self.mode or ("grade" if self.preset == "mt_bench" else "compare")

    def hub_defaults(self) -> Mapping[str, str] | None:
        """Return the preset's dataset on the Hub, if the dataset's records are plain files."""
        return KNOWN_DATASETS.get(self.preset or "")

    @model_validator(mode="after")
    def _check_consistent(self) -> Self:
        if self.judging_mode == "grade" and self.judge.reward:
            raise ValueError(
                "a reward model's scores are not grades from 1 to 10. Write `mode: compare`, or give the judge an "
                "endpoint"
            )
        if self.judging_mode == "grade" and self.against is not None:
            raise ValueError("against is the opponent in `mode: compare`, and this task grades; drop one of them")
        if self.references_files and self.judge.reward:
            raise ValueError("references_files are shown to an endpoint; a reward model reads none")
        return self

    def sampling_temperature(self, category: str) -> float:
        """Return the sampling temperature of answers to a question of this category."""
        if self.temperature is not None:
            return self.temperature
        if self.preset == "mt_bench":
            return MT_BENCH_TEMPERATURES.get(category, MT_BENCH_DEFAULT_TEMPERATURE)
        return 0.0


class PreferenceConfig(RecordFields, RecordMapping, TaskConfig):
    """Pairs of a better and a worse answer: files, a dataset of the Hub, or by default the stage's ``pairs``."""

    task: Literal["preference"] = "preference"
    format: Format = "auto"
    """Format of a record of the files, as in a recipe's source; ``auto`` reports its choice."""
    options: FormatOptions = FormatOptions()
    """Settings of the format, as in a recipe's source."""

    @property
    def reads_stage_pairs(self) -> bool:
        """True where neither files nor a dataset are named, so the stage's ``pairs`` are read."""
        return all(getattr(self, name) is None for name in ("files", *HUB_FIELDS))

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if self.reads_stage_pairs:
            changed = self.changed(*RecordMapping.model_fields, "format", "options")
            if changed:
                raise ValueError(
                    f"{changed[0]} is about files or a dataset, and there are none: it takes the stage's `pairs`. "
                    f"Name files, or remove {changed[0]}"
                )
            return self
        if self.files is None and (self.dataset is None or self.revision is None):
            raise ValueError(
                "give its files, or its dataset and revision (a commit, 40 hexadecimal digits) on the Hub; without any "
                "of them it takes the stage's `pairs`"
            )
        return super()._check_place()  # type: ignore[operator,no-any-return]


class PerplexityConfig(RecordFields, TaskConfig):
    """Held-out plain text."""

    task: Literal["perplexity"] = "perplexity"

    column_names: ClassVar[Sequence[str]] = ("text", "messages", "prompt", "completion")
    files: list[UserPath] | None = Field(None, min_length=1)
    """Paths or globs: .txt and .md files, a document each, and files of records as for the other tasks."""
    texts: str | None = None
    """Stage of plain texts from the evaluation's ``texts``, whose ``test`` split is read instead of files. A baseline
    with ``shots`` then reads as many texts of the ``train`` split before each text, and a baseline with ``system``
    reads that message. This measures the effect of prompting on a domain."""
    fields: list[str] | None = Field(None, min_length=1)
    """Fields that make up a record's text, joined by a blank line. By default ``text`` (or content, document, page),
    else the contents of ``messages``, or of ``prompt`` and ``completion``, without a template."""
    chunk: int | None = Field(None, ge=200)
    """Divide documents into pieces of at most this many characters, at line breaks where possible; each becomes a
    document. A single long file is a sample of one, and has no interval."""
    max_characters: int | None = Field(None, ge=1)
    """Characters that are read from the beginning of each document. Every tokenizer reads the same text."""
    max_length: int = Field(1024, ge=1)
    """Tokens of a window, or as many as the model can read where that is fewer; more context makes text cheaper."""

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if self.texts is None:
            return super()._check_place()  # type: ignore[operator,no-any-return]
        others = [name for name in ("files", *HUB_FIELDS, "fields") if getattr(self, name) is not None]
        if others:
            raise ValueError(f"it has texts, so '{others[0]}' has no effect; drop one of them")
        return self


class RewardPairsConfig(RecordFields, RecordMapping, TaskConfig):
    """Pairs that the stage's reward models are measured on."""

    task: Literal["reward_pairs"] = "reward_pairs"
    layout: Literal["auto"] | PairLayout = "auto"
    """``pairs``: in any format of a recipe. ``reward_bench``: the same with a RewardBench subset each, which gives its
    four sections. ``reward_bench_2``: ``chosen`` and ``rejected`` are lists of texts. ``auto`` looks at the records."""
    category: str | None = None
    """Field of a record with its category; by default ``subset`` if records have it, else the file's name."""
    format: Format = "auto"
    """Format of a pair, as in a recipe's source."""
    options: FormatOptions = FormatOptions()
    """Settings of the format, as in a recipe's source."""

    def hub_defaults(self) -> Mapping[str, str] | None:
        """Return the usual split of a known dataset."""
        return REWARD_PAIR_DATASETS.get(self.dataset or "")


class LmEvalConfig(TaskConfig):
    """Tasks of lm-eval, and the options it runs them with."""

    task: Literal["lm_eval"] = "lm_eval"
    tasks: list[str] = Field(min_length=1)
    """Names of lm-eval's tasks or groups (``arc_easy``, ``mmlu``; `lm-eval ls tasks` lists them), or of yours."""
    include: UserPath | None = None
    """Folder of your tasks in lm-eval's YAML format; paths in its files start at the current folder."""
    revisions: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]] = Field({})
    """Commits of the datasets that the tasks read from the Hub: ``allenai/ai2_arc: <40 hexadecimal digits>``."""
    backend: Literal["hf", "vllm"] = "hf"
    """Backend of lm-eval. The two backends' numbers differ in the last digits: compare only numbers of the same
    backend."""
    shots: int | None = Field(None, ge=0, le=64)
    """Solved examples before each question, lm-eval's own; by default the task's number, else none."""
    chat: bool = False
    """Ask through the checkpoint's chat template: for instructed models. Base models and most published numbers of
    multiple-choice tasks go without."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many questions of each task; fewer make wider intervals."""
    batch_size: int = Field(8, ge=1)
    """Sequences in one pass of ``hf``; vLLM batches by itself (``runtime.engine.batch_size``)."""
    max_length: int | None = Field(None, ge=2)
    """Longest question with its answer, in tokens; a longer one loses its beginning. By default the model's limit."""
    gen_kwargs: dict[str, bool | int | float | str | list[str]] = Field({})
    """Overrides of the sampling: ``{max_gen_toks: 256}``, ``{do_sample: true, temperature: 0.7}``."""

    identified: ClassVar[frozenset[str]] = frozenset({"include"})

    @model_validator(mode="after")
    def _check_distinct_tasks(self) -> Self:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks names one twice; name each once")
        return self
