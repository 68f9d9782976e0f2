"""Settings of the stage ``synthesize``: instructions, responses or pairs from a model. Torch-free."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StrictBool, field_validator, model_validator

from align.config.base import Config, PrecisionSetting, settings_for_key, stage_input
from align.config.chat_template import TEMPLATE_FIELDS, TemplateVariables, Thinking, ThinkingBudget, check_stage_budget
from align.config.endpoint import EndpointConfig, JudgeConfig, refuse_settings_of_server
from align.config.environment import EnvironmentConfig, take_episode_tokens
from align.config.scores import Score, score_identities
from align.config.stages.sample import SplitCounts
from align.config.user_paths import UserPath
from align.errors import UserError
from align.store.artifacts import GENERATORS, PROMPT_SOURCES, Kind
from align.store.fingerprint import canonical, file_digest

PROMPT = """\
Here is the beginning of a list of varied tasks that people give to an assistant which reads and writes text only.
Continue it with tasks {first} to {last}, as a numbered list. Each new task differs in subject and wording from the
others, can be done without pictures or files, and brings along whatever text or numbers it is about. Write tasks only,
not their answers.

{tasks}"""

BLACKLIST = (
    "image",
    "images",
    "graph",
    "graphs",
    "picture",
    "pictures",
    "photo",
    "photos",
    "file",
    "files",
    "map",
    "maps",
    "draw",
    "plot",
    "go to",
    "video",
    "videos",
    "audio",
    "music",
    "flowchart",
    "diagram",
)
"""Words of tasks that a text model cannot do; close to self-instruct's list."""


class InstructionsTask(Config):
    """New instructions like the seeds (self-instruct, arXiv 2212.10560)."""

    type: Literal["instructions"]
    count: int = Field(100, ge=1)
    """Number of new instructions."""
    max_requests: int | None = Field(None, ge=1)
    """Most requests, even if ``count`` is not reached; by default ``count``."""
    seed_examples: int = Field(6, ge=1, le=64)
    """Seeds per request."""
    made_examples: int = Field(2, ge=0, le=64)
    """New instructions per request, in addition to the seeds; replaced by seeds until there are some."""
    per_request: int = Field(8, ge=1, le=64)
    """Instructions to generate per request."""
    at_once: int = Field(8, ge=1, le=1024)
    """Requests with the same pool of examples; more run in parallel, and repeat each other more."""
    min_words: int = Field(4, ge=1)
    """Shorter instructions are dropped."""
    max_words: int = Field(150, ge=1)
    """Longer instructions are dropped."""
    max_similarity: float = Field(0.7, gt=0, le=1)
    """Highest ROUGE-L against every seed and every instruction kept so far; 1 drops no instruction."""
    blacklist: tuple[str, ...] = Field(BLACKLIST, strict=False)
    """Words or phrases that no instruction may contain (case-insensitive)."""
    blacklist_starts: tuple[str, ...] = Field(("write a program",), strict=False)
    """Phrases that no instruction may begin with (case-insensitive)."""
    prompt: str = PROMPT
    """Template of the request: ``{tasks}`` are the examples, ``{first}`` and ``{last}`` the numbers to continue
    with."""
    test_size: float = Field(0.1, gt=0, lt=1)
    """Share of the new instructions that goes to the test split, by prompt."""

    @field_validator("prompt")
    @classmethod
    def _check_prompt_fields(cls, prompt: str) -> str:
        try:
            names = {name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None}
        except ValueError as error:
            raise ValueError(f"cannot be filled in ({error}); write a brace of its own twice") from None
        if "tasks" not in names or names - {"tasks", "first", "last"}:
            raise ValueError(f"needs {{tasks}}, and may have {{first}} and {{last}}; it has {sorted(names)}")
        return prompt

    @model_validator(mode="after")
    def _check_lengths(self) -> InstructionsTask:
        if self.min_words > self.max_words:
            raise ValueError(f"min_words {self.min_words} is more than max_words {self.max_words}")
        return self


class ResponsesTask(Config):
    """Answers to the prompts of an earlier stage, as instruction data."""

    type: Literal["responses"]
    n: int = Field(1, ge=1, le=64)
    """Answers per prompt; each becomes a row."""
    cut_off: Literal["drop", "keep"] = "drop"
    """Answers that reached ``max_tokens``: training on them teaches the model not to stop."""


class BestOfTask(Config):
    """The best of several answers to each prompt (rejection sampling), as instruction data."""

    type: Literal["best_of"]
    n: int = Field(8, ge=2, le=256)
    """Answers to choose from; more give a better one, and cost proportionally more."""
    keep: int = Field(1, ge=1)
    """Number of best different answers per prompt that become rows."""
    min_score: float | None = None
    """Answers with a lower score are dropped, and prompts without a better answer. null always keeps the best."""
    cut_off: Literal["drop", "keep"] = "drop"
    """Answers that reached ``max_tokens``."""

    @model_validator(mode="after")
    def _check_keep(self) -> BestOfTask:
        if self.keep > self.n:
            raise ValueError(f"keep {self.keep} is more than n {self.n}")
        return self


class PairsTask(Config):
    """Pairs of the model's own answers, labeled, as preference data."""

    type: Literal["pairs"]
    n: int = Field(4, ge=2, le=64)
    """Answers per prompt. A judge compares every two in both orders: n (n - 1) requests per prompt."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """One pair per prompt (best and worst answer), or every two answers."""
    min_margin: float = Field(0.0, ge=0)
    """Pairs whose scores differ by less count as ties; not for a judge, which gives no scores."""


Task = Annotated[InstructionsTask | ResponsesTask | BestOfTask | PairsTask, Field(discriminator="type")]


class SynthesizeConfig(Config):
    """The task, the model that answers, and the scorer or judge."""

    task: Task
    """``{type: instructions|responses|best_of|pairs, ...}``."""
    model: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint answers, through ``runtime.engine``; null for ``endpoint``."""
    endpoint: EndpointConfig | None = None
    """OpenAI-compatible server that answers, instead of ``model``."""
    prompts: stage_input(*PROMPT_SOURCES) | None = None  # type: ignore[valid-type]
    """Stage with the prompts to answer, both splits; for instructions, its train prompts are the seeds."""
    seeds: UserPath | None = None
    """Seed instructions: a .jsonl file with a field ``instruction``, like self-instruct's seed_tasks.jsonl."""
    environment: EnvironmentConfig | None = None
    """Environment that the model or endpoint acts in over several turns, with tools or by answers. Rows are whole
    episodes. It scores them; ``reward`` or ``score`` read the last turn, and add to that (docs/environments.md)."""
    reward: stage_input(Kind.REWARD) | None = None  # type: ignore[valid-type]
    """Reward stage that scores answers."""
    score: Score = None
    """Function that scores answers (``gold``, ``gsm8k_answer``, or an import path ``module:name``), or a list of
    rewards."""
    judge: JudgeConfig | None = None
    """Judge that compares every two answers in both orders; only for pairs."""
    judge_model: stage_input(*GENERATORS) | None = None  # type: ignore[valid-type]
    """Stage whose checkpoint judges, if ``judge`` has no endpoint."""
    thinking: Thinking = None
    """``on`` or ``off`` sets the thinking switch of ``model``'s chat template (docs/thinking.md)."""
    chat_template_kwargs: TemplateVariables = Field({})
    """Variables of ``model``'s chat template, in place of the checkpoint's."""
    system: str | None = Field(None, min_length=1)
    """System message for prompts that have none; the rows do not contain it."""
    temperature: float = Field(1.0, ge=0, le=5)
    """Divisor of the logits; higher values give more varied answers. 0 is greedy, for ``n: 1``."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the most likely tokens with this total probability; 1 uses all."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens per answer."""
    thinking_budget: ThinkingBudget = None
    """Tokens after which a thought of ``model`` is closed by force and its answer begins; null for no limit. In an
    environment it holds for each turn (docs/thinking.md)."""
    max_prompt_tokens: int = Field(2048, ge=1)
    """Longer prompts are dropped and counted; only for ``model`` and ``judge_model``, a server has its own limit."""
    max_prompts: SplitCounts = SplitCounts()
    """Most prompts per split: ``{train: 600, test: 100}``."""
    precision: PrecisionSetting = "auto"
    """Type of the matrix products of ``model``, ``judge_model`` and ``reward``; ``auto`` measures the faster one."""
    cache: StrictBool | str = True
    """Cache of answers that stages and runs share: true for the store's cache, a folder for another one, false for
    none. A killed stage always resumes from its own answers."""
    max_cost: float | None = Field(None, gt=0)
    """Stop before the endpoints' total cost exceeds this, by their prices; raise it and run again to continue."""
    on_error: Literal["stop", "drop"] = "stop"
    """Stop, or drop the row, if an endpoint refuses a request or never answers in a readable form. Part of the key."""

    # endpoints, seeds and scorer enter the key through ``identities``; rate, retries and price of requests do not
    # change the result
    identified: ClassVar[frozenset[str]] = frozenset(
        {"endpoint", "environment", "seeds", "score", "judge", "cache", "max_cost"}
    )
    keyed_when_set: ClassVar[frozenset[str]] = TEMPLATE_FIELDS | {"environment", "thinking_budget"}

    @model_validator(mode="after")
    def _check_single_generator(self) -> SynthesizeConfig:
        if (self.model is None) == (self.endpoint is None):
            have = "both are" if self.model else "neither is"
            raise ValueError(f"either model or endpoint answers; {have} set")
        refuse_settings_of_server(self, self.endpoint)
        if self.judge is not None and (self.judge_model is None) == (self.judge.endpoint is None):
            have = "both are" if self.judge_model else "neither is"
            raise ValueError(f"either judge.endpoint or judge_model judges; {have} set")
        if self.judge is None and self.judge_model is not None:
            raise ValueError("judge_model needs `judge: {}` too, with the judge's settings")
        return self

    @model_validator(mode="after")
    def _check_task(self) -> SynthesizeConfig:
        kind = self.task.type
        if kind == "instructions" and (self.seeds is None) == (self.prompts is None):
            raise ValueError("instructions need either seeds or prompts; set one of them")
        if kind != "instructions" and self.prompts is None:
            raise ValueError(f"{kind} needs prompts: the stage whose prompts are answered")
        if kind != "instructions" and self.seeds is not None:
            raise ValueError(f"seeds are for instructions; {kind} answers prompts")
        labels = [name for name in ("reward", "score", "judge") if getattr(self, name) is not None]
        allowed = {"best_of": ("reward", "score"), "pairs": ("reward", "score", "judge")}.get(kind, ())
        wrong = [name for name in labels if name not in allowed]
        if wrong:
            raise ValueError(f"{kind} does not use {', '.join(wrong)}")
        if self.environment is not None:
            self._check_environment(labels)
        elif allowed and len(labels) != 1:
            raise ValueError(f"{kind} needs one of {', '.join(allowed)}; {', '.join(labels) or 'none'} set")
        if isinstance(self.task, PairsTask) and self.judge is not None and self.task.min_margin:
            raise ValueError("task.min_margin is a difference of scores, and a judge gives none")
        if self.temperature == 0 and getattr(self.task, "n", 1) > 1:
            raise ValueError("temperature 0 gives the same answer n times; raise it, or set task.n to 1")
        return self

    def _check_environment(self, labels: list[str]) -> None:
        """Raise ``ValueError`` for a task without episodes, and for what cannot score them."""
        if self.task.type == "instructions":
            raise ValueError(
                "environment plays episodes from prompts, and instructions writes new prompts; remove it here, and set "
                "it in a stage that answers them (responses, best_of, pairs)"
            )
        if self.endpoint is not None and "tools" in self.endpoint.extra:
            raise ValueError("endpoint.extra sets tools, which are those of the environment; remove them")
        if self.judge is not None:
            raise ValueError("judge compares single answers, and an environment scores its episodes; remove judge")
        if len(labels) > 1:
            raise ValueError("both score and reward are set; with an environment at most one of them scores")

    @model_validator(mode="after")
    def _use_episode_tokens(self) -> SynthesizeConfig:
        take_episode_tokens(self)
        return self

    @model_validator(mode="after")
    def _check_thinking_budget(self) -> SynthesizeConfig:
        if self.thinking_budget is not None and self.endpoint is not None:
            raise ValueError(
                "thinking_budget closes thoughts of a model in this pipeline, and endpoint is a server; remove it, or "
                "set the server's own limit in endpoint.extra"
            )
        check_stage_budget(self)
        return self

    @model_validator(mode="after")
    def _check_budget_has_prices(self) -> SynthesizeConfig:
        judge = None if self.judge is None else self.judge.endpoint
        endpoints = {"endpoint": self.endpoint, "judge.endpoint": judge}
        endpoints = {name: endpoint for name, endpoint in endpoints.items() if endpoint}
        if self.max_cost is not None and not endpoints:
            raise ValueError("max_cost is for endpoints; a model of this pipeline has no price")
        if self.max_cost is not None:
            for name, endpoint in endpoints.items():
                if endpoint is not None and endpoint.price_input is None:
                    raise ValueError(f"max_cost needs {name}.price_input and {name}.price_output")
        return self

    def makes(self) -> Kind:
        """Return the kind of data that the task makes."""
        return {"instructions": Kind.PROMPTS, "pairs": Kind.PREFERENCES}.get(self.task.type, Kind.INSTRUCTIONS)

    def identities(self, base: Path) -> dict[str, str]:
        """Return identities of endpoints' models (by name), seeds (by content), functions and environment (by code)."""
        identities = {}
        if self.environment is not None:
            identities["environment"] = self.environment.identity()
        if self.endpoint is not None:
            identities["endpoint"] = canonical(self.endpoint.identity())
        if self.judge is not None:
            # The judge's settings without its address: the same model elsewhere gives the same verdicts.
            settings = settings_for_key(self.judge, self.judge.model_dump(exclude={"endpoint"}))
            judge = self.judge.endpoint.identity() if self.judge.endpoint is not None else {}
            identities["judge"] = canonical({**settings, **judge})
        if self.seeds is not None:
            path = base / self.seeds
            if not path.is_file():
                raise UserError(f"seeds: there is no file {path}.")
            identities["seeds"] = file_digest(path)
        return identities | score_identities(self.score)
